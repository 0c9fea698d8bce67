"""Guards that whoever overwrites a 16-bit parameter gets the value that was written, whatever is kept beside it.

A load, a mask, a rescaling: the parameter counts where it is not its master's, and training goes on from there.
"""

import pytest
import torch
from torch import nn
from torch.nn import Parameter

import lucid.optim as optim
from bits import draw, on, peek
from masters import HALVES, SLOT, joined, of_masters


def new_values(half):
    return draw(77, (40, 32)).to(half)


@torch.no_grad()
def load_zeros(param):
    holder = nn.ParameterList([param])
    holder.load_state_dict({"0": torch.zeros_like(param)})


@torch.no_grad()
def masked(param):
    param.mul_((torch.arange(param.numel()).view(param.shape) % 3 != 0).to(param.dtype))


@torch.no_grad()
def scaled(param):
    param.mul_(0.5)


def replaced(param):
    param.data = new_values(param.dtype)


def replaced_in_another_layout(param):
    param.data = new_values(param.dtype).t().contiguous().t()


@torch.no_grad()
def filled(value, param):
    param.fill_(value)


OVERWRITTEN = {
    "data.copy_": lambda param: param.data.copy_(new_values(param.dtype)),
    "zero_": lambda param: param.detach().zero_(),
    "mul_(mask)": masked,
    "mul_(0.5)": scaled,
    "loaded zeros": load_zeros,
    "data = new": replaced,
    "data = new, in another layout": replaced_in_another_layout,
    "-0": lambda param: filled(-0.0, param),
    "least subnormal": lambda param: param.detach().view(torch.int16).fill_(1),
    "negative subnormal": lambda param: param.detach().view(torch.int16).fill_(-32767),
    "largest": lambda param: filled(torch.finfo(param.dtype).max, param),
    "1": lambda param: filled(1.0, param),
    "clamped": lambda param: param.detach().clamp_(-0.1, 0.1),
}


def trained(half, steps=5, **options):
    """A parameter whose residuals take all signs and sizes."""
    param = Parameter(draw(0, (40, 32)).to(half))
    optimizer = optim.AdamW([param], lr=1e-2, **options)
    for step in range(steps):
        param.grad = draw(step, param.shape).to(half)
        optimizer.step()
    if half == torch.bfloat16:
        extremes = torch.tensor([-32768, -32767, -129, -128, -127, -1, 0, 1, 127, 128, 129, 32767], dtype=torch.int16)
        optimizer.state[param]["residual"].view(torch.int16).view(-1)[: 12 * 50].copy_(extremes.repeat(50))
    return optimizer, param


@pytest.mark.parametrize("overwrite", OVERWRITTEN.values(), ids=OVERWRITTEN.keys())
@pytest.mark.parametrize("half", HALVES, ids=str)
def test_a_value_that_overwrites_counts(half, overwrite, engine_name):
    with on(engine_name):
        optimizer, param = trained(half)
        before = param.detach().clone()
        overwrite(param)
        given = param.detach().clone()
        optimizer.param_groups[0]["lr"] = 0.0
        param.grad = torch.ones_like(param)
        optimizer.step()
    assert torch.equal(param, given)
    master = peek(optimizer)[param][SLOT[half]]
    if half == torch.float16:
        changed = given.view(torch.int16) != before.view(torch.int16)
        assert torch.equal(master[changed], given[changed].float())
        assert changed.float().mean() > 0.3
    else:
        master = joined(param.detach(), master)
        assert not master.isnan().any()
        off = master.view(torch.int32).long() - (given.view(torch.int16).int() << 16).long()
        off[given == 0] = master[given == 0].abs().view(torch.int32).long()
        assert off.abs().max() <= 0x8000  # in units of float32's last place: half of bfloat16's


@pytest.mark.parametrize("overwrite", OVERWRITTEN.values(), ids=OVERWRITTEN.keys())
@pytest.mark.parametrize("half", HALVES, ids=str)
def test_after_overwriting_training_goes_on_from_there(half, overwrite, engine_name):
    """A float32 run from the new values, and half of a last place that the master of a bfloat16 may be off."""
    with on(engine_name):
        optimizer, param = trained(half)
        before = param.detach().float()
        overwrite(param)
        given = param.detach().float()
        wide = Parameter(given.clone())
        twin = optim.AdamW([wide])
        twin.load_state_dict(optimizer.torch_state_dict())
        for step in range(5, 9):
            param.grad = draw(step, param.shape).to(half)
            wide.grad = param.grad.float()
            optimizer.step()
            twin.step()
    master = of_masters(optimizer)[0]["param"].double()
    assert master.isfinite().all()
    exponent = given.abs().clamp_min(torch.finfo(half).smallest_normal).log2().floor()
    half_a_last_place = torch.exp2(exponent.double()) * torch.finfo(half).eps / 2
    assert ((wide.detach().double() - master).abs() <= half_a_last_place * 1.001 + 1e-6).all()
    if half == torch.float16:  # exactly, but where the new value is what the master rounded to
        assert torch.equal(wide.detach()[given != before], master.float()[given != before])
    assert ((master - given).abs() > 1e-3).float().mean() > 0.9 or given.abs().max() > 1e4


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("half", HALVES, ids=str)
def test_infinities_that_overwrite(half, sign, engine_name):
    """Arithmetic makes NaN of an infinity (0·inf); a residual left over must not make one before that.

    A negative residual turns it into a finite number above bfloat16's largest, less than half of a last place off.
    """
    with on(engine_name):
        optimizer, param = trained(half)
        residual = None if half == torch.float16 else peek(optimizer)[param]["residual"].view(torch.int16).clone()
        filled(sign * float("inf"), param)
        optimizer.param_groups[0]["lr"] = 0.0
        param.grad = torch.zeros_like(param)
        optimizer.step()
    if half == torch.float16:
        assert param.isnan().all()  # as a float32 parameter of infinity
        return
    finite = residual < 0
    assert finite.any()
    assert (param[finite] == sign * float("inf")).all()
    assert param[~finite].isnan().all()
    rest = peek(optimizer)[param]["residual"].view(torch.int16)
    assert torch.equal(rest[finite], residual[finite])
    assert not rest[~finite].any()  # a NaN has none


def test_nan_parameters_stay_nan_and_their_neighbours_do_not_care(engine_name):
    with on(engine_name):
        for half in HALVES:
            optimizer, param = trained(half)
            twin, other = trained(half)
            with torch.no_grad():
                param[3, 4] = float("nan")
            for each, own in ((optimizer, param), (twin, other)):
                own.grad = torch.ones_like(own)
                each.step()
                each.step()
            assert param.isnan().nonzero().tolist() == [[3, 4]]
            with torch.no_grad():
                param[3, 4] = other[3, 4]
            assert torch.equal(param, other)
            # And when someone mends it, it trains again.
            optimizer.step()
            assert param.isfinite().all()


def test_the_residual_of_a_parameter_without_gradient_is_left_alone(engine_name):
    with on(engine_name):
        optimizer, param = trained(torch.bfloat16)
        other = Parameter(torch.ones(3))
        optimizer.add_param_group({"params": [other]})
        before = optimizer.state[param]["residual"].view(torch.int16).clone()
        param.grad, other.grad = None, torch.ones(3)
        optimizer.step()
    assert torch.equal(optimizer.state[param]["residual"].view(torch.int16), before)
