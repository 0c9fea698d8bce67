"""Guards transformers' schedulers, and its Trainer with an optimizer and a schedule that were made before it.

Both are compared with torch's AdamW in the same hands. `test_transformers.py` has the rest of Trainer.
"""

import pytest
import torch
from transformers import SchedulerType, Trainer, TrainingArguments, get_scheduler
from transformers.utils.logging import disable_progress_bar

import lucid.optim as optim
from beside_torch import OURS_AND_TORCHS, assert_close, make_model, train, with_groups
from frameworks import alone, forget  # noqa: F401
from llama import make_data, make_llama

OPTIONS = {  # what a schedule does not do without, or would not move in these few steps
    SchedulerType.REDUCE_ON_PLATEAU: {"patience": 1},
    SchedulerType.COSINE_WITH_MIN_LR: {"min_lr": 1e-3},
    SchedulerType.COSINE_WARMUP_WITH_MIN_LR: {"min_lr": 1e-3},
    SchedulerType.WARMUP_STABLE_DECAY: {"num_decay_steps": 3},
    SchedulerType.GREEDY: {"patience": 1},
}
BY_LOSS = (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)


@pytest.mark.parametrize("name", SchedulerType, ids=lambda name: name.value)
def test_schedulers_of_transformers_drive_us_as_they_drive_torch(name):
    runs = []
    for make in OURS_AND_TORCHS:
        model, seen = make_model(), []
        optimizer = with_groups(make, model)
        schedule = get_scheduler(name, optimizer, 3, 10, scheduler_specific_kwargs=OPTIONS.get(name))

        def after(optimizer=optimizer, schedule=schedule, seen=seen):
            schedule.step(*([1.0] if name in BY_LOSS else []))
            seen.append([(group["lr"], *group["betas"]) for group in optimizer.param_groups])

        train(model, optimizer, 0, 10, after)
        runs.append((model, seen))
    (ours, our_trajectory), (theirs, their_trajectory) = runs
    assert our_trajectory == their_trajectory
    assert (len({row[0][0] for row in our_trajectory}) > 1) == (name is not SchedulerType.CONSTANT)
    assert_close(ours, theirs)


def test_trainer_takes_an_optimizer_and_its_schedule(tmp_path):
    disable_progress_bar()
    found = []
    for make in OURS_AND_TORCHS:
        forget()
        model = make_llama()
        optimizer = make(optim.decay_groups(model, weight_decay=0.1), lr=1e-2)
        schedule = get_scheduler("cosine_with_min_lr", optimizer, 2, 9, scheduler_specific_kwargs={"min_lr": 1e-4})
        arguments = TrainingArguments(
            tmp_path, use_cpu=True, max_steps=9, logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=make_data(), optimizers=(optimizer, schedule))
        trainer.train()
        assert trainer.optimizer.optimizer is optimizer
        assert trainer.lr_scheduler is schedule
        assert all(int(optimizer.state[param]["step"]) == 9 for param in model.parameters())
        logs = [line for line in trainer.state.log_history if "loss" in line]
        found.append([[line[key] for line in logs] for key in ("loss", "learning_rate", "grad_norm")])
    (losses, rates, norms), (their_losses, their_rates, their_norms) = found
    assert rates == their_rates
    assert max(rates) == 1e-2
    assert rates[-1] < 1e-3
    torch.testing.assert_close(losses, their_losses, rtol=2e-5, atol=0)
    torch.testing.assert_close(norms, their_norms, rtol=1e-3, atol=0)
    assert losses[-1] < losses[0]
