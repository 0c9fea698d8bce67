"""The example trains, stops, and goes on to the same bits: it is what `make train` runs and what people copy."""

import contextlib
import functools
import io

import pytest
import torch

import train_gpt

STEPS = 9


class Corpus(train_gpt.Corpus):
    """Held-out text of a few windows: reading all of it takes longer than the steps."""

    def __init__(self):
        super().__init__()
        self.held_out = self.held_out[:2000]


@pytest.fixture(autouse=True, scope="module")
def small():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt, "EVERY", 4)
        patch.setattr(train_gpt, "Corpus", Corpus)
        patch.setattr(train_gpt, "sample", functools.partial(train_gpt.sample, length=150))
        yield


@pytest.fixture(scope="module")
def trained(small, tmp_path_factory):
    """Where a run with these arguments went, its checkpoint, and what it said: each run is made once."""

    @functools.cache
    def run(*arguments):
        out, said = tmp_path_factory.mktemp("trained"), io.StringIO()
        with contextlib.redirect_stdout(said):
            checkpoint = train(out, *arguments)
        return out, checkpoint, said.getvalue()

    return run


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


SMALL_FORMATS = ("--state", "8bit", "--dtype", "bf16")


@pytest.mark.slow
@pytest.mark.parametrize("formats", [(), SMALL_FORMATS], ids=["fp32", "8bit-bf16"])
def test_a_stopped_run_goes_on_to_the_same_bits(formats, trained, tmp_path):
    out, whole, _ = trained(*formats)
    train(tmp_path, "--stop-after", "3", *formats)
    train(tmp_path, "--resume", "--stop-after", "6", *formats)
    parts = train(tmp_path, "--resume", *formats)
    assert same(whole, parts)
    assert len(whole["losses"]) == STEPS
    assert whole["losses"][-1] < whole["losses"][0] - 0.3
    for run in (out, tmp_path):
        assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
        assert len((run / "sample.txt").read_text()) > 100
    assert (out / "sample.txt").read_text() == (tmp_path / "sample.txt").read_text()


def test_lucid_and_torch_train_alike(trained):
    (_, ours, _), (_, theirs, _) = trained(), trained("--optimizer", "torch")
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-3)


@pytest.mark.slow
def test_observing_draws_every_matrix_and_changes_no_bit(trained, tmp_path, monkeypatch):
    runs = []
    original = train_gpt.save_ratios
    monkeypatch.setattr(train_gpt, "save_ratios", lambda run, path: (runs.append(run), original(run, path)))
    out, plain, _ = trained()
    assert same(plain, train(tmp_path, "--plot-statistics"))
    assert not (out / "statistics.png").exists()
    assert (tmp_path / "statistics.png").read_bytes().startswith(b"\x89PNG")
    ratios = runs[0].ratios
    assert list(ratios) == list(range(1, STEPS + 1))
    matrices = {name for name, parameter in runs[0].model.named_parameters() if parameter.ndim == 2}
    for found in ratios.values():
        assert matrices <= found.keys()
        assert all(0 < found[name] < 1 for name in matrices)


def test_small_formats_train_alike(trained):
    (_, full, said_of_full), (_, small, said_of_small) = trained(), trained(*SMALL_FORMATS)
    assert full["losses"] == pytest.approx(small["losses"], rel=0.01)
    sizes = [
        float(line.split()[-1])
        for line in (said_of_full + said_of_small).splitlines()
        if line.startswith("bytes per parameter")
    ]
    assert sizes[0] == pytest.approx(16, abs=0.01)
    assert sizes[1] < 8.2


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
