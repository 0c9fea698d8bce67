"""Guards that the CUDA engine gives the reference's bits: its Triton kernels, interpreted on the CPU.

Where no GPU is, this is the proof that the kernels compute what the contract says; on one, tests/gpu has to show only
that compiling changes no bit. Every test runs the same steps on the reference engine and compares all that they wrote.
What is alike for all engines is tested elsewhere, with the fixture `engine_name`; here is what it does not reach: the
whole grid of numbers, hostile state, any layout, elements beyond 2³¹ and numbers beyond 2³², sums of any size.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import Parameter

import lucid.optim as optim
from bits import World, assert_same, draw, on, results, through_a_file
from lucid import engine
from lucid.engine import shards
from lucid.engine.cuda import launch, table
from lucid.engine.shards import Numbering
from test_clipping import LIES, uneven
from test_engine_bits import DTYPES, REAL_GRADIENTS, patterns, whole_grid
from test_formats import step_in_any_layout as step_any_format_in_any_layout
from test_layouts import CUTS, DENSE, check, gradients_like, step_in_any_layout

FORMATS = ["fp32", "bf16", "8bit"]
HALVES = [torch.bfloat16, torch.float16]
# Parameter, format, whether with master weights.
KINDS = [
    *((torch.float32, state_format, True) for state_format in FORMATS),
    *itertools.product(HALVES, FORMATS, [True, False]),
]


@pytest.fixture(autouse=True)
def one_thread(torch_settings):
    """Threads of torch's wait for each other where the machine is busy."""
    torch.set_num_threads(1)


@pytest.fixture
def small_tiles(monkeypatch):
    """Programs of a few tiles each, as on a GPU, not of one that holds all of a small tensor."""
    monkeypatch.setattr(launch.Interpreter, "geometry", lambda self, kind: table.Geometry(512, 2, 1))


def assert_equal_runs(run, what=""):
    """`run` on the CUDA engine gives what it gives on the reference."""
    with on("reference"):
        wanted = run()
    with on("cuda"):
        assert_same(run(), wanted, what)


def device_plan(optimizer):
    return optimizer._whole.plan._device


# Numbers


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_whole_grid(dtype):
    """Any bits, all kinds of groups, lengths and gradients, each row with its own step count; nothing in the gaps."""
    problem = whole_grid(dtype)
    problem.STEPS = 3 if dtype == torch.float32 else 2
    with on("reference"):
        wanted = problem.run()
    with on("cuda"):
        found = problem.run()
    for key in wanted:
        assert torch.equal(found[key], wanted[key]), key


@pytest.mark.parametrize(
    "options",
    [
        {"lr": 1e300},
        {"lr": 1e39, "weight_decay": 1e-39},
        {"lr": 1e-46, "weight_decay": 1e-3},
        {"lr": 3.4028235677973366e38},  # halfway between the largest float32 and the next
        {"eps": 7e-46},
        {"betas": (1e-300, 1e-46)},
        {"betas": (0.5 - 1e-17, 0.5 - 6e-17)},
    ],
    ids=str,
)
@pytest.mark.parametrize("max_grad_norm", [None, math.inf], ids=["host", "device"])
def test_hyperparameters_that_a_float32_cannot_hold(options, max_grad_norm):
    """Whether the host makes the scalars or the device."""

    def run():
        worlds = [World(dtype, max_grad_norm=max_grad_norm) for dtype in (torch.float32, torch.float64)]
        for world in worlds:
            for group in world.optimizer.param_groups:
                group.update(options)
            world.run(2)
        return [row for world in worlds for row in results(world.optimizer)]

    assert_equal_runs(run)


@pytest.mark.parametrize("betas", [(0.0, 0.0), (0.3, 0.95), (0.9, 0.999)], ids=str)
def test_scalars_made_on_the_device_at_any_step_count(betas):
    """From a table of 1 - β^t, which ends where that is 1."""
    steps = [0, 1, 17, 350, 36_000, 40_000, 2**24 - 4]

    def run():
        params = [Parameter(draw(k, (3,), torch.float64)) for k in range(len(steps))]
        optimizer = optim.AdamW(params, betas=betas, max_grad_norm=1.0, maximize=True)
        optimizer.init_state()
        for param, step in zip(params, steps, strict=True):
            optimizer.state[param]["step"].fill_(step)
        for k in range(2):
            for number, param in enumerate(params):
                param.grad = draw(100 * k + number, (3,), torch.float64)
            optimizer.step()
        return results(optimizer)

    assert_equal_runs(run)


SCALES = [1.0, 0.25, 1000.0, 3.7]


@pytest.mark.parametrize("found_inf", [0.0, 1.0])
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.5}, {"nonfinite": "skip"}], ids=str)
def test_scales_that_are_on_the_device(options, found_inf):
    """With what GradScaler hands over: the gradients' scale, and whether it has found any that are not finite."""

    def run():
        world = World(amsgrad=True, **options).run(1)
        norms = []
        for number, scale in enumerate(SCALES):
            world.set_gradients()
            dtype = torch.float64 if number % 2 else torch.float32
            world.optimizer.grad_scale = torch.tensor(scale, dtype=dtype)
            world.optimizer.found_inf = torch.tensor(found_inf if number == 2 else 0.0, dtype=dtype)
            world.optimizer.param_groups[0]["lr"] = torch.tensor(0.01 * (number + 1), dtype=dtype)
            world.optimizer.step()
            world.done += 1
            norms.append(world.optimizer.grad_norm)
        assert world.optimizer.skipped_steps == found_inf
        return [
            *results(world.optimizer),
            {str(k): norm for k, norm in enumerate(norms) if norm is not None and k != 2},
        ]

    assert_equal_runs(run)


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0, 0.0])
@pytest.mark.parametrize("what", ["grad_scale", "lr"])
def test_numbers_on_the_device_that_no_step_can_use(what, value):
    """The host cannot see them without waiting, and so cannot raise: the step is left out. An lr of 0 is a good one."""

    def run(spoilt):
        world = World(amsgrad=True)
        with on("cuda"):
            world.run(1)
            if spoilt:
                world.set_gradients()
                group = world.optimizer.param_groups[1]
                before, group["lr"] = group["lr"], torch.tensor(value if what == "lr" else 0.1)
                world.optimizer.grad_scale = torch.tensor(value if what == "grad_scale" else 1.0)
                world.optimizer.step()
                group["lr"] = before
                del world.optimizer.grad_scale
                assert world.optimizer.skipped_steps == 1
            return results(world.run(2).optimizer)

    if (what, value) == ("lr", 0.0):
        with pytest.raises(AssertionError):
            run(spoilt=True)
    else:
        assert_same(run(spoilt=True), run(spoilt=False))


# Formats


def in_runs(seed, shape):
    """Numbers of which each run of 50 has a nature of its own, so that a block has two or three, or one has it all."""
    generator = torch.Generator().manual_seed(seed)
    size = math.prod(shape)
    scales = torch.tensor([1.0, 1e-3, 0.0, 1e-42, 1e-30, 1e15, 1e38])
    of_run = scales[torch.randint(len(scales), (size // 50 + 1,), generator=generator)]
    calm = torch.rand(size // 400 + 1, generator=generator).repeat_interleave(400)[:size] < 0.5
    values = torch.randn(size, generator=generator) * torch.where(calm, 1.0, of_run.repeat_interleave(50)[:size])
    at = torch.randint(max(1, size), (size // 900,), generator=generator)
    values[at] = torch.tensor([math.nan, math.inf, -math.inf])[torch.arange(len(at)) % 3]
    return values.view(shape)


# Rows of whole blocks, of cut ones, of one element more than a block; one row; short rows; vectors; nothing.
SHAPES = [
    (32, 128),
    (33, 131),
    (40, 4, 33),
    (64, 64),
    (1, 4097),
    (2, 2200),
    (34, 129),
    (300,),
    (5, 7),
    (1,),
    (),
    (0, 70),
]


class Hostile:
    """Parameters of all shapes in two groups, with state that no training makes."""

    def __init__(self, dtype, state_format, master_weights):
        self.params = [Parameter(in_runs(k, shape).to(dtype)) for k, shape in enumerate(SHAPES * 2)]
        half = len(SHAPES)
        groups = [{"params": self.params[:half]}, {"params": self.params[half:], "amsgrad": True, "betas": (0.3, 0.4)}]
        self.optimizer = optim.AdamW(groups, lr=0.01, state_format=state_format, master_weights=master_weights)
        self.optimizer.init_state()
        generator = torch.Generator().manual_seed(1)
        for number, (param, entry) in enumerate(self.optimizer.state.items()):
            param.grad_dtype = None
            entry["step"].fill_(number % 3)
            for key, slot in entry.items():
                if key in ("step", "stream") or number % 4 == 3:  # some have the usual
                    continue
                if slot.dtype == torch.uint8:
                    slot.random_(0, 256, generator=generator)
                elif key == "residual":
                    slot.view(torch.int16).random_(-(2**15), 2**15, generator=generator)
                elif key == "master":  # some of them no longer the parameter's
                    slot.copy_(param.float() * (1 + 2e-4 * torch.randn(slot.shape, generator=generator)))
                else:
                    slot.copy_(patterns(generator, slot.numel(), slot.dtype).view(slot.shape))
                    if "_sq" in key or "scale" in key:
                        slot.abs_()

    def run(self):
        for step in range(3):
            for number, param in enumerate(self.params):
                dtype = REAL_GRADIENTS[(number + step) % len(REAL_GRADIENTS)]
                param.grad = in_runs(1000 * (step + 1) + number, param.shape).to(dtype)
            self.optimizer.step()
        return results(self.optimizer)


@pytest.mark.parametrize(("dtype", "state_format", "master_weights"), KINDS, ids=str)
def test_hostile_state_in_every_format(dtype, state_format, master_weights):
    finite = []

    def run():
        found = Hostile(dtype, state_format, master_weights).run()
        finite.append(torch.cat([row["param"].isfinite().flatten() for row in found]).float().mean().item())
        return found

    assert_equal_runs(run)
    assert 0.2 < finite[0] < 0.98


@pytest.mark.parametrize(("dtype", "state_format", "master_weights"), [*KINDS[:3], KINDS[7]], ids=str)
def test_programs_of_several_small_tiles(dtype, state_format, master_weights, small_tiles):
    """Whole programs and cut ones, whole tiles and cut ones, programs that begin within a row; also strided."""

    def run():
        params = [
            Parameter(draw(k, shape).to(dtype)) for k, shape in enumerate([(7, 640), (13, 330), (1023,), (1539,)])
        ]
        params += [Parameter(draw(9, (330, 13)).to(dtype).t()), Parameter(draw(10, (6, 1540)).to(dtype)[:, ::2])]
        options = {"state_format": state_format, "master_weights": master_weights, "max_grad_norm": 0.5}
        optimizer = optim.AdamW(params, amsgrad=True, **options)
        for step in range(2):
            for number, param in enumerate(params):
                param.grad = draw(100 * step + number, param.shape).to(dtype)
            optimizer.step()
        return [*results(optimizer), {"norm": optimizer.grad_norm}]

    assert_equal_runs(run)


# Layouts


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_any_layout_of_parameter_gradient_and_state(data):
    with on("cuda"):
        step_in_any_layout(data)


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_any_format_in_any_layout(data):
    step_any_format_in_any_layout(data, ["cuda"])


@pytest.mark.parametrize("make", DENSE.values(), ids=DENSE.keys())
def test_dense_layouts(make):
    with on("cuda"):
        check(make(), gradients_like(make()), amsgrad=True)
        check(make(), [g.reshape(-1)[:1].sum().expand(g.shape) for g in gradients_like(make())])


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS.keys())
def test_strided_views_and_nothing_between(cut, dtype):
    base = draw(0, (41, 300), dtype)
    with on("cuda"):
        check(cut(base), gradients_like(cut(base)), base)


@pytest.mark.parametrize("what", ["param", "grad", "exp_avg", "exp_avg_code", "residual", "late grad"])
@pytest.mark.parametrize("offset", [1, 4, 8])
def test_addresses_that_no_wide_load_may_take(what, offset):
    """Kernels are told that addresses are multiples of 16 bytes only where all of the row are."""

    def moved(tensor):
        flat = torch.empty(tensor.numel() + 16, dtype=tensor.dtype)[offset:]
        assert flat.data_ptr() % 16 == offset * tensor.element_size() % 16
        return flat[: tensor.numel()].view(tensor.shape).copy_(tensor)

    wide = []

    def run():
        param = Parameter((moved if what == "param" else torch.clone)(draw(0, (33, 131)).bfloat16()))
        state_format = "bf16" if what == "exp_avg" else "8bit"
        optimizer = optim.AdamW([param], state_format=state_format)
        optimizer.init_state()
        if what in optimizer.state[param]:
            optimizer.state[param][what] = moved(optimizer.state[param][what])
        for step in range(3):
            gradient = draw(1 + step, param.shape).bfloat16()
            param.grad = moved(gradient) if what == "grad" or (what == "late grad" and step == 2) else gradient
            optimizer.step()
            if device_plan(optimizer) is not None:
                [resident] = device_plan(optimizer)._residents.values()
                wide.append(resident._updates[0].kind.wide)
        return results(optimizer)

    assert_equal_runs(run)
    narrow = offset * (1 if what == "exp_avg_code" else 2) % 16 != 0
    assert wide == [True, True, not narrow] if what == "late grad" else wide == [not narrow] * 3


@pytest.mark.parametrize("state_format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_parameters_that_share_memory_are_updated_one_after_the_other(dtype, state_format):
    """In a launch each, in their order, also where the second is of another kind than the first and third."""

    def run():
        memory = draw(0, (33, 131)).to(dtype)
        apart = Parameter(draw(5, (9,)).to(dtype))
        params = [Parameter(memory), apart, Parameter(memory), Parameter(memory)]
        groups = [{"params": params[:2]}, {"params": params[2:3], "amsgrad": True}, {"params": params[3:]}]
        optimizer = optim.AdamW(groups, state_format=state_format, lr=0.1)
        for step in range(3):
            for number, param in enumerate(params):
                param.grad = draw(10 * step + number, param.shape).to(dtype)
            optimizer.step()
        if device_plan(optimizer) is not None:
            [resident] = device_plan(optimizer)._residents.values()
            assert [set(each.programs.rows.tolist()) for each in resident._updates] == [{0}, {1}, {2}, {3}]
        return results(optimizer)

    assert_equal_runs(run)


# Elements and numbers beyond what 32 bits count

NUMBERINGS = {
    "up to 2^32": Numbering(2**32 - 33 * 131, 2**62, 0),
    "one beyond 2^32": Numbering(2**32 - 33 * 131 + 1, 2**62, 0),
    "across 2^32": Numbering(2**32 - 2000, 2**62, 0),
    "from 2^32 on": Numbering(2**32, 2**62, 0),
    "across 5·2^32": Numbering(5 * 2**32 - 777, 2**62, 0),
    "runs": Numbering(1000, 131, 1310),
    "runs across 2^32": Numbering(2**32 - 10_000, 393, 3930),
    "runs far apart": Numbering(7, 655, 2**33 + 655),
    "one run that is as long as all": Numbering(2**32 - 5, 33 * 131, 1),
}


def numbered_alike():
    """Spread over the one process that there is: only then are numbers not those of the place."""
    from torch.distributed.tensor import DTensor, Shard

    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    flags, drawn = {}, {}

    def spread(values):
        return DTensor.from_local(values, mesh, [Shard(0)], run_check=False)

    def run(state_format):
        starts = draw(0, (33, 131)).bfloat16(), draw(1, (131, 33)).bfloat16().t()
        params = [Parameter(spread(values)) for values in starts]
        optimizer = optim.AdamW(params, lr=0.01, state_format=state_format)
        for number, param in enumerate(params):
            param.grad = spread(draw(number + 2, (33, 131)).bfloat16())
        optimizer.step()
        if device_plan(optimizer) is not None:
            flags[name] = device_plan(optimizer)._rows.rows[0].numbered
        rows = ({"param": param.detach()} | optimizer.state[param] for param in params)
        found = [{key: shards.local(value) for key, value in row.items()} for row in rows]
        return [{key: x.view(torch.int16) if x.dtype in HALVES else x for key, x in row.items()} for row in found]

    for name, numbering in NUMBERINGS.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(shards, "numbering", lambda param, name, numbering=numbering: numbering)
            for state_format, key in (("bf16", "exp_avg_sq"), ("8bit", "exp_avg_sq_code")):
                with on("reference"):
                    wanted = run(state_format)
                with on("cuda"):
                    assert_same(run(state_format), wanted, f"{name}, {state_format}")
                drawn.setdefault(key, set()).add(tuple(wanted[0][key].flatten().tolist()))
    assert [len(each) for each in drawn.values()] == [len(NUMBERINGS)] * 2  # each has draws of its own
    return flags


def test_numbers_of_elements_beyond_32_bits_and_in_runs(ranks):
    [flags] = ranks.run(1, numbered_alike)
    assert [name for name, numbered in flags.items() if not numbered] == ["up to 2^32"]


def large(shape, state_format, transposed, expanded):
    """A bfloat16 parameter, its gradient and its state, in memory that is not there until it is touched."""

    def untouched(dtype=torch.bfloat16):
        return torch.empty(shape[::-1], dtype=dtype).t() if transposed else torch.empty(shape, dtype=dtype)

    param = Parameter(untouched())
    param.grad = torch.full((1,) * len(shape), 0.3, dtype=param.dtype).expand(shape) if expanded else untouched()
    entry = {"step": torch.tensor(3.0)}
    if state_format == "bf16":
        entry |= {"exp_avg": untouched(), "exp_avg_sq": untouched()}
    else:
        for key in ("exp_avg", "exp_avg_sq"):
            entry[f"{key}_code"] = untouched(torch.uint8)
            entry[f"{key}_scale"] = torch.empty(shape[0], -(-shape[1] // 128))
    entry["stream"] = torch.tensor(12345)
    optimizer = optim.AdamW([param], state_format=state_format, master_weights=False)
    optimizer.state[param] = entry
    return optimizer, {"param": param.detach(), "grad": param.grad} | entry


def end_of(tensor, count):
    """The last elements in row-major order: whole rows, or of the last row."""
    if tensor.dim() == 1:
        return tensor[-count:]
    return tensor[-1][-count:] if count % tensor.shape[1] else tensor[-(count // tensor.shape[1]) :]


@pytest.mark.parametrize(
    ("shape", "state_format", "transposed", "expanded", "tail"),
    [
        ((2**31 + 5000,), "bf16", False, False, 5000),
        ((2**16, 2**15 + 1), "bf16", True, False, 8192),
        ((2**24 + 40, 128), "8bit", False, False, 5120),
        ((2**22 + 8, 513), "8bit", False, True, 8 * 513),  # rows of five blocks, the last of one element
    ],
    ids=["dense", "transposed", "whole blocks", "cut blocks"],
)
def test_more_than_2_to_the_31_elements(shape, state_format, transposed, expanded, tail, monkeypatch):
    """Only the last two programs are launched, and only what they update is touched; nothing else may be."""
    whole = table.Rows.launches

    def last(self, device, geometry_of):
        [only] = whole(self, device, geometry_of)
        return [only._replace(programs=table.Programs(*(x[-2:] for x in only.programs)))]

    monkeypatch.setattr(table.Rows, "launches", last)
    monkeypatch.setattr(launch.Interpreter, "geometry", lambda self, kind: table.Geometry(2048, 2, 1))
    optimizer, tensors = large(shape, state_format, transposed, expanded)
    generator = torch.Generator().manual_seed(7)
    ends = {}
    for key, tensor in tensors.items():
        if tensor.dim() == 0:
            continue
        ends[key] = end = end_of(tensor, tail // shape[1] * tensor.shape[1] if key.endswith("scale") else tail)
        if end.dtype == torch.uint8:
            end.random_(0, 256, generator=generator)
        elif key != "grad" or not expanded:
            values = torch.randn(end.shape, generator=generator)
            end.copy_(values.abs() if "_sq" in key or "scale" in key else values)
    others = [slice(9000), slice(-tail - 9000, -tail)]  # where counts of 32 bits would lead, and just before the end
    if tensors["grad"].is_contiguous():
        for other in others:
            tensors["grad"].view(-1)[other] = 1.0  # which would move a parameter

    twin = Parameter(ends["param"].clone())
    twin.grad = ends["grad"].clone()
    wanted = optim.AdamW([twin], state_format=state_format, master_weights=False)
    kept = tensors.keys() - {"param", "grad"}
    wanted.state[twin] = {key: ends.get(key, tensors[key]).clone() for key in kept}
    numbering = Numbering(math.prod(shape) - tail, 2**62, 0)
    with monkeypatch.context() as patch, on("reference"):
        patch.setattr(shards, "numbering", lambda param, name: numbering)
        wanted.step()
    with on("cuda"):
        optimizer.step()
    [wanted] = results(wanted)
    assert_same(
        [{key: end for key, end in ends.items() if key != "grad"}], [{k: wanted[k] for k in ends if k != "grad"}]
    )
    if tensors["param"].is_contiguous():
        assert not any(tensors["param"].view(-1)[other].any() for other in others)


def test_squares_of_more_than_2_to_the_31_elements(monkeypatch):
    """The last program sums up chunks at the end, and its sums are the last."""
    optimizer, tensors = large((2**31 + 5000,), "bf16", False, False)
    tensors["grad"][-9000:] = draw(0, (9000,))
    whole = table.Rows.squares
    monkeypatch.setattr(table.Rows, "launches", lambda *_: [])
    with on("cuda"):
        optimizer.step()
        device = device_plan(optimizer)

        def last(self, device, together):
            [(kind, programs, to)], chunks = whole(self, device, together)
            return [(kind, table.Programs(*(x[-1:] for x in programs)), to[-1:])], chunks

        monkeypatch.setattr(table.Rows, "squares", last)
        [resident] = device._residents.values()
        squaring = resident.measuring().launches[0]
        resident.launcher.launch(squaring.prepared, squaring.programs, squaring.args, squaring.kind)
    sums = squaring.args[4][: 2**19 + 2]
    assert sums.nonzero().flatten().tolist() == [2**19, 2**19 + 1]
    for number in (2**19, 2**19 + 1):
        chunk = tensors["grad"][4096 * number :][:4096].double()
        assert sums[number].item() == engine.ordered_sum(chunk.square())


# Rows, groups and time


def lived(seed, engines, resumes):
    """Parameters that come and go, in groups that change, each step on the engine of its number.

    ``resumes``: the steps before which all is begun anew from a file.
    """
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64]
    shapes = itertools.cycle([(64, 64), (33, 131), (7,), (), (3, 5), (0, 4), (40, 4, 33)])
    kinds = list(itertools.product(FORMATS, dtypes))
    params = [
        Parameter(draw(k, shape, dtype if dtype.is_complex else torch.float32).to(dtype))
        for k, ((_, dtype), shape) in enumerate(zip(kinds, shapes, strict=False))
    ]

    def new():
        groups = [
            {"params": params[k * 5 : k * 5 + 5], "state_format": state_format, "amsgrad": k == 1}
            for k, state_format in enumerate(FORMATS)
        ]
        return optim.AdamW(groups, lr=0.01)

    optimizer = new()
    generator = torch.Generator().manual_seed(seed)
    for step, name in enumerate(engines):
        if step in resumes:
            state, values = through_a_file([optimizer.state_dict(), [param.detach() for param in params]])
            params[:] = map(Parameter, values)
            optimizer = new()
            optimizer.load_state_dict(state)
        if step == 3:  # amsgrad is switched on later
            optimizer.param_groups[0]["amsgrad"] = True
        optimizer.param_groups[step % 3]["lr"] *= 0.7
        takes_part = (torch.rand(len(params), generator=generator) < 0.7).tolist()
        for number, (param, takes) in enumerate(zip(params, takes_part, strict=True)):
            values = draw(100 * step + number, param.shape, param.dtype if param.is_complex() else torch.float32)
            param.grad = values.to(param.dtype) if takes else None
        with on(name):
            optimizer.step()
    return results(optimizer)


@pytest.mark.parametrize("seed", range(3))
def test_rows_that_come_and_go_and_resuming_on_another_engine(seed):
    names = ["cpu", "cuda", "reference"]
    wanted = lived(seed, ["reference"] * 6, [])
    assert {int(row["step"]) for row in wanted if "step" in row} >= {3, 4, 5}  # in one group
    assert_same(lived(seed, ["cuda"] * 6, []), wanted, "cuda")
    assert_same(lived(seed, (names * 2)[seed:] + names[:seed], [2, 4, 5]), wanted, "in turns")
    assert_same(lived(seed, ["cuda", "cuda", *names, "cuda"], []), wanted, "in turns, with the state that there is")


# Sums of squares


def measured(optimizer):
    """Each gradient's sum of squares and all of them together, as the engine in use gives them; then the norm."""
    found = []
    native = engine.Plan.measure

    def measure(plan):
        native(plan)
        found.append((plan.squares(), plan.square_sum()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.Plan, "measure", measure)
        optimizer.nonfinite = "error"  # so that the host decides
        optimizer.step()
    [(squares, total)] = found
    optimizer.nonfinite = "propagate"
    optimizer.step()
    assert optimizer.grad_norm.item() == math.sqrt(total)
    return squares, total


SUMS = [1, 31, 32, 33, 4095, 4096, 4097, 8 * 4096 - 1, 8 * 4096, 8 * 4096 + 1, 9 * 4096 + 5]


def of_sizes(sizes, dtype, gradient_dtype, lies):
    """After two steps of all rows some have no gradient: they stay in the tables."""
    params = [Parameter(torch.zeros(size, dtype=dtype)) for size in sizes]
    optimizer = optim.AdamW(params)
    for number, param in enumerate(params):
        param.grad_dtype = None
        param.grad = LIES[lies](uneven(number, param.shape, gradient_dtype))
    optimizer.step()
    optimizer.step()
    for param in params[2::4]:
        param.grad = None
    optimizer.max_grad_norm = math.inf
    return optimizer


@pytest.mark.parametrize(
    ("dtype", "gradient_dtype", "lies"),
    [
        (torch.float32, torch.float32, "dense"),
        (torch.float32, torch.float64, "strided"),
        (torch.bfloat16, torch.bfloat16, "strided"),
        (torch.bfloat16, torch.float16, "dense"),
        (torch.float64, torch.bfloat16, "dense"),
        (torch.float64, torch.float64, "expanded"),
        (torch.complex64, torch.complex128, "dense"),
    ],
    ids=str,
)
def test_squares_of_any_size(dtype, gradient_dtype, lies):
    """Rows without a gradient, in between, take no place in the sum."""
    found = []
    for name in ("reference", "cpu", "cuda"):
        with on(name):
            found.append(measured(of_sizes(SUMS[:: 1 if dtype == gradient_dtype else 2], dtype, gradient_dtype, lies)))
    assert found[0] == found[1] == found[2]


def test_empty_gradients_take_a_place_in_the_sum():
    for number in range(20):
        norms = []
        for name in ("reference", "cuda"):
            params = [Parameter(torch.zeros(size)) for size in (1, 0, 1, 1, 1, 0, 1, 1, 1)]
            for param, values in zip(params, draw(number, (9, 1)), strict=True):
                param.grad = values[: param.numel()].clone()
            optimizer = optim.AdamW(params, max_grad_norm=math.inf)
            with on(name):
                norms.append(measured(optimizer))
        assert norms[0] == norms[1]


def summed_up(values, counts, order=None):
    """Runs of sums, one after the other, by the levels of the kernel; float64[3, runs]."""
    counts = np.array(counts, np.int64)
    begins = np.cumsum(counts) - counts
    interpreter = launch.Interpreter()
    while True:
        segments, parts, starts = table.cut(counts, begins)
        sums = torch.zeros(3, int(parts.sum()), dtype=torch.float64)
        words = torch.from_numpy(np.concatenate([segments.begin, segments.length, segments.to]))
        args = (values, sums, words, words if order is None else order, values.shape[1], sums.shape[1])
        interpreter.launch(launch.sum_up, len(segments.begin), args, (order is not None,))
        if parts.max() <= 1:
            return sums, np.flatnonzero(parts).tolist()
        values, counts, begins, order = sums, parts, starts, None


def test_sums_of_sums():
    counts = [1, 31, 32, 33, 0, 640, 4095, 4096, 4097, 0, 3 * 4096 + 40]
    runs = [uneven(k, (count,), torch.float64).square() for k, count in enumerate(counts)]
    others = [draw(k, (2, count), torch.float64).abs() for k, count in enumerate(counts)]
    sums, which = summed_up(torch.cat([torch.cat(runs)[None], torch.cat(others, 1)]), counts)
    assert which == [k for k, count in enumerate(counts) if count]
    for number, k in enumerate(which):
        assert sums[:, number].tolist() == [engine.ordered_sum(runs[k]), *others[k].amax(1).tolist()], counts[k]
    assert any(engine.ordered_sum(run) != engine.ordered_sum(run.flip(0)) for run in runs)  # the order shows


@pytest.mark.parametrize("rows", [5, 700, 4096, 4096 + 900])
def test_the_sum_over_rows_leaves_out_those_without_a_gradient(rows):
    """As many as a chunk and more."""
    own = torch.rand(rows, generator=torch.Generator().manual_seed(rows)) < 0.8
    values = torch.stack([uneven(0, (rows,), torch.float64), *draw(0, (2, rows), torch.float64).abs()])
    values[:, ~own] = math.nan  # what was there before
    sums, _ = summed_up(values, [int(own.sum())], own.nonzero().flatten())
    assert sums.flatten().tolist() == [engine.ordered_sum(values[0, own]), *values[1:, own].amax(1).tolist()]


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    st.lists(
        st.one_of(st.sampled_from([0, 1, 4095, 4096, 4097, 4096 * 4096, 4096 * 4096 + 1]), st.integers(0, 2**26)),
        min_size=1,
        max_size=6,
    )
)
def test_runs_are_cut_into_chunks_that_cover_them(counts):
    counts = np.array(counts, np.int64)
    begins = np.cumsum(counts) - counts + 5
    segments, parts, starts = table.cut(counts, begins)
    assert parts.tolist() == [-(-count // 4096) for count in counts.tolist()]
    assert segments.to.tolist() == list(range(int(parts.sum())))
    for begin, count, start, number in zip(begins, counts, starts, parts, strict=True):
        own = slice(start, start + number)
        assert np.array_equal(segments.begin[own], begin + 4096 * np.arange(number))
        assert segments.length[own].sum() == count
        assert (segments.length[own][:-1] == 4096).all()
        assert (segments.length[own] > 0).all()
