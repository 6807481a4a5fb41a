"""`mocapsnet doctor`: the machine, whether kernels are right on it, what runs, and what is slow.

Needs nothing but what the library itself needs, for it also tells what is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from . import __version__
from .kernels import explain, tuning, verdicts, verification
from .kernels.launch import interpreting, triton_installed
from .kernels.verdicts import Verdict
from .layers import CapsuleLayer
from .model import MoCapsNet

BATCH = 128
"""Samples of the calls whose forms are told."""

OLDEST = (8, 0)
"""The oldest compute capability that the kernels are compiled for in the tests."""

Row = dict[str, Any]


def main(arguments: Sequence[str], missing: Sequence[str] = ()) -> int:
    """Runs the command; `missing` are packages of the extra `train` that are not installed.

    Returns: the exit status, 1 if an implementation does not agree with its reference.
    """
    options = parser().parse_args(arguments)
    if options.interpret:
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
    found = examine(missing)
    print(json.dumps(found, indent=1) if options.json else text(found))
    return int(any(row["failures"] for row in found["verification"]))


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="mocapsnet doctor",
        description="Tell what this machine is, compare the implementations that run on it with "
        "their references, and name what is slow about it. The exit status is 1 if one is wrong.",
    )
    made.add_argument("--json", action="store_true", help="print it as JSON, as for a report")
    made.add_argument(
        "--interpret",
        action="store_true",
        help="also compare the GPU's kernels, run by Triton's interpreter on the CPU: some minutes",
    )
    return made


def examine(missing: Sequence[str] = ()) -> Row:
    """All that the command tells, as JSON can hold it."""
    return {
        "versions": versions(),
        "devices": devices(),
        "verification": verify_all(),
        "plans": plans(),
        "forms": forms(),
        "slow": [*slow(), *(f"not installed: {name}" for name in missing)],
    }


def versions() -> Row:
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    return {
        "mocapsnet": __version__,
        "torch": torch.__version__,
        "triton": triton,
        "CUDA": torch.version.cuda or torch.version.hip or "none",
        "driver": driver(),
        "python": platform.python_version(),
        "system": platform.platform(),
    }


def driver() -> str:
    """Version of NVIDIA's driver, "none" if it does not answer."""
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        return (done.stdout.split() or ["none"])[0] if done.returncode == 0 else "none"
    except (OSError, subprocess.SubprocessError):
        return "none"


def devices() -> list[Row]:
    """The CPU, then the GPUs that PyTorch can use."""
    rows = [
        {
            "device": "cpu",
            "name": processor(),
            "threads": torch.get_num_threads(),
            "cores": cores(),
            "instructions": torch.backends.cpu.get_cpu_capability(),
        }
    ]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        about = torch.cuda.get_device_properties(index)
        rows.append(
            {
                "device": f"cuda:{index}",
                "name": about.name,
                "compute capability": f"{about.major}.{about.minor}",
                "memory": f"{about.total_memory / 2**30:.0f} GiB",
                "multiprocessors": about.multi_processor_count,
            }
        )
    return rows


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def cores() -> int:
    """Logical cores that this process may use, also by the limit of a container."""
    try:
        count = len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        count = os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(count, round(int(quota) / int(period))))
    except (OSError, ValueError):  # no such limit
        return count


def verify_all() -> list[Row]:
    """Of the CPU's implementations, and of the kernels where they run: GPUs, or the interpreter."""
    rows = []
    cpu = torch.device("cpu")
    for family in ("routing", "momentum"):
        verdict = verification.apart(partial(verification.compare, family, cpu, "cpu_cases"))
        rows.append(row("cpu", "chunked", verdict))
    places = [torch.device(d["device"]) for d in devices()[1:]]
    places += [cpu] if interpreting() and not places else []
    for device in places if triton_installed() else []:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # told here
            made = verification.verify(device, list(verification.FAMILIES))
            bad = [verdict.family for verdict in made if not verdict.passed]
            if bad:  # what stood in the way may be gone
                again = {v.family: v for v in verification.verify(device, bad, again=True)}
                made = [again.get(verdict.family, verdict) for verdict in made]
        rows += [row(str(device), "triton", verdict) for verdict in made]
    return rows


def row(device: str, implementation: str, verdict: Verdict) -> Row:
    about = verdict._asdict()
    del about["where"]
    return {"device": device, "implementation": implementation, **about}


def plans() -> list[Row]:
    """Where the kernels' plans are from on each GPU, and what tuning found."""
    rows = []
    for device in devices()[1:]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # told here
            table = tuning.table(torch.device(device["device"]))
        problems = [
            {
                "problem": str(problem),
                "plan": found.plan and found.plan._asdict(),
                "microseconds": found.microseconds,
                "static_microseconds": found.static_microseconds,
            }
            for problem, found in table.plans.items()
        ]
        file = table.file and str(table.file)
        row = {"device": device["device"], "table": file, "unused": table.why}
        rows.append(row | {"problems": problems})
    return rows


def forms() -> list[Row]:
    """How the layers of the default network for 28 x 28 images are run here, in training."""
    with torch.device("meta"):
        network = MoCapsNet((1, 28, 28), classes=10)
    device = None
    if torch.cuda.is_available() and triton_installed():
        device = torch.device("cuda", torch.cuda.current_device())
        device = device if verification.trusted("routing", device) else None
    rows: list[Row] = []
    for name, layer in network.named_modules():
        if not isinstance(layer, CapsuleLayer):
            continue
        N, K, J, D = layer.weight.shape
        u = torch.empty(BATCH, N, K, device="meta")
        backend = "triton" if device else "chunked"
        told = explain(u, layer.weight, backend=backend, device=device)
        row = {"layer": name, "u": list(u.shape), "W": list(layer.weight.shape), **told._asdict()}
        if not rows or rows[-1]["W"] != row["W"]:
            rows.append(row)
    return rows


def slow() -> list[str]:
    """What is slow about this machine or its set-up, each with what to do about it."""
    return [*slow_gpu(), *slow_cpu(), *slow_environment()]


def slow_gpu() -> list[str]:
    if not torch.cuda.is_available():
        if not (torch.version.cuda or torch.version.hip):
            return ["no GPU: this PyTorch is built without CUDA; fused kernels need one"]
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        if hidden in ("", "-1"):
            return [f'no GPU: CUDA_VISIBLE_DEVICES="{hidden}" hides it']
        if driver() != "none":
            return [
                f"no GPU: the driver answers, but this PyTorch, for CUDA {torch.version.cuda}, "
                "cannot use it: update the driver, or install PyTorch for an older CUDA"
            ]
        return ["no GPU found: fused kernels need one; all runs on the CPU"]
    found = []
    if not triton_installed():
        found.append("triton is not installed: GPUs run PyTorch's operations, not fused kernels")
    elif interpreting():
        found.append("TRITON_INTERPRET=1: kernels are interpreted, many times slower")
    if not any(shutil.which(name) for name in (os.environ.get("CC", "cc"), "gcc", "clang")):
        found.append("no C compiler: Triton needs one to launch kernels (apt-get install gcc)")
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        if torch.version.cuda and capability < OLDEST:
            found.append(
                f"cuda:{index} has compute capability {capability[0]}.{capability[1]}: no bfloat16 "
                "and TF32 on tensor cores, and the kernels are only tested for 8.0 and newer"
            )
    if torch.get_float32_matmul_precision() == "highest":
        found.append(
            "float32 matrix products are exact, as PyTorch has it; "
            'torch.set_float32_matmul_precision("high") takes tensor cores, which round to TF32'
        )
    if not torch.backends.cudnn.is_available() and torch.version.cuda:
        found.append("no cuDNN in this PyTorch: convolutions are slow")
    elif not torch.backends.cudnn.benchmark:
        found.append(
            "torch.backends.cudnn.benchmark is off: on, the fastest convolution is found by "
            "trying, but runs may differ in their last bits"
        )
    return found


def slow_cpu() -> list[str]:
    found = []
    threads, may = torch.get_num_threads(), cores()
    if threads > may:
        found.append(f"PyTorch takes {threads} threads on {may} cores: set OMP_NUM_THREADS={may}")
    elif threads < may / 2 or (threads < may and "OMP_NUM_THREADS" in os.environ):
        found.append(
            f"PyTorch takes {threads} of {may} cores"
            + (" by OMP_NUM_THREADS" if "OMP_NUM_THREADS" in os.environ else "")
            + ": more threads may be faster"
        )
    if hasattr(os, "getloadavg") and os.getloadavg()[0] > 1.5 * (os.cpu_count() or 1):
        load, of = os.getloadavg()[0], os.cpu_count()
        found.append(f"the machine is busy: {load:.0f} processes want its {of} cores")
    if platform.machine() in ("x86_64", "AMD64"):
        if not torch.backends.mkl.is_available():
            found.append("PyTorch is built without MKL: matrix products may be slow")
        if not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
            found.append(
                f"the CPU computes with {torch.backends.cpu.get_cpu_capability()}, 8 float32 at a "
                "time or fewer, not AVX512"
            )
    if not torch.backends.mkldnn.is_available():
        found.append("PyTorch is built without oneDNN: convolutions are slow")
    elif not cpu_has_bfloat16():
        found.append(
            "the CPU has no bfloat16 instructions: with --mixed-precision bf16 training on it is "
            "many times slower"
        )
    return found


def cpu_has_bfloat16() -> bool:
    """Whether oneDNN computes in bfloat16 natively; True where that cannot be found out."""
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):
        return True


def slow_environment() -> list[str]:
    found = []
    for name in ("CUDA_LAUNCH_BLOCKING", "PYTORCH_NO_CUDA_MEMORY_CACHING"):
        if os.environ.get(name, "0") != "0" and torch.cuda.is_available():
            found.append(f"{name} is set: it is for finding errors, and slow")
    if os.environ.get("MOCAPSNET_VERIFY") == "always":
        found.append("MOCAPSNET_VERIFY=always: kernels are verified in every process")
    try:
        verdicts.folder().mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=verdicts.folder()).close()
    except OSError as error:
        found.append(
            f"verdicts cannot be kept ({error.strerror or error}), so kernels are verified in "
            "every process: set XDG_CACHE_HOME to a folder that can be written"
        )
    return found


def text(found: Row) -> str:
    """What was found, in lines."""
    lines = [f"{name} {value}" for name, value in found["versions"].items()]
    for about in found["devices"]:
        rest = (f"{key} {value}" for key, value in about.items() if key not in ("device", "name"))
        lines.append(f"{about['device']}: {about['name']}, {', '.join(rest)}")
    lines += ["", "Compared with the reference, results and gradients:"]
    for row in found["verification"]:
        wrong, of = len(row["failures"]), len(row["cases"])
        result = row["unfinished"] or (f"{wrong} of {of} WRONG" if wrong else f"{of} right")
        lines.append(
            f"  {row['device']:8}{row['implementation']:9}{row['family']:10}{result}, "
            f"{row['seconds']:.1f} s when it was verified"
        )
        lines += [f"    {case}: {what}" for case, what in row["failures"].items()]
    if all(row["implementation"] == "chunked" for row in found["verification"]):
        lines.append("  No kernels: they need a GPU and triton; --interpret runs them on the CPU.")
    elif any(row["failures"] for row in found["verification"]):
        lines.append("  Please report this with what `mocapsnet doctor --json` prints.")
    for row in found["plans"]:
        if row["unused"]:
            lines += ["", f"Plans of kernels on {row['device']}: static, {row['unused']}."]
            lines.append("  `mocapsnet benchmark tune` times others there.")
            continue
        lines += ["", f"Plans of kernels on {row['device']}, tuned, by {row['table']}:"]
        for tuned in row["problems"]:
            plan = tuned["plan"] and ", ".join(f"{k}={v}" for k, v in tuned["plan"].items())
            times = f"{tuned['microseconds']:.1f} us, static {tuned['static_microseconds']:.1f}"
            lines.append(f"  {tuned['problem']}: {plan or 'the static one'} ({times})")
    lines += ["", f"The default network on 28 x 28 images, batch {BATCH}:"]
    for row in found["forms"]:
        lines.append(f"  {row['layer']}, W {row['W']}, {row['backend']}: {row['form']}")
        lines += [f"    plans:    {row['plans']}"] if row["plans"] else []
        lines += [f"    forward:  {step}" for step in row["forward"]]
        lines += [f"    backward: {step}" for step in row["backward"]]
    lines += ["", "What is slow here:" if found["slow"] else "Nothing is slow that shows."]
    return "\n".join(lines + [f"  {what}" for what in found["slow"]])
