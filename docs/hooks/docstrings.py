"""Docstrings in this project's form become Markdown.

A docstring opens with sentences. Then come fields, a word and a colon each (`Args:`, `Shapes:`,
`Returns:`, `Raises:`, `Source:`): text on the same line, or indented below it. In `Args:` and
`Attributes:` every line that starts at the field's indentation names one or more parameters, with
a colon after each or after the last. Lines in columns are a table. What stands between backticks
and is on a page of the API becomes a link.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import griffe

API = Path(__file__).resolve().parents[1] / "api"
FIELD = re.compile(r"^(Args|Attributes|Args, raises|Shapes|Returns|Raises|Source):(?: (.*))?$")
PAIRS = re.compile(r"^(\w+: \w+, )+\w+: \w+\.?$")
COLUMNS = re.compile(r"\S {3,}\S")
# Code, and shapes such as [B, N, K] or [..., D].
CODE = re.compile(r"(`[^`]*`|\[(?:\.\.\., )?\w[\w ,./*()+-]*\])")
NAME = re.compile(r"[\w*]+")
QUOTED = r"`\g<0>`"


def documented() -> dict[str, str]:
    """Identifiers on the pages of the API by what docstrings call them."""
    names: dict[str, str] = {}
    for page in API.glob("*.md"):
        for identifier in re.findall(r"^::: (\S+)", page.read_text(), re.M):
            short = identifier.rpartition(".")[2]
            package = "mocapsnet.kernels" if ".kernels." in identifier else "mocapsnet"
            names |= {short: identifier, f"{package}.{short}": identifier, identifier: identifier}
    return names


class Docstrings(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            others = {name: path for name, path in documented().items() if path != obj.path}
            obj.docstring.value = markdown(obj.docstring.value, others)


def markdown(docstring: str, links: dict[str, str]) -> str:
    """The docstring as Markdown; `links` has the identifiers of names that are documented."""
    made: list[str] = []
    lines = inspect.cleandoc(docstring).split("\n")
    while lines:
        line = lines.pop(0)
        field = FIELD.match(line)
        if field is None:
            table = COLUMNS.search(line)
            made.append(f"    {line}" if table else marked(line, links))
            continue
        body = []
        while lines and (not lines[0] or lines[0].startswith(" ")):
            body.append(lines.pop(0))
        name, text = field.groups()
        below = inspect.cleandoc("\n".join(body))
        if name in ("Args", "Attributes") and not text:
            made += ["", f"**{name}**", "", *items(below, links), ""]
        else:
            words = " ".join(filter(None, [text, *below.split("\n")]))
            made += ["", f"**{name}** {marked(words, links)}", ""]
    return "\n".join(made).strip()


def items(block: str, links: dict[str, str]) -> list[str]:
    """A list with an item for every parameter, or parameters, of a field."""
    entries: list[str] = []
    for line in block.split("\n"):
        if line.startswith(" ") and entries:
            entries[-1] += " " + line.strip()
        else:
            entries.append(line)
    made = []
    for entry in filter(None, entries):
        names, _, text = entry.partition(": ")
        if PAIRS.match(entry):
            made.append("- " + re.sub(r"(\w+)(?=:)", QUOTED, entry))
        else:
            made.append(f"- {NAME.sub(QUOTED, names)}: {marked(text, links)}")
    return made


def marked(line: str, links: dict[str, str]) -> str:
    """A line of prose with its shapes as code and its names as links; code stays as it is."""
    if line.startswith("    "):
        return line
    parts = CODE.split(line)
    parts[::2] = [part.replace("*", r"\*") for part in parts[::2]]
    for n, part in list(enumerate(parts))[1::2]:
        code = part if part[0] == "`" else f"`{part}`"
        target = links.get(code.strip("`"))
        parts[n] = f"[{code}][{target}]" if target else code
    return "".join(parts)
