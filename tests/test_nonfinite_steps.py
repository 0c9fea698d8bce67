"""Guards what `nonfinite` makes of a bad gradient: a step that is left out without a trace, an error in words, or the
rule.

A step that is left out must leave no trace but its count, in schedules, copies, checkpoints and on other processes
too.
"""

import copy
import gc
import itertools
import math
import pickle

import pytest
import torch
from benchmarks.footprint import resident_bytes
from torch.nn import Parameter

import lucid.optim as optim
from bits import SEALED, assert_same, draw, is_sealed, on, peek, results, snapshot, through_a_file
from gradients import KINDS, LIES, Mixed, two_engines
from lucid import engine
from spoiled import FEW, LEVELS, bad_values, reals_in, single, spoilable, with_entry

# No trace


def set_spoiled(world):
    """Set the gradients of a step, one of them bad; without the step's having been."""
    world.set_gradients()
    world.done -= 1
    index = spoilable(world)[world.done % 5]
    param = world.params[index]
    param.grad = with_entry(param.grad, world.lies[index][2], reals_in(param.grad) // 2, math.nan)


@pytest.mark.parametrize(
    ("name", "warm"), [("cpu", 0), ("cpu", 1), ("cpu", SEALED), ("reference", 0), ("reference", 1)]
)
@pytest.mark.parametrize(("dtype", "state_format"), KINDS, ids=str)
def test_training_goes_on_as_if_the_bad_step_had_not_been(dtype, state_format, name, warm):
    """Also where it came first, or was to be some parameters' first: then no state appears."""
    number = KINDS.index((dtype, state_format)) + (warm == 1)
    nonfinite, max_grad_norm = ("skip", "error")[number % 2], (None, 0.5)[number // 2 % 2]
    world = Mixed(dtype, state_format, FEW, nonfinite=nonfinite, max_grad_norm=max_grad_norm)
    twin = Mixed(dtype, state_format, FEW, max_grad_norm=max_grad_norm)

    def good(each, late):
        each.set_gradients()
        if not late:
            each.params[-1].grad = each.params[2].grad = None
        each.optimizer.step()

    with on(name):
        for _, each in itertools.product(range(warm), (world, twin)):
            good(each, late=False)
        for number in range(2):
            set_spoiled(world)
            before = snapshot(world.optimizer)
            versions = [param._version for param in world.params]
            assert warm < SEALED or number or is_sealed(world.optimizer)
            if nonfinite == "error":
                with pytest.raises(FloatingPointError, match="1 NaN of"):
                    world.optimizer.step()
            else:
                world.optimizer.step()
            assert snapshot(world.optimizer) == before
            assert len(peek(world.optimizer)) == (0 if warm + number == 0 else len(peek(twin.optimizer)))
            assert [param._version for param in world.params] == versions
            for each in (world, twin):
                good(each, late=True)
            assert_same(results(world.optimizer), results(twin.optimizer), f"bad step {number}")
        for _, each in itertools.product(range(2), (world, twin)):
            good(each, late=True)
    assert_same(results(world.optimizer), results(twin.optimizer))
    assert world.optimizer.skipped_steps == (2 if nonfinite == "skip" else 0)


@pytest.mark.parametrize(("dtype", "state_format"), KINDS, ids=str)
def test_propagate_does_what_the_reference_makes_of_it(dtype, state_format):
    """On every SIMD level: nothing is left out, and the rest of a bad gradient's tensor trains on."""

    def run():
        world = Mixed(dtype, state_format)
        for step in range(3):
            world.set_gradients()
            for number, index in enumerate(spoilable(world)):
                param = world.params[index]
                if step == 1 and number % 2:
                    values = bad_values(param, param.grad.dtype)
                    where = number * 37 % reals_in(param.grad)
                    param.grad = with_entry(param.grad, world.lies[index][2], where, values[number // 2 % len(values)])
            world.optimizer.step()
        assert world.optimizer.skipped_steps == 0
        return results(world.optimizer)

    with on("reference"):
        wanted = run()
    lost = sum(int(row["param"].isnan().any()) for row in wanted)
    assert 8 <= lost < len(wanted)
    for level in LEVELS:
        with engine.cpu.forced_simd_level(level):
            assert_same(run(), wanted, level)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 2.0**64, 2.0**70])
def test_propagate_is_the_rule_on_that_element_alone(bad, engine_name):
    """By hand, for the first two steps: a square that overflows spoils the parameter one step later."""
    optimizer = single(with_entry(torch.ones(20), "dense", 13, bad), torch.ones(20))
    with on(engine_name):
        optimizer.step()
        first = results(optimizer)[0]
        optimizer.param_groups[0]["params"][0].grad = torch.ones(20)
        optimizer.step()
    second = results(optimizer)[0]
    finite = math.isfinite(bad)
    assert first["exp_avg_sq"][13] == math.inf or math.isnan(bad)
    assert bool(first["param"][13].isfinite()) == finite
    assert second["exp_avg_sq"][13].isnan()
    assert second["param"][13].isnan()
    for key in ("param", "exp_avg", "exp_avg_sq"):
        others = torch.cat([second[key][:13], second[key][14:]])
        assert others.isfinite().all()
        assert (others == others[0]).all()


# What an error says


def test_the_error_names_the_first_bad_parameter_and_counts(engine_name):
    named = {"encoder.weight": (30, 4), "encoder.bias": (30,), "head": (3, 50)}
    params = {name: Parameter(torch.zeros(shape)) for name, shape in named.items()}
    optimizer = optim.AdamW(list(params.items()), nonfinite="error")
    for param in params.values():
        param.grad = torch.ones(param.shape)
    first = params["encoder.bias"].grad
    first[3:6] = math.nan
    first[[9, 12]] = torch.tensor([math.inf, -math.inf])
    first[20:24] = torch.tensor([2.0**64, -(2.0**64), 3e38, -1e30])
    params["head"].grad[1, 1] = math.inf
    with on(engine_name), pytest.raises(FloatingPointError) as caught:
        optimizer.step()
    counts = "3 NaN, 2 infinite, 4 too large to be squared of 30 entries"
    assert str(caught.value).startswith(
        f"the gradient of parameter 'encoder.bias' has {counts}, so nothing was updated"
    )
    assert 'nonfinite="skip"' in str(caught.value)
    first.fill_(1.0)
    with on(engine_name), pytest.raises(FloatingPointError, match=r"'head' has 1 infinite of 150 entries, so nothing"):
        optimizer.step()
    params["head"].grad.fill_(-1e25)
    with on(engine_name), pytest.raises(FloatingPointError, match=r"'head' has 150 too large to be squared of 150 ent"):
        optimizer.step()
    params["head"].grad.fill_(1.0)
    with on(engine_name):
        optimizer.step()


def test_the_error_names_group_and_index_where_there_is_no_name(engine_name):
    groups = [[Parameter(torch.zeros(4)) for _ in range(3)] for _ in range(3)]
    optimizer = optim.AdamW([{"params": group} for group in groups], nonfinite="error")
    for param in groups[0] + groups[1][1:] + groups[2]:  # the first of group 1 has no gradient
        param.grad = torch.zeros(4)
    groups[1][2].grad[0] = groups[2][0].grad[0] = math.nan
    with (
        on(engine_name),
        pytest.raises(FloatingPointError, match=r"^the gradient of parameter 2 of group 1 has 1 NaN of 4"),
    ):
        optimizer.step()


@pytest.mark.parametrize("first", range(5))
def test_rows_of_several_engines_are_one_step(first):
    """The first bad one is named whichever engine has it, and neither engine writes."""
    params = [Parameter(draw(k, (9,))) for k in range(6)]
    optimizer = optim.AdamW(params, nonfinite="error")
    with two_engines():
        for step in range(3):
            for k, param in enumerate(params):
                param.grad = draw(10 * step + k, (9,))
                if step == 1 and k >= first:
                    param.grad[k] = math.nan
            before = snapshot(optimizer)
            if step == 1:
                with pytest.raises(FloatingPointError, match=f"parameter {first} of group 0 has 1 NaN"):
                    optimizer.step()
                assert snapshot(optimizer) == before
            else:
                optimizer.step()
    assert [row["step"] for row in results(optimizer)] == [2] * 6


def test_the_error_counts_both_parts_of_complex_entries(engine_name):
    gradient = torch.tensor([complex(math.nan, math.inf), complex(1.0, math.nan), 0, complex(-(2.0**64), 2.0)])
    for lies in ("dense", "lazy", "strided"):
        optimizer = single(LIES[lies](gradient), nonfinite="error")
        counts = "2 NaN, 1 infinite, 1 too large to be squared of 8 entries"
        with on(engine_name), pytest.raises(FloatingPointError, match=counts):
            optimizer.step()


@pytest.mark.parametrize("lies", ["dense", "transposed", "strided"])
def test_the_error_counts_the_whole_of_a_large_gradient(lies):
    gradient = torch.zeros(1100, 1001)
    for value, where in ((math.nan, (0, -1)), (-math.inf, (1, 2**20 - 1, 2**20))):
        gradient.view(-1)[list(where)] = value
    optimizer = single(LIES[lies](gradient), nonfinite="error")
    with pytest.raises(FloatingPointError, match="2 NaN, 3 infinite of 1101100 entries"):
        optimizer.step()


def test_the_error_speaks_of_gradients_as_they_are_used(engine_name):
    """In the compute type, unscaled and clipped; a float64 that a float32 cannot hold is infinite."""
    wide = single(torch.tensor([1.0, 1e300, -1e30], dtype=torch.float64), torch.zeros(3), nonfinite="error")
    with on(engine_name), pytest.raises(FloatingPointError, match=r"1 infinite, 1 too large to be squared of 3"):
        wide.step()
    scaled = single(torch.tensor([2.0**70, 2.0**80, 2.0**81]), nonfinite="error")
    scaled.grad_scale = torch.tensor(2.0**16)
    with on(engine_name), pytest.raises(FloatingPointError, match=r"has 2 too large to be squared of 3"):
        scaled.step()


# Around a step that is left out


@pytest.mark.parametrize("nonfinite", ["skip", "error"])
def test_closure_and_hooks_run(nonfinite, engine_name):
    param = Parameter(torch.ones(3))
    optimizer = optim.AdamW([param], nonfinite=nonfinite)
    called = []
    optimizer.register_step_pre_hook(lambda *_: called.append("before"))
    optimizer.register_step_post_hook(lambda *_: called.append("after"))

    def closure():
        called.append("closure")
        optimizer.zero_grad()
        loss = (param * math.inf).sum()
        loss.backward()
        return loss

    with on(engine_name):
        if nonfinite == "skip":
            assert optimizer.step(closure).item() == math.inf
            assert called == ["before", "closure", "after"]
        else:
            with pytest.raises(FloatingPointError, match="3 infinite of 3"):
                optimizer.step(closure)
            assert called == ["before", "closure"]
    assert torch.equal(param.detach(), torch.ones(3))


def test_a_schedule_goes_on():
    """Skipping is not known to torch's schedulers: they count the step, and do not warn that it was not taken."""
    optimizer = single(torch.full((2,), math.nan), nonfinite="skip")
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-4)


def test_the_norm_of_a_step_that_was_left_out_can_be_read(engine_name):
    optimizer = single(torch.tensor([3.0, math.inf]), nonfinite="skip", max_grad_norm=1.0)
    ((param,),) = (group["params"] for group in optimizer.param_groups)
    with on(engine_name):
        optimizer.step()
        assert optimizer.grad_norm == math.inf
        param.grad[0] = math.nan
        optimizer.step()
        assert optimizer.grad_norm.isnan()
        param.grad = torch.tensor([3.0, 4.0])
        optimizer.step()
        assert optimizer.grad_norm == 5.0


def test_the_count_is_of_steps_and_read_only(engine_name):
    optimizer = single(torch.ones(2), nonfinite="skip")
    ((param,),) = (group["params"] for group in optimizer.param_groups)
    counts = []
    with on(engine_name):
        for value in (math.nan, 1.0, math.inf, 1e30, 2.0):
            param.grad = torch.full((2,), value)
            optimizer.step()
            counts.append(optimizer.skipped_steps)
    assert counts == [1, 1, 2, 3, 3]
    assert type(optimizer.skipped_steps) is int
    assert results(optimizer)[0]["step"] == 2
    with pytest.raises(AttributeError):
        optimizer.skipped_steps = 0


# The option


@pytest.mark.parametrize("value", ["Skip", "", "raise", None, True, 1, ["skip"], b"skip"], ids=repr)
def test_other_values_are_refused(value):
    with pytest.raises(ValueError, match="nonfinite: expected one of 'propagate', 'skip', 'error', got ") as caught:
        optim.AdamW([Parameter(torch.ones(1))], nonfinite=value)
    assert repr(value) in str(caught.value)
    optimizer = optim.AdamW([Parameter(torch.ones(1))], nonfinite="error")
    with pytest.raises(ValueError, match="nonfinite"):
        optimizer.nonfinite = value
    assert optimizer.nonfinite == "error"


def test_it_may_change_between_steps(engine_name):
    optimizer = single(torch.full((2,), math.nan))
    assert optimizer.nonfinite == "propagate"
    with on(engine_name):
        optimizer.nonfinite = "skip"
        optimizer.step()
        optimizer.nonfinite = "error"
        with pytest.raises(FloatingPointError):
            optimizer.step()
        assert optimizer.skipped_steps == 1
        optimizer.nonfinite = "propagate"
        optimizer.step()
    assert results(optimizer)[0]["param"].isnan().all()
    assert optimizer.skipped_steps == 1


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_keep_option_and_count(copied):
    optimizer = single(torch.full((2,), math.nan), nonfinite="skip")
    optimizer.step()
    twin = copied(optimizer)
    assert (twin.nonfinite, twin.skipped_steps) == ("skip", 1)
    twin.param_groups[0]["params"][0].grad = torch.full((2,), math.nan)
    twin.step()
    assert (twin.skipped_steps, optimizer.skipped_steps) == (2, 1)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_keep_the_count_of_steps_in_backward(copied):
    param = Parameter(torch.ones(2))
    optimizer = optim.AdamW([param], nonfinite="skip")
    optimizer.step_in_backward()
    (param * math.nan).sum().backward()
    assert optimizer.skipped_steps == 1
    assert copied(optimizer).skipped_steps == 1


def test_loading_leaves_option_and_count(engine_name):
    optimizer = single(torch.full((2,), math.nan), nonfinite="skip")
    other = single(torch.ones(2))
    with on(engine_name):
        optimizer.step()
        other.step()
        optimizer.load_state_dict(through_a_file(other.state_dict()))
        assert (optimizer.nonfinite, optimizer.skipped_steps) == ("skip", 1)
        optimizer.step()
        assert (optimizer.nonfinite, optimizer.skipped_steps) == ("skip", 2)
        other.load_state_dict(through_a_file(optimizer.state_dict()))
        assert (other.nonfinite, other.skipped_steps) == ("propagate", 0)


# Two processes


STEPS, BAD_STEPS = 6, (0, 3)
REPLICAS = [
    (torch.float32, {"nonfinite": "skip"}),
    (torch.float32, {"nonfinite": "skip", "max_grad_norm": 0.1}),
    (torch.bfloat16, {"nonfinite": "skip", "state_format": "8bit"}),
    (torch.float32, {"nonfinite": "error"}),
]


def replica(dtype, options, rank, bad_steps):
    """Train; at bad steps, which are more, the loss of rank 1 is NaN. Returns the results and the last norm."""
    torch.manual_seed(rank)  # DDP makes them alike
    model = torch.nn.Sequential(torch.nn.Linear(8, 70), torch.nn.Tanh(), torch.nn.Linear(70, 65)).to(dtype)
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = optim.AdamW(model.named_parameters(), lr=1e-2, **options)
    left_out = 0
    for step in range(STEPS + len(bad_steps)):
        optimizer.zero_grad()
        loss = parallel(draw(100 * (step - left_out) + rank, (5, 8)).to(dtype)).square().mean()
        (loss * math.nan if step in bad_steps and rank == 1 else loss).backward()
        errors = left_out - optimizer.skipped_steps
        try:
            optimizer.step()
        except FloatingPointError as error:
            assert "parameter '" in str(error)  # noqa: PT017
            errors += 1
        left_out = errors + optimizer.skipped_steps
        assert left_out == sum(bad <= step for bad in bad_steps)
    return results(optimizer), optimizer.grad_norm


def replicas(folder):
    rank = torch.distributed.get_rank()
    found = [[replica(*each, rank, bad_steps) for bad_steps in (BAD_STEPS, ())] for each in REPLICAS]
    torch.save(found, folder / f"{rank}.pt")


def test_replicas_leave_out_the_same_steps(ranks, tmp_path):
    """A NaN on one rank reaches all of them in the averaged gradients; what they then are is alike, to the bit."""
    ranks.run(2, replicas, tmp_path)
    of_ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for first, second, (_, options) in zip(*of_ranks, REPLICAS, strict=True):
        wanted, norm = first[1]  # the first rank's without bad steps
        assert all(int(row["step"]) == STEPS and row["param"].isfinite().all() for row in wanted)
        for found, own_norm in (first[0], *second):
            assert_same(found, wanted, str(options))
            assert own_norm == norm


@pytest.mark.slow
def test_steps_that_are_never_taken_leave_nothing_behind():
    """Rows are bound anew in each of them."""
    params = [Parameter(torch.ones(3)) for _ in range(300)]
    optimizer = optim.AdamW(params, nonfinite="skip")
    sizes = []
    for _ in range(6):
        for param in params:
            param.grad = torch.full((3,), math.nan)
        for _ in range(40):
            optimizer.step()
        gc.collect()
        sizes.append(resident_bytes())
    assert optimizer.skipped_steps == 240
    assert sizes[-1] - sizes[1] < 160 * 300 * 100  # a row that stays takes some 300 bytes


def test_empty_parameters_of_two_types(engine_name):
    params = [Parameter(torch.zeros(0, dtype=dtype)) for dtype in (torch.complex64, torch.float32, torch.float64)]
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer = optim.AdamW(params, nonfinite="skip")
    with on(engine_name):
        optimizer.step()
    assert [int(optimizer.state[param]["step"]) for param in params] == [1, 1, 1]
