"""The example with all state on the host learns, in backward, and says where its bytes are.

There is no GPU here: with --device cpu it does what it does on one, but for where the weights are.
"""

import re

import pytest
import torch

import finetune_host
import lucid.optim as optim
import train_gpt

STEPS = 6
SMALL = train_gpt.Config(width=64, heads=2, layers=2, steps=STEPS, lr=2e-3)


@pytest.fixture(autouse=True, scope="module")
def small():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune_host, "WINDOWS", 8)
        yield


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A checkpoint as train_gpt.py writes it."""
    corpus = train_gpt.Corpus()
    run = train_gpt.Run(SMALL, corpus)
    for _ in range(3):
        run.advance()
    path = tmp_path_factory.mktemp("pretrained") / "checkpoint.pt"
    run.save(path)
    return path


def run(capsys, out, *arguments):
    """Return the checkpoint that a run writes, and what it said."""
    arguments = ["--device", "cpu", "--steps", str(STEPS), "--lr", "2e-3", "--out", str(out), *arguments]
    assert finetune_host.main(arguments) == 0
    return torch.load(out / "checkpoint.pt", weights_only=True), capsys.readouterr().out


def test_it_learns_from_a_checkpoint_and_says_where_its_bytes_are(pretrained, tmp_path, capsys):
    saved, said = run(capsys, tmp_path, "--weights", str(pretrained))
    assert str(pretrained) in said
    before, after = map(float, re.findall(r"held-out loss ([\d.]+)", said))
    assert after < before - 0.1
    assert len(saved["losses"]) == STEPS
    assert saved["optimizer"]["param_groups"][0]["lr"] == pytest.approx(2e-4)  # a tenth, as the schedule ends

    weights = list(saved["model"].values())
    state = [value for entry in saved["optimizer"]["state"].values() for value in entry.values()]
    told = {name.strip(): int(size.replace(",", "")) for name, size in re.findall(r"(.*?)([\d,]+) bytes on cpu", said)}
    assert told == {
        "weights": sum(weight.nbytes for weight in weights),
        "largest gradient": max(weight.nbytes for weight in weights),
        "state": sum(value.nbytes for value in state),
    }
    assert {weight.dtype for weight in weights} == {torch.bfloat16}
    assert [weight.shape for weight in weights] == [
        weight.shape for weight in train_gpt.GPT(SMALL).state_dict().values()
    ]


def test_it_takes_the_steps_of_an_ordinary_loop(tmp_path, capsys):
    """The bits of weights on the same device as their state, updated by `step()` from gradients that stay."""
    saved, said = run(capsys, tmp_path, "--width", "64", "--layers", "2")
    assert "from random weights" in said
    beside = finetune_host.FineTuning(SMALL, torch.device("cpu"), None)
    beside.optimizer = optim.AdamW(
        optim.decay_groups(beside.model, SMALL.weight_decay), lr=SMALL.lr, betas=SMALL.betas, state_format="8bit"
    )
    beside.schedule = torch.optim.lr_scheduler.LambdaLR(beside.optimizer, lambda step: train_gpt.lr_factor(step, SMALL))
    for _ in range(STEPS):
        beside.optimizer.zero_grad()
        beside.advance()
        assert all(weight.grad is not None for weight in beside.model.parameters())
    assert saved["losses"] == beside.losses
    assert all(map(torch.equal, saved["model"].values(), beside.model.state_dict().values()))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--steps", "0"], "--steps"),
        (["--width", "100"], "a multiple of 32, got 100"),
        (["--layers", "0"], "--layers"),
        pytest.param(
            ["--device", "cuda"],
            "add --device cpu",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_bad_arguments_get_one_sentence(arguments, said, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        finetune_host.main(["--device", "cpu", "--out", str(tmp_path), *arguments])
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]
