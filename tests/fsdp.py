"""What the tests of the step in backward under FSDP2 share: a model, the loop, and twins that must be the same."""

from contextlib import nullcontext

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

import lucid.optim as optim
from bits import assert_same, results


class Net(nn.Module):
    """Layers that are sharded one by one, one of them used now and then; tied weights, a frozen bias, a parameter that
    FSDP2 does not shard. ``twice``: whether one layer is applied twice.
    """

    def __init__(self, dtype=torch.float32, *, twice=True):
        super().__init__()
        torch.manual_seed(0)
        self.twice = twice
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
        for layer in (*self.layers, *([self.layers[1]] if self.twice else [])):
            x = x + segment(lambda x, layer=layer: torch.tanh(layer(x)), x)
        if rare:
            x = x + segment(self.rare, x)
        return self.head(self.norm(x) * self.outside.to(x.dtype))

    def loss(self, step, micro=0, rare=None, **more):
        seed = 1000 * step + 10 * micro + distributed.get_rank()
        tokens = torch.randint(50, (2, 7), generator=torch.Generator().manual_seed(seed))
        scores = self(tokens[:, :-1], step % 2 == 1 if rare is None else rare, **more)
        return F.cross_entropy(scores.float().flatten(0, 1), tokens[:, 1:].flatten().to(scores.device))


def sharded(net, mesh=None, **options):
    mesh = mesh or init_device_mesh("cpu", (distributed.get_world_size(),))
    for part in (*net.layers, net.rare):
        fully_shard(part, mesh=mesh, **options)
    return fully_shard(net, mesh=mesh, ignored_params={net.outside}, **options)


def adamw(net, **options):
    """Matrices and the others in groups of their own."""
    named = list(net.named_parameters())
    groups = [
        {"params": [pair for pair in named if pair[1].ndim > 1], "lr": 0.02},
        {"params": [pair for pair in named if pair[1].ndim < 2], "betas": (0.7, 0.98)},
    ]
    return optim.AdamW(groups, **{"lr": 0.01, "weight_decay": 0.1} | options)


def stepping(net=None, **options):
    """A net and its optimizer, which steps in backward."""
    net = net or sharded(Net())
    optimizer = adamw(net, **options)
    optimizer.step_in_backward(model=net)
    return net, optimizer


def hooked(optimizer):
    return optimizer._stepper.backward is not None


def grads(net):
    """The names of the parameters that have a gradient."""
    return [name for name, param in net.named_parameters() if param.grad is not None]


def train(net, optimizer, start=0, stop=4, *, micro=1, syncs=True, accumulates=True, after=lambda: None, **more):
    """The loop that is everybody's. ``syncs``, ``accumulates``: what is done in all micro-batches but the last."""
    for step in range(start, stop):
        for part in range(micro):
            last = part == micro - 1
            net.set_requires_gradient_sync(syncs or last)
            with nullcontext() if last or not accumulates else optimizer.accumulate():
                (net.loss(step, part, **more) / micro).backward()
        assert grads(net) == ["outside"] if hooked(optimizer) else len(grads(net)) > 6, grads(net)
        distributed.all_reduce(net.outside.grad)
        optimizer.step()
        assert not hooked(optimizer) or net.outside.grad is None
        optimizer.zero_grad()
        after()


def shards(optimizer):
    """As `results`, of this process."""
    return [
        {key: value.to_local() if isinstance(value, DTensor) else value for key, value in entry.items()}
        for entry in results(optimizer)
    ]


def twins(act=train, dtype=torch.float32, *, make_net=Net, mesh=None, sharding=None, **options):
    """Let `act` train with ordinary steps and with steps in backward; the bits of both must be the same."""
    runs = []
    for in_backward in (False, True):
        net = sharded(make_net(dtype), mesh, **sharding or {})
        optimizer = adamw(net, **options)
        if in_backward:
            optimizer.step_in_backward(model=net)
        act(net, optimizer)
        runs.append(shards(optimizer))
    assert_same(*runs, f"{dtype} {sharding} {options}")
