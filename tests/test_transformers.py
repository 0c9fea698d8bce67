"""Guards training with transformers' Trainer: one process, DDP, FSDP2; it saves, resumes, schedules, clips.

Its FSDP2 is Accelerate's, which has to be told that a CPU is a GPU (see `test_accelerate.py`), or its own, of models
that `from_pretrained` has sharded, which runs on CPUs.
"""

import functools

import pytest
import torch
from accelerate import DistributedType, PartialState
from torch.distributed.tensor import DTensor
from transformers import LlamaForCausalLM, PrinterCallback, Trainer, TrainingArguments
from transformers.distributed import DistributedConfig
from transformers.utils.logging import disable_progress_bar

import lucid.optim as optim
from frameworks import (  # noqa: F401
    EPOCHS,
    MICRO,
    STEPS,
    Trained,
    alone,
    as_torchrun,
    assert_resumes,
    assert_same_bits,
    forget,
    outcome,
)
from llama import make_data, make_llama


def train(
    options_for, *, clip=0.0, dtype=torch.float32, saves=None, resumes=None, fsdp=None, model=None, folder="unused"
):
    """Train three epochs, and save after each; or go on from the first."""
    forget()
    disable_progress_bar()
    more = {}
    if fsdp is not None:
        PartialState(cpu=True).distributed_type = DistributedType.MULTI_GPU
        wrap = {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], "state_dict_type": fsdp}
        more = {"fsdp": True, "fsdp_config": wrap, "accelerator_config": {"use_configured_state": True}}
    model = make_llama(dtype) if model is None else model
    parts = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    arguments = TrainingArguments(
        output_dir=saves or folder,
        use_cpu=True,
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=8 // parts,
        gradient_accumulation_steps=MICRO,
        learning_rate=1e-2,
        weight_decay=0.1,
        max_grad_norm=clip,
        lr_scheduler_type="cosine",
        warmup_steps=2,
        logging_steps=1,
        save_strategy="no" if saves is None else "epoch",
        dataloader_pin_memory=False,
        ddp_find_unused_parameters=False,
        report_to=[],
        disable_tqdm=True,
        log_level="error",
        **more,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=make_data(), **options_for(model))
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=None if resumes is None else f"{resumes}/checkpoint-{STEPS // EPOCHS}")
    own = trainer.optimizer.optimizer
    assert all(int(own.state[param]["step"]) == STEPS for param in model.parameters())
    logs = [line for line in trainer.state.log_history if "loss" in line]
    assert [line["learning_rate"] for line in logs][:3] == [0, 5e-3, 1e-2]
    assert logs[-1]["learning_rate"] == pytest.approx(4.95e-4, rel=1e-2)
    norm = getattr(own, "grad_norm", None)
    return Trained(
        [line["loss"] for line in logs],
        outcome(model, own),
        norms=[line["grad_norm"] for line in logs],
        norm=None if norm is None else float(norm),
        wrapped=type(trainer.model_wrapped).__name__,
    )


def with_torchs(model):
    return {}


def with_ours(model):
    return {"optimizer_cls_and_kwargs": (optim.AdamW, {"lr": 1e-2})}


def that_clips(model):
    return {"optimizer_cls_and_kwargs": (optim.AdamW, {"lr": 1e-2, "max_grad_norm": 0.5})}


def of_8_bits(model):
    return {"optimizer_cls_and_kwargs": (optim.AdamW, {"lr": 1e-2, "state_format": "8bit", "max_grad_norm": 0.5})}


def made_before(model):
    groups = optim.decay_groups(model, weight_decay=0.1)
    return {"optimizers": (optim.AdamW(groups, lr=1e-2, max_grad_norm=0.5), None)}


def assert_trains_as_with_torchs(run, *more):
    plain, theirs = run(with_torchs), run(with_torchs, clip=0.5)
    torch.testing.assert_close(run(with_ours).losses, plain.losses, rtol=2e-5, atol=0)
    found = [run(with_ours, clip=0.5), run(that_clips), *(run(options_for) for options_for in more)]
    for ours in found:
        torch.testing.assert_close(ours.norms, theirs.norms, rtol=1e-3, atol=0)
        torch.testing.assert_close(ours.losses, theirs.losses, rtol=2e-5, atol=0)
    for ours in found[1:]:
        assert ours.norm == pytest.approx(ours.norms[-1], rel=1e-4)
    assert min(theirs.norms) > 0.5
    assert theirs.losses[-1] != pytest.approx(plain.losses[-1], rel=2e-4)
    return found[0]


# A run that goes on tells all losses: those before are in the checkpoint.
RESUMING = {"that_clips": that_clips, "of_8_bits": of_8_bits, "epoch": 0}


# One process


def test_one_process_trains_as_with_torchs_adamw(tmp_path):
    assert_trains_as_with_torchs(functools.partial(train, folder=tmp_path), made_before)


def test_one_process_resumes_with_the_same_bits(tmp_path):
    assert_resumes(functools.partial(train, folder=tmp_path / "unused"), tmp_path, **RESUMING)


def test_stepping_in_backward_gives_the_same_bits(tmp_path):
    found = []
    for in_backward in (False, True):
        forget()
        model = make_llama()
        optimizer = optim.AdamW(model.parameters(), lr=1e-2)
        optimizer.step_in_backward(in_backward)
        arguments = TrainingArguments(
            output_dir=tmp_path, use_cpu=True, max_steps=4, max_grad_norm=0, save_strategy="no", report_to=[]
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=make_data(), optimizers=(optimizer, None))
        trainer.train()
        found.append(outcome(model, optimizer))
    assert_same_bits(*found)


# Several processes


def replicas(folder):
    with as_torchrun():
        run = functools.partial(train, folder=f"{folder}/unused")
        try:
            ours = assert_trains_as_with_torchs(run, made_before)
            assert ours.wrapped == "DistributedDataParallel"
            assert_resumes(run, folder, **RESUMING)
        finally:
            forget()
    return ours.bits


@pytest.mark.slow
def test_ddp(ranks, tmp_path):
    one, two = ranks.run(2, replicas, str(tmp_path))
    assert_same_bits(one, two)


def shards(folder, state_dict_type):
    with as_torchrun():
        run = functools.partial(train, folder=f"{folder}/unused", fsdp=state_dict_type)
        try:
            if state_dict_type == "SHARDED_STATE_DICT":
                ours = assert_trains_as_with_torchs(run)
                assert ours.wrapped == "FSDPLlamaForCausalLM"
            assert_resumes(run, folder, **RESUMING)
            with pytest.raises(RuntimeError, match="Passing `optimizers` is not allowed if PyTorch FSDP is enabled"):
                run(made_before)
        finally:
            forget()


@pytest.mark.slow
@pytest.mark.parametrize("state_dict_type", ["SHARDED_STATE_DICT", "FULL_STATE_DICT"])
def test_fsdp2_of_accelerate(ranks, tmp_path, state_dict_type):
    ranks.run(2, shards, str(tmp_path), state_dict_type)


def sharded_when_loaded(folder):
    def run(options_for, **more):
        config = DistributedConfig(fsdp_size=2)
        model = LlamaForCausalLM.from_pretrained(f"{folder}/model", distributed_config=config, dtype=torch.float32)
        assert all(isinstance(param, DTensor) for param in model.parameters())
        return train(options_for, model=model, folder=f"{folder}/unused", **more)

    with as_torchrun():
        try:
            assert_trains_as_with_torchs(run, made_before)
            with pytest.raises(ValueError, match="Resuming is not supported for models sharded at load time"):
                run(with_ours, saves=f"{folder}/saved")
        finally:
            forget()


@pytest.mark.slow
def test_fsdp2_of_transformers(ranks, tmp_path):
    make_llama().save_pretrained(tmp_path / "model")
    ranks.run(2, sharded_when_loaded, str(tmp_path))
