"""Formulas become MathML and drawings become part of their page, so that nothing is loaded."""

from __future__ import annotations

import html
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

ARITHMATEX = re.compile(
    r'<(span|div) class="arithmatex">(?:\\\(|\\\[)(.*?)(?:\\\)|\\\])</\1>', re.S
)
DRAWING = re.compile(r'<img alt="([^"]*)" src="([^":]*\.svg)" ?/?>')

PICTURE = re.compile(r'(<img alt="[^"]*" src="([^":]*\.png)" ?/?>)')


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    def drawing(match: re.Match[str]) -> str:
        """The drawing itself in place of a reference: its colours then follow the page's."""
        alt, source = match.groups()
        path = Path(page.file.abs_dest_path).parent / source
        file = files.get_file_from_path(
            path.resolve().relative_to(Path(config.site_dir).resolve()).as_posix()
        )
        if file is None or file.abs_src_path is None:
            raise FileNotFoundError(f"{page.file.src_uri}: no drawing {source}")
        svg = Path(file.abs_src_path).read_text()
        svg = svg.replace("<svg ", f'<svg role="img" aria-label="{alt}" ', 1)
        return f'<span class="drawing">{svg}</span>'

    content = DRAWING.sub(drawing, ARITHMATEX.sub(formula, content))
    # On a narrow screen a picture is small: it opens by itself.
    return PICTURE.sub(r'<a class="picture" href="\2">\1</a>', content)


def formula(match: re.Match[str]) -> str:
    """MathML of a formula, which browsers typeset by themselves."""
    element, latex = match.groups()
    return convert(html.unescape(latex), display="block" if element == "div" else "inline")
