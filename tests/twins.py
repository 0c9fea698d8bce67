"""What the tests of the step in backward share: models, the loop, and twins that must come to the same bits."""

from contextlib import nullcontext

import torch
from torch import nn
from torch.nn import Parameter
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import lucid.optim as optim
from bits import assert_same, draw, peek, results

STEPS = 20


class Net(nn.Module):
    """Tied weights, a layer applied twice, one used now and then, a parameter used never, a frozen one."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(64, 64)
        self.block = nn.Linear(64, 64)
        self.norm = nn.LayerNorm(64)
        self.rare = nn.Linear(64, 64)
        self.unused = Parameter(torch.ones(5))
        self.frozen = Parameter(torch.ones(64), requires_grad=False)
        self.to(dtype)

    def forward(self, codes, rare=False, segment=lambda part, x: part(x)):
        x = self.embed(codes)
        for _ in range(2):
            x = x + segment(lambda x: torch.tanh(self.block(self.norm(x))), x)
        if rare:
            x = x + segment(self.rare, x)
        return F.linear(self.norm(x) * self.frozen, self.embed.weight)

    def loss(self, step, micro=0, rare=None, **more):
        codes = torch.randint(64, (2, 6), generator=torch.Generator().manual_seed(100 * step + micro))
        scores = self(codes[:, :-1], step % 2 == 1 if rare is None else rare, **more)
        return F.cross_entropy(scores.float().flatten(0, 1), codes[:, 1:].flatten())


class Raise(torch.autograd.Function):
    """Passes a tensor on, and raises in backward if it is told to."""

    @staticmethod
    def forward(ctx, x, really):
        ctx.really = really
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        if ctx.really:
            raise ArithmeticError("half-way")
        return gradient, None


class Chain(nn.Module):
    """Three layers; backward may raise between the second and the first."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = nn.Linear(6, 9), nn.Linear(9, 9), nn.Linear(9, 1)

    def forward(self, x, fails=False, short=False, segment=lambda part, x: part(x)):
        x = Raise.apply(torch.tanh(self.first(x)), fails)
        return self.third(x if short else segment(lambda x: torch.tanh(self.second(x)), x))

    def loss(self, step, micro=0, rare=None, **more):
        return self(draw(100 * step + micro, (4, 6)), **more).square().mean()


def reentrant(part, x):
    return checkpoint(part, x, use_reentrant=True)


def adamw(net, *, named=False, **options):
    """Matrices and the others in groups of their own."""
    params = [(name, param) if named else param for name, param in net.named_parameters()]
    matrices = [param.ndim > 1 for param in net.parameters()]
    groups = [
        {"params": [p for p, matrix in zip(params, matrices, strict=True) if matrix], "lr": 0.02},
        {"params": [p for p, matrix in zip(params, matrices, strict=True) if not matrix], "betas": (0.7, 0.98)},
    ]
    return optim.AdamW(groups, **{"lr": 0.01, "weight_decay": 0.1} | options)


def stepping(net=None, **options):
    """A net, a new one if none is given, and its optimizer, which steps in backward."""
    net = net or Net()
    optimizer = adamw(net, **options)
    optimizer.step_in_backward()
    return net, optimizer


def train(net, optimizer, start=0, stop=STEPS, *, micro=1, accumulates=False, zero=True, step=True, **more):
    """The loop that is everybody's. ``accumulates``: every backward; ``zero``: as `zero_grad` takes it, None for none.

    ``after``: called after each step.
    """
    after = more.pop("after", lambda: None)
    for number in range(start, stop):
        if zero is not None:
            optimizer.zero_grad(zero)
        for part in range(micro):
            with optimizer.accumulate() if accumulates or part < micro - 1 else nullcontext():
                (net.loss(number, part, **more) / micro).backward()
        if step:
            optimizer.step()
        after()


def twins(act=train, make_net=Net, make_optimizer=adamw, **options):
    """Let `act` train with ordinary steps and with steps in backward; return both runs when their bits are the same."""
    runs = []
    for in_backward in (False, True):
        net = make_net()
        optimizer = make_optimizer(net, **options)
        optimizer.step_in_backward(in_backward)
        act(net, optimizer)
        assert hooked(optimizer) == in_backward
        runs.append((net, optimizer, results(optimizer)))
    assert_same(runs[0][2], runs[1][2])
    return runs


def and_no_gradient_is_left(net, optimizer, step):
    """One more step, without `step()` where it is not needed."""
    optimizer.zero_grad()
    net.loss(step).backward()
    if hooked(optimizer):
        assert grads(net) == []
    else:
        optimizer.step()


def hooked(optimizer):
    return optimizer._stepper.backward is not None


def hooks(net):
    return sum(len(param._post_accumulate_grad_hooks or ()) for param in net.parameters())


def grads(net):
    """The names of the parameters that have one."""
    return [name for name, param in net.named_parameters() if param.grad is not None]


def steps_of(optimizer, *params):
    """How many times each was updated, a number for one; the state is not looked at for good."""
    entries = [peek(optimizer).get(param) for param in params]
    steps = [int(entry["step"]) if entry else 0 for entry in entries]
    return steps if len(steps) > 1 else steps[0]


def poison(param, value):
    """Make one entry of the next gradient of `param` this value."""

    def hook(gradient):
        handle.remove()
        gradient = gradient.clone()
        gradient.view(-1)[-1] = value
        return gradient

    handle = param.register_hook(hook)
