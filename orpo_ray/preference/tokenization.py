"""Tokenizing rendered pairs; prompt + answer is encoded whole and split by character offsets."""

import bisect
import copy
import operator
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from orpo_ray.preference.errors import DataError
from orpo_ray.preference.groups import PromptGroup, RowId
from orpo_ray.preference.records import Reason, Refusal
from orpo_ray.preference.rendering import apply_template
from orpo_ray.preference.special_tokens import refuse_ids, special_ids, special_tokens
from orpo_ray.preference.templates import PairText, shared_length

# Letters of many scripts and a symbol: a tokenizer that encodes all of them encodes any text.
_PROBE = "\u6c38\u00e0\u0416\u05d0\u0e01\u0b85\u1200\uac00\U0001f642\u2a9d\u0180"


@dataclass(frozen=True)
class TokenizedPair:
    """A tokenized pair, as a group of two completions, and which parts were truncated.

    Args:
        group: the pair.
        prompt_cut: whether the prompt was truncated.
        completion_cut: whether a completion was truncated.
        has_lost: whether a character of it is unknown to the tokenizer.
    """

    group: PromptGroup
    prompt_cut: bool
    completion_cut: bool
    has_lost: bool = False


@dataclass(frozen=True)
class Limits:
    """Maximum lengths of a pair in tokens, and how longer pairs are truncated.

    Completions are truncated at their end. A prompt is truncated if it is longer than
    `max_prompt_length`; without one, if the pair would not fit, but never below half of
    `max_length`. A beginning-of-sequence token is kept.

    Args:
        max_length: limit of prompt plus completion.
        max_prompt_length: limit of the prompt, less than `max_length`.
        max_completion_length: limit of a completion.
        truncation: part of the prompt to keep, `keep_end` or `keep_start`; `drop` and `error`
            refuse the row instead.
    """

    max_length: int
    max_prompt_length: int | None = None
    max_completion_length: int | None = None
    truncation: str = "keep_end"

    @property
    def characters(self) -> int:
        """Maximum number of characters of a prompt and its longer answer before tokenizing.

        Tokenizing takes some 300 bytes a character; a token of text seldom has 16 of them.
        """
        return max(2_000_000, 16 * self.max_length)

    def completion(self) -> int:
        """Maximum number of tokens of a completion."""
        return min(self.max_completion_length or self.max_length, self.max_length)

    def prompt(self, longest_completion: int) -> int:
        """Maximum number of tokens of a prompt, given those of its longest completion."""
        if self.max_prompt_length is not None:
            return min(self.max_prompt_length, self.max_length - 1)
        longest = min(longest_completion, self.completion())
        return max(self.max_length // 2, self.max_length - longest)


@dataclass(frozen=True)
class PairTokenizer:
    """Tokenizes rendered pairs.

    Args:
        tokenizer: a `PreTrainedTokenizerFast`.
        limits: maximum lengths and truncation.
        special_tokens: `refuse` or `allow` special tokens in texts, and in messages those that
            the chat template did not write.
        takes_one_answer: whether a pair of equal answers is kept, as one answer.

    Raises:
        DataError: if the tokenizer is a slow one or has no end-of-sequence token.
    """

    tokenizer: Any
    limits: Limits
    special_tokens: str = "allow"
    takes_one_answer: bool = False

    def __post_init__(self) -> None:
        name = self.tokenizer.name_or_path
        if not self.tokenizer.is_fast:
            raise DataError(
                [
                    f"model_name_or_path: {name} has a slow tokenizer, which gives no character "
                    "offsets; a fast one (tokenizer.json) is needed"
                ]
            )
        if self.tokenizer.eos_token_id is None:
            raise DataError(
                [
                    f"model_name_or_path: {name} has a tokenizer without an eos_token; set one in "
                    "its tokenizer_config.json"
                ]
            )

    @cached_property
    def _encoder(self) -> Any:
        """The backend tokenizer with truncation, padding and post-processing disabled."""
        encoder = copy.deepcopy(self.tokenizer.backend_tokenizer)
        encoder.no_truncation()
        encoder.no_padding()
        # A byte-level post-processor may trim a token's leading white space from its offsets, which
        # moves them past the end of the prompt.
        encoder.post_processor = None
        return encoder

    def tokenize(
        self, texts: Sequence[PairText], row_ids: Sequence[RowId]
    ) -> list[TokenizedPair | Refusal]:
        """Tokenize a batch of pairs; entry i of the result belongs to `texts[i]`."""
        sides = [text.prompt + side for text in texts for side in (text.chosen, text.rejected)]
        # Special tokens in the text are encoded as such; none are added here.
        encodings = self._encoder.encode_batch(sides, add_special_tokens=False)
        return [
            self._pair(text, encodings[2 * index : 2 * index + 2], row_ids[index])
            for index, text in enumerate(texts)
        ]

    def _pair(
        self, text: PairText, encodings: Sequence[Any], row_id: RowId
    ) -> TokenizedPair | Refusal:
        """Split both sides at the end of the prompt, add BOS and EOS, and truncate."""
        sides = [encoding.ids for encoding in encodings]
        if self.special_tokens == "refuse":
            for name, ids in zip(("chosen", "rejected"), sides, strict=True):
                hidden = self._hidden_token(text, getattr(text, name), ids)
                if hidden:
                    return refuse_ids(f"prompt with {name}", hidden)
        border = len(text.prompt)
        prompts = [
            ids[: _prompt_tokens(encoding, border)]
            for ids, encoding in zip(sides, encodings, strict=True)
        ]
        # If a token spans the end of the prompt on one side only, the prompt ends before it.
        n_prompt = shared_length(*prompts)
        prompt = sides[0][:n_prompt]
        bos, eos = self._bos, self._eos
        # A rendered chat begins as the template says, which is how it will be sent to the model.
        if bos is not None and not text.is_chat and not self._bos_is_a_marker:
            prompt = prompt if sides[0][:1] == [bos] else [bos, *prompt]
        completions = []
        for ids in sides:
            completion = ids[n_prompt:]
            while completion[-1:] == [eos]:
                completion = completion[:-1]
            completions.append([*completion, eos])
        pair = self._truncated(prompt, completions, row_id)
        if isinstance(pair, TokenizedPair) and self._loses_characters:
            wholes = (text.prompt + text.chosen, text.prompt + text.rejected)
            return replace(pair, has_lost=any(map(self._is_lossy, wholes, sides)))
        return pair

    def _is_lossy(self, text: str, ids: Sequence[int]) -> bool:
        """Whether a character of a text is in no token, or in the unknown token.

        Offsets do not tell: those after a character that was dropped are too small.
        """
        if self.tokenizer.unk_token_id in ids:
            return True
        normalizer = self._encoder.normalizer
        given = normalizer.normalize_str(text) if normalizer else text
        wanted, found = (
            Counter(unicodedata.normalize("NFKC", part))
            for part in (given, self.tokenizer.decode(ids))
        )
        return any(not letter.isspace() and letter != "\u2581" for letter in wanted - found)

    def _hidden_token(self, text: PairText, answer: str, ids: Sequence[int]) -> str | None:
        """A special token among the ids that is neither the template's nor at its place in a text.

        It may stand across the border of prompt and answer, or be what a normalizer makes of
        other characters.
        """
        special = self._special_ids
        if special.isdisjoint(ids):
            return None
        if not text.is_chat:
            first = int(ids[:1] == [self._bos])
            last = len(ids) - int(ids[-1:] == [self._eos])
            ids = ids[first:last]
            if special.isdisjoint(ids):
                return None
        found = [i for i in ids if i in special]
        written = special_tokens(self.tokenizer).findall(text.prompt + answer)
        if text.is_chat and len(found) <= len(written):
            return None
        return str(self.tokenizer.convert_ids_to_tokens(found[-1]))

    @cached_property
    def _bos(self) -> int | None:
        """Id of the beginning-of-sequence token; the tokenizer looks it up anew at each call."""
        found: int | None = self.tokenizer.bos_token_id
        return found

    @cached_property
    def _eos(self) -> int:
        found: int = self.tokenizer.eos_token_id
        return found

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        """Ids that only the template may write; the unknown token stands for lost characters."""
        return special_ids(self.tokenizer) - {self.tokenizer.unk_token_id}

    @cached_property
    def _bos_is_a_marker(self) -> bool:
        """Whether the chat template begins every message with the beginning-of-sequence token."""
        bos, template = self.tokenizer.bos_token, self.tokenizer.chat_template
        if not bos or not template:
            return False
        turn = [{"role": "user", "content": "a"}]
        try:
            text = apply_template(self.tokenizer, turn, add_generation_prompt=True)
        except DataError:
            raise
        except Exception:  # a template may raise anything for a conversation that it does not like
            return False
        return bool(text.count(bos) > 1)

    @cached_property
    def _loses_characters(self) -> bool:
        """Whether some characters become the unknown token or none at all."""
        encodings = self._encoder.encode_batch(list(_PROBE), add_special_tokens=False)
        return any(map(self._is_lossy, _PROBE, [encoding.ids for encoding in encodings]))

    def _truncated(
        self, prompt: list[int], completions: list[list[int]], row_id: RowId
    ) -> TokenizedPair | Refusal:
        limits = self.limits
        most = limits.prompt(max(map(len, completions)))
        prompt_cut = len(prompt) > most
        if prompt_cut and limits.truncation in ("drop", "error"):
            return Refusal(
                Reason.PROMPT_TOO_LONG, f"the prompt has {len(prompt)} tokens, the limit is {most}"
            )
        if prompt_cut:
            n_bos = int(prompt[0] == self._bos)
            head, rest = prompt[:n_bos], prompt[n_bos:]
            n_kept = most - n_bos
            first = 0 if limits.truncation == "keep_start" else len(rest) - n_kept
            prompt = head + rest[first : first + n_kept]
        room = min(limits.completion(), limits.max_length - len(prompt))
        chosen, rejected = (completion[:room] for completion in completions)
        is_alone = chosen == rejected
        if is_alone and not self.takes_one_answer:
            reason = Reason.IDENTICAL_AFTER_TRUNCATION
            if max(map(len, completions)) <= room:
                reason = Reason.IDENTICAL_ANSWERS
            return Refusal(reason, "chosen and rejected are the same tokens")
        if not prompt and min(len(chosen), len(rejected)) < 2:
            return Refusal(
                Reason.NO_PREDICTED_TOKEN,
                "an answer of one token has no predicted token without a prompt or a "
                "beginning-of-sequence token",
            )
        group = PromptGroup(
            prompt=np.asarray(prompt, dtype=np.int32),
            completions=tuple(np.asarray(c, np.int32) for c in (chosen, rejected)[: 2 - is_alone]),
            pairs=((0, 1 - is_alone),),
            row_ids=(row_id,),
        )
        return TokenizedPair(group, prompt_cut, max(map(len, completions)) > room)


def _prompt_tokens(encoding: Any, border: int) -> int:
    """Number of leading tokens that end inside the prompt, the first `border` characters."""
    after = encoding.char_to_token(border)
    if after is not None:
        return int(after)
    # No token covers the answer's first character: it is empty, or the tokenizer drops that one.
    return bisect.bisect_right(encoding.offsets, border, key=operator.itemgetter(1))
