"""Settings of the objective and of the training loop."""

from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from orpo_ray.config.fields import Interval, PositiveInt, Section, Share, setting

OBJECTIVE_SETTINGS: Mapping[str, frozenset[str]] = {
    "orpo": frozenset({"beta"}),
    "simpo": frozenset({"beta", "simpo_gamma", "cpo_alpha", "label_smoothing"}),
    "cpo": frozenset({"beta", "loss_type", "cpo_alpha", "label_smoothing"}),
    "sft": frozenset(),
}
"""The settings that decide the loss of an objective; the others do nothing there."""


class OrpoSection(Section):
    """The objective; for orpo, loss = NLL - beta * mean(logsigmoid(log odds)) + router loss."""

    objective: Literal["orpo", "simpo", "cpo", "sft"] = setting(
        "orpo",
        "What is minimised. sft: the NLL of the chosen answers; rejected ones are not computed, "
        "and rows need none.",
        decides="weights",
    )
    beta: float = setting(
        0.1,
        "Weight of the odds-ratio term (lambda in the paper). simpo, cpo: scale of the margin "
        "(simpo's paper: 2 to 2.5).",
        decides="weights",
        ge=0.0,
        le=100.0,
    )
    loss_type: Literal["sigmoid", "hinge", "ipo"] = setting(
        "sigmoid", "Function of the margin in objective cpo.", decides="weights"
    )
    simpo_gamma: float = setting(
        0.5,
        "Margin to reach in objective simpo, after scaling by beta.",
        decides="weights",
        ge=0.0,
        le=100.0,
    )
    cpo_alpha: float = setting(
        1.0,
        "Weight of the NLL in objectives cpo and simpo. 0 is SimPO as in its paper.",
        decides="weights",
        ge=0.0,
        le=100.0,
    )
    label_smoothing: float = setting(
        0.0,
        "Share of pairs taken to be labelled the wrong way round, in simpo and in cpo's sigmoid.",
        decides="weights",
        ge=0.0,
        lt=0.5,
    )
    nll_scope: Literal["all", "completion"] | None = setting(
        None,
        "Tokens that the NLL is averaged over. all: prompt and chosen answer; completion: the "
        "chosen answer only. Default: all for orpo and completion for the others, as in TRL.",
        decides="weights",
    )
    router_aux_loss_coef: float | None = setting(
        None,
        "Weight of the router's load-balancing loss of mixture-of-experts models. Default: the "
        "model config's.",
        decides="weights",
        ge=0.0,
        le=100.0,
    )

    @model_validator(mode="after")
    def _defined(self) -> Self:
        if self.objective == "cpo" and self.loss_type == "ipo" and self.beta == 0:
            raise ValueError("beta: 0, which loss_type=ipo divides by; set one above 0")
        return self

    @property
    def prompt_counts(self) -> bool:
        """Whether the NLL includes prompt tokens."""
        return self.in_nll == "all"

    @property
    def chosen_alone(self) -> bool:
        """Whether rejected answers are neither needed nor computed."""
        return self.objective == "sft"

    @property
    def in_nll(self) -> Literal["all", "completion"]:
        """`nll_scope`, or its default for the objective."""
        return self.nll_scope or ("all" if self.objective == "orpo" else "completion")

    @property
    def text(self) -> str:
        """The objective and its settings for people, `beta 0.1` or `simpo, beta 2, ...`."""
        used = OBJECTIVE_SETTINGS[self.objective]
        settings = [f"{n} {getattr(self, n)}" for n in type(self).model_fields if n in used]
        return ", ".join([*([] if self.objective == "orpo" else [self.objective]), *settings])

    def unused(self) -> tuple[str, ...]:
        """Settings that were given another value than their default and that do nothing here."""
        fields, used = type(self).model_fields, OBJECTIVE_SETTINGS[self.objective]
        others = frozenset().union(*OBJECTIVE_SETTINGS.values()) - used
        return tuple(n for n in fields if n in others and getattr(self, n) != fields[n].default)


def _some_steps(value: int) -> int:
    if value == 0:
        raise ValueError("0 steps: set a number from 1, or -1 for num_train_epochs")
    return value


class TrainSection(Section):
    """The optimizer, batch sizes, and intervals of logging, evaluation and checkpoints."""

    learning_rate: float = setting(
        8e-6, "Peak learning rate (8e-6 in the paper).", decides="weights", ge=0.0, le=1.0
    )
    lr_scheduler_type: Literal[
        "linear",
        "cosine",
        "constant",
        "constant_with_warmup",
        "polynomial",
        "inverse_sqrt",
        "cosine_with_restarts",
        "cosine_with_min_lr",
        "warmup_stable_decay",
    ] = setting(
        "linear",
        "Learning-rate schedule, by its name in transformers.get_scheduler.",
        decides="weights",
    )
    lr_scheduler_kwargs: dict[str, bool | int | float | str] | None = setting(
        None,
        "Arguments of the schedule, such as min_lr of cosine_with_min_lr. Default: its own.",
        decides="weights",
    )
    warmup_ratio: Share = setting(
        0.0, "Fraction of all steps in which the learning rate warms up.", decides="weights"
    )
    warmup_steps: int = setting(
        0,
        "Number of steps in which the learning rate warms up. Overrides warmup_ratio unless 0.",
        decides="weights",
        ge=0,
    )
    optim: Literal["adamw", "adamw_8bit", "adafactor"] = setting(
        "adamw",
        "Optimizer. adamw: its state has 8 bytes a weight; adamw_8bit: 2, with the package "
        "torchao; adafactor: next to none, and no adam_ settings.",
        decides="weights",
    )
    weight_decay: float = setting(
        0.0,
        "The optimizer's weight decay, which norms and biases are exempt from.",
        decides="weights",
        ge=0.0,
        le=10.0,
    )
    adam_beta1: float = setting(
        0.9,
        "AdamW's decay rate of the first moment (beta1).",
        decides="weights",
        ge=0.0,
        lt=1.0,
    )
    adam_beta2: float = setting(
        0.999,
        "AdamW's decay rate of the second moment (beta2).",
        decides="weights",
        ge=0.0,
        lt=1.0,
    )
    adam_epsilon: float = setting(
        1e-8,
        "AdamW's epsilon, added to the denominator of an update.",
        decides="weights",
        gt=0.0,
        le=1.0,
    )
    max_grad_norm: float = setting(
        1.0,
        "Norm that gradients are clipped to. 0 turns clipping off.",
        decides="weights",
        ge=0.0,
        le=1e9,
    )
    num_train_epochs: float = setting(
        3.0, "Number of passes over the training pairs.", decides="run", gt=0.0, le=1e6
    )
    max_steps: Annotated[int, AfterValidator(_some_steps)] = setting(
        -1,
        "Number of optimizer steps. Overrides num_train_epochs unless -1.",
        decides="run",
        ge=-1,
    )
    per_device_train_batch_size: PositiveInt = setting(
        8, "Pairs per worker and forward pass.", decides="run"
    )
    gradient_accumulation_steps: PositiveInt = setting(
        1, "Number of forward passes per optimizer step.", decides="run"
    )
    global_batch_size: PositiveInt | None = setting(
        None,
        "Pairs per optimizer step, over all workers. Default: per_device_train_batch_size x "
        "gradient_accumulation_steps x num_workers.",
        decides="run",
    )
    per_device_eval_batch_size: PositiveInt = setting(
        16, "Pairs per worker and forward pass in evaluation.", decides="run"
    )
    max_tokens_per_microbatch: PositiveInt | Literal["auto"] | None = setting(
        None,
        "Maximum number of tokens per forward pass. auto: what fits on the GPU, by measurement. "
        "Default: per_device_train_batch_size x max_length.",
        decides="run",
    )
    head_chunk_tokens: PositiveInt | None = setting(
        None,
        "Number of positions whose logits exist at the same time. Default: 1024, on GPUs 4096, "
        "less for vocabularies above 64 k.",
        decides="run",
    )
    bf16: bool | None = setting(
        None,
        "Compute in bfloat16, with fp32 master weights. Default: on GPUs that support it.",
        decides="weights",
    )
    gradient_checkpointing: bool = setting(
        False,
        "Recompute activations in the backward pass, which saves memory and costs time.",
        decides="run",
    )
    gradient_checkpointing_every: PositiveInt = setting(
        1, "With gradient_checkpointing, recompute every n-th decoder layer only.", decides="run"
    )
    cpu_offload: bool = setting(
        False,
        "Keep weights, gradients and optimizer state in host memory, on GPUs.",
        decides="run",
    )
    logging_steps: Interval | None = setting(
        10,
        "Number of optimizer steps between lines of metrics.jsonl, a share of all steps, or epoch. "
        "null: after the last step only.",
        decides="run",
    )
    logging_first_step: bool = setting(
        False, "Write a line of metrics.jsonl after the first step as well.", decides="run"
    )
    eval_steps: Interval | None = setting(
        None,
        "Number of optimizer steps between evaluations, a share of all steps, or epoch. Default: "
        "evaluate before the first and after the last step only.",
        decides="run",
    )
    metric_for_best_model: str = setting(
        "eval_loss",
        "Metric that selects the best evaluation, by its name in metrics.jsonl.",
        decides="run",
        min_length=1,
    )
    greater_is_better: bool | None = setting(
        None,
        "Whether a higher metric_for_best_model is better. Default: unless its name ends in loss.",
        decides="run",
    )
    load_best_model_at_end: bool = setting(
        False,
        "Export the model of the best evaluation to final/ and keep its checkpoint. Default: "
        "export the last model.",
        decides="run",
    )
    early_stopping_patience: PositiveInt | None = setting(
        None,
        "Number of consecutive evaluations without improvement after which training stops. "
        "Default: never.",
        decides="run",
    )
    sample_prompts: Annotated[int, Field(ge=0)] | tuple[str, ...] = setting(
        4,
        "Prompts that the model answers at every evaluation: a number of held-out prompts (0 for "
        "none), or a list of texts.",
        decides="run",
    )
    max_new_tokens: PositiveInt = setting(
        64, "Maximum number of new tokens per sample.", decides="run"
    )
    save_steps: Interval | None = setting(
        500,
        "Number of optimizer steps between checkpoints, a share of all steps, or epoch. null: "
        "after the last step only.",
        decides="run",
    )
    save_total_limit: PositiveInt | None = setting(
        2, "Number of checkpoints to keep; older ones are deleted. null keeps all.", decides="run"
    )
    resume_changed: bool = setting(
        False,
        "Resume from a checkpoint that was made with other settings or other pairs.",
        decides="run",
    )
    on_nonfinite: Literal["stop", "skip"] = setting(
        "stop",
        "What to do when a loss or gradient is NaN or infinite. stop: end the run before the "
        "update; skip: leave out the rows that cause it.",
        decides="run",
    )
    max_skipped_rows: PositiveInt = setting(
        100,
        "Maximum number of rows that on_nonfinite=skip leaves out before the run stops.",
        decides="run",
    )
    full_determinism: bool = setting(
        False,
        "Use deterministic kernels on GPUs, which are slower and give the same bytes every time.",
        decides="weights",
    )
    seed: int = setting(
        42,
        "Seed of the order of pairs, of dropout, and of new adapters and demo weights.",
        decides="weights",
        ge=0,
        lt=2**32,
    )

    data_seed: int | None = setting(
        None,
        "Seed of the order of pairs. Default: seed.",
        decides="weights",
        ge=0,
        lt=2**32,
    )

    def head_chunk(self, vocab_size: int = 0, on_gpu: bool = False) -> int:
        """`head_chunk_tokens`, or its default: on GPUs few launches, at most 1 GiB of logits."""
        if self.head_chunk_tokens is not None:
            return self.head_chunk_tokens
        return max(1024, min(4096, 2**28 // max(1, vocab_size))) if on_gpu else 1024

    @model_validator(mode="after")
    def _state_in_one_place(self) -> Self:
        if self.cpu_offload and self.optim == "adamw_8bit":
            raise ValueError(
                "optim: adamw_8bit is not offloaded to host memory: set cpu_offload=false or "
                "optim=adamw"
            )
        return self

    @model_validator(mode="after")
    def _best_of_some(self) -> Self:
        chosen = (self.load_best_model_at_end, self.early_stopping_patience is not None)
        if any(chosen) and self.eval_steps is None:
            name = "load_best_model_at_end" if chosen[0] else "early_stopping_patience"
            raise ValueError(
                f"{name}: nothing is evaluated between the start and the end; set eval_steps"
            )
        return self
