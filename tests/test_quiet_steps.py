"""Guards that a step in which nothing has changed stays short, and that what it leaves out is there for who needs it.

Hooks, profilers and torch.compile get torch's wrapper around ``step`` as soon as there is one of them. Groups are read
again when they hold another object under any key that a step reads.
"""

import contextlib
import json
import numbers
import sys

import numpy as np
import pytest
import torch
import torch.optim.optimizer as base
from torch.nn import Parameter

import lucid.optim as optim
from bits import SEALED, World, assert_same, results
from changed import AT_ANY_MOMENT, both
from lucid import engine


def quiet(steps=SEALED, **options):
    param = Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    optimizer = optim.AdamW([param], **options)
    for _ in range(steps):
        optimizer.step()
    return param, optimizer


# Who listens

HOOKS = {
    "pre": lambda optimizer, hook: optimizer.register_step_pre_hook(hook),
    "post": lambda optimizer, hook: optimizer.register_step_post_hook(hook),
    "global pre": lambda optimizer, hook: base.register_optimizer_step_pre_hook(hook),
    "global post": lambda optimizer, hook: base.register_optimizer_step_post_hook(hook),
}


@pytest.mark.parametrize("kind", HOOKS)
def test_a_hook_of_a_running_optimizer_is_called_until_it_is_removed(kind):
    _, optimizer = quiet()
    called = []
    handle = HOOKS[kind](optimizer, lambda *given: called.append(given))
    optimizer.step()
    optimizer.step()
    handle.remove()
    optimizer.step()
    assert called == [(optimizer, (optimizer,), {})] * 2


@pytest.mark.parametrize("kind", ["post", "global post"])
def test_a_hook_that_a_closure_registers_is_called_after_this_step(kind):
    def closure():
        handles.append(HOOKS[kind](optimizer, lambda *given: called.append(given[0])))

    _, optimizer = quiet()
    handles, called = [], []
    optimizer.step(closure)
    handles.pop().remove()
    optimizer.step(closure=closure)
    handles.pop().remove()
    assert called == [optimizer] * 2


def test_a_profiler_of_a_running_optimizer_sees_its_steps():
    _, optimizer = quiet()
    for _ in range(2):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            optimizer.step()
        optimizer.step()
        assert {e.key: e.count for e in profile.key_averages()}["Optimizer.step#AdamW.step"] == 1


def test_an_execution_trace_sees_steps(tmp_path):
    """No profiler runs then."""
    _, optimizer = quiet()
    file = tmp_path / "trace.json"
    trace = torch.profiler.ExecutionTraceObserver().register_callback(str(file))
    trace.start()
    optimizer.step()
    trace.stop()
    optimizer.step()
    trace.unregister_callback()
    names = [node["name"] for node in json.loads(file.read_text())["nodes"]]
    assert names.count("Optimizer.step#AdamW.step") == 1


def test_nothing_is_recorded_while_nobody_listens(monkeypatch):
    _, optimizer = quiet()
    recorded = []

    def record(name):
        recorded.append(name)
        return contextlib.nullcontext()

    monkeypatch.setattr(torch.autograd.profiler, "record_function", record)
    optimizer.step()
    optimizer.step(None)  # as Accelerate calls it
    assert not recorded
    monkeypatch.setattr(engine.cpu, "is_recorded", lambda: True)  # as where torch cannot be asked
    optimizer.step()
    assert recorded == ["Optimizer.step#AdamW.step"]


def calls_of_hooks(kind, order):
    """How often hooks are called in a step of a class, and of one that overrides its `step`, both never made before."""

    class Base(kind):
        step = kind.step
        while hasattr(step, "hooked"):
            step = step.__wrapped__

    class Mine(Base):
        def step(self, closure=None):
            return super().step(closure)

    found = []
    for made in order.split():
        param = Parameter(torch.ones(3))
        param.grad = torch.ones(3)
        optimizer = {"base": Base, "mine": Mine}[made]([param])
        called = []
        optimizer.register_step_pre_hook(lambda *_, called=called: called.append("pre"))
        optimizer.register_step_post_hook(lambda *_, called=called: called.append("post"))
        optimizer.step()
        found.append(called)
    return found


@pytest.mark.parametrize("order", ["mine", "mine base mine", "base mine"])
def test_hooks_of_a_subclass_that_overrides_step_are_called_as_torchs(order):
    """Torch wraps the step of a class when it is made first, so that it depends on the order."""
    found = calls_of_hooks(optim.AdamW, order)
    assert found == calls_of_hooks(torch.optim.AdamW, order)
    assert found[0] == ["pre", "post"]


def test_an_override_that_torch_compile_leaves_alone_keeps_its_hooks():
    class Mine(optim.AdamW):
        @torch.compiler.disable
        def step(self, closure=None):
            return super().step(closure)

    param = Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    optimizer, called = Mine([param]), []
    optimizer.register_step_post_hook(lambda *_: called.append(1))
    optimizer.step()
    assert called
    assert optimizer.state[param]["step"] == 1


# What groups hold


class Dial(numbers.Real):
    """A number that changes while it stays the same object."""

    def __init__(self, value):
        self.value = value

    def __float__(self):
        return self.value

    def __eq__(self, other):
        return float(self) == other

    def __lt__(self, other):
        return float(self) < other

    def __le__(self, other):
        return float(self) <= other

    __hash__ = None


for method in sorted(numbers.Real.__abstractmethods__ - vars(Dial).keys()):
    setattr(Dial, method, None)
Dial.__abstractmethods__ = frozenset()


def number_of_numpy(world):
    world.optimizer.param_groups[0]["beta1"] = np.float64(0.25)


def number_that_changes(key):
    def change(world):
        dial = world.optimizer.param_groups[0][key] = Dial(0.1)
        world.run(2)
        dial.value = 0.6

    change.__name__ = f"{key}_that_changes"
    return change


def tensor_in_place(world):
    lr = world.optimizer.param_groups[0]["lr"] = torch.tensor(0.1)
    world.run(2)
    lr.fill_(0.7)


def tensor_and_number(world):
    world.optimizer.param_groups[0]["lr"] = torch.tensor(0.1)
    world.run(2)
    world.optimizer.param_groups[0]["lr"] = 0.6


def past_the_group(world):
    dict.__setitem__(world.optimizer.param_groups[0], "eps", 0.5)
    dict.update(world.optimizer.param_groups[1], beta2=0.5)


def equal_but_for_one(world):
    groups = world.optimizer.param_groups
    groups[0] = groups[0] | {"weight_decay": 0.5}


def plain_dict(world):
    groups = world.optimizer.param_groups
    groups[1] = dict(groups[1], beta1=0.5)


def exchanged(world):
    one, other = world.optimizer.param_groups
    for key in ("lr", "beta1", "weight_decay"):
        one[key], other[key] = other[key], one[key]
    one["lr"] = 0.3


def schedule(world):
    for number in range(3):
        for group in world.optimizer.param_groups:
            group["lr"] = 0.5 / (number + 1)
        world.run(1)


VALUE_CHANGES = [
    number_of_numpy,
    number_that_changes("lr"),
    number_that_changes("beta2"),
    tensor_in_place,
    tensor_and_number,
    past_the_group,
    equal_but_for_one,
    plain_dict,
    exchanged,
    schedule,
]


@AT_ANY_MOMENT
@pytest.mark.parametrize("change", VALUE_CHANGES, ids=lambda f: f.__name__)
def test_changes_of_values(change, warm):
    both(change, warm)


BAD = {
    "lr": [-1.0, None, True, "0.1", torch.ones(2)],
    "beta1": [1.0, True, None, torch.tensor(0.9)],
    "eps": [-1e-8, np.nan],
    "amsgrad": [0, 1, None],
    "state_format": ["fp33", None],
    "seed": [False, 0.0, -1],
    "params": [None, 3],
}


@pytest.mark.parametrize("key", BAD)
def test_a_value_that_becomes_bad_is_refused_at_each_step_until_it_is_good(key):
    """Also one that is equal to the good one before: 0 is not False."""
    world, twin = World().run(SEALED), World().run(SEALED)
    group = world.optimizer.param_groups[1]
    good = group[key]
    for bad in BAD[key]:
        group[key] = bad
        world.set_gradients()
        for _ in range(2):
            with pytest.raises((TypeError, ValueError), match=key):
                world.optimizer.step()
    del group[key]
    with pytest.raises((TypeError, ValueError), match=key):
        world.optimizer.step()
    group[key] = good
    assert_same(results(world.run(2).optimizer), results(twin.run(2).optimizer))


def test_groups_that_become_no_list_are_refused():
    world, twin = World().run(SEALED), World().run(SEALED)
    groups = world.optimizer.param_groups
    world.set_gradients()
    for bad in (tuple(groups), None, [*groups, None]):
        world.optimizer.param_groups = bad
        with pytest.raises(TypeError, match="param_groups"):
            world.optimizer.step()
    world.optimizer.param_groups = groups
    assert_same(results(world.run(2).optimizer), results(twin.run(2).optimizer))


def test_settings_of_a_running_optimizer_hold_from_the_next_step_on():
    param, optimizer = quiet()
    assert optimizer.grad_norm is None
    optimizer.max_grad_norm = float("inf")
    optimizer.step()
    assert optimizer.grad_norm == pytest.approx(3**0.5)
    optimizer.max_grad_norm = None
    optimizer.step()
    assert optimizer.grad_norm is None
    param.grad[0] = torch.nan
    optimizer.nonfinite = "skip"
    optimizer.step()
    assert optimizer.skipped_steps == 1
    optimizer.nonfinite = "propagate"
    param.grad[0] = 1.0
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert optimizer.skipped_steps == 2
    del optimizer.found_inf
    optimizer.observe()
    optimizer.step()
    assert optimizer.statistics()["group0/step"] == SEALED + 3


# How long it is


@pytest.mark.parametrize(("way", "most"), [("step", 46), ("backward", 70)])
def test_a_quiet_step_calls_few_functions(way, most):
    """In Python 3.11; later versions inline comprehensions."""
    param, optimizer = quiet()
    if way == "backward":
        optimizer.step_in_backward()
        for _ in range(3):
            param.sum().backward()
    called = []

    def note(frame, event, _):
        if event == "call":
            called.append(frame.f_code.co_qualname)

    loss = param.sum()
    sys.setprofile(note)
    try:
        optimizer.step() if way == "step" else loss.backward()
    finally:
        sys.setprofile(None)
    assert 10 < len(called) <= most, called
