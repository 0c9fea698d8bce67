"""Optimizers whose device decides beside their twins on the CPU engine, whose host decides: of every kind of row."""

import pytest
import torch

from bits import World, assert_same, on, same
from launchers import settled

SHAPES = ((70, 64), (7,), (2, 5), (), (33,), (129,))  # the first is encoded where there are eight bits
KINDS = {
    "float32": (torch.float32, {}),
    "float32, bf16": (torch.float32, {"state_format": "bf16"}),
    "float32, 8bit": (torch.float32, {"state_format": "8bit", "amsgrad": True}),
    "bfloat16": (torch.bfloat16, {}),
    "bfloat16, 8bit": (torch.bfloat16, {"state_format": "8bit"}),
    "float16, bf16": (torch.float16, {"state_format": "bf16", "amsgrad": True}),
    "float64": (torch.float64, {}),
    "complex64": (torch.complex64, {"maximize": True}),
}
every_kind = pytest.mark.parametrize(("dtype", "options"), KINDS.values(), ids=KINDS.keys())


def decisions(device):
    return sum(name == "decide" for name, _ in device.launched)


class Pair:
    """The same steps on the CUDA engine, whose device decides, and on the CPU engine, whose host does."""

    names = ("cuda", "cpu")

    def __init__(self, dtype=torch.float32, shapes=World.SHAPES, **options):
        self.worlds = self.ours, self.theirs = [World(dtype, shapes, **options) for _ in range(2)]

    def each(self, act):
        found = []
        for name, world in zip(self.names, self.worlds, strict=True):
            with on(name):
                found.append(act(world))
        return found

    def step(self):
        self.each(lambda world: world.optimizer.step())
        for world in self.worlds:
            world.done += 1

    def compare(self, what=""):
        left, right = self.each(lambda world: (settled(world.optimizer), world.optimizer.skipped_steps))
        assert_same(left[0], right[0], what)
        assert left[1] == right[1], what

    def compare_norms(self, what=""):
        left, right = self.each(lambda world: world.optimizer.grad_norm)
        if right is not None:  # else the host knew without measuring
            assert same(left, right), (what, left, right)

    def compare_statistics(self, what=""):
        left, right = self.each(lambda world: world.optimizer.statistics())
        assert left.keys() == right.keys(), what
        for key in left:
            assert left[key] == pytest.approx(right[key], rel=1e-5, nan_ok=True), (what, key)
