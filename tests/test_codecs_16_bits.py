"""Guards values of 16 bits: a master in two halves, rounding to the nearest, and unbiased rounding to bfloat16.

The codecs in torch operations are held against their definition written once more in closed form, exhaustively where
the domain is small; the CPU engine, at every SIMD level, against the codecs.
"""

import math

import numpy as np
import pytest
import torch

from bits import same
from lucid.engine import codecs
from stored import (
    DRAWS,
    ENGINES,
    LOWER,
    assert_encodes,
    assert_stored,
    bits_of,
    delivered,
    float32,
    generator,
    int16,
    patterns,
    random_bits,
    stepped,
    unmoved,
)

# Two halves of a float32


@pytest.fixture(scope="module")
def masters():
    """All upper halves with lower halves at and around the edges of rounding."""
    uppers = torch.arange(2**16).repeat_interleave(len(LOWER)) << 16
    return float32(uppers | torch.tensor(LOWER).repeat(2**16))


def test_a_master_is_its_two_halves(masters):
    param, residual = codecs.split(masters)
    assert same(codecs.joined(param, residual), masters)


def test_the_parameter_is_its_master_to_half_a_unit(masters):
    param, residual = codecs.split(masters)
    finite = masters.isfinite() & param.isfinite()
    _, exponent = torch.frexp(masters[finite].double())
    half_unit = torch.exp2(torch.clamp_min(exponent - 1, -126) - 8.0)
    assert ((param[finite].double() - masters[finite].double()).abs() <= half_unit).all()
    over = masters.isfinite() & ~param.isfinite()  # what torch rounds to infinity, and no more
    assert torch.equal(over, masters.isfinite() & (masters.abs() >= float32(0x7F7F8000)))
    assert (int16(residual)[over] < 0).all()


@pytest.mark.parametrize("name", ENGINES)
def test_every_master_is_loaded_and_stored(masters, name):
    """A bf16 parameter with its residual moves as the float32 that they are; one that need not move stays."""
    param, residual = codecs.split(masters)
    gradient = torch.randn(masters.shape, generator=generator())
    options = {"lr": 0.1, "weight_decay": 0.1}
    wide = stepped(name, masters, gradient, **options)
    found = stepped(name, param, gradient, {"residual": residual}, **options)
    wide["param"], wide["residual"] = codecs.split(wide["param"])
    assert_stored(found, {key: wide[key] for key in found}, name)
    finite = masters.isfinite()
    still = unmoved(name, param, {"residual": residual})
    wanted = {"param": torch.where(finite, param, math.nan), "residual": torch.where(finite, int16(residual), 0)}
    assert_stored({"param": still["param"], "residual": int16(still["residual"])}, wanted, name)


@pytest.mark.parametrize("name", ["codec", *ENGINES])
def test_a_nan_is_stored_as_the_quiet_one_without_a_residual(name):
    nan = float32([0x7F800001, 0x7FFFFFFF, 0xFF800001, 0xFFFFFFFF, 0x7FC00000, 0xFF808000]).repeat(17)
    if name == "codec":
        param, residual = codecs.split(nan)
    else:
        param = torch.full(nan.shape, math.nan, dtype=torch.bfloat16)
        found = unmoved(name, param, {"residual": param})
        param, residual = found["param"], found["residual"]
    assert codecs.joined(param, residual).isnan().all()
    assert not int16(residual).any()
    assert set(int16(param).tolist()) == {0x7FC0}


OVERWRITTEN = [0, 1, -1, 2, 0x7FFF, -0x8000, -0x7FFF, 0x1234, -0x4321]


@pytest.fixture(scope="module")
def overwritten():
    """All parameters, each with residuals that some other value left behind."""
    param = torch.arange(2**16).repeat_interleave(len(OVERWRITTEN))
    residual = torch.tensor(OVERWRITTEN, dtype=torch.int16).repeat(2**16)
    return param.to(torch.int16).view(torch.bfloat16), residual.view(torch.bfloat16)


def check_overwritten(param, residual, value):
    """That `value` is the parameter's to half a unit in its last place, and a number wherever it is one."""
    assert torch.equal(value.isnan(), param.isnan())
    lower = int16(residual).long()
    zero = param == 0
    assert torch.equal(value[zero & (lower < 0)], param[zero & (lower < 0)].float())
    infinite = param.isinf() & (lower >= 0)
    assert torch.equal(value[infinite], param[infinite].float())
    within = param.isinf() & (lower < 0)
    assert (value[within].abs() >= float32(0x7F7F8000)).all()
    assert torch.equal(value[within].sign(), param[within].float().sign())
    finite = param.isfinite()
    _, exponent = torch.frexp(param[finite].double())
    half_unit = torch.exp2(torch.clamp_min(exponent - 1, -126) - 8.0)
    assert ((value[finite].double() - param[finite].double()).abs() <= half_unit).all()
    nonzero = finite & ~zero
    assert torch.equal(value[nonzero].sign(), param[nonzero].float().sign())


def test_an_overwritten_parameter_counts(overwritten):
    param, residual = overwritten
    check_overwritten(param, residual, codecs.joined(param, residual))


@pytest.mark.parametrize("name", ENGINES)
def test_an_overwritten_parameter_counts_in_a_step(overwritten, name):
    param, residual = overwritten
    value = codecs.joined(param, residual)
    finite = value.isfinite()
    found = unmoved(name, param[finite], {"residual": residual[finite]})
    assert same(codecs.joined(found["param"], found["residual"]), value[finite])
    special = unmoved(name, param[~finite], {"residual": residual[~finite]})  # 0 times infinity
    assert special["param"].isnan().all()


@pytest.mark.parametrize("name", ENGINES)
def test_a_zeroed_or_masked_parameter_trains_on_as_a_number(name):
    param = torch.zeros(1000, dtype=torch.bfloat16)
    residual = torch.linspace(-0x8000, 0x7FFF, 1000).round().to(torch.int16).view(torch.bfloat16)
    gradient = torch.randn(1000, generator=generator())
    for sign in (1.0, -1.0):
        found = stepped(name, param * sign, gradient, {"residual": residual}, lr=1e-3)
        moved = codecs.joined(found["param"], found["residual"])
        assert (moved - -1e-3 * gradient.sign()).abs().max() < 1e-7


# Rounding to the nearest


@pytest.fixture(scope="module")
def around_halves():
    """Every float16, what lies halfway between two, the float32 beside each, and any bits."""
    halves = torch.arange(2**15).to(torch.int16).view(torch.float16).float()
    exact = torch.cat([halves[halves.isfinite()], torch.tensor([2.0**16])])
    middles = (exact[:-1].double() + exact[1:].double()).div(2).float()
    bits = bits_of(torch.cat([exact, middles]))
    near = float32(torch.cat([bits - 1, bits, bits + 1])[1:])
    values = torch.cat([near, -near, random_bits(100_000)])
    return values[~values.isinf() & (values != 0)]


@pytest.mark.parametrize("name", ENGINES)
def test_float16_is_the_nearest(around_halves, name):
    with np.errstate(over="ignore", invalid="ignore"):  # arm64 says so of a signalling NaN
        wanted = torch.from_numpy(around_halves.numpy().astype(np.float16))
    assert torch.equal(patterns("", wanted), patterns("", around_halves.half()))
    kept = delivered(name, around_halves, torch.float16)
    assert same(kept["master"], around_halves)
    for found in (kept, delivered(name, around_halves, torch.float16, master_weights=False)):
        assert_stored({"param": found["param"]}, {"param": wanted}, name)


@pytest.mark.parametrize("name", ENGINES)
def test_bfloat16_is_the_nearest(masters, name):
    values = torch.cat([masters, random_bits(100_000)])
    values = values[~values.isinf() & (values != 0)]
    bits = bits_of(values)
    wanted = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    wanted = torch.where(values.isnan(), 0x7FC0, wanted).to(torch.int16).view(torch.bfloat16)
    assert torch.equal(patterns("", wanted), patterns("", values.bfloat16()))
    found = delivered(name, values, torch.bfloat16, master_weights=False)
    assert_stored({"param": found["param"]}, {"param": wanted}, name)


@pytest.mark.parametrize("name", ENGINES)
def test_every_float16_parameter_is_decoded_exactly(name):
    """Seen in the master, which an overwritten parameter replaces, and in an fp16 parameter that does not move."""
    every = DRAWS.to(torch.int16).view(torch.float16)
    with np.errstate(invalid="ignore"):
        exact = torch.from_numpy(int16(every).numpy().view(np.float16).astype(np.float32))
    assert same(codecs.master_of_float16(every, torch.where(every == 1, 2.0, torch.ones(2**16))), exact)
    finite = every.isfinite()
    found = unmoved(name, every[finite], {"master": torch.where(every == 1, 2.0, torch.ones(2**16))[finite]})
    assert same(found["master"], exact[finite])
    assert torch.equal(int16(found["param"]), int16(every)[finite])
    alone = unmoved(name, every[finite], {}, master_weights=False)
    assert torch.equal(int16(alone["param"]), int16(every)[finite])


@pytest.mark.parametrize("name", ENGINES)
def test_a_float16_parameter_counts_only_where_it_is_not_its_masters(around_halves, name):
    finite = around_halves[around_halves.isfinite()]
    param = finite.half()
    kept = unmoved(name, param, {"master": finite})
    assert same(kept["master"], finite)
    assert torch.equal(int16(kept["param"]), int16(param))
    other = (int16(param) ^ 1).view(torch.float16)
    numbers = other.isfinite()
    changed = unmoved(name, other[numbers], {"master": finite[numbers]})
    assert same(changed["master"], other[numbers].float())


# Stochastic rounding to bfloat16


def test_bfloat16_draws_are_unbiased_exactly():
    """The mean over all 2^16 draws is the value itself, normal or not, but for those that would overflow."""
    values = random_bits(64)
    edges = float32([1, 0x8000, 0x10001, 0x80_0001, 0x3F80_0001, 0x3F80_FFFF, 0x3FFF_FFFF, 0x7F7E_FFFF, 0xBF80_8000])
    values = torch.cat([values[values.abs() < float32(0x7F7F0000)], edges])
    for positive, some in ((False, values), (True, values[values >= 2.0**-126])):
        assert len(some) > 20
        for value in some:
            rounded = codecs.rounded_to_bfloat16(value.expand(2**16), DRAWS, positive=positive)
            assert len(rounded.unique()) <= 2
            assert rounded.double().sum() == value.double() * 2**16


def test_bfloat16_draws_round_up_where_what_is_cut_off_and_the_draw_make_a_whole():
    upper = torch.arange(2**16)
    for lower in (*LOWER, 0x1234, 0xC000):
        magnitudes = upper & 0x7FFF
        for drawn in (0, 1, 0x10000 - lower - 1, min(0x10000 - lower, 0xFFFF), 0x8000, 0xFFFF):
            rounded = magnitudes + (lower + drawn >= 0x10000)
            rounded = torch.where(magnitudes < 0x7F80, torch.clamp_max(rounded, 0x7F7F), rounded)
            values = float32(upper << 16 | lower)
            special = ~values.isfinite()
            rounded = torch.where(special, torch.where(values.isnan(), 0x7FC0, 0x7F80), rounded) | (upper & 0x8000)
            found = codecs.rounded_to_bfloat16(values, torch.full((2**16,), drawn, dtype=torch.int32))
            wanted = rounded.to(torch.int16).view(torch.bfloat16)
            assert torch.equal(patterns("", found), patterns("", wanted)), (lower, drawn)


def test_bfloat16_draws_keep_order_and_exact_values():
    values, _ = torch.sort(random_bits(200_000))
    values = values[~values.isnan()]
    exact = DRAWS.to(torch.int16).view(torch.bfloat16)
    before = None
    for drawn in (0, 1, 0x7FFF, 0x8000, 0xC001, 0xFFFF):
        all_drawn = torch.tensor(drawn, dtype=torch.int32)
        rounded = codecs.rounded_to_bfloat16(values, all_drawn)
        assert (rounded[1:] >= rounded[:-1]).all()
        assert before is None or (rounded.abs() >= before.abs()).all()
        before = rounded
        found = codecs.rounded_to_bfloat16(exact.float(), all_drawn)
        assert torch.equal(patterns("", found), patterns("", exact))


def test_bfloat16_draws_keep_the_finite_finite_and_the_positive_positive():
    greatest = torch.tensor([torch.finfo(torch.float32).max, -torch.finfo(torch.float32).max])
    smallest = float32([1, 2, 0x7FFF, 0xFFFF])
    special = torch.tensor([math.inf, -math.inf, math.nan, 0.0])
    for positive in (False, True):
        rounded = codecs.rounded_to_bfloat16(greatest.expand(2**16, 2), DRAWS[:, None], positive=positive)
        assert torch.equal(rounded.float(), float32([0x7F7F0000, 0xFF7F0000]).expand(2**16, 2))
        kept = codecs.rounded_to_bfloat16(special.expand(2**16, 4), DRAWS[:, None], positive=positive)
        assert same(kept.float(), special.expand(2**16, 4))
    raised = codecs.rounded_to_bfloat16(smallest.expand(2**16, 4), DRAWS[:, None], positive=True)
    assert (raised.float() == float32(0x10000)).all()


# Codes in the engine


@pytest.mark.parametrize("name", ENGINES)
def test_every_upper_half_is_drawn_by_the_engine(masters, name):
    for betas in ((0.0, 0.0), (0.9, 0.999)):
        assert_encodes(name, masters, "bf16", betas=betas, eps=1e-8)
