"""Kernels are compared with their references where they run, once, before they are relied on.

The first call of a family of kernels on a GPU model, with a version of PyTorch, Triton and these
kernels, that has no verdict yet runs the cases of the family. The verdict is kept, see verdicts.py.
If any case fails, calls that leave the choice of the implementation to the library take the one in
PyTorch on such GPUs. The environment variable MOCAPSNET_VERIFY says when: "1", the default, where
there is no verdict; "always", in every process; "0", never, and verdicts are not read either.
"""

from __future__ import annotations

import contextvars
import hashlib
import importlib
import importlib.metadata
import logging
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch

from . import verdicts
from .library import observed
from .verdicts import Verdict

FAMILIES: dict[str, tuple[str, ...]] = {
    "squash": (),
    "primary": (),
    "votes": (),
    "routing": (),
    "momentum": ("routing",),
    "conv_routing": ("routing",),
}
"""Operations, by the folder whose `cases.py` names what is verified, each with the others whose
launches it makes too."""

_trusted: dict[tuple[str, int | None], bool] = {}
"""What this process relies on, by family and index of the GPU."""

_known: dict[tuple[str, torch.device], Verdict] = {}
"""The verdicts that this process has met."""

_verifying = threading.Lock()

_log = logging.getLogger("mocapsnet")

TOLD = "verifying the kernels of %s on %s, once; compiling them may take a minute"
"""At a level that is shown unasked: the call seems to hang."""

UNFINISHED = (
    "the kernels of %s on %s run without having been verified: %s. mocapsnet.kernels.verify() "
    "tries again"
)


def trusted(family: str, device: torch.device) -> bool:
    """Whether calls on this GPU take the kernels of a family; verifies them if nobody has yet.

    In code that is being compiled or captured, within a backward pass and under a dispatch mode
    nothing is verified: there a verdict counts if there is one, and kernels run if there is none.
    """
    if torch.compiler.is_compiling():
        return _by_verdicts(family, device.type, device.index)
    known = _trusted.get((family, device.index))
    return _first(family, device) if known is None else known


def verify(
    device: torch.device | str | None = None,
    families: Iterable[str] = tuple(FAMILIES),
    *,
    again: bool = False,
) -> list[Verdict]:
    """Compare kernels with their references on a GPU now, rather than at their first call.

    For a program whose calls are all compiled or captured, where nothing is verified.

    Args:
        device: a GPU, None for the current one; or the CPU, if Triton's interpreter is on.
        families: of "squash", "primary", "votes", "routing", "momentum" and "conv_routing".
        again: also where there is a verdict already.
    Returns: a verdict for each family, its failures empty if all that was compared is right, and
        `unfinished` saying why the rest was not, as where memory gave out.
    Raises: ValueError if a family is unknown or Triton cannot run on the device.
    """
    from .launch import interpreting, triton_installed

    device = torch.device("cuda" if device is None else device)
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    runs = torch.cuda.is_available() if device.type == "cuda" else interpreting()
    if not (runs and triton_installed()):
        raise ValueError(
            f"kernels cannot be verified on {device}: they need the package triton, and a GPU or, "
            "slowly, TRITON_INTERPRET=1 set before Python starts"
        )
    families = list(families)
    for family in families:
        if family not in FAMILIES:
            raise ValueError(f"families must be of {', '.join(FAMILIES)}; got {family!r}")
    with _verifying:
        _trusted.clear()
        return [_settle(family, device, again) for family in families]


def _first(family: str, device: torch.device) -> bool:
    """`trusted`, where this process does not know yet."""
    wanted = os.environ.get("MOCAPSNET_VERIFY", "1")
    if wanted not in ("0", "1", "always"):
        raise ValueError(f'MOCAPSNET_VERIFY must be "0", "1" or "always"; got "{wanted}"')
    if wanted != "0" and (
        observed()
        or torch._C._current_graph_task_id() != -1  # within a backward pass
        or (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())
    ):
        return _by_verdicts(family, device.type, device.index)
    with _verifying:
        key = family, device.index
        if key not in _trusted:
            found = [_settle(f, device, False) for f in _all(family)] if wanted != "0" else []
            _trusted[key] = all(verdict.passed for verdict in found)
        return _trusted[key]


@torch.compiler.assume_constant_result
def _by_verdicts(family: str, kind: str, index: int | None) -> bool:
    """Whether no verdict that there is speaks against a family. Nothing is verified."""
    device = torch.device(kind, index) if index is not None else torch.device(kind)
    if os.environ.get("MOCAPSNET_VERIFY") == "0":
        return True
    if kind == "cuda" and not torch.cuda.is_available():  # a tensor without data
        return True
    place = where(device)
    found = [_known.get((f, device)) or verdicts.read(f, place) for f in _all(family)]
    return all(verdict is None or verdict.passed for verdict in found)


def _all(family: str) -> tuple[str, ...]:
    return (family, *FAMILIES[family])


def _settle(family: str, device: torch.device, again: bool) -> Verdict:
    """The verdict on one family: known, kept, or made now. Warns once if it is bad."""
    verdict = None if again else _known.get((family, device))
    if verdict is None:
        place = where(device)
        again = again or os.environ.get("MOCAPSNET_VERIFY") == "always"
        verdict = None if again else verdicts.read(family, place)
        if verdict is None:
            with verdicts.alone(family, place):
                verdict = None if again else verdicts.read(family, place)  # another's, by now
                if verdict is None:
                    _log.warning(TOLD, family, place["GPU"])
                    verdict = apart(lambda: compare(family, device))
                    if not verdict.unfinished:
                        verdicts.write(verdict)
        if verdict.unfinished and verdict.passed:
            _log.warning(UNFINISHED, family, place["GPU"], verdict.unfinished)
            return verdict
        _known[family, device] = verdict
        if not verdict.passed:
            warnings.warn(complaint(verdict), RuntimeWarning, stacklevel=2)
    return verdict


def apart(function: Callable[[], Verdict]) -> Verdict:
    """Calls in a thread of its own, where gradients are on, autocast, modes and transforms off,
    and the default stream current, whatever the caller has set; so nothing needs to be restored."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(contextvars.Context().run, function).result()


def compare(family: str, device: torch.device, of: str = "cases") -> Verdict:
    """Runs the cases of a family; `of` names their function in its `cases.py`."""
    from .cases import check, compile_all
    from .launch import interpreting

    began = time.perf_counter()
    names: list[str] = []
    failures: dict[str, str] = {}
    unfinished = ""
    cases = list(getattr(importlib.import_module(f"..{family}.cases", __name__), of)())
    if device.type == "cuda" and not interpreting():
        compile_all(cases, device)
    for case in cases:
        names.append(str(case))
        try:
            wrong = check(case, device)
        except (torch.OutOfMemoryError, MemoryError) as error:
            unfinished = f"not enough memory: {error}"
            break
        except Exception as error:  # from Triton, its compiler, the driver: whatever it is
            wrong = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            if not usable(device):
                failures[names[-1]] = f"{wrong}; start again, this process has lost the GPU"
                break
        if wrong:
            failures[names[-1]] = wrong
    seconds = round(time.perf_counter() - began, 1)
    return Verdict(family, where(device), names, failures, seconds, unfinished)


def usable(device: torch.device) -> bool:
    """Whether a GPU still computes; after an invalid access to memory it does not."""
    try:
        return torch.ones(1).to(device).add(1).item() == 2
    except Exception:
        return False


def complaint(verdict: Verdict) -> str:
    """The warning about kernels that are not relied on."""
    case, wrong = next(iter(verdict.failures.items()))
    place = ", ".join(f"{key} {value}" for key, value in verdict.where.items())
    return (
        f"the Triton kernels of {verdict.family} do not agree with their reference here, in "
        f"{len(verdict.failures)} of {len(verdict.cases)} cases. {case}: {wrong}. Calls that "
        "leave the choice to the library take the implementation in PyTorch instead, which is "
        "right but slower. Please report this with what `mocapsnet doctor --json` prints, which "
        f"also tries again. ({place})"
    )


def where(device: torch.device) -> dict[str, str]:
    """What a verdict depends on: the GPU, and the versions of all that makes code for it."""
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        gpu = f"{about.name}, {getattr(about, 'gcnArchName', '') or f'{about.major}.{about.minor}'}"
    else:
        gpu = f"none, interpreted on {device.type}"
    return {
        "GPU": gpu,
        "torch": torch.__version__,
        "CUDA": str(torch.version.cuda or torch.version.hip),
        **own_versions(),
    }


@cache
def own_versions() -> dict[str, str]:
    """Of Triton and this project, with a digest of its kernels: they change between releases."""
    try:
        import triton
    except ImportError:
        triton = None
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(file.read_bytes())
    try:
        version = importlib.metadata.version("mocapsnet")
    except importlib.metadata.PackageNotFoundError:
        version = "not installed"
    of_triton = "none" if triton is None else triton.__version__
    return {"triton": of_triton, "mocapsnet": f"{version}, {digest.hexdigest()[:12]}"}
