"""Guards the step in backward: the bits of ordinary steps, in every loop.

Nearly every test trains twins, one as ever and one that steps in backward, and compares parameters and state to the
bit. Here: dtypes, models, threads, loops, micro-batches, schedules. Which parameters, copies, switching, how long
hooks live, and memory are in test_backward_hooks.py.
"""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedules
from torch.utils.checkpoint import checkpoint

import train_gpt
from bits import assert_same, draw, on, peek
from twins import (
    STEPS,
    Chain,
    Net,
    and_no_gradient_is_left,
    grads,
    hooked,
    reentrant,
    stepping,
    steps_of,
    train,
    twins,
)

# The same bits


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


CASES = [(dtype, {"state_format": name}) for dtype in DTYPES for name in ("fp32", "bf16", "8bit")] + [
    (torch.float32, {"amsgrad": True}),
    (torch.float32, {"amsgrad": True, "state_format": "8bit"}),
    (torch.float32, {"maximize": True, "lr": torch.tensor(1e-3)}),
    (torch.bfloat16, {"state_format": "bf16", "master_weights": False}),
]


@pytest.mark.parametrize(
    ("engine_name", "dtype", "options"),
    [(name, *case) for name in ("cpu", "reference") for case in CASES] + [("cuda", *case) for case in CASES[::5]],
    ids=str,
)
def test_the_bits_are_those_of_ordinary_steps(dtype, options, engine_name):
    with on(engine_name):
        (net, ordinary, found), _ = twins(make_net=lambda: Net(dtype), **options)
    assert steps_of(ordinary, net.embed.weight, net.block.bias, net.rare.weight) == [STEPS, STEPS, STEPS // 2]
    assert net.unused not in ordinary.state
    assert net.frozen not in ordinary.state
    assert not torch.equal(found[0]["param"], Net(dtype).embed.weight)


@pytest.mark.parametrize("state_format", ["bf16", "8bit"])
def test_draws_are_keyed_alike(state_format):
    """By name where there are names, by the number over all groups where there are none; whenever state is made."""

    def made_early(net, optimizer):
        optimizer.init_state()
        train(net, optimizer)

    found = []
    for named in (False, True):
        late, early = (twins(act, named=named, state_format=state_format, seed=5)[1][2] for act in (train, made_early))
        assert_same([entry for entry in late if "step" in entry], [entry for entry in early if entry.get("step")])
        found.append(late[0]["exp_avg_sq" + "_code" * (state_format == "8bit")])
    assert not torch.equal(*found)


def test_each_parameter_is_updated_as_soon_as_its_gradient_is_complete():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    _, optimizer = stepping(net)
    seen = []

    def look(gradient):
        seen.append([(steps_of(optimizer, layer.weight), layer.weight.grad is None) for layer in net])

    net[0].weight.register_hook(look)  # called with the gradient, before it is accumulated
    net(torch.ones(5, 3)).sum().backward()
    assert seen == [[(0, True), (1, True), (1, True)]]
    assert grads(net) == []


class GPT(train_gpt.GPT):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__(train_gpt.Config(layers=2, width=80, heads=5, context=16, batch=2))
        self.bfloat16()

    def loss(self, step, micro):
        codes = torch.randint(128, (2, 17), generator=torch.Generator().manual_seed(10 * step + micro))
        return train_gpt.cross_entropy(self, codes)


class Recurrent(nn.LSTM):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__(4, 8, 2)

    def loss(self, step, micro):
        return self(draw(step, (6, 3, 4)))[0].square().sum()


class Halves(nn.ModuleList):
    def __init__(self):
        super().__init__([Net(), Net()])

    def loss(self, step, micro):
        return sum(net.loss(step) for net in self)


def a_backward_each(net, optimizer):
    for step in range(STEPS):
        for micro in (0, 1):
            net.loss(step, micro).backward()
            if not hooked(optimizer):
                optimizer.step()
                optimizer.zero_grad()


def another_thread(net, optimizer):
    with ThreadPoolExecutor(1) as pool:
        pool.submit(train, net, optimizer).result()


def two_threads(halves, optimizer):
    """Each runs backward through its half of one optimizer's parameters."""
    if not hooked(optimizer):
        return train(halves, optimizer)
    gate = threading.Barrier(2)

    def run(net):
        gate.wait(60)
        for step in range(STEPS):
            net.loss(step).backward()

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(run, halves))


def to_and_fro(net, optimizer):
    switched = hooked(optimizer)
    for number in range(6):
        optimizer.step_in_backward(switched and number % 2 == 0)
        train(net, optimizer, 15 * number, 15 * number + 15)
    optimizer.zero_grad()
    optimizer.step_in_backward(switched)
    with optimizer.accumulate():
        net.loss(0).backward()
    optimizer.step_in_backward(False)  # which leaves it to step()
    optimizer.step()
    optimizer.step_in_backward(switched)


def going_back(net, optimizer):
    train(net, optimizer, 0, 4)
    saved = copy.deepcopy([net.state_dict(), optimizer.state_dict()])
    train(net, optimizer, 4, 9)
    net.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    train(net, optimizer, 4, 9)


def with_a_schedule(net, optimizer):
    schedule = schedules.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    train(net, optimizer, 0, 5, micro=4, after=schedule.step)


def changing_dtype(net, optimizer):
    train(net, optimizer, 0, 5)
    net.bfloat16()
    train(net, optimizer, 5, 10)
    and_no_gradient_is_left(net, optimizer, 10)
    assert net.embed.weight.dtype == torch.bfloat16


def penalised(net, optimizer):
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = net.loss(step)
        (gradient,) = torch.autograd.grad(loss, [net.norm.weight], create_graph=True)
        (loss + gradient.square().sum()).backward()
        optimizer.step()


def checkpointed(part, x):
    """A segment is recomputed before what is in it is updated, also where segments share weights."""
    return checkpoint(part, x, use_reentrant=False)


@pytest.mark.parametrize("state_format", ["fp32", "8bit"])
@pytest.mark.parametrize(
    ("act", "make_net"),
    [
        pytest.param(partial(train, micro=4), Net, id="micro-batches"),
        pytest.param(partial(train, accumulates=True), Net, id="all is accumulated"),
        pytest.param(a_backward_each, Net, id="a backward each"),
        pytest.param(partial(train, segment=checkpointed), Net, id="checkpoints"),
        pytest.param(partial(train, segment=reentrant), Chain, id="reentrant checkpoints"),
        pytest.param(partial(train, segment=reentrant, accumulates=True), Net, id="reentrant ones that share"),
        pytest.param(penalised, Net, id="a penalty on gradients"),
        pytest.param(with_a_schedule, GPT, id="GPT"),
        pytest.param(train, Recurrent, id="recurrent"),
        pytest.param(another_thread, Net, id="another thread"),
        pytest.param(two_threads, Halves, id="two threads"),
        pytest.param(to_and_fro, Net, id="to and fro"),
        pytest.param(going_back, Net, id="loading"),
        pytest.param(changing_dtype, Net, id="another dtype"),
    ],
)
def test_ways_to_train(act, make_net, state_format):
    twins(act, make_net, state_format=state_format, named=True, nonfinite="skip")


# Loops


@pytest.mark.parametrize("zero", [None, True, False], ids=["no zero_grad", "zero_grad", "zero_grad to zeros"])
@pytest.mark.parametrize("step", [True, False], ids=["step", "no step"])
def test_loops_with_and_without_zero_grad_and_step(zero, step):
    def act(net, optimizer):
        train(net, optimizer, **({"zero": zero, "step": step} if hooked(optimizer) else {}))
        assert bool(grads(net)) != hooked(optimizer)

    twins(act)


def one_cycle(optimizer):
    return schedules.OneCycleLR(optimizer, [0.1, 0.2], total_steps=STEPS + 1)


def warm_up(optimizer):
    return schedules.LambdaLR(optimizer, lambda step: min(1.0, step / 5))


@pytest.mark.parametrize("schedule", [one_cycle, warm_up])
def test_schedules(schedule):
    """One of them moves beta1 as well, the other begins with lr 0."""
    ways = []

    def act(net, optimizer):
        scheduler = schedule(optimizer)
        ways.append([])

        def after():
            ways[-1].append([(group["lr"], *group["betas"]) for group in optimizer.param_groups])
            scheduler.step()

        train(net, optimizer, after=after)

    _, (net, optimizer, _) = twins(act)
    assert ways[0] == ways[1]
    lrs, beta1s, _ = zip(*(groups[0] for groups in ways[0]), strict=True)
    assert len(set(beta1s)) == (STEPS if schedule is one_cycle else 1)
    assert (lrs[0] == 0) == (schedule is warm_up)
    assert steps_of(optimizer, net.embed.weight) == STEPS


def test_hooks_of_the_step_run_in_step():
    net, optimizer = stepping()
    calls = []
    optimizer.register_step_pre_hook(lambda opt, *_: calls.append(("pre", steps_of(opt, net.embed.weight))))
    optimizer.register_step_post_hook(lambda opt, *_: calls.append(("post", steps_of(opt, net.embed.weight))))
    net.loss(0).backward()
    assert calls == []
    optimizer.step()
    assert calls == [("pre", 1), ("post", 1)]


# Micro-batches


def test_a_gradient_of_an_early_micro_batch_only_is_used_by_step_and_let_go():
    def act(net, optimizer):
        for step in range(6):
            with optimizer.accumulate():
                net.loss(step, rare=True).backward()
            assert len(grads(net)) == 7
            net.loss(step, 1, rare=False).backward()
            if hooked(optimizer):
                assert grads(net) == ["rare.weight", "rare.bias"]
                assert steps_of(optimizer, net.rare.weight) == step
            optimizer.step()
            if not hooked(optimizer):
                optimizer.zero_grad()
            assert grads(net) == []
            assert steps_of(optimizer, net.rare.weight) == step + 1

    twins(act)


def test_accumulate_within_accumulate_and_left_by_an_exception():
    net, optimizer = stepping()
    with optimizer.accumulate():
        with pytest.raises(ArithmeticError), optimizer.accumulate():
            raise ArithmeticError
        net.loss(0).backward()
        assert peek(optimizer) == {}
    net.loss(0).backward()
    assert steps_of(optimizer, net.embed.weight) == 1
    assert grads(net) == []
