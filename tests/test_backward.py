"""Guards the step in backward: the bits of ordinary steps, without the memory of all gradients.

Nearly every test trains twins, one as ever and one that steps in backward, and compares parameters and state to the
bit. Here: loops, micro-batches, which parameters, copies, switching, how long hooks live, threads, memory.
"""

import copy
import gc
import pickle
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from benchmarks import backward as benchmark
from torch import nn
from torch.distributed.checkpoint import state_dict as dcp
from torch.nn import Parameter
from torch.optim import lr_scheduler as schedules
from torch.utils.checkpoint import checkpoint

import lucid.optim as optim
import train_gpt
from bits import assert_same, draw, on, peek, results, through_a_file
from twins import STEPS, Chain, Net, adamw, grads, hooked, hooks, poison, reentrant, stepping, steps_of, train, twins


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


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


def and_no_gradient_is_left(net, optimizer, step):
    """One more step, without `step()` where it is not needed."""
    optimizer.zero_grad()
    net.loss(step).backward()
    if hooked(optimizer):
        assert grads(net) == []
    else:
        optimizer.step()


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
