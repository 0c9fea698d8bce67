"""Guards that the CUDA engine gives the reference's bits: its Triton kernels, interpreted on the CPU.

Where no GPU is, this is the proof that the kernels compute what the contract says; on one, tests/gpu has to show only
that compiling changes no bit. Every test runs the same steps on the reference engine and compares all that they wrote.
What is alike for all engines is tested elsewhere, with the fixture `engine_name`; here is what it does not reach: the
whole grid of numbers, hostile state, any layout. Very large tensors are in test_cuda_large.py, sums of squares in
test_cuda_sums.py.
"""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import Parameter

import lucid.optim as optim
from bits import World, assert_same, draw, on, results, through_a_file
from formats import HALVES, step_any_format_in_any_layout
from launchers import device_plan
from layouts import CUTS, DENSE, check, gradients_like, step_in_any_layout
from lucid.engine.cuda import launch, row_table
from patterns import DTYPES, REAL_GRADIENTS, patterns, whole_grid
from quick import examples

FORMATS = ["fp32", "bf16", "8bit"]
# Parameter, format, whether with master weights.
KINDS = [
    *((torch.float32, state_format, True) for state_format in FORMATS),
    *itertools.product(HALVES, FORMATS, [True, False]),
]


@pytest.fixture
def small_tiles(monkeypatch):
    """Programs of a few tiles each, as on a GPU, not of one that holds all of a small tensor."""
    monkeypatch.setattr(launch.Interpreter, "geometry", lambda self, kind: row_table.Geometry(512, 2, 1))


def assert_equal_runs(run, what=""):
    """`run` on the CUDA engine gives what it gives on the reference."""
    with on("reference"):
        wanted = run()
    with on("cuda"):
        assert_same(run(), wanted, what)


# Numbers


@pytest.mark.slow
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


@settings(max_examples=examples(25), deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_any_layout_of_parameter_gradient_and_state(data):
    with on("cuda"):
        step_in_any_layout(data)


@settings(max_examples=examples(25), deadline=None, derandomize=True, database=None)
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
                [resident] = device_plan(optimizer)._tables.values()
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
            [resident] = device_plan(optimizer)._tables.values()
            assert [set(each.programs.rows.tolist()) for each in resident._updates] == [{0}, {1}, {2}, {3}]
        return results(optimizer)

    assert_equal_runs(run)


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
