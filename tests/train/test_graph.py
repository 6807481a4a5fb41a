"""Training steps as one CUDA graph, played on the CPU, see fake_graph.py."""

from __future__ import annotations

import json
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mocapsnet import CapsNet
from mocapsnet.kernels.routing.workspace import _workspaces, workspace
from mocapsnet.train import console, graph
from mocapsnet.train.optimizers import FusedAdam
from mocapsnet.train.option_values import resolve
from mocapsnet.train.options import MachineOptions, OptimOptions, TrainOptions
from mocapsnet.train.trainer import Trainer

from . import fake_graph
from .fake_graph import CUDAGraph, Refused
from .helpers import TINY, assert_same_run, checkpoint

Train = Callable[..., Path]
Command = Callable[..., tuple[int, str, str]]

# Batches of 16, 16 and 8 images.
SHORT = ("--limit", "40", "--epochs", "2", "--track")


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[CUDAGraph]:
    return fake_graph.install(monkeypatch)


@pytest.mark.parametrize(
    "options",
    [
        # Layers that are called again, from anchors; the rate changes with each step.
        "--blocks 2 --anchor-every 2 --method sda --sda-mean batch --routing-grad full --bias 0.1 "
        "--schedule cosine --weight-decay 0.1 --class-lr-factor 3 --down-weight 0.2 --flip "
        "--crop resized --normalisation fixed --mixed-precision bf16",
        # Images mixed before the graph; labels that are shares; the published code's blocks.
        "--mix both --skip twice --velocity block --memory stored --decoder-mask prediction",
        "--model cnn --mix mixup",
    ],
    ids=["called again", "mixed", "cnn"],
)
def test_a_graphed_run_is_the_eager_one(
    options: str, train: Train, graphs: list[CUDAGraph]
) -> None:
    eager = train("eager", *SHORT, *options.split(), "--graph", "off")
    assert not graphs
    graphed = train("graphed", *SHORT, *options.split())
    assert_same_run(eager, graphed)
    (graph,) = graphs
    assert graph.replays == 3 + 2 * 2  # the short batch of each epoch goes eagerly


def test_a_convolutional_network(command: Command, graphs: list[CUDAGraph]) -> None:
    """Whose routing is the same PyTorch code on a GPU."""
    tiny = "--model conv-mocapsnet --stem 4 --capsules 2 --capsule-dim 4 --batch-size 8 --flip"
    for how in ("off", "auto"):
        options = [*tiny.split(), *"--device cpu --limit 16 --epochs 1 --track".split()]
        assert command("train", *options, "--graph", how, "--out", how)[0] == 0
    assert_same_run(Path("off"), Path("auto"))
    assert len(graphs) == 1


def test_resumed_with_and_without_a_graph(
    train: Train, command: Command, graphs: list[CUDAGraph]
) -> None:
    """A graph is captured after a checkpoint is read, and checkpoints know of no graph."""
    eager = train("eager", *SHORT, "--graph", "off")
    run = train("run", *SHORT, "--epochs", "1", "--graph", "on")
    assert command("train", "--resume", str(run), "--epochs", "2")[0] == 0
    assert_same_run(eager, run)
    assert [graph.replays for graph in graphs] == [3 + 2, 3 + 2]


def test_what_a_graph_reads_stays(
    train: Train, graphs: list[CUDAGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, what the optimiser keeps, the images, the rate, and where inputs are copied to."""
    captured: list[tuple[Any, graph.Graph, nn.Module]] = []
    original = graph.capture

    def capture(step: Any, inputs: Any, model: nn.Module, optimizer: FusedAdam) -> graph.Graph:
        captured.append((step.__self__, original(step, inputs, model, optimizer), model))
        return captured[0][1]

    monkeypatch.setattr(graph, "capture", capture)
    train("run", *SHORT, "--epochs", "1")
    ((trainer, made, model),) = captured
    images = [trainer.train_set.images, trainer.train_set.labels]
    rates = list(made.optimizer.rates)
    stay = [*graph.tensors_of(model, made.optimizer), *rates, *made.inputs, *images]
    assert {*map(fake_graph.place, stay)} >= {*graphs[0].operations.outside}
    assert {*map(fake_graph.place, [*rates, *images])} <= {*graphs[0].operations.outside}


def test_a_step_that_cannot_be_captured(
    command: Command, graphs: list[CUDAGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = Trainer.losses

    def reading(self: Trainer, *args: Any) -> tuple[Tensor, Tensor]:
        found = losses(self, *args)
        assert found[0].item() > 0
        return found

    monkeypatch.setattr(Trainer, "losses", reading)
    said = {}
    for how in ("off", "on"):
        code, _, said[how] = command("train", *TINY, *SHORT, "--graph", how, "--out", how)
        assert code == 0
    assert "graph" not in said["off"]
    (line,) = [line for line in said["on"].splitlines() if "graph" in line]
    assert line == (
        "mocapsnet: warning: a training step could not be captured as a CUDA graph, so training "
        "goes on without (Refused: item within a graph)"
    )
    assert_same_run(Path("off"), Path("on"))
    assert [made.replays for made in graphs] == [0]  # once is enough
    assert fake_graph.Stream.current is fake_graph.DEFAULT


@pytest.mark.parametrize(
    ("lost", "said"),
    [("aten._fused_adam", "replayed steps move the weights"), ("aten.sub", "losses of 3 replayed")],
)
def test_a_graph_that_does_something_else_is_not_used(
    lost: str, said: str, graphs: list[CUDAGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the capture had missed some of the kernels."""
    replay = CUDAGraph.replay

    def partly(self: CUDAGraph) -> None:
        notes = self.operations.notes
        self.operations.notes = [n for n in notes if not str(n.function).startswith(lost)]
        replay(self)

    step, inputs, model, optimizer = linear_step()
    optimizer.param_groups[0]["lr"] = 1e-4  # the losses alone would hardly tell
    before = [t.clone() for t in model.parameters()]
    monkeypatch.setattr(CUDAGraph, "replay", partly)
    with pytest.raises(RuntimeError, match=said):
        graph.capture(step, inputs, model, optimizer)
    assert all(map(torch.equal, before, model.parameters()))
    assert all(not state["step"] for state in optimizer.state.values())
    assert not any(group["capturable"] for group in optimizer.param_groups)


def test_work_aside_is_waited_for(graphs: list[CUDAGraph]) -> None:
    """Also if it fails, as what it changes is then put back."""
    default = fake_graph.DEFAULT
    with pytest.raises(KeyError), graph.aside(torch.device("cpu")) as stream:
        assert fake_graph.Stream.current is stream
        assert stream.waited_for == [default] and stream not in default.waited_for
        raise KeyError
    assert fake_graph.Stream.current is default
    assert stream in default.waited_for


def test_chunked_code_keeps_no_memory_of_a_gpu() -> None:
    """A graph would go on writing to it after a larger call has had it replaced."""
    gpu = torch.empty(1, device="meta")
    assert workspace(gpu, 3) is not workspace(gpu, 3)
    assert all(device.type == "cpu" for device, _ in _workspaces.held)


def linear_step() -> tuple[Callable[..., Tensor], list[Tensor], nn.Module, FusedAdam]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    optimizer = FusedAdam(model.parameters(), lr=1e-2)

    def step(x: Tensor, y: Tensor) -> Tensor:
        loss = (model(x) - y).square().sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach().reshape(1)

    return step, [torch.randn(6, 5), torch.randn(6, 3)], model, optimizer


def test_capturing_changes_nothing(graphs: list[CUDAGraph]) -> None:
    """Neither weights nor the optimiser's numbers, which are there before the capture or not, nor
    random numbers; and later steps follow the inputs and the rate they are given."""
    step, inputs, model, optimizer = linear_step()
    other_step, _, other, other_optimizer = linear_step()
    torch.manual_seed(7)

    def drawing(*batch: Tensor) -> Tensor:
        if not torch._C._len_torch_dispatch_stack():  # in warm-up steps alone
            torch.rand(1)
        return step(*batch)

    for k in range(2):
        random = torch.get_rng_state()
        made = graph.capture(drawing, inputs, model, optimizer)
        assert torch.equal(random, torch.get_rng_state())
        for n in range(3):
            for each in (optimizer, other_optimizer):
                each.param_groups[0]["lr"] = 0.01 / (1 + n + 3 * k)
            batch = [torch.randn_like(t) for t in inputs]
            loss = made(*batch).clone()
            with fake_graph.under(fake_graph.Passive()):
                assert torch.equal(loss, other_step(*batch))
        assert all(map(torch.equal, model.parameters(), other.parameters()))
        assert all(p.grad is None for p in model.parameters())
    assert len(graphs) == 2


@pytest.mark.parametrize(
    "forbidden",
    [
        lambda x: x.sum().item(),
        lambda x: float(x.sum()),
        lambda x: bool(x.sum() > 0),
        lambda x: x.tolist(),
        lambda x: x.numpy(),
        lambda x: x.cpu(),
        lambda x: torch.tensor([1.0]),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: torch.equal(x, x),
        lambda x: torch.rand(2),
        lambda x: nn.functional.dropout(x),
        lambda x: torch.get_rng_state(),
    ],
)
def test_the_double_refuses_what_a_graph_cannot(
    forbidden: Callable[[Tensor], Any], graphs: list[CUDAGraph]
) -> None:
    x = torch.ones(2)
    forbidden(x)
    with pytest.raises(Refused):
        graph.recorded(lambda: forbidden(x), fake_graph.Stream())
    assert fake_graph.Stream.current is fake_graph.DEFAULT


@pytest.mark.parametrize(
    ("changes", "device", "processes", "reason"),
    [
        ({}, "cpu", 1, "a CUDA graph needs a CUDA device, and this trains on cpu"),
        ({}, "cuda", 2, "2 processes exchange gradients in a step"),
        ({"gradient_accumulation": 2}, "cuda", 1, "--gradient-accumulation makes several passes"),
        ({"optimizer": "ranger21"}, "cuda", 1, "--optimizer ranger21 decides in Python"),
        ({"batch_size": 101}, "cuda", 1, "100 images fill no batch of --batch-size 101"),
    ],
)
def test_where_there_is_no_graph(
    changes: dict[str, Any], device: str, processes: int, reason: str
) -> None:
    def why(how: Any, **optim: Any) -> str | None:
        options = TrainOptions(optim=OptimOptions(**optim), machine=MachineOptions(graph=how))
        return graph.why_eager(resolve(options), where, 100)

    where: Any = types.SimpleNamespace(device=torch.device(device), num_processes=processes)
    assert (why("auto", **changes) or "").startswith(reason)
    with pytest.raises(graph.InputError, match=f"--graph on: {reason}.*; use --graph auto"):
        why("on", **changes)
    one_gpu: Any = types.SimpleNamespace(device=torch.device("cuda"), num_processes=1)
    where = one_gpu
    assert why("auto") is None and why("on") is None and why("off") == "--graph off"


def test_on_is_refused_before_anything_is_written(command: Command) -> None:
    code, _, errors = command("train", *TINY, "--graph", "on", "--out", "run")
    assert code == 2 and errors.count("\n") == 1 and "--graph on: a CUDA graph needs" in errors
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("eager", "said"),
    [(None, "a step is one CUDA graph"), ("--graph off", "no CUDA graph of a step: --graph off")],
)
def test_what_is_said_of_it(
    eager: str | None, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu: Any = types.SimpleNamespace(device=torch.device("cuda"), num_processes=1)
    counts = {"training": 2, "test": 1}
    network = CapsNet((1, 8, 8), 10, blocks=0, channels=8, kernel_size=3)
    console.describe(TrainOptions(), network, counts, gpu, Path("run"), 0, 0, eager)
    assert said in capsys.readouterr().out.splitlines()


def test_a_run_goes_on_with_the_other_adam(
    train: Train, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As from the CPU to a GPU and back."""
    run = train("run", *SHORT, "--epochs", "1")

    def state() -> dict[str, Any]:
        return json.loads((checkpoint(run) / "state.json").read_text())["optimizer"]  # type: ignore[no-any-return]

    plain = state()["param_groups"][0]
    with monkeypatch.context() as there:
        graphs = fake_graph.install(there)
        assert command("train", "--resume", str(run), "--epochs", "2")[0] == 0
        assert graphs[0].replays == 3 + 2
    assert state()["param_groups"][0] == plain | {"fused": True, "lr": 0.001 * 0.96**2}
    assert command("train", "--resume", str(run), "--epochs", "3")[0] == 0
    assert state()["param_groups"][0] == plain | {"lr": pytest.approx(0.001 * 0.96**3)}
