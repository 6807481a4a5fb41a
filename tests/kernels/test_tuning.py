"""Tables of tuned plans: where launchers find them, and what a damaged or foreign one does."""

import json
import warnings

import pytest
import torch

from mocapsnet.kernels import explain, routing, tuning, verification
from mocapsnet.kernels.launch import recording
from mocapsnet.kernels.momentum import triton as momentum
from mocapsnet.kernels.momentum.schedule import schedule
from mocapsnet.kernels.routing import plans
from mocapsnet.kernels.routing import triton as launchers

B, N, K, J, D = 3, 5, 3, 4, 2


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """A process that has read no table, of a user who has none, whose tensors are on a GPU."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("MOCAPSNET_TUNED", raising=False)
    monkeypatch.setattr(tuning, "tunable", lambda device: device.type != "meta")
    tuning.forget()
    yield
    tuning.forget()


@pytest.fixture
def place(device):
    return verification.where(device)


def tensors(device, sizes=(B, N, K, J, D), dtype=torch.float32):
    B, N, K, J, D = sizes
    generator = torch.Generator().manual_seed(0)
    u, W = (torch.randn(s, generator=generator) for s in ((B, N, K), (N, K, J, D)))
    return u.to(device, dtype), W.to(device, dtype)


def problem(u, W, direction="forward", grad="", operation="routing"):
    return tuning.problem_of(u, W, direction, 3, "rba", grad, operation)


def keep(place, plans):
    file = tuning.file_of(place)
    entries = {key: tuning.Chosen(plan, 7.5, 9.0) for key, plan in plans.items()}
    assert tuning.write(entries, place, file, 0.03)
    tuning.forget()
    return file


def warps(run):
    with recording() as launches:
        run()
    return [launch.options["num_warps"] for launch in launches]


def test_launchers_take_their_plans_from_the_table(device, place):
    u, W = tensors(device)
    static = plans.planned(u, W)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # that there is none is nothing to warn of
        assert warps(lambda: launchers.forward(u, W, None, 3, "rba", False)) == [static.num_warps]
    assert (
        explain(u, W, backend="triton").plans == "static, no table for this GPU and these versions"
    )

    changed = static._replace(num_warps=8)
    file = keep(place, {problem(u, W): changed, problem(u, W, "backward", "full"): changed})
    assert static.num_warps != 8
    assert warps(lambda: launchers.forward(u, W, None, 3, "rba", False)) == [8]
    v, s, kept = launchers.forward(u, W, None, 3, "rba", False)
    for grad, first in (("full", 8), ("final", static.num_warps)):
        backward = warps(lambda: launchers.backward(v, u, W, s, kept, "rba", grad, False))  # noqa: B023
        assert backward[0] == first
    told = explain(u, W, backend="triton")
    assert told.plans == f"forward tuned, backward not tuned, by {file}"
    assert "num_warps=8" in told.forward[0] and "num_warps=8" not in told.backward[0]
    assert f"  plans:    {told.plans}\n" in str(told)
    elsewhere = explain(u.to("meta"), W.to("meta"), backend="triton", device=device)
    assert elsewhere == told
    assert explain(u, W, backend="chunked").plans == ""


@pytest.mark.parametrize(
    "other",
    [
        lambda u, W: (u[:2], W),
        lambda u, W: (u.double(), W.double()),
        lambda u, W: (u.bfloat16(), W),
    ],
    ids=["fewer samples", "float64", "bfloat16"],
)
def test_other_problems_keep_the_static_plan(other, device, place):
    u, W = tensors(device)
    keep(place, {problem(u, W): plans.planned(u, W)._replace(num_warps=8)})
    u, W = other(u, W)
    assert plans.chosen(u, W, "forward", 3, "rba") == plans.planned(u, W)
    assert explain(u, W, backend="triton").plans.startswith("forward not tuned, backward not tuned")


def test_iterations_method_and_precision_are_of_a_problem(device, place):
    u, W = tensors(device)
    keep(place, {problem(u, W): plans.planned(u, W)._replace(num_warps=8)})
    assert plans.chosen(u, W, "forward", 3, "rba").num_warps == 8
    for modes in ((2, "rba"), (3, "sda")):
        assert plans.chosen(u, W, "forward", *modes).num_warps != 8
    torch.set_float32_matmul_precision("high")
    try:
        assert plans.chosen(u, W, "forward", 3, "rba").num_warps != 8
    finally:
        torch.set_float32_matmul_precision("highest")


def test_stacks_have_plans_of_their_own(device, place):
    x, _ = tensors(device, (B, J, D, J, D))
    weights = [tensors(device, (B, J, D, J, D))[1] for _ in range(2)]
    plan = plans.planned(x, weights[0])
    forward, backward = plan._replace(num_warps=2), plan._replace(num_warps=4)
    key = problem(x, weights[0], operation="momentum")
    keep(
        place,
        {
            key: forward,
            key._replace(direction="backward", routing_grad="final"): backward,
            key._replace(operation="routing"): plan._replace(num_warps=16),
        },
    )
    two = schedule(2, 0.9, 9, 0)
    assert warps(lambda: momentum.forward(x, x, weights, [], two, 3, "rba")) == [2]
    anchors = torch.stack([x, x]).unsqueeze(0)
    run = momentum.backward
    assert warps(lambda: run(x, anchors, weights, [], two, 3, "rba", "final"))[0] == 4
    assert warps(lambda: run(x, anchors, weights, [], two, 3, "rba", "full"))[0] == plan.num_warps


def test_a_streamed_plan_of_the_table_computes_the_same(device, place, monkeypatch):
    monkeypatch.setattr(plans, "ON_CHIP_VOTES", 0)
    u, W = (x.requires_grad_() for x in tensors(device))
    static = plans.planned(u, W)
    assert not static.on_chip

    def results():
        v = routing(u, W, backend="triton")
        return [v, *torch.autograd.grad(v.square().sum(), (u, W))]

    before = results()
    plan = static._replace(per_slice=3, block_b=2, num_warps=4)
    keys = [problem(u, W), problem(u, W, "backward", "final")]
    keep(place, dict.fromkeys(keys, plan))
    told = explain(u, W, backend="triton")
    assert told.plans.startswith("forward tuned, backward tuned")
    assert any("streamed_sum_kernel [2 x 2]" in launch for launch in told.forward)
    for new, old in zip(results(), before, strict=True):
        torch.testing.assert_close(new, old, rtol=1e-5, atol=1e-5)


def test_the_table_is_read_once_and_is_readable(device, place, monkeypatch):
    u, W = tensors(device)
    plan = plans.planned(u, W)._replace(num_warps=8)
    file = keep(place, {problem(u, W): plan, problem(u, W, "backward", "full"): None})
    content = json.loads(file.read_text())
    assert content["where"] == place and content["margin"] == 0.03
    first, second = content["plans"]
    assert first["plan"] == plan._asdict() and second["plan"] is None
    assert (first["B"], first["u"], first["method"]) == (B, "float32", "rba")
    assert (first["microseconds"], first["static_microseconds"]) == (7.5, 9.0)
    assert len(file.read_text().splitlines()) < 20  # a problem a line
    reads, read = [], tuning.read
    monkeypatch.setattr(tuning, "read", lambda device: reads.append(device) or read(device))
    for _ in range(3):
        assert plans.chosen(u, W, "forward", 3, "rba").num_warps == 8
    assert explain(u, W, routing_grad="full", backend="triton").plans.startswith(
        "forward tuned, backward tuned, the static one"
    )
    assert len(reads) == 1


def test_the_environment_says_which_table(device, place, monkeypatch, tmp_path):
    u, W = tensors(device)
    file = keep(place, {problem(u, W): plans.planned(u, W)._replace(num_warps=8)})
    monkeypatch.setenv("MOCAPSNET_TUNED", "0")
    assert explain(u, W, backend="triton").plans == "static, MOCAPSNET_TUNED=0"
    assert plans.chosen(u, W, "forward", 3, "rba") == plans.planned(u, W)
    other = tmp_path / "mine.json"
    other.write_text(file.read_text().replace('"num_warps": 8', '"num_warps": 16'))
    monkeypatch.setenv("MOCAPSNET_TUNED", str(other))
    tuning.forget()
    assert plans.chosen(u, W, "forward", 3, "rba").num_warps == 16
    monkeypatch.setenv("MOCAPSNET_TUNED", str(tmp_path / "none"))
    tuning.forget()
    with pytest.warns(RuntimeWarning, match="none cannot be read"):
        assert plans.chosen(u, W, "forward", 3, "rba") == plans.planned(u, W)


@pytest.mark.parametrize(
    "damage, said",
    [
        (lambda text: "", "is damaged"),
        (lambda text: text[: len(text) // 2], "is damaged"),
        (lambda text: "[1]", "is damaged"),
        (lambda text: "[" * 100_000, "is damaged"),
        (lambda text: text.replace('"plans"', '"plan"'), "is damaged"),
        (lambda text: text.replace('"num_warps": 8', '"num_warps": 12'), "num_warps of a plan"),
        (lambda text: text.replace('"num_warps": 8', '"num_warps": 64'), "is none for"),
        (lambda text: text.replace('"num_warps": 8', '"num_warps": "8"'), "num_warps of a plan"),
        (lambda text: text.replace('"block_b": 1', '"block_b": 0'), "block_b of a plan"),
        (lambda text: text.replace('"on_chip": true', '"on_chip": false'), "is none for"),
        (lambda text: text.replace('"num_warps"', '"warps"'), "warps"),
        (lambda text: text.replace('"float32"', '"nn"'), "cannot be"),
        (lambda text: text.replace('"method": "rba"', '"method": "em"'), "cannot be"),
        (lambda text: text.replace('"B": 3', '"B": "3"'), "B is '3'"),
        (lambda text: text.replace(torch.__version__, "0.1"), "is of another torch"),
    ],
)
def test_a_damaged_or_foreign_table_is_told_once_and_not_used(damage, said, device, place):
    u, W = tensors(device)
    file = keep(place, {problem(u, W): plans.planned(u, W)._replace(num_warps=8)})
    whole = file.read_text()
    assert damage(whole) != whole
    file.write_text(damage(whole))
    with pytest.warns(RuntimeWarning, match="mocapsnet benchmark tune") as warned:
        assert plans.chosen(u, W, "forward", 3, "rba") == plans.planned(u, W)
    assert said in str(warned[0].message) and str(file) in str(warned[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert plans.chosen(u, W, "forward", 3, "rba") == plans.planned(u, W)
    assert explain(u, W, backend="triton").plans.startswith("static, ")


def test_nothing_is_read_where_there_is_no_gpu(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(tuning, "read", lambda device: 1 / 0)
    for device in ("cpu", "meta"):
        assert tuning.table(torch.device(device)).plans == {}


@pytest.mark.usefixtures("poison")
def test_couplings_for_tensor_cores_from_a_plan_without(device, place):
    """Of samples that fill no whole tile: what forward leaves of it is zero."""
    B, N, K, J, D = 17, 33, 5, 32, 16  # noqa: N806
    u, W = (x.requires_grad_() for x in tensors(device, (B, N, K, J, D)))
    static = plans.planned(u, W)
    assert static.dots

    def gradients():
        v = routing(u, W, backend="triton")
        return torch.autograd.grad(v.square().sum(), (u, W))

    before = gradients()
    plan = plans.vector_plan(B, N, J, D, 4, torch.device("meta"))
    keep(place, {problem(u, W): plan})
    assert explain(u, W, backend="triton").plans.startswith("forward tuned, backward not tuned")
    for new, old in zip(gradients(), before, strict=True):
        torch.testing.assert_close(new, old, rtol=1e-4, atol=1e-4)
