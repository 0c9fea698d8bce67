"""Guards training with Lightning: one process, DDP, FSDP2; it saves, resumes, schedules, clips, accumulates."""

import functools
import logging
import math
import warnings

import lightning.pytorch as lightning
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard

import lucid.optim as optim
from frameworks import (
    EPOCHS,
    LIGHTNINGS_WARNINGS,
    MICRO,
    STEPS,
    Trained,
    as_torchrun,
    assert_resumes,
    assert_same_bits,
    make_loader,
    make_net,
    of_8_bits,
    outcome,
    that_clips,
    with_ours,
    with_torchs,
)

pytestmark = [pytest.mark.filterwarnings(f"ignore:{said}:{kind.__name__}") for said, kind in LIGHTNINGS_WARNINGS]


class Lit(lightning.LightningModule):
    """A net of three layers, its optimizer, a schedule by steps."""

    def __init__(self, make, shard=False, dtype=torch.float32):
        super().__init__()
        self.make, self.shard, self.type = make, shard, dtype
        self.net = make_net()
        self.losses = []

    def configure_model(self):
        if self.shard:
            for module in (self.net[0], self.net[3], self.net):
                fully_shard(module, mesh=self.device_mesh["data_parallel"])

    def on_train_batch_start(self, batch, number):
        torch.manual_seed(100 * self.current_epoch + number)  # Lightning does not keep the state of generators

    def training_step(self, batch, number):
        x, y = batch
        loss = (self.net(x) - y).square().mean()
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        optimizer = self.make(self.net.parameters())
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=STEPS + 1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def train_dataloader(self):
        return make_loader(self.type, self.trainer.world_size)


def trainer_of(**options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    return lightning.Trainer(accelerator="cpu", **{"devices": 1, "max_epochs": EPOCHS, **quiet, **options})


def strategy_of(kind):
    if not kind.startswith("fsdp2"):
        return kind
    return ModelParallelStrategy(
        data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=kind == "fsdp2, shards"
    )


def train(make, *, clip=None, dtype=torch.float32, saves=None, resumes=None, kind="auto", devices=1):
    """Train three epochs, and save after each; or go on from the first."""
    lit = Lit(make, shard=kind.startswith("fsdp2"), dtype=dtype)
    callbacks = [] if saves is None else [ModelCheckpoint(dirpath=saves, filename="{epoch}", save_top_k=-1)]
    trainer = trainer_of(
        strategy=strategy_of(kind),
        devices=devices,
        precision="bf16-true" if dtype == torch.bfloat16 else "32-true",
        accumulate_grad_batches=MICRO,
        gradient_clip_val=clip,
        callbacks=callbacks,
        enable_checkpointing=bool(callbacks),
    )
    trainer.fit(lit, ckpt_path=None if resumes is None else f"{resumes}/epoch=0.ckpt")
    (optimizer,) = trainer.optimizers
    assert trainer.global_step == STEPS
    assert [int(optimizer.state[param]["step"]) for param in lit.net.parameters()] == [STEPS] * 6
    norm = getattr(optimizer, "grad_norm", None)
    return Trained(lit.losses, outcome(lit.net, optimizer), norm=None if norm is None else float(norm))


def assert_trains_as_with_torchs(run):
    plain, theirs = run(with_torchs), run(with_torchs, clip=1.0)
    torch.testing.assert_close(run(with_ours).losses, plain.losses, rtol=1e-4, atol=1e-5)
    for ours in (run(with_ours, clip=1.0), run(that_clips)):
        torch.testing.assert_close(ours.losses, theirs.losses, rtol=1e-4, atol=1e-5)
    assert ours.norm > 1
    assert theirs.losses[-1] != pytest.approx(plain.losses[-1], rel=1e-2)


# One process


def test_one_process_trains_as_with_torchs_adamw():
    assert_trains_as_with_torchs(train)


def test_one_process_resumes_with_the_same_bits(tmp_path):
    assert_resumes(train, tmp_path)


def test_the_learning_rate_monitor_sees_what_it_sees_of_torch(tmp_path):
    found = []
    for make in (with_torchs, with_ours):
        monitor = LearningRateMonitor("step", log_momentum=True, log_weight_decay=True)
        trainer = trainer_of(
            callbacks=[monitor],
            logger=CSVLogger(tmp_path / make.__name__),
            log_every_n_steps=1,
            accumulate_grad_batches=MICRO,
            enable_checkpointing=False,
        )
        trainer.fit(Lit(make))
        found.append((monitor.lrs, monitor.last_momentum_values, monitor.last_weight_decay_values))
    assert found[0] == found[1]
    (momentum,) = found[1][1].values()
    assert 0.8 < momentum < 1


class ByHand(Lit):
    """Manual optimization, stepping in backward if asked to."""

    def __init__(self, make, in_backward):
        super().__init__(make)
        self.automatic_optimization = False
        self.in_backward = in_backward

    def configure_optimizers(self):
        return self.make(self.net.parameters())

    def on_train_start(self):
        self.optimizers(use_pl_optimizer=False).step_in_backward(self.in_backward)

    def training_step(self, batch, number):
        optimizer = self.optimizers(use_pl_optimizer=False)  # Lightning's own steps with a closure that does nothing
        optimizer.zero_grad()
        self.manual_backward((self.net(batch[0]) - batch[1]).square().mean())
        assert all((param.grad is None) == self.in_backward for param in self.net.parameters())
        optimizer.step()


def test_manual_optimization_may_step_in_backward():
    found = []
    for in_backward in (False, True):
        lit = ByHand(with_ours, in_backward)
        trainer = trainer_of(max_epochs=1, enable_checkpointing=False)
        trainer.fit(lit)
        found.append(outcome(lit.net, trainer.optimizers[0]))
    assert_same_bits(*found)


def test_automatic_optimization_may_not():
    class InBackward(Lit):
        def on_train_start(self):
            self.optimizers(use_pl_optimizer=False).step_in_backward()

    with pytest.raises(RuntimeError, match="does not work after step_in_backward"):
        trainer_of(enable_checkpointing=False).fit(InBackward(with_ours))


def wrapped(**options):
    own = optim.AdamW([torch.nn.Parameter(torch.ones(3))], **options)
    return own, LightningOptimizer(own)


def test_lightnings_wrapper_has_torchs_interface():
    own, wrapper = wrapped(lr=0.5)
    assert isinstance(wrapper, optim.AdamW)
    assert wrapper.state is own.state
    assert wrapper.param_groups is own.param_groups
    assert wrapper.defaults["betas"] == (0.9, 0.999)


def test_lightnings_wrapper_has_ours():
    own, wrapper = wrapped(max_grad_norm=1.0, nonfinite="skip")
    assert (wrapper.max_grad_norm, wrapper.nonfinite) == (1.0, "skip")
    wrapper.max_grad_norm = 0.5
    assert own.max_grad_norm == 0.5
    wrapper.observe()
    (param,) = own.param_groups[0]["params"]
    for value, skipped in ((1.0, 0), (math.nan, 1)):
        param.grad = torch.full_like(param, value)
        own.step()
        assert wrapper.skipped_steps == own.skipped_steps == skipped
    assert wrapper.statistics() == own.statistics()
    wrapper.observe(False)
    with pytest.raises(RuntimeError, match="no step has been observed"):
        own.statistics()
    wrapper.max_grad_norm = None
    wrapper.step_in_backward()
    with wrapper.accumulate():
        param.sum().backward()
    assert param.grad is not None
    param.sum().backward()
    assert param.grad is None
    wrapper.step_in_backward(False)
    param.sum().backward()
    assert param.grad is not None


# Several processes


def in_processes(kind, folder):
    run = functools.partial(train, kind=kind, devices=2)
    with as_torchrun():
        for said, category in LIGHTNINGS_WARNINGS:
            warnings.filterwarnings("ignore", said, category)
        if kind != "fsdp2, shards":
            assert_trains_as_with_torchs(run)
        assert_resumes(run, folder)
        return run(of_8_bits, dtype=torch.bfloat16).bits


@pytest.mark.slow
def test_ddp(ranks, tmp_path):
    one, two = ranks.run(2, in_processes, "ddp", str(tmp_path))
    assert_same_bits(one, two)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fsdp2, shards", "fsdp2, one file"])
def test_fsdp2(ranks, tmp_path, kind):
    one, two = ranks.run(2, in_processes, kind, str(tmp_path))
    assert not all(map(torch.equal, one, two))
