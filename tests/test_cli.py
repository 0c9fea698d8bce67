"""Guards the command `lucid`: help and errors, exit status, JSON, `info`, `bench` and `plan`; checkpoints have a file
of their own (test_cli_checkpoints.py), and so have `inspect` (test_cli_inspect.py) and `convert` (test_cli_convert.py).

Figures are compared with what they are of: bytes with tensors that exist, and with a process's memory.
"""

import dataclasses
import json
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benchmarks import backward
from torch import nn

import blocks
import lucid
import lucid.optim as optim
import train_gpt
from lucid.bench import machine, steps
from lucid.bench.contenders import FORMATS, FUSED, LIMIT, Contender, Format
from lucid.bench.shapes import MODELS, elements, read_shapes
from lucid.cli import app, bench, info, main, output, plan, shapes
from lucid.engine import cpu
from lucid.engine.formats import NAMES
from lucid.engine.sizes import state_bytes

COMMANDS = ["info", "bench", "plan", "inspect", "convert"]


def run(capsys, *arguments):
    """Return the exit status and what was printed where."""
    status = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return status, out, err


def run_json(capsys, *arguments):
    status, out, _ = run(capsys, *arguments, "--json")
    return status, json.loads(out)


# The command itself


@pytest.mark.parametrize("way", [[sys.executable, "-m", "lucid"], [str(Path(sys.executable).with_name("lucid"))]])
def test_it_can_be_called(way):
    done = subprocess.run([*way, "--version"], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == f"lucid-optim {lucid.__version__}\n"


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_says_what_there_is(command, capsys):
    status, out, _ = run(capsys, *([] if command is None else [command]), "--help")
    assert status == 0
    for word in COMMANDS if command is None else ["Usage", "--json"]:
        assert word in out


def test_help_does_not_wait_for_torch():
    code = "import sys; from lucid.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120, check=True)


@pytest.mark.slow
@pytest.mark.parametrize("missing", ["typer", "tqdm", "matplotlib"])
def test_a_missing_extra_is_named(missing):
    code = f"import sys; sys.modules['{missing}'] = None\nfrom lucid.cli import main\nsys.exit(main(sys.argv[1:]))"
    arguments = ["bench", "--like", "resnet50", "--rounds", "1", "--peer", "fused", "--plot", "/dev/null"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stderr.splitlines()[-1:]) == (
        2,
        [f"lucid: the command needs {missing}: pip install 'lucid-optim[cli]'"],
    )


def test_choices_are_those_of_the_library():
    assert [each.value for each in app.StateFormat] == list(NAMES)
    assert [each.value for each in app.Target] == [*NAMES, "torch"]
    assert [each.value for each in app.Like] == list(MODELS)
    assert [each.value for each in app.Dtype] == list(shapes.DTYPES)


BAD = {
    "no such command": (["nothing"], "No such command"),
    "an unknown format": (["bench", "--format", "4bit"], "--format"),
    "an unknown model": (["plan", "--like", "gpt5"], "--like"),
    "no model": (["plan"], "expected one of CHECKPOINT"),
    "two models": (["plan", "--like", "resnet50", "--parameters", "1B"], "expected one of CHECKPOINT"),
    "a model and shapes": (["bench", "--like", "resnet50", "--shapes", "x.txt"], "expected one of CHECKPOINT"),
    "no file": (["plan", "nowhere.pt"], "nowhere.pt: no such file"),
    "no shapes": (["plan", "--shapes", "nowhere.txt"], "nowhere.txt"),
    "a bad count": (["plan", "--parameters", "many"], "--parameters: expected a count like"),
    "a count of none": (["plan", "--parameters", "0"], "--parameters: expected a count like"),
    "a bad layout": (["plan", "--parameters", "1B", "--layout", "0x3"], "--layout: expected a shape like"),
    "a bad memory": (["plan", "--like", "resnet50", "--memory", "lots"], "--memory: expected a size like"),
    "tensors without number": (["plan", "--parameters", "7B", "--layout", "2"], "would be 3,500,000,000 tensors"),
    "no ranks": (["plan", "--like", "resnet50", "--ranks", "0"], "--ranks"),
    "no rounds": (["bench", "--rounds", "0"], "--rounds"),
    "a device of no engine": (["bench", "--device", "meta"], "--device: expected cpu or cuda"),
    "no device's name": (["bench", "--device", "here"], "--device: expected cpu, cuda"),
    "a device that is not here": (["bench", "--device", "cuda:7"], "--device cuda:7: torch"),
    "a library that is not here": (["bench", "--peer", "flashoptim"], "flashoptim is not installed"),
    "a folder that is not there": (["bench", "--plot", "nowhere/x.png"], "there is no folder nowhere"),
    "no kind of picture": (["bench", "--plot", "x.doc"], "--plot x.doc: expected a name that ends in"),
    "no picture's name": (["inspect", "x.pt", "--plot", "x"], "--plot x: expected a name that ends in"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD)
def test_a_bad_question_is_answered_with_a_sentence(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, "")
    assert message in re.sub(r"[\s│]+", " ", err)
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


PAGE = Path(__file__).parents[1] / "docs" / "cli.md"


def test_the_commands_of_the_page_run(capsys, tmp_path, monkeypatch):
    """One after another, where the page's code has left its checkpoint; all is well with all of them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(steps, "_SLOW_ROUNDS", 1)
    blocks.run(PAGE)
    lines = [
        line for block in re.findall(r"```bash\n(.*?)```", PAGE.read_text(), re.DOTALL) for line in block.splitlines()
    ]
    commands = [shlex.split(line)[1:] for line in lines if line.startswith("lucid ")]
    assert {command[0] for command in commands} == {*COMMANDS, "--help"}
    for command in commands:
        if command[0] == "bench":
            command = [*command, "--rounds", "2"]
        assert run(capsys, *command)[0] == 0, command
    made = {each.name for each in tmp_path.iterdir()}
    assert made == {
        "checkpoint.pt",
        "checkpoint.png",
        "roofline.png",
        "smaller.pt",
        "for_torch.pt",
        "checkpoint_folder",
    }


# Output


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1234.5, "1,234"), (0.012345, "0.0123"), (1.0, "1.00"), (1e-9, "1.00e-09"), (2e7, "2.00e+07")],
)
def test_digits(value, text):
    assert output.digits(value) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1,023 B"), (1536, "1.50 KiB"), (24 * 2**30, "24.0 GiB"), (2**50, "1,024 TiB")],
)
def test_size(count, text):
    assert output.size(count) == text


def test_json_has_no_nan(capsys):
    output.print_json({"a": [math.nan, 1.5, (math.inf,)], "b": {"c": -math.inf}})
    assert json.loads(capsys.readouterr().out) == {"a": [None, 1.5, [None]], "b": {"c": None}}


@pytest.mark.parametrize("title", ["[/red]a", "[bold]a", ":smile:"])
def test_names_are_no_markup(title, capsys):
    output.console().print(output.table([title], [[title]], title))
    assert capsys.readouterr().out.split() == 3 * [title]


def test_names_do_not_command_the_terminal(capsys, tmp_path):
    name = "a\x1b[2J\x07\u202e\nb"
    state = {"step": torch.tensor(1.0), "exp_avg": torch.ones(2), "exp_avg_sq": torch.full((2,), math.nan)}
    group = {"params": [0], "param_names": [name]}
    torch.save({name: {"state": {0: state}, "param_groups": [group]}}, tmp_path / "a.pt")
    status, out, _ = run(capsys, "inspect", tmp_path / "a.pt")
    assert status == 1
    assert out.count("a\\x1b[2J\\x07\\u202e\\nb") == 3
    assert all(each.isprintable() for each in out.replace("\n", ""))
    torch.save({name: 1}, tmp_path / "b.pt")
    _, _, err = run(capsys, "inspect", tmp_path / "b.pt")
    assert "(it holds a\\x1b[2J\\x07\\u202e\\nb)" in err


def test_an_output_of_few_characters_is_no_error():
    done = subprocess.run(
        [sys.executable, "-m", "lucid", "plan", "--like", "resnet50", "--memory", "1TB"],
        capture_output=True, timeout=120, env={**os.environ, "PYTHONIOENCODING": "ascii"}, check=True,
    )  # fmt: skip
    assert b"? 390 MiB" in done.stdout


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is full")
def test_an_output_that_cannot_be_written_is_no_answer():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "lucid", "plan", "--like", "resnet50"],
            stdout=full, stderr=subprocess.PIPE, text=True, timeout=120,
        )  # fmt: skip
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "No space left" in done.stderr


# info


def test_info_tells_what_runs_here(capsys):
    status, found = run_json(capsys, "info")
    engines = {engine["name"]: engine["missing"] for engine in found["engines"]}
    assert status == 0
    assert engines["cpu"] is engines["reference"] is None
    assert (engines["cuda"] is None) == torch.cuda.is_available()
    assert found["threads"] == torch.get_num_threads()
    assert found["simd_level"] in found["simd_levels"]
    assert found["versions"]["torch"] == torch.__version__
    assert 0.1 < found["limits"]["CPU"] < 10_000  # GB/s

    status, out, _ = run(capsys, "info", "--no-measure")
    assert status == 0
    assert f"torch {torch.__version__}" in re.sub(" +", " ", out)
    assert "GB/s" not in out


def test_info_tells_whose_threads_run_the_step_and_why(capsys):
    _, found = run_json(capsys, "info", "--no-measure")
    assert (found["team"], found["team_reason"]) == cpu.team()
    assert found["team"] == "torch"
    out = run(capsys, "info", "--no-measure")[1].replace("\n", "")
    assert f"torch's OpenMP threads: {cpu.team()[1][:20]}" in re.sub(" +", " ", out)
    with cpu.forced_team("pool"):
        assert run_json(capsys, "info", "--no-measure")[1]["team"] == "pool"
        assert "lucid's own, not torch's: it was asked for" in run(capsys, "info", "--no-measure")[1]


def test_info_tells_a_share_of_the_cores(capsys, monkeypatch):
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("lucid.engine.native._OWN_THREADS", torch.get_num_threads() + 1)
    torch.set_num_threads(torch.get_num_threads() + 1)
    monkeypatch.setattr("lucid.engine.threads.cpus", lambda: (8, 8, 3.5))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    _, found = run_json(capsys, "info", "--no-measure")
    assert found["threads"] == 1
    assert "LOCAL_WORLD_SIZE" in found["threads_reason"]
    assert "3.5" in found["threads_reason"]


def test_info_without_the_cpu_engine_says_why_and_that_it_is_bad(capsys, monkeypatch):
    monkeypatch.setattr("lucid.engine.cpu.missing", "its extension did not load")
    status, out, _ = run(capsys, "info")
    assert status == 1
    assert re.search(r"cpu +no +its extension did not load", out)


def test_info_says_that_a_gpu_without_its_engine_is_bad(capsys, monkeypatch):
    found = info.gathered(measure=False)
    without = dataclasses.replace(found.engines[1], missing="triton is not installed")
    engines = [found.engines[0], without, found.engines[2]]
    for devices, wanted in (([], 0), (["a GPU"], 1)):
        here = dataclasses.replace(found, engines=engines, devices=devices)
        monkeypatch.setattr(info, "gathered", lambda measure, here=here: here)
        assert run(capsys, "info")[0] == wanted


def test_info_says_who_has_set_the_threads(capsys, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
    assert "OMP_NUM_THREADS=" in run(capsys, "info", "--no-measure")[1]


# Shapes


def test_shapes_of_lines_and_of_json_are_the_same(tmp_path):
    lines, listed, named = (tmp_path / name for name in ("lines.txt", "list.json", "dict.json"))
    lines.write_text("# a model\n2 * 64x128\n7  # a bias\n\n3 x 4 × 5\n")
    listed.write_text("[[64, 128], [64, 128], [7], [3, 4, 5]]")
    named.write_text('{"a": [64, 128], "b": [64, 128], "c": [7], "d": [3, 4, 5]}')
    wanted = [(64, 128), (64, 128), (7,), (3, 4, 5)]
    assert [read_shapes(path) for path in (lines, listed, named)] == 3 * [wanted]


@pytest.mark.parametrize(
    "text",
    ["", "# nothing", "64by128", "[[1, -2]]", "[1, 2]", "[", "{}", "3 *", "-3x4", "1000000000000 * 2"],
)
def test_what_lists_no_shapes_is_refused(text, tmp_path):
    path = tmp_path / "shapes.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"shapes\.txt"):
        read_shapes(path)


def saved_model(path, how):
    model = nn.Sequential(nn.Linear(128, 64), nn.BatchNorm1d(64), nn.Linear(64, 3))
    model.tied = model[0].weight
    if how == "safetensors":
        from safetensors.torch import save_model

        save_model(model, str(path))
    elif how == "folder":
        from torch.distributed import checkpoint as dcp

        with pytest.warns(UserWarning, match="assuming the intent is to save in a single process"):
            dcp.save({"model": model.state_dict(), "step": 3}, checkpoint_id=path, no_dist=True)
    else:
        torch.save(model.state_dict() if how == "bare" else {"model": model.state_dict(), "lr": 0.1}, path)
    return [tuple(param.shape) for param in model.parameters()]


@pytest.mark.parametrize(
    ("name", "how"), [("a.pt", "bare"), ("b.pt", "within"), ("c.safetensors", "safetensors"), ("d", "folder")]
)
def test_a_checkpoint_gives_its_models_shapes(name, how, tmp_path):
    wanted = saved_model(tmp_path / name, how)
    if how == "folder":
        wanted.append((64, 128))  # folders do not tell that two weights are one
    assert sorted(shapes.chosen(tmp_path / name, None, None).shapes) == sorted(wanted)


def test_complex_weights_are_counted(tmp_path):
    torch.save({"a": torch.ones(3, 4, dtype=torch.complex64), "b": torch.arange(5)}, tmp_path / "a.pt")
    assert shapes.chosen(tmp_path / "a.pt", None, None).shapes == [(3, 4)]


def test_a_checkpoint_without_weights_is_refused(capsys, tmp_path):
    torch.save({"a": torch.arange(3)}, tmp_path / "a.pt")
    status, _, err = run(capsys, "plan", tmp_path / "a.pt")
    assert status == 2
    assert "expected floating-point weights in it" in err


@pytest.mark.parametrize("count", ["1", "16777216", "16777217", "350M", "1.3B", "12345678"])
def test_a_count_is_laid_out_whole(count):
    case = shapes.counted(count, "4096x4096", others=())
    unit = {"M": 1e6, "B": 1e9}.get(count[-1], 1)
    assert case.elements == round(float(count.rstrip("MB")) * unit)
    assert all(len(shape) == 1 or shape[1:] == (4096,) for shape in case.shapes)


@pytest.mark.parametrize(
    ("text", "count"),
    [("24GiB", 24 * 2**30), ("80GB", 80 * 10**9), ("1.5 MiB", 3 * 2**19), ("512", 512), ("7kB", 7000)],
)
def test_memory_is_read_in_either_unit(text, count):
    assert shapes.memory(text) == count


# plan

SHAPES = [(100, 128), (64, 64, 3, 3), (1000,), (5, 7), (), (333, 257)]


KEPT = [plan.Options(), plan.Options(amsgrad=True), plan.Options(ema=True), plan.Options(True, True, False)]
DRAWN = [plan.Options(master_weights="stochastic"), plan.Options(ema=True, master_weights="stochastic")]


@pytest.mark.parametrize(
    ("dtype", "kept"),
    [(dtype, kept) for dtype in shapes.DTYPES for kept in [*KEPT, *(DRAWN if dtype != "float16" else [])]],
)
@pytest.mark.parametrize("state_format", NAMES)
def test_the_plan_counts_the_very_bytes_of_the_state(state_format, dtype, kept):
    params = [nn.Parameter(torch.zeros(shape, dtype=shapes.DTYPES[dtype])) for shape in SHAPES]
    options = {"amsgrad": kept.amsgrad, "ema_decay": 0.9 if kept.ema else None, "master_weights": kept.master_weights}
    optimizer = optim.AdamW(params, state_format=state_format, **options)
    optimizer.init_state()
    held = sum(value.nbytes for param in params for value in optimizer.state[param].values())
    found = plan.need(SHAPES, dtype, state_format, 1, kept)
    assert (found.state, found.weights, found.gradients) == (
        held,
        sum(param.nbytes for param in params),
        sum(param.nbytes for param in params),
    )
    assert found.in_backward == max(param.nbytes for param in params)


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_plan_counts_torchs_state(dtype, amsgrad):
    params = [nn.Parameter(torch.ones(shape, dtype=shapes.DTYPES[dtype])) for shape in SHAPES]
    optimizer = torch.optim.AdamW(params, amsgrad=amsgrad)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    held = sum(value.nbytes for param in params for value in optimizer.state[param].values())
    found = plan.need(SHAPES, dtype, plan.TORCH, 1, plan.Options(amsgrad))
    assert (found.state, found.in_backward, found.total_in_backward) == (held, None, None)


@pytest.mark.parametrize("processes", [2, 3, 4])
@pytest.mark.parametrize("state_format", NAMES)
def test_the_plan_counts_the_largest_shard(state_format, processes):
    """Rows of 8-bit blocks are never cut, so that the state of a shard is that of its rows; by the whole's shape."""
    for shape in SHAPES:
        whole = state_bytes(shape, torch.float32, state_format)
        part = state_bytes(shape, torch.float32, state_format, ranks=processes)
        found = plan.need([shape], "float32", state_format, processes)
        rows = [math.ceil(rows / processes) for rows in shape[:1]]
        assert (found.weights, found.state, found.in_backward) == (4 * math.prod([*rows, *shape[1:]]), part, None)
        if shape:
            drawn = state_format == "bf16" or (state_format == "8bit" and is_quantized(shape))
            numbers = 4 + 8 * drawn  # the step count and what draws are keyed with: on each
            assert (part - numbers) * shape[0] == (whole - numbers) * math.ceil(shape[0] / processes)
        else:
            assert part == whole


def is_quantized(shape):
    return len(shape) >= 2 and math.prod(shape) >= 4096 and math.prod(shape[1:]) >= 64


def test_ranks_are_doubled_up_to_the_last():
    assert [plan.rank_counts(most) for most in (1, 2, 6, 8)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8]]


def test_what_fits_is_said_and_is_the_exit_status(capsys):
    status, found = run_json(capsys, "plan", "--like", "gpt2-small", "--ranks", 2, "--memory", "1000MiB")
    assert status == 0
    assert found["memory"] == 1000 * 2**20
    for choice in found["choices"]:
        assert choice["fits"] == (choice["total"] <= 1000 * 2**20)
        assert choice["total"] == choice["weights"] + choice["gradients"] + choice["state"]
    assert {choice["fits"] for choice in found["choices"]} == {True, False}

    status, found = run_json(capsys, "plan", "--like", "gpt2-small", "--memory", "900MB")
    assert status == 0
    assert [any(each[key] for each in found["choices"]) for key in ("fits", "fits_in_backward")] == [False, True]

    status, out, _ = run(capsys, "plan", "--like", "gpt2-small", "--memory", "100MiB")
    assert status == 1
    assert "nothing fits into 100MiB" in out

    status, out, _ = run(capsys, "plan", "--like", "gpt2-small")
    assert status == 0
    assert "124,439,808 parameters" in out
    assert "✓" not in out


MEASURED = """
import sys
import torch
import train_gpt
from benchmarks.footprint import resident_bytes

dtype, state = sys.argv[1:3]
config = train_gpt.Config(width=640, heads=5, layers=8, context=16, batch=1, dtype=dtype, state=state)
torch.manual_seed(0)
corpus = train_gpt.Corpus()
train_gpt.Run(train_gpt.replace(config, layers=1), corpus).advance()  # torch keeps code and buffers for these shapes
before = resident_bytes()
run = train_gpt.Run(config, corpus)
run.advance()
after = resident_bytes()
torch.save(run.model.state_dict(), sys.argv[3])
print(after - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "name"), [("fp32", "float32"), ("bf16", "bfloat16")])
@pytest.mark.parametrize("state", NAMES)
def test_the_plan_of_the_example_is_what_a_process_takes(state, dtype, name, capsys, tmp_path):
    """Within 3 %: weights, gradients and state of the example's model, 300 to 640 MB."""
    path = tmp_path / "model.pt"
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, dtype, state, str(path)],
        capture_output=True, text=True, timeout=240, check=True, cwd=root,
        env={**os.environ, "PYTHONPATH": f"{root}:{root / 'examples'}"},
    )  # fmt: skip
    measured = int(done.stdout)
    _, found = run_json(capsys, "plan", path)
    (choice,) = (
        each for each in found["choices"] if (each["dtype"], each["state_format"], each["ranks"]) == (name, state, 1)
    )
    assert choice["total"] == pytest.approx(measured, rel=0.03)


@pytest.mark.parametrize("state", NAMES)
def test_the_plan_of_stepping_in_backward_is_what_the_example_holds_then(state):
    """The gradients that are alive at once: of the largest weight alone, to the byte."""
    config = train_gpt.Config(layers=2, context=16, batch=1)
    codes = train_gpt.encode("a small text" * 10)[:17][None]
    peak = backward.peak(
        lambda: train_gpt.GPT(config), lambda model: train_gpt.cross_entropy(model, codes), in_backward=True
    )
    found = plan.need([tuple(param.shape) for param in train_gpt.GPT(config).parameters()], "float32", state, 1)
    assert found.in_backward == peak.gradients
    assert found.total_in_backward == found.total - found.gradients + peak.gradients


# bench


def test_a_table_of_steps(capsys, tmp_path):
    listed, picture = tmp_path / "shapes.txt", tmp_path / "roof.png"
    listed.write_text("20 * 64x64\n64\n")
    arguments = ["bench", "--shapes", listed, "--rounds", 3, "--format", "fp32", "--format", "8bit", "--plot", picture]
    status, out, _ = run(capsys, *arguments)
    assert status == 0
    assert "shapes.txt: 21 tensors, 81,984 parameters, float32 weights" in out
    for name in ("lucid fp32", "lucid 8bit", "torch fused", "torch foreach", "torch default"):
        assert name in out
    assert picture.read_bytes().startswith(b"\x89PNG")

    status, found = run_json(capsys, *arguments, "--peer", "fused", "--dtype", "bfloat16")
    assert status == 0
    assert list(found["contenders"]) == ["lucid fp32", "lucid 8bit", "torch fused"]
    assert {len(samples) for samples in found["samples"].values()} == {3}
    by_hand = {"lucid fp32": 26, "torch fused": 14}  # bytes a parameter that a step of bfloat16 weights moves
    for name, each in found["contenders"].items():
        assert each["milliseconds"] > 0
        assert each["gigabytes_a_second"] * 1e6 * each["milliseconds"] == pytest.approx(
            each["bytes_a_parameter"] * 81_984
        )
        if name in by_hand:
            assert each["bytes_a_parameter"] == pytest.approx(by_hand[name], rel=0.01)


def test_what_does_not_fit_is_refused_before_it_is_made(capsys, monkeypatch):
    monkeypatch.setattr(machine, "free_memory", lambda: 2.0**30)
    status, _, err = run(capsys, "bench", "--like", "llama-1b")
    assert status == 2
    assert "1.00 GiB are free: name fewer with --format and --peer" in err


def test_nothing_to_step_is_refused(capsys, tmp_path):
    (tmp_path / "none.txt").write_text("0x5\n3x0\n")
    status, _, err = run(capsys, "bench", "--shapes", tmp_path / "none.txt", "--rounds", 1)
    assert status == 2
    assert "tensors without elements" in err


def test_who_fails_costs_not_the_others():
    def broken(params):
        raise RuntimeError("not on this machine\nmore of it")

    own = Format("lucid fp32").contender()
    found = steps.time_steps([own, Contender("broken", broken)], [(64, 64)], 2, "cpu")
    assert found.failures == {"broken": "RuntimeError: not on this machine"}
    assert set(found.samples) == {LIMIT, "lucid fp32"}


def test_a_contender_that_was_not_timed_is_named_and_is_the_exit_status(capsys, tmp_path, monkeypatch):
    def broken(params):
        raise RuntimeError("not on this machine")

    monkeypatch.setattr(bench, "_own", lambda dtype, state_format: Contender(f"lucid {state_format}", broken))
    (tmp_path / "a.txt").write_text("64x64")
    arguments = ["bench", "--shapes", tmp_path / "a.txt", "--rounds", 1, "--format", "fp32", "--peer", "fused"]
    status, out, _ = run(capsys, *arguments)
    assert status == 1
    assert "lucid fp32 was not measured. RuntimeError: not on this machine" in out


def test_the_part_of_the_limit_is_of_bytes_a_second():
    found = steps.StepTimes(10, {LIMIT: [1.0, 2.0], FUSED: [2.0, 4.0]}, {LIMIT: 100.0, FUSED: 150.0}, {})
    assert found.of_limit(FUSED).median == pytest.approx(0.75)
    assert found.gigabytes(FUSED) == pytest.approx(50e-9)


def test_what_a_step_moves_is_counted_from_the_formats():
    models = MODELS["gpt2-small"]()
    by_hand = {"torch fused": 28, "torch fused bf16": 14, "lucid": 28, "lucid bf16": 20, "lucid 8bit": 12 + 4.125}
    for kind in FORMATS:
        if kind.name in by_hand:
            moved = kind.contender().moved(models) / elements(models)
            assert moved == pytest.approx(by_hand[kind.name], rel=0.005)


def test_the_models_are_as_large_as_they_are_known_to_be():
    sizes = {name: elements(make()) for name, make in MODELS.items()}
    assert sizes == {"gpt2-small": 124_439_808, "resnet50": 25_557_032, "llama-1b": 1_235_814_400}
