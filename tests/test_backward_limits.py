"""Guards where the step in backward cannot be as ordinary steps: that it says so, or is as the page says.

Graphs whose weights are read again, what is refused, gradients that are not finite, errors, statistics.
"""

import math
import re
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn import Parameter
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import lucid.optim as optim
from bits import assert_same, on, peek, results
from lucid import engine
from twins import Chain, Net, adamw, grads, hooked, hooks, poison, reentrant, stepping, steps_of, train, twins

# Graphs


def test_reentrant_checkpoints_that_share_a_layer_update_it_at_each_segment():
    net, optimizer = stepping()
    net.loss(0, segment=reentrant).backward()
    assert steps_of(optimizer, net.block.weight) == 2


def test_what_was_updated_before_backward_raised_is_updated():
    def act(net, optimizer):
        train(net, optimizer, 0, 3)
        optimizer.zero_grad()
        with pytest.raises(ArithmeticError, match="half-way"):
            net.loss(3, fails=True).backward()
        if not hooked(optimizer):
            optimizer.step()  # with the gradients that there are
        assert steps_of(optimizer, net.first.weight, net.second.weight, net.third.weight) == [3, 4, 4]
        train(net, optimizer, 4, 8)

    twins(act, Chain)


def test_a_second_backward_of_the_same_graph():
    """Torch sees that weights have changed which the graph has saved; `accumulate` puts it right."""
    net, _optimizer = stepping()
    loss = net.loss(0)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()

    def act(net, optimizer):
        for step in range(4):
            optimizer.zero_grad()
            loss = net.loss(step)
            with optimizer.accumulate():
                loss.backward(retain_graph=True)
            loss.backward()
            optimizer.step()

    twins(act)


def test_a_weight_that_is_used_without_its_gradient_as_well():
    """Its gradient may be complete while another still needs its value: torch sees it."""
    weight, other = Parameter(torch.ones(3)), Parameter(torch.ones(3))
    optimizer = optim.AdamW([weight, other])
    optimizer.step_in_backward()
    loss = ((other * weight.detach()).exp() * weight).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


class Pair(nn.Module):
    """Two square matrices; `loss` reads the second, after its gradient is complete, where torch does not see it."""

    def __init__(self, aliased):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
        self.aliased = aliased
        if aliased:
            self.second.weight.data = self.first.weight.data

    def loss(self, step, micro):
        x = torch.ones(3, 6).cumsum(1) / 6
        if self.aliased:  # the second is read for the first's gradient, after its own update has changed it
            return self.first(torch.tanh(self.second(torch.tanh(self.first(x))))).square().sum()
        return self.second(checkpoint(self.without_gradient, self.first(x), use_reentrant=False)).square().sum()

    def without_gradient(self, x):
        return torch.tanh(F.linear(x, self.second.weight.detach()))


@pytest.mark.parametrize("aliased", [True, False], ids=["two parameters on one memory", "detached in a checkpoint"])
@pytest.mark.parametrize("accumulates", [True, False])
def test_values_that_torch_does_not_see_read_need_accumulate(aliased, accumulates):
    with nullcontext() if accumulates else pytest.raises(AssertionError, match="other bits"):
        twins(lambda *both: train(*both, 0, 1, accumulates=accumulates), lambda: Pair(aliased))


@pytest.mark.parametrize("in_backward", [False, True])
def test_a_first_step_with_lr_0_and_gradients_of_zero_counts(in_backward):
    """Ordinary steps take it for a checkpoint tool that wants to have state made."""
    param = Parameter(torch.zeros(3))
    optimizer = optim.AdamW([param], lr=0.0)
    optimizer.step_in_backward(in_backward)
    param.square().sum().backward()
    optimizer.step()
    assert steps_of(optimizer, param) == in_backward


def test_gradients_by_autograd_grad_update_nothing():
    net, optimizer = stepping()
    before = results(optimizer)
    (gradient,) = torch.autograd.grad(net.loss(0), [net.embed.weight])
    assert gradient.any()
    assert_same(results(optimizer), before)
    assert grads(net) == []


@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True:UserWarning")
def test_create_graph():
    def act(net, optimizer):
        for step in range(5):
            net.loss(step).backward(create_graph=True)
            optimizer.step()
            optimizer.zero_grad()

    _, (_, optimizer, _) = twins(act)
    assert not any(value.requires_grad for entry in peek(optimizer).values() for value in entry.values())


def test_hooks_of_others():
    """On a gradient before it is accumulated, and after: those from before ours see it, those from after do not."""
    seen = []

    def act(net, optimizer):
        seen.clear()
        net.block.weight.register_hook(lambda gradient: gradient.clamp(-1e-3, 1e-3))
        net.block.weight.register_post_accumulate_grad_hook(lambda param: seen.append(param.grad))
        train(net, optimizer, 0, 5)

    def make_net():
        net = Net()
        net.block.weight.register_post_accumulate_grad_hook(lambda param: seen.append(param.grad is not None))
        return net

    twins(act, make_net)
    assert seen == 5 * [True, None]


# Refused


def test_closures_are_refused_before_they_are_called():
    _, optimizer = stepping()
    with pytest.raises(RuntimeError, match=r"closure.*step_in_backward\(False\)"):
        optimizer.step(lambda: pytest.fail("it was called"))
    optimizer.step_in_backward(False)
    assert optimizer.step(lambda: torch.tensor(2.0)) == 2


@pytest.mark.parametrize("bound", [1.0, math.inf])
def test_a_bound_of_the_norm_is_refused_in_both_orders(bound):
    net = Net()
    optimizer = adamw(net, max_grad_norm=bound)
    reason = re.escape(f"max_grad_norm={bound:g}") + ".*after the last gradient"
    with pytest.raises(ValueError, match=reason):
        optimizer.step_in_backward()
    assert hooks(net) == 0
    optimizer.max_grad_norm = None
    optimizer.step_in_backward()
    with pytest.raises(ValueError, match=reason):
        optimizer.max_grad_norm = bound
    assert optimizer.max_grad_norm is None
    optimizer.step_in_backward(False)
    optimizer.max_grad_norm = bound


@pytest.mark.parametrize("leaves_it_to_the_step", [False, True])
def test_grad_scaler_says_itself_that_it_sees_no_gradients(leaves_it_to_the_step):
    net, optimizer = stepping()
    optimizer._step_supports_amp_scaling = leaves_it_to_the_step
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(net.loss(0)).backward()
    with pytest.raises(AssertionError, match="No inf checks were recorded"):
        scaler.step(optimizer)
    optimizer.step_in_backward(False)
    assert optimizer._step_supports_amp_scaling is leaves_it_to_the_step


def test_grad_scaler_after_accumulating():
    """What the page tells those who need a scaler."""

    def act(net, optimizer):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
        for step in range(6):
            optimizer.zero_grad()
            if step == 3:
                poison(net.block.bias, math.inf)
            with optimizer.accumulate():
                scaler.scale(net.loss(step)).backward()
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() == 2.0**7
        assert steps_of(optimizer, net.block.bias) == 5

    twins(act)


def test_clip_grad_norm_finds_nothing():
    net, _ = stepping()
    net.loss(0).backward()
    assert nn.utils.clip_grad_norm_(net.parameters(), 1e-3) == 0


# Gradients that are not finite


@pytest.mark.parametrize(
    ("engine_name", "value"),
    [(name, value) for name in ("cpu", "reference") for value in (math.nan, math.inf, 1e30)] + [("cuda", 1e30)],
)
@pytest.mark.parametrize("state", [True, False], ids=["", "first step"])
def test_skip_leaves_out_single_parameters(value, state, engine_name):
    """The twin's gradient is taken away by hand."""

    def act(net, optimizer):
        train(net, optimizer, 0, 3 * state)
        for step in (3, 4):
            optimizer.zero_grad()
            poison(net.block.weight, value)
            net.loss(step).backward()
            if not hooked(optimizer):
                net.block.weight.grad = None
            assert "block.weight" not in grads(net)
            optimizer.step()
        train(net, optimizer, 5, 8)
        assert optimizer.skipped_steps == 2 * hooked(
            optimizer
        )  # asked before, for counts on a GPU are a guess till then
        assert steps_of(optimizer, net.block.weight, net.block.bias) == [3 * state + 3, 3 * state + 5]

    with on(engine_name):
        runs = twins(act, nonfinite="skip")
    assert [optimizer.skipped_steps for _, optimizer, _ in runs] == [0, 2]


def test_skipped_parameters_are_told_apart():
    net, optimizer = stepping(named=True, nonfinite="skip")
    optimizer.observe()
    train(net, optimizer, 0, 2)
    poison(net.block.bias, math.nan)
    train(net, optimizer, 2, 3)
    found = {key: value for key, value in optimizer.statistics().items() if key.endswith("skipped_steps") and value}
    assert found == {"skipped_steps": 1, "group1/skipped_steps": 1, "block.bias/skipped_steps": 1}


def test_error_raises_out_of_backward_and_names_the_parameter():
    net, optimizer = stepping(named=True, nonfinite="error")
    train(net, optimizer, 0, 2)
    place = [id(p) for p in optimizer.param_groups[0]["params"]].index(id(net.block.weight))
    before = results(optimizer)[place]
    poison(net.block.weight, math.nan)
    with pytest.raises(FloatingPointError, match=r"'block.weight' has 1 NaN of 4096 entries"):
        net.loss(2).backward()
    assert_same([results(optimizer)[place]], [before])
    assert steps_of(optimizer, net.norm.weight) == 2  # the block's gradient comes before it
    assert grads(net) == ["block.weight"]
    assert optimizer.skipped_steps == 0
    train(net, optimizer, 3, 6)  # zero_grad lets it go
    assert steps_of(optimizer, net.block.weight) == 5


def test_propagate_spoils_the_parameter_alone():
    def act(net, optimizer):
        poison(net.block.weight, math.nan)
        train(net, optimizer, 0, 1)
        assert int(net.block.weight.isnan().sum()) == 1
        assert not net.embed.weight.isnan().any()

    twins(act)


# What is wrong is said


def test_a_sparse_gradient():
    net = nn.ModuleDict({"embed": nn.Embedding(5, 3, sparse=True), "head": nn.Linear(3, 1)})
    _, optimizer = stepping(net, named=True)
    with pytest.raises(TypeError, match=r"'embed.weight' is sparse"):
        net["head"](net["embed"](torch.arange(3))).sum().backward()
    assert set(peek(optimizer)) == set(net["head"].parameters())
    assert grads(net) == ["embed.weight"]


def test_a_hyperparameter_out_of_range_stops_its_own_group():
    net = Chain()
    optimizer = optim.AdamW([{"params": layer.parameters()} for layer in net.children()])
    optimizer.step_in_backward()
    train(net, optimizer, 0, 2)
    optimizer.param_groups[0]["lr"] = -1.0
    before = results(optimizer)
    with pytest.raises(ValueError, match="lr: expected a number"):
        net.loss(2).backward()
    assert_same(results(optimizer)[:2], before[:2])
    assert steps_of(optimizer, net.first.weight, net.second.weight, net.third.weight) == [2, 3, 3]
    optimizer.param_groups[0]["lr"] = 0.02
    net.loss(3).backward()
    assert steps_of(optimizer, net.first.weight, net.second.weight, net.third.weight) == [3, 4, 4]


def test_state_that_does_not_fit():
    net, optimizer = stepping(named=True)
    train(net, optimizer, 0, 2)
    optimizer.state[net.block.weight]["exp_avg"] = torch.ones(3)
    before = net.block.weight.detach().clone()
    with pytest.raises(ValueError, match=r"'exp_avg' of parameter 'block.weight'"):
        net.loss(2).backward()
    assert torch.equal(net.block.weight, before)
    assert steps_of(optimizer, net.block.weight) == 2


# Statistics


@pytest.mark.parametrize("clipped", [False, True], ids=["", "after clipped steps"])
def test_statistics(clipped):
    said = []

    def act(net, optimizer):
        optimizer.observe()
        in_backward = hooked(optimizer)
        if clipped:
            optimizer.step_in_backward(False)
            optimizer.max_grad_norm = 1e-3
            train(net, optimizer, 0, 2)
            optimizer.max_grad_norm = None
            optimizer.step_in_backward(in_backward)
        train(net, optimizer, 2, 6)
        said.append(optimizer.statistics())

    twins(act, named=True, state_format="bf16")
    assert said[0] == said[1]
    assert said[0]["rare.weight/step"] == 2 + clipped
    assert said[0]["grad_norm"] > 0.1


def test_statistics_tell_of_each_parameter_what_its_last_update_was_like():
    """Of those, too, that only step() updates."""
    net, optimizer = stepping(named=True)
    optimizer.observe()
    with optimizer.accumulate():
        net.loss(0, rare=True).backward()
    net.loss(1, rare=False).backward()
    optimizer.step()
    said = {key.removesuffix("/step") for key in optimizer.statistics() if key.endswith("/step")}
    assert said == {"group0", "group1", *dict(net.named_parameters())} - {"unused", "frozen"}


def test_the_message_in_backward_is_of_one_parameter():
    first, second = Parameter(torch.ones(3)), Parameter(torch.ones(3))
    optimizer = optim.AdamW([("first", first), ("second", second)], nonfinite="error")
    optimizer.step_in_backward()
    with pytest.raises(FloatingPointError, match="'first' has 3 NaN of 3 entries, so it was not updated"):
        (first * second.detach() * math.nan).sum().backward()
    assert not optimizer.state


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_interrupt_leaves_no_gradient_that_was_used(when, monkeypatch):
    param = Parameter(torch.ones(3))
    optimizer = optim.AdamW([param])
    optimizer.step_in_backward()
    write = engine.Plan.write

    def interrupted(*arguments, **options):
        if when == "after":
            write(*arguments, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine.Plan, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            param.sum().backward()
    assert (param.grad is None) == (when == "after")
    optimizer.step()
    assert int(optimizer.state[param]["step"]) == 1


def test_under_compiled_autograd():
    from torch._dynamo import compiled_autograd

    param = Parameter(torch.ones(3))
    optimizer = optim.AdamW([param])
    optimizer.step_in_backward()
    with compiled_autograd._enable(torch.compile(backend="eager")):
        (param * 2).sum().backward()
    assert param.grad is None
    assert int(optimizer.state[param]["step"]) == 1


def test_what_is_refused_keeps_its_gradient_also_after_good_steps():
    param = Parameter(torch.ones(3))
    optimizer = optim.AdamW([param])
    optimizer.step_in_backward()
    param.sum().backward()
    optimizer.param_groups[0]["lr"] = -1.0
    with pytest.raises(ValueError, match="lr"):
        param.sum().backward()
    assert torch.equal(param.grad, torch.ones(3))
    optimizer.param_groups[0]["lr"] = 1e-3
    optimizer.step()
    assert int(optimizer.state[param]["step"]) == 2
