"""Guards the state formats: what is kept for which parameter, and that fewer bits train without a bias.

Which parameters are quantized and under which keys their state lies is a promise to every checkpoint tool. The bits
must not depend on engine, threads, batches, order, layout, saving and resuming, or on anyone else's random numbers.
And over thousands of steps what is stored must neither drift nor freeze, whatever the size of the gradients.
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
from bits import assert_same, draw, on, peek, results, snapshot
from lucid import engine
from lucid.engine import codecs
from lucid.engine.shards import WHOLE

HALVES = (torch.bfloat16, torch.float16)
FORMATS = ["fp32", "bf16", "8bit"]
SMALL_FORMATS = ["bf16", "8bit"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64]
MOMENTS = {"exp_avg", "exp_avg_sq"}
CODED = {"exp_avg_code", "exp_avg_scale", "exp_avg_sq_code", "exp_avg_sq_scale"}
MATRIX = (64, 80)  # quantized


@pytest.fixture(autouse=True)
def one_thread(torch_settings):
    """Threads of torch's wait for each other where the machine is busy; tests of threads set their own."""
    torch.set_num_threads(1)


def raw(rows):
    """`results` with 16-bit numbers as bits, among them residuals, whose bits are no numbers."""
    return [{key: x.view(torch.int16) if x.dtype in HALVES else x for key, x in row.items()} for row in rows]


def bits_of(optimizer):
    return raw(results(optimizer))


def entry_of(param, **options):
    """The state that is made for a parameter."""
    optimizer = optim.AdamW([param], **options)
    optimizer.init_state()
    return optimizer.state[param]


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


class World:
    """Parameters of every layout, in one dtype; gradients depend on the step's number only."""

    def __init__(self, dtype=torch.float32, order=None, **options):
        self.named = {name: Parameter(view) for name, view in self.layouts(dtype).items()}
        names = list(self.named) if order is None else order
        groups = [[(name, self.named[name]) for name in part] for part in (names[::2], names[1::2])]
        self.optimizer = optim.AdamW(
            [{"params": groups[0]}, {"params": groups[1], "amsgrad": True}], lr=0.01, **options
        )
        self.done = 0

    @staticmethod
    def layouts(dtype):
        return {
            "contiguous": draw(0, MATRIX).to(dtype),
            "transposed": draw(1, (80, 64)).to(dtype).t(),
            "channels-last": draw(2, (64, 8, 3, 3)).to(dtype).contiguous(memory_format=torch.channels_last),
            "strided": draw(3, (35, 400)).to(dtype)[2:, 1:390:3],
            "wide": draw(4, (3, 2000)).to(dtype),
            "vector": draw(5, (131,)).to(dtype),
            "small": draw(6, (5, 7)).to(dtype).t(),
            "0-dim": draw(7, ()).to(dtype),
            "empty": draw(8, (0, 70)).to(dtype),
        }

    def step(self):
        for index, (_, param) in enumerate(sorted(self.named.items())):
            param.grad_dtype = None
            param.grad = draw(1000 + 100 * self.done + index, param.shape).to(param.dtype) * 10.0 ** (self.done % 5 - 3)
        self.optimizer.step()
        self.done += 1

    def run(self, steps):
        for _ in range(steps):
            self.step()
        return self

    def bits(self):
        state = peek(self.optimizer)
        return raw(
            [{"param": p.detach().clone()} | {k: x.clone() for k, x in state[p].items()} for p in self.named.values()]
        )


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


@st.composite
def laid_out(draw_from, values):
    """A view with `values` whose dimensions lie in any order, elements apart; and the buffer around it."""
    order = draw_from(st.permutations(range(values.dim())))
    gaps = [draw_from(st.tuples(st.sampled_from([1, 1, 2, 3]), st.integers(0, 2))) for _ in order]
    base = torch.full([gaps[k][1] + values.shape[k] * gaps[k][0] for k in order], 7.0).to(values.dtype)
    view = base
    for dim, k in enumerate(order):
        view = view.narrow(dim, gaps[k][1], values.shape[k] * gaps[k][0])[
            (slice(None),) * dim + (slice(None, None, gaps[k][0]),)
        ]
    view = view.permute([order.index(k) for k in range(len(order))])
    view.copy_(values)
    return view, base


def step_in_any_layout(data, names):
    """The bits of contiguous copies on the reference, and nothing written around."""
    shapes = [(64, 64), (33, 131), (2, 3000), (64, 9, 11), (8, 2, 4, 70), (5, 7), (3, 2, 4), (19,), (), (0, 4)]
    shape = data.draw(st.sampled_from(shapes))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    gradient_dtype = data.draw(st.sampled_from([dtype, torch.float32, torch.float64, torch.bfloat16, torch.float16]))
    options = {
        "state_format": data.draw(st.sampled_from(FORMATS)),
        "master_weights": data.draw(st.booleans()),
        "amsgrad": data.draw(st.booleans()),
        "betas": data.draw(st.sampled_from([(0.9, 0.999), (0.3, 0.4)])),
        "maximize": data.draw(st.booleans()),
    }
    start = draw(0, shape).to(dtype)
    gradients = [(draw(50 + k, shape) * 10.0 ** (k - 1)).to(gradient_dtype) for k in range(3)]

    def run(view, gradients, move=None):
        param = Parameter(view)
        param.grad_dtype = None
        optimizer = optim.AdamW([param], **options)
        optimizer.init_state()
        if move is not None:
            move(optimizer.state[param])
        for gradient in gradients:
            param.grad = gradient
            optimizer.step()
        assert param.data_ptr() == view.data_ptr()
        return bits_of(optimizer)

    with on("reference"):
        wanted = run(start.clone(), gradients)
    bases = []

    def placed(values):
        view, base = data.draw(laid_out(values))
        outside = torch.ones_like(base, dtype=torch.bool)
        outside.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(False)
        bases.append((base, outside))
        return view

    def move(entry):
        for key in entry.keys() - CODED - {"step", "stream"}:
            entry[key] = placed(entry[key])

    torch.set_num_threads(data.draw(st.sampled_from([1, 2])))
    level = data.draw(st.sampled_from(engine.cpu.simd_levels()))
    batch = data.draw(st.sampled_from([1, 5, 64, 1000, 65_536]))
    name = data.draw(st.sampled_from(names))
    with on(name), engine.cpu.forced_batch_elements(batch), engine.cpu.forced_simd_level(level):
        assert_same(run(placed(start), [placed(gradient) for gradient in gradients], move), wanted)
    for base, outside in bases:
        assert (base[outside] == 7.0).all(), "memory around was written"


@settings(max_examples=70, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_any_layout_of_parameter_gradient_and_state(data):
    step_in_any_layout(data, ["cpu", "cpu", "cpu", "reference"])


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


# Unbiased, without drift, without freezing


def decoded(entry, key):
    if key in entry:
        return entry[key].double()
    decode = codecs.decode_signed if key == "exp_avg" else codecs.decode_unsigned
    return decode(entry[f"{key}_code"], entry[f"{key}_scale"]).double()


@pytest.mark.parametrize("rms", [1e-12, 1.0, 1e6])
@pytest.mark.parametrize("state_format", SMALL_FORMATS)
def test_the_mean_over_many_seeds_is_exact(state_format, rms):
    seeds, shape = 300, (64, 64)
    gradients = [draw(k, shape) * rms for k in range(3)]
    means = dict.fromkeys(("exp_avg", "exp_avg_sq"), 0.0)

    def run(steps, **options):
        param = Parameter(torch.zeros(shape))
        optimizer = optim.AdamW([param], **options)
        for gradient in gradients[:steps]:
            param.grad = gradient
            optimizer.step()
        return peek(optimizer)[param]

    for seed in range(seeds):
        entry = run(3, state_format=state_format, seed=seed)
        for key in means:
            means[key] = means[key] + decoded(entry, key) / seeds
    exact = [run(steps) for steps in (1, 2, 3)]
    for key, mean in means.items():
        wanted = exact[-1][key].double()
        # The widest gap between two stored numbers that the moment has been in.
        most = torch.stack([entry[key].double().abs() for entry in exact]).amax(0)
        if state_format == "bf16":
            gap = torch.exp2(most.log2().floor() - 7)
            reached = most > 0
        else:
            largest, offset = (494.0, 2.0) if key == "exp_avg" else (126974.0625, 1.9375)
            scale = most.amax(-1, keepdim=True) / largest
            gap = torch.exp2((most / scale + offset).clamp_min(2.0).log2().floor() - 4) * scale
            lowest = scale * 0.0625 if key == "exp_avg_sq" else 0 * scale
            reached = wanted.abs() > lowest  # below the lowest code it is lifted
        assert reached.float().mean() > 0.99
        error = ((mean - wanted) / gap)[reached]
        # A rounding's standard deviation is half of the gap at most; those of three steps add up.
        deviation = 0.5 * math.sqrt(3 / seeds)
        assert error.abs().max() < 6 * deviation, key
        assert error.mean().abs() < 6 * deviation / math.sqrt(error.numel()), key


class Trio:
    """The same parameters and gradients under every format."""

    def __init__(self, scales, shape=(64, 128)):
        self.shape, self.scales = shape, scales
        self.params = {f: [Parameter(torch.zeros(shape)) for _ in scales] for f in FORMATS}
        # An eps below every v: what rms 1e-12 gives is not to be hidden.
        self.optimizers = {f: optim.AdamW(p, state_format=f, lr=1e-4, eps=1e-30) for f, p in self.params.items()}
        generator = torch.Generator().manual_seed(0)
        self.numbers = torch.randn(1 << 19, generator=generator)
        self.at = random.Random(0)

    def step(self, change=None):
        for index, scale in enumerate(self.scales):
            first = self.at.randrange(len(self.numbers) - math.prod(self.shape))
            gradient = self.numbers[first : first + math.prod(self.shape)].view(self.shape) * scale
            gradient = gradient if change is None else change(gradient, scale)
            for params in self.params.values():
                params[index].grad = gradient
        for optimizer in self.optimizers.values():
            optimizer.step()

    def stored(self, key, index):
        return {f: decoded(peek(o)[self.params[f][index]], key) for f, o in self.optimizers.items()}


@pytest.mark.parametrize(("rms", "steps"), [(1.0, 10_000), (1e-12, 3000), (1e6, 3000)])
def test_stationary_gradients_do_not_make_the_moments_drift(rms, steps):
    """On average v is within 2 % of float32's, at every size of gradients; m is without a bias."""
    trio = Trio([rms])
    sums = {key: dict.fromkeys(FORMATS, 0.0) for key in MOMENTS}

    def shifted(gradient, scale):  # half of the columns have a mean
        gradient[:, ::2] += 0.5 * scale
        return gradient

    count = 0
    for step in range(steps):
        trio.step(shifted)
        if step >= steps // 2 and step % 20 == 0:
            count += 1
            for key, total in sums.items():
                for f, value in trio.stored(key, 0).items():
                    total[f] = total[f] + value
    for f in SMALL_FORMATS:
        ratio = sums["exp_avg_sq"][f] / sums["exp_avg_sq"]["fp32"]
        assert abs(ratio.mean().item() - 1) < 0.02, f
        assert abs(sums["exp_avg_sq"][f].sum().item() / sums["exp_avg_sq"]["fp32"].sum().item() - 1) < 0.02, f
        error = (sums["exp_avg"][f] - sums["exp_avg"]["fp32"]) / count / rms
        for columns in (slice(0, None, 2), slice(1, None, 2)):
            assert error[:, columns].mean().abs() < 1e-3, f
        wanted = sums["exp_avg"]["fp32"][:, ::2].sum()
        assert (sums["exp_avg"][f][:, ::2].sum() / wanted - 1).abs() < 3e-3, f


@pytest.mark.parametrize("rms", [1e-12, 1.0, 1e6])
def test_v_decays_after_the_gradients_have_stopped(rms):
    """Two thousand steps without gradients: nearest rounding would leave v where it was."""
    trio = Trio([rms])
    for _ in range(200):
        trio.step()
    before = trio.stored("exp_avg_sq", 0)
    for _ in range(2000):
        trio.step(lambda gradient, _: torch.zeros_like(gradient))
    after = trio.stored("exp_avg_sq", 0)
    for f in FORMATS:
        left = after[f] / (before[f] * 0.999**2000)
        assert abs(left.mean().item() - 1) < 0.05, f
        assert abs(after[f].sum().item() / (before[f].sum().item() * 0.999**2000) - 1) < 0.05, f
    for f, value in trio.stored("exp_avg", 0).items():
        assert (value.abs() <= 1e-30 * rms).all(), f  # 0.9 to the 2000th


@pytest.mark.parametrize("rms", [1e-12, 1.0])
def test_v_decays_where_only_half_of_a_block_goes_on(rms):
    """Measured by benchmarks/codes.py: up to 3 % above exact."""
    trio = Trio([rms])

    def half(gradient, _):
        gradient[:, 1::2] = 0
        return gradient

    for _ in range(300):
        trio.step()
    before = trio.stored("exp_avg_sq", 0)
    for _ in range(2000):
        trio.step(half)
    after = trio.stored("exp_avg_sq", 0)
    for f in FORMATS:
        left = (after[f] / (before[f] * 0.999**2000))[:, 1::2]
        assert -0.03 < left.mean().item() - 1 < 0.03, f
        going = (after[f] / after["fp32"])[:, ::2]
        assert abs(going.mean().item() - 1) < 0.03, f


def test_a_positive_v_is_never_stored_as_zero(engine_name):
    """It would make of m, which is not zero, an update of m / eps."""
    param = Parameter(torch.zeros(64, 128))
    spread = torch.exp2(-torch.arange(64 * 128).view(64, 128).remainder(128) / 2.0)  # 64 octaves in a block
    for state_format in SMALL_FORMATS:
        optimizer = optim.AdamW([param], state_format=state_format)
        with on(engine_name):
            for _ in range(20):
                param.grad = spread.clone()
                optimizer.step()
        assert (decoded(peek(optimizer)[param], "exp_avg_sq") > 0).all()
        assert param.abs().max() < 0.05  # 20 steps of 1e-3
    zeros = Parameter(torch.zeros(64, 128))
    optimizer = optim.AdamW([zeros], state_format="8bit")
    with on(engine_name):
        for _ in range(3):
            zeros.grad = torch.zeros_like(zeros)
            zeros.grad[1] = 1.0
            optimizer.step()
    entry = peek(optimizer)[zeros]
    assert (decoded(entry, "exp_avg_sq")[1] > 0).all()
    assert not decoded(entry, "exp_avg_sq")[0].any()  # an all-zero block stays exactly zero
    assert not decoded(entry, "exp_avg")[2:].any()
    assert not zeros[0].any()


# What is refused


# Where the plan reads the state and where it trusts it; that is alike for all engines.
@pytest.mark.parametrize(
    ("engine_name", "after"), [("cpu", 1), ("cpu", 15), ("cuda", 1), ("reference", 1), ("reference", 15)]
)
@pytest.mark.parametrize(("before", "now"), list(itertools.permutations(FORMATS, 2)), ids=str)
def test_changing_the_format_after_the_first_step_raises_and_changes_nothing(before, now, after, engine_name):
    with on(engine_name):
        world = World(state_format=before).run(after)
        twin = copy.deepcopy(world)
        for group in world.optimizer.param_groups:
            group["state_format"] = now
        for param in world.named.values():
            param.grad = torch.ones_like(param)
        seen = snapshot(world.optimizer)
        with pytest.raises(ValueError, match=r"state.*of parameter '.*(load_state_dict|another format)") as caught:
            world.optimizer.step()
        assert "\n" not in str(caught.value)
        assert "load_state_dict" in str(caught.value)
        assert snapshot(world.optimizer) == seen
        for group in world.optimizer.param_groups:
            group["state_format"] = before
        assert_same(world.run(2).bits(), twin.run(2).bits())


@pytest.mark.parametrize("now", FORMATS)
def test_changing_the_format_before_the_first_step_is_a_choice(now):
    world = World(state_format="8bit" if now == "fp32" else "fp32")
    for group in world.optimizer.param_groups:
        group["state_format"] = now
    assert_same(world.run(2).bits(), World(state_format=now).run(2).bits())


WRONG_ARGUMENTS = [
    ("state_format", "int4", ValueError, "'fp32', 'bf16', '8bit'"),
    ("state_format", None, ValueError, "'fp32', 'bf16', '8bit'"),
    ("state_format", 8, ValueError, "'fp32', 'bf16', '8bit'"),
    ("state_format", "8BIT", ValueError, "'fp32', 'bf16', '8bit'"),
    ("state_format", ["fp32"], ValueError, "'fp32', 'bf16', '8bit'"),
    ("master_weights", 1, TypeError, "True or False"),
    ("master_weights", None, TypeError, "True or False"),
    ("master_weights", "yes", TypeError, "True or False"),
    ("seed", -1, ValueError, r"2\*\*63"),
    ("seed", 2**63, ValueError, r"2\*\*63"),
    ("seed", True, TypeError, "whole number"),
    ("seed", "x", TypeError, "whole number"),
    ("seed", 1.0, TypeError, "whole number"),
    ("seed", None, TypeError, "whole number"),
]


@pytest.mark.parametrize(("name", "value", "error", "allowed"), WRONG_ARGUMENTS, ids=str)
def test_wrong_arguments_are_named(name, value, error, allowed):
    pattern = rf"{name}.*{allowed}.*{value!r}".replace("[", r"\[").replace("]", r"\]")
    param = Parameter(torch.ones(3))
    with pytest.raises(error, match=pattern):
        optim.AdamW([param], **{name: value})
    with pytest.raises(error, match=pattern):
        optim.AdamW([{"params": [param], name: value}])
    optimizer = optim.AdamW([param])
    optimizer.param_groups[0][name] = value
    param.grad = torch.ones(3)
    before = snapshot(optimizer)
    with pytest.raises(error, match=pattern):
        optimizer.step()
    assert snapshot(optimizer) == before


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1])
def test_every_seed_that_is_allowed_can_be_saved(seed):
    world = World(state_format="8bit", seed=seed).run(1)
    file = io.BytesIO()
    torch.save(world.optimizer.state_dict(), file)
    file.seek(0)
    other = World(state_format="8bit")
    other.optimizer.load_state_dict(torch.load(file, weights_only=True))
    assert other.optimizer.param_groups[1]["seed"] == seed


def put(key, value):
    def tamper(entry):
        entry[key] = value(entry[key]) if callable(value) else value

    return tamper


def drop(key):
    def tamper(entry):
        del entry[key]

    return tamper


TAMPERED = {
    "codes int8": put("exp_avg_code", lambda x: x.to(torch.int8)),
    "codes float": put("exp_avg_code", lambda x: x.float()),
    "codes int64": put("exp_avg_sq_code", lambda x: x.long()),
    "codes transposed": put("exp_avg_code", lambda x: x.t().contiguous().t()),
    "codes strided": put("exp_avg_sq_code", lambda x: torch.stack([x, x], -1)[..., 0]),
    "codes flat": put("exp_avg_code", lambda x: x.flatten()),
    "codes of another shape": put("exp_avg_sq_code", lambda x: x[:, :-1].contiguous()),
    "no codes": drop("exp_avg_code"),
    "no codes of v": drop("exp_avg_sq_code"),
    "codes None": put("exp_avg_code", None),
    "codes a list": put("exp_avg_code", [1, 2]),
    "no scale": drop("exp_avg_scale"),
    "no scale of v": drop("exp_avg_sq_scale"),
    "scale flat": put("exp_avg_scale", lambda x: x.flatten()),
    "scale of a row too few": put("exp_avg_sq_scale", lambda x: x[1:].contiguous()),
    "scale of a block too many": put("exp_avg_scale", lambda x: torch.cat([x, x], 1)),
    "scale float64": put("exp_avg_scale", lambda x: x.double()),
    "scale float16": put("exp_avg_sq_scale", lambda x: x.half()),
    "scale strided": put("exp_avg_scale", lambda x: torch.stack([x, x], -1)[..., 0]),
    "scale on meta": put("exp_avg_scale", lambda x: x.to("meta")),
    "scales sparse": put("exp_avg_scale", lambda x: x.to_sparse()),
    "no stream": drop("stream"),
    "stream float": put("stream", lambda x: x.float()),
    "stream int32": put("stream", lambda x: x.int()),
    "stream of one dim": put("stream", lambda x: x.view(1)),
    "stream an int": put("stream", 7),
    "residual float32": put("residual", lambda x: x.float()),
    "residual int16": put("residual", lambda x: x.view(torch.int16)),
    "residual float16": put("residual", lambda x: x.view(torch.float16)),
    "residual flat": put("residual", lambda x: x.flatten()),
    "residual None, a string": put("residual", "none"),
    "codes are the parameter's memory": put(
        "exp_avg_code", lambda x: x.untyped_storage().nbytes() and x[:1].expand(64, 80)
    ),
    "two share memory": lambda entry: entry.update(exp_avg_sq_code=entry["exp_avg_code"]),
}


@pytest.mark.parametrize(
    ("engine_name", "steps"), [("cpu", 1), ("cpu", 14), ("cuda", 1), ("reference", 1), ("reference", 14)]
)
@pytest.mark.parametrize("tamper", TAMPERED.values(), ids=TAMPERED.keys())
def test_state_that_someone_has_broken_raises_before_anything_changes(tamper, steps, engine_name):
    params = [Parameter(draw(k, MATRIX).bfloat16()) for k in range(2)]
    optimizer = optim.AdamW([("first", params[0]), ("second", params[1])], state_format="8bit")

    def step():
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()

    with on(engine_name):
        for _ in range(steps):
            step()
        kept = dict(optimizer.state[params[1]])
        tamper(optimizer.state[params[1]])
        for param in params:
            param.grad = torch.ones_like(param)
        before = snapshot(optimizer)
        with pytest.raises((ValueError, TypeError), match="parameter 'second'") as caught:
            optimizer.step()
        assert snapshot(optimizer) == before, caught.value
        optimizer.state[params[1]].update(kept)
        step()
    assert int(optimizer.state[params[1]]["step"]) == steps + 1


@pytest.mark.parametrize(
    ("key", "broken", "said"),
    [
        ("exp_avg_code", lambda x: x.t().contiguous().t(), "row-major"),
        ("exp_avg_sq_scale", lambda x: x[:-1], "one for each block"),
        ("exp_avg_scale", lambda x: torch.cat([x, x], 1)[:, :1], "one for each block"),
    ],
)
def test_the_engine_itself_refuses_codes_that_it_would_misread(key, broken, said):
    """Python has looked before; this is what stands between a mistake there and foreign memory."""
    param = Parameter(torch.ones(64, 80))
    param.grad = torch.ones_like(param)
    optimizer = optim.AdamW([param], state_format="8bit")
    optimizer.init_state()
    entry = optimizer.state[param]
    plan = engine.cpu.Plan([[param]])
    plan.gather([[param]], [optimizer.state, True])
    assert plan.bind(0, param.grad, entry, dict(entry), WHOLE) is None
    assert said in plan.bind(0, param.grad, entry, entry | {key: broken(entry[key])}, WHOLE)
    plan.release()


@pytest.mark.parametrize("state_format", ["fp32", "8bit"])
def test_rows_that_rest_after_their_state_was_replaced(state_format):
    """What the plan knew of them is gone by the time they take part again, and the next replacement is seen too."""

    def run():
        params = [Parameter(draw(index, (64, 128)).bfloat16()) for index in range(3)]
        optimizer = optim.AdamW(params, lr=0.01, state_format=state_format)

        def step(number, *active):
            for index, param in enumerate(params):
                wanted = draw(100 * number + index, param.shape).bfloat16()
                param.grad = wanted if index in active else None
            optimizer.step()

        step(1, 0, 1, 2)
        step(2, 0, 1, 2)
        entry = peek(optimizer)[params[0]]
        entry["residual"] = entry["residual"].clone()
        step(3, 0)
        step(4, 0, 1, 2)
        for number in range(5, 9):
            entry = peek(optimizer)[params[1]]
            entry["residual"] = torch.full_like(entry["residual"].view(torch.int16), number).view(torch.bfloat16)
            optimizer._state_box[1] = True
            step(number, 0, 1, 2)
        return results(optimizer)

    with on("reference"):
        wanted = run()
    assert_same(run(), wanted)


@pytest.mark.parametrize("state_format", ["fp32", "bf16", "8bit"])
def test_state_loaded_or_copied_under_inference_mode_can_be_updated(state_format, engine_name):
    source = World(torch.float32, state_format=state_format)
    source.run(2)
    saved = source.optimizer.state_dict()
    plain = World(torch.float32, state_format=state_format)
    plain.optimizer.load_state_dict(copy.deepcopy(saved))
    loaded = World(torch.float32, state_format=state_format)
    with torch.inference_mode():
        loaded.optimizer.load_state_dict(saved)
        copied = copy.deepcopy(loaded.optimizer)
    assert not any(x.is_inference() for entry in copied.state.values() for x in entry.values())
    with on(engine_name):
        plain.run(2)
        loaded.run(2)
    assert_same(results(loaded.optimizer), results(plain.optimizer))


def test_inference_state_that_was_put_by_hand_is_refused_before_anything_changes(engine_name):
    param = Parameter(draw(0, (64, 80)))
    param.grad = draw(1, (64, 80))
    optimizer = optim.AdamW([param], state_format="8bit")
    optimizer.init_state()
    with torch.inference_mode():
        optimizer.state[param]["exp_avg_scale"] = torch.zeros(64, 1)
    before = snapshot(optimizer, param)
    with on(engine_name), pytest.raises(ValueError, match=r"'exp_avg_scale' was made under torch\.inference_mode"):
        optimizer.step()
    assert snapshot(optimizer, param) == before


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16], ids=str)
def test_the_default_dtype_is_nothing_to_the_formats(default, engine_name):
    def run():
        param = Parameter(draw(0, (64, 80)))
        optimizer = optim.AdamW([param], state_format="8bit")
        for number in range(3):
            param.grad = draw(number + 1, (64, 80))
            optimizer.step()
        return results(optimizer)

    wanted = run()
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        with on(engine_name):
            found = run()
    finally:
        torch.set_default_dtype(before)
    assert_same(found, wanted)


@pytest.mark.parametrize("key", ["step", "exp_avg_code", "exp_avg_sq_scale"])
def test_state_that_two_parameters_share_is_refused_before_anything_changes(key):
    params = [Parameter(draw(index, (64, 80))) for index in range(2)]
    optimizer = optim.AdamW(params, state_format="8bit")
    optimizer.init_state()
    optimizer.state[params[1]][key] = optimizer.state[params[0]][key]
    for param in params:
        param.grad = torch.ones_like(param)
    before = snapshot(optimizer, *params)
    with pytest.raises(ValueError, match="same memory"):
        optimizer.step()
    assert snapshot(optimizer, *params) == before
