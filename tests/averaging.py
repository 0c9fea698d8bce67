"""What the tests of averages of weights share: kinds of parameters, and what their averages are to be."""

import torch

from bits import World, on
from masters import joined

KINDS = {  # of parameters: their dtype, and options
    "float32": (torch.float32, {}),
    "float64": (torch.float64, {}),
    "complex64": (torch.complex64, {}),
    "complex128": (torch.complex128, {}),
    "bfloat16": (torch.bfloat16, {"state_format": "8bit"}),
    "bfloat16 alone": (torch.bfloat16, {"master_weights": False}),
    "bfloat16 drawn": (torch.bfloat16, {"master_weights": "stochastic", "state_format": "bf16"}),
    "float16": (torch.float16, {"amsgrad": True}),
    "float16 alone": (torch.float16, {"master_weights": False}),
}
SHAPES = ((64, 70), (7,), (), (0,), (2, 3, 4))


def world(kind="float32", steps=4, shapes=SHAPES, **options):
    """A `World` that keeps averages, after some steps."""
    dtype, more = KINDS[kind]
    with on("reference"):
        return World(dtype, shapes, **{"ema_decay": 0.75} | more | options).run(steps)


def params_of(optimizer):
    return [param for group in optimizer.param_groups for param in group["params"]]


def rounded(average, dtype):
    """An average in the dtype of its parameter: written apart from the code under test."""
    if dtype != torch.bfloat16:
        return average.to(dtype)
    return (average.view(torch.int32) + 0x8000 >> 16).to(torch.int16).view(torch.bfloat16)  # ties away from 0


def master_of(param, entry):
    """A parameter's master weight, as its average begins."""
    if "residual" in entry:
        return joined(param.detach(), entry["residual"])
    return entry.get("master", param.detach().float() if param.dtype.itemsize == 2 else param.detach())
