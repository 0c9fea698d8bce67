"""Guards living among torch's tools: schedulers, hooks, copies, DCP, AMP, averaging, the profiler.

Each of them knows `torch.optim.AdamW` and reaches into an optimizer in its own way. What can be
compared is compared with torch's AdamW in the same hands: a tool that only seems to work is seen.
"""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint import state_dict as dcp
from torch.nn import Parameter
from torch.optim import lr_scheduler as schedules
from torch.optim import optimizer as base
from torch.optim.swa_utils import SWALR, AveragedModel

import lucid.optim as optim
from beside_torch import OURS_AND_TORCHS, assert_close, backward, batch, make_model, same, train, weights, with_groups

# Schedulers


SCHEDULERS = {
    "LambdaLR": lambda o: schedules.LambdaLR(o, lambda epoch: 0.9**epoch),
    "MultiplicativeLR": lambda o: schedules.MultiplicativeLR(o, lambda epoch: 0.9),
    "StepLR": lambda o: schedules.StepLR(o, 3),
    "MultiStepLR": lambda o: schedules.MultiStepLR(o, [2, 5]),
    "ConstantLR": lambda o: schedules.ConstantLR(o, total_iters=4),
    "LinearLR": lambda o: schedules.LinearLR(o, total_iters=6),
    "LinearLR from 0": lambda o: schedules.LinearLR(o, 1e-30, total_iters=6),
    "ExponentialLR": lambda o: schedules.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: schedules.PolynomialLR(o, total_iters=8, power=2.0),
    "CosineAnnealingLR": lambda o: schedules.CosineAnnealingLR(o, T_max=6),
    "CosineAnnealingWarmRestarts": lambda o: schedules.CosineAnnealingWarmRestarts(o, 3),
    "SequentialLR": lambda o: schedules.SequentialLR(
        o, [schedules.LinearLR(o, total_iters=3), schedules.ExponentialLR(o, 0.8)], [3]
    ),
    "ChainedScheduler": lambda o: schedules.ChainedScheduler(
        [schedules.LinearLR(o, total_iters=3), schedules.ExponentialLR(o, 0.8)], o
    ),
    "ReduceLROnPlateau": lambda o: schedules.ReduceLROnPlateau(o, patience=1),
    "CyclicLR": lambda o: schedules.CyclicLR(o, 1e-3, 1e-1, step_size_up=3),
    "CyclicLR, momentum still": lambda o: schedules.CyclicLR(o, 1e-3, 1e-1, step_size_up=3, cycle_momentum=False),
    "OneCycleLR": lambda o: schedules.OneCycleLR(o, max_lr=[0.1, 0.2], total_steps=12),
    "OneCycleLR, momentum still": lambda o: schedules.OneCycleLR(o, max_lr=0.1, total_steps=12, cycle_momentum=False),
    "SWALR": lambda o: SWALR(o, swa_lr=0.05, anneal_epochs=5),
}
CYCLING = ("CyclicLR", "OneCycleLR")  # those that drive beta1


def test_every_scheduler_of_torch_is_in_the_table():
    assert set(schedules.__all__) - {"LRScheduler"} <= SCHEDULERS.keys()


@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float lr", "Tensor lr"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_drive_us_as_they_drive_torch(name, tensor_lr):
    runs = []
    for make in OURS_AND_TORCHS:
        model, seen = make_model(), []
        optimizer = with_groups(make, model, lr=torch.tensor(0.02) if tensor_lr else 0.02)
        scheduler = SCHEDULERS[name](optimizer)

        def after(optimizer=optimizer, scheduler=scheduler, seen=seen):
            scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
            seen.append([(float(g["lr"]), *g["betas"]) for g in optimizer.param_groups])
            if isinstance(optimizer, optim.AdamW):
                assert all(g["betas"] == (g["beta1"], g["beta2"]) for g in optimizer.param_groups)
                assert scheduler.get_last_lr() == [g["lr"] for g in optimizer.param_groups]

        train(model, optimizer, 0, 10, after)
        runs.append((model, seen))
    (ours, our_trajectory), (theirs, their_trajectory) = runs
    assert our_trajectory == their_trajectory
    assert len({row[0][0] for row in our_trajectory}) > 1  # lr moved
    assert (len({row[0][1] for row in our_trajectory}) > 1) == (name in CYCLING)
    assert_close(ours, theirs)


@pytest.mark.parametrize("name", ["OneCycleLR", "CyclicLR", "CosineAnnealingLR", "LinearLR"])
def test_a_schedule_is_resumed_with_the_optimizer(name):
    model = make_model()
    optimizer = with_groups(optim.AdamW, model)
    scheduler = SCHEDULERS[name](optimizer)
    train(model, optimizer, 0, 5, scheduler.step)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict(), scheduler.state_dict()], file)
    train(model, optimizer, 5, 10, scheduler.step)
    file.seek(0)
    saved = torch.load(file, weights_only=name != "CyclicLR")  # it saves a WeakMethod of its own
    twin = make_model()
    resumed = with_groups(optim.AdamW, twin)
    again = SCHEDULERS[name](resumed)
    for part, its in zip((twin, resumed, again), saved, strict=True):
        part.load_state_dict(its)
    train(twin, resumed, 5, 10, again.step)
    assert same(weights(model), weights(twin))
    assert [dict(g, params=0) for g in optimizer.param_groups] == [dict(g, params=0) for g in resumed.param_groups]


# Copies


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda pair: pickle.loads(pickle.dumps(pair))}


@pytest.mark.parametrize("scheduled", [False, True], ids=["", "scheduled"])
@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES.keys())
def test_a_copy_goes_on_alone(copied, steps, scheduled):
    model = make_model()
    optimizer = with_groups(optim.AdamW, model, amsgrad=True)
    if scheduled:
        scheduler = schedules.ExponentialLR(optimizer, 0.9)
        assert "step" in vars(optimizer)  # the scheduler's, bound to this optimizer
        train(model, optimizer, 0, steps, scheduler.step)
    else:
        train(model, optimizer, 0, steps)
    twin, resumed = copied((model, optimizer))
    assert type(resumed) is optim.AdamW
    assert "step" not in vars(resumed)
    held = [x.data_ptr() for entry in optimizer.state.values() for x in entry.values()]
    its = [x.data_ptr() for entry in resumed.state.values() for x in entry.values()]
    assert len(its) == len(held) == (16 if steps else 0)
    assert not set(held) & set(its)
    before, groups = weights(model), [dict(g, params=0) for g in optimizer.param_groups]
    resumed.param_groups[0]["betas"] = (0.5, 0.5)
    train(twin, resumed, steps, steps + 3)
    assert same(weights(model), before)
    assert [dict(g, params=0) for g in optimizer.param_groups] == groups
    optimizer.param_groups[0]["betas"] = (0.5, 0.5)
    train(model, optimizer, steps, steps + 3)
    assert same(weights(model), weights(twin))


def test_deepcopy_keeps_hooks_and_they_are_called_with_the_copy():
    model = make_model()
    optimizer = optim.AdamW(model.parameters())
    calls = []
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: calls.append(("pre", opt)))
    handle = optimizer.register_step_post_hook(lambda opt, *_: calls.append(("post", opt)))
    optimizer.register_state_dict_pre_hook(lambda opt: calls.append(("save", opt)))
    optimizer.register_state_dict_post_hook(lambda opt, saved: calls.append(("saved", opt)))
    optimizer.register_load_state_dict_pre_hook(lambda opt, saved: calls.append(("load", opt)))
    optimizer.register_load_state_dict_post_hook(lambda opt: calls.append(("loaded", opt)))
    twin = copy.deepcopy(optimizer)
    assert calls == []
    handle.remove()  # from the original alone
    for opt in (twin, optimizer):
        opt.step()
        opt.load_state_dict(opt.state_dict())
    names = ["pre", "post", "save", "saved", "load", "loaded"]
    assert [name for name, opt in calls if opt is twin] == names
    assert [name for name, opt in calls if opt is optimizer] == [n for n in names if n != "post"]


# Hooks, zero_grad


def test_step_hooks_run_in_torchs_order_and_can_be_removed():
    model = make_model()
    optimizer = optim.AdamW(model.parameters())
    backward(model)
    calls = []

    def hook(name):
        return lambda opt, args, kwargs: calls.append((name, opt is optimizer, len(opt.state)))

    handles = [
        optimizer.register_step_post_hook(hook("post")),
        optimizer.register_step_pre_hook(hook("pre")),
        base.register_optimizer_step_pre_hook(hook("global pre")),
        base.register_optimizer_step_post_hook(hook("global post")),
    ]
    try:
        optimizer.step(lambda: calls.append("closure"))
    finally:
        for handle in handles:
            handle.remove()
    before = [("global pre", True, 0), ("pre", True, 0)]
    assert calls == [*before, "closure", ("post", True, 4), ("global post", True, 4)]
    optimizer.step()
    assert len(calls) == 5


def test_a_pre_hook_may_give_the_closure():
    optimizer = optim.AdamW(make_model().parameters())
    loss = torch.tensor(3.0)
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: ((opt, lambda: loss), {}))
    assert optimizer.step() is loss


def test_state_dict_hooks_may_put_another_in_its_place():
    model = make_model()
    optimizer = optim.AdamW(model.parameters())
    train(model, optimizer, 0, 2)
    optimizer.register_state_dict_post_hook(lambda opt, saved: {"wrapped": saved})
    saved = optimizer.state_dict()
    assert list(saved) == ["wrapped"]
    other = optim.AdamW(make_model().parameters())
    other.register_load_state_dict_pre_hook(lambda opt, saved: saved["wrapped"])
    other.load_state_dict(saved)
    assert list(saved) == ["wrapped"]  # a hook is given a copy of its own
    assert [int(entry["step"]) for entry in other.state.values()] == [2] * 4


@pytest.mark.parametrize("set_to_none", [None, True, False])
def test_zero_grad(set_to_none):
    model = make_model()
    optimizer = with_groups(optim.AdamW, model)
    backward(model)
    gradients = [param.grad for param in model.parameters()]
    optimizer.zero_grad(*([] if set_to_none is None else [set_to_none]))
    if set_to_none is False:
        assert [id(param.grad) for param in model.parameters()] == [id(g) for g in gradients]
        assert not any(g.any() for g in gradients)
    else:
        assert all(param.grad is None for param in model.parameters())


# torch's checkpoint tools


DCP_OPTIONS = {  # full and flattened at once fails with torch's AdamW too
    "plain": {},
    "full": {"full_state_dict": True},
    "full, offloaded": {"full_state_dict": True, "cpu_offload": True},
    "flattened": {"flatten_optimizer_state_dict": True},
}


def one_group(model):
    return optim.AdamW(model.parameters(), lr=0.02)


def two_groups(model):
    return with_groups(optim.AdamW, model)


def named_and_frozen(model):
    model[0].bias.requires_grad_(False)
    return optim.AdamW(model.named_parameters(), lr=torch.tensor(0.02), amsgrad=True)


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("make", [one_group, two_groups, named_and_frozen])
@pytest.mark.parametrize("options", DCP_OPTIONS.values(), ids=DCP_OPTIONS.keys())
def test_checkpoints_by_dcp(options, make, steps):
    def made():
        model = make_model()
        return model, make(model)

    model, optimizer = made()
    train(model, optimizer, 0, steps)
    optimizer.zero_grad()
    before = weights(model)
    options = dcp.StateDictOptions(**options)
    saved = dcp.get_optimizer_state_dict(model, optimizer, options=options)
    assert same(weights(model), before)
    counts = [steps] * (3 if make is named_and_frozen else 4)
    assert [int(entry["step"]) for entry in optimizer.state.values()] == counts
    assert all(float(g["lr"]) == pytest.approx(0.02) for g in optimizer.param_groups)
    twin, resumed = made()
    twin.load_state_dict(model.state_dict())
    for group in resumed.param_groups:
        group.update(lr=9.0, betas=(0.1, 0.1))
    dcp.set_optimizer_state_dict(twin, resumed, copy.deepcopy(saved), options=options)
    assert [int(entry["step"]) for entry in resumed.state.values()] == counts
    for each in ((model, optimizer), (twin, resumed)):
        train(*each, steps, steps + 3)
    assert same(weights(model), weights(twin))
    reference = made()  # neither saving nor loading has cost a step or moved a weight
    train(*reference, 0, steps + 3)
    assert same(weights(model), weights(reference[0]))


@pytest.mark.parametrize("lr", [0.02, torch.tensor(0.02)], ids=["float lr", "Tensor lr"])
def test_torchs_dummy_step_makes_state_and_counts_nothing(lr):
    model = make_model()
    model[0].bias.requires_grad_(False)
    optimizer = with_groups(optim.AdamW, model, lr=lr)
    before = weights(model)
    dcp._init_optim_state(optimizer)
    assert same(weights(model), before)
    assert len(optimizer.state) == 3
    assert not any(x.any() for entry in optimizer.state.values() for x in entry.values())


@pytest.mark.parametrize("what", ["a gradient", "an lr", "state"])
def test_a_step_with_any_of_these_counts(what):
    model = make_model()
    optimizer = with_groups(optim.AdamW, model, lr=0.0)
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    if what == "a gradient":
        model[2].bias.grad.fill_(-1e-30)
    elif what == "an lr":
        optimizer.param_groups[1]["lr"] = 1e-30
    else:
        optimizer.init_state()
    optimizer.step()
    assert [int(entry["step"]) for entry in optimizer.state.values()] == [1] * 4


# Training


@pytest.mark.parametrize(
    "options", [{}, {"amsgrad": True}, {"maximize": True, "lr": 1e-3}, {"weight_decay": 0.3}, {"eps": 0.01}], ids=str
)
def test_a_model_trains_as_with_torch(options):
    runs = []
    for make in OURS_AND_TORCHS:
        model = make_model()
        optimizer = with_groups(make, model, **options)
        losses = train(model, optimizer, 0, 60)
        runs.append((model, sum(losses[-10:]) / sum(losses[:10])))
    (ours, our_ratio), (theirs, their_ratio) = runs
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert our_ratio == pytest.approx(their_ratio, rel=1e-3)
    assert our_ratio > 1.2 if "maximize" in options else our_ratio < 0.8


def test_tied_weights_are_stepped_once():
    runs = []
    for make in OURS_AND_TORCHS:
        torch.manual_seed(0)
        model = nn.ModuleDict({"embed": nn.Embedding(7, 5), "head": nn.Linear(5, 7, bias=False)})
        model["head"].weight = model["embed"].weight
        optimizer = make(model.parameters(), lr=0.1)
        for _ in range(10):
            optimizer.zero_grad()
            logits = model["head"](model["embed"](torch.arange(7)))
            nn.functional.cross_entropy(logits, torch.arange(7).roll(1)).backward()
            optimizer.step()
        (entry,) = optimizer.state.values()
        assert int(entry["step"]) == 10
        assert model["head"].weight is model["embed"].weight
        runs.append(model)
    assert_close(*runs)


@pytest.mark.parametrize("parts", [2, 4])
def test_gradient_accumulation(parts):
    runs = []
    for accumulate in (True, False):
        model = make_model()
        optimizer = optim.AdamW(model.parameters(), lr=0.02)
        for step in range(5):
            optimizer.zero_grad(set_to_none=False)
            x, y = batch(step)
            pieces = zip(x.chunk(parts), y.chunk(parts), strict=True) if accumulate else [(x, y)]
            for a, b in pieces:
                (nn.functional.mse_loss(model(a), b, reduction="sum") / len(x)).backward()
            optimizer.step()
        assert [int(entry["step"]) for entry in optimizer.state.values()] == [5] * 4
        runs.append(model)
    assert_close(*runs)


def test_clip_grad_norm_is_seen_by_the_step():
    runs = []
    for make in OURS_AND_TORCHS:
        model = make_model()
        optimizer = make(model.parameters(), lr=0.02, eps=0.1)  # so that the scale matters
        for step in range(10):
            optimizer.zero_grad()
            backward(model, step)
            if step % 2:
                nn.utils.clip_grad_norm_(model.parameters(), 1e-2)
            optimizer.step()
        runs.append(model)
    assert_close(*runs)
    free = make_model()
    train(free, optim.AdamW(free.parameters(), lr=0.02, eps=0.1), 0, 10)
    assert not torch.allclose(free[0].weight, runs[0][0].weight, rtol=1e-3)


@pytest.mark.parametrize("unscale", [False, True], ids=["", "unscaled by hand"])
def test_grad_scaler(unscale):
    model, plain = make_model(), make_model()
    optimizer = optim.AdamW(model.parameters(), lr=0.02)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    for step in range(6):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(batch(step)[0]), batch(step)[1])
        scaler.scale(loss).backward()
        if step == 3:
            model[0].bias.grad[2] = float("inf")
        if unscale:
            scaler.unscale_(optimizer)
        before = weights(model)
        scaler.step(optimizer)
        scaler.update()
        assert same(weights(model), before) == (step == 3)
    assert scaler.get_scale() == 2.0**9
    assert [int(entry["step"]) for entry in optimizer.state.values()] == [5] * 4
    reference = optim.AdamW(plain.parameters(), lr=0.02)
    train(plain, reference, 0, 3)
    train(plain, reference, 4, 6)
    assert_close(model, plain)


def test_averaged_model():
    model = make_model()
    optimizer = optim.AdamW(model.parameters(), lr=0.05)
    averaged = AveragedModel(model)
    history = []

    def after():
        averaged.update_parameters(model)
        history.append(model[0].weight.detach().clone())

    train(model, optimizer, 0, 5, after)
    torch.testing.assert_close(averaged.module[0].weight.detach(), torch.stack(history).mean(0))
    assert not torch.equal(history[0], history[4])  # the average holds copies, the step writes


def test_the_profiler_shows_step_and_zero_grad():
    model = make_model()
    optimizer = optim.AdamW(model.parameters())
    backward(model)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
        optimizer.zero_grad()
    seen = {event.key: event.count for event in profile.key_averages()}
    assert seen["Optimizer.step#AdamW.step"] == 1
    assert seen["Optimizer.zero_grad#AdamW.zero_grad"] == 1


def test_a_subclass_is_an_optimizer_too():
    class Mine(optim.AdamW):
        def step(self, closure=None):
            self.steps = getattr(self, "steps", 0) + 1
            return super().step(closure)

    (param,) = params = [Parameter(torch.ones(3))]
    optimizer, plain = Mine(params), optim.AdamW([Parameter(torch.ones(3))])
    scheduler = schedules.ExponentialLR(optimizer, 0.5)
    calls = []
    optimizer.register_step_post_hook(lambda opt, args, kwargs: calls.append(opt))
    param.grad = torch.ones(3)
    plain.param_groups[0]["params"][0].grad = torch.ones(3)
    optimizer.step()
    plain.step()
    scheduler.step()
    assert optimizer.steps == 1
    assert calls
    assert torch.equal(param, plain.param_groups[0]["params"][0])
