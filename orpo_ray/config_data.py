"""The data section of a run: sources of pairs, how they are read, cut, ordered and refused."""

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from orpo_ray.config_sections import Place, PositiveInt, Section, Share


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
