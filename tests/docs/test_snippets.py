"""The Python of README.md and of every page of the site runs, and prints what the page says."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from pathlib import Path
from typing import NamedTuple

import pytest

from mocapsnet import doctor
from mocapsnet.benchmarks.cli import QUESTIONS
from mocapsnet.cli import parse
from mocapsnet.train.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = (ROOT / "pyproject.toml").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\w+)\n(?P<code>.*?)^(?P=indent)```$"
    r"|^ *<!-- (?P<hidden>check|run):\s(?P<text>.*?)\s-->$",
    re.M | re.S,
)


class Part(NamedTuple):
    """A block of a page: its language, "check" or "run"; its text; the line where it begins."""

    language: str
    text: str
    line: int


def parts(page: str) -> list[Part]:
    found = []
    for match in FENCE.finditer(page):
        line = page.count("\n", 0, match.start()) + 1
        if match["hidden"]:
            found.append(Part(match["hidden"], match["text"], line))
        else:
            code = re.sub(f"^{match['indent']}", "", match["code"], flags=re.M)
            found.append(Part(match["language"], code, line + 1))
    return found


def run(page: str, name: str) -> None:
    """Runs a page's blocks as one program.

    A `text` block is what the code before it prints. Comments are not seen by readers: `check:
    EXPRESSION` must hold, and `run: CODE` makes what the page takes for given.
    """
    space: dict[str, object] = {"__name__": "page"}
    printed = ""
    for part in parts(page):
        if part.language in ("python", "run"):
            code = compile("\n" * (part.line - 1) + part.text, name, "exec")
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(code, space)
            printed = out.getvalue()
        elif part.language == "text" and printed:
            assert part.text == printed, f"{name}, line {part.line}"
        elif part.language == "check":
            assert eval(part.text, space), f"{name}, line {part.line}: {part.text}"


WITH_PYTHON = [
    page for page in PAGES if any(p.language == "python" for p in parts(page.read_text()))
]


@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.name)
def test_python_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run(page.read_text(), page.name)


def commands() -> list[str]:
    """What the pages and README.md say to type, without comments."""
    shell = [p.text for page in PAGES for p in parts(page.read_text()) if p.language == "sh"]
    lines = [line.partition("  #")[0].strip() for text in shell for line in text.splitlines()]
    return sorted(set(filter(None, lines)))


@pytest.mark.parametrize("command", commands())
def test_a_command_of_a_page_is_understood(command: str) -> None:
    """Options and their values are read; only what the reader has, as runs/NAME, is missing."""
    program, *arguments = shlex.split(command)
    if program == "torchrun":
        assert arguments[1:3] == ["-m", "mocapsnet"]
        program, arguments = "mocapsnet", arguments[3:]
    if program == "make":
        assert all(re.search(rf"^{name}:.*##", MAKEFILE, re.M) for name in arguments)
    elif program == "mocapsnet" and arguments[0] == "benchmark":
        assert arguments[1] in QUESTIONS
    elif program == "mocapsnet" and arguments[0] == "doctor":
        doctor.parser().parse_args(arguments[1:])
    elif program == "mocapsnet":
        try:
            parse(arguments)
        except InputError as error:
            assert "NAME" in str(error), command
    else:
        extra = re.fullmatch(r'pip install "mocapsnet\[(\w+)\]"', command)
        assert extra and re.search(rf"^{extra[1]} = \[", PYPROJECT, re.M), command


PAGE = """
```python
x = 2
print(x)
```
<!-- check: x == 2 -->

```text
2
```

=== "A tab"

    ```python
    y = x + 1
    ```
"""


def test_a_page_is_one_program() -> None:
    run(PAGE + "<!-- check: y == 3 -->\n", "page")


@pytest.mark.parametrize(
    "wrong",
    ["```python\nz\n```\n", "<!-- check: y == 2 -->\n", "```text\n3\n```\n"],
    ids=["raises", "check", "prints something else"],
)
def test_what_a_page_gets_wrong_is_an_error(wrong: str) -> None:
    with pytest.raises((NameError, AssertionError)):
        run(PAGE + "```python\nprint(2)\n```\n" + wrong, "page")
