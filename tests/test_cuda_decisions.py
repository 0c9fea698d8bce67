"""Guards that a device decides as the host would: a clip factor, which steps are left out, where the step counts then
are.

All is compared to the bit with the CPU engine, whose host decides, over long random sequences: schedules, rows that
take part now and then, steps in backward, statistics, copies and state that is replaced while only the device knows
the counts. That nobody waits for a decision is in test_cuda_waits.py; steps that are captured are in
test_cuda_graphs.py.
"""

import copy
import itertools
import math
import pickle
import random
import threading

import pytest
import torch

from bits import World, assert_same, draw, on, peek
from deciding import SHAPES, Pair, decisions, every_kind
from launchers import settled

# The device decides as the host does


def bad_values(dtype):
    real = dtype.to_real() if dtype.is_complex else dtype
    large = {torch.float64: 2.0**600, torch.float16: math.inf}.get(real, 2.0**70)
    return math.nan, math.inf, -math.inf, large


def random_gradients(pair, chance, dtype, spoil):
    """Of any size; some parameters have none; where there is something to `spoil`, one number of one is bad."""
    seeds = [chance.randrange(2**30) for _ in SHAPES]
    size = 10.0 ** chance.randrange(-3, 3)
    given = [chance.random() > 0.1 for _ in SHAPES]
    gradients = [
        (draw(seed, shape, dtype if dtype.is_complex else torch.float32) * size).to(dtype) if has else None
        for seed, shape, has in zip(seeds, SHAPES, given, strict=True)
    ]
    if spoil:
        which = chance.choice([k for k, g in enumerate(gradients) if g is not None and g.numel()] or [None])
        if which is not None:
            reals = torch.view_as_real(gradients[which]) if dtype.is_complex else gradients[which]
            reals.view(-1)[chance.randrange(reals.numel())] = chance.choice(bad_values(dtype))
    for world in pair.worlds:
        for param, gradient in zip(world.params, gradients, strict=True):
            param.grad = None if gradient is None else gradient.clone()


def reread(optimizer, how):
    """Everything that shows step counts; a copy goes on in the place of what it is a copy of."""
    if how == "state":
        assert len(optimizer.state)
    elif how == "skipped_steps":
        assert optimizer.skipped_steps >= 0
    elif how == "state_dict":
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    elif how == "pickle":
        return pickle.loads(pickle.dumps(optimizer))
    elif how == "deepcopy":
        return copy.deepcopy(optimizer)
    return optimizer


RARELY = ("state", "skipped_steps", "state_dict", "pickle", "deepcopy")


@pytest.mark.slow
@every_kind
def test_long_random_sequences(dtype, options, device):
    chance = random.Random(str((dtype, options)))
    pair = Pair(dtype, SHAPES, nonfinite="skip", **options)
    rates = [[torch.tensor(0.01 * (1 + k), dtype=kind) for k in range(2)] for kind in (torch.float32, torch.float64)]
    pair.each(lambda world: world.optimizer.observe())
    for step in range(18):
        what = f"step {step}"
        random_gradients(pair, chance, dtype, spoil=chance.random() < 0.3)
        scale = chance.choice([None, None, 2.0**-3, 1000.0])
        found_inf = chance.choice([None, 0.0, 0.0, 1.0])
        bound = chance.choice([None, 0.5, 10.0, math.inf])
        rate = chance.choice([0.02, *rates])
        if isinstance(rate, list):
            for tensor in rate:
                tensor.mul_(0.9)
        beta1 = chance.choice([0.9, 0.9, 0.3])

        for world in pair.worlds:
            optimizer = world.optimizer
            optimizer.max_grad_norm = bound
            optimizer.grad_scale = None if scale is None else torch.tensor(scale)
            optimizer.found_inf = None if found_inf is None else torch.tensor(found_inf)
            for number, group in enumerate(optimizer.param_groups):
                group["lr"] = rate[number] if isinstance(rate, list) else rate * (1 + number)
            optimizer.param_groups[0]["beta1"] = beta1
        before = pair.theirs.optimizer._stepper.skipped.whole
        pair.step()
        if not (found_inf and bound is None):
            pair.compare_norms(what)
        if chance.random() < 0.4:
            how = chance.choice(RARELY)
            for world in pair.worlds:
                world.optimizer = reread(world.optimizer, how)
                world.params = [param for group in world.optimizer.param_groups for param in group["params"]]
        if step % 3 == 2:
            pair.compare(what)
        if before == pair.theirs.optimizer._stepper.skipped.whole and pair.theirs.optimizer._stepper.observations.seen:
            pair.compare_statistics(what)
    pair.compare("at last")
    assert decisions(device) > 8
    assert 2 < pair.ours.optimizer.skipped_steps < 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_bad_gradients_propagate_where_they_are_to(dtype, device):
    """A norm that is no number makes everything so, an infinite one zero; what `found_inf` says is left out."""
    for bad, bound in itertools.product([None, *bad_values(dtype)], [1.0, math.inf]):
        pair = Pair(dtype, ((3, 2), (7,)), max_grad_norm=bound)
        for step in range(4):
            pair.each(lambda world: world.set_gradients())
            for world in pair.worlds:
                if step == 2 and bad is not None:
                    world.params[1].grad[3] = bad
                world.optimizer.found_inf = torch.tensor(float(step == 1))
            pair.step()
            pair.compare_norms(f"{bad}, step {step}")
        pair.compare(f"{bad}")
        assert pair.ours.optimizer.skipped_steps == 1


SCHEDULES = {
    "OneCycleLR": lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=20),
    "CosineAnnealingLR": lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10),
}


@pytest.mark.parametrize("tensors", [False, True], ids=["numbers", "tensors"])
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_schedules(schedule, tensors, device):
    pair = Pair(nonfinite="skip", max_grad_norm=1.0)
    for world in pair.worlds:
        for group in world.optimizer.param_groups:
            group["lr"] = torch.tensor(group["lr"]) if tensors else group["lr"]
    schedules = [schedule(world.optimizer) for world in pair.worlds]
    for step in range(14):
        pair.each(lambda world: world.set_gradients())
        if step % 4 == 3:
            for world in pair.worlds:
                world.params[2].grad[0, 1, 1] = math.nan
        pair.step()
        for each in schedules:
            each.step()
        pair.compare_norms()
    pair.compare()
    assert decisions(device) == 13


def test_a_learning_rate_in_any_tensor(device):
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64):
        for shape in ((), (1,)):
            pair = Pair()
            rate = torch.ones(shape, dtype=dtype) / (1 if dtype == torch.int64 else 7)
            rate = rate.to(dtype)
            for world in pair.worlds:
                world.optimizer.param_groups[0]["lr"] = rate
            for _ in range(3):
                pair.each(lambda world: world.set_gradients())
                pair.step()
            pair.compare(str(dtype))
    assert decisions(device) == 2 * 10


def test_rows_that_take_part_now_and_then(device):
    """The counts of others are settled first; each group has several step counts; one parameter starts late."""
    pair = Pair(shapes=SHAPES, nonfinite="skip", max_grad_norm=1.0)
    chance = random.Random(3)
    for step in range(25):
        pair.each(lambda world: world.set_gradients())
        active = chance.choice([{0, 1, 2, 3, 4}, {1, 2}, {0, 3, 4}, {1}]) | ({5} if step > 12 else set())
        spoiled = min(active) if chance.random() < 0.3 else None
        for world in pair.worlds:
            for index, param in enumerate(world.params):
                if index not in active:
                    param.grad = None
            if spoiled is not None:
                world.params[spoiled].grad.view(-1)[0] = math.inf
        pair.step()
        if step % 5 == 4:
            pair.compare(f"step {step}")
    counts = {int(row["step"]) for row in settled(pair.ours.optimizer)}
    assert len(counts) >= 4
    assert decisions(device) > 15


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 0], ids=["", "some of them empty"])
def test_many_rows(size, device):
    """Where a row's sum stands among the others' decides the last bit of the norm."""
    pair = Pair(shapes=[(5,), (size,), (3,)] * 15, max_grad_norm=1.0)
    pair.each(lambda world: world.optimizer.observe())
    for step in range(6):
        for world in pair.worlds:
            world.set_gradients()
            for k, param in enumerate(world.params):
                param.grad *= 10.0 ** (k % 5)
        pair.step()
        pair.compare_norms(f"step {step}")
        pair.compare_statistics(f"step {step}")
    pair.compare()


# Statistics


@pytest.mark.parametrize("first", [0, 1, 3])
def test_a_step_that_the_device_leaves_out_keeps_the_statistics(first, device):
    """As one that the host leaves out: `statistics` tells of the last step that was taken."""
    pair = Pair(nonfinite="skip")
    pair.each(lambda world: world.optimizer.observe())
    for step in range(5):
        pair.each(lambda world: world.set_gradients())
        for world in pair.worlds:
            world.optimizer.grad_scale = torch.tensor(4.0 + step)
            if step > first:
                world.params[1].grad[2] = math.nan
        pair.step()
        pair.compare_statistics(f"step {step}")


# In backward


def test_steps_in_backward(device):
    pair = Pair(nonfinite="skip")
    for world in pair.worlds:
        world.optimizer.step_in_backward()
        world.optimizer.observe()
    chance = random.Random(5)
    for step in range(12):
        bad = chance.choice([None, None, 0, 1, 5])
        for name, world in zip(pair.names, pair.worlds, strict=True):
            with on(name):
                losses = [
                    (param * draw(100 * step + k, param.shape) * (math.nan if k == bad and step else 1.0)).sum()
                    for k, param in enumerate(world.params)
                ]
                sum(losses).backward()
                world.optimizer.step()
                assert all(param.grad is None for param in world.params)
        if step % 4 == 3:
            pair.compare(f"step {step}")
    pair.compare_statistics()
    assert decisions(device) == 4 * 11
    assert pair.ours.optimizer.skipped_steps > 2


def test_steps_left_out_in_backward_of_a_group_that_is_gone(device):
    pair = Pair(nonfinite="skip")
    for world in pair.worlds:
        world.optimizer.step_in_backward()
    for bad in (False, True):
        pair.each(
            lambda world, bad=bad: sum(
                (param * (math.nan if bad else 2.0)).sum() for param in world.params if param.numel()
            ).backward()
        )
    for world in pair.worlds:
        del world.optimizer.param_groups[1]
    ours, theirs = pair.each(lambda world: world.optimizer.skipped_steps)
    assert ours == theirs == 4


# Who counts


def test_a_copy_made_in_the_middle_has_right_counts(device):
    """And neither the copy nor the original counts what the other's device decides."""
    pair = Pair(nonfinite="skip")

    def steps(count, bad):
        for step in range(count):
            pair.each(lambda world: world.set_gradients())
            for world in pair.worlds:
                if step in bad:
                    world.params[1].grad[0] = math.nan
            pair.step()

    steps(6, {2, 4})
    copies = [copy.deepcopy(world.optimizer) for world in pair.worlds]
    params = [[param for group in each.param_groups for param in group["params"]] for each in copies]
    steps(3, {0, 1})
    pair.compare("the original")
    for world, each, own in zip(pair.worlds, copies, params, strict=True):
        world.optimizer, world.params = each, own
    pair.compare("the copy")
    steps(3, {1})
    pair.compare("the copy, later")
    assert pair.ours.optimizer.skipped_steps == 3


def test_counts_of_state_that_is_replaced_are_the_new_ones(device):
    pair = Pair(nonfinite="skip")

    def bad_step(world):
        world.set_gradients()
        world.params[1].grad[0] = math.nan
        world.optimizer.step()
        world.done += 1

    def act(world):
        world.run(2)
        saved = copy.deepcopy(world.optimizer.state_dict())
        world.run(2)
        bad_step(world)
        world.optimizer.load_state_dict(saved)
        bad_step(world)
        state = copy.deepcopy(dict(world.optimizer.state))
        world.optimizer.state = {param: state[twin] for param, twin in zip(world.params, state, strict=True)}
        bad_step(world)
        world.run(2)
        world.optimizer.state[world.params[2]]["step"] = torch.tensor(20.0)
        bad_step(world)
        world.run(1)
        del world.optimizer.state[world.params[3]]
        bad_step(world)
        world.run(2)

    pair.each(act)
    pair.compare()
    assert pair.ours.optimizer.skipped_steps == 5


def test_a_step_in_another_thread_while_counts_are_settled(device):
    """What the device decides while it is waited for must not be taken for settled."""
    with on("cuda"):
        world = World(nonfinite="skip").run(2)

        def bad_step():
            world.set_gradients()
            world.params[1].grad[0] = math.nan
            world.optimizer.step()

        bad_step()
        counts = world.optimizer._stepper.whole.plan._cuda.counts
        rows = counts.rows
        threads = []

        class Interrupting:
            def __getattr__(self, name):
                return getattr(rows, name)

            def correct(self, *args, **kwargs):
                if not threads:
                    threads.append(threading.Thread(target=bad_step))
                    threads[0].start()
                    threads[0].join(1.0)  # it may have to wait until this is over
                return rows.correct(*args, **kwargs)

        counts.rows = Interrupting()
        assert world.optimizer.state is peek(world.optimizer)
        (thread,) = threads
        thread.join()
        counts.rows = rows
        assert [entry["step"].item() for entry in world.optimizer.state.values()] == [2.0] * 4
        assert world.optimizer.skipped_steps == 2


def test_a_step_of_refused_groups_leaves_the_counts_that_a_device_decides():
    """The plan is that of the groups before, so its counts have to be, too."""

    def run(name):
        with on(name):
            world = World(nonfinite="skip").run(3)
            params = world.optimizer.param_groups[0]["params"]
            params.append(params[0])
            world.set_gradients()
            with pytest.raises(ValueError, match="more than once"):
                world.optimizer.step()
            params.pop()
            for spoiled in (False, True, False):
                world.set_gradients()
                if spoiled:
                    world.params[0].grad.view(-1)[0] = math.nan
                world.optimizer.step()
            return settled(world.optimizer), world.optimizer.skipped_steps

    ours, theirs = run("cuda"), run("cpu")
    assert ours[1] == theirs[1] == 1
    assert_same(ours[0], theirs[0])
