"""How exact is the reversal?

Undoing a momentum layer divides by gamma, so a rounding error grows by 1 / gamma per layer traced
back; anchors, a stored (x, v) every so many layers, start anew. For stacks of block layers (32
capsules of 8 components, as `MoCapsNet` makes them) of up to 1000 layers, three relative errors,
norm of the difference over norm of the truth:

- reconstructed x: the worst of all layer inputs, against the ones that forward saw. Backward does
  not show them, so `reconstruct` repeats its recurrences in a plain loop, layer by layer;
- input gradient and the worst layer's weight gradient, against a stored stack in float64.

All this in float32 for the stored stack, whose errors are the floor, for the reversible stack with
its default anchors, and for the reversible stack without anchors.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor, nn

from mocapsnet import CapsuleLayer, MomentumStack
from mocapsnet.depth import HIDDEN_LENGTH

from .shared import report
from .shared.measure import relative_error

DEPTHS = (2, 5, 10, 20, 40, 100, 200, 400, 1000)
GAMMAS = (0.5, 0.7, 0.9, 0.95, 0.99)
TARGET = 1e-3
TOP = 10.0
ERRORS = {
    "x_error": "reconstructed x, worst layer",
    "input_gradient_error": "gradient of the input",
    "weight_gradient_error": "gradient of the weights, worst layer",
}
KINDS: dict[str, Any] = {"stored": ":", "anchors": "-", "no anchors": "--"}


def make_layers(gamma: float, depth: int) -> list[CapsuleLayer]:
    """The layers of a stack of this depth, drawn as `MoCapsNet` draws them."""
    torch.manual_seed(0)
    return list(MomentumStack.of_capsules(depth, 32, 8, gamma=gamma).layers)  # type: ignore[arg-type]


def problem(batch: int) -> tuple[Tensor, Tensor]:
    """Capsules as long as those that the first capsule layer puts out, and a random gradient."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 32, 8, generator=generator)
    x *= HIDDEN_LENGTH / x.norm(dim=-1).square().mean().sqrt()
    return x, torch.randn(batch, 32, 8, generator=generator)


def gradients(stack: MomentumStack, x: Tensor, g: Tensor) -> list[Tensor]:
    """Of the input and of every layer's weight."""
    x = x.detach().requires_grad_()
    return list(torch.autograd.grad(stack(x), [x, *stack.parameters()], g))


@torch.no_grad()
def reconstruct(
    layers: Sequence[nn.Module], gamma: float, anchor_every: int, x: Tensor
) -> list[float]:
    """Relative error of every layer's reconstructed input: Algorithms 1 and 2 with anchors."""
    seen, anchors, v = [], {}, torch.zeros_like(x)
    for n, layer in enumerate(layers, start=1):
        seen.append(x)
        v = gamma * v + (1 - gamma) * layer(x)
        x = x + v
        if n % anchor_every == 0 or n == len(layers):
            anchors[n] = x, v
    errors = []
    for n in range(len(layers), 0, -1):
        if n in anchors:
            x, v = anchors[n]
        x = x - v
        v = (v - (1 - gamma) * layers[n - 1](x)) / gamma
        errors.append(relative_error(x, seen.pop()))
    return errors


def measure(depth: int, gamma: float, layers: list[CapsuleLayer], batch: int) -> list[report.Row]:
    """One row per way to store: as autograd does, with default anchors, without anchors."""
    device = layers[0].weight.device
    x, g = (t.to(device) for t in problem(batch))
    stack = MomentumStack(layers, gamma=gamma, memory="stored").double()
    truth = gradients(stack, x.double(), g.double())
    stack.float()  # exact: the weights were drawn in float32
    rows = []
    for kind in KINDS:
        stack.memory = "stored" if kind == "stored" else "reversible"
        stack.anchor_every = depth if kind == "no anchors" else None
        every = stack.spacing(x.dtype)
        got = [relative_error(*pair) for pair in zip(gradients(stack, x, g), truth, strict=True)]
        undone = [0.0] if kind == "stored" else reconstruct(layers, gamma, every, x)
        rows.append(
            {
                "depth": depth,
                "gamma": gamma,
                "kind": kind,
                "anchor_every": None if kind == "stored" else every,
                "x_error": max(undone),
                "input_gradient_error": got[0],
                "weight_gradient_error": max(got[1:]),
            }
        )
    return rows


def summarize(rows: list[report.Row], depths: Sequence[int], gammas: Sequence[float]) -> str:
    """Markdown: a table per error."""
    found = {(row["depth"], row["gamma"], row["kind"]): row for row in rows}

    def cell(depth: int, gamma: float, error: str) -> str:
        kinds = [kind for kind in KINDS if kind != "stored" or error != "x_error"]
        return " / ".join(shown(found[depth, gamma, kind][error]) for kind in kinds)

    parts = []
    for error, label in ERRORS.items():
        ways = "default anchors / no anchors"
        ways = ways if error == "x_error" else f"stored / {ways}"
        lines = [[depth, *(cell(depth, gamma, error) for gamma in gammas)] for depth in depths]
        header = ["layers", *(f"gamma {gamma}" for gamma in gammas)]
        parts.append(f"Relative error, {label}: {ways}\n\n{report.table(header, lines)}")
    worst = {error: max(row[error] for row in rows if row["kind"] == "anchors") for error in ERRORS}
    values = ", ".join(f"{ERRORS[error]} {shown(value)}" for error, value in worst.items())
    return "\n\n".join([*parts, f"Worst with default anchors: {values}; target {TARGET:.0e}."])


def shown(error: float) -> str:
    return f"{error:.0e}" if math.isfinite(error) else "diverged"


def draw(rows: list[report.Row], gammas: Sequence[float]) -> Figure:
    """Errors against depth; what diverged or exceeds the picture lies on its upper edge."""
    figure = Figure(figsize=(13, 4.8), layout="constrained")
    depths = sorted({row["depth"] for row in rows})
    colours = {gamma: f"C{n % 10}" for n, gamma in enumerate(gammas)}
    panels = figure.subplots(1, len(ERRORS), sharey=True)
    for axes, (error, label) in zip(panels, ERRORS.items(), strict=True):
        for gamma in gammas:
            for kind, style in KINDS.items():
                if (error, kind) == ("x_error", "stored"):
                    continue
                line = [r for r in rows if r["gamma"] == gamma and r["kind"] == kind]
                values = [min(r[error], TOP) for r in line]
                axes.plot([r["depth"] for r in line], values, style, color=colours[gamma])
        axes.axhline(TARGET, color="black", linewidth=0.8)
        axes.set(xscale="log", yscale="log", xlabel="layers", title=label)
        axes.set_ylim(top=TOP * 1.2)
        axes.minorticks_off()
        axes.set_xticks(depths, map(str, depths))
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("relative error, float32")
    panels[0].annotate("target", (depths[0], TARGET * 1.2), fontsize="small")
    names = {"stored": "stored (floor)", "anchors": "default anchors", "no anchors": "no anchors"}
    entries = [Line2D([], [], color=colours[gamma], label=f"gamma {gamma}") for gamma in gammas]
    entries += [
        Line2D([], [], color="gray", linestyle=KINDS[kind], label=name)
        for kind, name in names.items()
    ]
    figure.legend(handles=entries, loc="outside lower center", ncols=len(entries), frameon=False)
    return figure


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = report.parser(__doc__, "reversal")
    parser.add_argument(
        "--depths", type=report.positive, nargs="+", default=DEPTHS, help="numbers of layers"
    )
    parser.add_argument("--gammas", type=float, nargs="+", default=GAMMAS, help="momenta")
    parser.add_argument("--batch", type=report.positive, default=16, help="samples")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    rows = []
    for gamma in args.gammas:
        for depth in args.depths:
            layers = [layer.to(args.device) for layer in make_layers(gamma, depth)]
            rows += measure(depth, gamma, layers, args.batch)
    text = summarize(rows, args.depths, args.gammas)
    report.write(args, "reversal", rows, [], text, {"reversal": draw(rows, args.gammas)})
