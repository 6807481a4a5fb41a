"""Kernels are verified where they run. Here they run in Triton's interpreter, on CPU tensors that
pass for those of a GPU, or on a GPU if there is one."""

import contextlib
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mocapsnet.kernels import cases as kernel_cases
from mocapsnet.kernels import launch, routing, squash, verdicts, verification, verify
from mocapsnet.kernels.cases import Case, check
from mocapsnet.kernels.momentum import cases as momentum_cases
from mocapsnet.kernels.primary import cases as primary_cases
from mocapsnet.kernels.routing import cases as routing_cases
from mocapsnet.kernels.routing import chunked, direct
from mocapsnet.kernels.squash import cases as squash_cases
from mocapsnet.kernels.squash import reference
from mocapsnet.kernels.squash import triton as squash_kernels
from mocapsnet.kernels.votes import cases as votes_cases


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """A process that knows no verdict, of a user who has none."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("MOCAPSNET_VERIFY", raising=False)
    monkeypatch.setattr(launch, "on_gpu", lambda x: True)
    forget()
    yield
    forget()


def forget():
    verification._trusted.clear()
    verification._known.clear()


@pytest.fixture
def compared(monkeypatch):
    """The families that were compared, in order; of the cases of squash only the first is."""
    families, compare = [], verification.compare

    def counted(family, device, of="cases"):
        families.append(family)
        return compare(family, device, of)

    first = next(iter(squash_cases.cases()))
    monkeypatch.setattr(squash_cases, "cases", lambda: iter([first]))
    monkeypatch.setattr(verification, "compare", counted)
    return families


@pytest.fixture
def s(device):
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).to(device)


def break_kernel(monkeypatch, forward):
    """Makes the kernel of squash one that is not right."""
    right = squash_kernels.forward
    monkeypatch.setattr(squash_kernels, "forward", lambda s: forward(right(s)))


def files():
    return sorted(verdicts.folder().glob("*.json"))


def test_the_first_call_verifies_and_the_verdict_is_kept(compared, s, caplog):
    caplog.set_level("INFO", "mocapsnet")
    want = reference.squash(s)
    for _ in range(2):
        torch.testing.assert_close(squash(s), want)
    assert compared == ["squash"]
    (file,) = files()
    kept = json.loads(file.read_text())
    assert kept["cases"] == ["float32"] and kept["failures"] == {}
    assert set(kept["where"]) == {"GPU", "torch", "CUDA", "triton", "mocapsnet"}

    forget()
    squash(s)
    assert compared == ["squash"]  # another process reads it
    assert [record.getMessage() for record in caplog.records] == [
        verification.TOLD % ("squash", kept["where"]["GPU"])
    ]


@pytest.mark.parametrize(
    "wrong, said",
    [
        (lambda v: v * (1 + 1e-5), "the output is off by"),
        (lambda v: v.index_fill(0, torch.tensor([399], device=v.device), torch.nan), "by nan"),
        (lambda v: v[:-1], "has shape"),
        (lambda v: torch.nextafter(v, torch.rand_like(v)), "other bits"),
        (lambda v: 1 / 0, "ZeroDivisionError: division by zero"),
    ],
    ids=["a small error", "one number", "a shape", "not repeatable", "an exception"],
)
def test_wrong_kernels_are_not_relied_on(wrong, said, compared, s, monkeypatch):
    with monkeypatch.context() as patch:
        break_kernel(patch, wrong)
        with pytest.warns(RuntimeWarning, match="kernels of squash do not agree") as warned:
            v = squash(s)
        assert torch.equal(v, reference.squash(s))
        message = str(warned[0].message)
        assert said in message and "1 of 1 cases" in message and "mocapsnet doctor" in message
        assert f"torch {torch.__version__}" in message
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            squash(s)  # said once
    assert compared == ["squash"]

    forget()  # another process reads the verdict
    with pytest.warns(RuntimeWarning, match="do not agree"):
        assert torch.equal(squash(s), reference.squash(s))
    assert compared == ["squash"]
    (verdict,) = verify(s.device, ["squash"], again=True)
    assert verdict.passed and compared == ["squash"] * 2
    monkeypatch.setattr(squash_kernels, "forward", lambda s: s + 7)
    assert torch.equal(squash(s), s + 7)  # the kernel is relied on again


def test_a_named_backend_runs_whatever_the_verdict(compared, s, monkeypatch):
    break_kernel(monkeypatch, lambda v: v + 1)
    torch.testing.assert_close(squash(s, backend="triton"), squash(s, backend="reference") + 1)
    assert compared == []


def test_families_whose_launches_another_makes_count_for_it(compared, monkeypatch, device):
    squash_case = next(iter(squash_cases.cases()))
    monkeypatch.setitem(verification.FAMILIES, "squash", ("votes",))
    broken = squash_case._replace(run=lambda *args: 1 / 0)
    monkeypatch.setattr(votes_cases, "cases", lambda: iter([broken]))
    with pytest.warns(RuntimeWarning, match="kernels of votes"):
        assert not verification.trusted("squash", device)
    assert compared == ["squash", "votes"]


@pytest.mark.parametrize("key", ["GPU", "torch", "triton", "mocapsnet"])
def test_something_new_is_verified_again(key, compared, s, monkeypatch):
    squash(s)
    where = verification.where
    monkeypatch.setattr(verification, "where", lambda device: where(device) | {key: "new"})
    forget()
    squash(s)
    assert compared == ["squash"] * 2 and len(files()) == 2


def test_the_environment_says_when(compared, s, monkeypatch):
    monkeypatch.setenv("MOCAPSNET_VERIFY", "always")
    for _ in range(2):
        squash(s)
        squash(s)
        forget()
    assert compared == ["squash"] * 2
    monkeypatch.setenv("MOCAPSNET_VERIFY", "0")
    break_kernel(monkeypatch, lambda v: v + 1)
    torch.testing.assert_close(squash(s), reference.squash(s) + 1)
    assert compared == ["squash"] * 2
    forget()
    monkeypatch.setenv("MOCAPSNET_VERIFY", "no")
    with pytest.raises(ValueError, match='must be "0", "1" or "always"; got "no"'):
        squash(s)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "\udcff",
        lambda text: "[1]",
        lambda text: text.replace('"failures": {}', '"failures": 3'),
        lambda text: text.replace('"seconds"', '"minutes"'),
        lambda text: text.replace('"float32"', ""),
        lambda text: text.replace(torch.__version__, "0.1"),
        lambda text: "[" * 100_000,
    ],
)
def test_a_damaged_verdict_is_none(damage, compared, s):
    squash(s)
    (file,) = files()
    whole = file.read_text()
    assert damage(whole) != whole
    file.write_text(damage(whole), errors="surrogateescape")
    forget()
    squash(s)
    assert compared == ["squash"] * 2
    assert verdicts.read("squash", verification.where(s.device))


def test_a_folder_that_cannot_be_written_keeps_nothing(compared, s, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    for _ in range(2):
        torch.testing.assert_close(squash(s), reference.squash(s))
        forget()
    assert compared == ["squash"] * 2


def test_too_little_memory_is_no_verdict(compared, s, monkeypatch, caplog):
    with monkeypatch.context() as patch:

        def full(*args):
            raise torch.OutOfMemoryError("CUDA out of memory")

        patch.setattr(squash_kernels, "backward", full)
        (verdict,) = verify(s.device, ["squash"])
        assert "out of memory" in verdict.unfinished and verdict.passed and files() == []
        for _ in range(2):
            squash(s)  # which does not try again and again
    (said, _) = [r.getMessage() for r in caplog.records if "without having been" in r.getMessage()]
    assert "run without having been verified: not enough memory: CUDA out of memory" in said
    (verdict,) = verify(s.device, ["squash"])
    assert not verdict.unfinished and len(files()) == 1


def test_wrong_kernels_are_not_relied_on_though_memory_gave_out(s, monkeypatch):
    forward, shapes = squash_kernels.forward, set()

    def wrong_then_full(s):
        shapes.add(s.shape)
        if len(shapes) > 1:  # in the second case
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 2 * forward(s)

    monkeypatch.setattr(squash_kernels, "forward", wrong_then_full)
    with pytest.warns(RuntimeWarning, match="do not agree"):
        assert not verification.trusted("squash", s.device)
    assert not verification._by_verdicts("squash", s.device.type, s.device.index)


def test_kernels_found_wrong_when_there_is_memory_are_no_longer_relied_on(s, monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(squash_kernels, "forward", full)
        assert verification.trusted("squash", s.device)
    forward = squash_kernels.forward
    monkeypatch.setattr(squash_kernels, "forward", lambda *args: 2 * forward(*args))
    with pytest.warns(RuntimeWarning, match="do not agree"):
        verify(s.device, ["squash"])
    assert not verification.trusted("squash", s.device)
    torch.testing.assert_close(squash(s), reference.squash(s))


ONE_OF_TWO = """
import sys, time
import torch
from mocapsnet.kernels import launch, squash, verification
launch.on_gpu = lambda x: True
compare = verification.compare
def slowly(*args):
    print("compared", flush=True)
    time.sleep(float(sys.argv[1]))
    return compare(*args)
verification.compare = slowly
print("ready", flush=True)
sys.stdin.readline()
print(bool(squash(torch.ones(1, 3)).isfinite().all()))
"""


def test_of_two_processes_one_verifies():
    both = [
        subprocess.Popen(
            [sys.executable, "-c", ONE_OF_TWO, "1"],
            env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for process in both:
        assert process.stdout.readline() == "ready\n"
    for process in both:
        process.stdin.write("\n")
        process.stdin.flush()
    said = sorted(process.communicate(timeout=120)[0] for process in both)
    assert said == ["True\n", "compared\nTrue\n"]
    assert len(files()) == 1


def test_nothing_that_the_caller_has_set_is_touched_or_matters(compared, s, device):
    before = torch.get_rng_state()
    default = torch.get_default_dtype()
    u, W = torch.randn(2, 3, 4).to(device), torch.randn(3, 4, 5, 2).to(device)
    before = torch.get_rng_state()
    torch.set_default_dtype(torch.float64)
    try:
        with (
            torch.inference_mode(),
            torch.autocast(device.type, torch.bfloat16),
            launch.recording() as launches,
        ):
            squash(s)
            assert torch.is_inference_mode_enabled() and not torch.is_grad_enabled()
            assert torch.is_autocast_enabled(device.type)
    finally:
        torch.set_default_dtype(default)
    (verdict,) = verify(device, ["squash"])
    assert verdict.passed and compared == ["squash"]
    assert len(launches) == 1  # the call's own
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_float32_matmul_precision() == "highest"
    assert u.shape[0] == len(routing(u, W, backend="reference"))


class CalledInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return squash(g)


def under_a_mode(s):
    with FlopCounterMode(display=False):
        squash(s)


WHERE_NOTHING_IS_VERIFIED = {
    "a compiler": lambda s: torch.compile(squash, fullgraph=True, backend="aot_eager")(s),
    "export": lambda s: torch.export.export(Squash(), (s,)),
    "a backward pass": lambda s: CalledInBackward.apply(s.requires_grad_()).sum().backward(),
    "a dispatch mode": under_a_mode,
    "a capture": squash,
}


class Squash(torch.nn.Module):
    def forward(self, s):
        return squash(s)


@pytest.mark.parametrize("inside", WHERE_NOTHING_IS_VERIFIED)
def test_nothing_is_verified_inside(inside, compared, s, monkeypatch):
    if inside == "a capture":
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    WHERE_NOTHING_IS_VERIFIED[inside](s.clone())
    assert compared == [] and files() == []


@pytest.mark.parametrize("inside", ["a compiler", "a capture"])
def test_a_bad_verdict_counts_inside(inside, compared, s, monkeypatch):
    break_kernel(monkeypatch, lambda v: v + 1)
    with pytest.warns(RuntimeWarning, match="do not agree"):
        verify(s.device, ["squash"])
    forget()  # it is read from its file
    torch.compiler.reset()
    if inside == "a capture":
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    torch.testing.assert_close(WHERE_NOTHING_IS_VERIFIED[inside](s), reference.squash(s))
    assert compared == ["squash"]


def test_verify_names_what_cannot_be(monkeypatch, device):
    with pytest.raises(ValueError, match="families must be of squash, .*; got 'em'"):
        verify(device, ["em"])
    monkeypatch.setattr(launch, "triton_installed", lambda: False)
    with pytest.raises(ValueError, match="cannot be verified on .* the package triton"):
        verify(device)


def test_every_operation_with_kernels_is_a_family():
    folders = {file.parent.name for file in Path(launch.__file__).parent.glob("*/triton.py")}
    assert set(verification.FAMILIES) == folders


@pytest.mark.parametrize(
    "cases, name",
    [
        (squash_cases, "bfloat16"),
        (primary_cases, "channels-last, float32"),
        (votes_cases, "float32"),
        (routing_cases, "tensor cores, rba final, bfloat16 and float32"),
        (momentum_cases, "on chip, rba final, float32"),
    ],
)
def test_right_kernels_pass(cases, name, device):
    found = {str(case): case for case in cases.cases()}
    assert check(found[name], device) == ""


def test_the_implementation_for_cpus_passes():
    """Without the largest cases, of which it is only seen that they are of chunks."""
    for cases in (routing_cases, momentum_cases):
        for case in cases.cpu_cases():
            if case.name.startswith("chunks"):
                B, W = case.inputs["u"][0][0], torch.empty(case.inputs["W"][0], device="meta")
                assert chunked.chunking(B, W, 4)[1] >= 3 and not direct.faster(B, W, "rba")
            else:
                assert check(case, torch.device("cpu")) == "", str(case)


def test_products_rounded_to_tf32_are_seen_where_they_should_be_exact():
    """Sums of 100 products of numbers that are rounded as tensor cores do."""

    def rounded(x):
        return (x.view(torch.int32) + 4096 & -8192).view(torch.float32)

    def run(a, b, g):
        a, b = rounded(a), rounded(b)
        return a @ b, g @ b.mT, a.mT @ g

    inputs = {"a": ((3, 100), torch.float32), "b": ((100, 4), torch.float32)}
    case = Case("product", inputs, run, torch.matmul)
    assert "the output is off by" in check(case, torch.device("cpu"))
    assert check(case._replace(precision="high"), torch.device("cpu")) == ""


def test_kernels_are_compiled_ahead_each_once(monkeypatch):
    """What a family launches, with the options and dtypes of its cases; failures wait."""
    compiled = []

    class Kernel:
        def warmup(self, *args, grid, **options):
            compiled.append((self, options["BLOCK"], args[0].dtype, grid))
            if options["BLOCK"] == 2:
                raise RuntimeError("does not compile")

    one, other = Kernel(), Kernel()
    x, y = torch.zeros(3), torch.zeros(3, dtype=torch.float16)
    launches = [
        launch.Launch(kernel, (n,), (t, 5), {"BLOCK": block})
        for n, (kernel, t, block) in enumerate(
            [(one, x, 1), (one, x.clone(), 1), (one, y, 1), (other, x, 2), (one, x, 4)]
        )
    ]
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    launch.compile_ahead(launches, torch.device("cuda", 0))
    found = sorted((kernel is one, block, str(dtype)) for kernel, block, dtype, _ in compiled)
    assert found == [
        (False, 2, "torch.float32"),
        (True, 1, "torch.float16"),
        (True, 1, "torch.float32"),
        (True, 4, "torch.float32"),
    ]


def test_all_that_a_family_s_cases_launch_is_compiled_ahead(monkeypatch):
    ahead = []
    monkeypatch.setattr(kernel_cases, "compile_ahead", lambda launches, _: ahead.extend(launches))
    broken = next(iter(squash_cases.cases()))._replace(run=lambda *args: 1 / 0)
    kernel_cases.compile_all([broken, *squash_cases.cases()], torch.device("cpu"))
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    assert [x.args[0].dtype for x in ahead] == [d for d in dtypes for _ in range(2)]
    names = [x.kernel.__name__ for x in ahead]
    assert names == ["forward_kernel", "backward_kernel"] * 3


def test_recorded_launches_include_those_of_backward():
    """On a GPU it is made in another thread, which does not see what this one has set."""
    assert torch._C._is_multithreading_enabled()
    with launch.recording(), launch.at_precision("high"):
        assert not torch._C._is_multithreading_enabled()
        assert not launch.highest_precision()
    assert torch._C._is_multithreading_enabled() and launch.highest_precision()
