"""Guards which parameters a step in backward hooks, and for how long: groups that change, copies, switching, memory.

Nearly every test trains twins, one as ever and one that steps in backward, and compares parameters and state to the
bit.
"""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from benchmarks import backward as benchmark
from torch.distributed.checkpoint import state_dict as dcp
from torch.nn import Parameter

import lucid.optim as optim
from bits import assert_same, peek, results, through_a_file
from twins import (
    STEPS,
    Net,
    adamw,
    and_no_gradient_is_left,
    grads,
    hooked,
    hooks,
    poison,
    stepping,
    steps_of,
    train,
    twins,
)

# Which parameters


def test_frozen_and_unfrozen_later():
    """The first gradient of what was unfrozen waits for step()."""

    def act(net, optimizer):
        train(net, optimizer, 0, 4)
        assert net.block.weight not in peek(optimizer)
        net.block.requires_grad_()
        optimizer.zero_grad()
        net.loss(4).backward()
        if hooked(optimizer):
            assert grads(net) == ["block.weight", "block.bias"]
        optimizer.step()
        and_no_gradient_is_left(net, optimizer, 5)
        assert steps_of(optimizer, net.block.weight, net.norm.weight) == [2, 6]
        net.norm.requires_grad_(False)
        train(net, optimizer, 6, 10)
        and_no_gradient_is_left(net, optimizer, 10)
        assert steps_of(optimizer, net.block.weight, net.norm.weight) == [7, 6]

    def make_net():
        net = Net()
        net.block.requires_grad_(False)
        return net

    twins(act, make_net, state_format="bf16")


def test_a_group_added_later_is_hooked_at_once():
    def make_optimizer(net):
        return optim.AdamW([p for name, p in net.named_parameters() if "rare" not in name], state_format="bf16")

    def act(net, optimizer):
        train(net, optimizer, 0, 4)
        net.rare.zero_grad()
        optimizer.add_param_group({"params": net.rare.parameters(), "lr": 0.1})
        and_no_gradient_is_left(net, optimizer, 5)
        assert steps_of(optimizer, net.rare.weight) == 1
        train(net, optimizer, 6, 12)

    twins(act, make_optimizer=make_optimizer)


def test_what_is_no_leaf_is_updated_by_step():
    """Torch takes such a tensor where it retains its gradient; it cannot have a hook."""

    def act(net, optimizer):
        computed = net.unused + 1
        computed.retain_grad()
        optimizer.add_param_group({"params": [computed]})
        for step in range(3):
            optimizer.zero_grad()
            (net.loss(step) + computed.square().sum()).backward()
            assert computed.grad is not None
            assert steps_of(optimizer, computed) == step
            optimizer.step()
            assert steps_of(optimizer, computed, net.embed.weight) == [step + 1, step + 1]

    twins(act)


def test_a_parameter_put_in_anothers_place():
    """As Accelerate does. What was taken out keeps its gradient, as any tensor that is nobody's."""

    def act(net, optimizer):
        train(net, optimizer, 0, 4)
        old, new = net.rare.weight, Parameter(net.rare.weight.detach().clone())
        (place,) = (i for i, param in enumerate(optimizer.param_groups[0]["params"]) if param is old)
        optimizer.param_groups[0]["params"][place] = net.rare.weight = new
        optimizer.zero_grad()
        before, old.grad = old.detach().clone(), None
        for count in (1, 2):
            (3 * old).sum().backward()
            assert torch.equal(old.grad, torch.full_like(old, 3 * count))
        train(net, optimizer, 4, 12)
        assert torch.equal(old, before)
        assert torch.equal(old.grad, torch.full_like(old, 6))
        assert steps_of(optimizer, new) == 4

    twins(act)


@pytest.mark.parametrize("fresh", [False, True], ids=["", "state made anew"])
@pytest.mark.parametrize("moves", [False, True], ids=["one goes", "one goes, one moves"])
def test_parameters_that_go_and_move(fresh, moves):
    """Others' numbers change, with which draws for new state are keyed; what is told of each is its own."""
    said = []

    def act(net, optimizer):
        optimizer.observe()
        train(net, optimizer, 0, 4)
        first, second = (group["params"] for group in optimizer.param_groups)
        assert first.pop(0) is net.embed.weight
        if moves:
            second.insert(0, first.pop(0))
        net.embed.weight.grad = None
        if fresh:
            optimizer.state.clear()
        train(net, optimizer, 4, 12)
        assert net.embed.weight.grad is not None
        said.append(optimizer.statistics())

    twins(act, state_format="bf16")
    assert said[0] == said[1]


def test_gradients_of_some_parameters_only():
    net, optimizer = stepping()
    net.loss(1).backward(inputs=[net.norm.weight, net.rare.bias])
    assert set(peek(optimizer)) == {net.norm.weight, net.rare.bias}
    assert grads(net) == []


@pytest.mark.parametrize("both", [True, False], ids=["both in backward", "one in backward"])
def test_two_optimizers_on_one_model(both):
    runs = []
    for in_backward in (False, True):
        net = Net()
        optimizers = [
            optim.AdamW([p for p in net.parameters() if p.ndim > 1], lr=0.02, state_format="8bit"),
            optim.AdamW([p for p in net.parameters() if p.ndim == 1], lr=0.01),
        ]
        for optimizer in optimizers[: 1 + both]:
            optimizer.step_in_backward(in_backward)
        for step in range(STEPS):
            net.loss(step).backward()
            if in_backward:
                assert {p.ndim for p in net.parameters() if p.grad is not None} == (set() if both else {1})
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        runs.append([result for optimizer in optimizers for result in results(optimizer)])
    assert_same(*runs)


def test_a_parameter_of_two_optimizers_is_updated_by_the_first():
    net, first = stepping()
    _, second = stepping(net)
    net.loss(0).backward()
    second.step()
    assert steps_of(first, net.embed.weight) == 1
    assert peek(second) == {}


# Copies and checkpoints


@pytest.mark.parametrize("to", [False, True], ids=["to ordinary", "to in backward"])
@pytest.mark.parametrize("of", [False, True], ids=["of ordinary", "of in backward"])
def test_a_checkpoint_in_the_middle(of, to):
    net = Net(torch.bfloat16)
    optimizer = adamw(net, state_format="8bit")
    train(net, optimizer)
    wanted = results(optimizer)
    parts = []
    for start, stop, in_backward in ((0, 9, of), (9, STEPS, to)):
        net = Net(torch.bfloat16)
        optimizer = adamw(net, state_format="8bit")
        optimizer.step_in_backward(in_backward)
        for part, saved in zip((net, optimizer), parts, strict=False):
            part.load_state_dict(saved)
        train(net, optimizer, start, stop)
        parts = [through_a_file(part.state_dict()) for part in (net, optimizer)]
    assert_same(results(optimizer), wanted)


@pytest.mark.parametrize("steps", [0, 3])
def test_checkpoints_by_dcp(steps):
    def make_net():
        net = Net()
        net.unused.requires_grad_(False)  # DCP wants state of every parameter
        return net

    net, optimizer = stepping(make_net())
    train(net, optimizer, 0, steps)
    before = results(optimizer)
    saved = dcp.get_optimizer_state_dict(net, optimizer)
    if steps:
        assert_same(results(optimizer), before)
    assert grads(net) == []
    twin, resumed = stepping(make_net())
    twin.load_state_dict(net.state_dict())
    dcp.set_optimizer_state_dict(twin, resumed, copy.deepcopy(saved))
    ordinary = adamw(plain := make_net())
    for each in ((net, optimizer, steps), (twin, resumed, steps), (plain, ordinary, 0)):
        train(*each, steps + 5)
    for each in (optimizer, resumed):
        assert_same(results(each), results(ordinary))


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda pair: pickle.loads(pickle.dumps(pair))}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES.keys())
def test_a_copy_steps_as_ever_and_leaves_the_original_alone(copied):
    net, optimizer = stepping(state_format="8bit", nonfinite="skip")
    train(net, optimizer, 0, 3)
    poison(net.block.weight, torch.nan)
    train(net, optimizer, 3, 4)
    with optimizer.accumulate():
        twin, resumed = copied((net, optimizer))
    before = results(optimizer)
    assert hooks(twin) == 0
    assert resumed.skipped_steps == optimizer.skipped_steps == 1
    twin.loss(4).backward()
    assert len(grads(twin)) > 4
    assert_same(results(optimizer), before)
    assert_same(results(resumed), before)
    resumed.step()
    train(twin, resumed, 5, 9)
    assert_same(results(optimizer), before)
    train(net, optimizer, 4, 9)
    assert_same(results(optimizer), results(resumed))
    resumed.step_in_backward()
    for each in ((net, optimizer), (twin, resumed)):
        train(*each, 9, 12)
    assert grads(twin) == []
    assert_same(results(optimizer), results(resumed))


def test_a_copy_of_the_model_alone_and_of_a_plain_tensor():
    net, tensor = Net(), torch.ones(3, requires_grad=True)
    optimizer = optim.AdamW([*net.parameters(), tensor])
    optimizer.step_in_backward()
    for copied in COPIES.values():
        twin, other = copied((net, tensor))
        (twin.loss(0) + other.sum()).backward()
        assert len(grads(twin)) == 5
        assert other.grad is not None
    assert peek(optimizer) == {}


# On and off


def test_off_restores_everything():
    net = Net()
    net.block.weight.register_post_accumulate_grad_hook(lambda param: None)
    _, optimizer = stepping(net)
    optimizer.step_in_backward()  # once more is no more
    assert hooks(net) == len(list(net.parameters()))
    train(net, optimizer, 0, 3)
    optimizer.step_in_backward(False)
    optimizer.step_in_backward(False)
    assert hooks(net) == 1
    before = results(optimizer)
    net.loss(4).backward()
    assert len(grads(net)) == 5
    assert_same(results(optimizer), before)
    optimizer.step()
    assert len(grads(net)) == 5
    assert steps_of(optimizer, net.embed.weight) == 4


# How long hooks live


def test_an_optimizer_that_is_dropped():
    """Its hooks keep neither it nor its state alive, and go with it: backward leaves gradients as ever."""
    net, optimizer = stepping()
    train(net, optimizer, 0, 2)
    moments = weakref.ref(peek(optimizer)[net.block.weight]["exp_avg"])
    gone = weakref.ref(optimizer)
    before = [param.detach().clone() for param in net.parameters()]
    gc.collect()
    gc.disable()
    try:
        del optimizer
        assert gone() is None
        assert moments() is None
        assert hooks(net) == 0
    finally:
        gc.enable()
    net.loss(2).backward()
    assert len(grads(net)) == 5
    assert all(map(torch.equal, net.parameters(), before))


@pytest.mark.parametrize("observing", [False, True], ids=["", "observing"])
@pytest.mark.parametrize(
    "then",
    [
        optim.AdamW.step,
        optim.AdamW.step_in_backward,
        lambda optimizer: optimizer.add_param_group({"params": [Parameter(torch.ones(2))]}),
    ],
    ids=["step", "step_in_backward", "add_param_group"],
)
def test_a_parameter_that_was_taken_out_is_let_go(then, observing):
    param = Parameter(torch.ones(3))
    optimizer = optim.AdamW([param, Parameter(torch.ones(2))])
    optimizer.observe(observing)
    optimizer.step_in_backward()
    param.sum().backward()
    del optimizer.param_groups[0]["params"][0], optimizer.state[param]
    then(optimizer)
    assert not param._post_accumulate_grad_hooks
    optimizer.step()  # whose plan is made anew
    gone = weakref.ref(param)
    del param
    gc.collect()
    assert gone() is None


class Wrapper:
    """Takes the optimizer's class for its own, as Lightning's: what is called on it is called with it as `self`."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.__class__ = type("Wrapped", (Wrapper, type(optimizer)), {})

    def __getattr__(self, name):
        return getattr(self.optimizer, name)


def test_hooks_live_as_long_as_the_optimizer_and_not_as_a_wrapper():
    net, optimizer = stepping()
    optimizer.step_in_backward(False)
    Wrapper(optimizer).step_in_backward()
    gc.collect()
    and_no_gradient_is_left(net, optimizer, 0)
    assert any(steps_of(optimizer, *net.parameters()))


# What it costs


def test_memory():
    """A GPT without a parameter that dominates, few tokens: what is alive beside gradients is little."""
    found = benchmark.measure_memory("memory-gpt-1x4")
    assert found.ordinary.gradients == found.gradients  # what is measured is there
    assert found.in_backward.gradients < 0.05 * found.gradients
    assert found.in_backward.everything < 0.15 * found.gradients  # activations included
    assert found.saved > 0.85


def test_the_work_of_a_backward_does_not_grow_with_the_square_of_the_groups(monkeypatch):
    params = [Parameter(torch.ones(2)) for _ in range(40)]
    optimizer = optim.AdamW([{"params": [param]} for param in params])
    optimizer.step_in_backward()
    read = []
    original = optim.AdamW._hyperparameters

    def reading(self, group, **how):
        read.append(group)
        return original(self, group, **how)

    monkeypatch.setattr(optim.AdamW, "_hyperparameters", reading)
    sum(param.sum() for param in params).backward()
    assert len(read) <= 2 * len(params)
