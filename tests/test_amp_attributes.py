"""Guards the attributes by which a step learns of a scale: `grad_scale`, `found_inf`, `_step_supports_amp_scaling`.

What a user may set them to by hand and what is refused, who unscales by default, and what Accelerate and Lightning do
around `GradScaler`, to be seen without them.
"""

import copy
import functools
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import Parameter
from torch.optim import lr_scheduler as schedules

import lucid.optim as optim
from bits import World, assert_same, draw, on, results, snapshot
from lucid import engine
from scaled import CLIP, INF, NAN, TORCHS, Run, assert_close, every_engine, make_ours, make_params, steps_of


@pytest.fixture(params=["cpu", "reference"])
def engine_name(request):
    return request.param


@pytest.fixture(autouse=True)
def engine_in_use(engine_name):
    with on(engine_name):
        yield


# Set by hand


SCALES = [4.0, 4, np.float32(4), torch.tensor(4.0), torch.tensor([4.0], dtype=torch.float64), torch.tensor([[4]])]


@every_engine
@pytest.mark.parametrize("found", [None, 0, False, 0.0, torch.tensor(0.0), torch.zeros(1, 1)], ids=str)
@pytest.mark.parametrize("scale", SCALES, ids=repr)
def test_a_scale_set_by_hand(scale, found):
    params = make_params()
    optimizer, plain = make_ours(params, None), make_ours(make_params(), None)
    for param, its in zip(params, plain.param_groups[0]["params"], strict=True):
        its.grad = draw(7, param.shape)
        param.grad = its.grad * 4
    optimizer.grad_scale, optimizer.found_inf = scale, found
    optimizer.step()
    plain.step()
    assert_same(results(optimizer), results(plain))
    assert optimizer.grad_scale is scale  # it counts until it is taken away
    assert optimizer.skipped_steps == 0


@every_engine
@pytest.mark.parametrize("found", [1, True, 2.0, -1.0, NAN, INF, torch.tensor(1.0), torch.tensor([2.0])], ids=str)
def test_anything_but_0_is_an_overflow(found):
    """GradScaler adds up what it found on each device: 2 where two have overflowed."""
    params = make_params()
    optimizer = make_ours(params, None, nonfinite="error")
    params[0].grad = torch.ones_like(params[0])
    before = snapshot(optimizer, params)
    optimizer.found_inf = found
    optimizer.step()
    assert snapshot(optimizer, params) == before
    assert optimizer.skipped_steps == 1


NUMBERS = [0, -1.0, NAN, INF, -INF, torch.tensor(0.0), torch.tensor(-3), torch.tensor(NAN), torch.tensor([INF])]
NO_NUMBERS = [
    "2",
    b"2",
    [],
    [1.0],
    1j,
    object(),
    torch.ones(2),
    torch.ones(0),
    torch.tensor(1j),
    torch.ones(1, device="meta"),
]


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [("grad_scale", value, ValueError) for value in NUMBERS]
    + [(name, value, TypeError) for name in ("grad_scale", "found_inf") for value in NO_NUMBERS],
    ids=lambda value: "object" if type(value) is object else str(value),
)
def test_wrong_ones_are_refused_and_nothing_is_changed(name, value, error):
    world = World().run(2)
    world.set_gradients()
    optimizer = world.optimizer
    setattr(optimizer, name, value)
    before = snapshot(optimizer, world.params)
    with pytest.raises(error, match=rf"^{name}: expected .*, got "):
        optimizer.step()
    assert snapshot(optimizer, world.params) == before
    assert optimizer.skipped_steps == 0
    assert name not in vars(optimizer)  # GradScaler would multiply with it at the next step
    optimizer.step()
    assert_same(results(optimizer), results(World().run(3).optimizer))


# Who unscales


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ((), False),
        (("cpu",), False),
        (("meta",), False),
        (("cuda",), True),
        (("xpu", "xpu"), True),
        (("cuda", "mps"), True),
        (("cuda", "cpu"), False),
        (("cpu", "cuda"), False),
        (("cuda", "meta"), False),
    ],
    ids=str,
)
def test_handed_over_by_default_where_all_is_on_accelerators(kinds, expected):
    optimizer = optim.AdamW(make_params())
    assert optimizer._step_supports_amp_scaling is False
    stand_ins = [SimpleNamespace(device=torch.device(kind)) for kind in kinds]
    optimizer.param_groups = [{"params": stand_ins[:1]}, {"params": stand_ins[1:]}]
    assert optimizer._step_supports_amp_scaling is expected
    for value in (True, False):
        optimizer._step_supports_amp_scaling = value
        assert optimizer._step_supports_amp_scaling is value
    optimizer._step_supports_amp_scaling = None
    assert optimizer._step_supports_amp_scaling is expected


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))])
@pytest.mark.parametrize("value", [True, False, None])
def test_a_copy_knows_who_unscales(copied, value):
    optimizer = make_ours(make_params(), value)
    twin = copied(optimizer)
    assert twin._step_supports_amp_scaling is bool(value)
    twin.param_groups = [{"params": [SimpleNamespace(device=torch.device("cuda"))]}]
    assert twin._step_supports_amp_scaling is (value is not False)


# Accelerate and Lightning: what they do around GradScaler, to be seen without them


class Accelerated:
    """How accelerate 1.15.0 learns of a skipped step: `AcceleratedOptimizer.step`.

    It puts a step in the optimizer's place that notes that it was called, and takes a step that was not called for
    one that was skipped.
    """

    def __init__(self, optimizer, scaler):
        self.optimizer, self.scaler, self.called, self.step_was_skipped = optimizer, scaler, False, False
        self.own = own = optimizer.step

        def noting(*args, **kwargs):
            self.called = True
            return own(*args, **kwargs)

        self.noting = noting

    def step(self):
        self.optimizer.step = self.noting
        self.scaler.step(self.optimizer, None)
        self.scaler.update()
        self.step_was_skipped = not self.called
        self.optimizer.step = self.own
        self.called = False


def accelerated(make, steps=12):
    """Train with a schedule that rests where a step was skipped, as accelerate's does."""
    run = Run(make)
    schedule = schedules.StepLR(run.optimizer, 1, 0.9)
    wrapped = Accelerated(run.optimizer, run.scaler)
    skipped = []
    for step in range(steps):
        run.scaled_gradients(step)
        wrapped.step()
        if wrapped.step_was_skipped:
            skipped.append(step)
        else:
            schedule.step()
    return run, skipped


@pytest.mark.parametrize("handed", [None, False, True])
def test_accelerate_counts_skipped_steps(handed):
    ours, skipped = accelerated(lambda params: make_ours(params, handed))
    theirs, torchs_skipped = accelerated(functools.partial(TORCHS["torch, fused" if handed else "torch"], lr=0.02))
    assert skipped == torchs_skipped == ([] if handed else [0, 7, 8])  # as with torch's fused, none where handed over
    assert ours.optimizer.skipped_steps == (3 if handed else 0)
    assert ours.optimizer.param_groups[0]["lr"] == theirs.optimizer.param_groups[0]["lr"]
    assert ours.scaler.get_scale() == theirs.scaler.get_scale()
    assert_close(ours.params, theirs.params)
    twin = copy.deepcopy(ours.optimizer)
    assert "step" not in vars(twin)  # the one that accelerate has put there is bound to this optimizer
    assert_same(results(twin), results(ours.optimizer))


def lightnings_step(scaler, optimizer, clip):
    """What lightning 2.6.6 does after backward: `MixedPrecision.optimizer_step` and `clip_gradients`.

    Where the optimizer does not unscale, it does so now, so that clipping sees unscaled gradients; where it does,
    clipping is refused.
    """
    handles_unscaling = getattr(optimizer, "_step_supports_amp_scaling", False)
    if not handles_unscaling:
        scaler.unscale_(optimizer)
    if clip:
        if handles_unscaling:
            raise RuntimeError(f"{type(optimizer).__qualname__} does not allow for gradient clipping")
        nn.utils.clip_grad_norm_([param for group in optimizer.param_groups for param in group["params"]], clip)
    scaler.step(optimizer)
    scaler.update()


@pytest.mark.parametrize("handed", [None, False, True])
@pytest.mark.parametrize("clip", [None, CLIP])
def test_lightning_clips(clip, handed):
    theirs = Run(functools.partial(torch.optim.AdamW, lr=0.02))
    ours = Run(lambda params: make_ours(params, handed))
    own = Run(lambda params: make_ours(params, handed, max_grad_norm=clip))
    for step in range(12):
        for run, asked in ((theirs, clip), (own, None), (ours, clip)):
            run.scaled_gradients(step)
            if run is ours and clip and handed:
                before = snapshot(run.optimizer, run.params)
                with pytest.raises(RuntimeError, match="AdamW does not allow for gradient clipping"):
                    lightnings_step(run.scaler, run.optimizer, asked)
                assert snapshot(run.optimizer, run.params) == before
            else:
                lightnings_step(run.scaler, run.optimizer, asked)
    for run in (own,) if clip and handed else (own, ours):
        assert steps_of(run.optimizer) == steps_of(theirs.optimizer) == 9
        assert run.scaler.get_scale() == theirs.scaler.get_scale()
        assert_close(run.params, theirs.params)


@pytest.mark.parametrize("raised", ["error", "gradient", "interrupt"])
def test_a_step_that_raises_leaves_no_scale_for_the_next_one(raised, monkeypatch):
    param = Parameter(torch.ones(3))
    optimizer = optim.AdamW([param], nonfinite="error", betas=(0.0, 0.0))
    optimizer._step_supports_amp_scaling = True
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.zeros(()))  # makes its tensors
    param.grad = torch.full((3,), 1e35 if raised == "error" else 1.0)
    with monkeypatch.context() as patch:
        wanted = FloatingPointError
        if raised == "gradient":
            patch.setattr(engine, "checked_gradient", lambda *_: (_ for _ in ()).throw(TypeError("stop")))
            wanted = TypeError
        if raised == "interrupt":
            patch.setattr(engine.Plan, "steps", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
            wanted = KeyboardInterrupt
        with pytest.raises(wanted):
            scaler.step(optimizer)
    scaler.update()
    param.grad = torch.full((3,), scaler.get_scale())
    scaler.step(optimizer)
    assert torch.equal(optimizer.state[param]["exp_avg"], torch.ones(3))


def test_a_step_within_a_step_leaves_the_outer_one_its_scale(monkeypatch):
    """GradScaler deletes what it has set after the outer step, and must find it."""
    param = Parameter(torch.ones(3))
    optimizer = optim.AdamW([param], betas=(0.0, 0.0))
    optimizer._step_supports_amp_scaling = True
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.zeros(()))  # makes its tensors
    original = engine.Scalars.of

    def stepping(*numbers):
        with pytest.raises(RuntimeError, match="within a running step"):
            optimizer.step()
        return original(*numbers)

    monkeypatch.setattr(engine.Scalars, "of", staticmethod(stepping))
    param.grad = torch.full((3,), 8.0)
    scaler.step(optimizer)
    assert torch.equal(optimizer.state[param]["exp_avg"], torch.ones(3))


@pytest.mark.parametrize("by_hand", [False, True])
def test_in_backward_a_scaler_says_that_it_saw_no_gradient(by_hand):
    param = Parameter(torch.ones(3))
    optimizer = optim.AdamW([param])
    optimizer.step_in_backward()
    if by_hand:
        optimizer._step_supports_amp_scaling = True
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(param.sum()).backward()
    with pytest.raises(AssertionError, match="No inf checks"):
        scaler.step(optimizer)


@pytest.mark.parametrize("value", ["no", 1, 0.0])
def test_support_is_true_false_or_the_default(value):
    optimizer = optim.AdamW([Parameter(torch.ones(3))])
    with pytest.raises(TypeError, match="_step_supports_amp_scaling: expected True, False or None"):
        optimizer._step_supports_amp_scaling = value
    assert not optimizer._step_supports_amp_scaling
