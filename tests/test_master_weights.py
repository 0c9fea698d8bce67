"""Guards that 16-bit parameters train as float32 ones do.

Naive bfloat16 weights stop learning and stop decaying where an update is below half of their last place, and no
loss curve says so at once. Here (parameter, residual), or a float16 parameter's master, must follow the run with
float32 parameters bit for bit, and what other optimizers lose must be kept. Parameters that someone overwrites are in
test_overwritten_weights.py.
"""

import fractions
import io
import itertools

import pytest
import torch
from torch import nn
from torch.nn import Parameter

import lucid.optim as optim
from bits import assert_same, draw, on, results
from masters import FORMATS, HALVES, SLOT, of_masters

# A world of every layout


def layouts(half, dtype):
    """Parameters that `half` can hold, kept in `dtype`; of many orders of magnitude."""

    def values(seed, *shape):
        spread = torch.randint(-4, 2, shape, generator=torch.Generator().manual_seed(seed + 100))
        return (draw(seed, shape) * 10.0**spread).to(half).to(dtype)

    def channels_last(x):
        return x.contiguous(memory_format=torch.channels_last)

    return {
        "contiguous": values(0, 64, 80),
        "transposed": values(1, 80, 64).t(),
        "channels-last": channels_last(values(2, 64, 8, 3, 3)),
        "strided": values(3, 65, 300)[1:, 3:270:3],
        "strided and transposed": values(4, 130, 64).t()[:, ::2],
        "odd rows": values(5, 33, 129),
        "1-dim": values(6, 300),
        "1-dim strided": values(7, 70)[::3],
        "small": values(8, 5, 7),
        "0-dim": values(9),
        "empty": values(10, 0, 5),
    }


SMALL = ["1-dim strided", "small", "0-dim", "empty"]


class Run:
    """An optimizer of all layouts in two groups, the second with amsgrad; gradients depend on the step only."""

    def __init__(self, half, dtype, gradient_dtype, only=None, **options):
        tensors = layouts(half, dtype)
        names = list(tensors) if only is None else only
        again = layouts(half, dtype)
        few = [name for name in names if name in ("transposed", "strided", "small", "1-dim")]
        groups = [
            {"params": [(name, Parameter(tensors[name])) for name in names], "amsgrad": False, "lr": 1e-4},
            {"params": [(f"amsgrad {name}", Parameter(again[name])) for name in few], "amsgrad": True, "lr": 3e-3},
        ]
        self.optimizer = optim.AdamW(groups, weight_decay=0.1, **options)
        self.params = [param for group in self.optimizer.param_groups for param in group["params"]]
        for param in self.params:
            param.grad_dtype = None  # so that it takes any
        self.gradient_dtype = gradient_dtype
        self.done = 0

    def step(self):
        generator = torch.Generator().manual_seed(10_000 + self.done)
        scale = 10.0 ** (self.done % 7 - 4)
        for param in self.params:
            gradient = torch.randn(param.shape, generator=generator) * scale
            param.grad = gradient.to(self.gradient_dtype)
        self.optimizer.step()
        self.done += 1

    def run(self, steps):
        for _ in range(steps):
            self.step()
        return self


def follow(half, gradient_dtype, state_format, steps, every, only=None):
    """Step a run with 16-bit parameters beside one with float32 ones; compare."""
    ours = Run(half, half, gradient_dtype, only, state_format=state_format)
    wanted = Run(half, torch.float32, gradient_dtype, only, state_format=state_format)
    for step in range(steps):
        ours.step()
        wanted.step()
        if step < 3 or step % every == 0 or step == steps - 1:
            assert_same(of_masters(ours.optimizer), results_as_bits(wanted.optimizer), f"after {step + 1} steps")
    lost = [master != master.to(half).float() for master in (row["param"] for row in results(wanted.optimizer))]
    assert torch.cat([each.flatten() for each in lost]).float().mean() > 0.9  # the 16 bits alone would not do


def results_as_bits(optimizer):
    rows = results(optimizer)
    for row in rows:
        for key, value in row.items():
            if value.dtype in HALVES:
                row[key] = value.view(torch.int16)
    return rows


@pytest.mark.slow
@pytest.mark.parametrize("state_format", FORMATS)
@pytest.mark.parametrize("narrow", [False, True], ids=["float32 gradients", "16-bit gradients"])
@pytest.mark.parametrize("half", HALVES, ids=str)
def test_many_steps_are_those_of_float32_parameters(half, narrow, state_format):
    follow(half, half if narrow else torch.float32, state_format, 1050 if half == torch.bfloat16 else 350, 150)


@pytest.mark.slow
@pytest.mark.parametrize("half", HALVES, ids=str)
def test_many_steps_on_the_reference(half):
    with on("reference"):
        follow(half, torch.float32, "fp32", 1001 if half == torch.bfloat16 else 250, 200, SMALL)


@pytest.mark.parametrize("state_format", FORMATS)
@pytest.mark.parametrize("half", HALVES, ids=str)
def test_every_layout_on_the_reference(half, state_format):
    with on("reference"):
        follow(half, half, state_format, 8, 1)


def test_the_comparison_sees_a_lost_bit():
    ours = Run(torch.bfloat16, torch.bfloat16, torch.float32).run(2)
    wanted = Run(torch.bfloat16, torch.float32, torch.float32).run(2)
    next(iter(ours.optimizer.state.values()))["residual"].view(torch.int16)[3, 4] ^= 1
    with pytest.raises(AssertionError, match=r"param of parameter 0 .*\[244\] of 5120"):
        assert_same(of_masters(ours.optimizer), results_as_bits(wanted.optimizer))


@pytest.mark.parametrize("state_format", FORMATS)
@pytest.mark.parametrize("half", HALVES, ids=str)
def test_resumed_in_the_middle(half, state_format):
    """From the model's weights and state_dict, in a file; the engines take turns."""
    wanted = Run(half, torch.float32, half, state_format=state_format)
    first = Run(half, half, half, state_format=state_format).run(9)
    saved = io.BytesIO()
    torch.save([first.optimizer.state_dict(), [param.detach() for param in first.params]], saved)
    saved.seek(0)
    state, weights = torch.load(saved, weights_only=True)
    second = Run(half, half, half, state_format=state_format)
    second.done = 9
    with torch.no_grad():
        for param, value in zip(second.params, weights, strict=True):
            param.copy_(value)
    second.optimizer.load_state_dict(state)
    wanted.run(9)
    for step in range(9, 15):
        assert_same(of_masters(second.optimizer), results_as_bits(wanted.optimizer), f"after {step} steps")
        wanted.step()
        with on("reference" if step % 2 else "cpu"):
            second.step()


def test_state_made_early_or_late_and_late_gradients(engine_name):
    def run(early):
        param = Parameter(draw(0, (64, 80)).bfloat16())
        late = Parameter(draw(1, (9,)).bfloat16())
        optimizer = optim.AdamW([param, late], lr=0.01, state_format="8bit")
        if early:
            optimizer.init_state()
        for step in range(6):
            param.grad = draw(step, param.shape).bfloat16()
            late.grad = draw(step, late.shape).bfloat16() if step > 3 else None
            optimizer.step()
        return of_masters(optimizer)

    with on(engine_name):
        assert_same(run(True), run(False))


def test_a_master_beyond_the_range_of_float16_goes_on(engine_name):
    def run(dtype):
        param = Parameter(torch.tensor([65504.0, -65504.0, 1.0], dtype=dtype))
        param.grad_dtype = None
        optimizer = optim.AdamW([param], lr=10.0, weight_decay=0.0)
        infinite = 0
        for step in range(30):
            sign = -1.0 if step < 12 else 1.0
            param.grad = sign * torch.tensor([1.0, -1.0, 1.0])
            optimizer.step()
            infinite += int(param.isinf().sum())
        return optimizer, infinite

    with on(engine_name):
        (ours, infinite), (wanted, _) = run(torch.float16), run(torch.float32)
    assert infinite > 10
    assert_same(of_masters(ours), results(wanted))


def test_a_master_beyond_the_range_of_bfloat16_goes_on(engine_name):
    """Between the largest bfloat16, 3.39e38, and the largest float32, 3.40e38, the parameter is infinite."""

    def run(dtype):
        largest = torch.finfo(torch.bfloat16).max
        param = Parameter(torch.tensor([largest, -largest, 1.0], dtype=dtype))
        param.grad_dtype = None
        optimizer = optim.AdamW([param], lr=1e35, weight_decay=0.0)
        infinite = 0
        for step in range(30):
            param.grad = (-1.0 if step < 10 else 1.0) * torch.tensor([1.0, -1.0, 1.0])
            optimizer.step()
            infinite += int(param.isinf().sum())
        return optimizer, infinite

    with on(engine_name):
        (ours, infinite), (wanted, _) = run(torch.bfloat16), run(torch.float32)
    assert infinite > 10
    assert torch.cat([row["param"] for row in results(wanted)]).isfinite().all()
    assert_same(of_masters(ours), results(wanted))


# Without master weights


@pytest.mark.parametrize("state_format", FORMATS)
@pytest.mark.parametrize("half", HALVES, ids=str)
def test_without_master_weights_each_step_rounds_to_nearest_even(half, state_format, engine_name):
    options = {"state_format": state_format, "master_weights": False}
    with on(engine_name):
        ours = Run(half, half, torch.float32, **options)
        for step in range({"cpu": 40, "reference": 6}.get(engine_name, 2)):
            # One step in float32 from the rounded parameter and a copy of the state.
            wide = Run(half, torch.float32, torch.float32, **options)
            for param, own in zip(wide.params, ours.params, strict=True):
                param.data.copy_(own)
            wide.optimizer.load_state_dict(ours.optimizer.state_dict())
            wide.done = ours.done
            wide.step()
            ours.step()
            wanted = results(wide.optimizer)
            for row in wanted:
                row["param"] = row["param"].to(half)
                assert not row.keys() & {"residual", "master"}
            for row in wanted:
                row.update({key: x.view(torch.int16) for key, x in row.items() if x.dtype in HALVES})
            assert_same(results_as_bits(ours.optimizer), wanted, f"step {step}")


def test_without_master_weights_ties_go_to_even(engine_name):
    """With lr 1 and β of 0 a step subtracts the gradient's sign: from 2^k, where that is half of a last place."""
    starts = torch.tensor([256.0, 258.0, 260.0, -256.0, -258.0])
    for half, start in ((torch.bfloat16, starts), (torch.float16, starts * 8)):
        param = Parameter(start.to(half))
        optimizer = optim.AdamW([param], lr=1.0, betas=(0.0, 0.0), eps=0.0, weight_decay=0.0, master_weights=False)
        param.grad = -torch.ones_like(param) * start.sign().to(half)
        with on(engine_name):
            optimizer.step()
        assert torch.equal(start.to(half), start.to(half).float().to(half))
        exact = start + start.sign()
        lower, upper = start, start + 2 * start.sign() * (start.abs() / 256).log2().floor().exp2()
        assert torch.equal(param.float(), exact.to(half).float())
        if half == torch.bfloat16:
            assert torch.equal((exact - lower).abs(), (upper - exact).abs())  # ties indeed
            assert torch.equal(param.float(), torch.tensor([256.0, 260.0, 260.0, -256.0, -260.0]))


@pytest.mark.parametrize("half", HALVES, ids=str)
def test_without_master_weights_the_first_step_is_torchs_to_one_rounding(half, engine_name):
    """Torch's fused step computes in float32 too, but rounds the moments: from the second step on it differs."""
    twins = [Parameter(draw(0, (50, 40)).to(half)) for _ in range(2)]
    options = {"lr": 1e-2, "weight_decay": 0.1}
    theirs = torch.optim.AdamW(twins[:1], fused=True, **options)
    ours = optim.AdamW(twins[1:], master_weights=False, **options)
    for param in twins:
        param.grad = draw(1, param.shape).to(half)
    theirs.step()
    with on(engine_name):
        ours.step()
    a, b = (param.detach().view(torch.int16).int() for param in twins)
    assert (a - b).abs().max() <= 1
    assert (a == b).float().mean() > 0.99


# The classic failures


def naive(**options):
    """How torch trains a bfloat16 parameter: in each of its three ways."""
    for way in ({"foreach": False}, {"foreach": True}, {"fused": True}):
        param = Parameter(torch.ones(4, dtype=torch.bfloat16))
        yield torch.optim.AdamW([param], **way, **options), param


@pytest.mark.parametrize("engine_name", ["cpu", "reference"])  # a thousand steps; "cuda" has the same bits
@pytest.mark.parametrize("half", HALVES, ids=str)
def test_weights_decay_as_exact_arithmetic_says(half, engine_name):
    options = {"lr": 1e-4, "weight_decay": 0.1}
    param = Parameter(torch.ones(4, dtype=half))
    optimizer = optim.AdamW([param], **options)
    with on(engine_name):
        for _ in range(1000):
            param.grad = torch.zeros_like(param)
            optimizer.step()
    exact = float((1 - fractions.Fraction(1, 100_000)) ** 1000)
    (row,) = of_masters(optimizer)
    assert ((row["param"].double() / exact - 1).abs() < 1e-6).all()
    assert torch.equal(param, torch.full((4,), exact).to(half))
    assert param[0] < 1
    if half == torch.bfloat16 and engine_name == "cpu":  # what this guards against
        for theirs, stuck in naive(**options):
            for _ in range(1000):
                stuck.grad = torch.zeros_like(stuck)
                theirs.step()
            assert torch.equal(stuck, torch.ones_like(stuck))


@pytest.mark.parametrize("engine_name", ["cpu", "reference"])  # a thousand steps; "cuda" has the same bits
@pytest.mark.parametrize("half", HALVES, ids=str)
def test_updates_far_below_half_a_last_place_accumulate(half, engine_name):
    """A thousand steps of 1e-5 each, against half a last place of 2e-3 (2e-4 in float16) below 1."""
    options = {"lr": 1e-5, "weight_decay": 0.0}
    param = Parameter(torch.ones(4, dtype=half))
    optimizer = optim.AdamW([param], **options)
    with on(engine_name):
        for _ in range(1000):
            param.grad = torch.ones_like(param)
            optimizer.step()
    (row,) = of_masters(optimizer)
    torch.testing.assert_close(row["param"], torch.full((4,), 0.99), rtol=2e-5, atol=0)
    assert (param < 0.991).all()
    if half == torch.bfloat16 and engine_name == "cpu":
        for theirs, stuck in naive(**options):
            for _ in range(1000):
                stuck.grad = torch.ones_like(stuck)
                theirs.step()
            assert torch.equal(stuck, torch.ones_like(stuck))


def test_without_master_weights_small_updates_are_lost_as_in_torch(engine_name):
    """What ``master_weights=False`` gives up, said in the documentation."""
    param = Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = optim.AdamW([param], lr=1e-4, weight_decay=0.1, master_weights=False)
    with on(engine_name):
        for _ in range(20):
            param.grad = torch.ones_like(param)
            optimizer.step()
    assert torch.equal(param, torch.ones_like(param))


# How it is kept


def test_what_is_kept_beside_a_16_bit_parameter():
    for half, kept in itertools.product(HALVES, [True, False]):
        param = Parameter(torch.ones(3, 4, dtype=half).t())
        optimizer = optim.AdamW([param], master_weights=kept)
        optimizer.init_state()
        entry = optimizer.state[param]
        wanted = {"step", "exp_avg", "exp_avg_sq"} | ({SLOT[half]} if kept else set())
        assert entry.keys() == wanted
        assert entry["exp_avg"].dtype == entry["exp_avg_sq"].dtype == torch.float32
        if kept:
            slot = entry[SLOT[half]]
            assert slot.dtype == (torch.bfloat16 if half == torch.bfloat16 else torch.float32)
            assert (slot.shape, slot.stride()) == (param.shape, param.stride())


def test_master_weights_is_an_option_of_groups(engine_name):
    a, b = (Parameter(torch.ones(4, dtype=torch.bfloat16)) for _ in range(2))
    optimizer = optim.AdamW([{"params": [a], "master_weights": False}, {"params": [b]}], lr=1e-4, weight_decay=0.1)
    with on(engine_name):
        for _ in range(250):
            a.grad = b.grad = torch.zeros_like(a)
            optimizer.step()
    assert torch.equal(a, torch.ones_like(a))
    assert (b < 1).all()
    assert "residual" not in optimizer.state[a]


@pytest.mark.parametrize("state_format", FORMATS)
@pytest.mark.parametrize("half", HALVES, ids=str)
def test_a_model_cast_after_its_first_steps_goes_on_with_master_weights(half, state_format, engine_name):
    """`model.bfloat16()` under an optimizer with state: the rounded parameters count, from then on no bit is lost."""
    twins = [nn.Linear(80, 64), nn.Linear(80, 64)]
    twins[1].load_state_dict(twins[0].state_dict())
    optimizers = [optim.AdamW(model.parameters(), lr=1e-4, state_format=state_format) for model in twins]

    def step(number):
        for model, optimizer in zip(twins, optimizers, strict=True):
            for index, param in enumerate(model.parameters()):
                param.grad = draw(number + index, param.shape).to(half).to(param.dtype)
            optimizer.step()

    with on(engine_name):
        step(0)
        step(1)
        twins[0].to(half)
        for param in twins[1].parameters():
            param.data = param.data.to(half).float()
        for number in range(2, 6):
            step(number)
    assert SLOT[half] in optimizers[0].state[twins[0].weight]
    assert_same(of_masters(optimizers[0]), results_as_bits(optimizers[1]))
