"""Worlds whose gradients have norms that a test chooses, for tests of `spike_threshold`."""

import math
import random

import torch

from bits import World
from lucid.optim.matching import SPIKES

WARM = [1.0, 0.04, 64, 0]  # a memory of norms near 1


class Normed(World):
    """A world in which the gradients of a step have about the norm that is asked for; it remembers `warm`."""

    def __init__(self, shapes=((2,), (3,), (1, 2)), warm=WARM, **options):
        super().__init__(shapes=shapes, **options)
        if warm and self.optimizer.spike_threshold is not None:
            self.optimizer.param_groups[0][SPIKES][:] = warm

    def set_gradients(self, norm=1.0):
        super().set_gradients()
        reals = [torch.view_as_real(p.grad) if p.grad.is_complex() else p.grad for p in self.params]
        whole = math.sqrt(sum(each.double().square().sum().item() for each in reals))
        for param in self.params:
            param.grad.mul_(norm / whole)

    def steps(self, norms):
        for norm in norms:
            self.set_gradients(norm)
            self.optimizer.step()
            self.done += 1
        return self


def memory(optimizer):
    """The memory of norms, as a checkpoint has it."""
    (first, *others) = (group[SPIKES] for group in optimizer.state_dict()["param_groups"])
    assert all(other == first for other in others)
    return first


def ordinary(count, chance=None, size=1.0):
    """Norms that no threshold from 4 on takes for spikes."""
    chance = chance or random.Random(0)
    return [size * chance.uniform(0.6, 1.4) for _ in range(count)]


def lifelike(count, chance, size=None):
    """Norms that fall and rise, with spikes, some of them in a row, and norms of 0."""
    found, size = [], 10.0 ** chance.randrange(-3, 4) if size is None else size
    while len(found) < count:
        kind = chance.random()
        size *= chance.choice([1.0, 1.0, 0.97, 1.02])
        if kind < 0.02:
            found += [size * chance.uniform(3, 60)] * chance.choice([1, 1, 2, 15, 16, 17])
        elif kind < 0.03:
            found.append(0.0)
        elif kind < 0.04:
            size *= chance.choice([0.2, 3.0, 6.0])
        found.append(size * math.exp(chance.gauss(0, 0.2)))
    return found[:count]
