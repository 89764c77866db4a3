"""What is trained, and how: settings of model, objective and training, and what a section is."""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from orpo_ray.bucket import PROTOCOLS
from orpo_ray.config_secrets import HIDDEN, find_secrets

PositiveInt = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
_COMMIT = re.compile(r"[0-9a-f]{40}")


def _some_steps(value: int) -> int:
    if value == 0:
        raise ValueError("0 steps: give a number of steps, or -1 to go by epochs")
    return value


def _known_place(value: str) -> str:
    protocol, is_url, rest = value.partition("://")
    if is_url and (protocol not in PROTOCOLS or not rest.strip("/")):
        raise ValueError("give a path, s3://bucket/folder or gs://bucket/folder")
    return value.rstrip("/") if is_url else value


Place = Annotated[str, AfterValidator(_known_place)]


class Section(BaseModel):
    """A frozen group of settings that knows no keys but its own, and takes no secrets."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, coerce_numbers_to_str=True
    )

    @model_validator(mode="before")
    @classmethod
    def _no_secrets(cls, values: Any) -> Any:
        findings = find_secrets(values)
        if findings:
            # An error of pydantic's own making would show the input.
            details = [
                InitErrorDetails(
                    type=PydanticCustomError("secret", "{text}", {"text": text}), input=HIDDEN
                )
                for text in findings
            ]
            raise ValidationError.from_exception_data(cls.__name__, details, hide_input=True)
        return values


class ModelSection(Section):
    """The base model and its tokenizer."""

    model_name_or_path: str | None = Field(
        None, description="Folder or hub id of the base model; unset: the demo's, from scratch."
    )
    model_revision: str | None = Field(None, description="Branch, tag or commit of a hub model.")
    trust_remote_code: bool = Field(
        False, description="Run a model's own code, at the commit hash in model_revision."
    )
    baseline: str | None = Field(
        None, description="A second model, which jobs/evaluate.py compares with the first."
    )
    attention: Literal["auto", "packed", "padded"] = Field(
        "auto", description="auto packs where that is exact for the model, and says what it chose."
    )
    attention_kernel: Literal["auto", "varlen", "flash_attn", "flex", "sdpa"] = Field(
        "auto", description="Of packed rows; auto takes the first of these that can run."
    )
    disable_dropout: bool = Field(True, description="Set every dropout of the model to 0.")
    torch_compile: bool = Field(False, description="Compile the decoder layers.")
    use_liger_kernel: bool | None = Field(
        None,
        description=(
            "Whether Liger's kernels compute norms, MLPs and rotary embeddings on GPUs. Default: "
            "where liger-kernel is installed and knows the model, unless layers are compiled."
        ),
    )
    lora_r: PositiveInt | None = Field(
        None, description="Rank of LoRA adapters; unset: all weights are trained."
    )
    lora_alpha: float = Field(32.0, gt=0.0, le=1e6, description="Adapters count alpha / r.")
    lora_dropout: float = Field(0.0, ge=0.0, lt=1.0, description="On what goes into an adapter.")
    lora_target_modules: tuple[str, ...] | None = Field(
        None, description="Names of adapted linear layers; unset: all but the head."
    )
    load_in_4bit: bool = Field(
        False, description="QLoRA, on GPUs: the base model in 4 bits, a copy on every worker."
    )
    merge_adapter: bool = Field(
        False, description="final/ is the merged model; unset: the adapter alone."
    )

    @model_validator(mode="after")
    def _pinned_code(self) -> Self:
        if self.trust_remote_code and not _COMMIT.fullmatch(self.model_revision or ""):
            raise ValueError(
                "trust_remote_code runs code that comes with a model: set model_revision to the "
                "full commit hash (40 hex digits) that was read; for a folder, to that of the hub "
                "model whose code it names"
            )
        return self

    @model_validator(mode="after")
    def _adapters(self) -> Self:
        if self.load_in_4bit and self.lora_r is None:
            raise ValueError("load_in_4bit: weights in 4 bits are not trained: set lora_r")
        if self.lora_r is None and (self.merge_adapter or self.lora_target_modules):
            raise ValueError("merge_adapter and lora_target_modules are for LoRA: set lora_r")
        return self


class OrpoSection(Section):
    """The objective: loss = NLL - beta * mean(logsigmoid(log odds)) + router loss."""

    beta: float = Field(0.1, ge=0.0, le=100.0, description="Weight of the odds-ratio term.")
    nll_scope: Literal["all", "completion"] = Field(
        "all", description="NLL over prompt and chosen answer (as TRL), or the answer only."
    )
    router_aux_loss_coef: float | None = Field(
        None, ge=0.0, le=100.0, description="Weight of the MoE router loss; unset: the model's."
    )


class TrainSection(Section):
    """The optimizer, its schedule, batch sizes, and how often things happen."""

    learning_rate: float = Field(8e-6, ge=0.0, le=1.0, description="Peak rate (paper: 8e-6).")
    lr_scheduler_type: Literal[
        "linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt"
    ] = Field("linear", description="A schedule of transformers.get_scheduler.")
    warmup_ratio: Share = Field(0.0, description="Share of all steps spent warming up.")
    warmup_steps: int = Field(0, ge=0, description="The same in steps; wins over warmup_ratio.")
    weight_decay: float = Field(0.0, ge=0.0, le=10.0, description="Not on norms and biases.")
    adam_beta1: float = Field(0.9, ge=0.0, lt=1.0, description="AdamW's beta1.")
    adam_beta2: float = Field(0.999, ge=0.0, lt=1.0, description="AdamW's beta2.")
    adam_epsilon: float = Field(1e-8, gt=0.0, le=1.0, description="AdamW's epsilon.")
    max_grad_norm: float = Field(1.0, ge=0.0, le=1e9, description="Clip above it; 0: never.")
    num_train_epochs: float = Field(3.0, gt=0.0, le=1e6, description="Passes over the pairs.")
    max_steps: Annotated[int, AfterValidator(_some_steps)] = Field(
        -1, ge=-1, description="Optimizer steps; wins over epochs; -1: unset."
    )
    per_device_train_batch_size: PositiveInt = Field(8, description="Pairs a worker and pass.")
    gradient_accumulation_steps: PositiveInt = Field(1, description="Passes an optimizer step.")
    global_batch_size: PositiveInt | None = Field(
        None, description="Pairs an optimizer step; unset: the two above x num_workers."
    )
    per_device_eval_batch_size: PositiveInt = Field(16, description="Pairs a worker and pass.")
    max_tokens_per_microbatch: PositiveInt | Literal["auto"] | None = Field(
        None,
        description="Tokens one pass holds; unset: a worker's batch size x max_length; auto: "
        "what fits on the GPU.",
    )
    head_chunk_tokens: PositiveInt | None = Field(
        None,
        description=(
            "Number of positions whose logits exist at the same time. Default: 1024, on GPUs 4096, "
            "less for vocabularies above 64 k."
        ),
    )
    bf16: bool | None = Field(None, description="Compute in bfloat16; unset: on GPUs only.")
    gradient_checkpointing: bool = Field(False, description="Recompute activations: less memory.")
    gradient_checkpointing_every: PositiveInt = Field(
        1, description="With it: in every n-th layer only."
    )
    cpu_offload: bool = Field(
        False, description="On GPUs: keep weights, gradients and optimizer state on the host."
    )
    logging_steps: PositiveInt = Field(10, description="Steps between lines of metrics.jsonl.")
    eval_steps: PositiveInt | None = Field(
        None, description="Steps between evaluations; unset: only at the start and the end."
    )
    metric_for_best_model: str = Field(
        "eval_loss", min_length=1, description="What the best evaluation is best at."
    )
    greater_is_better: bool | None = Field(
        None, description="Of that metric; unset: false for losses, else true."
    )
    load_best_model_at_end: bool = Field(
        False, description="final/ is the model of the best evaluation, whose checkpoint is kept."
    )
    early_stopping_patience: PositiveInt | None = Field(
        None, description="Evaluations in a row that are no better, after which training stops."
    )
    sample_prompts: Annotated[int, Field(ge=0)] | tuple[str, ...] = Field(
        4, description="Prompts answered at every evaluation: so many held-out ones, or texts."
    )
    max_new_tokens: PositiveInt = Field(64, description="Most tokens of such an answer.")
    save_steps: PositiveInt = Field(500, description="Steps between checkpoints.")
    save_total_limit: PositiveInt | None = Field(2, description="Checkpoints kept; null: all.")
    resume_changed: bool = Field(
        False, description="Go on from a checkpoint that was made with other settings or data."
    )
    on_nonfinite: Literal["stop", "skip"] = Field(
        "stop", description="skip leaves out the rows whose loss is NaN or infinite."
    )
    max_skipped_rows: PositiveInt = Field(100, description="on_nonfinite=skip stops above it.")
    full_determinism: bool = Field(
        False, description="On GPUs: slower kernels, which give the same bytes each time."
    )
    seed: int = Field(42, ge=0, lt=2**32, description="Of the order, dropout and demo weights.")

    def head_chunk(self, vocab_size: int = 0, on_gpu: bool = False) -> int:
        """`head_chunk_tokens`, or its default: on GPUs few launches, at most 1 GiB of logits."""
        if self.head_chunk_tokens is not None:
            return self.head_chunk_tokens
        return max(1024, min(4096, 2**28 // max(1, vocab_size))) if on_gpu else 1024

    @model_validator(mode="after")
    def _best_of_some(self) -> Self:
        chosen = (self.load_best_model_at_end, self.early_stopping_patience is not None)
        if any(chosen) and self.eval_steps is None:
            name = "load_best_model_at_end" if chosen[0] else "early_stopping_patience"
            raise ValueError(
                f"{name}: nothing is evaluated between the start and the end; set eval_steps"
            )
        return self
