"""The command line: what can be asked, and of what."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="AdamW for PyTorch on an engine of its own: what runs here, how fast, in how much memory, and what a "
    "checkpoint holds.",
    epilog="Exit status: 0 all is well; 1 the answer is no (oddities, nothing fits, an engine is missing); 2 the "
    "question could not be answered.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


class Like(StrEnum):
    """Models whose shapes are known."""

    gpt2_small = "gpt2-small"
    resnet50 = "resnet50"
    llama_1b = "llama-1b"


class StateFormat(StrEnum):
    """How moments are kept."""

    fp32 = "fp32"
    bf16 = "bf16"
    eight_bit = "8bit"


class Target(StrEnum):
    """What to convert to."""

    fp32 = "fp32"
    bf16 = "bf16"
    eight_bit = "8bit"
    torch = "torch"


class Dtype(StrEnum):
    """Of weights and gradients."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Peer(StrEnum):
    """Other optimizers."""

    fused = "fused"
    foreach = "foreach"
    default = "default"
    deepspeed = "deepspeed"
    bitsandbytes = "bitsandbytes"
    torchao = "torchao"
    flashoptim = "flashoptim"


_SAVED = "A file of torch.save, or a folder of distributed checkpoints."
Weights = Annotated[
    Path | None,
    typer.Argument(metavar="CHECKPOINT", help="A model's weights: a file of torch.save or safetensors, or a folder."),
]
LikeOption = Annotated[Like | None, typer.Option("--like", help="The shapes of a known model.")]
Shapes = Annotated[
    Path | None,
    typer.Option("--shapes", help='A file with a shape a line, like "768x3072" or "12 * 768x768", or JSON.'),
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
    measure: Annotated[bool, typer.Option(help="Measure the memory's speed; takes some seconds.")] = True,
) -> None:
    """Engines that run here and why not the others, SIMD level, threads, versions, the memory's limit."""
    from . import info as command

    raise typer.Exit(command.run(json=json, measure=measure))


@app.command()
def bench(
    checkpoint: Weights = None,
    like: LikeOption = None,
    shapes: Shapes = None,
    dtype: Annotated[Dtype, typer.Option(help="Of weights and gradients.")] = Dtype.float32,
    state_format: Annotated[
        list[StateFormat] | None, typer.Option("--format", help="State formats to time; may be repeated.")
    ] = None,
    peer: Annotated[
        list[Peer] | None, typer.Option(help="Who is timed beside; may be repeated. By default torch's own.")
    ] = None,
    device: Annotated[str, typer.Option(help="Where: cpu, or cuda, cuda:1 and so on.")] = "cpu",
    rounds: Annotated[int, typer.Option(min=1, help="How often each takes its turn; slow ones less often.")] = 21,
    json: Json = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the roofline into this file (.png, .svg, .pdf).")] = None,
) -> None:
    """Time a step of your shapes beside other optimizers' and the memory's limit."""
    from . import bench as command
    from .shapes import chosen

    case = chosen(checkpoint, like and like.value, shapes, default="gpt2-small")
    formats = [each.value for each in state_format or [StateFormat.fp32, StateFormat.eight_bit]]
    peers = None if peer is None else [each.value for each in peer]
    raise typer.Exit(command.run(case, dtype.value, formats, peers, device, rounds, json=json, plot=plot))


@app.command()
def plan(
    checkpoint: Weights = None,
    like: LikeOption = None,
    shapes: Shapes = None,
    parameters: Annotated[
        str | None, typer.Option(help="How many parameters, like 1.3B, where shapes are not known yet.")
    ] = None,
    layout: Annotated[str, typer.Option(help="The shape of the tensors that --parameters are in.")] = "4096x4096",
    ranks: Annotated[
        int, typer.Option(min=1, help="Up to how many processes to share it among (FSDP2): 1, 2, 4, ...")
    ] = 1,
    memory: Annotated[str | None, typer.Option(help="What each process has, like 24GiB: says what fits.")] = None,
    amsgrad: Annotated[bool, typer.Option("--amsgrad", help="With the maximum of past squared gradients.")] = False,
    json: Json = False,
) -> None:
    """Bytes of weights, gradients and state before you train, in every format; what fits into a given memory."""
    from . import plan as command
    from .shapes import chosen, counted

    if parameters is not None:
        case = counted(parameters, layout, others=(checkpoint, like, shapes))
    else:
        case = chosen(checkpoint, like and like.value, shapes)
    raise typer.Exit(command.run(case, ranks, memory, amsgrad=amsgrad, json=json))


@app.command()
def inspect(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help=_SAVED)],
    weights: Annotated[
        Path | None, typer.Option(help="The model's weights, where the checkpoint does not hold them.")
    ] = None,
    json: Json = False,
    plot: Annotated[Path | None, typer.Option(help="Draw moments and ratios into this file.")] = None,
) -> None:
    """What an optimizer's saved state is like, parameter by parameter; exit status 1 where anything is odd."""
    from . import inspect as command

    raise typer.Exit(command.run(checkpoint, weights=weights, json=json, plot=plot))


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(metavar="IN", help=_SAVED)],
    target: Annotated[
        str, typer.Argument(metavar="OUT", help="The same kind as IN; a file where it ends in .pt, a folder in /.")
    ],
    to: Annotated[Target, typer.Option(help="A state format of ours, or torch.optim.AdamW's.")],
    json: Json = False,
) -> None:
    """Convert optimizer state between formats and optimizers; what else the checkpoint holds stays as it is."""
    from . import convert as command

    raise typer.Exit(command.run(source, target, to.value, json=json))
