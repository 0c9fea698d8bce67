"""Train the GPT of train_gpt.py on several processes: FSDP2, 8-bit state, clipping, checkpoints for any number.

    torchrun --standalone --nproc-per-node 2 examples/train_fsdp.py                   # two to three minutes on 2 cores
    torchrun --standalone --nproc-per-node 2 examples/train_fsdp.py --stop-after 300  # stops early
    torchrun --standalone --nproc-per-node 3 examples/train_fsdp.py --resume          # resumes on another number

Each process holds its shard of every parameter, gradient and moment, and trains on its share of the batch. The global
batch is the same for any number of processes, so training is the same except for the rounding of sums. The example uses
GPUs if there are any (not tested), otherwise CPUs.

A checkpoint is a folder, `--out`/step-000100. torch writes its `.metadata` last. If a process is killed while saving,
the folder has no `.metadata`, and `--resume` uses the last complete checkpoint. A new run raises an error if `--out`
already has checkpoints.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, distributed
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from train_gpt import EVERY, GPT, Config, Corpus, cross_entropy, lr_factor, make_optimizer  # type: ignore[import-not-found]

COMMAND = "torchrun --standalone --nproc-per-node 2 examples/train_fsdp.py"


def held_here(tensors: Iterable[Tensor]) -> int:
    """Return how many bytes of the tensors this process holds."""
    return sum((tensor.to_local() if isinstance(tensor, DTensor) else tensor).nbytes for tensor in tensors)


class Run(Stateful):
    """A sharded model in training, and what a checkpoint holds."""

    def __init__(self, config: Config, corpus: Corpus, device: torch.device) -> None:
        self.config, self.corpus, self.device = config, corpus, device
        self.rank, self.world = distributed.get_rank(), distributed.get_world_size()
        self.identity = asdict(config) | {"text": corpus.digest}
        torch.manual_seed(config.seed)  # all processes start from the same weights, each keeps its shard
        self.model = GPT(config).to(device)
        for module in (*self.model.blocks, self.model):  # each block, then the rest
            fully_shard(module)
        self.optimizer = make_optimizer(self.model, config)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: lr_factor(step, config))
        self.losses: list[float] = []  # of every step, in nats per character, the mean over all processes

    @property
    def step(self) -> int:
        """The number of steps done, including those before a resume; it gives the position in the data."""
        return len(self.losses)

    def advance(self) -> None:
        """Do one training step."""
        codes = self.corpus.batch(self.config, self.step).tensor_split(self.world)[self.rank]
        share = len(codes) * self.world / self.config.batch  # FSDP takes the mean over processes
        loss = share * cross_entropy(self.model, codes.to(self.device))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        distributed.all_reduce(mean := loss.detach() / self.world)
        self.losses.append(mean.item())

    def smoothed_loss(self) -> float:
        """Return the mean loss of the last 50 steps."""
        return statistics.fmean(self.losses[-50:])

    def memory(self) -> str:
        """Return a table of the bytes that each process holds, and that torch's AdamW would take."""
        weights = list(self.model.parameters())
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        state = [value for entry in self.optimizer.state.values() for value in entry.values()]
        own = [held_here(weights), held_here(gradients), held_here(state)]
        every: list[list[int]] = [[]] * self.world
        distributed.all_gather_object(every, own)
        size = 4 * sum(weight.numel() for weight in weights)  # of float32
        rows = {f"rank {rank}": held for rank, held in enumerate(every)}
        rows["torch's AdamW under FSDP2, a rank"] = [round(part * size / self.world) for part in (1, 1, 2)]
        rows["torch's AdamW under DDP, a rank"] = [size, size, 2 * size]
        lines = [f"{'bytes':<35}" + "".join(f"{x:>13}" for x in ("weights", "gradients", "state", "together"))]
        lines += [f"{name:<35}" + "".join(f"{x:>13,}" for x in (*held, sum(held))) for name, held in rows.items()]
        return "\n".join(lines)

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        own = {"identity": dict(self.identity), "losses": list(self.losses), "schedule": self.schedule.state_dict()}
        return own | {"model": model, "optimizer": optimizer}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        model, optimizer = state_dict["model"], state_dict["optimizer"]
        set_state_dict(self.model, self.optimizer, model_state_dict=model, optim_state_dict=optimizer)
        self.schedule.load_state_dict(state_dict["schedule"])
        self.losses = state_dict["losses"]

    def save(self, out: Path) -> None:
        """Write a checkpoint, each process its shard; it is complete once `.metadata` exists."""
        save({"run": self}, checkpoint_id=out / f"step-{self.step:06}")

    def load(self, folder: Path) -> None:
        """Load a checkpoint of any number of processes, or raise ValueError if it belongs to another run."""
        saved: dict[str, Any] = {"run": {"identity": dict(self.identity)}}
        load(saved, checkpoint_id=folder)
        for name, value in self.identity.items():
            if (other := saved["run"]["identity"][name]) != value:
                raise ValueError(f"{folder} was made with {name} {other!r}, this run has {value!r}")
        load({"run": self}, checkpoint_id=folder)


def last_whole(out: Path) -> Path | None:
    """Return the folder of the last complete checkpoint."""
    return max((path.parent for path in out.glob("step-*/.metadata")), default=None)


def train(run: Run, last: int, every: int, out: Path) -> None:
    """Advance to step `last`, saving every `every` steps and at the end."""
    bar = tqdm(total=run.config.steps, initial=run.step, disable=None if run.rank == 0 else True, unit="step")
    while run.step < last:
        run.advance()
        bar.set_postfix_str(f"loss {run.smoothed_loss():.3f}", refresh=False)
        bar.update()
        if run.step % every == 0 or run.step == last:
            run.save(out)
    bar.close()


class Parser(argparse.ArgumentParser):
    """Prints an error once, not on every process."""

    def error(self, message: str) -> NoReturn:
        if int(os.environ.get("RANK", 0)):
            time.sleep(30)  # torchrun ends this process once rank 0 has printed the error
            raise SystemExit(2)
        super().error(message)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line on this process; return the exit status."""
    parser = Parser(description="Train a small GPT on several processes, by torchrun.", usage=f"{COMMAND} [options]")
    parser.add_argument("--state", choices=("fp32", "bf16", "8bit"), default="8bit", help="format of the moments")
    parser.add_argument("--steps", type=int, default=Config().steps)
    parser.add_argument("--every", type=int, default=EVERY, metavar="STEPS", help="steps between two checkpoints")
    parser.add_argument("--stop-after", type=int, metavar="STEP", help="stop after this step; --resume continues")
    parser.add_argument("--resume", action="store_true", help="continue from the last complete checkpoint in --out")
    parser.add_argument("--out", type=Path, default=Path("runs/fsdp"), help="folder for checkpoints")
    options = parser.parse_args(arguments)
    last = options.steps if options.stop_after is None else min(options.steps, options.stop_after)
    if min(last, options.every) < 1:
        parser.error("--steps, --every and --stop-after must be at least 1")
    if "RANK" not in os.environ:
        parser.error(f"start this with torchrun: {COMMAND}")
    config = Config(steps=options.steps, state=options.state)
    if int(os.environ["WORLD_SIZE"]) > config.batch:
        parser.error(
            f"expected at most {config.batch} processes, one per window of a batch, got {os.environ['WORLD_SIZE']}"
        )
    found = last_whole(options.out)
    if options.resume and found is None:
        parser.error(f"--resume: {options.out} has no complete checkpoint; run without --resume first")
    if found is not None and not options.resume:
        parser.error(f"{found} exists: add --resume to continue from it, or give another --out")

    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    distributed.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        run = Run(config, Corpus(), device)
        if found is not None:
            try:
                run.load(found)
            except ValueError as error:
                parser.error(str(error))
        say = print if run.rank == 0 else lambda *_, **__: None
        size, start = sum(weight.numel() for weight in run.model.parameters()), found or "the start"
        say(f"{size:,} parameters on {run.world} processes ({device.type}), from {start}\n{run.memory()}", flush=True)
        train(run, last, options.every, options.out)
        say(f"{run.memory()}\nafter step {run.step}: loss {run.smoothed_loss():.4f}, the mean of 50 steps")
        if run.step < config.steps:
            say(f"stopped at step {run.step} of {config.steps}: add --resume to continue, on any number of processes")
    finally:
        distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
