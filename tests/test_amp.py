"""Guards mixed precision: torch.amp.GradScaler drives us as it drives torch's AdamW, in every order that people use.

GradScaler knows two ways. Usually it unscales the gradients itself and leaves out a step where it found an overflow.
To an optimizer whose `_step_supports_amp_scaling` is true it hands over `grad_scale` and `found_inf`, and the step does
both: so it is on accelerators, and here by setting it. Both ways go through the same tests, to the same bits.
"""

import copy
import itertools
import math
import pickle

import pytest
import torch
from torch import nn
from torch.nn import Parameter

from bits import World, assert_same, draw, on, results, same, snapshot, through_a_file
from lucid import engine
from lucid.engine.cuda.device import CUDA
from lucid.optim import gradients
from scaled import (
    CLIP,
    INF,
    NAN,
    ORDERS,
    PLANTED,
    TORCHS,
    Run,
    assert_close,
    every_engine,
    handed_over,
    make_ours,
    make_params,
    make_scaler,
    steps_of,
    torchs_run,
    without_scaler,
)


@pytest.fixture(params=["cpu", "reference"])
def engine_name(request):
    return request.param


@pytest.fixture(autouse=True)
def engine_in_use(engine_name):
    with on(engine_name):
        yield


ORDINARY = [
    *((order, "propagate") for order in ORDERS),
    *((ORDERS[n], how) for n in (0, 4) for how in ("skip", "error")),
]


@pytest.mark.parametrize(
    ("engine_name", "order", "nonfinite"),
    [*((name, *case) for name in ("cpu", "reference") for case in ORDINARY), ("cuda", "own clip", "propagate")],
)
@handed_over
def test_scales_and_skipped_steps_are_torchs(handed, order, nonfinite):
    options = {"nonfinite": nonfinite, "max_grad_norm": CLIP if "own clip" in order else None}
    ours = Run(lambda params: make_ours(params, handed, **options), order).run(0, 60)
    for name in TORCHS:
        theirs = torchs_run(name, order)
        assert ours.log == theirs.log
        assert ours.skipped == theirs.skipped
        assert_close(ours.params, theirs.params)
    assert ours.optimizer.skipped_steps == (len(ours.skipped) if handed else 0)
    assert set(PLANTED) < set(ours.skipped)  # float16 has overflowed besides
    assert max(scale for scale, *_ in ours.log) > 2.0**13  # and the scale has grown
    assert_same(results(ours.optimizer), results(without_scaler(ours, **options)))


@pytest.mark.parametrize("make", [*TORCHS.values(), None], ids=[*TORCHS, "handed over"])
def test_a_model_trains_under_autocast(make):
    runs = []
    for each in (lambda params: make_ours(params, False), make or (lambda params: make_ours(params, True))):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1))
        optimizer, log = each(model.parameters()), []
        for group in optimizer.param_groups:
            group["lr"] = 0.02
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**13, growth_interval=5)
        for step in range(40):
            x = draw(step, (32, 4))
            with torch.autocast("cpu", dtype=torch.float16):
                loss = nn.functional.mse_loss(model(x), x.sum(1, keepdim=True))
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            log.append((scaler.get_scale(), scaler._get_growth_tracker(), steps_of(optimizer)))
        assert 0 < log[-1][2] < 40  # some steps were left out, for a scale too large
        runs.append((log, list(model.parameters())))
    (ours, our_params), (theirs, their_params) = runs
    assert ours == theirs
    assert_close(our_params, their_params, rtol=1e-2, atol=1e-3)  # float16 rounds a last bit of difference up


# What a step computes


@every_engine
@handed_over
@pytest.mark.parametrize("scale", [2.0**16, 2.0**-3, 1000.0, 3.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_gradient_is_multiplied_by_the_scales_inverse(dtype, scale, handed):
    """With both betas 0 the first moment is the gradient that the step has used."""
    params = make_params(dtype)
    optimizer = make_ours(params, handed, betas=(0.0, 0.0))
    scaler = make_scaler(scale)
    given = [draw(100 + index, param.shape, dtype) * scale for index, param in enumerate(params)]
    for param, gradient in zip(params, given, strict=True):
        param.grad = gradient.clone()
    scaler.step(optimizer)
    inverse = 1.0 / float(torch.tensor(scale))
    for param, gradient in zip(params, given, strict=True):
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        expected = gradient.to(compute) * torch.tensor(inverse, dtype=compute)
        if not handed:  # torch rounds the inverse to float32, and the product to the gradient's dtype
            expected = (gradient.to(compute) * torch.tensor(inverse).to(compute)).to(dtype).to(compute)
        assert same(optimizer.state[param]["exp_avg"], expected)
        assert same(param.grad, gradient if handed else expected.to(dtype))
    assert not {"grad_scale", "found_inf"} & vars(optimizer).keys()


@pytest.mark.parametrize(
    "options", [{}, {"max_grad_norm": 1.0}, {"nonfinite": "error"}, {"state_format": "8bit"}], ids=str
)
@pytest.mark.parametrize("scale", [2.0**16, 2.0**-3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64])
def test_a_power_of_two_changes_no_bit(dtype, scale, options):
    """Also for dtypes that GradScaler does not unscale: the scale is set as it would set it."""
    worlds = scaled, plain = [World(dtype, ((3, 5), (70, 64), ()), amsgrad=True, **options) for _ in range(2)]
    for _ in range(5):
        plain.set_gradients()
        plain.done += 1
        for ours, its in zip(scaled.params, plain.params, strict=True):
            its.grad = ((its.grad + its.grad.sgn() / 4) / 256).detach()  # so that float16 holds it and its multiple
            ours.grad = its.grad * scale
        scaled.optimizer.grad_scale = torch.tensor(scale)
        scaled.optimizer.found_inf = torch.tensor(0.0)
        for world in worlds:
            world.optimizer.step()
    assert_same(*(results(world.optimizer) for world in worlds))
    assert str(scaled.optimizer.grad_norm) == str(plain.optimizer.grad_norm)


def test_float16_gradients_are_gradscalers_to_refuse():
    """It does not unscale them; it does check them where the step unscales."""
    params = [Parameter(draw(0, (40,)).half())]
    optimizer = make_ours(params, False, betas=(0.0, 0.0))
    scaler = make_scaler(2.0**10)
    params[0].grad = gradient = (draw(1, (40,)) * 2.0**10).half()
    before = snapshot(optimizer, params)
    with pytest.raises(ValueError, match="Attempting to unscale FP16 gradients"):
        scaler.step(optimizer)
    assert snapshot(optimizer, params) == before
    optimizer._step_supports_amp_scaling = True
    scaler = make_scaler(2.0**10)
    scaler.step(optimizer)
    assert same(optimizer.state[params[0]]["exp_avg"], gradient.float() / 2.0**10)


@every_engine
@handed_over
@pytest.mark.parametrize("scale", [2.0**16, 1000.0])
@pytest.mark.parametrize("bound", [0.5, 1e4])
def test_our_clipping_is_of_the_unscaled_gradients(bound, scale, handed):
    used, norms = [], []
    for way in ("torch's", "ours", "ours after unscale_"):
        params = make_params()
        optimizer = make_ours(params, handed, betas=(0.0, 0.0), max_grad_norm=None if way == "torch's" else bound)
        scaler = make_scaler(scale)
        for index, param in enumerate(params):
            param.grad = draw(100 + index, param.shape) * scale
        if way != "ours":
            scaler.unscale_(optimizer)
        norms.append(nn.utils.clip_grad_norm_(params, bound) if way == "torch's" else None)
        scaler.step(optimizer)
        norms[-1] = optimizer.grad_norm if norms[-1] is None else norms[-1].double()
        used.append([optimizer.state[param]["exp_avg"] for param in params])
    torchs, *ours = used
    for each in ours:
        assert_close(each, torchs, rtol=1e-6, atol=0)
    assert_close(norms[1:], norms[:1] * 2, rtol=1e-6, atol=0)
    if scale == 2.0**16:  # unscaling is exact, so it does not matter who does it
        assert all(map(same, *ours))
        assert same(*norms[1:])


@every_engine
def test_the_gradients_stay_as_they_are_where_the_step_unscales():
    params = make_params()
    optimizer = make_ours(params, True, max_grad_norm=0.5)
    scaler = make_scaler(1000.0)
    for index, param in enumerate(params):
        param.grad = draw(index, param.shape)
    versions = []
    optimizer.register_step_pre_hook(lambda *_: versions.append([param.grad._version for param in params]))
    before = [(param.grad, param.grad.clone()) for param in params]
    scaler.step(optimizer)
    assert [param.grad._version for param in params] == versions[0]
    for param, (gradient, values) in zip(params, before, strict=True):
        assert param.grad is gradient
        assert same(gradient, values)  # GradScaler's check has multiplied by 1


@every_engine
@handed_over
@pytest.mark.parametrize("unscale", [False, True], ids=["", "unscale_"])
def test_nothing_is_measured_beside_gradscalers_check(monkeypatch, unscale, handed, engine_name):
    calls = []
    for owner, name in ((engine.Plan, "measure"), (gradients, "fault")):
        own = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, own=own, name=name: calls.append(name) or own(*args))
    deciding = CUDA._deciding  # where no host measures

    def decide(cuda, tables, recipes, verdict):
        calls.extend(["measure"] * verdict.measures)
        return deciding(cuda, tables, recipes, verdict)

    monkeypatch.setattr(CUDA, "_deciding", decide)

    def train(planted=None, **options):
        calls.clear()
        params = make_params()
        optimizer = make_ours(params, handed, **options)
        scaler = make_scaler()
        for step in range(3):
            for index, param in enumerate(params):
                param.grad = draw(100 * step + index, param.shape)
            if step == planted:
                params[0].grad[0, 0] = INF
            if unscale:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        return calls.count("measure"), "fault" in calls

    assert not any(train())
    assert not any(train(planted=1))
    assert train(max_grad_norm=1.0)[0] == 3
    assert train(nonfinite="skip")[0] == 3
    # GradScaler has seen the overflow already; a GPU's finding is not waited for.
    assert train(nonfinite="skip", planted=1)[0] == (3 if engine_name == "cuda" and handed else 2)


@every_engine
@handed_over
@pytest.mark.parametrize("clip", [None, 0.3])
def test_statistics_are_of_the_unscaled_gradients(handed, clip):
    told = []
    for scale in (1.0, 2.0**16):
        params = make_params()
        optimizer = make_ours(params, handed, max_grad_norm=clip)
        optimizer.observe()
        scaler = make_scaler(scale)
        for index, param in enumerate(params):
            param.grad = draw(index, param.shape) * scale
        scaler.step(optimizer)
        told.append(optimizer.statistics())
    assert told[0] == told[1]
    norm = math.sqrt(sum(draw(index, param.shape).double().square().sum() for index, param in enumerate(params)))
    assert told[0]["grad_norm"] == pytest.approx(norm, rel=1e-6)


# Steps that are left out


FORMATS = {
    "float32": (torch.float32, {}),
    "bfloat16, 8bit": (torch.bfloat16, {"state_format": "8bit"}),
    "float16, bf16": (torch.float16, {"state_format": "bf16", "amsgrad": True}),
}


OPTIONS = list(itertools.product(FORMATS, [None, 1.0], ["propagate", "skip", "error"]))


@pytest.mark.parametrize(
    ("engine_name", "form", "max_grad_norm", "nonfinite"),
    [(name, *case) for name in ("cpu", "reference") for case in OPTIONS] + [("cuda", *case) for case in OPTIONS[::7]],
)
def test_an_overflow_changes_nothing_but_the_count(form, max_grad_norm, nonfinite, engine_name):
    dtype, options = FORMATS[form]
    world = World(dtype, ((70, 64), (7,), (3, 5)), max_grad_norm=max_grad_norm, nonfinite=nonfinite, **options)
    twin = World(dtype, ((70, 64), (7,), (3, 5)), max_grad_norm=max_grad_norm, nonfinite=nonfinite, **options)
    optimizer, late = world.optimizer, world.params[2]
    late.requires_grad_(False)
    stages = (0, 2) if engine_name == "cuda" else (0, 2, 15)
    for skipped, step in enumerate(stages, start=1):  # without state, with it, and where the plan trusts it
        for each in (world, twin):
            while each.done < step:
                each.set_gradients()
                each.params[2].grad = None
                each.optimizer.step()
                each.done += 1
        world.set_gradients()
        world.params[0].grad[1, 1] = NAN  # the parameter that comes late has a gradient, and as yet no state
        optimizer.found_inf, optimizer.grad_scale = torch.tensor(1.0), torch.tensor(4.0)
        before = snapshot(optimizer, world.params)
        optimizer.step()
        assert snapshot(optimizer, world.params) == before
        assert optimizer.skipped_steps == skipped
        del optimizer.found_inf, optimizer.grad_scale
    for each in (world, twin):
        each.run(3)
    assert_same(results(optimizer), results(twin.optimizer))


@every_engine
def test_an_overflow_at_the_first_step_makes_no_state():
    run = Run(lambda params: make_ours(params, True))
    run.step(0)
    assert run.skipped == [0]
    assert not run.optimizer.state


@pytest.mark.parametrize("others", [False, True], ids=["other unscaled by GradScaler", "other handed over"])
@handed_over
def test_one_of_two_optimizers_overflows(handed, others):
    """It alone is left out; the scale backs off for both."""
    logs = []
    makers = [lambda p: make_ours(p, handed), lambda p: make_ours(p, others)], [TORCHS["torch"]] * 2
    for pair in makers:
        params = make_params(), make_params()
        optimizers = [make(its) for make, its in zip(pair, params, strict=True)]
        scaler, log = make_scaler(growth_interval=2), []
        for step in range(12):
            for number, its in enumerate(params):
                for index, param in enumerate(its):
                    param.grad = draw(1000 * step + 10 * number + index, param.shape) * scaler.get_scale()
            if step in (0, 4, 5, 9):
                params[step % 2][0].grad[0, 1] = INF
            if step % 3 == 1:
                scaler.unscale_(optimizers[1])
            for optimizer in optimizers:
                scaler.step(optimizer)
            scaler.update()
            log.append((scaler.get_scale(), scaler._get_growth_tracker(), *map(steps_of, optimizers)))
        logs.append(log)
        if pair is makers[0]:
            assert [optimizer.skipped_steps for optimizer in optimizers] == [2 * handed, 2 * others]
    assert logs[0] == logs[1]
    assert logs[0][-1][2:] == (10, 10)


@every_engine
def test_an_optimizer_without_gradients_beside_another():
    """GradScaler then hands over the sum of no checks, a plain 0."""
    idle, busy = make_ours(make_params(), True), make_ours(params := make_params(), True)
    scaler = make_scaler()
    for param in params:
        param.grad = torch.ones_like(param)
    for optimizer in (idle, busy):
        scaler.step(optimizer)
    scaler.update()
    assert (steps_of(idle), idle.skipped_steps, steps_of(busy)) == (0, 0, 1)


@every_engine
@handed_over
def test_what_gradscaler_cannot_know_is_not_its_overflow(handed):
    """A gradient that is finite and too large to be squared: the step's own rule, and the scale stays."""
    params = make_params()
    optimizer = make_ours(params, handed, nonfinite="skip")
    scaler = make_scaler(4.0)
    for param in params:
        param.grad = torch.full_like(param, 1e30)
    scaler.step(optimizer)
    scaler.update()
    assert (optimizer.skipped_steps, scaler.get_scale(), len(optimizer.state)) == (1, 4.0, 0)
    optimizer.nonfinite = "error"
    before = snapshot(optimizer, params)
    with pytest.raises(FloatingPointError, match="parameter 0 of group 0 has 15 too large to be squared of 15 entries"):
        scaler.step(optimizer)
    assert snapshot(optimizer, params) == before or not handed  # GradScaler has unscaled the gradients
    assert optimizer.skipped_steps == 1


# Around the steps


@every_engine
@handed_over
@pytest.mark.parametrize("unscale", [False, True], ids=["", "unscale_"])
def test_gradients_of_several_backward_passes(unscale, handed):
    weights = []
    for scale in (2.0**12, None):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        optimizer = make_ours(model.parameters(), handed)
        scaler = torch.amp.GradScaler("cpu", enabled=scale is not None, init_scale=scale or 1.0)
        for step in range(4):
            optimizer.zero_grad()
            for part in range(3):
                x = draw(10 * step + part, (16, 4))
                scaler.scale(nn.functional.mse_loss(model(x), x.sum(1, keepdim=True)) / 3).backward()
            if unscale:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        assert steps_of(optimizer) == 4
        weights.append(list(model.parameters()))
    assert all(map(same, *weights))  # the scale is a power of two and nothing has overflowed


@handed_over
def test_a_scaler_that_is_switched_off(handed):
    params = make_params()
    optimizer, plain = make_ours(params, handed), make_ours(make_params(), None)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for each in (optimizer, plain):
        for index, param in enumerate(each.param_groups[0]["params"]):
            param.grad = draw(index, param.shape)
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    plain.step()
    assert_same(results(optimizer), results(plain))
    params[0].grad[0, 0] = NAN
    scaler.step(optimizer)
    assert params[0].isnan().any()  # nobody looks any more


@handed_over
def test_a_closure_is_gradscalers_to_refuse(handed):
    optimizer = make_ours(params := make_params(), handed)
    scaler = make_scaler()
    params[0].grad = torch.ones_like(params[0])
    before = snapshot(optimizer, params)
    with pytest.raises(RuntimeError, match="Closure use is not currently supported"):
        scaler.step(optimizer, closure=lambda: None)
    assert snapshot(optimizer, params) == before


@handed_over
def test_gradscaler_is_asked_once_a_step(handed):
    """Its own refusals, which depend on nothing of ours."""
    optimizer = make_ours(params := make_params(), handed)
    scaler = make_scaler()
    params[0].grad = torch.ones_like(params[0])
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match=r"unscale_\(\) has already been called"):
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    with pytest.raises(RuntimeError, match=r"step\(\) has already been called"):
        scaler.step(optimizer)
    assert steps_of(optimizer) == 1


@every_engine
@handed_over
def test_a_run_is_resumed_with_its_scaler(handed):
    run = Run(lambda params: make_ours(params, handed)).run(0, 30)
    resumed = Run(lambda params: make_ours(params, handed))
    saved = [run.scaler.state_dict(), run.optimizer.state_dict(), [param.detach() for param in run.params]]
    scaler, optimizer, weights = through_a_file(saved)
    resumed.scaler.load_state_dict(scaler)
    resumed.optimizer.load_state_dict(optimizer)
    with torch.no_grad():
        for param, value in zip(resumed.params, weights, strict=True):
            param.copy_(value)
    run.run(30, 45)
    resumed.run(30, 45)
    assert resumed.log == run.log[30:]
    assert_same(results(resumed.optimizer), results(run.optimizer))


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deepcopy", "pickle"]
)
@handed_over
def test_a_copy_goes_on_as_the_original(handed, copied):
    run = Run(lambda params: make_ours(params, handed)).run(0, 12)
    twin = Run(lambda params: make_ours(params, handed))
    twin.params, twin.optimizer, twin.scaler = copied((run.params, run.optimizer, run.scaler))
    assert twin.optimizer._step_supports_amp_scaling is handed
    assert twin.optimizer.skipped_steps == (len(run.skipped) if handed else 0)
    run.run(12, 30)
    twin.run(12, 30)
    assert twin.log == run.log[12:]
    assert_same(results(twin.optimizer), results(run.optimizer))
    assert twin.optimizer.skipped_steps == run.optimizer.skipped_steps
