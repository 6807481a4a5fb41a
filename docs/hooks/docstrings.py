"""Docstrings in this project's form become Markdown.

A docstring opens with sentences. Then come fields, a word and a colon each (`Args:`, `Shapes:`,
`Returns:`, `Raises:`, `Source:`): text on the same line, or indented below it. In `Args:` and
`Attributes:` every line that starts at the field's indentation names one or more parameters, with
a colon after each or after the last.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import griffe

FIELD = re.compile(r"^(Args|Attributes|Args, raises|Shapes|Returns|Raises|Source):(?: (.*))?$")
# Code, and shapes such as [B, N, K] or [..., D].
CODE = re.compile(r"(`[^`]*`|\[(?:[A-Z0-9][\w ,./*()+-]*|\.\.\.[\w, ]*)\])")
NAME = re.compile(r"[\w*]+")
QUOTED = r"`\g<0>`"


class Docstrings(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)


def markdown(docstring: str) -> str:
    made: list[str] = []
    lines = inspect.cleandoc(docstring).split("\n")
    while lines:
        line = lines.pop(0)
        field = FIELD.match(line)
        if field is None:
            made.append(marked(line))
            continue
        body = []
        while lines and (not lines[0] or lines[0].startswith(" ")):
            body.append(lines.pop(0))
        name, text = field.groups()
        below = inspect.cleandoc("\n".join(body))
        if name in ("Args", "Attributes") and not text:
            made += ["", f"**{name}**", "", *items(below), ""]
        else:
            words = " ".join(filter(None, [text, *below.split("\n")]))
            made += ["", f"**{name}** {marked(words)}", ""]
    return "\n".join(made).strip()


def items(block: str) -> list[str]:
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
        made.append(f"- {NAME.sub(QUOTED, names)}: {marked(text)}")
    return made


def marked(line: str) -> str:
    """A line of prose with its shapes set as code; code and formulas stay as they are."""
    if line.startswith("    "):
        return line
    parts = CODE.split(line)
    parts[::2] = [part.replace("*", r"\*") for part in parts[::2]]
    parts[1::2] = [part if part[0] == "`" else f"`{part}`" for part in parts[1::2]]
    return "".join(parts)
