"""The page, in Gradio. Only `mocapsnet explore` imports this module's one dependency."""

from __future__ import annotations

import html
import random
from collections.abc import Sequence
from typing import Any

from PIL import Image
from torch import Tensor

from mocapsnet.images import fit
from mocapsnet.train.explore.canvas import SCRIPT, picture, template
from mocapsnet.train.explore.explorer import Explorer, Seen, from_sketch, image_tag
from mocapsnet.train.pictures.couplings import layer_titles

SWEEP = 0.25
"""A dimension of a capsule is moved by up to this much, as in Sabour et al. 2017."""

COLOURS = ("#000000", "#d62728", "#2ca02c", "#1f77b4", "#ff9a1f", "#8c564b")

STYLE = """
.gradio-container { max-width: 1100px !important; margin: auto !important; }
.shots { display: flex; gap: 10px; }
.shots figure { margin: 0; flex: 1 1 0; max-width: 150px; }
.shots img { width: 100%; image-rendering: pixelated; border: 1px solid #8886; display: block; }
.shots figcaption { font-size: 0.85em; margin-top: 4px; line-height: 1.3; }
.verdict { font-size: 1.3em; margin: 0 0 8px; }
.bar { display: flex; align-items: center; gap: 8px; margin: 3px 0; }
.bar > span:first-child { min-width: 2.5em; max-width: 9em; text-align: right; }
.bar > b { flex: 1; background: #8883; height: 14px; border-radius: 3px; overflow: hidden; }
.bar > b > i { display: block; height: 100%; background: #8aa0b8; }
.bar.best > b > i { background: #e8710a; }
.bar.best { font-weight: 600; }
.bar > span:last-child { width: 2.6em; font-variant-numeric: tabular-nums; }
.dials .form { display: grid !important; gap: 10px 24px !important; border: none !important;
  grid-template-columns: 1fr 1fr; background: none !important; box-shadow: none !important; }
.dials .form > * { border: none !important; padding: 0 !important; min-width: 0 !important; }
@media (max-width: 680px) {
  .watch { position: sticky; top: 0; z-index: 5; background: var(--body-background-fill); }
}
"""

INTRODUCTION = """# What a capsule network sees
**{title}**

A capsule network answers with arrows instead of numbers. It has one *capsule* for every class, a
list of {dim} numbers that is read as an arrow: **its length**, between 0 and 1, says how sure the
network is that the class is in the image, and **its direction** says how it looks there: slanted,
thick, large. Draw something and see."""

REMEMBERS = """## 2. What the capsule remembers
A second part of the network, the decoder, draws the image again from the {dim} numbers of one
capsule alone. Move a number and watch the drawing on the right. Nobody told the network what its
numbers should mean: one may have become the slant, another the thickness of the stroke."""

AGREE = """## 3. How capsules agree
Capsules stand in layers. Every capsule of a layer shares **one vote** out among the capsules of
the next: this table of shares is called the *couplings*. At first nobody knows what the others
think, and all shares are equal. Then, iteration by iteration, each capsule gives more to those on
which the other votes agree with its own. Red is more than an equal share, blue is less."""


def build_page(explorer: Explorer, title: str, examples: Sequence[tuple[Tensor, int]]) -> Any:
    """The page as Gradio's Blocks, not yet served.

    Args:
        title: one line that says which network this is.
        examples: test images [C, H, W] uint8 and their classes, to pick from; may be empty.
    """
    import gradio as gr

    network, classes = explorer.network, explorer.classes
    titles, dimensions = layer_titles(network), network.config.class_dim
    chosen_layers = [(text, name) for name, text in titles.items()]
    colour = network.config.image_shape[0] == 3

    def show(image: Image.Image | Tensor | None, truth: int | None = None) -> list[Any]:
        """The whole page after a new image: the longest capsule is chosen, nothing moved."""
        if image is None:
            return [gr.skip()] * (5 + dimensions)
        seen = explorer.look(image)
        caption = "what the network is shown"
        if truth is not None:
            caption = f"a test image of class {classes[truth]}"
        label = int(seen.lengths.argmax())
        still = [0.0] * dimensions
        return [
            seen,
            shots(image_tag(seen.pixels, caption)),
            explorer.answer(seen),
            label,
            drawings(seen, label, still),
            *still,
        ]

    def shots(*tags: str) -> str:
        return f'<div class="shots">{"".join(tags)}</div>'

    def drawings(seen: Seen | None, label: int, moves: Sequence[float]) -> Any:
        if seen is None:
            return gr.skip()
        name = classes[label]
        return shots(
            image_tag(seen.pixels, "the image"),
            image_tag(explorer.reconstruct(seen, label), f"drawn from the capsule of {name}"),
            image_tag(explorer.reconstruct(seen, label, moves), "the same, with your changes"),
        )

    def drawn(value: object) -> list[Any]:
        sketch = picture(value)
        return show(sketch and from_sketch(sketch, network.config.image_shape))

    def loaded(image: Image.Image | None, inverted: bool) -> list[Any]:
        if image is not None and inverted:
            _, height, width = network.config.image_shape
            image = Image.fromarray(255 - fit(image, (height, width), channels=1)[0])
        return show(image)

    def picked() -> list[Any]:
        return show(*random.choice(examples))

    def moved(seen: Seen | None, label: int, *moves: float) -> Any:
        return drawings(seen, label, moves)

    def still(seen: Seen | None, label: int) -> list[Any]:
        return [drawings(seen, label, ()), *[0.0] * dimensions]

    def coupled(seen: Seen | None, layer: str, iteration: int) -> Any:
        return gr.skip() if seen is None else explorer.couplings(seen, layer, int(iteration))

    with gr.Blocks(
        title="mocapsnet explore", analytics_enabled=False, delete_cache=(3600, 3600)
    ) as page:
        seen = gr.State()
        gr.Markdown(INTRODUCTION.format(title=html.escape(title), dim=dimensions))
        gr.Markdown("## 1. Give it an image")
        with gr.Row():
            with gr.Column(min_width=300):
                with gr.Tab("Draw"):
                    sketch = gr.HTML(
                        "", html_template=template(COLOURS if colour else ()),
                        js_on_load=SCRIPT, elem_id="sketch",
                    )  # fmt: skip
                with gr.Tab("Load"):
                    upload = gr.Image(
                        type="pil", image_mode=None, show_label=False,
                        sources=["upload", "clipboard"],
                        height=340, elem_id="upload",
                    )  # fmt: skip
                    inverted = gr.Checkbox(False, label="Swap light and dark", visible=not colour)
                pick = gr.Button("A random test image", visible=bool(examples), elem_id="pick")
            with gr.Column(min_width=300):
                shown = gr.HTML(elem_id="shown")
                answer = gr.HTML("<p>Nothing given yet.</p>", elem_id="answer")
        gr.Markdown(REMEMBERS.format(dim=dimensions))
        with gr.Row():
            with gr.Column(scale=2, min_width=300, elem_classes="watch"):
                label = gr.Dropdown(
                    [(name, i) for i, name in enumerate(classes)], value=0,
                    label="The capsule of class", elem_id="label",
                )  # fmt: skip
                reconstruction = gr.HTML(elem_id="reconstruction")
                reset = gr.Button("Undo all changes", elem_id="reset")
            with gr.Column(scale=3, min_width=300, elem_classes="dials"):
                sliders = [
                    gr.Slider(
                        -SWEEP, SWEEP, 0.0, step=0.01, label=f"no. {d + 1}", buttons=[],
                        elem_id=f"dimension-{d + 1}",
                    )
                    for d in range(dimensions)
                ]  # fmt: skip
        gr.Markdown(AGREE)
        rounds = network.config.iterations
        with gr.Row():
            layer = gr.Dropdown(
                chosen_layers, value="last", label="Votes from layer to layer", min_width=300,
                elem_id="layer",
            )  # fmt: skip
            iteration = gr.Slider(
                1, max(rounds, 2), rounds, step=1, visible=rounds > 1,
                label="Routing iteration", buttons=[], min_width=300, elem_id="iteration",
            )  # fmt: skip
        couplings = gr.Plot(show_label=False, elem_id="couplings")

        new = [seen, shown, answer, label, reconstruction, *sliders]
        where = [seen, layer, iteration]
        quiet: dict[str, Any] = dict(show_progress="hidden", api_visibility="private")
        for event, function, inputs in (
            (sketch.input, drawn, [sketch]),
            (upload.change, loaded, [upload, inverted]),
            (inverted.input, loaded, [upload, inverted]),
            (pick.click, picked, []),
        ):
            event(function, inputs, new, **quiet).then(coupled, where, couplings, **quiet)
        for event in (label.input, reset.click):
            event(still, [seen, label], [reconstruction, *sliders], **quiet)
        for slider in sliders:
            slider.input(
                moved, [seen, label, *sliders], reconstruction, trigger_mode="always_last", **quiet
            )
        for control in (layer, iteration):
            control.input(coupled, where, couplings, trigger_mode="always_last", **quiet)
    return page
