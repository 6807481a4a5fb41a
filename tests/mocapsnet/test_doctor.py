"""`mocapsnet doctor`: it tells what is there, finds what is wrong, and names what is slow."""

import json
import os
import sys

import pytest
import torch

from mocapsnet import cli, doctor
from mocapsnet.kernels import explain, launch, tuning, verification
from mocapsnet.kernels.momentum import cases as momentum_cases
from mocapsnet.kernels.routing import cases as routing_cases
from mocapsnet.kernels.routing import plans
from mocapsnet.kernels.squash import triton as squash_kernels

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="pretends machines; on a GPU run the command itself"
)


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    """One case of each implementation for CPUs, and of the kernels those of squash."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(verification, "FAMILIES", {"squash": ()})
    for cases in (routing_cases, momentum_cases):
        first = next(iter(cases.cpu_cases()))
        monkeypatch.setattr(cases, "cpu_cases", lambda first=first: iter([first]))
    verification._known.clear()
    verification._trusted.clear()
    yield
    verification._known.clear()
    verification._trusted.clear()


def run(capsys, *arguments):
    code = cli.main(["doctor", *arguments])
    return code, capsys.readouterr().out


def test_it_tells_what_is_there(capsys):
    code, out = run(capsys, "--json")
    found = json.loads(out)
    assert code == 0
    assert set(found) == {"versions", "devices", "verification", "plans", "forms", "slow"}
    assert found["versions"]["torch"] == torch.__version__
    assert found["devices"][0]["threads"] == torch.get_num_threads()
    compared = [(row["implementation"], row["family"]) for row in found["verification"]]
    assert compared[:3] == [("chunked", "routing"), ("chunked", "momentum"), ("triton", "squash")]
    assert all(row["cases"] and not row["failures"] for row in found["verification"])
    assert [row["W"] for row in found["forms"]] == [
        [1152, 8, 32, 8],
        [32, 8, 32, 8],
        [32, 8, 10, 16],
    ]

    code, out = run(capsys)
    assert code == 0
    for told in (f"torch {torch.__version__}", "squash    3 right", "first, W [1152, 8, 32, 8]"):
        assert told in out
    assert "WRONG" not in out and "report" not in out


def test_wrong_kernels_fail_until_they_are_right(capsys, monkeypatch):
    right = squash_kernels.forward
    with monkeypatch.context() as patch:
        patch.setattr(squash_kernels, "forward", lambda s: right(s) * 1.01)
        code, out = run(capsys)
        assert code == 1
        assert "squash    2 of 3 WRONG" in out  # bfloat16 is no better than that
        assert "float32: the output is off by" in out and "Please report this" in out
    code, out = run(capsys)  # a bad verdict is tried again
    assert code == 0 and "squash    3 right" in out


def test_a_wrong_implementation_for_cpus_fails(capsys, monkeypatch):
    case = next(iter(routing_cases.cpu_cases()))._replace(run=lambda *args: 1 / 0)
    monkeypatch.setattr(routing_cases, "cpu_cases", lambda: iter([case]))
    code, out = run(capsys)
    assert code == 1 and "1 of 1 WRONG" in out and "ZeroDivisionError" in out


def test_without_gpu_and_interpreter_there_are_no_kernels(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "interpreting", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, out = run(capsys)
    assert code == 0
    assert "No kernels: they need a GPU and triton; --interpret runs them" in out
    assert "no GPU" in out and "triton   squash" not in out


def test_interpret_asks_for_the_interpreter(capsys, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    code, out = run(capsys, "--interpret")
    assert code == 0 and os.environ["TRITON_INTERPRET"] == "1"


def test_it_runs_without_the_packages_of_training(capsys, monkeypatch):
    monkeypatch.setattr(cli, "EXTRA", ["a_package_that_nobody_has"])
    code, out = run(capsys)
    assert code == 0 and "not installed: a_package_that_nobody_has" in out


def test_forms_are_those_of_a_gpu_where_its_kernels_are_relied_on(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(tuning, "read", lambda device: tuning.Table({}, None, "none"))
    monkeypatch.setattr(plans, "_counted", lambda device: 20)  # multiprocessors
    for trusted, backend in ((True, "triton"), (False, "chunked")):
        monkeypatch.setattr(verification, "trusted", lambda *args, t=trusted: t)
        rows = doctor.forms()
        assert {row["backend"] for row in rows} == {backend}
        assert rows[0]["form"].endswith("tensor cores") == trusted
        assert rows[0]["plans"] == ("static, none" if trusted else "")
    u, W = torch.empty(128, 1152, 8, device="meta"), torch.empty(1152, 8, 32, 8, device="meta")
    there, other = (explain(u, W, backend="triton", device=d) for d in ("cuda:0", None))
    assert there.forward != other.forward and there.backward != other.backward
    token = plans.multiprocessors.set(20)
    assert explain(u, W, backend="triton").forward == there.forward
    plans.multiprocessors.reset(token)
    tuning.forget()


def test_without_triton_it_tells_what_there_is(capsys, monkeypatch):
    """As on systems for which there is none."""
    monkeypatch.setitem(sys.modules, "triton", None)
    for module in (doctor, launch):
        monkeypatch.setattr(module, "triton_installed", lambda: False)
    verification.own_versions.cache_clear()
    code, out = run(capsys)
    verification.own_versions.cache_clear()
    assert code == 0 and "No kernels: they need a GPU and triton" in out


def test_the_table_of_a_gpu_is_told(capsys, monkeypatch, device):
    """Of the CPU, which stands for one."""
    monkeypatch.setattr(tuning, "tunable", lambda device: device.type != "meta")
    monkeypatch.setattr(doctor, "devices", lambda: [{"device": "cpu", "name": "a"}] * 2)
    tuning.forget()
    told = "\n".join(doctor.text(doctor.examine()).splitlines())
    assert "Plans of kernels on cpu: static, no table for this GPU and these versions.\n" in told
    assert "`mocapsnet benchmark tune` times others there." in told

    u, W = torch.empty(3, 5, 4), torch.empty(5, 4, 4, 2)
    key = tuning.problem_of(u, W, "forward", 3, "rba", "", "routing")
    plan = plans.planned(u, W)._replace(num_warps=8)
    place = verification.where(torch.device("cpu"))
    file = tuning.file_of(place)
    static = key._replace(direction="backward", routing_grad="final", u=torch.bfloat16)
    entries = {key: tuning.Chosen(plan, 4.26, 5.5), static: tuning.Chosen(None, 7.0, 7.0)}
    assert tuning.write(entries, place, file, 0.03)
    tuning.forget()
    (row,) = json.loads(json.dumps(doctor.plans()))
    assert row["table"] == str(file) and row["problems"][0]["plan"] == plan._asdict()
    told = doctor.text(doctor.examine())
    assert f"Plans of kernels on cpu, tuned, by {file}:\n" in told
    assert "routing forward (3, 5, 4, 4, 2), R 3, rba, float32: on_chip=True, " in told
    assert "num_warps=8, dots=False (4.3 us, static 5.5)" in told
    assert "rba final, bfloat16 and float32: the static one (7.0 us, static 7.0)" in told
    tuning.forget()


@pytest.mark.parametrize(
    "patches, said",
    [
        ({"torch.get_num_threads": 99, "cores": 2}, "takes 99 threads on 2 cores"),
        ({"torch.get_num_threads": 1, "cores": 8}, "takes 1 of 8 cores"),
        ({"torch.backends.mkl.is_available": False, "platform.machine": "x86_64"}, "without MKL"),
        ({"torch.backends.mkldnn.is_available": False}, "without oneDNN"),
        ({"cpu_has_bfloat16": False}, "no bfloat16 instructions"),
        (
            {"torch.backends.cpu.get_cpu_capability": "AVX2", "platform.machine": "x86_64"},
            "computes with AVX2",
        ),
        ({"os.getloadavg": (900.0, 0, 0)}, "busy: 900 processes"),
    ],
    ids=str,
)
def test_what_is_slow_about_a_cpu(patches, said, monkeypatch):
    def found():
        return "\n".join(doctor.slow_cpu())

    good = {
        "torch.get_num_threads": 4,
        "cores": 4,
        "torch.backends.mkl.is_available": True,
        "torch.backends.mkldnn.is_available": True,
        "torch.backends.cpu.get_cpu_capability": "AVX512",
        "cpu_has_bfloat16": True,
        "os.getloadavg": (0.1, 0, 0),
    }
    for name, value in good.items():
        monkeypatch.setattr(f"mocapsnet.doctor.{name}", lambda value=value: value)
    assert found() == ""
    for name, value in patches.items():
        monkeypatch.setattr(f"mocapsnet.doctor.{name}", lambda value=value: value)
    assert said in found()


def test_what_is_slow_about_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    found = "\n".join(doctor.slow_gpu())
    for said in ("TRITON_INTERPRET=1", "no C compiler", "7.5", "TF32", "cudnn.benchmark is off"):
        assert said in found
    monkeypatch.setattr(doctor, "triton_installed", lambda: False)
    assert "triton is not installed" in "\n".join(doctor.slow_gpu())
    monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", "1")
    assert "CUDA_LAUNCH_BLOCKING is set" in "\n".join(doctor.slow_environment())


@pytest.mark.parametrize(
    "cuda, hidden, driver, said",
    [
        (None, None, "none", "built without CUDA"),
        ("13.0", "", "none", "hides it"),
        ("13.0", None, "550.1", "the driver answers"),
        ("13.0", None, "none", "no GPU found"),
    ],
)
def test_why_there_is_no_gpu(cuda, hidden, driver, said, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(doctor, "driver", lambda: driver)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if hidden is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    (told,) = doctor.slow_gpu()
    assert said in told


def test_a_cache_folder_that_cannot_be_written_is_told(monkeypatch, tmp_path):
    assert doctor.slow_environment() == []
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    (told,) = doctor.slow_environment()
    assert "verdicts cannot be kept" in told and "XDG_CACHE_HOME" in told
