"""Guards `max_grad_norm`: the norm, the factor that goes into the update, and the gradients, which stay as they are.

The norm is that of the exact sum, so that no thread, SIMD level, batch size or engine changes a bit of it;
`test_exact_norm.py` has more of that. The factor is held against an independent writing of torch's rule, and clipped
steps against steps with gradients that were scaled by hand and against `torch.nn.utils.clip_grad_norm_`. What the
gradients' memory looks like must not matter to any of it.
"""

import itertools
import math

import pytest
import torch
from torch.nn import Parameter

import lucid.optim as optim
from bits import assert_same, canonical, draw, on, results, same
from gradients import (
    COMPLEX,
    KINDS,
    LEVELS,
    LIES,
    REALS,
    ROWS,
    SMALL,
    Mixed,
    exact_norm,
    expected_factor,
    numbers,
    squares,
    two_engines,
    uneven,
    used,
)
from lucid import engine

# The norm


@pytest.mark.parametrize(("dtype", "state_format"), KINDS, ids=str)
def test_each_gradients_norm_is_exact(dtype, state_format):
    told = 0
    kinds = itertools.cycle(COMPLEX if dtype.is_complex else REALS)
    for index, ((shape, lies, gradient_lies), kind) in enumerate(zip(ROWS, kinds, strict=False)):
        if gradient_lies is None:
            continue
        param = Parameter(LIES[lies](numbers(index, shape, dtype)))
        param.grad_dtype = None
        param.grad = LIES[gradient_lies](uneven(index, shape, kind))
        optimizer = optim.AdamW([param], state_format=state_format, max_grad_norm=math.inf)
        values = squares(param)
        wanted = exact_norm(values)
        told += math.sqrt(sum(values)) != wanted
        for name in (*LEVELS, "reference"):
            with on(name) if name == "reference" else engine.cpu.forced_simd_level(name):
                optimizer.step()
            assert optimizer.grad_norm.item() == wanted, (name, ROWS[index], kind)
    assert told > 8  # a sum in float64 would be another


@pytest.mark.parametrize(("dtype", "state_format"), KINDS, ids=str)
def test_the_norm_of_all_gradients(dtype, state_format, engine_name):
    all_sizes = engine_name != "cuda" or (dtype, state_format) in (KINDS[0], KINDS[5])
    world = Mixed(dtype, state_format, ROWS if all_sizes else SMALL)
    with on(engine_name):
        found = world.step(math.inf)
    every = [squares(param) for param in world.params if param.grad is not None]
    assert found.item() == exact_norm(itertools.chain(*every))
    assert (found.dtype, found.shape, found.device.type) == (torch.float64, (), "cpu")


@pytest.mark.parametrize("flush", [False, True])
def test_the_norm_of_subnormal_gradients(flush):
    gradient = draw(0, (1000,)) * 1e-40
    param = Parameter(torch.zeros(1000))
    param.grad = gradient
    optimizer = optim.AdamW([param], max_grad_norm=math.inf)
    exact = exact_norm(squares(param))
    torch.set_flush_denormal(flush)
    optimizer.step()
    assert optimizer.grad_norm.item() == exact


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
    every = list(itertools.product(LEVELS, [1, 2], [1000, 8192, 1 << 16]))
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
def test_rows_of_several_engines_have_one_norm(dtype):
    with on("reference"):
        wanted, norms = clipped_run(dtype, "8bit")
    with two_engines():
        found, own_norms = clipped_run(dtype, "8bit")
    assert own_norms == norms
    assert_same(found, wanted)


# The factor


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
        norm = exact_norm(squares(param), scale)
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
    edge = exact_norm(squares(param)) + 1e-6
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
