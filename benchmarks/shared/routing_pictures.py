"""Pictures of the benchmark of routing: time against size, and the roofline."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from . import measure, report

STYLES: dict[str, dict[str, Any]] = {  # colour: code; line: compiled, or a CUDA graph
    "published": {"color": "C3"},
    "published, CUDA graph": {"color": "C3", "linestyle": ":"},
    "published, compiled": {"color": "C3", "linestyle": "--"},
    "published, compiled, max-autotune": {"color": "C3", "linestyle": "-."},
    "einsum": {"color": "C1"},
    "einsum, CUDA graph": {"color": "C1", "linestyle": ":"},
    "einsum, compiled": {"color": "C1", "linestyle": "--"},
    "einsum, compiled, max-autotune": {"color": "C1", "linestyle": "-."},
    "chunked": {"color": "C0"},
    "chunked, CUDA graph": {"color": "C0", "linestyle": ":"},
    "triton": {"color": "C2"},
    "triton, CUDA graph": {"color": "C2", "linestyle": ":"},
}
MARKERS = {"max-autotune": "2", "compiled": "x", "graph": "+"}  # the first that is in the name
NAMES = {"B": "samples", "N": "input capsules", "J": "output capsules"}


def draw(rows: list[report.Row]) -> Figure:
    """Time and peak memory of forward and backward against each size that was swept."""
    sweeps = [name for name in NAMES if any(row["group"] == name for row in rows)]
    figure = Figure(figsize=(4.6 * len(sweeps) + 3, 8), layout="constrained")
    panels = figure.subplots(2, len(sweeps), squeeze=False)
    for (above, below), letter in zip(panels.T, sweeps, strict=True):
        of_sweep = [row for row in rows if row["group"] == letter and row.get("phase") == "both"]
        for axes, column, scale in ((above, "seconds", 1e3), (below, "peak_bytes", 1e-6)):
            present = [row for row in of_sweep if row[column] is not None]
            found = {
                name: (x, [scale * value for value in y])
                for name, (x, y) in report.series(present, letter, column).items()
            }
            report.lines(axes, found, STYLES, xlabel=f"{letter}, {NAMES[letter]}")
            sizes = sorted({size for x, _ in found.values() for size in x})
            axes.set_xscale("log")
            axes.set_xticks(sizes, [f"{size}" for size in sizes])
            axes.minorticks_off()
        above.set_ylabel("forward and backward, ms")
        below.set_ylabel("peak beyond the inputs, MB")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    return figure


def roofline(rows: list[report.Row], rates: measure.Rates) -> Figure:
    """Rates that candidates reach, over the operations per byte that the equations ask for.

    All candidates of one shape stand above each other, below what copying and multiplying at the
    rates of this run would allow.
    """
    figure = Figure(figsize=(10, 5.5), layout="constrained")
    axes = figure.subplots()
    points = [row for row in rows if row.get("phase") == "both" and row["group"] == "paper"]
    intensity = [row["flop_per_second"] / row["bytes_per_second"] for row in points]
    corner = rates.matrix / rates.copy
    roof = [min(corner, *intensity) / 2, corner, max(corner, *intensity) * 2]
    heights = [min(rates.matrix, rates.copy * x) / 1e9 for x in roof]
    axes.plot(roof, heights, color="black", label="a large copy, a large float32 matrix product")
    for name in dict.fromkeys(row["candidate"] for row in points):
        some = [(x, r) for x, r in zip(intensity, points, strict=True) if r["candidate"] == name]
        axes.plot(
            [x for x, _ in some],
            [row["flop_per_second"] / 1e9 for _, row in some],
            marker=next((m for kind, m in MARKERS.items() if kind in name), "o"),
            linestyle="",
            color=STYLES[name]["color"],
            label=name,
        )
    bottom = min(row["flop_per_second"] for row in points) / 1e9 / 30
    labels: dict[float, list[str]] = {}
    for x, row in zip(intensity, points, strict=True):  # shapes as good as equal share a label
        near = next((at for at in labels if abs(at / x - 1) < 0.08), x)
        if row["label"] not in labels.setdefault(near, []):
            labels[near].append(row["label"])
    for n, (x, names) in enumerate(sorted(labels.items())):
        axes.axvline(x, color="gray", linewidth=0.4, zorder=0)
        place = (x, bottom * 1.3 * 2**n)  # one below the other: shapes lie close together
        axes.annotate(", ".join(names) + " ", place, fontsize="small", ha="right")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="operations per byte, as the equations ask for",
        ylabel="GFLOP/s",
        title="routing, forward and backward",
        ylim=(bottom, None),
    )
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right center", frameon=False)
    return figure
