"""Tuning: which plans are tried, dropped and chosen, by a clock that is told what they take."""

import json

import pytest
import torch

from mocapsnet.benchmarks import tune as command
from mocapsnet.benchmarks.shared import calls, plans, tuner
from mocapsnet.benchmarks.shared.calls import Call
from mocapsnet.benchmarks.shared.plans import STATIC, candidates, static
from mocapsnet.kernels import explain, tuning, verification
from mocapsnet.kernels.launch import recording
from mocapsnet.kernels.routing import plans as routing_plans
from mocapsnet.kernels.routing import triton as launchers
from mocapsnet.train.option_values import resolve
from mocapsnet.train.options import ModelOptions, TrainOptions

CPU = torch.device("cpu")

FLOATS = (torch.float32, torch.float32)
TINY = Call("routing", (2, 3, 2, 2, 2), 2, "rba", "final", *FLOATS, False)
STACK = Call("momentum", (2, 2, 2, 2, 2), 2, "rba", "final", *FLOATS, False, (2, 0.9, 20, 0))
LAYER_1 = Call("routing", (128, 1152, 8, 32, 8), 3, "rba", "final", *FLOATS, False)


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("MOCAPSNET_TUNED", raising=False)
    tuning.forget()
    yield
    tuning.forget()


class FakeClock:
    """Candidates take what `seconds` says of them, more and more as the machine gets hot.

    It knows a candidate by its run, which tells its name, or by the warps that it launches with.
    """

    def __init__(self, seconds):
        self.seconds, self.now, self.order = seconds, 0, []

    def __call__(self, runs):
        return [self.one(run) for run in runs]

    def one(self, run):
        self.now += 1
        with recording() as launches:
            name = run()
        if launches:
            name = launches[0].options["num_warps"]
        self.order.append(name)
        taken = self.seconds(name, self.now) if callable(self.seconds) else self.seconds[name]
        return taken * (1 + 1e-3 * self.now)


def named(*names):
    return {name: lambda name=name: name for name in names}


def test_the_fastest_is_chosen_if_it_saves_the_margin():
    for seconds, best in ((0.96, "fast"), (0.98, STATIC), (1.5, STATIC)):
        clock = FakeClock({STATIC: 1.0, "fast": seconds, "slow": 2.0})
        name, own, of_static, timed = tuner.choose(named(STATIC, "fast", "slow"), 8, clock)
        assert name == best
        assert {len(values) for values in timed.values()} == {8}
        assert own / of_static == pytest.approx(seconds if best == "fast" else 1, rel=0.02)
    rounds = [tuple(clock.order[n : n + 3]) for n in range(0, 27, 3)]
    assert all(set(one) == {STATIC, "fast", "slow"} for one in rounds) and len(set(rounds)) > 1


def test_the_luckiest_of_many_meets_the_static_plan_again():
    """One that is fast while all are tried and not after it."""

    def seconds(name, now):
        return 0.5 if name == "lucky" and now <= 3 * 9 else 1.0

    clock = FakeClock(seconds)
    assert tuner.choose(named(STATIC, "lucky", "other"), 8, clock)[0] == STATIC
    assert clock.order[27:].count("lucky") == clock.order[27:].count(STATIC) == 9
    assert "other" not in clock.order[27:]


def test_candidates_of_the_paper_s_layers():
    found = candidates(LAYER_1, CPU)
    assert next(iter(found)) == STATIC and found[STATIC] == routing_plans.plan(
        *LAYER_1.sizes, 4, CPU
    )
    assert found[STATIC].dots and not found["vector units"].dots
    per_slice = found[STATIC].per_slice
    assert found["half the programs"].per_slice == 2 * per_slice
    assert found["twice the programs"].per_slice == per_slice // 2
    assert found["twice the samples"].block_b == 32 and "half the samples" not in found
    hundred = LAYER_1._replace(sizes=(128, 32, 8, 100, 16))
    assert not static(hundred, CPU).on_chip and candidates(hundred, CPU)["tensor cores"].dots
    double = hundred._replace(u=torch.float64, W=torch.float64)
    assert not any(plan.dots for plan in candidates(double, CPU).values())
    block = LAYER_1._replace(sizes=(128, 32, 8, 32, 8))
    assert {plan.num_warps for plan in candidates(block, CPU).values()} == {4, 8, 16, 32}
    for call in (LAYER_1, hundred, block, TINY):
        some = candidates(call, CPU)
        assert 2 <= len(some) <= 8 and len(set(some.values())) == len(some)
        assert {plan.on_chip for plan in some.values()} == {static(call, CPU).on_chip}
        for plan in some.values():  # a table takes it
            fields = plan._asdict()
            assert tuning._plan(call.problem("forward", "highest"), fields) == plan


@pytest.mark.parametrize("call", [TINY, STACK], ids=["routing", "momentum"])
def test_wrong_candidates_are_dropped_and_the_fastest_right_one_is_taken(call, monkeypatch, device):
    """The plan of 2 warps is fastest and does not compile, that of 4 is second and wrong."""
    tried = {STATIC: static(call, CPU)}
    some = (2, 4, 8) if call is TINY else (2, 8)  # fewer, as each takes longer
    tried |= {f"{n} warps": static(call, CPU)._replace(num_warps=n) for n in some}
    module = launchers if call is TINY else plans.momentum
    forward = module.forward

    def broken(*args):
        p = args[-1]
        if p is not None and p.num_warps == 2:
            raise RuntimeError("out of resource:\nregisters")
        made = forward(*args)
        if p is not None and p.num_warps == 4:
            made = (made[0] * 1.01, *made[1:])
        return made

    monkeypatch.setattr(module, "forward", lambda *a, **k: broken(*a, *k.values()))
    clock = FakeClock({1: 1.0, 2: 0.1, 4: 0.2, 8: 0.9})
    done = tuner.tune(call, tried, "highest", device, 3, clock)
    assert done.dropped["2 warps"] == "RuntimeError: out of resource: registers"
    assert len(done.dropped) == len(some) - 1
    if 4 in some:
        assert done.dropped["4 warps"].startswith("the output is off by")
    assert {2, 4}.isdisjoint(clock.order)
    for direction in tuning.DIRECTIONS:
        choice = done.choices[direction]
        assert (choice.name, choice.plan) == ("8 warps", tried["8 warps"])
        assert choice.seconds / choice.static_seconds == pytest.approx(0.9, rel=0.01)
    entries = done.entries("highest")
    assert [key.direction for key in entries] == ["forward", "backward"]
    assert {key.routing_grad for key in entries} == {"", "final"}
    times = {(r["direction"], r["candidate"]): r["chosen"] for r in done.rows}
    assert times == {
        (direction, name): name == "8 warps"
        for direction in tuning.DIRECTIONS
        for name in (STATIC, "8 warps")
    }


def test_a_plan_that_is_wrong_at_its_true_size_alone_is_dropped(monkeypatch, device):
    call = TINY._replace(sizes=(5, 3, 2, 2, 2))  # the small problem has three samples
    fast = static(call, CPU)._replace(num_warps=8)
    some = {STATIC: static(call, CPU), "fast": fast}
    backward = launchers.backward

    def broken(g, u, *args):
        du, *others = backward(g, u, *args)
        return (du * 1.001 if len(u) == 5 and args[-1] == fast else du), *others

    def passed(*args, p=None):
        return broken(*args, p) if p is not None else broken(*args)

    monkeypatch.setattr(launchers, "backward", passed)
    done = tuner.tune(call, some, "highest", device, 1, FakeClock({1: 1.0, 8: 0.5}))
    assert done.dropped["fast"].startswith("at its true size result 1 is off by")
    assert all(choice.plan is None for choice in done.choices.values())


def test_what_is_chosen_for_the_two_directions_is_tried_together(monkeypatch, device):
    other = {STATIC: static(TINY, CPU), "fast": static(TINY, CPU)._replace(num_warps=8)}
    asked = []

    def judged(self, p, q):
        asked.append((p, q))
        return "wrong together" if p != q and broken else ""

    monkeypatch.setattr(plans.Judge, "verdict", judged)

    class ForwardOnly(FakeClock):
        def one(self, run):
            backward = run.func.__code__.co_firstlineno != forward_line
            taken = super().one(run)
            return 1.0 if backward else taken

    forward_line = plans.launchers(TINY, device).forward.__code__.co_firstlineno
    for broken in (False, True):
        asked.clear()
        done = tuner.tune(TINY, other, "highest", device, 1, ForwardOnly({1: 1.0, 8: 0.5}))
        assert asked[-1] == (other["fast"], other[STATIC])
        assert done.choices["forward"].name == (STATIC if broken else "fast")
        assert done.choices["backward"].name == STATIC
        assert ("fast forward with static backward" in done.dropped) == broken


def test_after_its_time_no_further_plan_is_tried(device, monkeypatch):
    monkeypatch.setattr(plans.Judge, "verdict", lambda self, p, q: "")
    clock = FakeClock(lambda name, now: 1.0)
    done = tuner.tune(TINY, candidates(TINY, CPU), "highest", device, 1, clock, end=0.0)
    assert set(done.dropped.values()) == {"not tried: no time was left"}
    assert set(done.dropped) == set(candidates(TINY, CPU)) - {STATIC}
    assert {choice.name for choice in done.choices.values()} == {STATIC}


def test_a_lost_gpu_ends_it(monkeypatch, device):
    monkeypatch.setattr(plans.Judge, "verdict", lambda self, p, q: 1 / 0)
    monkeypatch.setattr(tuner, "usable", lambda device: False)
    with pytest.raises(RuntimeError, match=r"lost the GPU at routing \(2, .* ZeroDivisionError"):
        tuner.tune(TINY, candidates(TINY, CPU), "highest", device, 1, FakeClock({}))


def test_events_stand_around_each_call_and_the_cache_is_swept_before(monkeypatch):
    done = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            done.append("event")

        def synchronize(self):
            done.append("wait")

        def elapsed_time(self, end):
            return 2.5

    class Swept:
        def zero_(self):
            done.append("sweep")

    about = type("Properties", (), {"L2_cache_size": 1000})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: about)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock = tuner.ByEvents(torch.device("cpu"))
    assert clock.swept.nbytes == 2000
    clock.swept = Swept()
    assert clock([lambda: done.append("a"), lambda: done.append("b")]) == [2.5e-3, 2.5e-3]
    once = ["sweep", "event", "{}", "event"]
    want = [word.format(name) for name in "ab" for word in once]
    assert done == [*want, "wait"]


def options(**model):
    return resolve(TrainOptions(model=ModelOptions(**model)))


def test_the_calls_of_a_network_are_found_without_computing():
    made = options(blocks=2, method="sda", routing_grad="full", bias=0.1)
    images = calls.images_of(made)
    found = calls.calls(made, images, torch.float32)
    modes = (3, "sda", "full", *FLOATS, True)
    assert found == [
        Call("routing", (32, 128, 8, 32, 8), *modes),
        Call("momentum", (32, 32, 8, 32, 8), *modes, (4, 0.9, found[1].stack[2], 0)),
        Call("routing", (32, 32, 8, 10, 16), *modes),
    ]
    assert found[1].schedule().anchors[-1] == 3
    half = calls.calls(made, images, torch.bfloat16)
    assert {(call.u, call.W) for call in half} == {(torch.float32, torch.bfloat16)}
    assert torch.get_default_dtype() == torch.float32
    layers = calls.calls(options(name="rescapsnet", blocks=3), images, torch.float32)
    assert [call.operation for call in layers] == ["routing"] * 3  # each layer once
    assert calls.calls(options(name="cnn"), images, torch.float32) == []
    wide = found[1]._replace(sizes=(2, 64, 16, 64, 16))
    assert plans.by_layers(wide).operation == "routing" and plans.by_layers(found[1]) == found[1]


@pytest.fixture
def on_a_gpu(monkeypatch):
    """The CPU passes for a GPU whose kernels are relied on, with a clock that likes many warps."""
    monkeypatch.setattr(tuning, "tunable", lambda device: device.type != "meta")
    monkeypatch.setattr(command, "check_device", lambda args: None)
    clock = FakeClock(lambda warps, now: 1.0 / warps)
    monkeypatch.setattr(command, "clock_of", lambda device: clock)
    monkeypatch.setattr(plans.Judge, "verdict", lambda self, p, q: "")


def test_the_command_writes_a_table_that_launchers_take(on_a_gpu, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(command, "network", lambda args, others: [TINY])
    command.main(["--device", "cpu", "--rounds", "1", "--output", str(tmp_path / "results")])
    out = capsys.readouterr().out
    file = tuning.file_of(verification.where(torch.device("cpu")))
    assert f"The table: {file}" in out and "| 0.25 | four times the warps | on_chip=True" in out
    u, W = torch.empty(2, 3, 2), torch.empty(3, 2, 2, 2)
    told = explain(u, W, iterations=2, backend="triton")
    assert told.plans == f"forward tuned, backward tuned, by {file}"
    assert "num_warps=4" in told.forward[0]
    rows = (tmp_path / "results" / "tune.csv").read_text().splitlines()
    assert len(rows) == 1 + 2 * len(candidates(TINY, CPU))
    settings = json.loads((tmp_path / "results" / "tune.json").read_text())["settings"]
    assert "table" not in settings and settings["rounds"] == 1

    other = TINY._replace(iterations=1)
    monkeypatch.setattr(command, "network", lambda args, others: [other])
    command.main(["--device", "cpu", "--rounds", "1", "--plans", "2"])
    kept = tuning.load(file, verification.where(torch.device("cpu"))).plans
    assert {problem.iterations for problem in kept} == {1, 2}  # another network's stay
    warps = {p.iterations: found.plan.num_warps for p, found in kept.items()}
    assert warps == {2: 4, 1: 2}  # of two plans, the static one and that of 2 warps


def test_what_is_tuned_before_the_gpu_is_lost_is_kept(on_a_gpu, monkeypatch, capsys):
    monkeypatch.setattr(command, "network", lambda args, others: [TINY, STACK])
    tune = tuner.tune

    def until(call, *args):
        if call is STACK:
            raise RuntimeError("this process has lost the GPU")
        return tune(call, *args)

    monkeypatch.setattr(tuner, "tune", until)
    with pytest.raises(SystemExit, match="lost the GPU"):
        command.main(["--device", "cpu", "--rounds", "1"])
    kept = tuning.read(torch.device("cpu")).plans
    assert {problem.operation for problem in kept} == {"routing"}


def test_a_static_plan_that_is_wrong_is_told(on_a_gpu, monkeypatch, capsys):
    monkeypatch.setattr(command, "network", lambda args, others: [TINY])
    monkeypatch.setattr(plans.Judge, "verdict", lambda self, p, q: "it is wrong")
    with pytest.raises(SystemExit, match=r"not tuned: routing \(2, 3"):
        command.main(["--device", "cpu"])
    assert "static: it is wrong" in capsys.readouterr().out
    assert tuning.read(torch.device("cpu")).plans == {}


def parsed(*words):
    return command.network(*command.parse(["--device", "cpu", *words]))


def test_the_network_is_that_of_the_options_or_of_a_run(tmp_path, capsys):
    first, stack, last = parsed("--dataset", "mnist", "--blocks", "3", "--batch-size", "64")
    assert first.sizes == (64, 1152, 8, 32, 8) and stack.stack[0] == 6 and last.sizes[3] == 10
    assert parsed("--dataset", "cifar100", "--dtype", "bfloat16")[2].sizes[3] == 100
    with pytest.raises(SystemExit, match="--run has its options; got --blocks 3"):
        parsed("--run", str(tmp_path), "--blocks", "3")
    with pytest.raises(SystemExit, match="tune: .* has no config.json"):
        parsed("--run", str(tmp_path))
    recipe = parsed("--recipe", "published", "--dataset", "mnist", "--blocks", "3")
    assert {call.stack[0] for call in recipe if call.stack} == {2}  # a block at a time
    with pytest.raises(SystemExit, match="tune: .* has no config.json"):
        parsed("--resume", str(tmp_path))
    with pytest.raises(SystemExit, match="tune: blocks must be at least 0; got -1"):
        parsed("--blocks", "-1")
    with pytest.raises(SystemExit) as left:
        parsed("--no-such-option", "3")
    assert left.value.code == 2 and "no-such-option" in capsys.readouterr().err


def test_errors_say_what_to_do(monkeypatch):
    with pytest.raises(SystemExit, match="--dry-run --table FILE tries it on the CPU"):
        command.main(["--device", "cpu"])
    with pytest.raises(SystemExit, match="--dry-run needs --table FILE"):
        command.main(["--dry-run"])
    bad = verification.Verdict("routing", {}, ["a"], {"a": "wrong"}, 1.0)
    monkeypatch.setattr(command.verification, "verify", lambda *args: [bad])
    args, _ = command.parse(["--device", "cpu"])
    args.device = torch.device("cuda")
    with pytest.raises(SystemExit, match="kernels of routing do not agree .* `mocapsnet doctor`"):
        command.check_device(args)


def test_without_routing_there_is_nothing_to_tune(on_a_gpu):
    with pytest.raises(SystemExit, match="no calls of routing"):
        command.main(["--device", "cpu", "--model", "cnn"])
