"""Guards `spike_threshold`: which steps it leaves out, that they leave no trace, and that its memory is saved.

That a device decides and remembers the same is in test_cuda_spikes.py.
"""

import copy
import math
import pickle
import random
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from benchmarks.spikes import RULES, left_out
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.nn import Parameter

import lucid.optim as optim
from bits import World, assert_same, on, results, snapshot, through_a_file
from interrupting import interrupted
from lucid import engine
from lucid.engine.spikes import MOST_IN_A_ROW, SPAN, TOO_LARGE, WARM_UP, Memory, judged
from lucid.optim.checkpoint import load_optimizer
from lucid.optim.matching import SPIKES
from spiking import WARM, Normed, lifelike, memory, ordinary

# The rule


def after(norms, threshold=6.0, start=Memory()):  # noqa: B008
    found, spikes = start, []
    for number, norm in enumerate(norms):
        verdict = judged(norm, threshold, found)
        found = verdict.memory
        spikes += [number] * verdict.spike
    return found, spikes


def test_the_first_norms_count_alike_then_the_last_ones():
    norms = [random.Random(1).uniform(1, 9) for _ in range(SPAN)]
    found, _ = after(norms)
    assert found.mean == pytest.approx(np.mean(norms), rel=1e-12)
    assert found.square == pytest.approx(np.var(norms), rel=0.05)
    assert found.seen == SPAN
    later, _ = after([20.0], start=found, threshold=100.0)
    assert later.mean == found.mean + (20.0 - found.mean) / SPAN
    assert later.square == found.square + ((20.0 - found.mean) ** 2 - found.square) / SPAN
    assert after([3.0])[0] == Memory(3.0, 0.0, 1, 0)


def test_a_steep_fall_at_the_start_is_soon_forgotten():
    """With a weight of 1/128 from the first norm on, that would have 60 % of the mean after 64."""
    found, _ = after([100.0] + [1.0] * 300)
    assert found.mean < 1.3
    assert found.mean + 6 * (math.sqrt(found.square) + found.mean / 2) < 40


@pytest.mark.parametrize(("threshold", "limit"), [(6.0, 4.0), (3.0, 2.5), (0.5, 1.25)])
def test_what_a_spike_is_where_norms_are_equal(threshold, limit):
    start, spikes = after([1.0] * 200, threshold)
    assert start == Memory(1.0, 0.0, SPAN, 0)
    assert not spikes
    assert not judged(limit, threshold, start).spike
    assert judged(math.nextafter(limit, 9.0), threshold, start).spike


def test_no_norm_is_a_spike_before_enough_have_been_seen():
    assert after([1.0] * (WARM_UP - 1) + [1e9])[1] == []
    assert after([1.0] * WARM_UP + [1e9])[1] == [WARM_UP]


def test_spikes_in_a_row():
    start, _ = after([1.0] * 100)
    few, spikes = after([9.0] * (MOST_IN_A_ROW - 1), start=start)
    assert (few, len(spikes)) == (start._replace(in_a_row=MOST_IN_A_ROW - 1), MOST_IN_A_ROW - 1)
    assert judged(1.0, 6.0, few).memory.in_a_row == 0
    assert judged(9.0, 6.0, few) == (True, Memory(), True)


def test_norms_that_change_nothing():
    start, _ = after([1.0] * 100 + [9.0])
    for norm in (0.0, math.nan, math.inf):
        assert judged(norm, 6.0, start) == (False, start, False)
    assert after([TOO_LARGE] * 3)[0] == Memory()
    assert judged(TOO_LARGE, 6.0, start).spike


@pytest.mark.parametrize("size", [5e-324, 1e-300, 1.0, 1e150, TOO_LARGE / 20])
def test_norms_of_any_size(size):
    found, _ = after([size * factor for factor in ordinary(300)])
    assert all(math.isfinite(value) for value in found)
    assert 0 <= found.mean < TOO_LARGE


# A step that is left out


NORMS = ordinary(4)


@pytest.mark.parametrize("options", [{}, {"state_format": "8bit", "amsgrad": True}, {"max_grad_norm": 0.5}], ids=str)
def test_a_bad_batch_is_left_out_as_if_it_had_not_come(options, engine_name):
    with on(engine_name):
        world = Normed(spike_threshold=6.0, shapes=((70, 64), (3,)), **options).steps(NORMS)
        memory_before = memory(world.optimizer)
        before = snapshot(world.optimizer)
        world.set_gradients(20.0)
        world.optimizer.step()
        assert world.optimizer.grad_norm == pytest.approx(20.0)
        assert memory(world.optimizer) == [*memory_before[:3], 1]
        world.set_gradients()
        world.optimizer.param_groups[0][SPIKES][3] = 0
        for param in world.params:
            param.grad = None
        assert snapshot(world.optimizer)[:2] == before[:2]
        world.steps(NORMS)
        twin = Normed(spike_threshold=6.0, shapes=((70, 64), (3,)), **options).steps(NORMS * 2)
        assert_same(results(world.optimizer), results(twin.optimizer))
        assert memory(world.optimizer) == memory(twin.optimizer)
        assert (world.optimizer.skipped_steps, twin.optimizer.skipped_steps) == (1, 0)


def test_without_a_spike_the_bits_are_those_of_training_without_a_threshold(engine_name):
    with on(engine_name):
        plain, looking = Normed().steps(NORMS), Normed(spike_threshold=4.0).steps(NORMS)
    assert_same(results(looking.optimizer), results(plain.optimizer))
    assert SPIKES not in plain.optimizer.param_groups[0]


def test_after_a_lasting_rise_training_goes_on(engine_name):
    """At 3 a norm three times as large is a spike, at 6 it is not."""
    with on(engine_name):
        world = Normed(spike_threshold=3.0, warm=[1.0, 0.0, SPAN, 0]).steps([1.0] * 2)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            world.steps([3.0] * 40)
            assert world.optimizer.skipped_steps == MOST_IN_A_ROW
        assert ["spike_threshold: 16 steps in a row" in str(each.message) for each in told] == [True]
        assert told[0].filename.startswith(str(Path(__file__).parent))
        mean, _, seen, in_a_row = memory(world.optimizer)
        assert (mean, seen, in_a_row) == (pytest.approx(3.0), 24, 0)
        assert {entry["step"].item() for entry in world.optimizer.state.values()} == {26.0}
        calm = Normed(spike_threshold=6.0, warm=[1.0, 0.0, SPAN, 0]).steps([3.0] * 20)
        assert calm.optimizer.skipped_steps == 0


def test_statistics_tell_spikes_apart():
    world = Normed(spike_threshold=6.0, nonfinite="skip")
    world.optimizer.observe()
    world.steps([1.0, math.nan, 20.0, 20.0, 1.0])
    numbers = world.optimizer.statistics()
    assert (numbers["skipped_steps"], numbers["skipped_spikes"]) == (3, 2)
    twin = pickle.loads(pickle.dumps(world.optimizer))
    assert (twin.skipped_steps, twin._stepper.skipped.spikes) == (3, 2)


# With other options


def test_the_norm_is_judged_before_it_is_clipped(engine_name):
    with on(engine_name):
        world = Normed(spike_threshold=6.0, max_grad_norm=0.1).steps([*NORMS, 20.0])
        assert world.optimizer.skipped_steps == 1
        assert memory(world.optimizer)[0] > 0.5


def test_the_norm_is_judged_after_gradscaler_has_unscaled(engine_name):
    with on(engine_name):
        world = Normed(spike_threshold=6.0)
        for number, norm in enumerate([*NORMS, 20.0, *NORMS]):
            scale = 2.0 ** (number % 30)
            world.set_gradients(norm * scale)
            world.optimizer.grad_scale, world.optimizer.found_inf = torch.tensor(scale), torch.tensor(0.0)
            world.optimizer.step()
            world.done += 1
        twin = Normed(spike_threshold=6.0).steps([*NORMS, 20.0, *NORMS])
        assert memory(world.optimizer) == pytest.approx(memory(twin.optimizer))
        assert world.optimizer.skipped_steps == 1
        before = memory(world.optimizer)
        world.set_gradients(1e9)
        world.optimizer.found_inf = torch.tensor(1.0)
        world.optimizer.step()
        assert memory(world.optimizer) == before
        assert world.optimizer.skipped_steps == 2
        assert world.optimizer._stepper.skipped.spikes == 1


@pytest.mark.parametrize("nonfinite", ["propagate", "skip", "error"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_norm_that_is_not_finite_is_left_to_nonfinite(nonfinite, bad, engine_name):
    with on(engine_name):
        world = Normed(spike_threshold=6.0, nonfinite=nonfinite).steps([*NORMS, 20.0])
        before = memory(world.optimizer)
        world.set_gradients()
        world.params[0].grad[0] = bad
        if nonfinite == "error":
            with pytest.raises(FloatingPointError, match=r"1 (NaN|infinite)"):
                world.optimizer.step()
        else:
            world.optimizer.step()
        assert memory(world.optimizer) == before
        assert world.optimizer._stepper.skipped.spikes == 1
        assert world.optimizer.skipped_steps == 1 + (nonfinite == "skip")


def test_steps_without_gradients_change_nothing(engine_name):
    with on(engine_name):
        world = Normed(spike_threshold=6.0).steps([*NORMS, 20.0])
        before = memory(world.optimizer)
        world.optimizer.zero_grad()
        world.optimizer.step()
        world.steps([0.0])
        assert memory(world.optimizer) == before


@pytest.mark.parametrize("fails", ["lr", "write"])
def test_a_step_that_fails_leaves_the_memory(fails, monkeypatch, engine_name):
    def stop(*_, **__):
        raise MemoryError

    with on(engine_name):
        for norms in ([], NORMS):
            world = Normed(spike_threshold=6.0).steps(norms)
            world.set_gradients()
            with monkeypatch.context() as patch:
                if fails == "lr":
                    world.optimizer.param_groups[0]["lr"] = -1.0
                else:
                    patch.setattr(engine.Plan, "_write", stop)
                before = snapshot(world.optimizer)
                with pytest.raises((ValueError, MemoryError)):
                    world.optimizer.step()
                assert snapshot(world.optimizer) == before
            world.optimizer.param_groups[0]["lr"] = 0.01
            twin = Normed(spike_threshold=6.0).steps(norms + NORMS)
            world.steps(NORMS)
            assert_same(results(world.optimizer), results(twin.optimizer))
            assert memory(world.optimizer) == memory(twin.optimizer)


# The option


BAD = {
    "0": (0, ValueError),
    "negative": (-6.0, ValueError),
    "infinite": (math.inf, ValueError),
    "too large": (10**400, ValueError),
    "NaN": (math.nan, ValueError),
    "bool": (True, TypeError),
    "str": ("6", TypeError),
    "tensor": (torch.tensor(6.0), TypeError),
}


@pytest.mark.parametrize(("value", "error"), BAD.values(), ids=BAD.keys())
def test_bad_thresholds_are_refused(value, error):
    with pytest.raises(error, match=r"spike_threshold: expected None or a (finite )?number.*got "):
        World(spike_threshold=value)
    world = World(spike_threshold=2.0)
    before = snapshot(world.optimizer)
    with pytest.raises(error, match="spike_threshold"):
        world.optimizer.spike_threshold = value
    assert (world.optimizer.spike_threshold, snapshot(world.optimizer)) == (2.0, before)


def test_the_threshold_may_change_between_steps():
    world = Normed()
    assert world.optimizer.spike_threshold is None
    world.optimizer.spike_threshold = 6
    world.optimizer.param_groups[0][SPIKES][:] = WARM
    assert (world.optimizer.spike_threshold, type(world.optimizer.spike_threshold)) == (6.0, float)
    world.steps(NORMS)
    seen = memory(world.optimizer)
    world.optimizer.spike_threshold = None
    world.steps([20.0])
    assert (memory(world.optimizer), world.optimizer.skipped_steps) == (seen, 0)
    world.optimizer.spike_threshold = 100.0
    world.steps([20.0])
    assert world.optimizer.skipped_steps == 0
    world.optimizer.spike_threshold = 1.0
    world.steps([20.0])
    assert world.optimizer.skipped_steps == 1


def test_a_step_in_backward_refuses_it():
    for first in (True, False):
        world = World(spike_threshold=6.0 if first else None)
        if first:
            with pytest.raises(ValueError, match="spike_threshold=6 does not work in backward"):
                world.optimizer.step_in_backward()
            world.optimizer.spike_threshold = None
        world.optimizer.step_in_backward()
        with pytest.raises(ValueError, match="spike_threshold=5 does not work in backward"):
            world.optimizer.spike_threshold = 5.0
        assert world.optimizer.spike_threshold is None
        assert SPIKES not in world.optimizer.param_groups[0] or first


MALFORMED = [3, [1.0, 2.0], [1.0, 2.0, 3, 16], [1.0, -2.0, 3, 0], [1.0, 2.0, 3.5, 0], [math.nan, 1.0, 3, 0], "1234"]


@pytest.mark.parametrize("value", MALFORMED, ids=str)
def test_what_is_no_memory_is_refused(value):
    world = Normed(spike_threshold=6.0).steps(NORMS)
    saved = world.optimizer.state_dict()
    for group in saved["param_groups"]:
        group[SPIKES] = value
    before = snapshot(world.optimizer)
    with pytest.raises(ValueError, match=r"spike_memory: expected \[mean norm"):
        world.optimizer.load_state_dict(saved)
    assert snapshot(world.optimizer) == before
    world.optimizer.param_groups[0][SPIKES] = value
    world.set_gradients()
    before = snapshot(world.optimizer)
    with pytest.raises(ValueError, match=r"spike_memory: expected \[mean norm"):
        world.optimizer.step()
    with pytest.raises(ValueError, match=r"spike_memory: expected \[mean norm"):
        world.optimizer.add_param_group({"params": [Parameter(torch.ones(2))]})
    assert snapshot(world.optimizer) == before
    off = Normed()
    off.optimizer.load_state_dict(saved)
    before = snapshot(off.optimizer)
    with pytest.raises(ValueError, match=r"spike_memory: expected \[mean norm"):
        off.optimizer.spike_threshold = 6.0
    assert (off.optimizer.spike_threshold, snapshot(off.optimizer)) == (None, before)


def test_a_new_group_shares_the_memory():
    world = Normed(spike_threshold=6.0).steps(NORMS)
    world.optimizer.add_param_group({"params": [Parameter(torch.ones(2))]})
    groups = world.optimizer.param_groups
    assert all(group[SPIKES] is groups[0][SPIKES] for group in groups)
    groups[1] = {key: value for key, value in groups[1].items() if key != SPIKES}
    world.steps([20.0])
    assert memory(world.optimizer)[3] == 1


# Checkpoints


def loaded(world, options):
    twin = Normed(**{"spike_threshold": 6.0, "warm": None} | options)
    for own, other in zip(twin.params, world.params, strict=True):
        own.data.copy_(other.data)
    twin.done = world.done
    return twin


def by_file(world, options):
    twin = loaded(world, options)
    twin.optimizer.load_state_dict(through_a_file(world.optimizer.state_dict()))
    return twin


def by_copy(copied):
    def act(world, options):
        world.optimizer = copied(world.optimizer)
        world.params = [param for group in world.optimizer.param_groups for param in group["params"]]
        return world

    return act


class Net(torch.nn.Module):
    def __init__(self, params):
        super().__init__()
        self.params = torch.nn.ParameterList(params)


def by_dcp(flat, ours=False):
    def act(world, options, folder):
        options_ = StateDictOptions(flatten_optimizer_state_dict=flat)
        twin = loaded(world, options)
        saved = get_optimizer_state_dict(Net(world.params), world.optimizer, options=options_)
        dcp.save({"optimizer": saved}, checkpoint_id=folder)
        net = Net(twin.params)
        if ours:
            load_optimizer(net, twin.optimizer, folder)
            return twin
        both = {"optimizer": get_optimizer_state_dict(net, twin.optimizer, options=options_)}
        dcp.load(both, checkpoint_id=folder)
        set_optimizer_state_dict(net, twin.optimizer, both["optimizer"], options=options_)
        return twin

    return act


WAYS = {
    "file": by_file,
    "deepcopy": by_copy(copy.deepcopy),
    "pickle": by_copy(lambda optimizer: pickle.loads(pickle.dumps(optimizer))),
    "DCP": by_dcp(flat=False),
    "DCP, flat": by_dcp(flat=True),
    "DCP, ours": by_dcp(flat=False, ours=True),
    "DCP, flat, ours": by_dcp(flat=True, ours=True),
}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize(
    ("engine_name", "way"),
    [*(("cpu", way) for way in WAYS), *(("cuda", way) for way in ("file", "pickle", "DCP, flat"))],
)
def test_training_resumes_with_the_same_bits(engine_name, way, tmp_path):
    """In the warm-up, among spikes in a row, at their last, and later."""
    norms = [*ordinary(6), *[20.0] * MOST_IN_A_ROW, *ordinary(5, size=20.0)]
    with on(engine_name), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "spike_threshold", RuntimeWarning)
        start = [1.0, 0.04, WARM_UP - 3, 0]
        whole = Normed(spike_threshold=6.0, warm=start).steps(norms)
        wanted = memory(whole.optimizer), results(whole.optimizer)
        world = Normed(spike_threshold=6.0, warm=start)
        begin = 0
        for stop in (1, 3, 4, 7, 21, 22, 23, len(norms)):
            world.steps(norms[begin:stop])
            begin = stop
            world = WAYS[way](world, {}, *([tmp_path / str(stop)] if way.startswith("DCP") else []))
        assert memory(world.optimizer) == wanted[0]
        assert_same(results(world.optimizer), wanted[1])


@pytest.mark.parametrize("state_format", ["bf16", "8bit"])
def test_another_format_keeps_the_memory(state_format):
    world = Normed(spike_threshold=6.0).steps([*NORMS, 20.0])
    twin = by_file(world, {"state_format": state_format})
    assert memory(twin.optimizer) == memory(world.optimizer)


def test_a_state_dict_does_not_change_as_training_goes_on():
    world = Normed(spike_threshold=6.0).steps(NORMS)
    saved = world.optimizer.state_dict()["param_groups"][0][SPIKES]
    before = saved.copy()
    world.steps(NORMS)
    assert saved == before != memory(world.optimizer)


def test_torch_has_no_place_for_the_memory():
    world = Normed(spike_threshold=6.0).steps(NORMS)
    theirs = world.optimizer.torch_state_dict()
    assert SPIKES not in theirs["param_groups"][0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        world.optimizer.load_state_dict(theirs)
    assert memory(world.optimizer) == list(Memory())


def test_a_checkpoint_keeps_the_memory_of_an_optimizer_that_does_not_look():
    world = Normed(spike_threshold=6.0).steps(NORMS)
    off = Normed()
    off.optimizer.load_state_dict(through_a_file(world.optimizer.state_dict()))
    off.steps(NORMS)
    assert memory(off.optimizer) == memory(world.optimizer)
    off.optimizer.spike_threshold = 6.0
    assert memory(off.optimizer) == memory(world.optimizer)


@pytest.mark.parametrize("engine_name", ["cpu", "reference"])
def test_long_sequences_are_judged_by_the_rule(engine_name):
    norms = lifelike(300, random.Random(5))
    with on(engine_name), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "spike_threshold", RuntimeWarning)
        world = Normed(spike_threshold=6.0, shapes=((2,),), warm=None)
        found, spikes = Memory(), 0
        for norm in norms:
            world.steps([norm])
            verdict = judged(world.optimizer.grad_norm.item(), 6.0, found)
            found, spikes = verdict.memory, spikes + verdict.spike
        assert memory(world.optimizer) == list(found)
        assert world.optimizer.skipped_steps == spikes > 10


@pytest.mark.parametrize("kind", [optim.AdamW])
def test_the_option_is_in_the_signature(kind):
    import inspect

    assert inspect.signature(kind).parameters["spike_threshold"].default is None


def test_the_rule_that_the_benchmark_compares_is_the_steps():
    for seed in range(5):
        norms = lifelike(400, random.Random(seed))
        positive = [norm for norm in norms if norm]
        assert left_out(RULES["√q + mean / 2, as it is"], positive)[0] == len(after(positive)[1])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # one that strikes a dying generator
def test_an_interrupt_at_every_point_leaves_step_and_memory_together():
    done = Normed(spike_threshold=6.0).steps([*NORMS, 1.0])
    finished, memory_after = results(done.optimizer), memory(done.optimizer)
    both = set()
    for at in range(1, 500):
        twin = Normed(spike_threshold=6.0).steps(NORMS)
        twin.set_gradients(1.0)
        before = snapshot(twin.optimizer)
        where = interrupted(twin.optimizer.step, at, "lucid")
        if where is None:
            break
        taken = snapshot(twin.optimizer) != before
        both.add(taken)
        if taken:
            assert_same(results(twin.optimizer), finished, where)
            assert memory(twin.optimizer) == memory_after, where
    assert both == {True, False}
