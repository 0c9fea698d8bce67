"""Guards the state formats: what is kept for which parameter, and that it depends on nothing but the training.

Which parameters are quantized and under which keys their state lies is a promise to every checkpoint tool. The bits
must not depend on engine, threads, batches, order, layout, saving and resuming, or on anyone else's random numbers.
What is stored over thousands of steps is in test_formats_drift.py, what is refused in test_formats_refused.py.
"""

import copy
import io
import itertools
import math
import pickle
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import Parameter

import lucid.optim as optim
from bits import assert_same, draw, on, peek, results
from formats import (
    CODED,
    DTYPES,
    FORMATS,
    MATRIX,
    MOMENTS,
    SMALL_FORMATS,
    World,
    bits_of,
    entry_of,
    raw,
    step_any_format_in_any_layout,
)
from lucid import engine
from quick import examples

# What is kept


@pytest.mark.parametrize(
    ("shape", "quantized"),
    [
        ((64, 64), True),
        ((4096, 1), False),  # its rows are short
        ((1, 4096), True),
        ((65, 63), False),
        ((63, 65), False),  # 4,095 elements
        ((4096,), False),
        ((1 << 16,), False),
        ((64, 8, 8), True),
        ((64, 7, 9), False),  # 4,032 elements
        ((66, 7, 9), False),  # rows of 63
        ((8, 64, 8, 1), True),
        ((2, 4096), True),
        ((4096, 64), True),
        ((0, 128), False),
        ((128, 0), False),
        ((), False),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_which_parameters_are_quantized(shape, quantized, dtype):
    keys = entry_of(Parameter(torch.zeros(shape, dtype=dtype)), state_format="8bit").keys()
    keys = set(keys) - {"step", "residual", "master"}
    assert keys == (CODED | {"stream"} if quantized else MOMENTS)
    entry = entry_of(Parameter(torch.zeros(shape, dtype=dtype)), state_format="bf16")  # whatever the size
    assert {entry[key].dtype for key in MOMENTS} == {torch.bfloat16}
    assert "stream" in entry


def test_codes_pay_only_where_dims_are_two():
    """The rule looks at the whole shape; the strides do not matter."""
    for strided in (torch.zeros(80, 64).t(), torch.zeros(64, 160)[:, ::2], torch.zeros(1, 1).expand(64, 80).clone()):
        assert "exp_avg_code" in entry_of(Parameter(strided), state_format="8bit")


def expected(shape, dtype, state_format, master_weights, amsgrad):
    """What section "State formats" of the documentation says: key, dtype, shape."""
    full = {torch.float64: torch.float64, torch.complex64: torch.complex64}.get(dtype, torch.float32)
    slots = {"step": (torch.float32, ())}
    if full != torch.float32 or state_format == "fp32" or (state_format == "8bit" and len(shape) < 2):
        slots |= dict.fromkeys(("exp_avg", "exp_avg_sq"), (full, shape))
    elif state_format == "bf16":
        slots |= dict.fromkeys(("exp_avg", "exp_avg_sq"), (torch.bfloat16, shape)) | {"stream": (torch.int64, ())}
    else:
        scales = (torch.float32, (shape[0], math.ceil(math.prod(shape[1:]) / 128)))
        for key in ("exp_avg", "exp_avg_sq"):
            slots |= {f"{key}_code": (torch.uint8, shape), f"{key}_scale": scales}
        slots["stream"] = (torch.int64, ())
    if dtype == torch.bfloat16 and master_weights:
        slots["residual"] = (torch.bfloat16, shape)
    if dtype == torch.float16 and master_weights:
        slots["master"] = (torch.float32, shape)
    if amsgrad:
        slots["max_exp_avg_sq"] = (full, shape)
    return slots


@pytest.mark.parametrize("lazily", [False, True], ids=["init_state", "first step"])
@pytest.mark.parametrize("state_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_keys_dtypes_and_shapes(dtype, state_format, lazily):
    for shape, master_weights, amsgrad in itertools.product(
        [(64, 80), (40, 4, 33), (5000,)], [True, False], [True, False]
    ):
        param = Parameter(torch.ones(shape, dtype=dtype))
        options = {"state_format": state_format, "master_weights": master_weights, "amsgrad": amsgrad}
        optimizer = optim.AdamW([param], **options)
        if lazily:
            param.grad = torch.ones_like(param)
            optimizer.step()
        else:
            optimizer.init_state()
        entry = optimizer.state[param]
        found = {key: (value.dtype, tuple(value.shape)) for key, value in entry.items()}
        assert list(found) == list(expected(shape, dtype, **options))
        assert found == expected(shape, dtype, **options)
        assert all(type(value) is torch.Tensor and not value.requires_grad for value in entry.values())
        assert optimizer.state_dict()["state"][0].keys() == entry.keys()


@pytest.mark.parametrize("stop", [False, True], ids=["made", "stepped"])
def test_codes_are_in_logical_order_whatever_the_parameters_strides(stop, engine_name):
    layouts = {
        "transposed": draw(0, (80, 64)).t(),
        "channels-last": draw(0, (64, 8, 3, 3)).contiguous(memory_format=torch.channels_last),
        "strided": draw(0, (64, 160))[:, ::2],
    }
    for name, view in layouts.items():
        for state_format in SMALL_FORMATS:
            param = Parameter(view)
            optimizer = optim.AdamW([param], state_format=state_format)
            optimizer.init_state()
            if stop:
                param.grad = torch.ones_like(param)
                with on(engine_name):
                    optimizer.step()
            entry = optimizer.state[param]
            for key in CODED & entry.keys():
                assert entry[key].is_contiguous(), name
            for key in MOMENTS & entry.keys():  # what is not encoded has the parameter's order in memory
                assert entry[key].stride() == torch.empty_like(param).stride(), name


def test_formats_are_options_of_groups(engine_name):
    shapes = [MATRIX, (64, 128), (64, 64), (9,)]
    params = [Parameter(draw(k, shape)) for k, shape in enumerate(shapes)]
    twins = [Parameter(param.detach().clone()) for param in params]
    formats = ["fp32", "bf16", "8bit", "8bit"]
    together = optim.AdamW([{"params": [p], "state_format": f} for p, f in zip(params, formats, strict=True)])
    alone = [
        optim.AdamW([{"params": q, "state_format": f} for q in twins[: k + 1]]) for k, f in enumerate(formats)
    ]  # the number over all groups tells the streams apart
    with on(engine_name):
        for step in range(3):
            for number, (param, twin) in enumerate(zip(params, twins, strict=True)):
                param.grad = draw(100 * step + number, param.shape)
                for other in twins:
                    other.grad = None
                twin.grad = param.grad.clone()
                alone[number].step()
            together.step()
    for param, twin, optimizer in zip(params, twins, alone, strict=True):
        assert_same(
            raw([peek(together)[param] | {"p": param.detach()}]), raw([peek(optimizer)[twin] | {"p": twin.detach()}])
        )
    assert [set(peek(together)[p]) & {"exp_avg", "exp_avg_code"} for p in params] == [
        {"exp_avg"},
        {"exp_avg"},
        {"exp_avg_code"},
        {"exp_avg"},
    ]


def test_frozen_parameters_get_no_state():
    params = [Parameter(torch.ones(MATRIX), requires_grad=k != 1) for k in range(3)]
    for state_format in FORMATS:
        optimizer = optim.AdamW(params, state_format=state_format)
        optimizer.init_state()
        assert [param in optimizer.state for param in params] == [True, False, True]


@pytest.mark.parametrize(
    ("columns", "state_format", "per_param"),
    [
        (128, "fp32", 8),
        (128, "bf16", 4),
        (128, "8bit", 2.0625),
        (1024, "8bit", 2.0625),
        (64, "8bit", 2.125),  # the worst
        (129, "8bit", 2 + 16 / 129),
        (96, "8bit", 2 + 8 / 96),
    ],
)
def test_bytes_of_state_are_as_documented(columns, state_format, per_param):
    for dtype, more in ((torch.float32, 0), (torch.bfloat16, 2), (torch.float16, 4)):
        for amsgrad in (False, True):
            param = Parameter(torch.zeros(64, columns, dtype=dtype))
            entry = entry_of(param, state_format=state_format, amsgrad=amsgrad)
            held = sum(x.untyped_storage().nbytes() for key, x in entry.items() if key not in ("step", "stream"))
            assert held / param.numel() == pytest.approx(per_param + more + 4 * amsgrad, rel=1e-12)
            assert held / param.numel() <= per_param + more + 4 * amsgrad
            bare = entry_of(param, state_format=state_format, amsgrad=amsgrad, master_weights=False)
            assert sum(x.nbytes for k, x in bare.items() if k not in ("step", "stream")) == held - more * param.numel()


# The same bits


@pytest.mark.parametrize("state_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_engines_threads_and_batches_give_the_same_bits(dtype, state_format):
    steps = 4
    with on("reference"):
        wanted = World(dtype, state_format=state_format).run(steps).bits()
    cases = itertools.product(engine.cpu.simd_levels(), [1, 2], [1, 7, 64, 1000, 1 << 16])
    for level, threads, batch in list(cases)[:: 1 if dtype in (torch.float32, torch.bfloat16) else 4]:
        torch.set_num_threads(threads)
        with engine.cpu.forced_simd_level(level), engine.cpu.forced_batch_elements(batch):
            found = World(dtype, state_format=state_format).run(steps).bits()
        assert_same(found, wanted, f"{level}, {threads} threads, batches of {batch}")


@settings(max_examples=examples(70), deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_any_layout_of_parameter_gradient_and_state(data):
    step_any_format_in_any_layout(data, ["cpu", "cpu", "cpu", "reference"])


@pytest.mark.parametrize("state_format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_parameters_on_the_same_memory_are_updated_one_after_the_other(dtype, state_format):
    def run():
        memory = draw(0, MATRIX).to(dtype)
        params = [Parameter(memory) for _ in range(2)]
        optimizer = optim.AdamW(params, state_format=state_format)
        for step in range(3):
            for number, param in enumerate(params):
                param.grad = draw(10 * step + number, MATRIX).to(dtype)
            optimizer.step()
        return bits_of(optimizer)

    with on("reference"):
        wanted = run()
    assert_same(run(), wanted)


@pytest.mark.parametrize("state_format", SMALL_FORMATS)
def test_named_parameters_in_any_order(state_format, engine_name):
    names = list(World.layouts(torch.float32))
    orders = [names, [*names[2::2], *names[1::2], names[0]]]
    with on(engine_name):
        one, two = (World(order=order, state_format=state_format) for order in orders)
        for world in (one, two):
            for group in world.optimizer.param_groups:
                group["amsgrad"] = False
            world.run(3)
    assert_same(one.bits(), two.bits())


@pytest.mark.parametrize("state_format", SMALL_FORMATS)
def test_unnamed_parameters_are_known_by_their_number_over_all_groups(state_format):
    def run(cut):
        params = [Parameter(draw(k, MATRIX)) for k in range(3)]
        optimizer = optim.AdamW([{"params": params[:cut]}, {"params": params[cut:]}], state_format=state_format)
        for param in params:
            param.grad = draw(9, MATRIX)
        optimizer.step()
        return optimizer

    one, two = run(1), run(2)
    assert_same(bits_of(one), bits_of(two))
    streams = [int(entry["stream"]) for entry in one.state.values()]
    assert len(set(streams)) == 3


@pytest.mark.parametrize("state_format", SMALL_FORMATS)
def test_replicas_are_equal_and_seeds_differ(state_format, engine_name):
    with on(engine_name):
        one, two, other = (World(state_format=state_format, seed=seed).run(1) for seed in (5, 5, 6))
        exact = World(state_format="fp32", seed=5).run(1)
    assert_same(one.bits(), two.bits())
    for a, b in zip(one.bits(), other.bits(), strict=True):
        keys = {"exp_avg_code", "exp_avg_sq_code"} & a.keys() or (MOMENTS & a.keys() if "stream" in a else set())
        for key in keys:
            if a[key].numel() > 1000:
                assert 0.1 < (a[key] != b[key]).float().mean() < 0.9
                # Each draw rounds up or down: neighbours of the same number.
                gap = (a[key].int() - b[key].int()).abs()
                assert (gap <= 1).all()
    assert_same(exact.bits(), World(state_format="fp32", seed=6).run(1).bits())


@pytest.mark.parametrize("state_format", SMALL_FORMATS)
def test_roundings_do_not_repeat_from_step_to_step_or_parameter_to_parameter(state_format):
    """The same numbers at every element of every step, rounded up or down as drawn.

    Over steps each element's draws are independent; neighbours' are over steps, while in one step they hang together.
    """
    steps = 1000
    params = [Parameter(torch.zeros(64, 128)) for _ in range(2)]
    optimizer = optim.AdamW(params, state_format=state_format, betas=(0.0, 0.0))
    gradient = torch.full((64, 128), 1.324)
    gradient[:, 0] = 3.0  # the largest of its block
    key = "exp_avg_code" if state_format == "8bit" else "exp_avg"
    stored = torch.empty(steps, 2, 64, 127, dtype=torch.uint8)
    for step in range(steps):
        for param in params:
            param.grad = gradient
        optimizer.step()
        for number, param in enumerate(params):
            stored[step, number] = (
                raw([peek(optimizer)[param]])[0][key][:, 1:]
                .contiguous()
                .view(torch.uint8)[:, :: 1 if state_format == "8bit" else 2]
            )
    assert int(stored.max()) - int(stored.min()) == 1
    up = (stored - stored.min()).float()
    share = up.mean().item()
    assert 0.4 < share < 0.6
    assert (up.mean(0) - share).abs().max() < 6 * 0.5 / math.sqrt(steps)
    off = (up - share) / math.sqrt(share * (1 - share))
    pairs = {
        "steps": (off[1:], off[:-1]),
        "parameters": (off[:, 0], off[:, 1]),
        "columns": (off[..., 1:], off[..., :-1]),
        "rows": (off[:, :, 1:], off[:, :, :-1]),
    }
    for what, (one, two) in pairs.items():
        assert abs((one * two).mean().item()) < 0.1, what


@pytest.mark.parametrize("state_format", SMALL_FORMATS)
def test_no_global_generator_is_touched(state_format, engine_name):
    before = torch.get_rng_state().clone(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    with on(engine_name):
        world = World(torch.bfloat16, state_format=state_format)
        world.optimizer.init_state()
        world.run(2).optimizer.load_state_dict(world.optimizer.state_dict())
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert (np.random.get_state()[1] == before[2]).all()  # noqa: NPY002


@pytest.mark.parametrize("state_format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_saved_and_resumed_after_every_step(dtype, state_format):
    wanted = World(dtype, state_format=state_format)
    for when in range(5):
        saved = io.BytesIO()
        values = [param.detach() for param in wanted.named.values()]
        torch.save([wanted.optimizer.state_dict(), values], saved)
        saved.seek(0)
        state, values = torch.load(saved, weights_only=True)
        other = World(dtype, state_format=state_format, seed=99)  # the seed is in the checkpoint
        for param, value in zip(other.named.values(), values, strict=True):
            param.data.copy_(value)
        other.optimizer.load_state_dict(state)
        other.done = when
        wanted.step()
        with on("reference" if when % 2 else "cpu"):
            other.step()
        assert_same(other.bits(), wanted.bits(), f"saved after {when}")
        assert other.optimizer.param_groups[0]["seed"] == 0


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
@pytest.mark.parametrize("state_format", SMALL_FORMATS)
def test_copies_go_on_with_the_same_bits(state_format, way):
    world = World(torch.bfloat16, state_format=state_format).run(12)
    twin = copy.deepcopy(world) if way == "deepcopy" else pickle.loads(pickle.dumps(world))
    assert_same(twin.run(2).bits(), world.run(2).bits())
    assert twin.optimizer.state is not world.optimizer.state


@pytest.mark.parametrize("state_format", SMALL_FORMATS)
def test_state_made_early_or_late(state_format, engine_name):
    with on(engine_name):
        late = World(torch.bfloat16, state_format=state_format).run(3)
        early = World(torch.bfloat16, state_format=state_format)
        early.optimizer.init_state()
        early.run(3)
    assert_same(early.bits(), late.bits())


def test_the_stream_is_fixed_when_state_is_created():
    """Neither another seed, nor other names or numbers later on change it; it is the same in every process."""
    params = [Parameter(draw(k, MATRIX)) for k in range(2)]
    optimizer = optim.AdamW([("a", params[0]), ("b", params[1])], state_format="8bit", seed=3)
    optimizer.init_state()
    streams = [int(optimizer.state[param]["stream"]) for param in params]
    optimizer.param_groups[0]["seed"] = 4
    optimizer.param_groups[0]["param_names"] = ["c", "d"]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert [int(optimizer.state[param]["stream"]) for param in params] == streams
    unnamed = optim.AdamW(params[::-1], state_format="bf16")
    unnamed.init_state()
    assert streams == [-6036419060685799914, -3363980360809668831]
    assert [int(unnamed.state[param]["stream"]) for param in params] == [-410956273188943891, -8238398240822429403]


def test_format_options_change_nothing_where_they_do_not_apply():
    """Vectors and float64 train under every format as under fp32."""

    def run(state_format, seed):
        params = [Parameter(draw(0, (300,))), Parameter(draw(1, MATRIX, torch.float64)), Parameter(draw(2, (60, 60)))]
        optimizer = optim.AdamW(params, state_format=state_format, seed=seed)
        for step in range(3):
            for param in params:
                param.grad = draw(step, param.shape, param.dtype)
            optimizer.step()
        return results(optimizer)

    assert_same(run("8bit", 0), run("fp32", 1))
