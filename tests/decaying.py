"""What the tests of `decay_groups` share: a model, how to train it, and the reasons that are printed."""

import torch
from torch import nn
from torch.nn import Parameter

WEIGHT, EMBEDDING = ("decay", "weight"), ("decay", "embedding")
BIAS, NORM, ONE, SCALAR = (("no decay", why) for why in ("bias", "norm", "1-dimensional", "scalar"))
KEPT_EMBEDDING, FROZEN = ("no decay", "embedding"), ("frozen", "")


def where(groups):
    """What went where and why, from the list and, checked against it, from the groups themselves."""
    held = {}
    for group in groups:
        goes = "no decay" if group.get("weight_decay") == 0.0 else "decay"
        for name, param in group["params"]:
            assert isinstance(param, Parameter)
            assert name not in held
            held[name] = goes
    told = {item.name: (item.goes, item.why) for item in groups.placed}
    assert held == {name: goes for name, (goes, _) in told.items() if goes != "frozen"}
    return told


def holding(kind=nn.Module, called=None, **params):
    """A module of a class of that name with parameters of its own of these shapes."""
    module = type(called or "Holder", (kind,), {})()
    for name, shape in params.items():
        module.register_parameter(name, Parameter(torch.ones(shape)))
    return module


class Transformer(nn.Module):
    """A small GPT with tied embeddings, a scale of its own and repeated blocks."""

    def __init__(self, depth=3, tied=True):
        super().__init__()
        self.tokens = nn.Embedding(11, 8)
        self.places = nn.Embedding(5, 8)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm": nn.LayerNorm(8),
                    "attention": nn.MultiheadAttention(8, 2, batch_first=True),
                    "mlp": nn.Sequential(nn.RMSNorm(8), nn.Linear(8, 16), nn.PReLU(), nn.Linear(16, 8)),
                }
            )
            for _ in range(depth)
        )
        self.scale = Parameter(torch.tensor(1.0))
        self.head = nn.Linear(8, 11, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, numbers):
        x = self.tokens(numbers) + self.places.weight
        for block in self.blocks:
            y = block["norm"](x)
            x = x + block["attention"](y, y, y, need_weights=False)[0]
            x = x + block["mlp"](x)
        return self.head(x) * self.scale


def numbers(step):
    return torch.randint(0, 11, (4, 5), generator=torch.Generator().manual_seed(step))


def train(model, optimizer, start, stop):
    for step in range(start, stop):
        optimizer.zero_grad()
        x = numbers(step)
        nn.functional.cross_entropy(model(x).flatten(0, 1), x.roll(1, 1).flatten()).backward()
        optimizer.step()


def seeded(make, *args, **options):
    torch.manual_seed(0)
    return make(*args, **options)
