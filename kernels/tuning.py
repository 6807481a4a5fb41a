"""Plans that were found to be faster than the static ones on a GPU, in the user's cache folder.

`mocapsnet benchmark tune` writes a table for the GPU model and versions that it ran with; launchers
take their plans from it where it has their problem. It is read once, at the first launch on a GPU.
The environment variable MOCAPSNET_TUNED says which table: "1", the default, that of the cache
folder if there is one; "0", none; else it is the name of a file. A table that is damaged, or of
another place, is told in one warning and not used.

Results stay a function of inputs, GPU and table. A plan never changes the form of a problem, on
chip or streamed: by it forward keeps tensors for backward whose shapes compilers have seen.
"""

from __future__ import annotations

import json
import os
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from . import kept, launch
from .verification import where

if TYPE_CHECKING:
    from .routing.plans import Plan

OPERATIONS = ("routing", "momentum")
DIRECTIONS = ("forward", "backward")


class Problem(NamedTuple):
    """What a plan is for: the launches of one direction of an operation.

    A stack of momentum layers, "momentum", has N = J and K = D, and one plan for all its layers.
    """

    operation: str
    direction: str
    B: int
    N: int
    K: int
    J: int
    D: int
    iterations: int
    method: str
    routing_grad: str
    """Of backward; forward has none."""
    u: torch.dtype
    W: torch.dtype
    precision: str
    """"highest", or "high" for all others of torch.set_float32_matmul_precision."""

    def __str__(self) -> str:
        sizes = ", ".join(map(str, self[2:7]))
        modes = " ".join(filter(None, [self.method, self.routing_grad]))
        dtypes = " and ".join(dict.fromkeys([name_of(self.u), name_of(self.W)]))
        said = (
            f"{self.operation} {self.direction} ({sizes}), R {self.iterations}, {modes}, {dtypes}"
        )
        return said if self.precision == "highest" else f"{said}, precision {self.precision}"


class Chosen(NamedTuple):
    """What tuning found for a problem."""

    plan: Plan | None
    """None: the static plan stays."""
    microseconds: float
    static_microseconds: float
    """Medians, of the plan and of the static one, when it was chosen."""


class Table(NamedTuple):
    """The plans of one GPU."""

    plans: Mapping[Problem, Chosen]
    file: Path | None
    """None if there is none."""
    why: str = ""
    """Why no table is used, if so."""

    def __str__(self) -> str:
        if self.why:
            return f"static, {self.why}"
        return f"the table {self.file}, {len(self.plans)} problems"


_tables: dict[int | None, Table] = {}
"""What this process has read, by index of the GPU."""

_reading = threading.Lock()


def table(device: torch.device) -> Table:
    """The table that launches on this device take their plans from."""
    if not tunable(device):
        return NOWHERE
    found = _tables.get(device.index)
    return _first(device) if found is None else found


def tunable(device: torch.device) -> bool:
    """Whether plans for a device may be other than the static ones."""
    return device.type == "cuda"


def forget() -> None:
    """The next launch reads the table again."""
    with _reading:
        _tables.clear()


@contextmanager
def using(device: torch.device, table: Table) -> Iterator[None]:
    """Launches on a device inside, in all threads, take their plans from this table."""
    index = device.index
    if device.type == "cuda" and index is None:  # tensors always have one
        index = torch.cuda.current_device()
    with _reading:
        before = _tables.get(index)
        _tables[index] = table
    try:
        yield
    finally:
        with _reading:
            if before is None:
                del _tables[index]
            else:
                _tables[index] = before


def _first(device: torch.device) -> Table:
    with _reading:
        if device.index not in _tables:
            found = read(device)
            if found.file and found.why:
                warnings.warn(
                    f"kernels have their static plans: {found.why}. `mocapsnet benchmark tune` "
                    "writes a new table.",
                    RuntimeWarning,
                    stacklevel=2,
                )
            _tables[device.index] = found
        return _tables[device.index]


def read(device: torch.device) -> Table:
    """The table for a device, from its file."""
    wanted = os.environ.get("MOCAPSNET_TUNED", "1")
    if wanted == "0":
        return Table({}, None, "MOCAPSNET_TUNED=0")
    place = where(device)
    if wanted not in ("", "1"):
        return load(Path(wanted), place)
    try:
        found = load(file_of(place), place)
        return found if found.file and found.file.exists() else Table({}, None, NONE)
    except OSError:
        return Table({}, None, NONE)


def load(file: Path, place: dict[str, str]) -> Table:
    """The table of a place in a file."""
    try:
        content = json.loads(file.read_bytes())
        if content["where"] != place:
            differ = [k for k in place if content["where"].get(k) != place[k]]
            return Table({}, file, f"{file} is of another {' and '.join(differ) or 'place'}")
        return Table(dict(map(_entry, content["plans"])), file)
    except OSError as error:
        return Table({}, file, f"{file} cannot be read ({error.strerror or error})")
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        return Table({}, file, f"{file} is damaged ({type(error).__name__}: {error})")


NONE = "no table for this GPU and these versions"
STATIC = Table({}, None, "as asked for")
NOWHERE = Table({}, None, "plans are tuned on GPUs alone")


def file_of(place: dict[str, str]) -> Path:
    """The file of the table for a place. Raises: OSError if the user has no cache folder."""
    return kept.folder("tuned") / f"{kept.name('plans', place)}.json"


def write(
    plans: Mapping[Problem, Chosen], place: dict[str, str], file: Path, margin: float
) -> bool:
    """Whether a table could be written: readable JSON, a problem a line."""
    lines = [json.dumps(_record(*item)) for item in plans.items()]
    head = json.dumps({"where": place, "margin": margin}, indent=1)
    return kept.write(file, head[:-2] + ',\n "plans": [\n  ' + ",\n  ".join(lines) + "\n ]\n}\n")


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _record(problem: Problem, chosen: Chosen) -> dict[str, Any]:
    about = problem._asdict() | {"u": name_of(problem.u), "W": name_of(problem.W)}
    plan = chosen.plan and chosen.plan._asdict()
    return about | chosen._asdict() | {"plan": plan}


def _entry(record: dict[str, Any]) -> tuple[Problem, Chosen]:
    """Raises: ValueError, TypeError, LookupError or AttributeError if it cannot be right."""
    record = dict(record)
    plan, *seconds = (record.pop(name) for name in Chosen._fields)
    dtypes = {name: getattr(torch, record[name]) for name in ("u", "W")}
    problem = Problem(**record | dtypes)
    modes = problem.method in ("rba", "sda"), problem.routing_grad in ("", "final", "full")
    known = problem.operation in OPERATIONS and problem.direction in DIRECTIONS and all(modes)
    known = known and all(isinstance(dtype, torch.dtype) for dtype in dtypes.values())
    if not known or not all(isinstance(x, (int, float)) and x > 0 for x in seconds):
        raise ValueError(f"an entry of {problem.operation!r} has values that cannot be")
    return problem, Chosen(None if plan is None else _plan(problem, plan), *seconds)


def _plan(problem: Problem, fields: dict[str, Any]) -> Plan:
    from .routing import plans

    for name in ("B", "N", "K", "J", "D"):
        if type(getattr(problem, name)) is not int or getattr(problem, name) < 1:
            raise ValueError(f"{name} is {getattr(problem, name)!r}")
    plan = plans.Plan(**fields)
    wide = torch.float64 in (problem.u, problem.W)
    static = plans.plan(*problem[2:7], 8 if wide else 4, torch.device("meta"))  # for its form
    for name, value, like in zip(plan._fields, plan, static, strict=True):
        fits = type(value) is type(like)
        if type(like) is int:
            fits = fits and 1 <= value <= max(problem.N, 1024)
        if name in ("block_b", "num_warps"):
            fits = fits and value & (value - 1) == 0
        if not fits:
            raise ValueError(f"{name} of a plan is {value!r}")
    if plan.on_chip != static.on_chip or plan.num_warps > 32 or (plan.dots and wide):
        raise ValueError(f"the plan {plan} is none for {problem}")
    return plan


def problem_of(
    u: torch.Tensor,
    W: torch.Tensor,
    direction: str,
    iterations: int,
    method: str,
    routing_grad: str,
    operation: str,
) -> Problem:
    (B, N, K), (J, D) = u.shape, W.shape[2:]
    precision = "highest" if launch.highest_precision() else "high"
    modes = iterations, method, routing_grad
    return Problem(operation, direction, B, N, K, J, D, *modes, u.dtype, W.dtype, precision)


def told(
    device: torch.device,
    u: torch.Tensor,
    W: torch.Tensor,
    iterations: int,
    method: str,
    routing_grad: str,
) -> tuple[Plan | None, Plan | None, str]:
    """The table's plans of `routing`, forward and backward, on a device, and in words where they
    are from; None for static ones."""
    found = table(device)
    if found.why:
        return None, None, str(found)
    plans, words = [], []
    for direction, grad in (("forward", ""), ("backward", routing_grad)):
        problem = problem_of(u, W, direction, iterations, method, grad, "routing")
        entry = found.plans.get(problem)
        plans.append(entry and entry.plan)
        how = "not tuned" if entry is None else "tuned" if entry.plan else "tuned, the static one"
        words.append(f"{direction} {how}")
    return plans[0], plans[1], f"{', '.join(words)}, by {found.file}"
