"""Guards the step in backward under FSDP2: the bits of ordinary steps, on one to four processes, in every way to train.

Nearly every case trains twins that are sharded alike, one with ordinary steps and one in backward, and compares each
process's shards of parameters and state to the bit.
"""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import lucid.optim as optim
from bits import SEALED, assert_same, on, results
from sharded import KINDS


class Net(nn.Module):
    """Layers sharded one by one, one of them applied twice, one used now and then; tied weights, a frozen bias."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(50, 64)
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(3))
        self.rare = nn.Linear(64, 64)
        self.norm = nn.LayerNorm(64)
        self.head = nn.Linear(64, 50, bias=False)
        self.head.weight = self.embedding.weight
        self.layers[0].bias.requires_grad_(False)
        self.outside = nn.Parameter(torch.ones(64))
        self.to(dtype)

    def forward(self, tokens, rare=False, segment=lambda part, x: part(x)):
        x = self.embedding(tokens)
        for layer in (*self.layers, self.layers[1]):
            x = x + segment(lambda x, layer=layer: torch.tanh(layer(x)), x)
        if rare:
            x = x + segment(self.rare, x)
        return self.head(self.norm(x) * self.outside)

    def loss(self, step, micro=0, **more):
        seed = 1000 * step + 10 * micro + distributed.get_rank()
        tokens = torch.randint(50, (2, 7), generator=torch.Generator().manual_seed(seed))
        scores = self(tokens[:, :-1], step % 2 == 1, **more)
        return F.cross_entropy(scores.float().flatten(0, 1), tokens[:, 1:].flatten())


def sharded(net, mesh=None, **options):
    mesh = mesh or init_device_mesh("cpu", (distributed.get_world_size(),))
    for part in (*net.layers, net.rare):
        fully_shard(part, mesh=mesh, **options)
    return fully_shard(net, mesh=mesh, ignored_params={net.outside}, **options)


def adamw(net, **options):
    matrices = [(name, param) for name, param in net.named_parameters() if param.ndim > 1]
    others = [(name, param) for name, param in net.named_parameters() if param.ndim < 2]
    groups = [{"params": matrices, "lr": 0.02}, {"params": others, "betas": (0.7, 0.98)}]
    return optim.AdamW(groups, **{"lr": 0.01, "weight_decay": 0.1} | options)


def hooked(optimizer):
    return optimizer._stepper.backward is not None


def train(net, optimizer, start=0, stop=4, *, micro=1, syncs=True, accumulates=True, **more):
    """The loop that is everybody's. ``syncs``: also in all micro-batches but the last."""
    for step in range(start, stop):
        for part in range(micro):
            last = part == micro - 1
            net.set_requires_gradient_sync(syncs or last)
            with nullcontext() if last or not accumulates else optimizer.accumulate():
                (net.loss(step, part, **more) / micro).backward()
        grads = [name for name, param in net.named_parameters() if param.grad is not None]
        if hooked(optimizer):
            assert grads == ["outside"], grads
        else:
            assert len(grads) > 6
        distributed.all_reduce(net.outside.grad)
        optimizer.step()
        assert not hooked(optimizer) or net.outside.grad is None
        optimizer.zero_grad()


def shards(optimizer):
    """As `results`, of this process."""
    return [
        {key: value.to_local().clone() if isinstance(value, DTensor) else value for key, value in entry.items()}
        for entry in results(optimizer)
    ]


class Once(Net):
    """Each layer is applied once."""

    def forward(self, tokens, rare=False, segment=lambda part, x: part(x)):
        x = self.embedding(tokens)
        for layer in self.layers:
            x = x + segment(lambda x, layer=layer: torch.tanh(layer(x)), x)
        if rare:
            x = x + segment(self.rare, x)
        return self.head(self.norm(x) * self.outside)


def twins(act=train, dtype=torch.float32, mesh=None, options=None, make_net=Net, **settings):
    runs = []
    for in_backward in (False, True):
        net = sharded(make_net(dtype), mesh, **options or {})
        optimizer = adamw(net, **settings)
        if in_backward:
            optimizer.step_in_backward(model=net)
        act(net, optimizer)
        runs.append(shards(optimizer))
    assert_same(*runs, f"{dtype} {options} {settings}")
    return runs


# The same bits


def in_every_format():
    for number, (dtype, options) in enumerate(KINDS.values()):
        act = partial(train, stop=SEALED + 2) if number < 2 else train
        twins(act, dtype, options={"reshard_after_forward": (True, False, None)[number % 3]}, **options)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_every_format(ranks, world):
    ranks.run(world, in_every_format)


def reentrant(part, x):
    return checkpoint(part, x, use_reentrant=True)


def checkpointed(part, x):
    return checkpoint(part, x, use_reentrant=False)


def in_every_way():
    twins(partial(train, micro=3), state_format="8bit")
    twins(partial(train, micro=3, syncs=False), state_format="8bit")
    twins(partial(train, micro=3, syncs=False, accumulates=False), state_format="8bit")
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    twins(partial(train, micro=2), options={"mp_policy": policy}, state_format="8bit")
    twins(options={"offload_policy": CPUOffloadPolicy(pin_memory=False)}, state_format="8bit")
    twins(partial(train, segment=checkpointed), state_format="8bit")
    twins(nonfinite="skip", state_format="8bit")


def test_every_way(ranks):
    ranks.run(2, in_every_way)

def r():
    twins(partial(train, segment=reentrant), make_net=Once, state_format="8bit")
def test_r(ranks):
    ranks.run(2, r)

def hybrid():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    twins(mesh=mesh, state_format="8bit")
    twins(partial(train, micro=2), mesh=mesh, nonfinite="error")


def test_hybrid(ranks):
    ranks.run(4, hybrid)
