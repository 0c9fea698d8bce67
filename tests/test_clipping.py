"""Guards `max_grad_norm`: the norm, the factor that goes into the update, and the gradients, which stay as they are.

The norm is summed in float64 in one order, so that no thread, SIMD level, batch size or engine changes a bit of it; a
literal loop in that order must give it exactly and `math.fsum` to 1e-13. The factor is held against an independent
writing of torch's rule, and clipped steps against steps with gradients that were scaled by hand and against
`torch.nn.utils.clip_grad_norm_`. What the gradients' memory looks like must not matter to any of it.
"""

import contextlib
import copy
import fractions
import itertools
import math
import pickle

import numpy as np
import pytest
import torch
from torch.nn import Parameter

import lucid.optim as optim
from bits import assert_same, canonical, draw, on, results, same, through_a_file
from lucid import engine
from lucid.optim.values import shown

LEVELS = engine.cpu.simd_levels()
REALS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
COMPLEX = [torch.complex64, torch.complex128]
# float64 and complex parameters keep their moments in full, whatever the format.
KINDS = [
    *itertools.product(REALS[:3], ["fp32", "bf16", "8bit"]),
    *((dtype, "fp32") for dtype in [*REALS[3:], *COMPLEX]),
]
CHUNK, LANES = 4096, 32  # of the sum


@pytest.fixture(autouse=True)
def one_thread(torch_settings):
    """But where threads are what is tested: torch's wait for each other where the machine is busy."""
    torch.set_num_threads(1)


# A world of every size and layout


def channels_last(values):
    return values.contiguous(memory_format=torch.channels_last)


def lazy(values):
    """A view whose numbers are not what its memory says: a conjugate, or the imaginary part of one."""
    if values.is_complex():
        return values.conj().resolve_conj().conj()
    if values.dtype in (torch.float32, torch.float64):
        return torch.complex(torch.zeros_like(values), -values).conj().imag
    return torch._neg_view(-values)  # there is no complex number of two bfloat16


LIES = {
    "dense": lambda values: values.contiguous(),
    "transposed": lambda values: values.t().contiguous().t(),
    "channels-last": channels_last,
    "strided": lambda values: torch.stack([values, torch.full_like(values, math.nan)], -1)[..., 0],
    "lazy": lazy,
    "expanded": lambda values: values.reshape(-1)[:1].reshape(()).expand(values.shape),
}
# Shape, how the parameter lies in memory, how its gradient does; None where it has no gradient.
ROWS = [
    *(((size,), "dense", "dense") for size in (0, 1, 31, 32, 33, 4095, 4096, 4097, 8193, 3 * CHUNK + 5)),
    ((6,), "dense", None),
    ((), "dense", "dense"),
    ((64, 66), "dense", "dense"),
    ((67, 65), "transposed", "transposed"),
    ((67, 65), "transposed", "dense"),
    ((67, 65), "dense", "transposed"),
    ((4, 6, 5, 3), "channels-last", "channels-last"),
    ((4, 6, 5, 3), "channels-last", "dense"),
    ((41, 101), "strided", "dense"),
    ((41, 101), "dense", "strided"),
    ((130,), "strided", "strided"),
    ((33,), "dense", "lazy"),
    ((64, 67), "transposed", "lazy"),
    ((1,), "dense", "lazy"),
    ((9, 8), "dense", "expanded"),
]
SMALL = [row for row in ROWS if math.prod(row[0]) < 500]


def numbers(seed, shape, dtype):
    """Of several orders of magnitude, all of which every dtype can hold."""
    spread = torch.randint(-3, 2, shape, generator=torch.Generator().manual_seed(seed + 100_000))
    return (draw(seed, shape, dtype if dtype.is_complex else torch.float32) * 10.0**spread).to(dtype)


class Mixed:
    """Parameters of all rows in three groups; gradients of every dtype that they may have in turn."""

    OPTIONS = (
        {"lr": 0.01},
        {"lr": 0.03, "amsgrad": True},
        {"maximize": True, "betas": (0.4, 0.95), "master_weights": False},
    )

    def __init__(self, dtype=torch.float32, state_format="fp32", rows=ROWS, gradients=None, names=None, **options):
        self.lies = [row for start in range(3) for row in rows[start::3]]
        self.params = [
            Parameter(LIES[lies](numbers(index, shape, dtype))) for index, (shape, lies, _) in enumerate(self.lies)
        ]
        left = iter(self.params if names is None else zip(names, self.params, strict=False))
        groups = [
            {"params": list(itertools.islice(left, len(rows[start::3])))} | own
            for start, own in enumerate(self.OPTIONS)
        ]
        self.optimizer = optim.AdamW(groups, state_format=state_format, **options)
        self.gradients = gradients or (COMPLEX if dtype.is_complex else REALS)
        self.done = 0

    def set_gradients(self, change=lambda param, gradient: gradient):
        for index, (param, (shape, _, lies)) in enumerate(zip(self.params, self.lies, strict=True)):
            param.grad_dtype = None  # so that it takes any
            if lies is not None:
                dtype = self.gradients[(index + self.done) % len(self.gradients)]
                param.grad = change(param, LIES[lies](numbers(1000 * (self.done + 1) + index, shape, dtype)))
        self.done += 1

    def step(self, max_grad_norm=None):
        self.set_gradients()
        self.optimizer.max_grad_norm = max_grad_norm
        self.optimizer.step()
        return self.optimizer.grad_norm


def compute_type(param):
    return torch.float64 if param.dtype in (torch.float64, torch.complex128) else torch.float32


def used(param):
    """The gradient as real numbers in the compute type, in logical order; each rounded once by numpy."""
    gradient = param.grad.detach().resolve_conj().resolve_neg()
    gradient = torch.view_as_real(gradient) if gradient.is_complex() else gradient
    gradient = gradient.float() if gradient.dtype in (torch.bfloat16, torch.float16) else gradient
    narrow = np.float64 if compute_type(param) == torch.float64 else np.float32
    with np.errstate(over="ignore", invalid="ignore"):
        return gradient.contiguous().numpy().astype(narrow)


# The norm


def squares(param):
    return [x * x for x in used(param).astype(np.float64).reshape(-1).tolist()]


def in_memory_order(param, values):
    """Of `param`, which need not be contiguous."""
    shape, strides = list(param.shape), list(param.stride())
    if param.is_complex():
        shape, strides = [*shape, 2], [2 * stride for stride in strides] + [1]
    where = sum(np.indices(shape)[dim] * stride for dim, stride in enumerate(strides)) if shape else np.zeros(())
    return [values[k] for k in np.argsort(np.asarray(where).reshape(-1), kind="stable").tolist()]


def in_order(values):
    """The sum as documented: chunks into lanes, lanes by halves, and the sums of chunks again."""
    while len(values) > 1:
        sums = []
        for begin in range(0, len(values), CHUNK):
            lanes = [0.0] * LANES
            for index, value in enumerate(values[begin : begin + CHUNK]):
                lanes[index % LANES] += value
            half = LANES // 2
            while half:
                for lane in range(half):
                    lanes[lane] += lanes[lane + half]
                half //= 2
            sums.append(lanes[0])
        values = sums
    return values[0] if values else 0.0


def in_walked_order(param, entry, values):
    """As they are summed: what is drawn or encoded is walked through row by row, all else as it lies in memory."""
    return values if "stream" in entry else in_memory_order(param, values)


def uneven(seed, shape, dtype):
    """Two large numbers in each chunk, beside which the others are lost one by one, but not together.

    So the sum depends on its order by far more than a norm would hide.
    """
    generator = torch.Generator().manual_seed(seed)
    size = math.prod(shape) * (2 if dtype.is_complex else 1)
    values = torch.full((size,), 2.0**-17, dtype=torch.float64)
    for begin in range(0, size, CHUNK):
        where = begin + torch.randint(min(CHUNK, size - begin), (2,), generator=generator)
        values[where] = 1024.0 + torch.randint(8, (2,), generator=generator).double() * 64
    return (torch.view_as_complex(values.view(-1, 2)) if dtype.is_complex else values).to(dtype).view(shape)


@pytest.mark.parametrize(("dtype", "state_format"), KINDS, ids=str)
def test_each_gradients_norm_is_the_documented_sum(dtype, state_format):
    told = 0
    kinds = itertools.cycle(COMPLEX if dtype.is_complex else REALS)
    for index, ((shape, lies, gradient_lies), kind) in enumerate(zip(ROWS, kinds, strict=False)):
        if gradient_lies is None:
            continue
        param = Parameter(LIES[lies](numbers(index, shape, dtype)))
        param.grad_dtype = None
        param.grad = LIES[gradient_lies](uneven(index, shape, kind))
        optimizer = optim.AdamW([param], state_format=state_format, max_grad_norm=math.inf)
        optimizer.init_state()
        values = squares(param)
        wanted = math.sqrt(in_order(in_walked_order(param, optimizer.state[param], values)))
        others = (math.sqrt(in_order(order)) for order in (values, values[::-1], in_memory_order(param, values)))
        told += any(other != wanted for other in others)
        for name in (*LEVELS, "reference"):
            with on(name) if name == "reference" else engine.cpu.forced_simd_level(name):
                optimizer.step()
            assert optimizer.grad_norm.item() == wanted, (name, ROWS[index], kind)
    assert told > 8  # in another order it would be another


@pytest.mark.parametrize(("dtype", "state_format"), KINDS, ids=str)
def test_the_norm_of_all_gradients(dtype, state_format, engine_name):
    """That of the sums of each, summed alike, in the order of the groups."""
    all_sizes = engine_name != "cuda" or (dtype, state_format) in (KINDS[0], KINDS[5])
    world = Mixed(dtype, state_format, ROWS if all_sizes else SMALL)
    with on(engine_name):
        found = world.step(math.inf)
    rows = [param for param in world.params if param.grad is not None]
    each = [in_walked_order(param, world.optimizer.state[param], squares(param)) for param in rows]
    assert found.item() == math.sqrt(in_order([in_order(values) for values in each]))
    exact = math.sqrt(math.fsum(itertools.chain(*each)))
    assert abs(found.item() - exact) <= 1e-13 * exact
    assert (found.dtype, found.shape, found.device.type) == (torch.float64, (), "cpu")


@pytest.mark.parametrize("engine_name", ["cpu", "reference"])  # test_cuda_bits has as many sums, without their rows
def test_the_order_of_parameters_counts(engine_name):
    """Of 640 with one entry, each lane has 20. One is large: where it comes first in its lane, the others are lost."""
    gradients = [9e-6] * 640
    gradients[3] = 1024.0
    norms = []
    for order in (gradients, gradients[::-1]):
        params = [Parameter(torch.zeros(1, dtype=torch.float64)) for _ in order]
        for param, gradient in zip(params, order, strict=True):
            param.grad = torch.tensor([gradient], dtype=torch.float64)
        optimizer = optim.AdamW(params, max_grad_norm=math.inf)
        with on(engine_name):
            optimizer.step()
        norms.append(optimizer.grad_norm.item())
        assert norms[-1] == math.sqrt(in_order([x * x for x in order]))
    assert norms[0] != norms[1]


def test_more_parameters_than_a_chunk():
    """Their sums are chunked again."""
    params = [Parameter(x) for x in draw(0, (CHUNK + 50, 2))]
    for param, gradient in zip(params, draw(1, (CHUNK + 50, 2)), strict=True):
        param.grad = gradient
    optimizer = optim.AdamW(params, max_grad_norm=math.inf)
    optimizer.step()
    assert optimizer.grad_norm.item() == math.sqrt(in_order([in_order(squares(param)) for param in params]))


@pytest.mark.parametrize("flush", [False, True])
def test_the_norm_of_subnormal_gradients(flush):
    gradient = draw(0, (1000,)) * 1e-40
    param = Parameter(torch.zeros(1000))
    param.grad = gradient
    optimizer = optim.AdamW([param], max_grad_norm=math.inf)
    exact = math.sqrt(math.fsum(squares(param)))
    torch.set_flush_denormal(flush)
    optimizer.step()
    assert optimizer.grad_norm.item() == pytest.approx(exact, rel=1e-13, abs=0)


# One result everywhere

BOUNDS = [0.5, math.inf, 1e30, 0.01]


def clipped_run(dtype, state_format, rows=ROWS):
    world = Mixed(dtype, state_format, rows)
    norms = [world.step(bound).item() for bound in BOUNDS]
    return results(world.optimizer), norms


@pytest.mark.parametrize(("dtype", "state_format"), KINDS, ids=str)
def test_levels_threads_and_batches_give_the_references_bits(dtype, state_format):
    with on("reference"):
        wanted, norms = clipped_run(dtype, state_format)
    assert all(norm > max(bound for bound in BOUNDS if bound < 1) for norm in norms)  # so that it is clipped
    every = list(itertools.product(LEVELS, [1, 2], [1000, 2 * CHUNK, 1 << 16]))
    number = KINDS.index((dtype, state_format))
    for level, threads, batch in every if number == 0 else every[number % 6 :: 6]:
        torch.set_num_threads(threads)
        with engine.cpu.forced_simd_level(level), engine.cpu.forced_batch_elements(batch):
            found, own_norms = clipped_run(dtype, state_format)
        what = f"{level}, {threads} threads, batches of {batch}"
        assert own_norms == norms, what
        assert_same(found, wanted, what)


@pytest.mark.parametrize("batch", [1, 7, 100])
def test_tiny_batches(batch):
    with on("reference"):
        wanted, norms = clipped_run(torch.float32, "fp32", SMALL)
    torch.set_num_threads(2)
    with engine.cpu.forced_batch_elements(batch):
        found, own_norms = clipped_run(torch.float32, "fp32", SMALL)
    assert own_norms == norms
    assert_same(found, wanted)


def test_large_gradients_are_read_by_several_threads():
    """And without the interpreter's lock."""

    def run():
        params = [Parameter(draw(k, (size,))) for k, size in enumerate((3 * 65_536 + 17, 400_001))]
        optimizer = optim.AdamW(params, max_grad_norm=3.0)
        for k, param in enumerate(params):
            param.grad = draw(10 + k, param.shape)
        optimizer.step()
        return results(optimizer), optimizer.grad_norm.item()

    with on("reference"):
        wanted, norm = run()
    for level, threads in itertools.product(LEVELS, (1, 2)):
        torch.set_num_threads(threads)
        with engine.cpu.forced_simd_level(level):
            found, own_norm = run()
        assert own_norm == norm
        assert_same(found, wanted, f"{level}, {threads} threads")


@contextlib.contextmanager
def two_engines():
    """Every other row on the reference engine, as where parameters are on several devices."""
    native = engine.Plan.bind
    numbers_taken = set()

    def bind(plan, row):
        if row.index % 2 == 0:
            native(plan, row)
        else:
            plan._rows.append(row)
            numbers_taken.add(row.index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.Plan, "bind", bind)
        yield
    assert numbers_taken


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
def test_rows_of_several_engines_have_one_norm(dtype):
    with on("reference"):
        wanted, norms = clipped_run(dtype, "8bit")
    with two_engines():
        found, own_norms = clipped_run(dtype, "8bit")
    assert own_norms == norms
    assert_same(found, wanted)


# The factor


def expected_factor(norm, bound, scale):
    """The factor of ``torch.nn.utils.clip_grad_norm_``, unscaled, each operation exact and rounded once to float64."""

    def rounded(number):
        return fractions.Fraction(float(number))  # Fraction to float rounds correctly

    clip = fractions.Fraction(1)
    if bound is not None and bound != math.inf:
        room = rounded(fractions.Fraction(norm) + fractions.Fraction(1e-6))
        clip = min(clip, rounded(fractions.Fraction(bound) / room))
    return float(rounded(clip / fractions.Fraction(scale)))


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_factor_is_torchs_and_rounds_once(dtype, maximize, engine_name):
    """With β of 0 the first moment is the gradient as it was used."""
    param = Parameter(torch.zeros(3, dtype=dtype))
    optimizer = optim.AdamW([param], betas=(0.0, 0.0), maximize=maximize)
    generator = torch.Generator().manual_seed(5)
    clipped, times = 0, 30 if engine_name == "cuda" else 150
    for number in range(times):
        exponent, distance = (torch.rand(2, generator=generator) * 2 - 1).tolist()
        param.grad = draw(number, (3,), dtype) * 10 ** (7 * exponent)
        scale = (1.0, 65_536.0, 3.7, 1e-3)[number % 4]
        norm = math.sqrt(in_order(squares(param))) / scale
        bound = None if number % 10 == 9 else float(norm * 10**distance)
        optimizer.max_grad_norm, optimizer.grad_scale = bound, torch.tensor(scale, dtype=torch.float64)
        factor = expected_factor(norm, bound, scale)
        with on(engine_name):
            optimizer.step()
        numbers = param.grad.numpy()
        wanted = numbers * numbers.dtype.type(factor)
        assert same(optimizer.state[param]["exp_avg"], torch.from_numpy(-wanted if maximize else wanted)), number
        assert bound is None or optimizer.grad_norm.item() == norm
        clipped += factor != 1 / scale
    assert times / 3 < clipped < times * 2 / 3


def test_a_norm_at_the_bound_is_not_clipped(engine_name):
    """The bound counts from norm + 1e-6 on; one float64 below that it clips, by less than a float32 could show."""
    gradient = torch.tensor([0.6, -0.8, 1.0], dtype=torch.float64)
    param = Parameter(torch.zeros(3, dtype=torch.float64))
    param.grad = gradient
    edge = math.sqrt(in_order(squares(param))) + 1e-6
    for bound, wanted in ((edge, gradient), (math.nextafter(edge, 0), gradient * (1 - 2**-53))):
        optimizer = optim.AdamW([param], betas=(0.0, 0.0), max_grad_norm=bound)
        with on(engine_name):
            optimizer.step()
        assert torch.equal(optimizer.state[param]["exp_avg"], wanted)
    assert not torch.equal(wanted, gradient)


def test_the_1e_6_beside_the_norm_shows_at_tiny_norms(engine_name):
    for norm, bound, factor in ((1e-6, 1e-7, 0.05), (1e-6, 1.5e-6, 0.75), (1e-6, 2.1e-6, 1.0), (0.0, 1e-7, 0.1)):
        params = [Parameter(torch.zeros(1, dtype=torch.float64)) for _ in range(2)]
        for param in params:
            param.grad = torch.tensor([norm], dtype=torch.float64)
        optimizer = optim.AdamW(params[:1], betas=(0.0, 0.0), max_grad_norm=bound)
        with on(engine_name):
            optimizer.step()
        torch.nn.utils.clip_grad_norm_(params[1:], bound)
        for wanted in (norm * factor, params[1].grad.item()):
            assert optimizer.state[params[0]]["exp_avg"].item() == pytest.approx(wanted, rel=1e-14, abs=0)


@pytest.mark.parametrize(("dtype", "state_format"), KINDS, ids=str)
def test_a_clipped_step_is_one_with_gradients_scaled_by_hand(dtype, state_format):
    """Each number rounded once to the compute type: what multiplying gradients of 16 bits in place would not give."""
    ours, by_hand = Mixed(dtype, state_format), Mixed(dtype, state_format)
    for bound in BOUNDS:
        factor = expected_factor(ours.step(bound).item(), bound, 1.0)
        assert (factor < 1) == (bound < 1)

        def scaled(param, gradient, factor=factor):
            param.grad = gradient
            values = used(param)
            values = torch.tensor(values * values.dtype.type(factor))
            return torch.complex(values[..., 0], values[..., 1]) if param.is_complex() else values

        by_hand.set_gradients(scaled)
        by_hand.optimizer.step()
        assert_same(results(ours.optimizer), results(by_hand.optimizer), f"bound {bound}")


@pytest.mark.parametrize(("dtype", "state_format"), KINDS, ids=str)
def test_a_bound_that_is_not_reached_changes_no_bit(dtype, state_format, engine_name):
    rows = ROWS if engine_name == "cpu" else SMALL
    found = []
    with on(engine_name):
        for bound in (None, 1e30, math.inf):
            world = Mixed(dtype, state_format, rows)
            norms = [world.step(bound) for _ in range(2)]
            found.append(results(world.optimizer))
            assert [norm is None for norm in norms] == [bound is None] * 2
    assert_same(found[1], found[0])
    assert_same(found[2], found[0])


# As torch clips


def relative_distance(left, right):
    left, right = (x.detach().to(torch.complex128).reshape(-1) for x in (left, right))
    return float((left - right).norm() / right.norm()) if right.numel() and right.norm() else 0.0


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64], ids=str)
def test_the_same_as_clip_grad_norm_and_a_step(dtype, foreach, engine_name):
    """To 1e-6 of each tensor, which torch's own norm just keeps: of many complex64 numbers it is worse."""
    rows = SMALL if dtype == torch.complex64 or engine_name == "cuda" else ROWS
    ours, theirs = (Mixed(dtype, rows=rows, gradients=[dtype]) for _ in range(2))
    with on(engine_name):
        for step in range(4):
            norm = ours.step((0.5, 1e30)[step == 2])
            theirs.set_gradients(lambda param, gradient: gradient.clone())
            wanted = torch.nn.utils.clip_grad_norm_(theirs.params, (0.5, 1e30)[step == 2], foreach=foreach)
            theirs.optimizer.step()
            assert norm.item() == pytest.approx(wanted.item(), rel=1e-6)
            for left, right in zip(results(ours.optimizer), results(theirs.optimizer), strict=True):
                for key in left:
                    assert relative_distance(left[key], right[key]) < 1e-6, (step, key)


def test_the_same_as_clip_grad_norm_and_torchs_adamw(engine_name):
    """In float64, where both rules and norms are right to some 1e-15 a step: after 20 steps to 1e-12."""
    shapes = [(50, 40), (33,), (), (7, 5, 3), (4099,)]
    ours, theirs = ([Parameter(draw(k, shape, torch.float64)) for k, shape in enumerate(shapes)] for _ in range(2))
    options = {"lr": 1e-2, "weight_decay": 0.1, "amsgrad": True}
    one = optim.AdamW(ours, max_grad_norm=2.0, **options)
    other = torch.optim.AdamW(theirs, **options)
    norms = []
    for step in range(5 if engine_name == "cuda" else 20):
        for k, (left, right) in enumerate(zip(ours, theirs, strict=True)):
            gradient = draw(100 * step + k, left.shape, torch.float64) * 10.0 ** (step % 3 - 2)
            left.grad, right.grad = gradient, gradient.clone()
        with on(engine_name):
            one.step()
        norms.append(torch.nn.utils.clip_grad_norm_(theirs, 2.0).item())
        other.step()
        assert one.grad_norm.item() == pytest.approx(norms[-1], rel=1e-13)
    for left, right in zip(ours, theirs, strict=True):
        assert relative_distance(left, right) < 1e-12
    assert min(norms) < 1 < 20 < max(norms)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_norm_that_is_not_finite_does_what_torchs_does(bad, engine_name):
    """NaN: everything becomes NaN. Infinite: finite gradients count as 0 and infinite ones become NaN."""
    found = []
    with on(engine_name):
        for clips in (True, False):
            params = [Parameter(draw(k, (40,))) for k in range(3)]
            optimizer = optim.AdamW(params, max_grad_norm=1.0 if clips else None)
            for step in range(2):
                for k, param in enumerate(params):
                    param.grad = draw(10 * step + k, (40,))
                params[1].grad[17] = bad if step else 1.0
                if not clips:
                    torch.nn.utils.clip_grad_norm_(params, 1.0)
                optimizer.step()
            if clips:
                assert same(optimizer.grad_norm, torch.tensor(abs(bad), dtype=torch.float64))
            found.append(results(optimizer))
    for left, right in zip(*found, strict=True):  # but for the finite step before the bad one, where factors may differ
        for key in left:
            assert torch.equal(left[key].isnan(), right[key].isnan())
            assert torch.allclose(left[key], right[key], rtol=1e-6, atol=0, equal_nan=True)
    lost = torch.stack([row["param"].isnan() for row in found[0]])
    assert lost.all() if math.isnan(bad) else lost.nonzero().tolist() == [[1, 17]]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_infinite_bound_only_measures(bad, engine_name):
    """Whatever it measures: here torch, which divides infinity by it, makes every parameter NaN."""
    found = []
    for bound in (None, math.inf):
        params = [Parameter(draw(k, (40,))) for k in range(2)]
        optimizer = optim.AdamW(params, max_grad_norm=bound)
        for k, param in enumerate(params):
            param.grad = draw(10 + k, (40,))
        params[0].grad[3] = bad
        with on(engine_name):
            optimizer.step()
        found.append(results(optimizer))
        assert bound is None or same(optimizer.grad_norm, torch.tensor(bad, dtype=torch.float64))
    assert_same(*found)
    assert int(found[1][0]["param"].isnan().sum()) == 1
    assert found[1][1]["param"].isfinite().all()


# Gradients stay


@pytest.mark.parametrize(("dtype", "state_format"), KINDS, ids=str)
def test_gradients_are_not_written(dtype, state_format, engine_name):
    world = Mixed(dtype, state_format, ROWS if engine_name == "cpu" else SMALL)
    for _ in range(2):
        world.set_gradients()
        world.optimizer.max_grad_norm = 0.01
        gradients = [param.grad for param in world.params]
        before = [
            None if g is None else (canonical(g), g._version, g.data_ptr(), g.stride(), g.is_conj(), g.is_neg())
            for g in gradients
        ]
        with on(engine_name):
            world.optimizer.step()
        assert world.optimizer.grad_norm > 1
        for param, gradient, known in zip(world.params, gradients, before, strict=True):
            assert param.grad is gradient
            if gradient is not None:
                assert torch.equal(canonical(gradient), known[0])
                assert known[1:] == (
                    gradient._version,
                    gradient.data_ptr(),
                    gradient.stride(),
                    gradient.is_conj(),
                    gradient.is_neg(),
                )


# Gradients that a scale has been put on


@pytest.mark.parametrize("bound", [None, 0.5, 1e30])
def test_scaled_gradients_are_unscaled_in_the_same_pass(bound, engine_name):
    """By a power of two, which changes no bit of the result: the norm is that of the gradients without it."""
    found, norms = [], []
    for scale in (None, 2.0**-7, 1024.0):
        world = Mixed(rows=SMALL, gradients=[torch.float32])
        world.optimizer.max_grad_norm = bound
        world.optimizer.grad_scale = None if scale is None else torch.tensor(scale)
        for _ in range(2):
            world.set_gradients(lambda param, gradient, scale=scale: gradient * (scale or 1.0))
            with on(engine_name):
                world.optimizer.step()
        norms.append(world.optimizer.grad_norm)
        found.append(results(world.optimizer))
    assert_same(found[1], found[0])
    assert_same(found[2], found[0])
    assert norms[0] == norms[1] == norms[2]
    assert (norms[0] is None) == (bound is None)


# The option


def one_step(optimizer, value=3.0):
    (param,) = optimizer.param_groups[0]["params"]
    param.grad = torch.full_like(param, value)
    optimizer.step()


def single(**options):
    return optim.AdamW([Parameter(torch.ones(1))], **options)


def test_grad_norm_is_that_of_the_last_step_or_none(engine_name):
    optimizer = single()
    assert optimizer.max_grad_norm is None
    assert optimizer.grad_norm is None
    with on(engine_name):
        one_step(optimizer)
        assert optimizer.grad_norm is None
        optimizer.max_grad_norm = 1
        assert (optimizer.max_grad_norm, type(optimizer.max_grad_norm)) == (1.0, float)
        assert optimizer.grad_norm is None
        one_step(optimizer, 3.0)
        optimizer.grad_norm.fill_(99.0)  # it is nobody's but the caller's
        assert optimizer.grad_norm == 3.0
        one_step(optimizer, -5.0)
        assert optimizer.grad_norm == 5.0
        optimizer.zero_grad()
        optimizer.step()
        assert optimizer.grad_norm == 0.0
        optimizer.max_grad_norm = None
        one_step(optimizer)
        assert optimizer.grad_norm is None


@pytest.mark.parametrize("nonfinite", ["skip", "error"])
def test_grad_norm_is_known_where_gradients_are_read_for_another_reason(nonfinite, engine_name):
    optimizer = single(nonfinite=nonfinite)
    with on(engine_name):
        one_step(optimizer, -3.0)
        assert optimizer.grad_norm == 3.0
        optimizer.nonfinite = "propagate"
        one_step(optimizer)
    assert optimizer.grad_norm is None


def test_a_step_that_fails_keeps_the_last_norm():
    optimizer = single(max_grad_norm=1.0)
    one_step(optimizer, 3.0)
    optimizer.param_groups[0]["lr"] = -1.0
    with pytest.raises(ValueError, match="lr"):
        one_step(optimizer, 4.0)
    assert optimizer.grad_norm == 3.0


def test_the_bound_may_change_between_steps(engine_name):
    """And is the optimizer's, not a group's: one norm of all groups together."""
    bounds = [None, 0.5, math.inf, 0.5, 1e-3, None]
    world, twin = Mixed(rows=SMALL), Mixed(rows=SMALL)
    with on(engine_name):
        for bound in bounds:
            norm = world.step(bound)
            twin.set_gradients()
            gradients = [torch.from_numpy(used(param)).double() for param in twin.params if param.grad is not None]
            whole = torch.cat([g.reshape(-1) for g in gradients]).norm().item()
            assert norm is None if bound is None else norm.item() == pytest.approx(whole, rel=1e-13)
            twin.optimizer.max_grad_norm = bound
            twin.optimizer.step()
            twin.optimizer = copy.deepcopy(twin.optimizer)
            twin.params = [param for group in twin.optimizer.param_groups for param in group["params"]]
    assert_same(results(world.optimizer), results(twin.optimizer))


BAD = {
    "0": (0, ValueError),
    "0.0": (0.0, ValueError),
    "negative": (-1.0, ValueError),
    "below all floats": (-(10**400), ValueError),
    "negative infinity": (-math.inf, ValueError),
    "NaN": (math.nan, ValueError),
    "bool": (True, TypeError),
    "str": ("1.0", TypeError),
    "tensor": (torch.tensor(1.0), TypeError),
    "list": ([1.0], TypeError),
    "complex": (1j, TypeError),
}


@pytest.mark.parametrize(("value", "error"), BAD.values(), ids=BAD.keys())
def test_bad_bounds_are_refused(value, error):
    with pytest.raises(error, match=r"max_grad_norm: expected None(, | or )a number.*got ") as caught:
        single(max_grad_norm=value)
    assert shown(value) in str(caught.value)
    optimizer = single(max_grad_norm=2.0)
    with pytest.raises(error, match="max_grad_norm"):
        optimizer.max_grad_norm = value
    assert optimizer.max_grad_norm == 2.0


@pytest.mark.parametrize("value", [1, 0.25, np.float32(0.25), np.int64(3), fractions.Fraction(1, 4), 5e-324, math.inf])
def test_any_number_above_0_is_a_bound(value):
    optimizer = single(max_grad_norm=value)
    assert optimizer.max_grad_norm == float(value)
    one_step(optimizer)
    assert optimizer.grad_norm == 3.0


def test_the_norm_cannot_be_set():
    with pytest.raises(AttributeError):
        single().grad_norm = torch.tensor(1.0)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, copy.copy, lambda x: pickle.loads(pickle.dumps(x))],
    ids=["deepcopy", "copy", "pickle"],
)
def test_copies_keep_the_bound(copied):
    optimizer = single(max_grad_norm=0.5)
    one_step(optimizer)
    twin = copied(optimizer)
    assert twin.max_grad_norm == 0.5
    one_step(optimizer)
    one_step(twin)
    assert twin.grad_norm == optimizer.grad_norm == 3.0
    if copied is not copy.copy:  # that shares what it copies
        assert_same(results(twin), results(optimizer))
        twin.max_grad_norm = None
        assert optimizer.max_grad_norm == 0.5


def keys_of(state_dict):
    groups = state_dict["param_groups"]
    return [*state_dict, *(key for group in groups for key in group), *map(sorted, state_dict["state"].values())]


def test_checkpoints_know_nothing_of_it():
    plain, clipping = single(), single(max_grad_norm=0.5, nonfinite="skip")
    for optimizer in (plain, clipping):
        one_step(optimizer)
    assert keys_of(clipping.state_dict()) == keys_of(plain.state_dict())
    assert clipping.state_dict().keys() == {"state", "param_groups"}
    for word in ("norm", "nonfinite", "skip"):
        assert word not in str(clipping.state_dict())
    assert keys_of(clipping.torch_state_dict()) == keys_of(plain.torch_state_dict())
    assert clipping.param_groups[0].keys() == plain.param_groups[0].keys()
    assert clipping.defaults.keys() == plain.defaults.keys()
    plain.load_state_dict(through_a_file(clipping.state_dict()))
    assert (plain.max_grad_norm, plain.nonfinite) == (None, "propagate")
    clipping.load_state_dict(through_a_file(plain.state_dict()))
    assert (clipping.max_grad_norm, clipping.nonfinite) == (0.5, "skip")
    clipping.load_state_dict(torch.optim.AdamW([Parameter(torch.ones(1))]).state_dict())
    assert (clipping.max_grad_norm, clipping.nonfinite) == (0.5, "skip")


def test_a_group_has_no_bound_of_its_own():
    """Unknown keys are kept and do nothing, as torch's optimizers have it."""
    optimizer = optim.AdamW([{"params": [Parameter(torch.ones(1))], "max_grad_norm": 1e-9}], betas=(0.0, 0.0))
    one_step(optimizer)
    (entry,) = optimizer.state.values()
    assert entry["exp_avg"].item() == 3.0
