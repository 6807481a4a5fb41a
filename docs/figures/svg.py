"""A drawing: lines, arrows, boxes, text, written as an SVG file.

Colours are variables that the site sets for its light and dark scheme (assets/site.css). Elsewhere,
as where a repository shows the file, a figure is dark on white, whatever is around it.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

STYLE = """
.figure {
  background: #fff;
  font: 15px system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif;
}
.figure .ink { fill: none; stroke: var(--figure-ink, #222); }
.figure .faint { fill: none; stroke: var(--figure-faint, #888); }
.figure .one { fill: none; stroke: var(--figure-one, #00796b); }
.figure .two { fill: none; stroke: var(--figure-two, #c2570c); }
.figure .ink.solid { fill: var(--figure-ink, #222); stroke: none; }
.figure .faint.solid { fill: var(--figure-faint, #888); stroke: none; }
.figure .one.solid { fill: var(--figure-one, #00796b); stroke: none; }
.figure .two.solid { fill: var(--figure-two, #c2570c); stroke: none; }
.figure .wash { fill-opacity: 0.13; }
"""


class Drawing:
    """A canvas `width` by `height`, y downwards; a `kind` is ink, faint, one or two."""

    def __init__(self, width: int, height: int):
        self.width, self.height = width, height
        self.parts: list[str] = []

    def line(
        self,
        *points: tuple[float, float],
        kind: str = "ink",
        width: float = 1.5,
        arrow: bool = False,
        dashed: bool = False,
        opacity: float = 1,
    ) -> None:
        """A line through the points; an arrow's head ends at the last."""
        path = " L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self.parts.append(
            f'<path class="{kind}" d="M{path}" stroke-width="{width}" '
            f'stroke-linejoin="round" opacity="{opacity:.3g}"{dash}/>'
        )
        if arrow:
            self._head(points[-2], points[-1], kind, 5 + 2 * width, opacity)

    def _head(
        self,
        start: tuple[float, float],
        end: tuple[float, float],
        kind: str,
        size: float,
        opacity: float,
    ) -> None:
        dx, dy = end[0] - start[0], end[1] - start[1]
        norm = (dx * dx + dy * dy) ** 0.5 or 1
        dx, dy = dx / norm, dy / norm
        tip = (end[0] + 0.3 * size * dx, end[1] + 0.3 * size * dy)
        base = (tip[0] - size * dx, tip[1] - size * dy)
        corners = [tip] + [
            (base[0] - s * dy * size / 2.4, base[1] + s * dx * size / 2.4) for s in (1, -1)
        ]
        self._polygon(corners, kind, opacity)

    def _polygon(self, corners: list[tuple[float, float]], kind: str, opacity: float) -> None:
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in corners)
        self.parts.append(
            f'<polygon class="{kind} solid" points="{points}" opacity="{opacity:.3g}"/>'
        )

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        kind: str = "ink",
        *,
        wash: bool = False,
        line: float = 1.5,
        radius: float = 4,
    ) -> None:
        """A rectangle by its upper left corner; `wash` fills it lightly."""
        place = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="{radius}"'
        if wash:
            self.parts.append(f'<rect class="{kind} solid wash" {place}/>')
        if line:
            self.parts.append(f'<rect class="{kind}" {place} stroke-width="{line}"/>')

    def bar(self, x: float, y: float, width: float, height: float, kind: str) -> None:
        self.parts.append(
            f'<rect class="{kind} solid" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" '
            f'height="{height:.1f}"/>'
        )

    def circle(self, x: float, y: float, radius: float, kind: str = "faint") -> None:
        self.parts.append(
            f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}" stroke-width="1"/>'
        )

    def text(
        self,
        x: float,
        y: float,
        words: str,
        *,
        kind: str = "ink",
        anchor: str = "middle",
        size: float = 15,
        bold: bool = False,
    ) -> None:
        """Lines of text, the first with its baseline at y."""
        weight = ' font-weight="600"' if bold else ""
        for n, line in enumerate(words.split("\n")):
            self.parts.append(
                f'<text class="{kind} solid" x="{x:.1f}" y="{y + n * 1.3 * size:.1f}" '
                f'text-anchor="{anchor}" font-size="{size}"{weight}>{escape(line)}</text>'
            )

    def image(self, x: float, y: float, width: float, height: float, data: str) -> None:
        """A small picture, as a data URI, with its pixels visible."""
        self.parts.append(
            f'<image x="{x}" y="{y}" width="{width}" height="{height}" '
            f'style="image-rendering: pixelated" href="{data}"/>'
        )

    def write(self, path: Path) -> None:
        body = "\n".join(self.parts)
        path.write_text(
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" '
            f'width="{self.width}" class="figure">\n'
            f"<style>{STYLE}</style>\n{body}\n</svg>\n"
        )
