"""Guards that checkpoints move between state formats, and to and from `torch.optim.AdamW`.

Whoever changes the format of a run in its middle, or comes from torch or goes back, must keep moments and step
counts: exactly where the format is the same, to the nearest code where it is another. What does not fit is refused
with nothing changed, nothing loaded shares memory with its source, and a file written once loads for ever.
"""

import copy
import itertools
import math

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint import state_dict as dcp
from torch.nn import Parameter

import lucid.optim as optim
from bits import assert_same, draw, on, peek, results, snapshot, tensors_in, through_a_file
from golden import make as golden
from lucid.engine import codecs

FORMATS = ["fp32", "bf16", "8bit"]
HALVES = (torch.bfloat16, torch.float16)
DTYPES = [torch.float32, *HALVES]
KINDS = list(itertools.product(DTYPES, FORMATS))
NAMES = [f"{str(dtype)[6:]}-{state_format}" for dtype, state_format in KINDS]
MOMENTS = {"exp_avg", "exp_avg_sq"}
CODED = {"exp_avg_code", "exp_avg_scale", "exp_avg_sq_code", "exp_avg_sq_scale"}


@pytest.fixture(autouse=True)
def one_thread(torch_settings):
    """Threads of torch's wait for each other where the machine is busy."""
    torch.set_num_threads(1)


def values(dtype=torch.float32):
    """Two matrices that are quantized, one of them in another order of memory, and what is not."""
    return {
        "matrix": draw(0, (64, 80)).to(dtype),
        "transposed": draw(1, (150, 64)).to(dtype).t(),
        "small": draw(2, (5, 7)).to(dtype).t(),
        "vector": draw(3, (300,)).to(dtype),
        "0-dim": draw(4, ()).to(dtype),
        "empty": draw(5, (0, 3)).to(dtype),
    }


def made(dtype=torch.float32, make=optim.AdamW, **options):
    params = {name: Parameter(value) for name, value in values(dtype).items()}
    return make(list(params.items()), **{"lr": 0.01} | options), params


def train(optimizer, params, start, stop):
    for step in range(start, stop):
        for index, param in enumerate(params.values()):
            param.grad = draw(1000 + 10 * step + index, param.shape).to(param.dtype) * 10.0 ** (step % 4 - 2)
        optimizer.step()
    return optimizer, params


def trained(dtype=torch.float32, make=optim.AdamW, steps=3, **options):
    return train(*made(dtype, make, **options), 0, steps)


def raw(entry):
    """A state's tensors with 16-bit numbers as bits, among them residuals, whose bits are no numbers."""
    return {key: x.detach().view(torch.int16) if x.dtype in HALVES else x.detach() for key, x in entry.items()}


def bits_of(optimizer):
    return [raw(row) for row in results(optimizer)]


def moments(entry):
    """Both moments of a state as float32."""
    if "exp_avg_code" in entry:
        return (
            codecs.decode_signed(entry["exp_avg_code"], entry["exp_avg_scale"]),
            codecs.decode_unsigned(entry["exp_avg_sq_code"], entry["exp_avg_sq_scale"]),
        )
    return entry["exp_avg"].float(), entry["exp_avg_sq"].float()


def encoded(m, v, own):
    """What the two are in the format of the state `own`, rounded to the nearest."""
    if "exp_avg_code" in own:
        (m_code, m_scale), (v_code, v_scale) = codecs.encode_signed(m), codecs.encode_unsigned(v)
        return {
            "exp_avg_code": m_code,
            "exp_avg_scale": m_scale,
            "exp_avg_sq_code": v_code,
            "exp_avg_sq_scale": v_scale,
        }
    return {"exp_avg": m.to(own["exp_avg"].dtype), "exp_avg_sq": v.to(own["exp_avg_sq"].dtype)}


def keys_of(dtype, state_format, name, amsgrad):
    quantized = state_format == "8bit" and name in ("matrix", "transposed")
    keys = {"step"} | (CODED if quantized else MOMENTS) | ({"max_exp_avg_sq"} if amsgrad else set())
    keys |= {"stream"} if quantized or state_format == "bf16" else set()
    return keys | {torch.bfloat16: {"residual"}, torch.float16: {"master"}}.get(dtype, set())


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


def moment_keys(entry):
    return CODED & entry.keys() or {(key, entry[key].dtype) for key in MOMENTS}


def state_of(param, state_format, amsgrad):
    optimizer = optim.AdamW([param], state_format=state_format, amsgrad=amsgrad)
    optimizer.init_state()
    return optimizer.state[param]


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


def joined(param, residual):
    return ((param.view(torch.int16).int() << 16) + residual.view(torch.int16).int()).view(torch.float32)


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


# To and from torch.optim.AdamW

WAYS = [{}, {"foreach": True}, {"fused": True}]


def of_torch(params, **options):
    return torch.optim.AdamW(params, **options)


@pytest.mark.parametrize("amsgrad", [False, True], ids=["", "amsgrad"])
@pytest.mark.parametrize("way", WAYS, ids=["default", "foreach", "fused"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_torch_saved_loads_into_every_format(dtype, way, amsgrad):
    theirs, their_params = trained(dtype, of_torch, amsgrad=amsgrad, betas=(0.8, 0.95), weight_decay=0.1, **way)
    saved = through_a_file(theirs.state_dict())
    for state_format, own_dtype in itertools.product(FORMATS, {torch.float32, dtype}):
        ours, params = made(own_dtype, state_format=state_format, lr=9.0, seed=4)
        ours.load_state_dict(saved)
        (group,) = ours.param_groups
        assert (group["lr"], group["betas"], group["weight_decay"], group["amsgrad"]) == (
            0.01,
            (0.8, 0.95),
            0.1,
            amsgrad,
        )
        assert (group["state_format"], group["seed"]) == (state_format, 4)
        for name, param in params.items():
            entry, before = peek(ours)[param], theirs.state[their_params[name]]
            assert entry.keys() == keys_of(own_dtype, state_format, name, amsgrad)
            assert int(entry["step"]) == 3
            for key, value in encoded(before["exp_avg"].float(), before["exp_avg_sq"].float(), entry).items():
                assert torch.equal(raw(entry)[key], raw({key: value})[key]), key
            if amsgrad:
                assert torch.equal(entry["max_exp_avg_sq"], before["max_exp_avg_sq"].float())
        train(ours, params, 3, 4)


@pytest.mark.parametrize("way", WAYS, ids=["default", "foreach", "fused"])
@pytest.mark.parametrize("amsgrad", [False, True], ids=["", "amsgrad"])
@pytest.mark.parametrize("state_format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_goes_on_in_torch(dtype, state_format, amsgrad, way):
    ours, params = trained(dtype, state_format=state_format, amsgrad=amsgrad, weight_decay=0.1, steps=10)
    theirs, their_params = made(torch.float32, of_torch, lr=9.0, **way)
    forgetful, forgetful_params = made(torch.float32, of_torch, weight_decay=0.1, amsgrad=amsgrad, **way)
    for name, param in params.items():
        their_params[name].data.copy_(param.detach())
        forgetful_params[name].data.copy_(param.detach())
    saved = ours.torch_state_dict()
    assert {key for entry in saved["state"].values() for key in entry} <= MOMENTS | {"step", "max_exp_avg_sq"}
    assert not saved["param_groups"][0].keys() & {"state_format", "master_weights", "seed", "beta1"}
    theirs.load_state_dict(through_a_file(saved))
    (group,) = theirs.param_groups
    assert (group["lr"], group["betas"], group["weight_decay"], group["amsgrad"]) == (0.01, (0.9, 0.999), 0.1, amsgrad)
    for name, param in params.items():
        entry = theirs.state[their_params[name]]
        for key, value in zip(("exp_avg", "exp_avg_sq"), moments(peek(ours)[param]), strict=True):
            assert entry[key].dtype == torch.float32
            assert torch.equal(entry[key], value)
        assert int(entry["step"]) == 10
    train(ours, params, 10, 15)
    train(theirs, their_params, 10, 15)
    train(forgetful, forgetful_params, 10, 15)
    for name in ("matrix", "transposed", "vector"):
        off = (their_params[name] - params[name].float()).norm() / (0.01 * math.sqrt(params[name].numel()))
        forgotten = (forgetful_params[name] - params[name].float()).norm() / (0.01 * math.sqrt(params[name].numel()))
        # In units of a step of lr: what formats and bfloat16 lose, against what a lost state costs.
        assert off < (0.5 if dtype == torch.bfloat16 else {"fp32": 1e-4, "bf16": 0.05, "8bit": 0.3}[state_format])
        assert forgotten > 2 * off
        assert forgotten > 0.8


def test_torch_state_dict_of_an_optimizer_without_all_of_its_state():
    ours, params = made(state_format="8bit")
    theirs, _ = made(make=of_torch)
    theirs.load_state_dict(ours.torch_state_dict())
    assert not theirs.state
    params["matrix"].grad = torch.ones(64, 80)
    ours.step()
    theirs, their_params = made(make=of_torch)
    theirs.load_state_dict(ours.torch_state_dict())
    assert [name for name, param in their_params.items() if param in theirs.state] == ["matrix"]
    train(theirs, their_params, 1, 2)


def test_fp32_state_loads_into_torch_as_it_is():
    """Without torch_state_dict: what every tool does with a checkpoint."""
    ours, params = trained()
    theirs, their_params = made(make=of_torch)
    theirs.load_state_dict(ours.state_dict())
    for name, param in params.items():
        for key in MOMENTS:
            assert torch.equal(theirs.state[their_params[name]][key], peek(ours)[param][key])


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


# torch's checkpoint tools

WORLDS = {
    "8bit": (torch.float32, {"state_format": "8bit"}),
    "bf16": (torch.float32, {"state_format": "bf16"}),
    "fp32, bf16 parameters": (torch.bfloat16, {"state_format": "fp32"}),
    "bf16, bf16 parameters": (torch.bfloat16, {"state_format": "bf16"}),
    "8bit, bf16 parameters": (torch.bfloat16, {"state_format": "8bit", "amsgrad": True}),
    "8bit, fp16 parameters": (torch.float16, {"state_format": "8bit"}),
}
DCP_OPTIONS = {
    "plain": {},
    "full": {"full_state_dict": True},
    "full, offloaded": {"full_state_dict": True, "cpu_offload": True},
    "flattened": {"flatten_optimizer_state_dict": True},
}


def model_and_optimizer(dtype, options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(80, 64), nn.Linear(64, 64), nn.Linear(64, 3)).to(dtype)
    return model, optim.AdamW(model.parameters(), lr=0.02, **options)


def train_model(model, optimizer, start, stop):
    for step in range(start, stop):
        for index, param in enumerate(model.parameters()):
            param.grad = draw(1000 + 10 * step + index, param.shape).to(param.dtype)
        optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("options", DCP_OPTIONS.values(), ids=DCP_OPTIONS.keys())
@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS.keys())
def test_checkpoints_by_dcp(world, options, steps):
    dcp_options = dcp.StateDictOptions(**options)
    model, optimizer = model_and_optimizer(*world)
    train_model(model, optimizer, 0, steps)
    saved = dcp.get_optimizer_state_dict(model, optimizer, options=dcp_options)
    assert [int(entry["step"]) for entry in optimizer.state.values()] == [steps] * 6
    twin, resumed = model_and_optimizer(*world)
    twin.load_state_dict(model.state_dict())
    dcp.set_optimizer_state_dict(twin, resumed, copy.deepcopy(saved), options=dcp_options)
    assert [int(entry["step"]) for entry in resumed.state.values()] == [steps] * 6
    train_model(model, optimizer, steps, steps + 3)
    train_model(twin, resumed, steps, steps + 3)
    assert_same(bits_of(resumed), bits_of(optimizer))
    never, unsaved = model_and_optimizer(*world)  # neither saving nor loading has cost a step or moved a weight
    train_model(never, unsaved, 0, steps + 3)
    assert_same(bits_of(unsaved), bits_of(optimizer))


@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS.keys())
def test_torchs_dummy_step_makes_state_and_counts_nothing(world):
    model, optimizer = model_and_optimizer(*world)
    before = copy.deepcopy(model.state_dict())
    dcp._init_optim_state(optimizer)
    for param in model.parameters():
        entry = optimizer.state[param]
        assert not any(raw(entry)[key].any() for key in entry if key != "stream")
        assert ("stream" in entry) is ("exp_avg_code" in entry or entry["exp_avg"].dtype == torch.bfloat16)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


# Files that were written once


@pytest.mark.parametrize("name", golden.KINDS)
def test_a_golden_checkpoint_goes_on_with_the_very_same_bits(name, engine_name):
    file = golden.HERE / f"{name}.pt"
    assert file.stat().st_size < 60_000
    saved = torch.load(file, weights_only=True)
    assert saved["options"] == golden.KINDS[name][1]
    assert {param.dtype for param in saved["params"].values()} == {golden.KINDS[name][0]}
    optimizer, params = golden.made(saved["params"], saved["options"])
    optimizer.load_state_dict(saved["optimizer"])
    with on(engine_name):
        for number in range(golden.BEFORE, golden.BEFORE + golden.AFTER):
            golden.step(optimizer, params, number)
    assert golden.digests(optimizer, params) == saved["after"]


@pytest.mark.parametrize("name", golden.KINDS)
def test_golden_checkpoints_are_what_is_made_today(name, engine_name):
    """So a file that is missing can be made without a change, and none is out of date."""
    with on(engine_name):
        new = golden.checkpoint(*golden.KINDS[name])
    saved = torch.load(golden.HERE / f"{name}.pt", weights_only=True)
    assert new["after"] == saved["after"]
    for key, entry in saved["optimizer"]["state"].items():
        assert_same([raw(new["optimizer"]["state"][key])], [raw(entry)])


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("name", golden.KINDS)
def test_a_golden_checkpoint_loads_into_every_format_and_into_torch(name, to):
    saved = torch.load(golden.HERE / f"{name}.pt", weights_only=True)
    for dtype in DTYPES:
        start = {key: value.to(dtype) for key, value in saved["params"].items()}
        optimizer, params = golden.made(start, saved["options"] | {"state_format": to})
        optimizer.load_state_dict(saved["optimizer"])
        theirs = torch.optim.AdamW([(key, Parameter(value.float())) for key, value in start.items()])
        theirs.load_state_dict(optimizer.torch_state_dict())
        assert [int(entry["step"]) for entry in theirs.state.values()] == [golden.BEFORE] * 2
        golden.step(optimizer, params, golden.BEFORE)
        assert all(param.isfinite().all() for param in params.values())


def test_every_golden_file_is_tested():
    assert {file.stem for file in golden.HERE.glob("*.pt")} == set(golden.KINDS)


@pytest.mark.parametrize(
    ("v", "least", "most"),
    [(9.9e-44, 1e-45, 1e-40), (3.4028e38, 3.3e38, 3.3999e38), (0.0, 0.0, 0.0)],
    ids=["subnormal", "huge", "zero"],
)
def test_a_v_that_bf16_does_not_reach_is_neither_zero_nor_infinite(v, least, most):
    full, _ = trained()
    saved = full.state_dict()
    saved["state"][0]["exp_avg_sq"].fill_(v)
    small, others = made(state_format="bf16")
    small.load_state_dict(saved)
    found = small.state[others["matrix"]]["exp_avg_sq"].double()
    assert (found >= least).all()
    assert (found <= most).all()


def test_a_negative_zero_in_a_foreign_v_is_zero():
    full, _ = trained()
    saved = full.state_dict()
    saved["state"][0]["exp_avg_sq"][3, 5] = -0.0
    small, params = made(state_format="8bit")
    small.load_state_dict(saved)
    assert small.state[params["matrix"]]["exp_avg_sq_scale"].isfinite().all()


def test_a_master_gives_a_residual_only_where_the_parameter_is_its_upper_half():
    """bf16 weights made from fp16 ones were rounded twice, and may be the neighbour of what the master rounds to."""
    half, params = trained(torch.float16)
    master = half.state[params["matrix"]]["master"]
    upper, residual = codecs.split(master)
    brain = {name: Parameter(param.detach().bfloat16()) for name, param in params.items()}
    ours = optim.AdamW(list(brain.items()), lr=0.01)
    ours.load_state_dict(half.state_dict())
    found = ours.state[brain["matrix"]]["residual"].view(torch.int16)
    same = upper == brain["matrix"]
    assert 0.5 < same.float().mean() < 1
    assert torch.equal(found[same], residual.view(torch.int16)[same])
    assert not found[~same].any()
    assert torch.equal(codecs.joined(brain["matrix"], ours.state[brain["matrix"]]["residual"])[same], master[same])
