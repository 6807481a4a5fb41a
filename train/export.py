"""`mocapsnet export`: a trained network as an ONNX file."""

from __future__ import annotations

from pathlib import Path

import mocapsnet
from mocapsnet.onnx_export import difference
from mocapsnet.train.errors import InputError, Stop
from mocapsnet.train.options import ExportOptions

# Outputs lie in [-1, 1]; float32 programs of different order of summation differ by some 1e-6.
TOLERANCE = 1e-4


class Differs(Stop):
    """The file does not compute what the network does."""


def export(options: ExportOptions) -> Path:
    """Write the file, run it beside the network, and say how far they are apart.

    Raises: InputError if the run, the file or a package cannot be used; Differs, without leaving a
        file, if an output is off by more than TOLERANCE.
    """
    path = Path(options.out)
    if path.exists():
        raise InputError(f"--out {path} exists; choose another, or remove it")
    try:
        model = mocapsnet.load(options.run)
        model.export_onnx(path)
        off = difference(model, path)
    except (ValueError, ImportError, OSError) as error:
        raise InputError(str(error)) from error
    if not off <= TOLERANCE:
        path.unlink()
        raise Differs(
            f"an output of the ONNX file differs by {off:.1e} from the network's, more than "
            f"{TOLERANCE}; nothing was written"
        )
    print(f"{path}: outputs differ from PyTorch's by {off:.1e} at most, on random images")
    return path
