"""The benchmarks run on tiny settings, and refuse to time what is wrong."""

import csv
import json
import math

import pytest
import torch

from benchmarks import depth, memory, report, reversal
from mocapsnet.kernels import routing


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny problems gain nothing from more, and wait for each other where cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def results(folder, name):
    """Rows and summary, after a look at all files."""
    with (folder / f"{name}.csv").open() as file:
        rows = list(csv.DictReader(file))
    content = json.loads((folder / f"{name}.json").read_text())
    assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / f"{name}.md").read_text().count("| --- |") >= 1
    assert content["machine"]["torch"] == torch.__version__
    assert len(rows) == len(content["rows"]) > 0
    assert not {"output", "device"} & content["settings"].keys()  # paths stay out of the files
    return content["rows"], content["summary"]


def test_reversal(tmp_path):
    settings = "--depths 2 20 --gammas 0.3 0.9 --batch 2 --device cpu"
    reversal.main([*settings.split(), "--output", str(tmp_path)])
    rows, _ = results(tmp_path, "reversal")
    assert len(rows) == 2 * 2 * 3
    errors = {(r["depth"], r["gamma"], r["kind"]): r for r in rows}
    for kind in ("stored", "anchors", "no anchors"):
        for gamma in (0.3, 0.9):
            assert 0 < errors[2, gamma, kind]["weight_gradient_error"] < 1e-5
            assert 0 < errors[2, gamma, kind]["input_gradient_error"] < 1e-5
    # 0.3^-20 = 3e10 makes a rounding larger than the state; anchors every 2 layers allow 11
    anchored, without = (errors[20, 0.3, kind] for kind in ("anchors", "no anchors"))
    assert anchored["anchor_every"] == 2 and without["anchor_every"] == 20
    assert anchored["x_error"] < 1e-4
    assert float(without["x_error"]) > 1


def test_divergence_is_reported():
    assert reversal.relative(torch.tensor([math.nan]), torch.ones(1)) == math.inf
    assert reversal.shown(math.inf) == "diverged"
    assert report.plain({"error": [math.inf, 1.0]}) == {"error": ["inf", 1.0]}


def test_memory(tmp_path, monkeypatch):
    names = ["ResCapsNet, published", "ResCapsNet, einsum, checkpoint"]
    names += ["MoCapsNet, fused, reversible"]  # profiling all takes long
    monkeypatch.setattr(memory, "CANDIDATES", {n: memory.CANDIDATES[n] for n in names})
    settings = "--blocks 1 2 --batch 8 --channels 8 --device cpu"
    memory.main([*settings.split(), "--output", str(tmp_path)])
    rows, summary = results(tmp_path, "memory")
    assert len(rows) == 2 * len(memory.CANDIDATES)
    cost = {row["candidate"]: row for row in summary}
    assert cost["ResCapsNet, published"]["times_published"] == 1
    # a block's parameters, gradients and moments, and nothing else
    assert 1 <= cost["MoCapsNet, fused, reversible"]["slope_over_state"] < 1.1
    assert cost["MoCapsNet, fused, reversible"]["times_published"] < 1


@pytest.mark.parametrize("part", ["stack", "model"])
def test_depth(tmp_path, part):
    settings = f"--part {part} --blocks 1 2 --batch 2 --channels 8 --repetitions 1 --device cpu"
    depth.main([*settings.split(), "--output", str(tmp_path)])
    rows, summary = results(tmp_path, f"depth_{part}")
    assert len(rows) == len(depth.CANDIDATES) * 2 * len(depth.PHASES)
    for row in rows:
        assert 0 < row["lower_quartile"] <= row["seconds"] <= row["upper_quartile"]
    assert sum("ratio" in row for row in summary) == len(depth.RATIOS)


@pytest.mark.parametrize("part", ["stack", "model"])
@pytest.mark.parametrize(
    "wrong",
    [
        lambda u, W, iterations: 1.001 * memory.EINSUM(u, W, iterations),  # a result
        lambda u, W, iterations: memory.EINSUM(u.detach(), W, iterations),  # a gradient alone
    ],
)
def test_gate_stops_a_wrong_candidate(tmp_path, monkeypatch, capsys, part, wrong):
    name = "ResCapsNet, einsum"
    monkeypatch.setitem(depth.CANDIDATES, name, depth.CANDIDATES[name]._replace(routing=wrong))
    settings = f"--part {part} --blocks 1 --batch 2 --channels 8 --repetitions 1 --device cpu"
    with pytest.raises(SystemExit, match=f"{name}, 1 blocks: .* nothing was timed"):
        depth.main([*settings.split(), "--output", str(tmp_path)])
    assert not list(tmp_path.iterdir()) and not capsys.readouterr().out


def test_peak_counts_temporaries_and_workspaces():
    def run():
        x = torch.empty(1000)  # 4000 bytes, freed before the next
        del x
        return torch.empty(2000)

    assert report.peak_bytes(run, torch.device("cpu")) == pytest.approx(8000, abs=128)
    u, W = torch.rand(8, 64, 8), torch.rand(64, 8, 32, 8)
    peaks = [report.peak_bytes(lambda: routing(u, W), torch.device("cpu")) for _ in range(2)]
    assert peaks[0] == peaks[1] > W.nbytes / 8


def test_interleaved_takes_turns():
    order = []
    runs = {name: lambda name=name: order.append(name) for name in "abc"}
    seconds = report.interleaved(runs, 3, torch.device("cpu"))
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3, "c": 3}
    assert all(set(order[n : n + 3]) == set("abc") for n in range(0, 12, 3))


def test_slope_and_quartiles():
    assert report.slope([1, 2, 4], [3, 5, 9]) == pytest.approx(2)
    assert math.isnan(report.slope([1], [3]))
    assert report.quartiles([5.0, 1.0, 3.0, 2.0, 4.0]) == (2, 3, 4)
