"""Tries other versions of Python, and the lowest of the dependencies: `make test-versions`.

For each a fresh environment is made below build/versions, the project installed and imported, and
its quick tests run. What is not on this machine is said and does not fail the run.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
SOME = "not slow and not whole_matrix and not executed"
QUICK = ("-q", "-n", "2", "--dist", "worksteal", "-m", SOME)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--only",
        nargs="+",
        choices=(*PYTHONS, "lowest"),
        default=(*PYTHONS, "lowest"),
        help="versions of Python, and 'lowest' for the lowest dependencies on the lowest Python",
    )
    parser.add_argument("--import-only", action="store_true", help="install and import, no tests")
    parser.add_argument("--keep", action="store_true", help="keep the environments (5 GB each)")
    args = parser.parse_args(argv)
    outcomes = {}
    for name in args.only:
        print(f"=== {name}", flush=True)
        outcomes[name] = attempt(name, args.import_only, args.keep)
        print(f"=== {name}: {outcomes[name]}", flush=True)
    print("\n".join(f"{name:8}{outcome}" for name, outcome in outcomes.items()))
    return any(outcome.startswith("FAILED") for outcome in outcomes.values())


def attempt(name: str, import_only: bool, keep: bool) -> str:
    """Installs, imports and tests; returns what came of it in a few words."""
    uv = [sys.executable, "-m", "uv"]
    version = PYTHONS[0] if name == "lowest" else name
    find = [*uv, "python", "find", "--no-python-downloads", version]
    if subprocess.run(find, capture_output=True).returncode:
        return f"not tried: no Python {version} on this machine"
    folder = ROOT / "build" / "versions" / name
    shutil.rmtree(folder, ignore_errors=True)
    python = folder / "bin" / "python"
    resolution = "lowest-direct" if name == "lowest" else "highest"
    # What a test starts must find this environment's commands.
    environment = {**os.environ, "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    environment.pop("VIRTUAL_ENV", None)
    steps = {
        "environment": [*uv, "venv", "-q", "--seed", "--python", version, str(folder)],
        "install": [
            *(*uv, "pip", "install", "-q", "--python", str(python), "--resolution", resolution),
            *("--editable", f"{ROOT}[train,dev]"),
        ],
        "import": [str(python), "-c", "import mocapsnet.cli, mocapsnet.benchmarks.cli"],
        "tests": [str(python), "-m", "pytest", *QUICK],
    }
    if import_only:
        del steps["tests"]
    try:
        for step, command in steps.items():
            if subprocess.run(command, cwd=ROOT, env=environment).returncode:
                return f"FAILED: {step}"
        shown = (
            "import torch, triton, sys; print(sys.version.split()[0], 'torch', torch.__version__"
        )
        shown += ", 'triton', triton.__version__)"
        versions = subprocess.check_output([python, "-c", shown], text=True).strip()
        return f"passed {'import' if import_only else 'import and quick tests'}: {versions}"
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
