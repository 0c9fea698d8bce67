"""A small sharded model whose training is saved and resumed: what each step does depends on its number alone."""

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

import lucid.optim as optim
from bits import draw
from sharded import KINDS


class Net(torch.nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Linear(130, 67)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(67, 67) for _ in range(2))
        self.last = torch.nn.Linear(67, 3)
        self.to(dtype)


def sharded(dtype=torch.float32):
    net, mesh = Net(dtype), init_device_mesh("cpu", (distributed.get_world_size(),))
    for layer in net.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def make(net, options, kind=optim.AdamW):
    """Two groups, the second with a learning rate of its own."""
    groups = [{"params": list(net.layers.parameters())}]
    groups += [{"params": [*net.first.parameters(), *net.last.parameters()], "lr": 3e-3, "weight_decay": 0.0}]
    return kind(groups, lr=1e-2, **options)


def train(net, optimizer, steps):
    """With gradients that only the step and the parameter's place decide."""
    for step in steps:
        for number, param in enumerate(net.parameters()):
            gradient = draw(100 * step + number, param.shape).to(param.dtype)
            if hasattr(param, "device_mesh"):
                gradient = distribute_tensor(gradient, param.device_mesh, param.placements, src_data_rank=None)
            param.grad = gradient
        optimizer.step()
    optimizer.zero_grad()


def uninterrupted(name, steps):
    dtype, options = KINDS[name]
    net = Net(dtype)
    optimizer = make(net, options)
    train(net, optimizer, range(steps))
    return optimizer
