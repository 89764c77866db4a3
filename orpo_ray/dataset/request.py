"""What decides the tokens of a data set; on the driver and in data tasks."""

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orpo_ray.preference.shapes import RowReader
from orpo_ray.preference.tokenization import Limits, PairTokenizer
from orpo_ray.pretrained import ModelSource, load_tokenizer

MapTasks = Callable[[list[dict[str, Any]], Any], list[dict[str, Any]]]
"""Runs `work({"item": JSON})`, which gives a list of such rows, on each of some small descriptions.

With Ray Data it is `orchestration.tasks.map_tasks`.
"""

TRAIN = "train"
"""The name of the training pairs' token set; evaluation sets have names of their own."""


@dataclass(frozen=True)
class IngestRequest:
    """What decides the tokens, and where they are cached.

    Args:
        files: absolute paths or URLs, in order.
        tokenizer: folder or hub id.
        revision: of a hub tokenizer.
        limits: of the lengths of a pair.
        shard_rows: source rows in one token shard.
        cache_directory: parent of the token sets, on storage that every node reaches.
        reader: finds the pairs of a row.
        chat_template: the text of one, instead of the tokenizer's.
        special_tokens: whether texts may hold special tokens, `refuse` or `allow`.
        group_by_prompt: whether pairs of one prompt become one group.
        val_set_size: share of the prompts whose pairs are held out.
        drop_duplicates: whether a pair that occurred before is left out.
        other_sets: directories of token sets whose prompts are left out.
        subset_column: column that says which part of an evaluation set a row belongs to.
        trust_remote_code: whether code that comes with the tokenizer may run.
    """

    files: tuple[str, ...]
    tokenizer: str
    revision: str | None
    limits: Limits
    shard_rows: int
    cache_directory: str
    reader: RowReader = field(default_factory=RowReader)
    chat_template: str | None = None
    special_tokens: str = "refuse"
    group_by_prompt: bool = False
    val_set_size: float = 0.0
    drop_duplicates: bool = False
    other_sets: tuple[str, ...] = ()
    subset_column: str | None = None
    trust_remote_code: bool = False

    def pair_tokenizer(self) -> PairTokenizer:
        """The tokenizer with its limits, loaded once a process as long as its files stay."""
        folder = Path(self.tokenizer)
        stats = [path.stat() for path in sorted(folder.iterdir())] if folder.is_dir() else []
        files = tuple((stat.st_size, stat.st_mtime_ns) for stat in stats)
        source = ModelSource(
            self.tokenizer,
            self.tokenizer,
            self.revision,
            self.chat_template,
            self.trust_remote_code,
        )
        return _load_tokenizer(source, self.limits, files)


@functools.lru_cache(maxsize=8)
def _load_tokenizer(
    source: ModelSource, limits: Limits, files: tuple[tuple[int, int], ...]
) -> PairTokenizer:
    """The tokenizer of a folder or hub id.

    Raises:
        DataError: when it cannot be used for pairs.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a data task has one CPU
    return PairTokenizer(load_tokenizer(source), limits)
