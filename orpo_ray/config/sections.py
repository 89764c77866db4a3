"""The table of settings, by section."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from orpo_ray.config.secrets import HIDDEN, find_secrets
from orpo_ray.storage.bucket import PROTOCOLS

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
    attention_kernel: Literal["auto", "varlen", "flex", "sdpa"] = Field(
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


class DataSource(Section):
    """Some files of pairs, with what sets them apart from others in a mixture.

    Args:
        path: a path, glob, folder or URL.
        weight: how often each of their pairs is trained in an epoch.
        name: in reports, and of an evaluation set in its metrics.
    """

    path: str = Field(min_length=1)
    weight: float = Field(1.0, gt=0.0, le=1000.0)
    name: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")


class DataSection(Section):
    """Where the preference pairs come from, how they are read and cut, and in what order."""

    train_files: tuple[str | DataSource, ...] | None = Field(
        None, description="Paths, globs, folders, URLs, or {path, weight, name}; unset: the demo's."
    )
    eval_files: tuple[str | DataSource, ...] | None = Field(
        None, description="The same, for evaluation; each name is a set of its own."
    )
    eval_subset_column: str | None = Field(
        None, description="Column by whose values jobs/evaluate.py breaks its figures down."
    )
    val_set_size: float = Field(
        0.0, ge=0.0, lt=1.0, description="Share of the training prompts held out for evaluation."
    )
    dataset_name: str | None = Field(None, description="Hub id, instead of train_files.")
    dataset_config: str | None = Field(None, description="Configuration of dataset_name.")
    dataset_revision: str | None = Field(None, description="Branch, tag or commit of dataset_name.")
    dataset_train_split: str = Field("train", description="Split of dataset_name to train on.")
    dataset_test_split: str | None = Field(None, description="Split of dataset_name to evaluate.")
    column_mapping: dict[str, str] | None = Field(
        None, description="Column of the data for prompt, chosen, rejected, ... where names differ."
    )
    min_score_gap: float | None = Field(
        None, ge=0.0, description="Pairs whose scores lie nearer to each other are left out."
    )
    chat_template: str | None = Field(
        None, description="Path or text of a chat template; unset: the tokenizer's."
    )
    max_length: int = Field(1024, ge=2, description="Tokens of prompt plus completion.")
    max_prompt_length: PositiveInt | None = Field(
        None, description="Tokens of a prompt; unset: cut to fit, to half of max_length at most."
    )
    max_completion_length: PositiveInt | None = Field(
        None, description="Tokens of an answer, which loses its end; unset: what max_length leaves."
    )
    truncation: Literal["keep_end", "keep_start", "drop", "error"] = Field(
        "keep_end", description="What becomes of a prompt that is too long."
    )
    special_tokens_in_text: Literal["refuse", "allow"] = Field(
        "refuse", description="Whether texts may hold the tokenizer's special tokens."
    )
    drop_duplicates: bool = Field(False, description="Train the same pair once only.")
    drop_overlap: bool = Field(
        False, description="Do not train prompts that an evaluation set has too."
    )
    max_bad_fraction: Share = Field(
        0.01, description="A larger share of refused rows stops before training."
    )
    group_by_prompt: bool = Field(
        False, description="Pairs of one prompt share it; batch sizes then count prompts."
    )
    shuffle: bool = Field(True, description="false keeps the files' order.")
    shuffle_window_shards: PositiveInt = Field(
        16, description="Token shards whose rows are shuffled together, and held in memory."
    )
    shard_rows: PositiveInt = Field(4096, description="Source rows in one token shard.")
    token_cache_dir: Place | None = Field(
        None, description="Where token shards are cached; unset: <output_dir>/token_cache."
    )

    @model_validator(mode="before")
    @classmethod
    def _one_file_is_a_list(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        names = ("train_files", "eval_files")
        return {
            key: [value] if key in names and isinstance(value, str | Mapping) else value
            for key, value in values.items()
        }

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.train_files is not None and self.dataset_name is not None:
            raise ValueError("train_files and dataset_name are both set: keep one")
        if self.max_prompt_length and self.max_prompt_length >= self.max_length:
            raise ValueError("max_prompt_length leaves no token of max_length for an answer")
        weights = {s.weight for s in self.train_files or () if isinstance(s, DataSource)}
        if self.group_by_prompt and weights - {1.0}:
            raise ValueError("group_by_prompt puts sources together: it takes no weights")
        return self


def _some_workers(value: Any) -> Any:
    counts = list(value) if isinstance(value, list | tuple) and len(value) == 2 else [value]
    numbers = [count for count in counts if type(count) is int and count > 0]
    if numbers != counts or numbers != sorted(numbers):
        raise ValueError("give a number of workers from 1, or [least, most] of them")
    return value


class RaySection(Section):
    """What is asked of the Ray cluster, in Ray Train's own words."""

    num_workers: Annotated[int | tuple[int, int], BeforeValidator(_some_workers)] = Field(
        1, description="Training processes; [least, most]: as many as the cluster has room for."
    )
    use_gpu: bool | None = Field(None, description="A GPU each; unset: if the cluster has any.")
    resources_per_worker: dict[str, Annotated[float, Field(ge=0.0)]] | None = Field(
        None, description="Ray resources a worker; unset: its GPU, or its share of the CPUs."
    )
    accelerator_type: str | None = Field(
        None, description="Kind of GPU, as Ray names it: H100, A100, ...; unset: any."
    )
    placement_strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = Field(
        "PACK", description="Of the workers over the nodes; strict: or not at all."
    )
    shard_size: PositiveInt | None = Field(
        None, description="Workers that share one copy of the model, best a node's; unset: all."
    )
    cluster_wait_s: float = Field(
        0.0, ge=0.0, le=1e6, description="Longest wait for nodes that the workers need."
    )
    max_failures: int = Field(3, ge=-1, description="Worker group restarts; -1: no limit.")
    health_check_timeout_s: float = Field(
        120.0, gt=0.0, le=1e6, description="A worker that does not answer for so long is replaced."
    )
    process_group_timeout_s: float = Field(
        600.0, gt=0.0, le=1e6, description="Longest wait of a worker for the others."
    )

    @model_validator(mode="after")
    def _whole_copies(self) -> Self:
        if self.shard_size is None:
            return self
        if self.min_workers != self.max_workers:
            raise ValueError("shard_size: for a fixed num_workers only")
        if self.max_workers % self.shard_size:
            raise ValueError(
                f"shard_size: {self.max_workers} workers are no multiple of {self.shard_size}"
            )
        return self

    @property
    def min_workers(self) -> int:
        """Workers without which a run does not start."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def max_workers(self) -> int:
        """Workers that a run has at most."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]


class OutputSection(Section):
    """Where the run directory goes: <output_dir>/<run_name>."""

    output_dir: Place = Field(
        "runs", min_length=1, description="Parent of run directories: a path, s3:// or gs://."
    )
    run_name: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$",
        description="Folder of the run; an existing one goes on; unset: a new one by the time.",
    )
    report_to: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = Field(
        (), description="Trackers that metrics, config and reports go to as well."
    )


class TuneSection(Section):
    """What a sweep tries and how it chooses; `search.<setting>` says what is searched."""

    num_samples: PositiveInt = Field(8, description="Trials (for each point of a grid).")
    metric: str = Field(
        "eval_rewards/accuracies", min_length=1, description="What the best trial is best at."
    )
    metric_mode: Literal["max", "min"] | None = Field(
        None, description="unset: min for losses, else max."
    )
    repeats: int = Field(
        1, ge=1, le=100, description="Runs of each setting, with seeds that follow train.seed."
    )
    search_algorithm: Literal["random", "optuna"] = Field(
        "random", description="How values are drawn; optuna: TPE."
    )
    trial_scheduler: Literal["asha", "median", "none"] = Field(
        "asha", description="What stops weak trials early, at evaluations."
    )
    grace_steps: PositiveInt | None = Field(
        None, description="Steps that every trial gets; unset: to its first evaluation."
    )
    reduction_factor: int = Field(3, ge=2, le=100, description="ASHA goes on with 1 of so many.")
    max_concurrent_trials: PositiveInt | None = Field(
        None, description="Trials at a time; unset: as many as the cluster holds."
    )
    max_nll_increase: float | None = Field(
        0.1, ge=0.0, description="Nats of NLL a best trial may lose against the start; null: any."
    )
    compare_beta_zero: bool = Field(
        True, description="Run the best trial's settings with beta=0 too, for the report."
    )
