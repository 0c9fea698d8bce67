"""Guards the warning about keys of a group that nothing reads: a misspelt option would change nothing, silently."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn import Parameter
from torch.optim import lr_scheduler, swa_utils

import lucid.optim as optim
from commands import run
from lucid.optim import groups

MISSPELT = [("weigth_decay", "weight_decay"), ("betas2", "betas"), ("learning_lr", None), ("lr_scale", None)]


@pytest.fixture(autouse=True)
def _nothing_told(monkeypatch):
    monkeypatch.setattr(groups, "_told", set())


def group(**more):
    return {"params": [Parameter(torch.ones(2))], **more}


WAYS = {
    "constructor": lambda optimizer, key: type(optimizer)([group(**{key: 1})]),
    "added group": lambda optimizer, key: optimizer.add_param_group(group(**{key: 1})),
    "assignment": lambda optimizer, key: optimizer.param_groups[0].__setitem__(key, 1),
    "update": lambda optimizer, key: optimizer.param_groups[0].update({key: 1}),
    "setdefault": lambda optimizer, key: optimizer.param_groups[0].setdefault(key, 1),
    "plain dict": lambda optimizer, key: replaced(optimizer, key),
}


def replaced(optimizer, key):
    optimizer.param_groups[0] = {**optimizer.param_groups[0], key: 1}
    optimizer.step()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("key", "nearest"), MISSPELT)
def test_a_key_that_nothing_reads_is_told_once_with_the_nearest_name(key, nearest, way):
    optimizer = optim.AdamW([group()])
    with pytest.warns(UserWarning, match=f"does not read it.*{nearest or 'another tool'}") as told:
        WAYS[way](optimizer, key)
    assert [key in str(each.message) for each in told] == [True]
    assert told[0].filename == __file__
    for again in WAYS.values():
        again(optim.AdamW([group()]), key)


def test_the_key_is_kept():
    optimizer = optim.AdamW([group()])
    with pytest.warns(UserWarning, match="lr_scale"):
        optimizer.param_groups[0]["lr_scale"] = 0.5
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer)), optim.AdamW([group()])):
        twin.load_state_dict(optimizer.state_dict())
        assert twin.param_groups[0]["lr_scale"] == 0.5


def test_nothing_is_told_of_what_is_loaded_or_converted(capsys, tmp_path):
    """Who loads a checkpoint cannot change what another program has put there."""
    optimizer = torch.optim.AdamW([group()])
    saved = optimizer.state_dict()
    saved["param_groups"][0] |= {"lr_scale": 0.5, "betas": (0.5, 0.6)}
    torch.save(saved, tmp_path / "a.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        ours = optim.AdamW([group()])
        ours.load_state_dict(saved)
        assert run(capsys, "convert", tmp_path / "a.pt", tmp_path / "b.pt", "--to", "fp32")[::2] == (0, "")
        ours.step()
    converted = torch.load(tmp_path / "b.pt", weights_only=True)
    for loaded in (ours.param_groups[0], converted["param_groups"][0]):
        assert (loaded["lr_scale"], loaded["betas"], loaded["beta2"]) == (0.5, (0.5, 0.6), 0.6)


def test_keys_of_torchs_tools_are_known():
    net = nn.Linear(2, 1)
    theirs = torch.optim.AdamW(net.named_parameters())
    schedulers = [
        lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=9),
        lambda o: lr_scheduler.CyclicLR(o, 0.1, 0.2, cycle_momentum=True),
        lambda o: swa_utils.SWALR(o, 0.1),
        lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for made in schedulers:
            optimizer = optim.AdamW(net.named_parameters())
            optimizer.load_state_dict(theirs.state_dict())
            made(optimizer)
            optimizer.load_state_dict(optimizer.state_dict())


def test_options_that_zero_redundancy_optimizer_copies_are_known():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        options = {"max_grad_norm": 1.0, "nonfinite": "skip", "shard_group": None, "state_device": None}
        optim.AdamW([group(**options)], **options)


@pytest.mark.parametrize(("key", "value"), [("spike_threshold", 6.0), ("max_grad_norm", 1.0), ("nonfinite", "skip")])
def test_an_option_of_the_optimizer_in_a_group_is_told_once(key, value):
    with pytest.warns(UserWarning, match=f"^param_groups: '{key}' is an option of the whole optimizer") as told:
        optimizer = optim.AdamW([group(**{key: value}), group(**{key: value})])
    assert (len(told), told[0].filename) == (1, __file__)
    assert getattr(optimizer, key) != value


def test_keys_that_are_not_text_are_kept_without_a_word():
    optimizer = optim.AdamW([group()])
    optimizer.param_groups[0][7] = 1
    assert optimizer.param_groups[0][7] == 1
