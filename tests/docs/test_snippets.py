"""The Python of README.md and of every page of the site runs, and prints what the page says."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\w+)\n(?P<code>.*?)^(?P=indent)```$"
    r"|^ *<!-- check: (?P<check>.*?) -->$",
    re.M | re.S,
)


class Part(NamedTuple):
    """A block of a page: its language, or "check"; its text; the line where it begins."""

    language: str
    text: str
    line: int


def parts(page: str) -> list[Part]:
    found = []
    for match in FENCE.finditer(page):
        line = page.count("\n", 0, match.start()) + 1
        if match["check"]:
            found.append(Part("check", match["check"], line))
        else:
            code = re.sub(f"^{match['indent']}", "", match["code"], flags=re.M)
            found.append(Part(match["language"], code, line + 1))
    return found


def run(page: str, name: str) -> None:
    """Runs a page's blocks as one program.

    A `text` block is what the code before it prints, and a comment `check: EXPRESSION` must hold.
    """
    space: dict[str, object] = {"__name__": "page"}
    printed = ""
    for part in parts(page):
        if part.language == "python":
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
