"""Guards `observe` and `statistics`: numbers about a step that are right, and that cost the training no bit.

What is told of a step is held against the update computed in float64 with torch from what was there before it, for
every dtype, format and engine. It is meant for looking at: 1e-5 is asked of float32. Numbers that are summed over parts
of vectors must not take in what lies beside them, and NaN must not be lost in a maximum.
"""

import copy
import itertools
import json
import math
import pickle

import numpy as np
import pytest
import torch
from torch.nn import Parameter

import lucid.optim as optim
from bits import SEALED, assert_same, draw, on, results
from gradients import KINDS, ROWS, SMALL, Mixed, expected_factor, two_engines, used
from lucid import engine

LEVELS = engine.cpu.simd_levels()
FEW = [*SMALL, ((64, 66), "dense", "dense"), ((41, 101), "strided", "transposed"), ((5000,), "dense", "dense")]
MEASURES = ["grad_norm", "update_rms", "param_rms", "update_ratio", "max_m_over_sqrt_v", "step", "skipped_steps"]


def single(param, gradient, **options):
    param = Parameter(param)
    param.grad = gradient
    optimizer = optim.AdamW([param], **options)
    optimizer.observe()
    return optimizer


def of_group(optimizer, number=0):
    """The statistics of a group by measure."""
    prefix = f"group{number}/"
    return {key.removeprefix(prefix): x for key, x in optimizer.statistics().items() if key.startswith(prefix)}


# Against float64


def wide(values):
    """Real numbers in float64, one after the other."""
    values = values.detach()
    return (torch.view_as_real(values) if values.is_complex() else values).double().reshape(-1)


def masters(optimizer):
    """The values that the parameters stand for."""
    values = {}
    for param in (param for group in optimizer.param_groups for param in group["params"]):
        entry = optimizer.state.get(param, {})
        values[param] = param.detach().clone()
        if "residual" in entry:
            upper, lower = (x.detach().contiguous().view(torch.int16).int() for x in (param, entry["residual"]))
            values[param] = ((upper << 16) + lower).view(torch.float32)
        elif "master" in entry:
            values[param] = entry["master"].clone()
    return values


def expected(optimizer, scale=1.0):
    """What the statistics of the next step must be, by name of parameter and group, in float64."""
    every = [param for group in optimizer.param_groups for param in group["params"]]
    values = masters(optimizer)
    state = optimizer.torch_state_dict()["state"]
    gradients = {p: torch.from_numpy(used(p).astype(np.float64)).reshape(-1) for p in every if p.grad is not None}
    norm = torch.cat(list(gradients.values())).norm().item() / scale
    factor = expected_factor(norm, optimizer.max_grad_norm, scale)
    found = {}
    for number, group in enumerate(optimizer.param_groups):
        parts = []
        for index, param in enumerate(group["params"]):
            if param.grad is None:
                continue
            g = gradients[param] * (-factor if group["maximize"] else factor)
            entry = state.get(next(k for k, each in enumerate(every) if each is param)) or {}
            zero = torch.zeros_like(g)
            m, v, w = (
                wide(entry[key]) if key in entry else zero for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
            )
            theta, t = wide(values[param]), float(entry.get("step", 0)) + 1
            m = group["beta1"] * m + (1 - group["beta1"]) * g
            v = group["beta2"] * v + (1 - group["beta2"]) * g * g
            w = torch.maximum(v, w) if group["amsgrad"] else v
            first, second = (1 - group[key] ** t for key in ("beta1", "beta2"))
            update = (m / first) / ((w / second).sqrt() + group["eps"]) + group["weight_decay"] * theta
            theta = theta - group["lr"] * update
            ratio = torch.where(m == 0, 0.0, m.abs() / w.sqrt())
            parts.append((gradients[param] / scale, group["lr"] * update, theta, ratio, t, param.numel()))
            if "param_names" in group:
                found[group["param_names"][index]] = measures(parts[-1:], optimizer.skipped_steps)
        if parts:
            found[f"group{number}"] = measures(parts, optimizer.skipped_steps)
    whole = {f"{name}/{key}": value for name, each in found.items() for key, value in each.items()}
    return whole | {"grad_norm": norm, "skipped_steps": optimizer.skipped_steps, "skipped_spikes": 0}


def measures(parts, skipped):
    gradient, update, theta, ratio = (torch.cat([part[k] for part in parts]) for k in range(4))
    count = max(1, sum(part[5] for part in parts))  # a complex number is one element
    update, theta = ((x.square().sum() / count).sqrt().item() for x in (update, theta))
    values = gradient.norm().item(), update, theta, update / theta if theta else 0.0, max(ratio.tolist(), default=0.0)
    return dict(zip(MEASURES, (*values, max(part[4] for part in parts), skipped), strict=True))


def assert_close(found, wanted, relative):
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        close = math.isclose(found[key], value, rel_tol=relative, abs_tol=0)
        assert close or (math.isnan(found[key]) and math.isnan(value)), f"{key}: {found[key]!r}, not {value!r}"


def named(*args, **options):
    world = Mixed(*args, names=(f"layer{k}.weight" for k in itertools.count()), **options)
    world.optimizer.observe()
    return world


@pytest.mark.parametrize("master_weights", [True, False])
@pytest.mark.parametrize(("dtype", "state_format"), KINDS, ids=str)
def test_they_are_right_to_1e_5(dtype, state_format, master_weights, engine_name):
    """Of every step: plain ones, clipped ones, scaled ones, both."""
    world = named(dtype, state_format, ROWS if engine_name == "cpu" else FEW, master_weights=master_weights)
    optimizer = world.optimizer
    with on(engine_name):
        for bound, scale in ((None, None), (0.5, None), (None, 3.0), (0.02, 1024.0)):
            world.set_gradients()
            optimizer.max_grad_norm = bound
            optimizer.grad_scale = None if scale is None else torch.tensor(scale)
            wanted = expected(optimizer, scale or 1.0)
            optimizer.step()
            assert_close(optimizer.statistics(), wanted, 1e-5)
            assert bound is None or wanted["grad_norm"] > 2 * bound
            assert bound is None or optimizer.grad_norm.item() == pytest.approx(wanted["grad_norm"], rel=1e-13)


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1e-3, 1e3, 1e6])
def test_gradients_of_any_usual_size(scale, engine_name):
    optimizer = single(draw(0, (5000,)), None)
    ((param,),) = (group["params"] for group in optimizer.param_groups)
    with on(engine_name):
        for step in range(3):
            param.grad = draw(step + 1, (5000,)) * scale
            wanted = expected(optimizer)
            optimizer.step()
            assert_close(optimizer.statistics(), wanted, 1e-5)


def observed_steps(dtype, state_format, rows):
    world = named(dtype, state_format, rows)
    found = []
    for bound in (None, 0.5):
        world.step(bound)
        found.append(world.optimizer.statistics())
    return found


@pytest.mark.parametrize(("dtype", "state_format"), KINDS, ids=str)
def test_levels_threads_and_batches_give_the_references_statistics(dtype, state_format):
    """To 1e-6 where the engine sums in float32; threads change nothing at all."""
    relative = 1e-12 if dtype in (torch.float64, torch.complex128) else 1e-6
    with on("reference"):
        wanted = observed_steps(dtype, state_format, FEW)
    for level, batch in itertools.product(LEVELS, [1, 1000, 4096, 1 << 16]):
        if batch == 1 and (level != LEVELS[-1] or dtype != torch.float32):
            continue
        found = []
        with engine.cpu.forced_simd_level(level), engine.cpu.forced_batch_elements(batch):
            for threads in (1, 2):
                torch.set_num_threads(threads)
                found.append(observed_steps(dtype, state_format, FEW))
        assert found[0] == found[1]
        for ours, theirs in zip(found[0], wanted, strict=True):
            assert_close(ours, theirs, relative)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rows_of_several_engines_are_told_of_together(dtype):
    with on("reference"):
        wanted = observed_steps(dtype, "8bit", FEW)
    with two_engines():
        found = observed_steps(dtype, "8bit", FEW)
    for ours, theirs in zip(found, wanted, strict=True):
        assert_close(ours, theirs, 1e-6)


# No bit of the training


@pytest.mark.parametrize(("dtype", "state_format"), KINDS, ids=str)
def test_observing_changes_no_bit(dtype, state_format, engine_name):
    rows = {"cpu": ROWS, "reference": FEW}.get(engine_name, FEW[-2:])
    bounds = [None, 0.5, math.inf, None]

    def run(observed):
        world = Mixed(dtype, state_format, rows)
        for bound, observe in zip(bounds, observed, strict=True):
            world.optimizer.observe(observe)
            world.step(bound)
        return results(world.optimizer), world.optimizer.grad_norm

    with on(engine_name):
        wanted, norm = run([False] * 4)
        for observed in ([True] * 4, [False, True, True, False]):
            found, own_norm = run(observed)
            assert own_norm == norm
            assert_same(found, wanted)


@pytest.mark.parametrize("level", LEVELS)
def test_observing_changes_no_bit_on_any_level(level):
    def run(observe):
        world = Mixed(rows=FEW)
        world.optimizer.observe(observe)
        for _ in range(3):
            world.step()
        return results(world.optimizer)

    for batch in (100, 1 << 16):
        with engine.cpu.forced_simd_level(level), engine.cpu.forced_batch_elements(batch):
            assert_same(run(True), run(False))


def test_observing_adds_nothing_to_checkpoints_groups_or_state():
    plain, observed = (single(torch.ones(3), torch.ones(3)) for _ in range(2))
    plain.observe(False)
    for optimizer in (plain, observed):
        optimizer.step()
    assert observed.statistics()
    for left, right in zip(plain.param_groups, observed.param_groups, strict=True):
        assert left.keys() == right.keys()
        assert vars(left["params"][0]) == vars(right["params"][0])
    assert plain.defaults.keys() == observed.defaults.keys()
    assert str(plain.state_dict()) == str(observed.state_dict())


# On and off


def test_without_an_observed_step_there_are_none(engine_name):
    optimizer = single(torch.ones(3), torch.ones(3))
    optimizer.observe(False)
    with on(engine_name):
        for _ in range(2):
            with pytest.raises(RuntimeError, match=r"no step has been observed; call observe\(\) before step\(\)"):
                optimizer.statistics()
            optimizer.step()
        optimizer.observe()
        with pytest.raises(RuntimeError, match="no step has been observed"):
            optimizer.statistics()
        optimizer.zero_grad()
        optimizer.step()
        with pytest.raises(RuntimeError, match="no step has been observed"):  # nothing was updated
            optimizer.statistics()


def test_they_are_those_of_the_last_observed_step(engine_name):
    optimizer = single(torch.ones(3), torch.ones(3))
    ((param,),) = (group["params"] for group in optimizer.param_groups)
    with on(engine_name):
        for number in range(1, 6):
            optimizer.observe(number in (1, 2, 5))
            param.grad = torch.tensor([float(number), 0.0, 0.0])
            optimizer.step()
            if number in (1, 2, 5):
                assert optimizer.statistics()["grad_norm"] == pytest.approx(number)
            else:  # another step's would mislead
                with pytest.raises(RuntimeError, match="no step has been observed"):
                    optimizer.statistics()


@pytest.mark.parametrize("infinite", [math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_infinity_over_infinity_shows_wherever_it_is(dtype, infinite):
    for level in LEVELS:
        with engine.cpu.forced_simd_level(level):
            for position in (0, 4, 8, 12, 16, 31, 40, 63):
                param = Parameter(torch.ones(64, dtype=dtype))
                param.grad = torch.ones(64, dtype=dtype)
                param.grad[position] = infinite
                optimizer = optim.AdamW([param])
                optimizer.observe()
                optimizer.step()
                assert math.isnan(optimizer.statistics()["group0/max_m_over_sqrt_v"]), (level, position)


@pytest.mark.parametrize("bound", [1.0, 1e-25, 1e-170])
def test_a_spike_that_is_clipped_hides_no_other_gradient(bound, engine_name):
    small, spiky = Parameter(torch.ones(10)), Parameter(torch.ones(10))
    optimizer = optim.AdamW([("small", small), ("spiky", spiky)], max_grad_norm=bound)
    optimizer.observe()
    small.grad, spiky.grad = torch.full((10,), 0.01), torch.ones(10)
    spiky.grad[3] = 1e15
    with on(engine_name):
        optimizer.step()
    assert optimizer.statistics()["small/grad_norm"] == pytest.approx(0.01 * 10**0.5, rel=1e-5)
    assert optimizer.statistics()["grad_norm"] == pytest.approx(float(optimizer.grad_norm), rel=1e-5)


@pytest.mark.parametrize("value", ["no", 1, None])
def test_on_is_true_or_false(value):
    optimizer = single(torch.ones(3), torch.ones(3))
    for switch in (optimizer.observe, optimizer.step_in_backward):
        with pytest.raises(TypeError, match="on: expected True or False, got"):
            switch(value)


def test_state_that_was_emptied_counts_no_steps():
    optimizer = single(torch.ones(3), torch.ones(3))
    optimizer.observe()
    optimizer.step()
    for entry in optimizer.state.values():
        entry.clear()
    assert optimizer.statistics()["group0/step"] == 0


@pytest.mark.parametrize("warm", [0, 1, SEALED])
def test_steps_that_are_not_taken_keep_them(warm, engine_name):
    """And are counted."""
    optimizer = single(torch.ones(3), torch.ones(3), nonfinite="skip")
    ((param,),) = (group["params"] for group in optimizer.param_groups)
    with on(engine_name):
        for _ in range(warm):
            optimizer.step()
        before = optimizer.statistics() if warm else None
        for skipped in (1, 2):
            param.grad = torch.tensor([1.0, math.nan, 0.0])
            optimizer.step()
            if warm:
                assert optimizer.statistics() == before | {"skipped_steps": skipped, "group0/skipped_steps": skipped}
            else:
                with pytest.raises(RuntimeError, match="no step has been observed"):
                    optimizer.statistics()
        optimizer.nonfinite = "error"
        with pytest.raises(FloatingPointError):
            optimizer.step()
        param.grad = torch.tensor([2.0, 0.0, 0.0])
        optimizer.step()
    found = optimizer.statistics()
    assert found["grad_norm"] == pytest.approx(2.0)
    assert found["group0/step"] == warm + 1
    assert found["skipped_steps"] == found["group0/skipped_steps"] == 2


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_go_on_observing(copied):
    optimizer = single(torch.ones(3), torch.ones(3))
    optimizer.step()
    twin = copied(optimizer)
    twin.param_groups[0]["params"][0].grad = torch.full((3,), 2.0)
    twin.step()
    assert twin.statistics()["grad_norm"] == pytest.approx(math.sqrt(12.0))
    assert optimizer.statistics()["grad_norm"] == pytest.approx(math.sqrt(3.0))


def test_a_step_in_backward_is_observed_too():
    found = []
    for in_backward in (False, True):
        params = {f"p{k}": Parameter(draw(k, (300,))) for k in range(3)}
        optimizer = optim.AdamW(list(params.items()))
        optimizer.observe()
        optimizer.step_in_backward(in_backward)
        for _ in range(2):
            sum((k + 1) * p.square().sum() for k, p in enumerate(params.values())).backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(optimizer.statistics())
    assert_close(found[1], found[0], 1e-6)


def test_a_step_in_backward_after_a_clipped_one():
    optimizer = single(torch.ones(4), torch.ones(4), max_grad_norm=0.02)
    optimizer.step()
    assert optimizer.statistics()["grad_norm"] == pytest.approx(2.0)
    ((param,),) = (group["params"] for group in optimizer.param_groups)
    optimizer.zero_grad()
    optimizer.max_grad_norm = None
    optimizer.step_in_backward()
    param.sum().backward()
    assert optimizer.statistics()["grad_norm"] == pytest.approx(2.0)


# Names


def keys_for(*names):
    return {"grad_norm", "skipped_steps", "skipped_spikes"} | {f"{name}/{key}" for name in names for key in MEASURES}


def test_they_go_by_group_and_name(engine_name):
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    groups = [{"params": list(layer.named_parameters(prefix=str(k)))} for k, layer in enumerate(model)]
    optimizer = optim.AdamW(groups)
    optimizer.observe()
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    with on(engine_name):
        optimizer.step()
    every = ("group0", "group1", "0.weight", "0.bias", "1.weight", "1.bias")
    assert optimizer.statistics().keys() == keys_for(*every)


def test_parameters_without_names_are_told_of_by_group_only(engine_name):
    params = [Parameter(draw(k, (7,))) for k in range(4)]
    optimizer = optim.AdamW([{"params": params[:1]}, {"params": params[1:]}])
    optimizer.observe()
    for k, param in enumerate(params):
        param.grad = torch.full((7,), float(k))
    with on(engine_name):
        optimizer.step()
    found = optimizer.statistics()
    assert found.keys() == keys_for("group0", "group1")
    assert (found["group0/grad_norm"], found["group1/grad_norm"]) == pytest.approx((0.0, math.sqrt(7 * (1 + 4 + 9))))
    assert found["grad_norm"] == pytest.approx(found["group1/grad_norm"])


def test_what_took_no_part_is_not_told_of(engine_name):
    """Parameters and groups without gradients; the step counts of those that come and go are their own."""
    params = {f"p{k}": Parameter(draw(k, (7,))) for k in range(4)}
    items = list(params.items())
    optimizer = optim.AdamW([{"params": items[:2]}, {"params": items[2:]}])
    optimizer.observe()
    found = []
    with on(engine_name):
        for present in (["p0", "p2", "p3"], ["p0", "p1"], ["p1", "p3"]):
            for name, param in params.items():
                param.grad = torch.ones(7) if name in present else None
            optimizer.step()
            found.append(optimizer.statistics())
    assert [each.keys() for each in found] == [
        keys_for("group0", "group1", "p0", "p2", "p3"),
        keys_for("group0", "p0", "p1"),
        keys_for("group0", "group1", "p1", "p3"),
    ]
    assert (found[1]["p0/step"], found[1]["p1/step"], found[1]["group0/step"]) == (2, 1, 2)
    assert (found[2]["p1/step"], found[2]["p3/step"], found[2]["group1/step"]) == (2, 2, 2)


@pytest.mark.parametrize("bad", [None, math.nan, math.inf])
def test_they_are_plain_numbers(bad, engine_name):
    world = named(rows=SMALL, nonfinite="propagate", max_grad_norm=1.0)
    with on(engine_name):
        world.set_gradients()
        if bad is not None:
            world.params[3].grad.view(-1)[0] = bad
        world.optimizer.step()
    found = world.optimizer.statistics()
    assert type(found) is dict
    assert {type(key) for key in found} == {str}
    assert {type(value) for value in found.values()} <= {int, float}
    assert json.loads(json.dumps(found)).keys() == found.keys()
    assert all(map(math.isfinite, found.values())) == (bad is None)
    found.clear()
    assert world.optimizer.statistics()


# Edges


def test_zero_gradients_and_zero_parameters(engine_name):
    with on(engine_name):
        still = single(torch.zeros(33), torch.zeros(33))
        still.step()
        assert set(of_group(still).values()) == {0.0, 1.0}
        assert of_group(still)["step"] == 1.0
        decaying = single(torch.full((33,), 2.0), torch.zeros(33), lr=0.5, weight_decay=0.5)
        decaying.step()
        found = of_group(decaying)
        assert (found["grad_norm"], found["max_m_over_sqrt_v"]) == (0.0, 0.0)
        assert (found["update_rms"], found["param_rms"], found["update_ratio"]) == pytest.approx((0.5, 1.5, 1 / 3))
        to_zero = single(torch.full((33,), 2.0), torch.zeros(33), lr=1.0, weight_decay=1.0)
        to_zero.step()
        found = of_group(to_zero)
        assert (found["update_rms"], found["param_rms"], found["update_ratio"]) == (2.0, 0.0, math.inf)


def test_empty_tensors(engine_name):
    """Alone, and among others, whose numbers they leave as they are."""
    with on(engine_name):
        empty = single(torch.zeros(0, 3), torch.zeros(0, 3))
        empty.step()
        assert of_group(empty) == dict.fromkeys(MEASURES, 0.0) | {"step": 1.0}
        found = []
        for sizes in ((100, 33), (0, 100, 0, 0, 33, 0)):
            params = [Parameter(torch.full((size,), size / 10)) for size in sizes]
            for param in params:
                param.grad = torch.ones(param.shape)
            optimizer = optim.AdamW(params)
            optimizer.observe()
            with engine.cpu.forced_batch_elements(50):
                optimizer.step()
            found.append(optimizer.statistics())
    assert found[0] == found[1]


@pytest.mark.parametrize("spoiled", [0, 1])
@pytest.mark.parametrize("position", [0, 1, 15, 16, 31, 36])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_nan_shows(dtype, position, spoiled, engine_name):
    """In whatever lane, before and after larger numbers; beside a parameter that has none."""
    params = {f"p{k}": Parameter(draw(k, (37,), torch.float32).to(dtype)) for k in range(2)}
    optimizer = optim.AdamW(list(params.items()))
    optimizer.observe()
    for param in params.values():
        param.grad = torch.ones(37, dtype=dtype)
    params[f"p{spoiled}"].grad[position] = math.nan
    with on(engine_name):
        optimizer.step()
    found = optimizer.statistics()
    for key in MEASURES[:5]:
        assert math.isnan(found[f"p{spoiled}/{key}"])
        assert math.isnan(found[f"group0/{key}"])
        assert math.isfinite(found[f"p{1 - spoiled}/{key}"])
    assert math.isnan(found["grad_norm"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64], ids=str)
@pytest.mark.parametrize("size", [*range(1, 35), 65, 4097])
def test_nothing_beside_a_tensor_is_taken_in(size, dtype):
    """Vectors reach beyond its end; every number there must count as none."""
    start, gradient = torch.full((size,), 3.0, dtype=dtype), torch.full((size,), -2.0, dtype=dtype)
    optimizer = single(start, gradient, lr=0.25, betas=(0.5, 0.5), weight_decay=1.0)
    for level in LEVELS:
        twin = copy.deepcopy(optimizer)
        ((param,),) = (group["params"] for group in twin.param_groups)
        param.grad = gradient
        wanted = expected(twin)
        with engine.cpu.forced_simd_level(level):
            twin.step()
        assert_close(twin.statistics(), wanted, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [1, 5, 17])
def test_nothing_beside_a_tensor_is_taken_in_without_eps(size, dtype):
    optimizer = single(torch.ones(size, dtype=dtype), torch.ones(size, dtype=dtype), eps=0.0)
    wanted = expected(optimizer)
    optimizer.step()
    assert_close(optimizer.statistics(), wanted, 1e-5)


def test_the_largest_ratio_is_found_anywhere():
    """Each element in turn has the largest |m|/√v, of either sign."""
    for level, dtype in itertools.product(LEVELS, [torch.float32, torch.float64, torch.bfloat16]):
        for size in (1, 7, 16, 37):
            optimizer = single(torch.ones(size, dtype=dtype), torch.zeros(size, dtype=dtype), betas=(0.5, 0.75))
            ((param,),) = (group["params"] for group in optimizer.param_groups)
            for where in range(size):
                optimizer.init_state()
                for key in ("exp_avg", "exp_avg_sq"):
                    optimizer.state[param][key].fill_(1.0)
                param.grad = torch.ones(size, dtype=dtype)
                param.grad[where] = -3.0 if where % 2 else 3.0  # m is 2 or -1, v 3
                with engine.cpu.forced_simd_level(level):
                    optimizer.step()
                wanted = 2 / math.sqrt(3) if where % 2 == 0 else (1.0 if size > 1 else 1 / math.sqrt(3))
                assert of_group(optimizer)["max_m_over_sqrt_v"] == pytest.approx(wanted, rel=1e-5), (level, where)


def test_numbers_whose_squares_overflow_together(engine_name):
    """Each parameter's sum of squares is finite: for the group it is not."""
    params = [Parameter(torch.zeros(5, dtype=torch.float64)) for _ in range(4)]
    for param in params:
        param.grad = torch.full((5,), 5e153, dtype=torch.float64)
    optimizer = optim.AdamW(params)
    optimizer.observe()
    with on(engine_name):
        optimizer.step()
    assert optimizer.statistics()["grad_norm"] == math.inf
