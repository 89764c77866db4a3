"""Ingest in this process: rows to write, what to ask for, and tasks that run one after another."""

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

from orpo_ray.dataset.request import IngestRequest
from orpo_ray.dataset.shards import TokenSet, read_shard
from orpo_ray.demo.model import train_tokenizer
from orpo_ray.preference.groups import PromptGroup
from orpo_ray.preference.tokenization import Limits

MAX_LENGTH, SHARD_ROWS = 24, 3
LIMITS = Limits(MAX_LENGTH, max_prompt_length=MAX_LENGTH - 1, truncation="drop")
LONG = "q" * 40  # in no merge: 40 tokens
BEFORE = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: and?\n\nAssistant:"


def map_tasks(items: list[dict[str, Any]], work: Any) -> list[dict[str, Any]]:
    """Apply `work` to every item here; it, items and answers pass as they would between processes.

    `tests/orchestration/test_tasks.py` compares it with Ray Data's.
    """
    answers: list[dict[str, Any]] = []
    for item in items:
        copy = pickle.loads(pickle.dumps(work))
        answers += [json.loads(answer["item"]) for answer in copy({"item": json.dumps(item)})]
    return answers


def text_row(i: int) -> dict[str, Any]:
    return {"prompt": f"p{i}: ", "chosen": "yes" * (i % 3 + 1), "rejected": "no"}


def chat_row(i: int) -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": f"u{i}"}],
        "chosen": [{"role": "assistant", "content": "yes"}],
        "rejected": [{"role": "assistant", "content": "no"}],
    }


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_tokenizer(folder: Path) -> str:
    texts = ["yes no p: Human: Assistant: hi hello and? user: assistant: " * 20, BEFORE * 20]
    train_tokenizer(texts).save_pretrained(folder)
    return str(folder)


def request_of(
    files: tuple[str, ...], tokenizer: str, folder: Path, **changes: Any
) -> IngestRequest:
    """What is asked for, cached below a folder."""
    base = IngestRequest(files, tokenizer, None, LIMITS, SHARD_ROWS, str(folder / "cache"))
    return replace(base, **changes)


def groups_of(tokens: TokenSet) -> list[PromptGroup]:
    """All groups, in the order of the shards."""
    shards = [f"{tokens.folder.path}/{shard.name}" for shard in tokens.shards]
    return [group for shard in shards for group in read_shard(shard)]


def file_bytes(directory: str) -> dict[str, bytes]:
    files = [path for path in Path(directory).rglob("*") if path.is_file()]
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}
