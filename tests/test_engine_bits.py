"""Guards the numerics contract: same inputs, same bits.

The reference engine in torch operations is first held against an independent writing of the contract in numpy
and against exact integer arithmetic; then every SIMD level, thread count, batch size, order and cut of the
parameters, save and resume must give the reference's bits. Numbers run over the whole exponent range, with
subnormals, zeros, infinities and NaN; NaN payloads are outside the contract.
"""

import contextlib
import copy
import io
import itertools
import math
import platform
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import Parameter

import lucid.optim as optim
from bits import World, assert_same, canonical, on, results, same
from lucid import engine
from lucid.engine import reference
from patterns import BATCHES, BETAS, DTYPES, LEVELS, patterns, real, whole_grid

# The reference


def numpy_adamw(theta, g, m, v, w, h):
    """The contract once more, each operation of numpy's in the arrays' own type."""
    t = theta.dtype.type
    one = {key: t(value) for key, value in h._asdict().items()}

    def mean(a, x, beta, rest, host_beta):
        return a + rest * (x - a) if host_beta >= 0.5 else x + beta * (a - x)

    with np.errstate(all="ignore"):
        g = one["f"] * g
        m = mean(m, g, one["beta1"], one["one_minus_beta1"], h.beta1)
        v = mean(v, g * g, one["beta2"], one["one_minus_beta2"], h.beta2)
        w = v if w is None else np.maximum(w, v)
        theta = theta - (one["d"] * theta + (one["k"] * m) / (np.sqrt(w) * one["s"] + one["e"]))
    return theta, m, v, w


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_reference_is_the_contract(dtype, amsgrad):
    generator = torch.Generator().manual_seed(7)
    finite = 0
    for index, (betas, maximize) in enumerate(itertools.product(BETAS, [False, True])):
        theta, g, m, v, w = (patterns(generator, 20_000, dtype) for _ in range(5))
        v, w = v.abs(), w.abs() if amsgrad else None
        h = engine.Scalars.of(
            lr=1e-3,
            beta1=betas[0],
            beta2=betas[1],
            eps=1e-8 * index,
            weight_decay=0.1,
            maximize=maximize,
            factor=(1.0, 0.3)[index % 2],
            step=1.0 + index,
        )
        arrays = [None if x is None else x.numpy() for x in (theta, g, m, v, w)]
        wanted = numpy_adamw(*arrays, h)
        found = reference.adamw(h, theta, g, m, v, w)
        for ours, theirs in zip(found, wanted, strict=True):
            if ours is not None:
                assert same(ours, torch.from_numpy(theirs))
        finite += int(found[0].isfinite().sum())
    assert finite > 0.4 * 12 * 20_000


def test_the_float32_root_is_correctly_rounded():
    """Between its halfway points: one significand in eleven at both parities of exponent, and of the subnormals."""
    for part in torch.arange(0, 2**23, 11, dtype=torch.int32).split(2**17):
        for start in (0, 127 << 23, 128 << 23):
            x = (part + start).view(torch.float32)
            root = reference._square_root(x)
            exact, wide, whole = x.double(), root.double(), root.view(torch.int32)
            above, below = ((whole + k).view(torch.float32).double() for k in (1, -1))
            low, high = (wide + below) / 2, (wide + above) / 2  # 25 bits, so their squares are exact in float64
            assert (((low * low <= exact) & (exact <= high * high)) | ((x == 0) & (root == 0))).all()
    special = torch.tensor([math.inf, -0.0, -1.0, math.nan])
    assert same(
        reference._square_root(special),
        torch.from_numpy(np.sqrt(special.numpy(), where=[1, 1, 0, 0], out=np.full(4, np.nan, np.float32))),
    )


def test_the_float64_root_is_correctly_rounded():
    generator = torch.Generator().manual_seed(0)
    x = patterns(generator, 20_000, torch.float64).abs()
    x = x[x.isfinite() & (x > 0)]
    for number, root in zip(x.tolist(), reference._square_root(x).tolist(), strict=True):
        significand, exponent = math.frexp(root)
        whole = int(significand * 2**54)  # the root in units of half its last place: an even number, rounded to
        scale = 2 * (54 - exponent)
        numerator, denominator = number.as_integer_ratio()
        numerator, denominator = (numerator << scale, denominator) if scale > 0 else (numerator, denominator << -scale)
        assert (whole - 1) ** 2 * denominator <= numerator <= (whole + 1) ** 2 * denominator
    assert len(x) > 15_000


# Every engine, level, thread count and batch size


def test_every_level_that_this_machine_has_is_among_those_forced():
    expected = ["neon"] if platform.machine() in {"aarch64", "arm64", "ARM64"} else ["baseline"]
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    if {"avx2", "fma", "bmi1", "bmi2", "f16c", "movbe"} <= flags:
        expected.append("v3")
        if {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"} <= flags:
            expected.append("v4")
    assert expected == LEVELS
    assert engine.cpu.simd_level() == LEVELS[-1]


@pytest.mark.parametrize("level", LEVELS)
def test_an_override_holds_until_it_ends(level):
    before = engine.cpu.simd_level()
    with contextlib.suppress(KeyError), engine.cpu.forced_simd_level(level):
        assert engine.cpu.simd_level() == level
        raise KeyError
    assert engine.cpu.simd_level() == before
    with pytest.raises(ValueError, match="v9"), engine.cpu.forced_simd_level("v9"):
        pass
    with pytest.raises(ValueError, match="at least 1"), engine.cpu.forced_batch_elements(0):
        pass
    assert engine.cpu.simd_level() == before


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_levels_threads_and_batches_give_the_references_bits(dtype):
    problem = whole_grid(dtype)
    with on("reference"):
        wanted = problem.run()
    for kind in (torch.isnan, torch.isinf, torch.isfinite):
        share = kind(torch.view_as_real(problem.now["param"]) if dtype.is_complex else problem.now["param"])
        assert share.float().mean() > (0.4 if kind is torch.isfinite else 1e-3)
    every = list(itertools.product(LEVELS, [1, 2], BATCHES))
    for level, threads, batch in every if dtype == torch.float32 else every[::3] + every[-1:]:
        torch.set_num_threads(threads)
        with engine.cpu.forced_simd_level(level), engine.cpu.forced_batch_elements(batch):
            found = problem.run()
        for key in wanted:
            assert torch.equal(found[key], wanted[key]), f"{key}: {level}, {threads} threads, batches of {batch}"


@pytest.mark.parametrize("level", LEVELS)
def test_a_large_step_at_the_default_batch_size(level):
    sizes = (3 * 65_536 + 17, 1, 700_001, 65_536)

    def run():
        world = World(shapes=[(size,) for size in sizes], amsgrad=True)
        return results(world.run(2).optimizer)

    with on("reference"):
        wanted = run()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        with engine.cpu.forced_simd_level(level):
            assert_same(run(), wanted, f"{threads} threads")


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_complex_is_two_reals(dtype, engine_name):
    def run(dtype):
        world = World(dtype, amsgrad=True)
        for index, param in enumerate(world.params):
            whole = World.draw(world, index, param.shape)
            param.data = whole
        return world

    whole = run(dtype)
    parts = World(real(dtype), amsgrad=True)
    for param, part in zip(whole.params, parts.params, strict=True):
        part.data = torch.view_as_real(param.detach()).clone()
    with on(engine_name):
        for _ in range(3):
            whole.set_gradients()
            for param, part in zip(whole.params, parts.params, strict=True):
                part.grad = torch.view_as_real(param.grad).clone()
            whole.optimizer.step()
            parts.optimizer.step()
            whole.done += 1
    for ours, theirs in zip(results(whole.optimizer), results(parts.optimizer), strict=True):
        for key in ours:
            assert torch.equal(canonical(ours[key]), canonical(theirs[key])), key


@pytest.mark.parametrize(
    "options",
    [
        {"lr": 1e300},
        {"lr": 1e39, "weight_decay": 1e-39},
        {"lr": 1e-46, "weight_decay": 1e-3},
        {"lr": 1e-42, "weight_decay": 0.0},
        {"lr": 3.4028235677973366e38},  # halfway between the largest float32 and the next
        {"eps": 1e300},
        {"eps": 1e-46},
        {"eps": 7e-46},
        {"weight_decay": 1e300},
        {"betas": (1 - 1e-16, 1 - 1e-16)},
        {"betas": (1e-300, 1e-46)},
        {"betas": (0.5 - 1e-17, 0.5 - 6e-17)},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_hyperparameters_that_a_float32_cannot_hold(dtype, options):
    def run():
        world = World(dtype)
        for group in world.optimizer.param_groups:
            group.update(options)
        return results(world.run(3).optimizer)

    with on("reference"):
        wanted = run()
    for level in LEVELS:
        with engine.cpu.forced_simd_level(level):
            assert_same(run(), wanted, level)


@pytest.mark.parametrize("pair", [(0.0, -0.0), (-0.0, 0.0)])
def test_the_maximum_of_two_zeros(pair):
    def run():
        param = Parameter(torch.ones(37))
        optimizer = optim.AdamW([param], amsgrad=True, eps=0.0)
        optimizer.init_state()
        optimizer.state[param]["max_exp_avg_sq"].fill_(pair[0])
        optimizer.state[param]["exp_avg_sq"].fill_(pair[1])
        param.grad = torch.full((37,), -0.0)
        optimizer.step()
        return results(optimizer)

    with on("reference"):
        wanted = run()
    assert_same(run(), wanted)


# Gradients of another type


def first_means(param_dtype, gradient, options):
    """exp_avg and exp_avg_sq after one step with `gradient`, at β1 = β2 = 0: the gradient itself and its square."""
    param = Parameter(torch.zeros(gradient.shape, dtype=param_dtype))
    param.grad_dtype = None
    param.grad = gradient
    optimizer = optim.AdamW([param], betas=(0.0, 0.0), **options)
    optimizer.step()
    return optimizer.state[param]["exp_avg"], optimizer.state[param]["exp_avg_sq"], param.detach()


@pytest.mark.parametrize("strided", [False, True], ids=["", "strided"])
@pytest.mark.parametrize("level", [*LEVELS, "reference"])
@pytest.mark.parametrize("narrow", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_16_bit_gradient_is_converted_exactly(dtype, narrow, level, strided):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(narrow)
    if narrow == torch.float16:
        with np.errstate(invalid="ignore"):  # arm64 says so of a signalling NaN
            exact = every.view(torch.int16).numpy().view(np.float16).astype(np.float64)
    else:
        exact = (every.view(torch.int16).to(torch.int32) << 16).view(torch.float32).double().numpy()
    exact = torch.from_numpy(exact).to(dtype)
    assert same(exact, every.to(dtype))
    if strided:
        every = torch.stack([every, torch.full_like(every, 3.0)], 1)[:, 0]
    forced = on("reference") if level == "reference" else engine.cpu.forced_simd_level(level)
    with forced:
        narrow_means = first_means(dtype, every, {})
        wide_means = first_means(dtype, exact, {})
    for ours, theirs in zip(narrow_means, wide_means, strict=True):
        assert same(ours, theirs)
    finite = exact.isfinite() & (exact != 0)
    assert torch.equal(narrow_means[0][finite], exact[finite])


@pytest.mark.parametrize("strided", [False, True], ids=["", "strided"])
@pytest.mark.parametrize("level", [*LEVELS, "reference"])
def test_float64_gradients_are_rounded_once_to_float32(level, strided):
    generator = torch.Generator().manual_seed(0)
    narrow = patterns(generator, 30_000, torch.float32)
    narrow = narrow[narrow.isfinite()]
    ulp = (narrow.view(torch.int32) ^ 1).view(torch.float32).double() - narrow.double()
    wide = torch.cat(
        [
            narrow.double() + ulp / 2,  # halfway: to even
            narrow.double() + ulp / 2 * (1 + 2.0**-20),
            narrow.double() + ulp / 2 * (1 - 2.0**-20),
            patterns(generator, 30_000, torch.float64),
            torch.tensor([2.0**-150, 2.0**-149 * 1.5, 2.0**-151, 3.5e38, -3.5e38, 2.0**128 - 2.0**103, math.nan]),
        ]
    )
    with np.errstate(over="ignore", invalid="ignore"):
        exact = torch.from_numpy(wide.numpy().astype(np.float32))
    gradient = torch.stack([wide, wide], 1)[:, 1] if strided else wide
    forced = on("reference") if level == "reference" else engine.cpu.forced_simd_level(level)
    with forced:
        for ours, theirs in zip(
            first_means(torch.float32, gradient, {}), first_means(torch.float32, exact, {}), strict=True
        ):
            assert same(ours, theirs)


# Order, cuts, groups


@pytest.mark.parametrize("seed", range(3))
def test_any_order_of_parameters(seed, engine_name):
    n = 12
    shapes = [(1 + 37 * k,) for k in range(n)]
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()

    def run(order):
        world = World(shapes=shapes)
        optimizer = optim.AdamW([world.params[k] for k in order], amsgrad=True)
        for done in range(4):
            world.done = done
            world.set_gradients()
            if done == 1:
                world.params[3].grad = None
            optimizer.step()
        found = results(optimizer)
        return [found[order.index(k)] for k in range(n)]

    torch.set_num_threads(2)
    with on(engine_name), engine.cpu.forced_batch_elements(100):
        assert_same(run(order), run(list(range(n))))


@pytest.mark.parametrize("cuts", [[1], [1000], [333, 334, 335], [5, 64, 65, 2000], [0, 0, 2999]], ids=str)
def test_one_tensor_or_its_shards(cuts, engine_name):
    generator = torch.Generator().manual_seed(5)
    whole, *gradients = (patterns(generator, 3000, torch.float32) for _ in range(5))

    def run(cuts):
        pieces = [Parameter(piece.clone()) for piece in torch.tensor_split(whole, cuts)]
        optimizer = optim.AdamW(pieces, amsgrad=True)
        for gradient in gradients:
            for param, piece in zip(pieces, torch.tensor_split(gradient, cuts), strict=True):
                param.grad = piece.clone()
            optimizer.step()
        found = results(optimizer)
        keys = ("param", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")
        return [torch.cat([row[key] for row in found]) for key in keys]

    with on(engine_name):
        for ours, theirs in zip(run(cuts), run([]), strict=True):
            assert same(ours, theirs)


def test_step_counts_are_each_parameters_own():
    """Gradients that come late, come and go, and are never there; several groups; many counts in one group."""

    def run(separate):
        world = World(shapes=[(5,)] * 9)
        optimizers = (
            [optim.AdamW([p], lr=0.1) for p in world.params] if separate else [optim.AdamW(world.params, lr=0.1)]
        )
        for done in range(7):
            world.done = done
            world.set_gradients()
            for index, param in enumerate(world.params):
                if index == 8 or done < index - 2 or (index % 3 == 1 and done % 2 == 1):
                    param.grad = None
            for optimizer in optimizers:
                optimizer.step()
        return list(itertools.chain(*map(results, optimizers)))

    together = run(separate=False)
    assert_same(together, run(separate=True))
    with on("reference"):
        assert_same(run(separate=False), together)
    assert [int(row["step"]) for row in together if "step" in row] == [7, 4, 7, 6, 3, 4, 3, 1]
    assert "step" not in together[8]


# Time


@pytest.mark.parametrize("resumed_on", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_saved_and_resumed_at_any_step(dtype, resumed_on, engine_name):
    def world():
        return World(dtype, amsgrad=True)

    with on("reference"):
        wanted = [results(world().run(n).optimizer) for n in range(6)]
    for when in range(5):
        with on(engine_name):
            first = world().run(when)
        saved = io.BytesIO()
        torch.save([first.optimizer.state_dict(), [p.detach() for p in first.params]], saved)
        saved.seek(0)
        state, values = torch.load(saved, weights_only=True)
        second = world()
        second.done = when
        for param, value in zip(second.params, values, strict=True):
            param.data.copy_(value)
        second.optimizer.load_state_dict(state)
        with on(resumed_on):
            for after in range(when + 1, 6):
                assert_same(results(second.run(1).optimizer), wanted[after], f"saved after {when}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_state_made_early_or_late(dtype, engine_name):
    with on(engine_name):
        late = World(dtype, amsgrad=True).run(3)
        early = World(dtype, amsgrad=True)
        early.optimizer.init_state()
        early.run(3)
    assert_same(results(early.optimizer), results(late.optimizer))


def test_engines_may_take_turns():
    with on("reference"):
        wanted = results(World().run(8).optimizer)
    mixed = World()
    for step in range(8):
        level = (*LEVELS, "reference")[step % (len(LEVELS) + 1)]
        with contextlib.ExitStack() as stack:
            stack.enter_context(on("reference") if level == "reference" else engine.cpu.forced_simd_level(level))
            mixed.run(1)
    assert_same(results(mixed.optimizer), wanted)


def test_a_copy_goes_on_with_the_same_bits(engine_name):
    with on(engine_name):
        world = World(amsgrad=True).run(12)
        twin = copy.deepcopy(world).run(3)
        assert_same(results(twin.optimizer), results(world.run(3).optimizer))
