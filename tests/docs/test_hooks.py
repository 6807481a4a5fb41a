"""What goes into the site beside its pages: docstrings as Markdown, figures drawn from results."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"

pytestmark = pytest.mark.skipif(
    not DOCS.exists(), reason="the source distribution holds no documentation"
)

DOCSTRING = """Turn x [B, N] around `gamma` * 2 times; see `squash`.

        v = x * 2

    gamma      0.5   0.9
    float32      3    20

    Args:
        x: capsules [..., D],
            of any dtype.
        width, height: sizes, `width` * 2 at most.
        in_dim: K, out_dim: D.
        **options: see `mocapsnet.kernels.squash`.
    Returns: y [B, (N + 1) * D]
        in [0, 1).
    """
MARKDOWN = r"""Turn x `[B, N]` around `gamma` \* 2 times; see [`squash`][ops.squash].

    v = x * 2

    gamma      0.5   0.9
    float32      3    20


**Args**

- `x`: capsules `[..., D]`, of any dtype.
- `width`, `height`: sizes, `width` \* 2 at most.
- `in_dim`: K, `out_dim`: D.
- `**options`: see [`mocapsnet.kernels.squash`][ops.squash].


**Returns** y `[B, (N + 1) * D]` in [0, 1)."""


def test_a_docstring_becomes_markdown() -> None:
    hook = runpy.run_path(str(DOCS / "hooks/docstrings.py"))
    links = {"squash": "ops.squash", "mocapsnet.kernels.squash": "ops.squash"}
    assert hook["markdown"](DOCSTRING, links) == MARKDOWN


def words(svg: str) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


def test_figures_say_what_the_results_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn again, every figure has the same words and numbers, and lines at the same places."""
    monkeypatch.syspath_prepend(DOCS / "figures")
    monkeypatch.delitem(sys.modules, "svg", raising=False)
    figures = runpy.run_path(str(DOCS / "figures/draw.py"))["FIGURES"]
    assert {figure.__name__ for figure in figures} == {p.stem for p in DOCS.glob("figures/*.svg")}
    for figure in figures:
        kept = (DOCS / f"figures/{figure.__name__}.svg").read_text()
        again = "\n".join(figure().parts)
        assert words(again) == words(kept), figure.__name__
        assert again.count("<path") == kept.count("<path"), figure.__name__
