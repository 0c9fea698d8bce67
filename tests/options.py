"""Parameters of every dtype, layout and length, stepped under options beside the rule; and draws in whole numbers."""

import itertools
import math

import torch
from torch.nn import Parameter

import lucid.optim as optim
from bits import assert_same, on, results
from lucid import engine
from lucid.engine import shards
from lucid.engine.shards import Numbering
from patterns import BATCHES, LENGTHS, LEVELS, patterns

FORMATS = ["fp32", "bf16", "8bit"]
MASTERS = {  # for each dtype of parameters, the values of master_weights that make a difference
    torch.float32: [True],
    torch.bfloat16: [True, False, "stochastic"],
    torch.float16: [True, False],
    torch.float64: [True],
    torch.complex64: [True],
    torch.complex128: [True],
}
STORED = [
    (dtype, masters, state_format)
    for dtype, every in MASTERS.items()
    for masters, state_format in itertools.product(every, FORMATS)
    if state_format == "fp32" or dtype in (torch.float32, torch.bfloat16, torch.float16)
]


def across(param, state_format):
    """The numbers of a shard by rows that begins just below 2^32."""
    return Numbering(2**32 - 3000, 2**62, 0)


def in_runs(param, state_format):
    """The numbers of a shard along another dimension, whose runs are on both sides of 2^32; 8-bit blocks are whole."""
    row = max(1, param.numel() // max(1, len(param)) * (2 if param.is_complex() else 1)) if param.dim() else 1
    run = row if state_format == "8bit" else max(1, row // 3)
    return Numbering(2**32 - 200 * run, run, 10 * run)


NUMBERINGS = [across, in_runs]


def layouts(dtype, few=False):
    """Tensors of any numbers that `dtype` has, in every layout; with `few`, of each kind of layout one small one."""
    generator = torch.Generator().manual_seed(17)

    def values(*shape):
        return patterns(generator, math.prod(shape), dtype).view(shape)

    made = {
        "contiguous": values(64, 80),
        "odd rows, strided": values(34, 300)[1:, 3:270:2],
        "1-dim": values(300),
        "0-dim": values(),
    }
    if few:
        return made
    return made | {
        "long rows": values(2, 9001),
        "transposed": values(80, 64).t(),
        "channels-last": values(64, 8, 3, 3).contiguous(memory_format=torch.channels_last),
        "strided and transposed": values(130, 64).t()[:, ::2],
        "empty": values(0, 5),
        **{f"{length} elements": values(length) for length in LENGTHS},
    }


class Run:
    """An optimizer of all layouts in two groups, the second with amsgrad and small β; its gradients are normal."""

    def __init__(self, dtype, *, few=False, gradient_dtype=None, **options):
        self.params = []
        for tensor in itertools.chain(layouts(dtype, few).values(), layouts(dtype, few=True).values()):
            view = torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype)
            param = Parameter(view.copy_(tensor))
            param.grad_dtype = None
            self.params.append(param)
        second = {"params": self.params[-4:], "betas": (0.3, 0.4), "amsgrad": True}
        groups = [{"params": self.params[:-4]}, second]
        self.optimizer = optim.AdamW(groups, **{"lr": 0.01, "weight_decay": 0.1} | options)
        self.gradient_dtype = gradient_dtype or dtype
        self.done = 0

    def run(self, steps):
        for _ in range(steps):
            generator = torch.Generator().manual_seed(100 + self.done)
            for param in self.params:
                wide = torch.randn(param.shape, generator=generator, dtype=torch.float32)
                param.grad = (wide * 10.0 ** (self.done % 3 - 2)).to(self.gradient_dtype)
            self.optimizer.step()
            self.done += 1
        return self


def ran(dtype, steps=3, *, observe=False, numbering=None, monkeypatch=None, **options):
    """What some steps give, in the form of `results`; `numbering`: one of `NUMBERINGS`."""
    run = Run(dtype, **options)
    run.optimizer.observe(observe)
    if numbering is None:
        return results(run.run(steps).optimizer)
    with monkeypatch.context() as patch:
        patch.setattr(shards, "numbering", lambda param, name: numbering(param, options.get("state_format")))
        return results(run.run(steps).optimizer)


def on_reference(dtype, steps=3, **options):
    with on("reference"):
        return ran(dtype, steps, **options)


def assert_levels_agree(dtype, step=1, **options):
    """Every SIMD level, number of threads and batch size gives the reference's bits; one of `step` is tried."""
    wanted = on_reference(dtype, **options)
    every = list(itertools.product(LEVELS, [1, 2], BATCHES))
    for level, threads, batch in dict.fromkeys([*every[::step], every[-1]]):
        torch.set_num_threads(threads)
        with engine.cpu.forced_simd_level(level), engine.cpu.forced_batch_elements(batch):
            assert_same(ran(dtype, **options), wanted, f"{level}, {threads} threads, batches of {batch}")


def assert_continues(dtype, **options):
    """A run that is saved and loaded after two steps gives the bits of one that goes on."""

    def run(steps):
        return Run(dtype, few=True, **options).run(steps)

    whole, first, second = run(4), run(2), run(0)
    second.done = 2
    for param, own in zip(second.params, first.params, strict=True):
        param.data.copy_(own.detach())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    assert_same(results(second.run(2).optimizer), results(whole.optimizer))


# The draws, written apart from the code under test


def mixed(x):
    """The finalizer of splitmix64 after its increment, from its publication."""
    mask = 2**64 - 1
    z = (x + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def draw_for(use, stream, step, number):
    """One draw for a use (0: moments, 1: parameter, 2: average): the upper half of number times a key plus a key."""
    key = mixed((mixed(stream & (2**64 - 1)) + step) & (2**64 - 1)) ^ (use << 62)
    keys = mixed((key + (number >> 32)) & (2**64 - 1))
    factor, offset = (keys & 0xFFFFFFFF) | 1, keys >> 32
    return (number * factor + offset & 0xFFFFFFFF) >> 16


def draws_for(use, stream, step, shape):
    numbers = range(math.prod(shape))
    return torch.tensor([draw_for(use, stream, step, number) for number in numbers], dtype=torch.int32).view(shape)
