"""The optimizer and its learning-rate schedule; in training workers."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import get_scheduler

from orpo_ray.config.train import TrainSection
from orpo_ray.training.optimizers.adafactor import Adafactor


def build_optimizer(model: nn.Module, config: TrainSection) -> torch.optim.Optimizer:
    """The optimizer of all trainable parameters, without weight decay on norms and biases (1-D)."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if config.optim == "adafactor":
        return Adafactor(groups, config.learning_rate)
    adam: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
    }
    if config.optim == "adamw_8bit":
        from orpo_ray.training.optimizers.adamw_8bit import AdamW8bit

        eight_bit: torch.optim.Optimizer = AdamW8bit(groups, **adam)
        return eight_bit
    return torch.optim.AdamW(groups, **adam, fused=True)


def build_scheduler(optimizer: torch.optim.Optimizer, config: TrainSection, n_steps: int) -> Any:
    """The schedule of `lr_scheduler_type` over `n_steps` optimizer steps."""
    warmup_steps = config.warmup_steps or int(-(-n_steps * config.warmup_ratio // 1))
    return get_scheduler(
        config.lr_scheduler_type,
        optimizer=optimizer,
        num_warmup_steps=warmup_steps,
        num_training_steps=n_steps,
        scheduler_specific_kwargs=config.lr_scheduler_kwargs,
    )


def move_to_step(scheduler: Any, step: int) -> None:
    """Give the optimizer the learning rate that the schedule has after `step` steps.

    A checkpoint's own schedule is not restored: it is that of an earlier number of steps, or of
    another learning rate.

    Args:
        scheduler: of `build_scheduler`.
        step: optimizer steps done.
    """
    factors = (factor(step) for factor in scheduler.lr_lambdas)
    rates = [base * factor for base, factor in zip(scheduler.base_lrs, factors, strict=True)]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        if isinstance(group["lr"], Tensor):  # of torchao, which keeps it
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
    place = {"last_epoch": step, "_step_count": step + 1, "_last_lr": rates}
    scheduler.load_state_dict(scheduler.state_dict() | place)
