"""What both sides of a benchmark are given: one model, one tokenizer, the same pairs in order."""

import itertools
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from orpo_ray.dataset.shards import TokenSet, write_shard
from orpo_ray.demo.pairs import FAMILIES, REQUIREMENTS
from orpo_ray.preference.groups import PromptGroup, RowId, merge_groups
from orpo_ray.preference.pairing import normalise
from orpo_ray.preference.reading.readers import read_split
from orpo_ray.preference.reading.rows import Split
from orpo_ray.preference.records import Refusal
from orpo_ray.preference.templates import PairText
from orpo_ray.preference.tokenization import Limits, PairTokenizer
from orpo_ray.storage.folder import Folder

MAX_LENGTH = 1024
# Layers, width, feed-forward width, heads, key-value heads; the names count 16 k words.
SIZES = {
    "narrow": (16, 16, 32, 2, 1),  # where the host takes the time
    "5m": (6, 192, 512, 6, 2),
    "50m": (12, 576, 1536, 9, 3),
    "135m": (30, 576, 1536, 9, 3),
    "0.5b": (24, 1280, 3456, 20, 5),
    "1b": (16, 2048, 8192, 32, 8),
}
PAIRS_OF_4 = 6
VOCABULARIES = {"1k": 1_024, "16k": 16_384, "128k": 131_072}


@dataclass(frozen=True)
class Work:
    """One comparison.

    Args:
        model: key of `SIZES`.
        vocabulary: key of `VOCABULARIES`.
        batch: pairs an optimizer step.
        steps: steps a round.
        rounds: rounds that count; one more before them does not.
        device: `cpu` or `cuda`.
        folder: where `make_folder` wrote model and pairs.
        budget_tokens: packed tokens a microbatch.
        gradient_checkpointing: of TRL's side, where its activations would not fit.
        pairs_per_group: of prompt groups: 1 for pairs apart.
        bf16: whether to compute in bfloat16 on a CPU, too.
        saves: whether every round writes one checkpoint beside its steps, and their ledger.
    """

    model: str
    vocabulary: str
    batch: int
    steps: int
    rounds: int
    device: str
    folder: str
    budget_tokens: int
    gradient_checkpointing: bool = False
    pairs_per_group: int = 1
    bf16: bool = False
    saves: bool = False

    @property
    def tokens(self) -> str:
        """The token shards of this project's side."""
        return f"{self.folder}/tokens-{self.pairs_per_group}"

    @property
    def n_pairs(self) -> int:
        """Pairs of all rounds, the one that does not count included."""
        return self.batch * self.steps * (self.rounds + 1)


def make_folder(folder: Path, data: str, model: str, vocabulary: str, n_pairs: int) -> None:
    """Write model, tokenizer, the first usable pairs of a file as text, and as token shards.

    Raises:
        SystemExit: when the file has too few usable pairs.
    """
    usable = (text for text in pair_texts(data) if text.chosen.strip() and text.rejected.strip())
    _fill_folder(folder, list(itertools.islice(usable, 4 * n_pairs)), model, vocabulary, n_pairs)


def make_ranking_folder(folder: Path, model: str, vocabulary: str, n_pairs: int) -> None:
    """The same for rankings of the demo's generator: 4 answers and all 6 pairs a prompt.

    There are token shards of the pairs apart and of whole prompts.
    """
    groups = _fill_folder(
        folder, list(_ranked_texts(n_pairs // PAIRS_OF_4)), model, vocabulary, n_pairs
    )
    together = [
        merge_groups(groups[first : first + PAIRS_OF_4]) for first in range(0, n_pairs, PAIRS_OF_4)
    ]
    _write_tokens(folder / f"tokens-{PAIRS_OF_4}", together)


def _ranked_texts(n_prompts: int) -> Iterator[PairText]:
    rng, seen = random.Random(0), set()
    while len(seen) < n_prompts:
        task = rng.choice(FAMILIES)(rng)
        if task.prompt in seen:
            continue
        seen.add(task.prompt)
        scores: dict[str, int] = {}
        while len(scores) < 4:
            meets = [rng.random() < 0.5 for _ in range(REQUIREMENTS)]
            scores[task.draft(rng, meets)] = sum(meets)
        ranked = sorted(scores, key=lambda draft: -scores[draft])
        for better, worse in itertools.combinations(ranked, 2):
            yield PairText(task.prompt, better, worse)


def _fill_folder(
    folder: Path, texts: Sequence[PairText], model: str, vocabulary: str, n_pairs: int
) -> list[PromptGroup]:
    tokenizer = _make_tokenizer(folder / "model", texts, VOCABULARIES[vocabulary])
    _make_model(folder / "model", model, VOCABULARIES[vocabulary], tokenizer)
    pair_tokenizer = PairTokenizer(tokenizer, Limits(MAX_LENGTH, truncation="drop"))
    kept, groups = [], []
    for row, text in enumerate(texts):
        (result,) = pair_tokenizer.tokenize([text], [RowId(0, row)])
        # Where a prompt does not fit the two cut otherwise: such pairs are given to neither side.
        if not isinstance(result, Refusal):
            kept.append(text)
            groups.append(result.group)
        if len(kept) == n_pairs:
            break
    if len(kept) < n_pairs:
        raise SystemExit(f"{len(kept)} usable pairs, {n_pairs} are wanted; fewer --steps")
    columns = {
        "prompt": [text.prompt for text in kept],
        "chosen": [text.chosen for text in kept],
        "rejected": [text.rejected for text in kept],
    }
    (folder / "pairs.json").write_text(json.dumps(columns))
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _write_tokens(folder / "tokens-1", groups)
    return groups


def padded_tokens(groups: Sequence[PromptGroup]) -> int:
    """Tokens of one batch as two padded rows a pair, every row as long as the longest."""
    rows = [len(g.prompt) + len(c) for g in groups for c in g.completions]
    return max(rows) * len(rows)


def pair_texts(data: str) -> Iterator[PairText]:
    """The pairs of a file as text."""
    for raw in read_split(Split(data)):
        record = normalise(raw.record or {})
        if not isinstance(record, Refusal):
            yield PairText(str(record.prompt), str(record.chosen), str(record.rejected))


def _make_tokenizer(
    folder: Path, texts: Sequence[PairText], n_words: int
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of the file's own words; at most 16 k of them."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        (text.prompt + text.chosen for text in texts),
        trainers.BpeTrainer(
            vocab_size=min(n_words, 16_384),
            special_tokens=["<s>", "</s>", "<pad>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    tokenizer.save_pretrained(folder)
    loaded: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(folder)
    return loaded


def _make_model(
    folder: Path, size: str, vocabulary: int, tokenizer: PreTrainedTokenizerFast
) -> None:
    """A llama with random weights."""
    layers, width, inner, heads, kv_heads = SIZES[size]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=2 * MAX_LENGTH,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def _write_tokens(folder: Path, groups: Sequence[PromptGroup]) -> None:
    folder.mkdir()
    shard = write_shard(str(folder / "0.parquet"), groups)
    TokenSet(Folder.at(folder), (shard,), ("benchmark",), {}).save()
