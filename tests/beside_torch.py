"""A small model, trained alike by our AdamW and by torch's, and what compares the two: parameters, losses, steps."""

import torch
from torch import nn

import lucid.optim as optim

FORMATS = ["fp32", "bf16", "8bit"]
OURS_AND_TORCHS = [optim.AdamW, torch.optim.AdamW]


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1))


def batch(step=0):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(32, 4, generator=generator)
    return x, torch.sin(x.sum(1, keepdim=True))


def backward(model, step=0):
    x, y = batch(step)
    loss = nn.functional.mse_loss(model(x), y)
    loss.backward()
    return loss


def train(model, optimizer, start, stop, after=lambda: None):
    losses = []
    for step in range(start, stop):
        optimizer.zero_grad()
        losses.append(backward(model, step).item())
        optimizer.step()
        after()
    return losses


def weights(model):
    return [param.detach().clone() for param in model.parameters()]


def same(left, right):
    return len(left) == len(right) and all(map(torch.equal, left, right))


def assert_close(one, two):
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def with_groups(make, model, **options):
    groups = [{"params": module.parameters()} for module in (model[0], model[2])]
    groups[1]["betas"] = (0.7, 0.99)
    return make(groups, **{"lr": 0.02, **options})


def as_with_torch(run):
    """Compare what `run(make)` gives with both classes, a model and its losses; return our model."""
    (ours, losses), (theirs, their_losses) = map(run, OURS_AND_TORCHS)
    torch.testing.assert_close(losses, their_losses, rtol=1e-4, atol=1e-5)
    assert_close(ours, theirs)
    assert sum(losses[-3:]) < sum(losses[:3])
    return ours


def steps_of(optimizer, *params):
    return [int(optimizer.state[param]["step"]) if param in optimizer.state else 0 for param in params]
