"""Makes the checkpoints beside this file, one for each format; those that are there already are never made anew.

    python tests/golden/make.py

They must load for ever: into the same optimizer, which then goes on to the very same bits. Everything is made by
arithmetic on whole numbers, so that no version of torch draws other gradients.
"""

import copy
import hashlib
from pathlib import Path

import torch
from torch.nn import Parameter

import lucid.optim as optim

HERE = Path(__file__).parent
SHAPES = {
    "matrix": (64, 66),
    "vector": (13,),
}  # the first has 8-bit moments, with a block and a vector register cut off
BEFORE, AFTER = 5, 3  # steps until the checkpoint is written, and after it
KINDS = {
    "fp32": (torch.float32, {"state_format": "fp32"}),
    "bf16": (torch.float32, {"state_format": "bf16"}),
    "8bit": (torch.float32, {"state_format": "8bit"}),
    "8bit-amsgrad": (torch.float32, {"state_format": "8bit", "amsgrad": True}),
    "8bit-bf16-parameters": (torch.bfloat16, {"state_format": "8bit"}),
    "bf16-fp16-parameters": (torch.float16, {"state_format": "bf16"}),
    "fp32-spikes": (torch.float32, {"state_format": "fp32", "spike_threshold": 6.0}),
    "8bit-ema": (torch.float32, {"state_format": "8bit", "ema_decay": 0.9}),
    "8bit-ema-bf16-parameters": (torch.bfloat16, {"state_format": "8bit", "ema_decay": 0.9}),
    "8bit-stochastic-bf16-parameters": (torch.bfloat16, {"state_format": "8bit", "master_weights": "stochastic"}),
    "bf16-independent-cautious": (
        torch.float32,
        {
            "state_format": "bf16",
            "weight_decay_schedule": "independent",
            "reference_lr": 0.03,
            "cautious_decay": True,
        },
    ),
}


def numbers(seed, shape, dtype):
    """Numbers between -1/2 and 1/2 of several orders of magnitude, exact in float32."""
    n = torch.arange(torch.Size(shape).numel(), dtype=torch.int64)
    h = (n * 2654435761 + seed * 40503 + 12345) % 2**32
    h = (h ^ (h >> 15)) * 747796405 % 2**32
    h = (h ^ (h >> 13)) * 277803737 % 2**32
    return (((h >> 9).float() / 2**23 - 0.5) * torch.exp2(-(n % 7).float())).view(shape).to(dtype)


def step(optimizer, params, number):
    """Step number `number`, with its gradients."""
    for index, param in enumerate(params.values()):
        param.grad = numbers(100 * number + index + 1, param.shape, param.dtype)
    optimizer.step()


def made(values, options, **more):
    """Parameters with these values, and their optimizer."""
    params = {name: Parameter(value.clone()) for name, value in values.items()}
    return optim.AdamW(list(params.items()), lr=0.01, weight_decay=0.1, seed=7, **options, **more), params


def digests(optimizer, params):
    """The bits of every parameter and its state."""
    return {
        f"{name} {key}": hashlib.sha256(bytes(value.detach().contiguous().reshape(-1).view(torch.uint8))).hexdigest()
        for name, param in params.items()
        for key, value in ({"param": param} | optimizer.state[param]).items()
    }


def checkpoint(dtype, options):
    """What is saved: a world after some steps, and what it is to become after some more."""
    values = {name: numbers(0, shape, dtype) for name, shape in SHAPES.items()}
    optimizer, params = made(values, options)
    for number in range(BEFORE):
        step(optimizer, params, number)
    saved = {"params": {k: p.detach() for k, p in params.items()}, "optimizer": optimizer.state_dict()}
    saved = copy.deepcopy(saved) | {"options": options}
    for number in range(BEFORE, BEFORE + AFTER):
        step(optimizer, params, number)
    return saved | {"after": digests(optimizer, params)}


def main():
    """Write what is missing."""
    for name, (dtype, options) in KINDS.items():
        file = HERE / f"{name}.pt"
        if file.exists():
            print(f"{file.name}: is there, left alone")
        else:
            torch.save(checkpoint(dtype, options), file)
            print(f"{file.name}: written, {file.stat().st_size} bytes")


if __name__ == "__main__":
    main()
