"""Guards that checkpoints move between state formats.

Whoever changes the format of a run in its middle must keep moments and step counts: exactly where the format is the
same, to the nearest code where it is another. What does not fit is refused with nothing changed, and nothing loaded
shares memory with its source. torch's optimizer is in test_conversions_torch.py, files that were written once in
test_golden.py.
"""

import copy
import itertools

import pytest
import torch
from torch.nn import Parameter

import lucid.optim as optim
from bits import assert_same, draw, on, peek, snapshot, tensors_in, through_a_file
from converted import (
    CODED,
    FORMATS,
    HALVES,
    KINDS,
    MOMENTS,
    NAMES,
    bits_of,
    encoded,
    joined,
    keys_of,
    made,
    moment_keys,
    moments,
    raw,
    state_of,
    train,
    trained,
    values,
)
from lucid.engine import codecs

# From any of ours to any of ours


@pytest.mark.parametrize("amsgrad", [False, True], ids=["", "amsgrad"])
@pytest.mark.parametrize("to", KINDS, ids=NAMES)
@pytest.mark.parametrize("source", KINDS, ids=NAMES)
def test_every_format_loads_into_every_other(source, to, amsgrad):
    theirs, their_params = trained(source[0], state_format=source[1], amsgrad=amsgrad, lr=0.02)
    saved = through_a_file(theirs.state_dict())
    ours, params = made(to[0], state_format=to[1], lr=0.5, seed=3)
    ours.load_state_dict(saved)
    assert ours.param_groups[0]["state_format"] == to[1]
    assert (ours.param_groups[0]["lr"], ours.param_groups[0]["seed"]) == (0.02, 0)
    assert ours.param_groups[0]["amsgrad"] is amsgrad
    for name, param in params.items():
        entry, before = peek(ours)[param], peek(theirs)[their_params[name]]
        assert entry.keys() == keys_of(to[0], to[1], name, amsgrad), name  # and none lingers
        assert {key: x.dtype for key, x in entry.items()} == {
            key: x.dtype for key, x in state_of(param, to[1], amsgrad).items()
        }
        assert entry["step"] == before["step"] == 3
        if moment_keys(entry) == moment_keys(before):  # exactly
            for key in (CODED | MOMENTS) & entry.keys():
                wanted = before[key].to(entry[key].dtype)
                assert torch.equal(raw(entry)[key], raw({key: wanted})[key]), key
        else:
            for key, value in encoded(*moments(before), entry).items():
                assert torch.equal(raw(entry)[key], raw({key: value})[key]), (name, key)
        if amsgrad:
            assert torch.equal(entry["max_exp_avg_sq"], before["max_exp_avg_sq"])
        for key in CODED & entry.keys():
            assert entry[key].is_contiguous()
        if "stream" in before and "stream" in entry:
            assert torch.equal(entry["stream"], before["stream"])
    # It goes on, on both engines to the same bits.
    twin = copy.deepcopy((ours, params))
    train(ours, params, 3, 5)
    with on("reference"):
        train(*twin, 3, 5)
    assert_same(bits_of(ours), bits_of(twin[0]))
    assert all(param.isfinite().all() for param in params.values())


@pytest.mark.parametrize("amsgrad", [False, True], ids=["", "amsgrad"])
@pytest.mark.parametrize(("dtype", "state_format"), KINDS, ids=NAMES)
def test_the_same_format_is_loaded_to_the_bit(dtype, state_format, amsgrad):
    options = {"state_format": state_format, "amsgrad": amsgrad}
    theirs, their_params = trained(dtype, **options)
    ours, params = made(dtype, **options, seed=9)
    for name, param in params.items():
        param.data.copy_(their_params[name].detach())
    ours.load_state_dict(through_a_file(theirs.state_dict()))
    assert_same(bits_of(ours), bits_of(theirs))
    assert_same(bits_of(train(ours, params, 3, 5)[0]), bits_of(train(theirs, their_params, 3, 5)[0]))


@pytest.mark.parametrize("there", FORMATS)
@pytest.mark.parametrize("back", FORMATS)
def test_there_and_back_loses_what_the_narrower_loses_and_no_more(there, back):
    theirs, params = trained(state_format=back)
    via, _ = made(state_format=there)
    via.load_state_dict(theirs.state_dict())
    ours, own = made(state_format=back)
    ours.load_state_dict(via.state_dict())
    third, third_params = made(state_format=there)  # and once more: nothing changes any more
    third.load_state_dict(ours.state_dict())
    for name in params:
        before, after = moments(peek(theirs)[params[name]]), moments(peek(ours)[own[name]])
        for a, b in zip(before, after, strict=True):
            if there == "fp32" or back == there:
                assert torch.equal(a, b)
            elif a.numel() > 1:
                assert (a - b).norm() <= 0.03 * a.norm()
        again = moments(peek(third)[third_params[name]])
        if back == "fp32":
            for a, b in zip(after, again, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_conversion_is_to_the_nearest_of_all_codes():
    """Sought among all 256 values of a block, apart from the code under test."""
    theirs, params = trained()
    ours, own = made(state_format="8bit")
    ours.load_state_dict(theirs.state_dict())
    every = torch.arange(256, dtype=torch.uint8)
    for name in ("matrix", "transposed"):
        before, entry = peek(theirs)[params[name]], peek(ours)[own[name]]
        for key, decode in (("exp_avg", codecs.decode_signed), ("exp_avg_sq", codecs.decode_unsigned)):
            levels = decode(every.view(1, 256), torch.ones(1, 2)).double().flatten()
            for row in range(0, 64, 7):
                for block in range(entry[f"{key}_scale"].shape[1]):
                    where = slice(128 * block, 128 * block + 128)
                    scale = entry[f"{key}_scale"][row, block].double()
                    wanted = before[key][row, where].double()
                    found = levels[entry[f"{key}_code"][row, where].int()] * scale
                    best = (wanted.unsqueeze(1) - levels * scale).abs().amin(1)
                    # The scale's own rounding moves the halfway points a little.
                    assert ((wanted - found).abs() <= best + 1e-6 * wanted.abs().max()).all()
                    assert (found.abs().max() / wanted.abs().max() - 1).abs() < 1e-6
                    assert (levels[-1] if key == "exp_avg_sq" else levels[127]) * scale == found.abs().max()
    bf16, own = made(state_format="bf16")
    bf16.load_state_dict(theirs.state_dict())
    for name, param in own.items():
        for key in MOMENTS:
            assert torch.equal(peek(bf16)[param][key], peek(theirs)[params[name]][key].bfloat16())


def test_wider_moments_come_from_narrow_ones():
    """float64 and complex parameters have full moments in every format; float64 takes those of float32."""
    theirs, params = trained(state_format="8bit")
    ours, own = made(torch.float64, state_format="8bit")
    ours.load_state_dict(theirs.state_dict())
    for name, param in own.items():
        for key, value in zip(("exp_avg", "exp_avg_sq"), moments(peek(theirs)[params[name]]), strict=True):
            assert peek(ours)[param][key].dtype == torch.float64
            assert torch.equal(peek(ours)[param][key], value.double())
    train(ours, own, 3, 4)
    back, own = made(state_format="8bit")
    back.load_state_dict(ours.state_dict())
    train(back, own, 4, 5)


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("source", FORMATS)
def test_names_are_matched_across_formats(source, to):
    theirs, params = trained(torch.bfloat16, state_format=source)
    order = ["vector", "empty", "transposed", "0-dim", "small", "matrix"]
    own = {name: Parameter(value) for name, value in values(torch.bfloat16).items()}
    ours = optim.AdamW([(name, own[name]) for name in order], state_format=to)
    ours.load_state_dict(theirs.state_dict())
    straight, straight_params = made(torch.bfloat16, state_format=to)
    straight.load_state_dict(theirs.state_dict())
    for name in params:
        assert_same([raw(peek(ours)[own[name]])], [raw(peek(straight)[straight_params[name]])], name)


@pytest.mark.parametrize(("dtype", "state_format"), KINDS, ids=NAMES)
def test_nothing_loaded_is_shared_with_its_source(dtype, state_format):
    for to_dtype, to_format in [
        (dtype, state_format),
        (torch.bfloat16, "8bit"),
        (torch.float16, "bf16"),
        (dtype, "fp32"),
    ]:
        theirs, _ = trained(dtype, state_format=state_format, amsgrad=True)
        saved = theirs.state_dict()
        ours, _ = made(to_dtype, state_format=to_format)
        ours.load_state_dict(saved)
        before = copy.deepcopy(bits_of(ours))
        given_tensors = [x for x in tensors_in(saved) if x.numel()]
        addresses = {x.untyped_storage().data_ptr() for x in given_tensors}
        assert not addresses & {x.untyped_storage().data_ptr() for x in tensors_in(dict(peek(ours))) if x.numel()}
        for x in given_tensors:
            x.fill_(77)
        assert_same(bits_of(ours), before)
        mine = ours.torch_state_dict()
        for x in tensors_in(mine):
            x.fill_(55)
        assert_same(bits_of(ours), before)


@pytest.mark.parametrize("state_format", ["bf16", "8bit"])
def test_the_saved_stream_counts_and_not_that_of_another_name(state_format):
    """So a run whose parameters are called otherwise, or not at all, goes on to the same bits."""
    theirs, params = trained(state_format=state_format, seed=8)
    own = [Parameter(param.detach().clone()) for param in params.values()]
    ours = optim.AdamW(own, state_format=state_format)
    ours.load_state_dict(through_a_file(theirs.state_dict()))
    train(theirs, params, 3, 6)
    train(ours, dict(enumerate(own)), 3, 6)
    assert_same(bits_of(ours), bits_of(theirs))
    fresh, other = made(state_format=state_format, seed=8)
    unnamed = optim.AdamW(list(other.values()), state_format=state_format, seed=8)
    for optimizer in (fresh, unnamed):
        optimizer.init_state()
    streams = [optimizer.state[other["matrix"]]["stream"] for optimizer in (fresh, unnamed)]
    assert streams[0] != streams[1]  # so there was something to be seen


def test_unknown_keys_are_kept():
    theirs, _ = trained(state_format="8bit")
    saved = theirs.state_dict()
    saved["state"][0] = dict(saved["state"][0], mine=torch.arange(3), exp_avg_note="text")
    saved["state"][99] = {"of": "no parameter"}
    saved["param_groups"][0]["initial_lr"] = 0.25
    for to in FORMATS:
        ours, params = made(state_format=to)
        ours.load_state_dict(saved)
        assert ours.state[params["matrix"]]["exp_avg_note"] == "text"
        assert torch.equal(ours.state[params["matrix"]]["mine"], torch.arange(3))
        assert ours.state[99] == {"of": "no parameter"}
        assert ours.param_groups[0]["initial_lr"] == 0.25


def test_options_of_how_state_is_kept_stay_as_constructed():
    theirs, _ = trained(torch.bfloat16, state_format="8bit", seed=5)
    own = {name: Parameter(value) for name, value in values(torch.bfloat16).items()}
    names = list(own)
    groups = [{"params": [(n, own[n]) for n in names], "state_format": "bf16", "master_weights": False}]
    ours = optim.AdamW(groups, state_format="8bit", seed=6)
    ours.load_state_dict(theirs.state_dict())
    (group,) = ours.param_groups
    assert (group["state_format"], group["master_weights"], group["seed"]) == ("bf16", False, 5)
    assert all("residual" not in entry for entry in ours.state.values())
    assert all(entry["exp_avg"].dtype == torch.bfloat16 for entry in ours.state.values())
    # The stream of a parameter that was saved with none comes from the seed that was saved.
    streams = {}
    for state_format in ("fp32", "8bit"):
        source, _ = trained(state_format=state_format, seed=5)
        target, params = made(state_format="8bit", seed=6)
        target.load_state_dict(source.state_dict())
        streams[state_format] = int(target.state[params["matrix"]]["stream"])
    assert streams["fp32"] == streams["8bit"]


# Master weights


@pytest.mark.parametrize("state_format", FORMATS)
def test_masters_become_residuals_and_back(state_format):
    """A model that is cast from float16 to bfloat16: its float32 masters are what goes on."""
    theirs, params = trained(torch.float16, state_format=state_format)
    ours, own = made(torch.bfloat16, state_format=state_format)
    masters = {name: peek(theirs)[param]["master"] for name, param in params.items()}
    for name, param in own.items():
        bits = masters[name].contiguous().view(torch.int32)
        param.data.copy_(((bits + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16))
    ours.load_state_dict(theirs.state_dict())
    for name, param in own.items():
        assert torch.equal(joined(param.detach(), peek(ours)[param]["residual"]), masters[name])
    train(ours, own, 3, 5)

    half, half_params = made(torch.float16, state_format=state_format)
    for name, param in half_params.items():
        param.data.copy_(own[name].detach())
    half.load_state_dict(ours.state_dict())
    before = {name: param.detach().float() for name, param in half_params.items()}
    half.param_groups[0]["lr"] = 0.0
    train(half, half_params, 5, 6)
    for name, param in half_params.items():  # what a residual held is less than half of a last place
        assert torch.equal(peek(half)[param]["master"], before[name])


def test_parameters_without_a_saved_master_count_alone():
    for dtype, state_format in itertools.product(HALVES, FORMATS):
        theirs, params = trained(torch.float32, state_format=state_format)
        ours, own = made(dtype, state_format=state_format)
        for name, param in own.items():
            param.data.copy_(params[name].detach())
        ours.load_state_dict(theirs.state_dict())
        wide, wide_params = made(state_format=state_format)
        for name, param in wide_params.items():
            param.data.copy_(own[name].detach())
        wide.load_state_dict(theirs.state_dict())
        for step in range(3, 6):
            for index, name in enumerate(own):
                gradient = draw(1000 + 10 * step + index, own[name].shape).to(dtype)
                own[name].grad, wide_params[name].grad = gradient, gradient.float()
            ours.step()
            wide.step()
        for name, param in own.items():
            entry = peek(ours)[param]
            master = entry["master"] if dtype == torch.float16 else joined(param.detach(), entry["residual"])
            assert torch.equal(master, wide_params[name].detach()), name


# What does not fit


def changed(key, value):
    def change(entry):
        entry[key] = value(entry[key]) if callable(value) else value

    return change


def without(key):
    def change(entry):
        del entry[key]

    return change


BROKEN = {
    "codes float": ("8bit", changed("exp_avg_code", lambda x: x.float())),
    "codes int8": ("8bit", changed("exp_avg_sq_code", lambda x: x.to(torch.int8))),
    "codes of another shape": ("8bit", changed("exp_avg_code", lambda x: x[:, :-1])),
    "codes transposed": ("8bit", changed("exp_avg_code", lambda x: x.t())),
    "codes missing": ("8bit", without("exp_avg_code")),
    "codes of v missing": ("8bit", without("exp_avg_sq_code")),
    "codes None": ("8bit", changed("exp_avg_sq_code", None)),
    "codes on meta": ("8bit", changed("exp_avg_code", lambda x: x.to("meta"))),
    "scale missing": ("8bit", without("exp_avg_scale")),
    "scale of v missing": ("8bit", without("exp_avg_sq_scale")),
    "scale too short": ("8bit", changed("exp_avg_scale", lambda x: x[1:])),
    "scale flat": ("8bit", changed("exp_avg_sq_scale", lambda x: x.flatten())),
    "scale int": ("8bit", changed("exp_avg_scale", lambda x: x.int())),
    "scale complex": ("8bit", changed("exp_avg_scale", lambda x: x.to(torch.complex64))),
    "scale one number": ("8bit", changed("exp_avg_scale", 1.0)),
    "step missing": ("8bit", without("step")),
    "step below 0": ("8bit", changed("step", -1.0)),
    "moments missing": ("bf16", without("exp_avg")),
    "moments int16": ("bf16", changed("exp_avg", lambda x: x.view(torch.int16))),
    "moments of another shape": ("bf16", changed("exp_avg_sq", lambda x: x[1:])),
    "moments complex": ("fp32", changed("exp_avg", lambda x: x.to(torch.complex64))),
    "codes under the moment's key": ("fp32", changed("exp_avg", lambda x: x.to(torch.uint8))),
    "residual float32": ("8bit", changed("residual", lambda x: x.float())),
    "residual int16": ("8bit", changed("residual", lambda x: x.view(torch.int16))),
    "residual of another shape": ("8bit", changed("residual", lambda x: x.flatten())),
    "residual a number": ("fp32", changed("residual", 3.0)),
    "maximum of another shape": ("8bit", changed("max_exp_avg_sq", lambda x: x[0])),
    "stream float": ("8bit", changed("stream", lambda x: x.float())),
    "stream of two": ("8bit", changed("stream", lambda x: torch.stack([x, x]))),
    "stream an int": ("bf16", changed("stream", 7)),
}


@pytest.mark.parametrize("fresh", [True, False], ids=["fresh", "trained"])
@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize(("source", "change"), BROKEN.values(), ids=BROKEN.keys())
def test_what_does_not_fit_raises_and_changes_nothing(source, change, to, fresh):
    theirs, _ = trained(torch.bfloat16, state_format=source, amsgrad=True)
    saved = copy.deepcopy(theirs.state_dict())
    ours, params = trained(torch.bfloat16, state_format=to, steps=0 if fresh else 2)
    change(saved["state"][1])
    if change in (BROKEN["stream float"][1], BROKEN["stream of two"][1], BROKEN["stream an int"][1]) and to == "fp32":
        ours.load_state_dict(saved)  # fp32 draws nothing, and leaves it behind
        assert all("stream" not in entry for entry in ours.state.values())
        return
    before = snapshot(ours)
    with pytest.raises((TypeError, ValueError), match="of parameter 'transposed'") as caught:
        ours.load_state_dict(saved)
    assert snapshot(ours) == before, caught.value
    assert "\n" not in str(caught.value)
    train(ours, params, 3, 4)


def test_other_shapes_are_refused_in_every_format():
    for source, to in itertools.product(FORMATS, FORMATS):
        theirs, _ = trained(state_format=source)
        other = values() | {"transposed": draw(1, (64, 149))}
        ours = optim.AdamW([(name, Parameter(value)) for name, value in other.items()], state_format=to)
        before = snapshot(ours)
        with pytest.raises(ValueError, match=r"of parameter 'transposed' has shape .*expected \(64, 149\)"):
            ours.load_state_dict(theirs.state_dict())
        assert snapshot(ours) == before
