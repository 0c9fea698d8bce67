"""The example trains, stops, and goes on to the same bits: it is what `make train` runs and what people copy."""

import pytest
import torch

import train_gpt

STEPS = 9


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(train_gpt, "EVERY", 4)


def train(out, *arguments):
    assert train_gpt.main(["--steps", str(STEPS), "--out", str(out), *arguments]) == 0
    return torch.load(out / "checkpoint.pt", weights_only=True)


def same(a, b):
    if isinstance(a, torch.Tensor):
        bits = [tensor.detach().reshape(-1).view(torch.uint8) for tensor in (a, b)]  # a residual's are no numbers
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize("formats", [(), ("--state", "8bit", "--dtype", "bf16")], ids=["fp32", "8bit-bf16"])
def test_a_stopped_run_goes_on_to_the_same_bits(formats, tmp_path):
    whole = train(tmp_path / "whole", *formats)
    train(tmp_path / "parts", "--stop-after", "3", *formats)
    train(tmp_path / "parts", "--resume", "--stop-after", "6", *formats)
    parts = train(tmp_path / "parts", "--resume", *formats)
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


def test_observing_draws_every_matrix_and_changes_no_bit(tmp_path, monkeypatch):
    runs = []
    original = train_gpt.save_ratios
    monkeypatch.setattr(train_gpt, "save_ratios", lambda run, path: (runs.append(run), original(run, path)))
    plain = train(tmp_path / "plain")
    assert same(plain, train(tmp_path / "observed", "--plot-statistics"))
    assert not (tmp_path / "plain" / "statistics.png").exists()
    assert (tmp_path / "observed" / "statistics.png").read_bytes().startswith(b"\x89PNG")
    ratios = runs[0].ratios
    assert list(ratios) == list(range(1, STEPS + 1))
    matrices = {name for name, parameter in runs[0].model.named_parameters() if parameter.ndim == 2}
    for found in ratios.values():
        assert matrices <= found.keys()
        assert all(0 < found[name] < 1 for name in matrices)


def test_small_formats_train_alike(tmp_path, capsys):
    full = train(tmp_path / "full")
    small = train(tmp_path / "small", "--state", "8bit", "--dtype", "bf16")
    assert full["losses"] == pytest.approx(small["losses"], rel=0.01)
    sizes = [line.split()[-1] for line in capsys.readouterr().out.splitlines() if line.startswith("bytes a parameter")]
    assert float(sizes[0]) == pytest.approx(16, abs=0.01)
    assert float(sizes[1]) < 8.2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--optimizer", "torch", "--state", "8bit"], "state"),
        (["--resume"], "checkpoint"),
        (["--steps", "0"], "steps"),
        (["--optimizer", "sgd"], "optimizer"),
        (["--compare", "--plot-statistics"], "statistics"),
        (["--optimizer", "torch", "--plot-statistics"], "statistics"),
    ],
)
def test_bad_arguments_get_one_sentence(arguments, said, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        train_gpt.main([*arguments, "--out", str(tmp_path)])
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]
