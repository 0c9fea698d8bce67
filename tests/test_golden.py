"""Guards that a file written once loads for ever: goes on with the very same bits, in every format, and in torch.

The files are in golden/, and `golden/make.py` has made them. Beside them, what older or foreign files may hold.
"""

import pytest
import torch
from torch.nn import Parameter

import lucid.optim as optim
from bits import assert_same, on
from converted import DTYPES, FORMATS, made, raw, trained
from golden import make as golden
from lucid.engine import codecs


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
    memories = [each["optimizer"]["param_groups"][0].get("spike_memory") for each in (new, saved)]
    assert memories[0] == memories[1]
    assert (memories[1] is None) == ("spike_threshold" not in saved["options"])


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("name", golden.KINDS)
def test_a_golden_checkpoint_loads_into_every_format_and_into_torch(name, to):
    saved = torch.load(golden.HERE / f"{name}.pt", weights_only=True)
    for dtype in DTYPES:
        if dtype == torch.float16 and saved["options"].get("master_weights") == "stochastic":
            continue
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
