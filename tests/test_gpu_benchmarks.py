"""Launches beside their predictions, and trainings by graphs and plans, by told times."""

import json
import os
import signal
import threading
import time

import pytest
import torch

from mocapsnet.benchmarks import graph, launches, static
from mocapsnet.benchmarks.shared import report, tuner
from mocapsnet.kernels import tuning
from mocapsnet.kernels.launch import recording
from mocapsnet.kernels.squash import triton as squash

from .train import fake_graph


@pytest.fixture
def tiny(monkeypatch, device):
    """The case squash is two launches, on a few numbers, which take 4 and 6 us."""
    s = torch.ones(2, 3, device=device)

    def cases(dtype, device="meta", shrink=1):
        def broken():
            raise RuntimeError("out of resource")

        return {"squash": lambda: (squash.forward(s), squash.backward(s, s)), "primary": broken}

    monkeypatch.setattr(static, "cases", cases)
    taken = iter([[9.0, 4e-6, 4e-6], [9.0, 6e-6, 6e-6]])  # the first warms up
    for clock in ("by_processor", "ByEvents"):
        monkeypatch.setattr(tuner, clock, lambda runs: next(taken))


def told(kernel, **found):
    return {"case": "squash", "kernel": kernel, "grid": [1]} | found


def test_launches_stand_beside_their_predictions(tiny, tmp_path, monkeypatch):
    found = [
        told("forward_kernel", predicted=2e-6, bound="launch", spills=0),
        told("backward_kernel", error="KeyError: no such instruction"),
    ]
    monkeypatch.setattr(launches, "predicting", lambda *_: None)
    monkeypatch.setattr(launches, "predictions", lambda _: (found, "predictions ended early"))
    words = ["--device", "cpu", "--cases", "primary", "squash", "--repetitions", "2"]
    launches.main([*words, "--output", str(tmp_path)])
    first, second = json.loads((tmp_path / "launches.json").read_text())["rows"]
    assert (first["seconds"], first["ratio"], first["bound"]) == (4e-6, 2.0, "launch")
    assert second["seconds"] == 6e-6 and "ratio" not in second
    text = (tmp_path / "launches.md").read_text()
    assert "| squash | forward_kernel [1] | 4.00 | 2.00 | 2.00 | launch |" in text
    assert "| squash | backward_kernel [1] | 6.00 |  |  |  |" in text
    assert "| **squash** | **all 2** | 10.00 |  |  |  |" in text
    for note in (
        "primary: RuntimeError: out of resource",
        "- predictions ended early",
        "squash, backward_kernel: KeyError: no such instruction",
        "Median ratio of 1 launches: 2.00",
    ):
        assert note in text


def test_a_prediction_of_another_launch_is_not_compared():
    rows = [{"case": "squash", "kernel": "forward_kernel", "grid": [2], "seconds": 1e-6}]
    launches.beside(rows, [told("forward_kernel", predicted=2e-6)])
    assert "ratio" not in rows[0] and "prediction is of forward_kernel [1]" in rows[0]["error"]


def predicting(monkeypatch, rows, code):
    """Predictions that are these rows, and then a program."""
    lines = "".join(f"print({json.dumps(row)!r}, flush=True)\n" for row in rows)
    program = f"import time\n{lines}{code}"
    monkeypatch.setattr(launches, "PREDICT", program.replace("{", "{{").replace("}", "}}"))


WORDS = ["--device", "cpu", "--cases", "squash", "--repetitions", "2"]


def test_launches_that_are_interrupted_tell_what_was_timed(tiny, tmp_path, monkeypatch):
    predicting(monkeypatch, [], "time.sleep(60)")
    measured = launches.timed

    def timed(*args):
        yield from measured(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(launches, "timed", timed)
    with pytest.raises(SystemExit):
        launches.main([*WORDS, "--output", str(tmp_path)])
    text = (tmp_path / "launches.md").read_text()
    assert "| squash | forward_kernel [1] | 4.00 |" in text and "interrupted" in text


def test_launches_that_are_interrupted_tell_what_was_predicted(tiny, tmp_path, monkeypatch):
    ready = tmp_path / "ready"
    code = f"open({str(ready)!r}, 'w').close(); time.sleep(60)"
    predicting(monkeypatch, [told("forward_kernel", predicted=2e-6)], code)
    wait = launches.predictions

    def interrupt():
        while not ready.exists():
            time.sleep(0.05)
        time.sleep(0.2)  # what it has printed is read meanwhile
        os.kill(os.getpid(), signal.SIGINT)

    def interrupted(process):
        threading.Thread(target=interrupt, daemon=True).start()
        return wait(process)

    monkeypatch.setattr(launches, "predictions", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(SystemExit):
            launches.main([*WORDS, "--output", str(tmp_path)])
    finally:
        signal.signal(signal.SIGINT, before)
    text = (tmp_path / "launches.md").read_text()
    assert "| squash | forward_kernel [1] | 4.00 | 2.00 | 2.00 |" in text and "interrupted" in text


def test_predictions_that_fail_or_take_too_long_are_told(monkeypatch):
    args = launches.parse(["--device", "cpu", "--cases", "squash"])
    monkeypatch.setattr(launches, "WAIT", 8)
    row = {"case": "a"}
    for code, said in (
        ("time.sleep(60)", "predictions are missing: 8 s were not enough"),
        ("raise SystemExit('no compiler')", "predictions ended early: no compiler"),
        ("", ""),
    ):
        predicting(monkeypatch, [row], code)
        assert launches.predictions(launches.predicting("90", args)) == ([row], said)


def test_cases_on_a_device_are_those_that_are_compiled(device):
    """With sides divided; the tensors of other cases are not larger than they were."""
    for shrink, on, name in ((1, "meta", "layer 1"), (32, device, "block layer")):
        with recording() as found:
            static.cases(torch.float32, on, shrink)[f"{name}, rba final"]()
        u = found[0].args[0]
        assert u.device.type == torch.device(on).type
        assert u.shape == ((128, 1152, 8) if shrink == 1 else (4, 1, 8))


NAMES = ["eager, static plans", "eager, tuned plans"]
NAMES += ["one graph, static plans", "one graph, tuned plans"]


def test_graph_and_plans_take_turns_and_failures_are_told(monkeypatch, tmp_path):
    taken = dict(zip(NAMES, (8.0, 6.0, 4.0, None), strict=True))
    order = []

    class Fake:
        graph = True

        def __init__(self, name):
            self.name, self.trainer = name, self
            self.graph, self.graphed = name.startswith("one"), False

        def stretch(self, epoch):
            order.append((self.name, epoch))
            if taken[self.name] is None:
                raise RuntimeError("CUDA error")
            return taken[self.name] * (10 if epoch == 0 else 1)

    found = {name: Fake(name) for name in NAMES}
    monkeypatch.setattr(graph, "candidates", lambda args: (found, ["a note"]))
    words = ["--device", "cpu", "--repetitions", "3", "--batch", "16"]
    graph.main([*words, "--output", str(tmp_path)])
    rows = json.loads((tmp_path / "graph.json").read_text())["rows"]
    assert [row["candidate"] for row in rows] == NAMES[:3]
    assert [row["seconds"] for row in rows] == [8, 6, 4]  # the first stretch does not count
    assert [row["times_as_fast"] for row in rows] == pytest.approx([1, 8 / 6, 2])
    assert rows[2]["images_per_second"] == 4
    assert order.count((NAMES[3], 0)) == 1  # what failed is not tried again
    assert len({name for name, _ in order[:4]}) == 4
    text = (tmp_path / "graph.md").read_text()
    assert "- a note" in text and "one graph, tuned plans: RuntimeError: CUDA error" in text
    assert "one graph, static plans: the step could not be captured, so this is eager" in text


def test_candidates_of_a_cpu_are_eager_and_train_by_the_plans_they_are_given(monkeypatch):
    args = graph.parse("--device cpu --batch 2 --channels 8 --steps 2 --repetitions 1".split())
    found, notes = graph.candidates(args)
    assert list(found) == NAMES[:1]
    assert any("no tuned plans" in note for note in notes)
    assert any("--graph on: a CUDA graph needs a CUDA device" in note for note in notes)
    (candidate,) = found.values()
    seen = []

    def epoch(number, last_good):
        seen.append((number, tuning._tables[None]))
        candidate.trainer.steps = torch.zeros(2, 4)
        return {"train_seconds": 3.0}

    monkeypatch.setattr(candidate.trainer, "epoch", epoch)
    assert candidate.stretch(5) == 1.5
    assert seen == [(5, tuning.STATIC)] and None not in tuning._tables


def test_a_training_by_a_graph_takes_part(monkeypatch):
    """Where there can be one; that it trains as the eager one does is tested in tests/train."""
    fake_graph.install(monkeypatch)
    args = graph.parse("--device cpu --batch 2 --channels 8 --steps 2 --repetitions 1".split())
    found, notes = graph.candidates(args)
    assert list(found) == NAMES[::2] and len(notes) == 1  # no table
    assert [one.trainer.graphed for one in found.values()] == [False, True]
    assert [one.graph for one in found.values()] == [False, True]


def test_candidates_are_captured_or_all_timed_eagerly(monkeypatch):
    fake_graph.install(monkeypatch)
    x, cpu = torch.zeros(3), torch.device("cpu")
    runs, why = tuner.captured({"a": lambda: x.add_(1), "b": lambda: x.add_(10)}, cpu)
    assert why == "" and x[0] == 11  # each ran once before its capture, which computes nothing
    runs["b"]()
    assert x[0] == 21
    own = {"a": lambda: x.add_(1), "b": lambda: x.sum().item()}
    runs, why = tuner.captured(own, cpu)
    assert runs is own and why == "Refused: item within a graph"


def test_a_table_stands_for_the_gpu_s_own_for_a_while(monkeypatch):
    monkeypatch.setattr(tuning, "tunable", lambda device: True)
    cpu, own = torch.device("cpu"), tuning.Table({}, None, "own")
    monkeypatch.setattr(tuning, "read", lambda device: own)
    tuning.forget()
    for known in (False, True):
        with tuning.using(cpu, tuning.STATIC):
            assert tuning.table(cpu) is tuning.STATIC
        assert (None in tuning._tables) == known
        assert tuning.table(cpu) is own
    tuning.forget()


def test_the_current_gpu_is_meant_where_none_is_named(monkeypatch):
    """Tensors on a GPU always have its index, by which its table is found."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert report.device_of("cuda") == torch.device("cuda", 1)
    assert report.device_of("cuda:3") == torch.device("cuda", 3)
    assert chosen == [torch.device("cuda", 1), torch.device("cuda", 3)]
    tuning.forget()
    with tuning.using(torch.device("cuda"), tuning.STATIC):
        assert tuning.table(torch.device("cuda", 1)) is tuning.STATIC
    assert not tuning._tables
