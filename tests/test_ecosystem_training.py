"""Guards styles of training: compiled, by torch.func, by closures, averaged, in worker processes.

Each is compared with torch's AdamW in the same hands, as in `test_ecosystem_models.py`, or to the bit with our own.
"""

import copy
import shutil

import pytest
import torch
from torch import multiprocessing, nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn import Parameter
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

import lucid.optim as optim
from beside_torch import (
    FORMATS,
    as_with_torch,
    assert_close,
    backward,
    batch,
    make_model,
    same,
    steps_of,
    train,
    weights,
)

# torch.compile


def train_compiled(backend):
    def run(make):
        torch._dynamo.reset()
        model = make_model()
        compiled = torch.compile(model, backend=backend)
        return model, train(compiled, make(compiled.parameters(), lr=0.02), 0, 20)

    return as_with_torch(run)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_trains_as_with_torch(backend):
    model = train_compiled(backend)
    plain = make_model()
    train(plain, optim.AdamW(plain.parameters(), lr=0.02), 0, 20)
    assert_close(model, plain)


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor wants a C++ compiler")
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # of torch's own imports
def test_a_model_that_inductor_compiles_trains_as_with_torch():
    with torch._inductor.config.patch(compile_threads=1):
        train_compiled("inductor")


@pytest.mark.parametrize("state_format", FORMATS)
def test_a_compiled_step_is_the_step_itself(state_format):
    torch._dynamo.reset()
    runs = []
    for compiled in (False, True):
        model = make_model()
        optimizer = optim.AdamW(model.parameters(), lr=0.02, state_format=state_format)
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        for number in range(5):
            optimizer.zero_grad()
            backward(model, number)
            step()
        runs.append(weights(model))
        assert steps_of(optimizer, *model.parameters()) == [5] * 4
    assert same(*runs)


def test_a_step_is_never_within_a_graph():
    """It says so to those that ask for one graph, and a learning rate that changes compiles nothing anew."""
    torch._dynamo.reset()
    weight = Parameter(torch.ones(3))
    optimizer = optim.AdamW([weight], lr=0.1)
    weight.grad = torch.ones(3)
    graphs = []

    def counted(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def ahead(x):
        y = (x * 2).sum()
        optimizer.step()
        return y * 3

    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"Optimizer\.step"):
        torch.compile(ahead, backend=counted, fullgraph=True)(torch.ones(3))
    assert torch.equal(weight.detach(), torch.ones(3))
    torch._dynamo.reset()
    graphs.clear()
    compiled = torch.compile(ahead, backend=counted)
    for number in range(6):
        optimizer.param_groups[0]["lr"] = 0.1 / (number + 1)
        assert compiled(torch.ones(3)) == 18
    assert len(graphs) == 2  # what is before the step, and what is after it
    assert steps_of(optimizer, weight) == [6]


@pytest.mark.parametrize("state_format", FORMATS)
def test_names_of_a_compiled_model(state_format):
    """torch.compile(model) puts _orig_mod. before every name, model.compile() does not."""
    model = make_model()
    optimizer = optim.AdamW(model.named_parameters(), lr=0.02, state_format=state_format)
    train(model, optimizer, 0, 3)
    prefixed, kept = make_model(), make_model()
    kept.compile(backend="eager")
    for twin, named, warns in ((prefixed, torch.compile(prefixed, backend="eager"), True), (kept, kept, False)):
        twin.load_state_dict(model.state_dict())
        resumed = optim.AdamW(named.named_parameters(), lr=0.02, state_format=state_format)
        names = resumed.param_groups[0]["param_names"]
        assert all(name.startswith("_orig_mod.") == warns for name in names)
        if warns:
            with pytest.warns(UserWarning, match="matched by position"):
                resumed.load_state_dict(optimizer.state_dict())
        else:
            resumed.load_state_dict(optimizer.state_dict())
        reference, its = copy.deepcopy((model, optimizer))
        train(reference, its, 3, 6)
        train(twin, resumed, 3, 6)
        assert same(weights(twin), weights(reference))


# torch.func


def loss_of(model, params, x, y):
    return nn.functional.mse_loss(functional_call(model, params, (x,)), y)


def by_grad(model, params, x, y):
    return grad(lambda params: loss_of(model, params, x, y))(params)


def by_vmap_over_samples(model, params, x, y):
    alone = vmap(grad(lambda params, x, y: loss_of(model, params, x[None], y[None])), (None, 0, 0))
    return {name: gradients.mean(0) for name, gradients in alone(params, x, y).items()}


def by_vjp(model, params, x, y):
    loss, pull = torch.func.vjp(lambda params: loss_of(model, params, x, y), params)
    return pull(torch.ones_like(loss))[0]


def by_autograd_grad(model, params, x, y):
    return dict(zip(params, torch.autograd.grad(loss_of(model, params, x, y), params.values()), strict=True))


@pytest.mark.parametrize("gradients_by", [by_grad, by_vmap_over_samples, by_vjp, by_autograd_grad])
def test_gradients_put_in_grad_by_hand(gradients_by):
    def run(make):
        model, losses = make_model(), []
        params = dict(model.named_parameters())
        optimizer = make(params.values(), lr=0.02)
        for step in range(20):
            x, y = batch(step)
            losses.append(loss_of(model, params, x, y).item())
            for name, gradient in gradients_by(model, params, x, y).items():
                params[name].grad = gradient.detach()
            optimizer.step()
        return model, losses

    model = as_with_torch(run)
    plain = make_model()
    train(plain, optim.AdamW(plain.parameters(), lr=0.02), 0, 20)
    assert_close(model, plain)


def make_members():
    members = []
    for seed in range(3):
        torch.manual_seed(seed)
        members.append(nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1)))
    return members


def test_an_ensemble_under_vmap():
    """An optimizer of stacked parameters takes the steps of one for each member, to the bit."""
    skeleton = make_members()[0]

    def run(make):
        members, losses = make_members(), []
        params, buffers = stack_module_state(members)
        stacked = make(params.values(), lr=0.02)
        alone = [make(member.parameters(), lr=0.02) for member in members]
        for step in range(20):
            x, y = batch(step)
            stacked.zero_grad()
            each = vmap(lambda params, buffers, x=x, y=y: loss_of(skeleton, params, x, y), (0, 0))(params, buffers)
            each.sum().backward()
            losses.append(each.sum().item())
            for number, member in enumerate(members):
                for name, param in member.named_parameters():
                    param.grad = params[name].grad[number].clone()
                alone[number].step()
            stacked.step()
        if make is optim.AdamW:
            for number, member in enumerate(members):
                assert same([param.detach()[number] for param in params.values()], weights(member))
        return nn.ParameterList(params.values()), losses

    as_with_torch(run)


@pytest.mark.parametrize("transform", [grad, vmap])
@pytest.mark.parametrize("steps_before", [0, 3])
def test_a_step_within_a_transform_is_refused(steps_before, transform):
    weight = Parameter(torch.ones(3))
    optimizer = optim.AdamW([weight], lr=0.1)
    for _ in range(steps_before):
        weight.grad = torch.ones(3)
        optimizer.step()
    before = weight.detach().clone()

    def stepping(x):
        weight.grad = x * 2
        optimizer.step()
        return x.sum()

    with pytest.raises(TypeError, match=r"the gradient of parameter 0 of group 0 belongs to a torch\.func transform"):
        transform(stepping)(torch.ones(3) if transform is grad else torch.ones(2, 3))
    assert torch.equal(weight, before)
    weight.grad = torch.ones(3)
    optimizer.step()
    assert steps_of(optimizer, weight) == [steps_before + 1]


# Closures


def make_closure(model, optimizer, step):
    def closure():
        optimizer.zero_grad()
        return backward(model, step)

    return closure


def backtracking(model, optimizer, step):
    """Evaluate before, within and after the step; go half the way back while that is worse."""
    closure = make_closure(model, optimizer, step)
    first, before = closure().item(), weights(model)
    assert optimizer.step(closure).item() == first
    for _ in range(3):
        if closure().item() <= first:
            break
        with torch.no_grad():
            for param, old in zip(model.parameters(), before, strict=True):
                param.lerp_(old, 0.5)
    return first


def sharpness_aware(model, optimizer, step):
    """Take the gradient a little uphill, and step from where it was."""
    closure = make_closure(model, optimizer, step)
    loss, before = closure().item(), weights(model)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.05 * param.grad)
    closure()
    with torch.no_grad():
        for param, old in zip(model.parameters(), before, strict=True):
            param.copy_(old)
    optimizer.step()
    return loss


def in_turns_with_lbfgs(model, optimizer, step):
    if step % 4 != 3:
        return optimizer.step(make_closure(model, optimizer, step)).item()
    lbfgs = torch.optim.LBFGS(model.parameters(), lr=0.05, max_iter=4)
    return lbfgs.step(make_closure(model, lbfgs, step)).item()


@pytest.mark.parametrize("loop", [backtracking, sharpness_aware, in_turns_with_lbfgs])
def test_loops_that_evaluate_several_times_a_step(loop):
    def run(make):
        model = make_model()
        optimizer = make(model.parameters(), lr=0.1 if loop is backtracking else 0.02)
        with torch.no_grad():  # as a caller may be; closures are called with gradients
            losses = [optimizer.step(make_closure(model, optimizer, 0)).item()]
        losses += [loop(model, optimizer, step) for step in range(16)]
        own = 13 if loop is in_turns_with_lbfgs else 17
        assert steps_of(optimizer, *model.parameters()) == [own] * 4
        return model, losses

    as_with_torch(run)


# Averages


def ema_by_deepcopy(model):
    average = copy.deepcopy(model).requires_grad_(False)

    def update():
        with torch.no_grad():
            for mean, param in zip(average.parameters(), model.parameters(), strict=True):
                mean.lerp_(param, 0.1)

    return average, update


def ema_of_torch(model):
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    averaged.update_parameters(model)  # the first one copies
    return averaged.module, lambda: averaged.update_parameters(model)


@pytest.mark.parametrize("in_backward", [False, True], ids=["", "in backward"])
@pytest.mark.parametrize("averaging", [ema_by_deepcopy, ema_of_torch])
def test_an_exponential_average_of_the_weights(averaging, in_backward):
    model, alone = make_model(), make_model()
    optimizer, its = (optim.AdamW(each.parameters(), lr=0.02) for each in (model, alone))
    optimizer.step_in_backward(in_backward)
    average, update = averaging(model)
    expected = [param.double() for param in weights(model)]

    def after():
        update()
        for mean, param in zip(expected, weights(model), strict=True):
            mean.lerp_(param.double(), 0.1)

    train(model, optimizer, 0, 10, after)
    train(alone, its, 0, 10)
    assert same(weights(model), weights(alone))  # who averages changes nothing
    torch.testing.assert_close([param.double() for param in weights(average)], expected, rtol=1e-5, atol=1e-7)
    before, steps = weights(average), steps_of(optimizer, *model.parameters())
    backward(copy.deepcopy(model))  # a copy has none of the hooks that step
    backward(average.requires_grad_(True))
    assert same(weights(average), before)
    assert steps_of(optimizer, *model.parameters()) == steps == [10] * 4


def test_swa_with_its_schedule_and_batch_norms():
    """Stochastic weight averaging as torch's documentation writes it."""

    def run(make):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 16, bias=False), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 1))
        optimizer = make(model.parameters(), lr=0.05)
        averaged, schedule = AveragedModel(model), SWALR(optimizer, swa_lr=0.01, anneal_epochs=5)

        def after():
            averaged.update_parameters(model)
            schedule.step()

        losses = train(model, optimizer, 0, 10) + train(model, optimizer, 10, 25, after)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01)
        update_bn([batch(step)[0] for step in range(5)], averaged)
        norm = averaged.module[1]
        assert int(norm.num_batches_tracked) == 5
        return nn.ParameterList([*averaged.parameters(), norm.running_mean, norm.running_var]), losses

    as_with_torch(run)


# Workers


def trained_further(model, optimizer, start, stop):
    torch.set_num_threads(1)
    train(model, optimizer, start, stop)
    return model, optimizer


@pytest.mark.slow
@pytest.mark.parametrize("state_format", FORMATS)
def test_pickled_to_a_worker_and_back(state_format, workers):
    """The multiprocessing shares memory: what the worker does is done to the tensors here, to the bit."""
    model = make_model()
    optimizer = optim.AdamW(
        model.parameters(), lr=0.02, state_format=state_format, max_grad_norm=1.0, nonfinite="skip", seed=3
    )
    train(model, optimizer, 0, 3)
    optimizer.zero_grad()
    reference = copy.deepcopy((model, optimizer))
    train(*reference, 3, 9)
    there, its = workers.apply_async(trained_further, (model, optimizer, 3, 6)).get(timeout=120)
    assert (its.max_grad_norm, its.nonfinite) == (1.0, "skip")
    assert same(weights(there), weights(model))
    assert steps_of(its, *there.parameters()) == steps_of(optimizer, *model.parameters()) == [6] * 4
    train(model, optimizer, 6, 9)  # in the memory that is shared
    assert same(weights(model), weights(reference[0]))


@pytest.fixture(scope="module")
def workers():
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        yield pool
