"""Run by test_parallel.py as two processes: `python parallel.py RANK FOLDER`.

Gradients of stacks under DistributedDataParallel and FSDP2, against those of a stored stack. The
first process prints a JSON line per case: [layers, way, largest relative error or message].
"""

import copy
import json
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from mocapsnet import CapsuleLayer, MomentumStack


class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x):
        return 1 * self.linear(x).tanh()


def wrapped(stack, way, mesh):
    """The module to call."""
    if way == "DDP":
        return DistributedDataParallel(stack)
    if way.startswith("every layer"):
        for layer in stack.layers:
            fully_shard(layer, mesh=mesh)
    if way == "stack within a model":
        model = nn.Sequential(nn.Identity(), stack)
        fully_shard(stack, mesh=mesh, reshard_after_forward=True)
        return fully_shard(model, mesh=mesh)
    if way in ("stack", "every layer and the stack"):
        fully_shard(stack, mesh=mesh)
    return stack


def error(stack, way, mesh, x, g, want):
    call = wrapped(stack, way, mesh)
    for _ in range(2):
        stack.zero_grad()
        call(x).backward(g)
    if any(p.grad is None for p in stack.parameters()):
        return "no gradient"
    got = [p.grad if way == "DDP" else p.grad.full_tensor() for p in stack.parameters()]
    return max(float((a - b).norm() / b.norm()) for a, b in zip(got, want, strict=True))


def main(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    x, g = torch.randn(2, 2, 2, 4, 3, dtype=torch.float64)
    for kind in ("capsule layers", "branches"):
        made = [
            CapsuleLayer(4, 3, 4, 3, sum_length=2.0) if kind == "capsule layers" else Branch()
            for _ in range(3)
        ]
        stored = MomentumStack(made, memory="stored").double()
        for n in range(2):
            stored(x[n]).backward(g[n] / 2)  # the mean over processes
        want = [p.grad for p in stored.parameters()]
        for way in (
            "DDP",
            "stack",
            "stack within a model",
            "every layer",
            "every layer and the stack",
            "every layer, stored",
        ):
            stack = copy.deepcopy(stored)
            stack.memory = "stored" if "stored" in way else "reversible"
            try:
                result = error(stack, way, mesh, x[rank], g[rank], want)
            except ValueError as e:
                result = str(e)
            if rank == 0:
                print(json.dumps([kind, way, result]), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
