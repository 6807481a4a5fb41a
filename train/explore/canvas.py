"""A canvas to draw on, as template and script of Gradio's HTML component.

Gradio's own sketchpad needs WebGL and sends the drawing to the server over and over, into files.
This one sends a PNG, as a data URL, when a stroke ends, and keeps nothing.
"""

from __future__ import annotations

import base64
import io

from PIL import Image

SIDE = 320
PREFIX = "data:image/png;base64,"

TEMPLATE = """
<canvas width="{side}" height="{side}" aria-label="Draw here"></canvas>
<div class="tools">{colours}<button type="button" class="clear">Clear</button></div>
"""

STYLE = """
#sketch canvas { width: 320px; max-width: 100%; background: white; border: 1px solid #8888;
  border-radius: 6px; touch-action: none; cursor: crosshair; display: block; }
#sketch .tools { display: flex; gap: 8px; margin-top: 8px; align-items: center; }
#sketch .clear { padding: 4px 14px; border: 1px solid #8888; border-radius: 6px; }
#sketch .colour { width: 28px; height: 28px; border-radius: 50%; border: 3px solid #fff;
  outline: 1px solid #8888; }
#sketch .colour.chosen { outline: 3px solid #e8710a; }
"""

# A pointer is a mouse, a pen or a finger. The canvas may be shown smaller than it is.
SCRIPT = """
const canvas = element.querySelector("canvas"), context = canvas.getContext("2d");
const colours = [...element.querySelectorAll(".colour")];
let colour = "#000000", last = null;
const place = (event) => {
  const box = canvas.getBoundingClientRect(), times = canvas.width / box.width;
  return [(event.clientX - box.left) * times, (event.clientY - box.top) * times];
};
const stroke = (event) => {
  const next = place(event);
  context.lineWidth = 26;
  context.lineCap = context.lineJoin = "round";
  context.strokeStyle = colour;
  context.beginPath();
  context.moveTo(...last);
  context.lineTo(...next);
  context.stroke();
  last = next;
};
const send = () => { props.value = canvas.toDataURL("image/png"); trigger("input"); };
canvas.addEventListener("pointerdown", (event) => {
  canvas.setPointerCapture(event.pointerId);
  last = place(event);
  stroke(event);
});
canvas.addEventListener("pointermove", (event) => { if (last) stroke(event); });
for (const name of ["pointerup", "pointercancel"])
  canvas.addEventListener(name, () => { if (last) { last = null; send(); } });
element.querySelector(".clear").addEventListener("click", () => {
  context.clearRect(0, 0, canvas.width, canvas.height);
});
for (const button of colours)
  button.addEventListener("click", () => {
    colour = button.dataset.colour;
    for (const other of colours) other.classList.toggle("chosen", other === button);
  });
"""


def template(colours: tuple[str, ...]) -> str:
    """The canvas with a button per colour; black alone needs none."""
    buttons = [
        f'<button type="button" class="colour{" chosen" if i == 0 else ""}" data-colour="{colour}" '
        f'style="background: {colour}" aria-label="{colour}"></button>'
        for i, colour in enumerate(colours)
    ]
    return TEMPLATE.format(side=SIDE, colours="".join(buttons))


def picture(value: object) -> Image.Image | None:
    """What a canvas sent, black and coloured on nothing; None if it is not a PNG."""
    if not isinstance(value, str) or not value.startswith(PREFIX):
        return None
    return Image.open(io.BytesIO(base64.b64decode(value[len(PREFIX) :]))).convert("RGBA")
