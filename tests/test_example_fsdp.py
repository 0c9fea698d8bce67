"""The example of several processes trains, dies while saving, and goes on, on as many processes or others.

It is killed and resumed as people run it, by torchrun; what else it does is tried in processes that are there already.
Each run ends by itself within its limit, with the stacks of a process that hangs.
"""

import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch.distributed import checkpoint

import train_fsdp
import train_gpt

LIMIT = 90  # seconds for one run; 5 to 20 are usual
STEPS, EVERY = 9, 3
CONFIG = train_gpt.Config(steps=STEPS, state="8bit")
EXAMPLE = Path(train_fsdp.__file__)

# Runs the example, where each process tells its stacks if it hangs, and the second is killed in the midst of a save.
LAUNCHED = f"""
import faulthandler, os, signal, sys
faulthandler.dump_traceback_later({LIMIT - 20}, exit=True)
sys.path.insert(0, {str(EXAMPLE.parent)!r})
import train_fsdp
from torch.distributed.checkpoint import FileSystemWriter

write = FileSystemWriter.write_data

def write_or_die(self, plan, planner):
    if os.environ["RANK"] == "1" and os.path.basename(self.path) == os.environ.get("KILL_IN"):
        os.kill(os.getpid(), signal.SIGKILL)
    return write(self, plan, planner)

FileSystemWriter.write_data = write_or_die
sys.exit(train_fsdp.main())
"""


def launch(folder, world, out, *arguments, kill_in=""):
    """Run the example on `world` processes; return its exit status and what it said."""
    script = folder / "launched.py"
    script.write_text(LAUNCHED)
    own = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": "", "KILL_IN": kill_in}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    command += [str(script), "--steps", str(STEPS), "--every", str(EVERY), "--out", str(out), *arguments]
    process = subprocess.Popen(
        command, env=os.environ | own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        said, _ = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun then ends the processes that it started
        said, _ = process.communicate(timeout=35)
        pytest.fail(f"{world} processes took more than {LIMIT} s:\n{said}")
    return process.returncode, said


def run_here(out, found=None, config=CONFIG):
    """Train to the end in this process and others that do the same; return the losses."""
    run = train_fsdp.Run(config, train_gpt.Corpus(), torch.device("cpu"))
    if found:
        run.load(found)
    train_fsdp.train(run, STEPS, EVERY, out)
    return run.losses


def saved_losses(folder):
    """Every step's loss, as the checkpoint has them."""
    saved = {"run": {"losses": None}}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        checkpoint.load(saved, checkpoint_id=folder)
    return saved["run"]["losses"]


def folders(out):
    return sorted(path.name for path in out.iterdir())


@pytest.fixture(scope="module")
def expected(ranks, tmp_path_factory):
    """The losses of 2 processes that nobody interrupts."""
    out = tmp_path_factory.mktemp("whole")
    first, second = ranks.run(2, run_here, out)
    assert first == second
    assert folders(out) == ["step-000003", "step-000006", "step-000009"]
    assert saved_losses(out / "step-000009") == first
    return first


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """What 2 processes leave of which the second is killed while it saves for the second time."""
    out = tmp_path_factory.mktemp("killed")
    status, said = launch(tmp_path_factory.mktemp("script"), 2, out, kill_in="step-000006")
    assert status != 0
    assert "SIGKILL" in said, said
    return out


@pytest.mark.slow
def test_processes_train_as_one_does(expected):
    alone = train_gpt.Run(CONFIG, train_gpt.Corpus())
    for _ in range(STEPS):
        alone.advance()
    assert expected == pytest.approx(alone.losses, rel=1e-4)


@pytest.mark.slow
def test_a_killed_save_leaves_the_checkpoint_before(killed, expected):
    assert folders(killed) == ["step-000003", "step-000006"]
    assert not (killed / "step-000006" / ".metadata").exists()
    assert train_fsdp.last_whole(killed) == killed / "step-000003"
    assert saved_losses(killed / "step-000003") == expected[:3]


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_killed_run_goes_on_with_any_number_of_processes(ranks, killed, expected, world, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(killed, out)
    if world == 3:
        status, said = launch(tmp_path, world, out, "--resume")
        assert status == 0, said
        assert f"on {world} processes (cpu), from {out / 'step-000003'}" in said
        shares_are_told(said, world)
    else:
        ranks.run(world, run_here, out, train_fsdp.last_whole(out))
    assert train_fsdp.last_whole(out) == out / "step-000009"
    found = saved_losses(out / "step-000009")
    assert found == (expected if world == 2 else pytest.approx(expected, rel=1e-4))
    assert saved_losses(out / "step-000006") == found[:6]  # the broken one was written anew


def shares_are_told(said, world):
    size = sum(parameter.numel() for parameter in train_gpt.GPT(CONFIG).parameters())
    held = [line.split()[2:] for line in said.splitlines() if line.startswith("rank ")]
    assert len(held) == 2 * world  # at the start and at the end
    table = [[int(number.replace(",", "")) for number in row] for row in held[-world:]]
    weights, gradients, state, together = map(sum, zip(*table, strict=True))
    assert weights == gradients == 4 * size
    assert state < 2.2 * size
    assert together == weights + gradients + state
    assert max(row[0] for row in table) < 1.05 * weights / world


def refused(folder):
    with pytest.raises(ValueError, match="was made with seed 0, this run has 1"):
        run_here(None, folder, train_gpt.Config(steps=STEPS, state="8bit", seed=1))


@pytest.mark.slow
def test_another_runs_checkpoint_is_refused(ranks, killed):
    ranks.run(2, refused, killed / "step-000003")


@pytest.mark.parametrize(
    ("arguments", "environment", "said"),
    [
        ([], {}, "torchrun --standalone"),
        (["--steps", "0"], {"RANK": "0", "WORLD_SIZE": "2"}, "--steps"),
        (["--every", "0"], {"RANK": "0", "WORLD_SIZE": "2"}, "--every"),
        (["--resume"], {"RANK": "0", "WORLD_SIZE": "2"}, "no complete checkpoint"),
        ([], {"RANK": "0", "WORLD_SIZE": "9"}, "expected at most 8 processes, one per window of a batch, got 9"),
    ],
)
def test_bad_arguments_get_one_sentence(arguments, environment, said, tmp_path, monkeypatch, capsys):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as stopped:
        train_fsdp.main([*arguments, "--out", str(tmp_path)])
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_a_new_run_overwrites_no_checkpoint(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    (tmp_path / "step-000003").mkdir()
    (tmp_path / "step-000003" / ".metadata").touch()
    with pytest.raises(SystemExit):
        train_fsdp.main(["--out", str(tmp_path)])
    assert "add --resume" in capsys.readouterr().err.splitlines()[-1]
