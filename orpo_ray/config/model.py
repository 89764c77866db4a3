"""Settings of the base model, its attention and its adapters."""

import re
from typing import Literal, Self

from pydantic import model_validator

from orpo_ray.config.fields import PositiveInt, Section, setting

_COMMIT = re.compile(r"[0-9a-f]{40}")


class ModelSection(Section):
    """The base model, its tokenizer, and its adapters."""

    model_name_or_path: str | None = setting(
        None,
        "Folder, URL or hub id of the base model and its tokenizer, or a GGUF file with both. "
        "Default: the demo's small decoder, trained from scratch.",
        decides="tokens",
    )
    model_revision: str | None = setting(
        None,
        "Branch, tag or commit of a hub model. Default: the hub's main branch.",
        decides="tokens",
    )
    trust_remote_code: bool = setting(
        False,
        "Run Python code that comes with the model. Requires the full commit hash in "
        "model_revision.",
        decides="tokens",
    )
    baseline: str | None = setting(
        None,
        "Folder, URL or hub id of a second model that jobs/evaluate.py compares with the first; or "
        "the run directory or evaluation.json of a finished evaluation. Default: no comparison.",
        decides="run",
    )
    attention: Literal["auto", "packed", "padded"] = setting(
        "auto",
        "Whether batches are packed rows or padded rows. auto: packed where that is exact for the "
        "model; the run's log says which.",
        decides="run",
    )
    attention_kernel: Literal["auto", "varlen", "flex", "sdpa"] = setting(
        "auto",
        "Attention kernel for packed rows. auto: the first of varlen, flex and sdpa that supports "
        "the model and the device.",
        decides="run",
    )
    disable_dropout: bool = setting(
        True, "Set every dropout probability of the model to 0.", decides="weights"
    )
    torch_compile: bool | None = setting(
        None,
        "Compile the decoder layers with torch.compile. Default: on one GPU, for models without "
        "adapters, experts and recurrences, unless full_determinism or use_liger_kernel is set.",
        decides="run",
    )
    use_liger_kernel: bool | None = setting(
        None,
        "Use Liger's kernels for norms, MLPs and rotary embeddings on GPUs. Default: where "
        "liger-kernel is installed and supports the model, unless layers are compiled.",
        decides="run",
    )
    frozen_weights: tuple[str, ...] = setting(
        (),
        "Weights that stay as they are, each by its name or that of a module, such as "
        "model.embed_tokens or model.layers.0.",
        decides="weights",
    )
    lora_r: PositiveInt | None = setting(
        None, "Rank of LoRA adapters. Default: no adapters, all weights train.", decides="weights"
    )
    lora_alpha: float = setting(
        32.0,
        "Numerator of the LoRA scaling factor lora_alpha / lora_r.",
        decides="weights",
        gt=0.0,
        le=1e6,
    )
    lora_dropout: float = setting(
        0.0,
        "Dropout probability of the inputs of LoRA adapters.",
        decides="weights",
        ge=0.0,
        lt=1.0,
    )
    lora_target_modules: tuple[str, ...] | None = setting(
        None,
        "Names of the linear layers that get LoRA adapters. Default: all but the LM head.",
        decides="weights",
    )
    load_in_4bit: bool = setting(
        False,
        "Load the base model in 4 bits for QLoRA, on GPUs only. Every worker holds a whole copy.",
        decides="weights",
    )
    merge_adapter: bool = setting(
        False,
        "Merge the LoRA adapter into the base model in final/. Default: final/ holds the adapter "
        "alone.",
        decides="run",
    )

    @model_validator(mode="after")
    def _pinned_code(self) -> Self:
        if self.trust_remote_code and not _COMMIT.fullmatch(self.model_revision or ""):
            raise ValueError(
                "trust_remote_code runs code that comes with a model: set model_revision to the "
                "full commit hash (40 hex digits) that you have reviewed; for a folder, to that of "
                "the hub model whose code it names"
            )
        return self

    @model_validator(mode="after")
    def _adapters(self) -> Self:
        if self.load_in_4bit and self.lora_r is None:
            raise ValueError("load_in_4bit: weights in 4 bits are not trained: set lora_r")
        if self.lora_r is not None and self.frozen_weights:
            raise ValueError("frozen_weights: with lora_r all weights are frozen but the adapters'")
        if self.lora_r is None and (self.merge_adapter or self.lora_target_modules):
            raise ValueError("merge_adapter and lora_target_modules are for LoRA: set lora_r")
        return self
