"""The command line: subcommands, arguments and options."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

import typer

app = typer.Typer(
    help="AdamW for PyTorch with native engines: which of them run on this machine, how fast, in how much memory, and "
    "what a checkpoint holds.",
    epilog="Exit status: 0 everything is fine; 1 the answer is no (problems, nothing fits, an engine is missing); "
    "2 the command could not answer.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


class Like(StrEnum):
    """Models with known shapes."""

    gpt2_small = "gpt2-small"
    resnet50 = "resnet50"
    llama_1b = "llama-1b"


class StateFormat(StrEnum):
    """State formats."""

    fp32 = "fp32"
    bf16 = "bf16"
    eight_bit = "8bit"


class MasterWeights(StrEnum):
    """What is kept beside 16-bit parameters."""

    true = "true"
    false = "false"
    stochastic = "stochastic"


class Target(StrEnum):
    """Formats to convert to."""

    fp32 = "fp32"
    bf16 = "bf16"
    eight_bit = "8bit"
    torch = "torch"


class Dtype(StrEnum):
    """Dtypes of weights and gradients."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class StateDevice(StrEnum):
    """Where state may be, if not on the weights' device."""

    cpu = "cpu"
    moments = "cpu:moments"


class Peer(StrEnum):
    """Other optimizers."""

    fused = "fused"
    foreach = "foreach"
    default = "default"
    deepspeed = "deepspeed"
    bitsandbytes = "bitsandbytes"
    torchao = "torchao"
    flashoptim = "flashoptim"


_SAVED = "A file of torch.save, or the folder of a distributed checkpoint."
Weights = Annotated[
    Path | None,
    typer.Argument(metavar="CHECKPOINT", help="A model's weights: a file of torch.save or safetensors, or a folder."),
]
LikeOption = Annotated[Like | None, typer.Option("--like", help="The shapes of a known model.")]
Shapes = Annotated[
    Path | None,
    typer.Option("--shapes", help='A file with one shape per line, like "768x3072" or "12 * 768x768", or JSON.'),
]


def _version(asked: bool) -> None:
    if asked:
        import lucid

        print(f"lucid-optim {lucid.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None: ...


@app.command()
def info(
    json: Json = False,
    measure: Annotated[bool, typer.Option(help="Measure the memory bandwidth; takes some seconds.")] = True,
) -> None:
    """Show the engines that run on this machine, SIMD level, threads, versions and memory bandwidth."""
    from . import info as command

    raise typer.Exit(command.run(json=json, measure=measure))


@app.command()
def bench(
    checkpoint: Weights = None,
    like: LikeOption = None,
    shapes: Shapes = None,
    dtype: Annotated[Dtype, typer.Option(help="Dtype of weights and gradients.")] = Dtype.float32,
    state_format: Annotated[
        list[StateFormat] | None, typer.Option("--format", help="State format to time; may be repeated.")
    ] = None,
    peer: Annotated[
        list[Peer] | None, typer.Option(help="Other optimizer to time; may be repeated. By default torch's own.")
    ] = None,
    device: Annotated[str, typer.Option(help="Device: cpu, or cuda, cuda:1 and so on.")] = "cpu",
    rounds: Annotated[int, typer.Option(min=1, help="Number of rounds; slow optimizers take part in fewer.")] = 21,
    json: Json = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the roofline into this file (.png, .svg, .pdf).")] = None,
) -> None:
    """Time a step of your shapes, and compare it with other optimizers and memory bandwidth."""
    from . import bench as command
    from .shapes import chosen

    model = chosen(checkpoint, like and like.value, shapes, default="gpt2-small")
    formats = [each.value for each in state_format or [StateFormat.fp32, StateFormat.eight_bit]]
    peers = None if peer is None else [each.value for each in peer]
    raise typer.Exit(command.run(model, dtype.value, formats, peers, device, rounds, json=json, plot=plot))


@app.command()
def plan(
    checkpoint: Weights = None,
    like: LikeOption = None,
    shapes: Shapes = None,
    parameters: Annotated[
        str | None, typer.Option(help="A number of parameters, like 1.3B, if you do not know the shapes yet.")
    ] = None,
    layout: Annotated[str, typer.Option(help="The shape of the tensors for --parameters.")] = "4096x4096",
    ranks: Annotated[
        int, typer.Option(min=1, help="Largest number of FSDP2 processes to plan for: 1, 2, 4, ... up to it.")
    ] = 1,
    memory: Annotated[
        str | None, typer.Option(help="Memory of each process's device, like 24GiB: marks what fits.")
    ] = None,
    amsgrad: Annotated[bool, typer.Option("--amsgrad", help="Plan for amsgrad.")] = False,
    state_device: Annotated[
        StateDevice | None, typer.Option(help="Plan for weights on a GPU, and state or its moments on the host.")
    ] = None,
    step_in_backward: Annotated[
        bool, typer.Option("--step-in-backward", help="Plan for step_in_backward(), which frees gradients at once.")
    ] = False,
    ema: Annotated[bool, typer.Option("--ema", help="Plan for averages of the weights (ema_decay).")] = False,
    master_weights: Annotated[
        MasterWeights, typer.Option(help="As the argument of AdamW, for 16-bit weights.")
    ] = MasterWeights.true,
    json: Json = False,
) -> None:
    """Compute bytes of weights, gradients and state before you train, in every format, and what fits."""
    from . import plan as command
    from .shapes import chosen, counted

    if parameters is not None:
        model = counted(parameters, layout, others=(checkpoint, like, shapes))
    else:
        model = chosen(checkpoint, like and like.value, shapes)
    kept: bool | Literal["stochastic"] = "stochastic" if master_weights == "stochastic" else master_weights == "true"
    options = command.Options(amsgrad, ema, kept, state_device and state_device.value, step_in_backward)
    raise typer.Exit(command.run(model, ranks, memory, options, json=json))


@app.command()
def inspect(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help=_SAVED)],
    weights: Annotated[
        Path | None, typer.Option(help="The model's weights, if the checkpoint does not hold them.")
    ] = None,
    json: Json = False,
    plot: Annotated[Path | None, typer.Option(help="Draw moments and ratios into this file.")] = None,
) -> None:
    """Describe saved optimizer state, parameter by parameter; exit status 1 if anything is odd."""
    from . import inspect as command

    raise typer.Exit(command.run(checkpoint, weights=weights, json=json, plot=plot))


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(metavar="IN", help=_SAVED)],
    target: Annotated[
        str, typer.Argument(metavar="OUT", help="The same kind as IN, or a file if it ends in .pt, a folder if in /.")
    ],
    to: Annotated[Target, typer.Option(help="A state format, or torch for torch.optim.AdamW.")],
    json: Json = False,
) -> None:
    """Convert optimizer state between formats and optimizers; the rest of the checkpoint stays as it is."""
    from . import convert as command

    raise typer.Exit(command.run(source, target, to.value, json=json))
