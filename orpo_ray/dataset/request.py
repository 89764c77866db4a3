"""The request for a token set: files and settings; on the driver and in data tasks."""

import functools
import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orpo_ray.preference.errors import DataError
from orpo_ray.preference.shapes import RowReader
from orpo_ray.preference.templates import TEMPLATE_DATE
from orpo_ray.preference.tokenization import Limits, PairTokenizer
from orpo_ray.pretrained import ModelSource, UnsupportedModelError, load_tokenizer
from orpo_ray.storage.folder import Folder, FolderLike

MapTasks = Callable[[list[dict[str, Any]], Any], list[dict[str, Any]]]
"""Runs a callable on every item and concatenates the items that it returns, in any order.

The callable receives and returns rows of the form `{"item": JSON}`. `orchestration.tasks.map_tasks`
does this with Ray Data.
"""

TRAIN = "train"
"""Name of the token set of the training pairs; evaluation sets have other names."""


@dataclass(frozen=True)
class IngestRequest:
    """Everything that determines a token set, and where it is cached.

    Args:
        files: absolute paths or URLs; their order is the order of pairs.
        tokenizer: hub id or path; a `Folder` for one in a bucket.
        revision: branch, tag or commit of a hub tokenizer.
        limits: maximum lengths and truncation of a pair.
        shard_rows: number of source rows in one token shard.
        cache_directory: parent folder of token sets, on storage shared by all nodes.
        reader: reads a row as pairs.
        chat_template: Jinja template that replaces the tokenizer's.
        special_tokens: `refuse` or `allow` rows whose text contains special tokens.
        template_drops: `warn` of or `refuse` rows of which the chat template leaves out a part.
        template_date: the date that chat templates which ask for today's get, as YYYY-MM-DD.
        group_by_prompt: whether all pairs of one prompt become one group.
        val_set_size: share of prompts, in [0, 1), whose pairs are held out.
        drop_duplicates: whether repeats of an earlier pair are dropped.
        other_sets: folders of token sets; pairs with a prompt of theirs are dropped.
        subset_column: column with the subset by which an evaluation set is broken down.
        trust_remote_code: whether custom code of the tokenizer may run.
    """

    files: tuple[str, ...]
    tokenizer: str | Folder
    revision: str | None
    limits: Limits
    shard_rows: int
    cache_directory: FolderLike
    reader: RowReader = field(default_factory=RowReader)
    chat_template: str | None = None
    special_tokens: str = "refuse"
    template_drops: str = "warn"
    template_date: str = TEMPLATE_DATE
    group_by_prompt: bool = False
    val_set_size: float = 0.0
    drop_duplicates: bool = False
    other_sets: tuple[Folder, ...] = ()
    subset_column: str | None = None
    trust_remote_code: bool = False

    def pair_tokenizer(self, pickled: bytes | None = None) -> PairTokenizer:
        """Return the tokenizer, loaded once per process unless the files of its folder change.

        Args:
            pickled: of `pickled_tokenizer`, to be taken instead of the files.
        """
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
        one_answer = self.reader.takes_one_answer
        return _load_tokenizer(source, self.limits, self.special_tokens, one_answer, files, pickled)

    def pickled_tokenizer(self) -> bytes | None:
        """The loaded tokenizer for data tasks, which would import torch to load it themselves.

        None for a class that is not of transformers: other nodes may not have its module. Nor can
        a tokenizer with parts in Python be pickled.
        """
        tokenizer = self.pair_tokenizer().tokenizer
        if type(tokenizer).__module__.partition(".")[0] != "transformers":
            return None
        try:
            return pickle.dumps(tokenizer)
        except Exception:  # of tokenizers, which has no class of its own for it
            return None


@functools.lru_cache(maxsize=8)
def _load_tokenizer(
    source: ModelSource,
    limits: Limits,
    special_tokens: str,
    takes_one_answer: bool,
    files: tuple[tuple[int, int], ...],
    pickled: bytes | None,
) -> PairTokenizer:
    """Load the tokenizer; `files` is there for the cache key.

    Raises:
        DataError: if it cannot be loaded, or cannot tokenize pairs.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a data task has one CPU
    tokenizer = None if pickled is None else _unpickled(pickled)
    try:
        tokenizer = load_tokenizer(source) if tokenizer is None else tokenizer
    except UnsupportedModelError as error:
        raise DataError([f"model_name_or_path: {error}"]) from error
    return PairTokenizer(tokenizer, limits, special_tokens, takes_one_answer)


def _unpickled(pickled: bytes) -> Any:
    """The tokenizer, or None where this node's transformers cannot read it."""
    try:
        return pickle.loads(pickled)
    except Exception:  # whatever another version makes of it
        return None
