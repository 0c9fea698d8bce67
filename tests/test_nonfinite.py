"""Guards that `nonfinite` finds each gradient that is not finite, or whose square is not, and no other one.

One NaN poisons the moments for good, and what looks at sums of squares may overlook it at the end of a vector or of a
chunk, in another layout, or beside an infinity. Here it is put at first, last, random and, for small tensors, all
positions of gradients of every dtype and layout. A step that was good must not be left out: the limits are tried from
both sides, unscaled, scaled and clipped. What comes of it is in test_nonfinite_steps.py.
"""

import itertools
import math

import pytest
import torch
from torch.nn import Parameter

import lucid.optim as optim
from bits import assert_same, draw, on, peek, results, same, snapshot
from gradients import COMPLEX, KINDS, REALS, ROWS, SMALL, Mixed
from lucid import engine
from spoiled import FEW, LEVELS, bad_values, reals_in, single, spoilable, with_entry

# Nothing bad is overlooked


@pytest.mark.parametrize(("dtype", "state_format"), KINDS, ids=str)
def test_in_every_dtype_and_layout_at_first_last_and_random_positions(dtype, state_format, engine_name):
    rows = {"cpu": ROWS, "reference": FEW[-5:]}.get(engine_name, FEW[-7:-4])  # whose sums are short
    world = Mixed(dtype, state_format, rows, nonfinite="skip")
    generator = torch.Generator().manual_seed(3)
    tried = 0
    with on(engine_name):
        world.step()
        for _ in range(1 if engine_name == "cuda" else len(world.gradients)):
            world.set_gradients()
            before = snapshot(world.optimizer)
            for index in spoilable(world):
                param, lies = world.params[index], world.lies[index][2]
                good = param.grad
                last = reals_in(good) - 1
                values = bad_values(param, good.dtype)
                for where in {0, last, int(torch.randint(last + 1, (), generator=generator))}:
                    param.grad = with_entry(good, lies, where, values[tried % len(values)])
                    tried += 1
                    world.optimizer.step()
                    assert world.optimizer.skipped_steps == tried, (world.lies[index], where, good.dtype)
                param.grad = good
            assert snapshot(world.optimizer) == before
    assert tried > {"cpu": 100, "reference": 15}.get(engine_name, 5)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [*REALS, *COMPLEX], ids=str)
def test_at_every_position_of_a_small_tensor(dtype, level):
    tried = 0
    for size in (*range(1, 18), 33) if dtype.is_complex else (*range(1, 34), 65):
        optimizer = single(draw(size, (size,), dtype), nonfinite="skip")
        ((param,),) = (group["params"] for group in optimizer.param_groups)
        before = snapshot(optimizer)
        values = itertools.cycle(bad_values(param, dtype.to_real() if dtype.is_complex else dtype))
        reals = torch.view_as_real(param.grad).view(-1) if dtype.is_complex else param.grad
        with engine.cpu.forced_simd_level(level):
            for where, value in zip(range(len(reals)), values, strict=False):
                kept, reals[where] = reals[where].clone(), value
                optimizer.step()
                assert optimizer.skipped_steps == where + 1, (size, where, value)
                reals[where] = kept
                tried += 1
        assert snapshot(optimizer) == before
    assert tried == (2 * 186 if dtype.is_complex else 626)


@pytest.mark.parametrize("nonfinite", ["skip", "error"])
def test_in_the_last_of_300_small_parameters(nonfinite, engine_name):
    params = [Parameter(draw(k, (k % 7 + 1,))) for k in range(300)]
    for k, param in enumerate(params):
        param.grad = draw(1000 + k, param.shape)
    optimizer = optim.AdamW(params, nonfinite=nonfinite)
    params[-1].grad[-1] = math.inf
    before = snapshot(optimizer)
    with on(engine_name):
        if nonfinite == "error":
            with pytest.raises(FloatingPointError, match=r"parameter 299 of group 0 has 1 infinite of 6 entries"):
                optimizer.step()
        else:
            optimizer.step()
    assert optimizer.skipped_steps == (nonfinite == "skip")
    assert snapshot(optimizer) == before


def test_opposite_infinities_do_not_cancel(engine_name):
    """Nor do NaN in one parameter and an infinity in another."""
    for first, second in ((math.inf, -math.inf), (math.nan, math.inf), (1e30, -1e30)):
        params = [Parameter(torch.zeros(9)) for _ in range(2)]
        for param, value in zip(params, (first, second), strict=True):
            param.grad = torch.full((9,), value)
        optimizer = optim.AdamW(params, nonfinite="skip")
        with on(engine_name):
            optimizer.step()
        assert optimizer.skipped_steps == 1
        assert not peek(optimizer)


# Nothing good is left out


def largest_below(limit, dtype):
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    return (torch.tensor([limit], dtype=dtype).view(bits) - 1).view(dtype).item()


CASES = {  # dtype of the parameter, of its gradient, the least value that is bad and the largest that is good
    "float32": (torch.float32, torch.float32, 2.0**64, 2.0**64 - 2.0**40),
    "float32 in float64": (torch.float32, torch.float64, 2.0**64 - 2.0**39, 2.0**64 - 2.0**39 - 2.0**11),
    "float32 in bfloat16": (torch.float32, torch.bfloat16, 2.0**64, 2.0**64 - 2.0**56),
    "bfloat16": (torch.bfloat16, torch.bfloat16, 2.0**64, 2.0**64 - 2.0**56),
    "float16 in float32": (torch.float16, torch.float32, 2.0**64, 2.0**64 - 2.0**40),
    "complex64": (torch.complex64, torch.complex64, 2.0**64, 2.0**64 - 2.0**40),
    "complex64 in complex128": (torch.complex64, torch.complex128, 2.0**64 - 2.0**39, 2.0**64 - 2.0**39 - 2.0**11),
    "float64": (torch.float64, torch.float64, 2.0**512, 2.0**512 - 2.0**459),
    "complex128": (torch.complex128, torch.complex128, 2.0**512, 2.0**512 - 2.0**459),
}


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("dtype", "gradient_dtype", "bad", "good"), CASES.values(), ids=CASES.keys())
def test_the_limit_is_where_the_square_overflows(dtype, gradient_dtype, bad, good, sign, engine_name):
    real = gradient_dtype.to_real() if gradient_dtype.is_complex else gradient_dtype
    assert good == largest_below(bad, real) or gradient_dtype != dtype
    for value, skipped in ((bad, 1), (good, 0)):
        gradient = draw(1, (37,), gradient_dtype)
        entries = torch.view_as_real(gradient).view(-1) if dtype.is_complex else gradient
        entries[20] = sign * value
        param = draw(0, (37,), dtype)
        optimizer = single(gradient, param.clone(), nonfinite="skip")
        with on(engine_name):
            optimizer.step()
        assert optimizer.skipped_steps == skipped
        entry = results(optimizer)[0]
        if skipped:
            assert same(entry["param"], param)
            assert not peek(optimizer)
        else:
            twin = single(gradient, param.clone())
            with on(engine_name):
                twin.step()
            assert_same(results(optimizer), results(twin))
            for key in ("param", "exp_avg", "exp_avg_sq"):
                assert entry[key].isfinite().all()


def test_a_float32_gradient_of_a_float64_parameter_is_never_too_large(engine_name):
    optimizer = single(torch.full((40,), torch.finfo(torch.float32).max), torch.zeros(40).double(), nonfinite="error")
    with on(engine_name):
        optimizer.step()
    assert results(optimizer)[0]["exp_avg_sq"].isfinite().all()


def test_many_gradients_just_below_the_limit(engine_name):
    """The sum of their squares is far above a float32, each is not."""
    params = [Parameter(torch.zeros(3000)) for _ in range(3)]
    for param in params:
        param.grad = torch.full((3000,), 2.0**64 - 2.0**40)
    optimizer = optim.AdamW(params, nonfinite="error")
    with on(engine_name):
        optimizer.step()
    for row in results(optimizer):
        assert row["exp_avg_sq"].isfinite().all()


def test_squares_whose_sum_a_float64_cannot_hold():
    """Each square is finite, and so is the norm."""
    gradient = torch.full((5,), 2.0**511, dtype=torch.float64)
    for bound in (None, 1.0, math.inf):
        optimizer = single(gradient, nonfinite="error", max_grad_norm=bound)
        optimizer.step()
        assert bound is None or optimizer.grad_norm.item() == 2.0**511 * math.sqrt(5)
        assert bound != 1 or optimizer.state[optimizer.param_groups[0]["params"][0]]["exp_avg"].sum() < 1


def test_a_norm_that_overflows_when_it_is_unscaled():
    scale = torch.tensor(2.0**-520, dtype=torch.float64)
    for bound in (None, 1.0):
        optimizer = single(torch.full((5,), 2.0**511, dtype=torch.float64), nonfinite="error", max_grad_norm=bound)
        optimizer.grad_scale = scale
        said = "norm overflows float64" if bound else "5 too large to be squared"
        with pytest.raises(FloatingPointError, match=said):
            optimizer.step()
        optimizer.nonfinite, optimizer.grad_scale = "skip", scale
        optimizer.step()
        assert optimizer.skipped_steps == 1
        assert not peek(optimizer)


# dtype, the huge entry, the bound of the norm, whether the clipped entry is small enough
CLIPPED = [
    (torch.float32, 2.0**70, 1.0, True),
    (torch.float32, -3e38, 1e18, True),
    (torch.float32, 2.0**70, 2.0**65, False),
    (torch.float32, 2.0**70, math.inf, False),
    (torch.float32, math.inf, 1.0, False),
    (torch.float32, math.nan, 1.0, False),
    (torch.bfloat16, 3e38, 1.0, True),
    (torch.bfloat16, 2.0**70, 2.0**66, False),
    (torch.complex64, 2.0**100, 1e-3, True),
    (torch.float64, 2.0**511, 1.0, True),
    (torch.float64, 2.0**513, 1.0, False),  # its norm is infinite
]


@pytest.mark.parametrize(("dtype", "huge", "bound", "good"), CLIPPED, ids=str)
def test_what_clipping_makes_of_a_huge_gradient_counts(dtype, huge, bound, good, engine_name):
    gradient = with_entry(draw(1, (37,), dtype), "dense", 11, huge)
    param = draw(0, (37,), dtype)
    optimizer = single(gradient, param.clone(), nonfinite="skip", max_grad_norm=bound)
    with on(engine_name):
        optimizer.step()
    assert optimizer.skipped_steps == (not good)
    found = results(optimizer)
    twin = single(gradient, param.clone(), max_grad_norm=bound)
    if good:
        with on(engine_name):
            twin.step()
        assert all(value.isfinite().all() for key, value in found[0].items() if key != "residual")
    assert_same(found, results(twin))


@pytest.mark.parametrize("scale", [2.0**-20, 2.0**16, 2.0**40])
def test_what_unscaling_makes_of_a_huge_gradient_counts(scale, engine_name):
    for value, skipped in ((2.0**64, 1), (2.0**64 - 2.0**40, 0)):
        optimizer = single(torch.full((21,), value * scale), nonfinite="skip")
        optimizer.grad_scale = torch.tensor(scale)
        with on(engine_name):
            optimizer.step()
        assert optimizer.skipped_steps == skipped
        assert not skipped or not peek(optimizer)


@pytest.mark.parametrize(("dtype", "state_format"), KINDS, ids=str)
def test_good_steps_are_those_of_propagate(dtype, state_format, engine_name):
    nonfinite = ("skip", "error")[KINDS.index((dtype, state_format)) % 2]
    rows = ROWS if engine_name == "cpu" else SMALL
    worlds = [Mixed(dtype, state_format, rows, nonfinite=option) for option in ("propagate", nonfinite)]
    with on(engine_name):
        for _, world in itertools.product(range(2), worlds):
            world.step()
    assert worlds[1].optimizer.skipped_steps == 0
    assert_same(*(results(world.optimizer) for world in worlds))


@pytest.mark.parametrize("nonfinite", ["skip", "error"])
def test_no_gradient_or_an_empty_one_is_not_bad(nonfinite, engine_name):
    optimizer = single(torch.zeros(0, 3), nonfinite=nonfinite)
    with on(engine_name):
        optimizer.step()
        optimizer.zero_grad()
        optimizer.step()
    assert optimizer.skipped_steps == 0
    assert results(optimizer)[0]["step"] == 1
