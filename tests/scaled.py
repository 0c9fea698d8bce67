"""What the tests of mixed precision share: models, `GradScaler`, and a run of both on every engine."""

import functools

import pytest
import torch
from torch import nn
from torch.nn import Parameter

import lucid.optim as optim
from bits import World, draw

TORCHS = {
    "torch": torch.optim.AdamW,
    "torch, fused": lambda *args, **options: torch.optim.AdamW(*args, fused=True, **options),
}
INF, NAN = float("inf"), float("nan")
PLANTED = {0: INF, 7: NAN, 8: -INF, 23: NAN, 40: INF}  # by step
ORDERS = ("plain", "unscale_", "unscale_ and clip", "own clip", "unscale_ and own clip")
CLIP = 1.5

handed_over = pytest.mark.parametrize("handed", [False, True], ids=["unscaled by GradScaler", "handed over"])

# Interpreted, a step takes the CUDA engine so long that only what it does by itself is tested on it too.
every_engine = pytest.mark.parametrize("engine_name", ["cpu", "cuda", "reference"])


def make_params(dtype=torch.float32):
    return [Parameter(draw(index, shape).to(dtype)) for index, shape in enumerate(World.SHAPES)]


def make_ours(params, handed, **options):
    optimizer = optim.AdamW(params, **{"lr": 0.02, **options})
    optimizer._step_supports_amp_scaling = handed
    return optimizer


def make_scaler(scale=2.0**12, **options):
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, **options)
    scaler.scale(torch.zeros(()))  # the scale comes into being at its first use
    return scaler


def steps_of(optimizer):
    """The step count that all parameters have."""
    (count,) = {int(entry["step"]) for entry in optimizer.state.values()} or {0}
    return count


def assert_close(left, right, rtol=1e-4, atol=1e-5):
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


class Run:
    """Steps under a scaler that grows until float16 overflows, with overflows planted besides.

    ``log``: scale, growth tracker and step count after each step. ``taken``: the unscaled gradients of each step that
    had no overflow, in order.
    """

    def __init__(self, make, order="plain"):
        self.params = make_params()
        self.optimizer = make(self.params)
        self.order = order
        self.scaler = make_scaler(growth_interval=2)
        self.log, self.taken, self.skipped = [], [], []

    def scaled_gradients(self, step):
        """As float16 backward leaves them in float32 parameters."""
        for index, param in enumerate(self.params):
            param.grad = self.scaler.scale(draw(1000 + 100 * step + index, param.shape)).half().float()
        if step in PLANTED:
            self.params[step % 4].grad.view(-1)[-1] = PLANTED[step]

    def step(self, step):
        self.scaled_gradients(step)
        scale = self.scaler.get_scale()
        if all(param.grad.isfinite().all() for param in self.params):
            self.taken.append([param.grad / scale for param in self.params])
        else:
            self.skipped.append(step)
        if self.order.startswith("unscale_"):
            self.scaler.unscale_(self.optimizer)
        if self.order == "unscale_ and clip":
            nn.utils.clip_grad_norm_(self.params, CLIP)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.log.append((self.scaler.get_scale(), self.scaler._get_growth_tracker(), steps_of(self.optimizer)))

    def run(self, start, stop):
        for step in range(start, stop):
            self.step(step)
        return self


@functools.cache
def torchs_run(name, order):
    """Clipped by torch's own function where we would clip ourselves."""
    order = "unscale_ and clip" if "clip" in order else order
    return Run(functools.partial(TORCHS[name], lr=0.02), order).run(0, 60)


def without_scaler(run, **options):
    """Our optimizer after the same steps with gradients that were never scaled."""
    params = make_params()
    optimizer = make_ours(params, None, **options)
    for gradients in run.taken:
        for param, gradient in zip(params, gradients, strict=True):
            param.grad = gradient.clone()
        if run.order == "unscale_ and clip":
            nn.utils.clip_grad_norm_(params, CLIP)
        optimizer.step()
    return optimizer
