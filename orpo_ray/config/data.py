"""Settings of the preference pairs: where they are, how they are tokenized, and their order."""

from collections.abc import Mapping
from datetime import datetime
from difflib import get_close_matches
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from orpo_ray.config.fields import Place, PositiveInt, Section, Share, setting
from orpo_ray.preference.layouts import COLUMN_NAMES
from orpo_ray.preference.templates import TEMPLATE_DATE


class DataSource(Section):
    """One source of a mixture of pairs.

    Args:
        path: a path, glob, folder or URL.
        weight: how many times each pair is trained per epoch.
        name: in reports, and of an evaluation set in its metrics.
    """

    path: str = Field(min_length=1)
    weight: float = Field(1.0, gt=0.0, le=1000.0)
    name: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")


class DataSection(Section):
    """The preference pairs, how they are tokenized, and their order."""

    train_files: tuple[str | DataSource, ...] | None = setting(
        None,
        "Training pairs: paths, globs, folders, URLs, or {path, weight, name} of a mixture. "
        "Default: the demo's generated pairs.",
        decides="tokens",
    )
    eval_files: tuple[str | DataSource, ...] | None = setting(
        None,
        "Evaluation pairs, given as train_files are; each name is an evaluation set of its own. "
        "Default: none, or val_set_size's.",
        decides="tokens",
    )
    eval_subset_column: str | None = setting(
        None,
        "Column whose values jobs/evaluate.py groups its metrics by. Default: no groups.",
        decides="tokens",
    )
    val_set_size: float = setting(
        0.0,
        "Fraction of the training prompts held out for evaluation.",
        decides="tokens",
        ge=0.0,
        lt=1.0,
    )
    dataset_name: str | None = setting(
        None, "Hub id of a data set, instead of train_files.", decides="tokens"
    )
    dataset_config: str | None = setting(
        None, "Configuration of dataset_name. Default: the data set's own.", decides="tokens"
    )
    dataset_revision: str | None = setting(
        None,
        "Branch, tag or commit of dataset_name. Default: the hub's main branch.",
        decides="tokens",
    )
    dataset_train_split: str = setting(
        "train", "Split of dataset_name to train on.", decides="tokens"
    )
    dataset_test_split: str | None = setting(
        None, "Split of dataset_name to evaluate on. Default: none.", decides="tokens"
    )
    column_mapping: dict[str, str] | None = setting(
        None,
        "Names of the data's columns for prompt, chosen, rejected and others, where they differ.",
        decides="tokens",
    )
    min_score_gap: float | None = setting(
        None,
        "Minimum difference between the scores of two answers that make a pair. Default: any.",
        decides="tokens",
        ge=0.0,
    )
    chat_template: str | None = setting(
        None, "Path or text of a chat template. Default: the tokenizer's.", decides="tokens"
    )
    template_date: str = setting(
        TEMPLATE_DATE,
        "Date, as YYYY-MM-DD, for chat templates that write today's date, so that the same data "
        "gives the same tokens on any day.",
        decides="tokens",
        pattern=r"^\d{4}-\d{2}-\d{2}$",
    )
    template_drops: Literal["warn", "refuse"] = setting(
        "warn",
        "How to treat rows of which the chat template leaves out a message, tools, tool calls or "
        "thoughts. warn: count them; refuse: refuse the row.",
        decides="tokens",
    )
    max_length: int = setting(
        1024, "Maximum number of tokens of prompt and answer together.", decides="tokens", ge=2
    )
    max_prompt_length: PositiveInt | None = setting(
        None,
        "Maximum number of tokens of a prompt. Default: what the answers leave of max_length, and "
        "half of it in any case.",
        decides="tokens",
    )
    max_completion_length: PositiveInt | None = setting(
        None,
        "Maximum number of tokens of an answer, which is truncated at its end. Default: what "
        "the prompt leaves of max_length.",
        decides="tokens",
    )
    truncation: Literal["keep_end", "keep_start", "drop", "error"] = setting(
        "keep_end",
        "How to treat a prompt that is too long. keep_end and keep_start truncate it; drop and "
        "error refuse the row.",
        decides="tokens",
    )
    special_tokens_in_text: Literal["refuse", "allow"] = setting(
        "refuse",
        "How to treat texts that contain special tokens of the tokenizer. refuse: refuse the row; "
        "allow: encode them as special tokens.",
        decides="tokens",
    )
    drop_duplicates: bool = setting(
        False, "Train on pairs that occur more than once only once.", decides="tokens"
    )
    drop_overlap: bool = setting(
        False,
        "Leave out training pairs whose prompt is in an evaluation set too.",
        decides="tokens",
    )
    max_bad_fraction: Share = setting(
        0.01,
        "Maximum fraction of refused rows; a run with more stops before training.",
        decides="run",
    )
    group_by_prompt: bool = setting(
        False,
        "Train all pairs of a prompt together and compute the prompt once. Batch sizes then count "
        "prompts.",
        decides="tokens",
    )
    shuffle: bool = setting(
        True,
        "Shuffle the training pairs in every epoch. false keeps the files' order.",
        decides="weights",
    )
    shuffle_window_shards: PositiveInt = setting(
        16,
        "Number of token shards whose rows are shuffled together and held in memory.",
        decides="weights",
    )
    shard_rows: PositiveInt = setting(
        4096, "Number of source rows per token shard.", decides="tokens"
    )
    token_cache_dir: Place | None = setting(
        None,
        "Folder or URL that token shards are cached in. Default: <output_dir>/token_cache.",
        decides="run",
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

    @field_validator("column_mapping")
    @classmethod
    def _known_columns(cls, mapping: dict[str, str] | None) -> dict[str, str] | None:
        for name in mapping or ():
            if name not in COLUMN_NAMES:
                near = get_close_matches(name, COLUMN_NAMES, n=1)
                hint = f"did you mean {near[0]}?" if near else "prompt, chosen, rejected are some"
                raise ValueError(f"{name} is not a column that any format reads; {hint}")
        return mapping

    @field_validator("template_date")
    @classmethod
    def _is_date(cls, date: str) -> str:
        datetime.fromisoformat(date)
        return date

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.train_files is not None and self.dataset_name is not None:
            raise ValueError("train_files and dataset_name are both set: keep one")
        if self.max_prompt_length and self.max_prompt_length >= self.max_length:
            raise ValueError(
                f"max_prompt_length={self.max_prompt_length} leaves no token of "
                f"max_length={self.max_length} for an answer: lower it"
            )
        weights = {s.weight for s in self.train_files or () if isinstance(s, DataSource)}
        if self.group_by_prompt and weights - {1.0}:
            raise ValueError(
                "group_by_prompt merges the pairs of all sources and takes no weights: drop either"
            )
        return self
