"""Guards that a device judges spikes as the host would, and that both continue from one memory of norms.

All is compared to the bit with the CPU engine, whose host decides: which steps are left out, the memory, the training.
"""

import copy
import math
import random
import warnings

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from bits import assert_same, on, results
from capturing import replay
from deciding import decisions
from launchers import settled
from lucid.engine.cuda import launch
from lucid.engine.cuda.decide import is_spike
from lucid.engine.numbers import KEPT, SET, Kept, Told
from lucid.engine.spikes import MOST_IN_A_ROW, TOO_LARGE, Memory, judged
from spiking import WARM, Normed, lifelike, memory, ordinary


@pytest.fixture(autouse=True)
def _spikes_in_a_row():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "spike_threshold", RuntimeWarning)
        yield


class Twins:
    """The same steps on the CUDA engine, whose device decides, and on the CPU engine, whose host does."""

    def __init__(self, **options):
        self.ours, self.theirs = (Normed(**{"spike_threshold": 6.0} | options) for _ in range(2))

    def each(self, act):
        for name, world in (("cuda", self.ours), ("cpu", self.theirs)):
            with on(name):
                act(world)

    def compare(self):
        ours, theirs = self.ours.optimizer, self.theirs.optimizer
        assert memory(ours) == memory(theirs)
        assert ours.skipped_steps == theirs.skipped_steps
        assert ours._stepper.skipped.spikes == theirs._stepper.skipped.spikes
        assert_same(settled(ours), results(theirs))


# The kernel


@triton.jit
def judge_all(config, kept, norms, takes, spikes, memories, count, size: tl.constexpr):
    for number in range(count):
        spike = is_spike(config, kept, tl.load(norms + number), tl.load(takes + number) != 0)
        tl.store(spikes + number, spike.to(tl.int64))
        words = tl.arange(0, size)
        tl.store(memories + number * size + words, tl.load(kept + words))


def kernel_judges(norms, threshold, start, takes):
    """The verdicts of the kernel, the words that it keeps after each; it is told the memory at the first."""
    config, kept = torch.zeros(SET, dtype=torch.int64), torch.full((SET,), -7)
    words = config.numpy()
    words.view(np.float64)[Told.SPIKE_THRESHOLD] = threshold
    words[Told.SPIKES] = 3
    words.view(np.float64)[[Told.MEAN, Told.SQUARE]] = start[:2]
    words[[Told.SEEN, Told.IN_A_ROW]] = start[2:]
    kept[Kept.SPIKED : Kept.ANEW + 1] = 0
    spikes, memories = torch.zeros(len(norms), dtype=torch.int64), torch.zeros(len(norms), SET, dtype=torch.int64)
    args = (config, kept, torch.tensor(norms, dtype=torch.float64), torch.tensor(takes), spikes, memories, len(norms))
    launcher = launch.Interpreter()
    launcher.launch(launcher.prepare(judge_all, args, (SET,), 1), 1, args, (SET,))
    assert (kept[KEPT:] == -7).all()
    return spikes.tolist(), memories.numpy()


def memory_in(words):
    means = words.view(np.float64)[[Kept.MEAN, Kept.SQUARE]].tolist()
    return Memory(*means, *words[[Kept.SEEN, Kept.IN_A_ROW]].tolist())


def at_the_limit(chance, threshold, start):
    """Each norm is the largest that is no spike, or the smallest that is one, or an ordinary one."""
    found, memory = [], start
    for _ in range(300):
        limit = memory.mean + threshold * (math.sqrt(memory.square) + 0.5 * memory.mean)
        norm = chance.choice([chance.uniform(0.8, 1.2), limit, math.nextafter(limit, math.inf)])
        found.append(norm)
        memory = judged(norm, threshold, memory).memory
    return found


SEQUENCES = {
    "at the limit": at_the_limit,
    "lifelike": lambda chance, *_: lifelike(300, chance),
    "any sizes": lambda chance, *_: [10.0 ** chance.uniform(-320, 308) for _ in range(200)],
    "tiny": lambda chance, *_: [5e-324 * chance.randrange(1, 9) for _ in range(150)],
    "huge": lambda chance, *_: [TOO_LARGE * chance.choice([0.5, 1 - 1e-16, 1.0, 2.0]) for _ in range(150)],
    "odd": lambda chance, *_: [chance.choice([0.0, math.nan, math.inf, 1.0, 1.0, 1.0, 9.0]) for _ in range(200)],
}


@pytest.mark.parametrize("threshold", [0.1, 2.0, 6.0, 1e300])
@pytest.mark.parametrize("kind", SEQUENCES)
def test_the_kernel_judges_as_the_host(kind, threshold):
    chance = random.Random(f"{kind} {threshold}")
    start = chance.choice([Memory(), Memory(*WARM), Memory(0.3, 1e-4, 128, MOST_IN_A_ROW - 1)])
    norms = SEQUENCES[kind](chance, threshold, start)
    takes = [kind == "at the limit" or chance.random() < 0.95 for _ in norms]
    spikes, memories = kernel_judges(norms, threshold, start, takes)
    found, anew, spiked = start, 0, 0
    for number, (norm, taken) in enumerate(zip(norms, takes, strict=True)):
        verdict = judged(norm, threshold, found) if taken else None
        if verdict is not None:
            found, anew, spiked = verdict.memory, anew + verdict.anew, spiked + verdict.spike
        assert bool(spikes[number]) == (verdict is not None and verdict.spike), number
        assert memory_in(memories[number]) == found, number
        assert memories[number][[Kept.SPIKES, Kept.SPIKED, Kept.ANEW]].tolist() == [3, spiked, anew], number


# Steps that a device decides


def test_a_device_decides_and_remembers_as_the_host(device):
    twins = Twins(spike_threshold=2.0, shapes=((2,),), warm=[1.0, 0.04, 50, 0])
    norms = lifelike(150, random.Random(3), 1.0)
    for begin in range(0, len(norms), 15):
        twins.each(lambda world, begin=begin: world.steps(norms[begin : begin + 15]))
        if begin % 45 == 30:
            twins.compare()
    twins.compare()
    assert decisions(device) == len(norms) - 1
    assert twins.ours.optimizer._stepper.skipped.spikes > 10


def reread(world, how):
    optimizer = world.optimizer
    if how == "load":
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    elif how == "load back":
        saved = copy.deepcopy(optimizer.state_dict())
        world.steps([*ordinary(2), 20.0])
        optimizer.load_state_dict(saved)
    elif how == "assign":
        optimizer.param_groups[0]["spike_memory"] = [0.5, 0.01, 100, 2]
    elif how == "assign what was told":
        optimizer.param_groups[0]["spike_memory"] = optimizer.param_groups[0]["spike_memory"].copy()
        optimizer.param_groups[0]["spike_memory"][:] = WARM
    elif how == "copy":
        world.optimizer = copy.deepcopy(optimizer)
        world.params = [param for group in world.optimizer.param_groups for param in group["params"]]
    elif how == "off":
        optimizer.spike_threshold = None
        world.steps([30.0])
        optimizer.spike_threshold = 6.0
    elif how == "host decides":
        optimizer.nonfinite = "error"
        world.steps([1.1, 20.0])
        optimizer.nonfinite = "skip"
    elif how == "other rows":
        world.set_gradients(1.2)
        world.params[0].grad = None
        optimizer.step()
        world.done += 1
    elif how == "new group":
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))]})
        world.params.append(optimizer.param_groups[-1]["params"][0])


HOWS = ["load", "load back", "assign", "assign what was told", "copy", "off", "host decides", "other rows", "new group"]


@pytest.mark.parametrize("how", HOWS)
def test_host_and_device_continue_from_one_memory(how, device):
    twins = Twins(nonfinite="skip")
    for _ in range(2):
        twins.each(lambda world: world.steps([*ordinary(3), 20.0, 20.0]))
        twins.each(lambda world: reread(world, how))
        twins.each(lambda world: world.steps([*ordinary(2), 20.0]))
    twins.compare()
    assert decisions(device) >= 13


def test_a_memory_that_is_set_back_to_what_was_told(device):
    """In place: the list is the same, and so are the numbers that the device was told."""

    def act(world):
        world.steps(ordinary(1))
        (memory_of, *_) = (group["spike_memory"] for group in world.optimizer.param_groups)
        told = memory_of.copy()
        world.steps([*ordinary(2), 20.0])
        assert memory(world.optimizer)[3] == 1
        memory_of[:] = told
        world.steps([20.0])

    twins = Twins()
    twins.each(act)
    twins.compare()


def test_the_warning_comes_when_the_host_learns_of_it(device):
    with on("cuda"), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        world = Normed(spike_threshold=6.0).steps([1.0] + [20.0] * (MOST_IN_A_ROW + 3))
        assert not told
        assert world.optimizer.skipped_steps == MOST_IN_A_ROW
        assert world.optimizer.skipped_steps == MOST_IN_A_ROW
    assert ["16 steps in a row" in str(each.message) for each in told] == [True]
    assert memory(world.optimizer)[2:] == [3, 0]


# Captured steps


class Captured:
    """Gradients that stay where they are; steps at once (e), or by a graph (a)."""

    def __init__(self, device, threshold=6.0):
        self.device, self.graph = device, None
        self.world = Normed(spike_threshold=threshold, nonfinite="skip")
        self.kept = []

    def run(self, script, norms):
        world = self.world
        for letter, norm in zip(script, norms, strict=True):
            world.set_gradients(norm)
            world.done += 1
            if not self.kept:
                self.kept = [param.grad for param in world.params]
            for param, grad in zip(world.params, self.kept, strict=True):
                param.grad = grad.copy_(param.grad)
            if letter == "h":
                world.optimizer.nonfinite = "error"
            if letter in "eh" or self.device is None:
                world.optimizer.step()
            else:
                if self.graph is None:
                    with self.device.captures(world.optimizer) as self.graph:
                        world.optimizer.step()
                replay(self.graph)
            world.optimizer.nonfinite = "skip"
            if letter == "s":
                assert world.optimizer.skipped_steps >= 0
        return self


@pytest.mark.parametrize("script", ["eeaaaaaaaaaaaaaaa", "eeasasaaesaahaasa", "eeaheahaaasseeaah", "eeaaaaaaaaaaaaaha"])
def test_replays_judge_and_remember(script, capturing):
    """s: a replay, after which somebody reads; h: the host decides."""
    norms = [*ordinary(3), 20.0, *ordinary(2), 20.0, 20.0, *ordinary(1), 20.0, 20.0, 20.0, *ordinary(3), 20.0, 20.0]
    with on("cpu"):
        wanted = Captured(None).run(script, norms)
    with on("cuda"):
        found = Captured(capturing).run(script, norms)
    ours, theirs = found.world.optimizer, wanted.world.optimizer
    assert memory(ours) == memory(theirs)
    assert ours.skipped_steps == theirs.skipped_steps == 8
    assert ours._stepper.skipped.spikes == 8
    assert_same(settled(ours), results(theirs))
