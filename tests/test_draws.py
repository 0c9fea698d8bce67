"""Guards the draws for stochastic rounding: those of the definition on every engine, evenly spread, independent."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lucid.engine import codecs
from lucid.engine.shards import WHOLE
from options import mixed
from quick import examples
from stored import ENGINES, float32, stepped


def draw(stream, step, number):
    """The definition of one draw, in whole numbers: the upper half of a number times an odd key plus another key."""
    key = mixed((mixed(stream & (2**64 - 1)) + step) & (2**64 - 1))
    keys = mixed((key + (number >> 32)) & (2**64 - 1))
    factor, offset = (keys & 0xFFFFFFFF) | 1, keys >> 32
    return (number * factor + offset & 0xFFFFFFFF) >> 16


# Of elements 0, 1, 2, 1000 and 2^20, for (stream, step).
GOLDEN = {
    (0, 1): [38034, 5295, 38091, 1213, 1058],
    (0, 2): [8145, 57413, 41144, 58073, 35393],
    (1, 1): [54549, 6207, 23401, 12736, 20069],
    (-1, 1): [30024, 1613, 38738, 61406, 37528],
    (2**63 - 1, 2**24 - 1): [64594, 29716, 60373, 51120, 63074],
    (0x0123456789ABCDEF, 1000): [28215, 3022, 43364, 640, 2759],
}


def some_draws(stream, step, *shape):
    return codecs.draws(stream, step, WHOLE.numbers(torch.Size(shape), torch.device("cpu")))


@pytest.mark.parametrize(("stream", "step"), GOLDEN)
def test_golden_draws(stream, step):
    """A checkpoint's training must go on with the same draws for ever."""
    assert [draw(stream, step, number) for number in (0, 1, 2, 1000, 2**20)] == GOLDEN[stream, step]
    found = some_draws(stream, step, 2**20 + 1)
    assert found[[0, 1, 2, 1000, 2**20]].tolist() == GOLDEN[stream, step]
    assert mixed(0) == 0xE220A8397B1DCDAF  # the first output of splitmix64 from seed 0


@settings(deadline=None, max_examples=examples(50))
@given(
    stream=st.integers(-(2**63), 2**63 - 1),
    step=st.integers(1, 2**24),
    shape=st.lists(st.integers(1, 9), max_size=4),
)
def test_draws_are_those_of_the_definition(stream, step, shape):
    found = some_draws(stream, step, *shape)
    assert found.shape == torch.Size(shape)
    assert found.flatten().tolist() == [draw(stream, step, number) for number in range(math.prod(shape))]


def drawn_by_engine(name, stream, step, shape):
    """The draws that engine `name` makes, by halving: x rounds up where the bits cut off and the draw make 2^16."""
    param = torch.zeros(shape)
    drawn = torch.zeros(shape, dtype=torch.int64)
    state = {"stream": torch.tensor(stream), "step": torch.tensor(step - 1.0)}
    for bit in range(15, -1, -1):
        least = drawn + (1 << bit)
        gradient = float32(0x3F800000 + 0x10000 - least)
        after = stepped(name, param, gradient, state, betas=(0.0, 0.0), state_format="bf16")
        drawn = torch.where(after["exp_avg"].float() > 1.0, least, drawn)
    return drawn


@pytest.mark.parametrize("name", ENGINES)
def test_the_engines_draws(name):
    for stream, step in ((0, 1), (-(2**63), 2), (123456789, 2**24 - 1)):
        found = drawn_by_engine(name, stream, step, (3, 345))
        assert found.flatten().tolist() == [draw(stream, step, number) for number in range(3 * 345)]


def test_draws_depend_on_the_elements_number_and_not_on_the_shape():
    for shape in ((6000,), (6, 1000), (60, 10, 10), (1, 6000), (6000, 1)):
        assert torch.equal(some_draws(5, 6, *shape).flatten(), some_draws(5, 6, 6000))
    assert torch.equal(some_draws(5, 6, 10_000)[:6000], some_draws(5, 6, 6000))
    assert some_draws(5, 6, 0).shape == (0,)
    assert some_draws(5, 6).shape == ()


def chi_square(counts):
    expected = counts.sum() / counts.numel()
    return ((counts - expected).square() / expected).sum().item()


PLACES = [0, 1, 2, 3, 7, 8, 15, 16, 64, 127, 128, 129, 256, 1000, 1023]


@pytest.fixture(scope="module")
def draws_of_steps():
    """The draws of 1,024 elements of two parameters at 8,192 steps."""
    return [torch.stack([some_draws(stream, step, 1024) for step in range(1, 8193)]) for stream in (7, 8)]


def pairs_of(draws_of_steps):
    """Two draws that should not know of each other: of two elements, of two steps, of two parameters."""
    ours, theirs = draws_of_steps
    for one, other in itertools.combinations(PLACES, 2):
        yield f"elements {one} and {other}", ours[:, one], ours[:, other]
    for place, lag in itertools.product(PLACES, (1, 2, 10)):
        yield f"element {place}, {lag} steps later", ours[:-lag, place], ours[lag:, place]
    for place in PLACES:
        yield f"element {place} of two parameters", ours[:, place], theirs[:, place]
        yield f"element {place} of two parameters, a step later", ours[:-1, place], theirs[1:, place]


def test_draws_are_equally_distributed_and_do_not_know_of_each_other(draws_of_steps):
    """χ² of 256 classes has mean 255 and deviation 22.6: at most six of those more, of singles and of pairs."""
    bound = 255 + 6 * math.sqrt(2 * 255)
    for place in PLACES:
        drawn = draws_of_steps[0][:, place].long()
        for part in (drawn >> 8, drawn >> 4 & 0xFF, drawn & 0xFF):
            assert chi_square(torch.bincount(part, minlength=256).double()) < bound
    for what, one, other in pairs_of(draws_of_steps):
        classes = (one.long() >> 12) << 4 | other.long() >> 12
        assert chi_square(torch.bincount(classes, minlength=256).double()) < bound, what


def test_draws_are_not_correlated(draws_of_steps):
    for what, one, other in pairs_of(draws_of_steps):
        one, other = one.double() - one.double().mean(), other.double() - other.double().mean()
        assert abs(one @ other / (one.norm() * other.norm())) < 6 / math.sqrt(len(one)), what


def test_a_sum_of_draws_varies_as_if_all_were_independent(draws_of_steps):
    """What stochastic rounding adds to the mean of many elements, and of many steps.

    Over the elements of a step the draws are no more than pairwise independent: a few steps' keys make most of it.
    """
    variance = 2.0**32 / 12
    for drawn in draws_of_steps:
        centred = drawn.double() - (2**16 - 1) / 2
        for n in (2, 16, 128, 1024):
            over_elements = centred[:, :n].sum(1).square().mean() / (n * variance)
            assert 0.5 < over_elements < 2.0, n
            over_steps = centred[: len(centred) // n * n].view(-1, n, 1024).sum(1).square().mean() / (n * variance)
            assert 0.8 < over_steps < 1.25, n
