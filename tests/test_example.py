"""The example trains, stops, and goes on to the same bits: it is what `make train` runs and what people copy."""

import pytest
import torch

import train_gpt

STEPS = 9


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(train_gpt, "EVERY", 4)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def train(out, *arguments):
    assert train_gpt.main(["--steps", str(STEPS), "--out", str(out), *arguments]) == 0
    return torch.load(out / "checkpoint.pt", weights_only=True)


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path):
    whole = train(tmp_path / "whole")
    train(tmp_path / "parts", "--stop-after", "3")
    train(tmp_path / "parts", "--resume", "--stop-after", "6")
    parts = train(tmp_path / "parts", "--resume")
    assert same(whole, parts)
    assert len(whole["losses"]) == STEPS
    assert whole["losses"][-1] < whole["losses"][0] - 0.3
    for run in ("whole", "parts"):
        assert (tmp_path / run / "loss.png").read_bytes().startswith(b"\x89PNG")
        assert len((tmp_path / run / "sample.txt").read_text()) > 100
    assert (tmp_path / "whole" / "sample.txt").read_text() == (tmp_path / "parts" / "sample.txt").read_text()


def test_lucid_and_torch_train_alike(tmp_path):
    ours, theirs = train(tmp_path / "lucid"), train(tmp_path / "torch", "--optimizer", "torch")
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--resume"], "checkpoint"), (["--steps", "0"], "steps"), (["--optimizer", "sgd"], "optimizer")],
)
def test_bad_arguments_get_one_sentence(arguments, said, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        train_gpt.main([*arguments, "--out", str(tmp_path)])
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]
