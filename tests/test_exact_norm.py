"""Guards that the sum of squares is exact: the same bits for any order, any division of the elements, and any engine.

The words that an engine measures are held against Python's integers, over the whole range of every type: subnormals,
spreads that no window of the CPU engine holds, sums that no float64 holds, and elements that are only counted. Then one
norm and one clipped step for any order of parameters and groups, any cut into other parameters, and any layout.
test_exact_norm_ranks.py has the same for processes.
"""

import fractions
import itertools
import math
import random
from array import array

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn import Parameter

import lucid.optim as optim
from bits import assert_same, canonical, draw, on, peek, results, same
from gradients import COMPLEX, KINDS, LEVELS, LIES, PIECE, REALS, exact_root, numbers, squares, two_engines, used
from lucid import engine
from lucid.engine import exact_sum
from lucid.engine.exact_sum import LOWEST, TOTAL_WORDS, WORDS, Count

UNIT = fractions.Fraction(2) ** LOWEST
INFINITE = math.inf


def with_gradient(gradient, dtype=None):
    param = Parameter(torch.zeros_like(gradient, dtype=dtype, memory_format=torch.contiguous_format))
    param.grad_dtype = None
    param.grad = gradient
    return param


def measured(params, scale=1.0, kinds=None, name="cpu"):
    """The words that an engine finds."""
    found = []
    own = engine.Plan.measure

    def measure(plan, *_):
        found.append(own(plan, scale, kinds))
        return list(found[-1])

    with pytest.MonkeyPatch.context() as patch, on(name):
        patch.setattr(engine.Plan, "measure", measure)
        optim.AdamW(params, max_grad_norm=INFINITE).step()
    [words] = found
    return words


def expected(params, scale=1.0):
    """The same from Python's integers, one element after the other."""
    total, counts = 0, dict.fromkeys(Count, 0)
    for param in params:
        limit = 2.0**64 if used(param).dtype == "float32" else 2.0**512
        for x in used(param).astype("float64").reshape(-1).tolist():
            counts[Count.NAN] += math.isnan(x)
            square = x * x if math.isfinite(x) else INFINITE
            counts[Count.INFINITE] += not math.isnan(x) and math.isinf(square)
            counts[Count.LARGE] += math.isfinite(x) and fractions.Fraction(abs(x)) / fractions.Fraction(scale) >= limit
            if math.isfinite(square):
                above, below = square.as_integer_ratio()
                total += above * 2**-LOWEST // below
    return [(total >> 32 * place) % 2**32 for place in range(WORDS)] + list(counts.values())


# The words


@given(st.lists(st.integers(0, 2**40), min_size=WORDS, max_size=WORDS))
@example([2**32 - 1] * WORDS)
@example([2**32] * WORDS)
def test_words_are_one_number_with_carries_moved_up_or_not(words):
    total = sum(word * 2 ** (32 * place) for place, word in enumerate(words))
    assert exact_sum.whole(words) == total
    moved = exact_sum.words_of(total % 2 ** (32 * WORDS))
    assert all(0 <= word < 2**32 for word in moved)
    assert exact_sum.whole(moved) == total % 2 ** (32 * WORDS)


@given(st.integers(0, 2**2140), st.integers(0, 2100))
@example(2**53 + 1, 0)  # half way, to the even one below
@example(2**53 + 3, 0)  # and above
@example(2**54 + 2, 1)
@example(2**53 - 1, 0)
@example(2**54 - 1, 0)  # rounds up to a power of two
@example(0, 0)
def test_the_root_rounds_the_sum_once_and_itself_once(total, shift):
    total >>= shift
    assert exact_sum.root(total) == exact_root(total * UNIT)


def test_the_largest_sum_has_a_root_and_room():
    """2⁴⁶ squares, each as large as a float64 can be, fill the words."""
    largest = int(fractions.Fraction(2) ** 1024 / UNIT)
    assert exact_sum.words_of(largest * 2**46 - 1)[-1] < 2**32
    assert exact_sum.root(largest * 2**46) == 2.0 ** ((1024 + 46) // 2)


# What engines measure

# By type: numbers from the smallest to the largest that it holds.
RANGES = {
    torch.float32: (-149, 127),
    torch.bfloat16: (-133, 127),
    torch.float16: (-24, 15),
    torch.float64: (-1074, 1023),
    torch.complex64: (-149, 127),
}


def wide(generator, dtype, size, lowest, spread, zeros):
    """Numbers whose exponents are spread over so many bits from the lowest on; some are zero."""
    real = torch.rand(size, generator=generator, dtype=torch.float64) + 1
    real *= torch.where(torch.rand(size, generator=generator) < 0.5, -1.0, 1.0)
    exponents = lowest + torch.randint(spread + 1, (size,), generator=generator)
    half = exponents // 2  # a power of two that is subnormal is made of two
    real = torch.ldexp(torch.ldexp(real, half), exponents - half)
    real[torch.rand(size, generator=generator) < zeros] = 0
    return torch.complex(real, real.flip(0)).to(dtype) if dtype.is_complex else real.to(dtype)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    sizes=st.lists(st.sampled_from([0, 1, 3, 31, 33, 64, 513, PIECE + 1, 9000]), min_size=1, max_size=4),
    spread=st.sampled_from([0, 2, 12, 22, 40, 60, 200, 2000]),
    zeros=st.sampled_from([0, 0.5, 1]),
    planted=st.lists(st.sampled_from([math.nan, INFINITE, -INFINITE, 1e300, -3e38, 2.0**64, 1e-300]), max_size=3),
    scale=st.sampled_from([1.0, 65_536.0, 3.7, 2.0**-70]),
    batch=st.sampled_from([1, 7, 1000, 1 << 16]),
)
def test_engines_measure_the_exact_sum(seed, sizes, spread, zeros, planted, scale, batch):
    draws, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    params = []
    for size in sizes:
        dtype = draws.choice(list(RANGES))
        lowest, highest = RANGES[dtype]
        own = min(spread, highest - lowest)
        gradient = wide(generator, dtype, size, draws.randint(lowest, highest - own), own, zeros)
        entries = torch.view_as_real(gradient).view(-1) if dtype.is_complex else gradient
        for value in planted if size else ():
            entries[draws.randrange(size)] = torch.tensor(value, dtype=torch.float64)
        params.append(with_gradient(gradient, dtype if dtype.is_complex else draws.choice([dtype, torch.float64])))
    wanted = expected(params, scale)
    assert measured(params, scale, name="reference") == wanted
    for level in LEVELS:
        with engine.cpu.forced_simd_level(level), engine.cpu.forced_batch_elements(batch):
            assert measured(params, scale) == wanted, level


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_sums_that_no_float64_holds(name):
    """Beside a small number, which shows that nothing is lost."""
    gradient = torch.full((3 * PIECE,), 1.3e154, dtype=torch.float64)
    gradient[77] = 1e-160
    params = [with_gradient(gradient), with_gradient(gradient.clone())]
    wanted = expected(params)
    assert wanted[Count.INFINITE] == 0
    assert exact_sum.whole(wanted) * UNIT > 2**1024
    assert measured(params, name=name) == wanted


@pytest.mark.parametrize("name", ["cpu", "reference"])
@pytest.mark.parametrize("step", [1, 2, 5])
def test_each_kind_of_row_has_words_of_its_own(name, step):
    params = [with_gradient(draw(k, (20 * k + 1,)) * 10.0 ** (k % 7)) for k in range(40)]
    kinds = array("i", [k // step % 3 for k in range(40)])
    params[7].grad = None
    params[11].grad[3] = math.nan
    with engine.cpu.forced_batch_elements(500):
        found = measured(params, kinds=kinds, name=name)
    for kind in range(3):
        own = [param for k, param in enumerate(params) if kinds[k] == kind and param.grad is not None]
        assert found[kind * TOTAL_WORDS : (kind + 1) * TOTAL_WORDS] == expected(own)


def test_rows_of_several_engines_are_added():
    params = [with_gradient(draw(k, (300,)) * 10.0 ** (3 * k - 12)) for k in range(8)]
    with two_engines():
        found = measured(params)
    assert exact_sum.whole(found) == exact_sum.whole(expected(params))


@pytest.mark.parametrize("rows", [16, 33, 200])
def test_rows_of_very_different_sizes_beside_each_other(rows):
    """So that windows change from row to row, up and down."""
    generator = torch.Generator().manual_seed(rows)
    params = []
    for k in range(200):
        exponent = int(torch.randint(-60, 60, (), generator=generator))
        params.append(with_gradient(draw(k, (rows,)) * 2.0**exponent))
    wanted = expected(params)
    for level in LEVELS:
        with engine.cpu.forced_simd_level(level):
            assert measured(params) == wanted


def test_ties_in_every_lane_of_a_window():
    """Squares of one value each end in the middle between two multiples of the window's last bit, or close to it."""
    for bits in range(24):
        value = 1.0 + 2.0**-bits
        params = [with_gradient(torch.full((size,), value)) for size in (PIECE - 128, 3 * PIECE, 31)]
        params[1].grad[::7] = 2.0 ** -(bits // 2 + 10)
        wanted = expected(params)
        for level in LEVELS:
            with engine.cpu.forced_simd_level(level):
                assert measured(params) == wanted, bits


# One norm, one step


BOUND = 0.7


def clipped(params, groups=((0, 1),), **options):
    """The norm, and the parameters with their state, in the order of `params`."""
    optimizer = optim.AdamW([{"params": params[begin::step]} for begin, step in groups], max_grad_norm=BOUND, **options)
    for _ in range(2):
        optimizer.step()
    assert optimizer.grad_norm > BOUND
    state = peek(optimizer)
    tensors = [{"param": param.detach()} | state.get(param, {}) for param in params]
    return optimizer.grad_norm.item(), tensors


def model(seed=0, dtype=torch.float32):
    """Parameters with gradients whose sum in float64 would depend on the order by much more than its last bit."""
    shapes = [(40, 30), (33,), (), (7, 5, 3), (1, 5000), (0, 3), (130, 64), (1,)]
    params = [Parameter(draw(seed + k, shape, dtype)) for k, shape in enumerate(shapes)]
    for k, param in enumerate(params):
        param.grad = draw(100 + seed + k, param.shape, dtype) * 10.0 ** (3 * (k % 3) - 4)
    return params


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64], ids=str)
@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_the_order_of_parameters_and_groups_does_not_count(name, dtype):
    with on(name):
        norm, wanted = clipped(model(dtype=dtype))
        for seed, groups in itertools.product(range(3), [((0, 1),), ((0, 2), (1, 2)), ((2, 3), (0, 3), (1, 3))]):
            order = random.Random(seed).sample(range(8), 8)
            params = model(dtype=dtype)
            found_norm, found = clipped([params[k] for k in order], groups)
            assert found_norm == norm
            assert_same(found, [wanted[k] for k in order])


CUTS = {
    "rows": lambda x, k: x.tensor_split([1, 2, 17][: k + 1]),
    "columns": lambda x, k: x.tensor_split([1, 13, 14][: k + 1], dim=-1),
    "anywhere": lambda x, k: x.reshape(-1).tensor_split([1, 57, 58, 641][: k + 1]),
}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_cuts_into_other_parameters_do_not_count(name, cut):
    with on(name):
        norm, wanted = clipped(model())
        for number in range(3):
            parts, sizes = [], []
            for param in model():
                cuts = param.dim() > 0
                pieces = [CUTS[cut](x, number) if cuts else [x] for x in (param.detach(), param.grad)]
                sizes.append(len(pieces[0]))
                for piece, gradient in zip(*pieces, strict=True):
                    parts.append(Parameter(piece.clone()))
                    parts[-1].grad = gradient.clone()
            found_norm, found = clipped(parts)
            assert found_norm == norm
            for size, whole in zip(sizes, wanted, strict=True):
                own, found = found[:size], found[size:]
                dim = whole["param"].dim() - 1 if cut == "columns" else 0
                for key in ("param", "exp_avg", "exp_avg_sq"):
                    joined = torch.cat([row[key] for row in own], dim) if whole[key].dim() else own[0][key]
                    assert same(joined.reshape(whole[key].shape), whole[key]), key


@pytest.mark.parametrize("state_format", ["fp32", "8bit"])
def test_the_layout_does_not_count(state_format):
    """Channels-last, transposed and strided gradients and parameters beside their contiguous twins."""
    shapes = [(67, 65), (64, 3, 9, 5), (130,)]
    found = []
    for lies, gradient_lies in itertools.product(["dense", "other", "strided"], repeat=2):
        params = []
        for k, shape in enumerate(shapes):
            as_told = {"other": ("transposed", "channels-last", "strided")[k]}
            param = Parameter(LIES[as_told.get(lies, lies)](numbers(k, shape, torch.float32)))
            param.grad = LIES[as_told.get(gradient_lies, gradient_lies)](
                numbers(10 + k, shape, torch.float32) * 10.0**k
            )
            params.append(param)
        found.append(clipped(params, state_format=state_format))
    for norm, tensors in found:
        assert norm == found[0][0]
        for row, wanted in zip(tensors, found[0][1], strict=True):
            assert all(torch.equal(canonical(row[key]), canonical(wanted[key])) for key in wanted)


@pytest.mark.parametrize(("dtype", "state_format"), KINDS, ids=str)
def test_engines_clip_to_the_same_bits(dtype, state_format):
    """On gradients of a spread that needs every way of adding squares."""

    def run():
        params = [Parameter(numbers(k, (5000 + 64 * k,), dtype)) for k in range(4)]
        for k, param in enumerate(params):
            param.grad_dtype = None
            kind = (COMPLEX if dtype.is_complex else REALS)[k % 2]
            spread = torch.exp2(draw(k, param.shape) * (12.0 if k == 1 else 4.0))
            param.grad = (numbers(50 + k, param.shape, kind) * spread).to(kind)
        optimizer = optim.AdamW(params, state_format=state_format, max_grad_norm=0.1)
        optimizer.step()
        return optimizer.grad_norm.item(), results(optimizer), exact_sum.norm_in(expected(params), 1.0)

    with on("reference"):
        norm, wanted, exact = run()
    assert norm == exact
    for level, threads in itertools.product(LEVELS, [1, 2]):
        torch.set_num_threads(threads)
        with engine.cpu.forced_simd_level(level), engine.cpu.forced_batch_elements(4000):
            found_norm, found, _ = run()
        assert found_norm == norm
        assert_same(found, wanted, f"{level}, {threads} threads")


def test_squares_are_those_of_the_compute_type():
    """A float64 gradient of a float32 parameter is rounded before it is squared."""
    param = with_gradient(torch.tensor([1 + 2.0**-30], dtype=torch.float64), torch.float32)
    assert squares(param) == [1.0]
    assert measured([param]) == measured([param], name="reference") == expected([param])
