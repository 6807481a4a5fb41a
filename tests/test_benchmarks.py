"""The benchmarks run on tiny settings, and refuse to time what is wrong."""

import csv
import json
import math

import pytest
import torch

from mocapsnet.benchmarks import (
    cli,
    convolution,
    depth,
    guard,
    machine,
    memory,
    overhead,
    reversal,
    step,
    suite,
)
from mocapsnet.benchmarks import routing as routing_benchmark
from mocapsnet.benchmarks.cli import QUESTIONS
from mocapsnet.benchmarks.shared import candidates as networks
from mocapsnet.benchmarks.shared import measure, report, routing_candidates, shares
from mocapsnet.cli import main as mocapsnet
from mocapsnet.kernels import routing
from mocapsnet.train.optimizers import FusedAdam

from .train import fake_graph


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny problems gain nothing from more, and wait for each other where cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def results(folder, name, picture=True):
    """Rows and summary, after a look at all files."""
    with (folder / f"{name}.csv").open() as file:
        rows = list(csv.DictReader(file))
    content = json.loads((folder / f"{name}.json").read_text())
    if picture:
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
    assert measure.relative_error(torch.tensor([math.nan]), torch.ones(1)) == math.inf
    assert measure.relative_error(None, torch.ones(1)) == math.inf
    assert reversal.shown(math.inf) == "diverged"
    assert report.plain({"error": [math.inf, 1.0]}) == {"error": ["inf", 1.0]}


@pytest.mark.slow
def test_convolution(tmp_path, monkeypatch):
    """The einsum code's limit of memory lets one grid of four in; a network fits, or does not."""
    monkeypatch.setattr(convolution, "NETWORKS", ["fused, reversible"])
    settings = (
        "--sides 6 --capsules 3 --dim 4 --batch 4 --limit 0.0002 --repetitions 1 --blocks 1 2"
    )
    settings += " --stack-side 5 --stack-batch 2 --side 36 --network-batch 2 --network-blocks 2"
    convolution.main([*settings.split(), "--output", str(tmp_path)])
    rows, summary = results(tmp_path, "convolution")
    layers = [row for row in rows if row["part"] == "layer"]
    assert [(row["candidate"], row["batch"]) for row in layers] == [
        *((name, 1) for name in convolution.LAYERS),
        ("fused", 4),
    ]
    slopes = {row["candidate"]: row["over_state"] for row in summary if "over_state" in row}
    assert slopes["einsum, stored"] > 2 > slopes["fused, reversible"] > 0.9
    (step,) = (row for row in rows if row["part"] == "network")
    assert step["fits"] and step["seconds"] > 0 and step["peak_bytes"] > 1e8
    args = convolution.parse([*settings.split(), "--memory", "0.0001"])
    assert not convolution.network_step(args, "einsum, stored")["fits"]
    model = convolution.network("einsum, stored", 36, 2)
    assert sum(isinstance(m, convolution.unfolded.UnfoldedLayer) for m in model.modules()) == 5
    images = torch.randn(1, 3, 36, 36)
    fused = convolution.network("fused, reversible", 36, 2)
    fused.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(images).lengths, fused(images).lengths)


def test_convolution_refuses_a_wrong_candidate(tmp_path, monkeypatch):
    wrong = {"fused": lambda u, W: 1.001 * convolution.LAYERS["einsum"](u, W)}
    monkeypatch.setattr(convolution, "LAYERS", convolution.LAYERS | wrong)
    with pytest.raises(SystemExit, match="fused, 3 capsules: errors"):
        convolution.main(["--capsules", "3", "--dim", "4", "--output", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_memory(tmp_path, monkeypatch):
    names = ["ResCapsNet, published", "ResCapsNet, einsum, checkpoint"]
    names += ["MoCapsNet, fused, reversible"]  # profiling all takes long
    monkeypatch.setattr(memory, "CANDIDATES", {n: memory.CANDIDATES[n] for n in names})
    settings = "--blocks 2 1 2 --batch 8 --channels 8 --layers 2 10 --device cpu"
    memory.main([*settings.split(), "--output", str(tmp_path)])
    rows, summary = results(tmp_path, "memory")
    assert len(rows) == 2 * len(memory.CANDIDATES)
    cost = {row["candidate"]: row for row in summary if "candidate" in row}
    (weights,) = (row for row in rows if row["candidate"] == names[2] and row["blocks"] == 1)
    few, more = (row["activation_bytes"] for row in summary if "layers" in row)
    assert few > 0 and abs(more - few) < 8 * 32 * 8 * 4  # not one x more
    assert cost["ResCapsNet, published"]["times_published"] == 1
    # a block's parameters, gradients and moments, and nothing else
    assert 1 <= cost["MoCapsNet, fused, reversible"]["slope_over_state"] < 1.1
    assert cost["MoCapsNet, fused, reversible"]["times_published"] < 1
    # forward keeps nothing of a reversible block, of others at least the votes, B N J D of 4 bytes
    assert abs(cost["MoCapsNet, fused, reversible"]["kept_per_block"]) < 1000
    assert cost["ResCapsNet, published"]["kept_per_block"] > 2 * 8 * 32 * 32 * 8 * 4

    monkeypatch.setattr(memory, "CANDIDATES", {n: memory.CANDIDATES[n] for n in names[::2]})
    memory.main([*settings.split(), "--images", "cifar10", "--output", str(tmp_path)])
    (larger,) = (
        row
        for row in results(tmp_path, "memory")[0]
        if row["candidate"] == names[2] and row["blocks"] == 1
    )
    # 64 instead of 36 input capsules, and three times 32 x 32 pixels to draw instead of 28 x 28
    assert larger["peak_bytes"] - weights["peak_bytes"] > 4 * 4 * 1024 * (3 * 32**2 - 28**2)


def test_depth(tmp_path):
    settings = "--blocks 1 2 --batch 2 --repetitions 1 --device cpu"
    depth.main([*settings.split(), "--output", str(tmp_path)])
    rows, summary = results(tmp_path, "depth")
    assert len(rows) == len(depth.CANDIDATES) * 2 * len(depth.PHASES)
    for row in rows:
        assert 0 < row["lower_quartile"] <= row["seconds"] <= row["upper_quartile"]
    assert sum("ratio" in row for row in summary) == len(depth.RATIOS)


def test_step(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "rates", lambda device: measure.Rates(1e9, 1e9, 1e9))
    settings = "--blocks 1 2 --batch 2 --channels 8 --repetitions 1 --device cpu"
    step.main([*settings.split(), "--output", str(tmp_path)])
    rows, (found,) = results(tmp_path, "step")
    assert {row["candidate"] for row in rows} >= set(step.NAMES)
    assert all(r["images_per_second"] == pytest.approx(2 / r["seconds"]) for r in rows)
    assert sum(found["shares"].values()) == pytest.approx(1)
    # 20 x 20 and 6 x 6 outputs of 9 x 9 kernels; the images take no gradient
    assert found["convolutions"]["operations"] == 2 * 2 * 81 * (2 * 400 * 8 + 3 * 36 * 8 * 8)
    assert found["pipeline"] > 0


def test_step_in_bfloat16(tmp_path, monkeypatch):
    """The candidate of devices with such instructions; others emulate them."""
    monkeypatch.setattr(measure, "has_bfloat16", lambda device: True)
    monkeypatch.setattr(measure, "rates", lambda device: measure.Rates(1e9, 1e9, 1e9))
    settings = "--blocks 1 --batch 2 --channels 8 --repetitions 1 --device cpu"
    step.main([*settings.split(), "--output", str(tmp_path)])
    rows, (found,) = results(tmp_path, "step")
    assert {row["candidate"] for row in rows} == {*step.NAMES, step.BFLOAT16}
    assert found["speedups"].keys() == step.TARGETS.keys()
    assert found["convolutions"]["bfloat16_pytorch_rate"] > 0
    assert "in bfloat16 were not timed" not in (tmp_path / "step.md").read_text()


def test_shares_see_every_part():
    model = networks.CANDIDATES[step.FUSED].build(2, channels=64)
    found = shares.shares(model, networks.batch_of(16, torch.device("cpu")), 2)
    assert sum(found.values()) == pytest.approx(1)
    for part in ("convolutions", "routing", "decoder and losses", "optimiser"):
        assert found[part] > 0.01, found
    assert -0.01 < found["rest"] < 0.4, found


@pytest.mark.parametrize(
    "key, part",
    [
        ("part: stack", "routing"),
        ("part: convolutions", "convolutions"),
        ("autograd::engine::evaluate_function: ConvolutionBackward0", "convolutions"),
        ("autograd::engine::evaluate_function: DirectBackward", "routing"),
        ("autograd::engine::evaluate_function: AddmmBackward0", "decoder and losses"),
        ("autograd::engine::evaluate_function: torch::autograd::AccumulateGrad", None),
        ("Optimizer.step#Adam.step", "optimiser"),
        ("aten::convolution", None),  # lies within a part
    ],
)
def test_parts_of_a_step(key, part):
    assert shares.part_of(key) == part


SMALL_ROUTING = "--repetitions 1 --shrink 64 --device cpu --sweeps B --shapes".split()


def test_routing(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "rates", lambda device, size: measure.Rates(1e10, 1e11, None))
    options = [*SMALL_ROUTING, "layer1-mnist", "block", "--compiled", "none"]
    routing_benchmark.main([*options, "--output", str(tmp_path)])
    rows, summary = results(tmp_path, "routing")
    assert (tmp_path / "routing_roofline.png").exists()
    assert len(summary) == (2 + 3) * 3 + 1  # B = 1, 2, 8
    assert {row["candidate"] for row in rows} == {"published", "einsum", "chunked", "triton"}
    for row in rows:
        operations, bytes_ = routing_benchmark.work(tuple(row[x] for x in "BNKJD"), row["phase"])
        assert row["flop_per_second"] == pytest.approx(operations / row["seconds"])
        assert row["bytes_per_second"] == pytest.approx(bytes_ / row["seconds"])
    first = next(r for r in summary if (r["label"], r["phase"]) == ("layer1-mnist", "both"))
    seconds = {
        r["candidate"]: r["seconds"]
        for r in rows
        if (r["label"], r["phase"]) == ("layer1-mnist", "both")
    }
    assert first["routing"] == "triton"  # under the interpreter; a GPU's default
    assert first["times_einsum"] == pytest.approx(seconds["einsum"] / seconds["triton"])
    assert first["times_published"] == pytest.approx(seconds["published"] / seconds["triton"])
    votes = {r["candidate"]: r["peak_bytes"] for r in rows if r["label"] == "layer1-mnist"}
    assert 2 * 18 * 8 * 4 * 4 < votes["einsum"] < votes["published"]  # B N D J of 4 bytes
    # layer 1: 28 multiply-adds per component of a vote forward, 18 backward
    assert routing_benchmark.work((1, 1, 8, 1, 1), "forward")[0] == 2 * 28
    assert routing_benchmark.work((1, 1, 8, 1, 1), "both")[0] == 2 * (28 + 18)


@pytest.mark.slow
def test_routing_compiled(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "rates", lambda device, size: measure.Rates(1e10, 1e11, None))
    options = ["--repetitions", "1", "--shrink", "32", "--device", "cpu", "--sweeps"]
    options += ["--shapes", "block", "--compiled", "paper"]
    modes = {"compiled": "default", "compiled, broken": "no such mode"}
    monkeypatch.setattr(routing_candidates, "MODES", modes)
    routing_benchmark.main([*options, "--output", str(tmp_path)])
    rows, _ = results(tmp_path, "routing", picture=False)
    timed = {row["candidate"] for row in rows if "error" not in row}
    assert {"published, compiled", "einsum, compiled"} <= timed
    broken = {row["candidate"]: row["error"] for row in rows if "error" in row}
    assert set(broken) == {"published, compiled, broken", "einsum, compiled, broken"}
    assert "no such mode" in broken["einsum, compiled, broken"]
    assert "Not timed" in (tmp_path / "routing.md").read_text()


def test_routing_with_what_a_gpu_adds(tmp_path, monkeypatch):
    """Replays of a graph, candidates that run out of memory, an interrupted run."""
    monkeypatch.setattr(measure, "rates", lambda device, size: measure.Rates(1e10, 1e11, None))
    made = []

    def candidates(shape, device, compiled):
        if made:
            raise KeyboardInterrupt  # the second shape
        inputs = routing_candidates.problem(shape, device)

        def replay():
            return routing_candidates.forward_backward(routing, *inputs)

        def too_large(u, W):
            raise torch.OutOfMemoryError("CUDA out of memory")

        made.append(shape)
        plain = {"published": networks.PUBLISHED, "einsum": too_large, "chunked": routing}
        these = {name: routing_candidates.Candidate(route) for name, route in plain.items()}
        these["chunked, CUDA graph"] = routing_candidates.Candidate(routing, replay, own_pool=True)
        return these, {"triton": "no reason"}

    monkeypatch.setattr(routing_benchmark, "candidates", candidates)
    options = [*SMALL_ROUTING[:-1], "--shapes", "block", "layer2-10-classes"]
    with pytest.raises(KeyboardInterrupt):
        routing_benchmark.main([*options, "--output", str(tmp_path)])
    rows, (first, *_) = results(tmp_path, "routing", picture=False)
    timed = [(row["candidate"], row["phase"]) for row in rows if "phase" in row]
    assert timed == [
        *(("published", phase) for phase in routing_benchmark.PHASES),
        *(("chunked", phase) for phase in routing_benchmark.PHASES),
        ("chunked, CUDA graph", "both"),
    ]
    assert rows[6]["peak_bytes"] is None and rows[5]["peak_bytes"] > 0
    failed = {row["candidate"]: row["error"] for row in rows if "error" in row}
    assert failed == {"triton": "no reason", "einsum": "out of memory"}
    assert "times_published" in first and "times_einsum" not in first
    text = (tmp_path / "routing.md").read_text()
    assert "block, einsum: out of memory" in text and "Interrupted" in text
    assert (tmp_path / "routing_roofline.png").exists()


def test_graphs_of_routing_and_of_a_training_step(monkeypatch):
    """Played on the CPU, see train/fake_graph.py."""
    graphs = fake_graph.install(monkeypatch)
    shape, cpu = (2, 3, 4, 5, 6), torch.device("cpu")
    candidate = routing_candidates.graphed(routing, shape, cpu)
    with fake_graph.under(fake_graph.Passive()):
        right = routing_candidates.forward_backward(
            routing, *routing_candidates.problem(shape, cpu)
        )
    assert all(map(torch.equal, candidate.graph(), right))

    batch = networks.batch_of(2, cpu)
    models = [networks.CANDIDATES["MoCapsNet, fused, reversible"].build(1, 8) for _ in range(2)]
    adam = [FusedAdam(model.parameters(), lr=1e-3) for model in models]
    graphed = networks.graphed_step(models[0], adam[0], batch)
    eager = networks.training_step(models[1], adam[1], batch)
    assert len(graphs) == 2
    for _ in range(2):
        loss = graphed().clone()
        with fake_graph.under(fake_graph.Passive()):
            assert torch.equal(loss, eager())
    assert all(map(torch.equal, *(model.parameters() for model in models)))


def test_gate_looks_at_a_graph_s_own_results(monkeypatch):
    shape, cpu = (2, 3, 4, 5, 6), torch.device("cpu")
    right = routing_candidates.forward_backward(routing, *routing_candidates.problem(shape, cpu))
    for n in range(3):
        wrong = [1.001 * x if n == i else x for i, x in enumerate(right)]
        these = {"graph": routing_candidates.Candidate(routing, lambda wrong=wrong: wrong)}
        with pytest.raises(SystemExit, match="graph, .*: relative error 1.0e-03"):
            routing_benchmark.check(shape, these, cpu)


WRONG = [
    lambda u, W, iterations=3: 1.001 * networks.EINSUM(u, W, iterations),  # a result
    lambda u, W, iterations=3: networks.EINSUM(u.detach() + 0 * u, W, iterations),  # a gradient
    lambda u, W, iterations=3: networks.EINSUM(u, W.detach() + 0 * W, iterations),
]


@pytest.mark.parametrize("benchmark, small", [(depth, ""), (step, "--channels 8")])
@pytest.mark.parametrize("wrong", WRONG)
def test_gate_stops_a_wrong_network(tmp_path, monkeypatch, capsys, benchmark, small, wrong):
    name = "ResCapsNet, published"
    changed = networks.CANDIDATES[name]._replace(routing=wrong)
    monkeypatch.setitem(networks.CANDIDATES, name, changed)
    settings = f"{small} --blocks 1 --batch 2 --repetitions 1 --device cpu"
    with pytest.raises(SystemExit, match=f"{name}, 1 blocks: .* nothing was measured"):
        benchmark.main([*settings.split(), "--output", str(tmp_path)])
    assert not list(tmp_path.iterdir()) and not capsys.readouterr().out


@pytest.mark.parametrize("wrong", WRONG)
def test_gate_stops_wrong_routing(tmp_path, monkeypatch, capsys, wrong):
    monkeypatch.setitem(routing_candidates.EAGER, "einsum", wrong)
    with pytest.raises(SystemExit, match="einsum, .*: relative error .* nothing was measured"):
        routing_benchmark.main(
            [*SMALL_ROUTING, "block", "--compiled", "none", "--output", str(tmp_path)]
        )
    assert not list(tmp_path.iterdir()) and not capsys.readouterr().out


def test_overhead(tmp_path):
    overhead.main(["--repetitions", "2", "--calls", "2", "--output", str(tmp_path)])
    rows, _ = results(tmp_path, "overhead")
    assert [row["candidate"] for row in rows] == list(overhead.candidates())


def test_machine(tmp_path, monkeypatch):
    measured = measure.rates(torch.device("cpu"), size=64, elements=1000)
    assert measured.copy > 0 and measured.matrix > 0
    monkeypatch.setattr(measure, "rates", lambda device: measured)
    machine.main(["--device", "cpu", "--output", str(tmp_path)])
    (row,), _ = results(tmp_path, "machine", picture=False)
    assert row["matrix"] == measured.matrix and row["torch"] == torch.__version__


def test_guard_passes_and_fails(monkeypatch, capsys):
    monkeypatch.setattr(guard, "routing_ratios", lambda args: [guard.Ratio("a", 0.1, 0.2)])
    monkeypatch.setattr(guard, "stack_ratios", lambda args: [guard.Ratio("b", 1.0, 1.0)])
    monkeypatch.setattr(guard, "convolution_ratios", lambda args: [])
    guard.main(["--device", "cpu"])
    assert "| a | 0.100 | 0.2 | yes |" in capsys.readouterr().out
    monkeypatch.setattr(guard, "stack_ratios", lambda args: [guard.Ratio("b", 1.01, 1.0)])
    with pytest.raises(SystemExit, match="slower or larger"):
        guard.main(["--device", "cpu"])
    assert "| b | 1.010 | 1.0 | **no** |" in capsys.readouterr().out


def test_guard_measures(monkeypatch):
    monkeypatch.setattr(guard, "LAYER_1", (4, 1152, 8, 32, 8))
    args = report.parser("", "guard").parse_args(["--device", "cpu"])
    args.repetitions = 2
    found = [*guard.routing_ratios(args), *guard.stack_ratios(args)]
    found += guard.convolution_ratios(args)
    assert len(found) == 6 and all(0 < ratio.value < 10 for ratio in found)


def test_guard_compares_within_a_round():
    seconds = {"ours": [1.0, 2.0, 30.0], "theirs": [2.0, 8.0, 60.0]}
    assert guard.over(seconds, "ours", "theirs") == 0.5
    assert guard.over(seconds, "theirs", "ours") == 2


def test_bad_devices_are_refused(capsys):
    for device, message in [("gpu", "'gpu' is no device"), ("cuda", "no CUDA device")]:
        if device == "cuda" and torch.cuda.is_available():
            continue
        with pytest.raises(SystemExit):
            memory.main(["--device", device])
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("text", ["0", "-2", "many", "1.5", ""])
def test_counts_are_at_least_one(text, capsys):
    for option in ("--repetitions", "--blocks", "--batch"):
        with pytest.raises(SystemExit):
            depth.main([f"{option}={text}"])
        assert f"{option}: {text!r} is no integer of at least 1" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_told_first(tmp_path, capsys):
    taken = tmp_path / "taken"
    taken.touch()
    for output in (taken, taken / "deeper"):
        with pytest.raises(SystemExit):
            depth.main(["--output", str(output)])
        assert f"{taken} is no folder that can be written" in capsys.readouterr().err


def test_benchmarks_of_kernels_need_triton(monkeypatch, tmp_path):
    monkeypatch.setattr(cli, "triton_installed", lambda: False)
    for name in cli.OF_KERNELS:
        with pytest.raises(SystemExit, match=f"{name}: .* pip install triton"):
            cli.main([name])
    run = []
    monkeypatch.setattr(suite, "triton_installed", lambda: False)
    monkeypatch.setattr(suite, "run_all", lambda parts, *_: run.extend(parts) or [])
    suite.main(["--output", str(tmp_path)])
    assert len(run) == len(suite.NAMES) - 2


def test_every_benchmark_explains_itself(capsys):
    with pytest.raises(SystemExit):
        mocapsnet(["benchmark", "--help"])
    listing = capsys.readouterr().out
    for name in QUESTIONS:
        with pytest.raises(SystemExit) as left:
            mocapsnet(["benchmark", name, "--help"])
        text = capsys.readouterr().out
        assert left.value.code == 0 and f"usage: mocapsnet benchmark {name}" in text
        assert name in listing and "%(" not in text
    with pytest.raises(SystemExit) as left:
        mocapsnet(["benchmark", "speed"])
    assert left.value.code == 2 and "invalid choice: 'speed'" in capsys.readouterr().err


def test_peak_counts_temporaries_and_workspaces():
    def run():
        x = torch.empty(1000)  # 4000 bytes, freed before the next
        del x
        return torch.empty(2000)

    assert measure.peak_bytes(run, torch.device("cpu")) == pytest.approx(8000, abs=128)
    u, W = torch.rand(8, 64, 8), torch.rand(64, 8, 32, 8)
    peaks = [measure.peak_bytes(lambda: routing(u, W), torch.device("cpu")) for _ in range(2)]
    assert peaks[0] == peaks[1] > W.nbytes / 8


def test_interleaved_takes_turns():
    order = []
    runs = {name: lambda name=name: order.append(name) for name in "abc"}
    seconds = measure.interleaved(runs, 3, torch.device("cpu"))
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3, "c": 3}
    rounds = ["".join(order[n : n + 3]) for n in range(0, 12, 3)]
    assert all(set(one) == set("abc") for one in rounds) and len(set(rounds)) > 1


def test_slope_and_quartiles():
    assert measure.slope([1, 2, 4], [3, 5, 9]) == pytest.approx(2)
    assert math.isnan(measure.slope([1], [3]))
    assert measure.quartiles([5.0, 1.0, 3.0, 2.0, 4.0]) == (2, 3, 4)


def test_routing_that_is_interrupted_while_it_compiles_tells_the_rest(tmp_path, monkeypatch):
    """The first shape of all, so that no table would be there otherwise."""

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(routing_candidates, "warmed", interrupted)
    options = [*SMALL_ROUTING, "block", "layer2-10-classes", "--compiled", "first"]
    with pytest.raises(KeyboardInterrupt):
        routing_benchmark.main([*options, "--output", str(tmp_path)])
    rows = json.loads((tmp_path / "routing.json").read_text())["rows"]
    assert {row["label"] for row in rows} == {"block"}
    assert {row["candidate"] for row in rows if "seconds" in row} >= {"einsum", "chunked"}
    stopped = [row for row in rows if row.get("error") == routing_candidates.STOPPED]
    assert len(stopped) == 4
    assert "Interrupted: the shapes that were left" in (tmp_path / "routing.md").read_text()
