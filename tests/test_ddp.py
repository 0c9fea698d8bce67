"""Guards that replicas (DDP) stay the same to the bit, whatever format their state is kept in."""

import hashlib

import pytest
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

import lucid.optim as optim
from bits import draw, peek
from sharded import KINDS


def digest(optimizer):
    """Of all bits of parameters and state."""
    found = hashlib.sha256()
    for group in optimizer.param_groups:
        for param in group["params"]:
            for tensor in [param.detach(), *peek(optimizer)[param].values()]:
                found.update(bytes(tensor.contiguous().view(-1).view(torch.uint8).numpy()))
    return found.hexdigest()


def train_replicas(name, steps):
    dtype, options = KINDS[name]
    torch.manual_seed(distributed.get_rank())  # DDP gives all the weights of rank 0
    net = torch.nn.Sequential(torch.nn.Linear(70, 64), torch.nn.Tanh(), torch.nn.Linear(64, 5)).to(dtype)
    replica = DistributedDataParallel(net)
    optimizer = optim.AdamW(net.parameters(), lr=1e-3, max_grad_norm=1.0, nonfinite="skip", **options)
    start = net[0].weight.detach().clone()
    for step in range(steps):
        optimizer.zero_grad()
        x = draw(10 * step + distributed.get_rank(), (4, 70)).to(dtype)
        replica(x).square().mean().backward()
        if step == steps // 2 and distributed.get_rank() == 0:
            optimizer.state_dict()  # a look at the state by one of them
        optimizer.step()
    assert float(peek(optimizer)[net[0].weight]["step"]) == steps
    assert not torch.equal(start, net[0].weight)
    return digest(optimizer)


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_replicas_are_the_same_after_a_thousand_steps(ranks, name):
    one, two = ranks.run(2, train_replicas, name, 1000)
    assert one == two


def test_three_replicas_are_the_same(ranks):
    assert len(set(ranks.run(3, train_replicas, "8bit", 50))) == 1
