"""What is this machine, and how fast does it copy and multiply?"""

from __future__ import annotations

from collections.abc import Sequence

from .shared import measure, report


def main(argv: Sequence[str] | None = None) -> None:
    args = report.parser(__doc__, "machine").parse_args(argv)
    about = report.machine(args.device)
    rates = measure.rates(args.device)
    known = {name: value for name, value in about.items() if value is not None}
    known["a large copy, read and written"] = f"{rates.copy / 1e9:,.1f} GB/s"
    known["a large matrix product, float32"] = f"{rates.matrix / 1e9:,.0f} GFLOP/s"
    known["a large matrix product, bfloat16"] = (
        f"{rates.matrix_bf16 / 1e9:,.0f} GFLOP/s" if rates.matrix_bf16 else "no such instructions"
    )
    text = report.table(["what", "value"], [[key.replace("_", " "), v] for key, v in known.items()])
    report.write(args, "machine", [about | rates._asdict()], [], text)
