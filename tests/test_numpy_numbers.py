"""Guards that numbers of numpy, which earlier releases saved among hyperparameters, are read as Python's by the command
and by `load_optimizer`, that nothing of numpy is called for it, and that nothing else becomes readable.
"""

import io
import pickle

import numpy as np
import pytest
import torch
from torch.distributed import checkpoint as dcp

import lucid.optim as optim
from asked import inspected, refused, run, state_dict, trained
from lucid.optim.checkpoint import load_optimizer

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def with_numpy():
    saved = state_dict()
    group = saved["param_groups"][0]
    del group["beta1"], group["beta2"]
    group["betas"] = (np.float64(0.8), np.float32(0.5))
    group |= {
        "lr": np.float16(0.25),
        "seed": np.int64(2**62),
        "amsgrad": np.bool_(False),
        "eps": np.array([1e-5], ">f8")[0],
    }
    return saved


@pytest.mark.parametrize("old", [False, True])
def test_numbers_of_numpy_are_read_and_become_pythons(old, capsys, tmp_path):
    torch.save(with_numpy(), tmp_path / "a.pt", _use_new_zipfile_serialization=not old)
    assert inspected(capsys, tmp_path / "a.pt")[0] == 0
    assert run(capsys, "convert", tmp_path / "a.pt", tmp_path / "b.pt", "--to", "fp32")[0] == 0
    saved = torch.load(tmp_path / "b.pt", weights_only=True)
    group = saved["param_groups"][0]
    values = {key: group[key] for key in ("lr", "beta1", "beta2", "eps", "seed", "amsgrad")}
    assert values == {"lr": 0.25, "beta1": 0.8, "beta2": 0.5, "eps": 1e-5, "seed": 2**62, "amsgrad": False}
    assert {type(value) for value in values.values()} == {float, int, bool}
    optim.AdamW(trained()[0].parameters()).load_state_dict(saved)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "a.pt", weights_only=True)


def test_a_folder_with_numbers_of_numpy_is_loaded(capsys, tmp_path):
    model, optimizer = trained()
    names = [name for name, _ in model.named_parameters()]
    saved = with_numpy()
    saved["state"] = {names[number]: entry for number, entry in saved["state"].items()}
    saved["param_groups"][0]["params"] = names
    dcp.save({"optimizer": saved}, checkpoint_id=tmp_path / "a", no_dist=True)
    assert inspected(capsys, tmp_path / "a")[0] == 0
    load_optimizer(model, optimizer, tmp_path / "a")
    assert (optimizer.param_groups[0]["betas"], optimizer.param_groups[0]["lr"]) == ((0.8, 0.5), 0.25)


@pytest.mark.parametrize("made", ["object", "V9", "f4"])
def test_numpys_functions_are_not_called_for_what_a_file_says(made, capfd, tmp_path):
    """A dtype of objects, one of any size, and bytes that are not the dtype's."""
    scalar = np.float64(1).__reduce__()[0]

    class Hostile:
        def __reduce__(self):
            return scalar, (np.dtype(made), b"12345678")

    content = io.BytesIO()
    torch.save({"a": Hostile()}, content)
    (tmp_path / "a.pt").write_bytes(content.getvalue())
    assert "numpy" in refused(capfd, tmp_path / "a.pt", tmp_path)
