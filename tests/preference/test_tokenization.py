"""Token ids of pairs: where the prompt ends, one end of sequence, truncation, TRL's ids."""

import json
import os
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from orpo_ray.demo.model import train_tokenizer
from orpo_ray.preference.errors import DataError
from orpo_ray.preference.groups import PromptGroup, RowId
from orpo_ray.preference.pairing import normalise
from orpo_ray.preference.records import Reason, Record, Refusal
from orpo_ray.preference.templates import PairText, shared_length
from orpo_ray.preference.tokenization import Limits, PairTokenizer, TokenizedPair

HARMLESS = Path(__file__).parents[2] / "../shared/data/hh_rlhf_harmless.jsonl"
ROW = RowId(2, 5)
MERGING = "ab abb \u00e9\u00e9 \U0001f600\U0001f600 \n\n ab\n"


def byte_bpe(
    use_regex: bool = True, trim_offsets: bool = False, bos_token: str | None = None
) -> PreTrainedTokenizerFast:
    """A byte-level BPE; without its regular expression it merges across words and spaces."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["</s>", "<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([MERGING * 20, "aab bba\n\n" * 20, "ab:\n    ab\n" * 20], trainer)
    if trim_offsets:
        bpe.post_processor = processors.ByteLevel(trim_offsets=True)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>", bos_token=bos_token)


TOKENIZERS = {
    "words": byte_bpe(),
    "words, trimmed offsets": byte_bpe(trim_offsets=True),
    "across words": byte_bpe(use_regex=False),
    "across words, trimmed offsets": byte_bpe(use_regex=False, trim_offsets=True),
}
WORDS, ACROSS = TOKENIZERS["words"], TOKENIZERS["across words"]
EOS = WORDS.eos_token_id


def tokenize(
    tokenizer: Any, prompt: str, chosen: str, rejected: str, *limits: Any, **more: Any
) -> TokenizedPair | Refusal:
    pairs = PairTokenizer(tokenizer, Limits(*(limits or [10_000]), **more))
    return pairs.tokenize([PairText(prompt, chosen, rejected)], [ROW])[0]


def group_of(*args: Any, **kwargs: Any) -> PromptGroup:
    result = tokenize(*args, **kwargs)
    assert isinstance(result, TokenizedPair)
    return result.group


def ids_of(group: PromptGroup) -> tuple[list[int], list[int], list[int]]:
    chosen, rejected = group.completions
    return group.prompt.tolist(), chosen.tolist(), rejected.tolist()


def byte_ends(tokenizer: Any, ids: list[int]) -> list[int]:
    """The byte at which every token of a byte-level vocabulary ends: one letter, one byte."""
    return list(accumulate(len(token) for token in tokenizer.convert_ids_to_tokens(ids)))


@pytest.mark.parametrize("name", TOKENIZERS)
@example(prompt="ab:\n", chosen="    ab", rejected="    abb")
@example(prompt="", chosen=" a", rejected=" \n")
@settings(deadline=None)
@given(
    prompt=st.text("ab \n\u00e9\U0001f600"),
    chosen=st.text("ab \n\u00e9\U0001f600", min_size=2),
    rejected=st.text("ab \n\u00e9\U0001f600", min_size=2),
)
def test_a_token_is_the_prompts_exactly_when_it_ends_inside_it(
    name: str, prompt: str, chosen: str, rejected: str
) -> None:
    """Counted in bytes of the vocabulary, where the product looks at offsets in characters.

    A side's tokens are those of its whole text. On each side the prompt has the tokens that end
    at or before the prompt's last byte; the pair's prompt is what both sides have in common.
    """
    tokenizer = TOKENIZERS[name]
    texts = (prompt + chosen, prompt + rejected)
    sides = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    border = len(prompt.encode())
    inside = [
        [i for i, end in zip(ids, byte_ends(tokenizer, ids), strict=True) if end <= border]
        for ids in sides
    ]
    result = tokenize(tokenizer, prompt, chosen, rejected)
    assert isinstance(result, Refusal) == (sides[0] == sides[1])
    if isinstance(result, Refusal):
        return
    prompt_ids, *completions = ids_of(result.group)
    assert prompt_ids == inside[0][: shared_length(*inside)]
    for text, ids, completion in zip(texts, sides, completions, strict=True):
        assert prompt_ids + completion == [*ids, EOS]
        assert tokenizer.decode(prompt_ids + completion[:-1]) == text
    assert (result.prompt_cut, result.completion_cut) == (False, False)


def test_a_token_across_the_border_is_the_answers() -> None:
    """`aab` is learned as `a` + `ab`, so the letter before the border leaves the prompt.

    On the rejected side nothing merges, and it still begins with the same prompt.
    """
    tokenizer = ACROSS
    whole = tokenizer("\u00e9a" + "bb", add_special_tokens=False)["input_ids"]
    prompt, chosen, rejected = ids_of(group_of(tokenizer, "\u00e9a", "bb", "!"))
    assert tokenizer.decode(prompt) == "\u00e9"
    assert prompt + chosen == [*whole, EOS]
    assert tokenizer.decode(chosen) == "abb</s>"
    assert tokenizer.decode(rejected) == "a!</s>"


def test_a_space_before_the_answer_is_the_answers() -> None:
    """Byte-level offsets start after a token's space; the token ` ab` is still the answer's."""
    prompt, chosen, rejected = ids_of(group_of(WORDS, "ab:", " ab", " abb"))
    assert WORDS.decode(prompt) == "ab:"
    assert WORDS.decode(chosen) == " ab</s>"
    assert WORDS.decode(rejected) == " abb</s>"


@pytest.mark.parametrize("trim_offsets", [False, True])
def test_the_indentation_of_an_answer_is_the_answers(trim_offsets: bool) -> None:
    """The line end and three spaces are one token, which ends inside the answer.

    GPT-2's and GPT-NeoX's post-processor trims spaces off both ends of a token's offsets.
    """
    tokenizer = byte_bpe(trim_offsets=trim_offsets)
    assert tokenizer.tokenize("ab:\n    ab") == ["ab", ":", "\u010a\u0120\u0120\u0120", "\u0120ab"]
    prompt, chosen, rejected = ids_of(group_of(tokenizer, "ab:\n", "    ab", "    abb"))
    assert tokenizer.decode(prompt) == "ab:"
    assert tokenizer.decode(chosen) == "\n    ab</s>"
    assert tokenizer.decode(rejected) == "\n    abb</s>"


def test_the_group_is_one_pair_with_its_row() -> None:
    group = group_of(WORDS, "a", "b", "ab")
    assert group.pairs == ((0, 1),)
    assert group.row_ids == (ROW,)
    assert {ids.dtype.name for ids in (group.prompt, *group.completions)} == {"int32"}


@pytest.mark.parametrize("chosen", ["b", "b</s>"])
def test_an_answer_ends_in_one_end_of_sequence(chosen: str) -> None:
    _, ids, _ = ids_of(group_of(WORDS, "a ", chosen, "bb"))
    assert ids.count(EOS) == 1
    assert ids[-1] == EOS


@pytest.mark.parametrize("chosen", ["b</s></s>", "b </s></s>"])
def test_two_ends_of_sequence_become_one(chosen: str) -> None:
    """An answer that already ends in `</s>`, in a template that writes its own after it."""
    _, ids, _ = ids_of(group_of(WORDS, "a ", chosen, "bb"))
    assert ids.count(EOS) == 1


def test_an_end_of_sequence_inside_the_prompt_stays() -> None:
    """Earlier turns of a dialogue end in one each, and the answer's own is still added."""
    prompt, chosen, _ = ids_of(group_of(WORDS, "a</s>b", " a", " b"))
    assert prompt.count(EOS) == 1
    assert chosen.count(EOS) == 1


@pytest.mark.parametrize("prompt", ["a", "<s>a", ""])
def test_a_beginning_of_sequence_is_added_where_there_is_none(prompt: str) -> None:
    tokenizer = byte_bpe(bos_token="<s>")
    ids, chosen, rejected = ids_of(group_of(tokenizer, prompt, " ab", " b"))
    assert ids[0] == tokenizer.bos_token_id
    assert (ids + chosen + rejected).count(tokenizer.bos_token_id) == 1


def test_without_such_a_token_none_is_added() -> None:
    prompt, *_ = ids_of(group_of(WORDS, "a", " b", " a"))
    assert prompt == WORDS("a")["input_ids"]


def test_ids_that_the_tokenizer_adds_by_itself_are_not_doubled() -> None:
    """This one begins every text with its token, so that calling it would add a second."""
    tokenizer = train_tokenizer(["some text"])
    called = tokenizer("some text")["input_ids"]
    prompt, *_ = ids_of(group_of(tokenizer, "some text", " a", " b"))
    assert prompt == called
    assert prompt.count(tokenizer.bos_token_id) == 1


def test_only_the_named_tokens_are_added() -> None:
    """This post-processor writes `<s>`, which the tokenizer does not name as its beginning."""
    tokenizer = byte_bpe()
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=ids
    )
    assert ids_of(group_of(tokenizer, "a", " ab", " b")) == ids_of(
        group_of(WORDS, "a", " ab", " b")
    )


def test_a_saved_truncation_or_padding_does_not_apply() -> None:
    tokenizer = byte_bpe()
    expected = ids_of(group_of(tokenizer, "a b a b", " ab", " b"))
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=40)
    assert ids_of(group_of(tokenizer, "a b a b", " ab", " b")) == expected


LETTERS = byte_bpe()  # "x" and "y" are in no merge: one token each
LETTERS_WITH_BOS = byte_bpe(bos_token="<s>")


@pytest.mark.parametrize(
    ("max_length", "n_prompt", "n_chosen", "n_rejected"),
    [(8, 3, 5, 3), (7, 3, 4, 3), (5, 2, 3, 3), (2, 1, 1, 1)],
)
def test_a_long_answer_loses_its_end(
    max_length: int, n_prompt: int, n_chosen: int, n_rejected: int
) -> None:
    """3 tokens of prompt; answers of 4 and 2 with their end of sequence are 5 and 3.

    Within 8 all fits; 7 leaves room for 4. Of 5 the prompt has 2, half of it, and of 2 it has 1.
    """
    result = tokenize(LETTERS, "xxx", "yyyy", "xz", max_length)
    assert isinstance(result, TokenizedPair)
    prompt, chosen, rejected = ids_of(result.group)
    assert (len(prompt), len(chosen), len(rejected)) == (n_prompt, n_chosen, n_rejected)
    assert result.prompt_cut == (n_prompt < 3)
    assert result.completion_cut == (max_length < 8)
    assert (chosen[-1] == EOS) == (max_length == 8)
    assert (rejected[-1] == EOS) == (max_length >= 5)


@pytest.mark.parametrize(
    ("truncation", "kept"), [("keep_end", "<s>wxyz"), ("keep_start", "<s>uvwx")]
)
def test_a_long_prompt_loses_one_of_its_ends(truncation: str, kept: str) -> None:
    """Within 8, answers of 3 leave 5 for the prompt, of which the beginning of sequence is one."""
    tokenizer = byte_bpe(bos_token="<s>")
    group = group_of(tokenizer, "uvwxyz", "rs", "tt", 8, truncation=truncation)
    prompt, chosen, rejected = ids_of(group)
    assert tokenizer.decode(prompt) == kept
    assert (len(chosen), len(rejected)) == (3, 3)


@pytest.mark.parametrize("truncation", ["drop", "error"])
def test_a_long_prompt_may_be_refused(truncation: str) -> None:
    refusal = tokenize(LETTERS, "x" * 8, "y", "x", 8, truncation=truncation)
    detail = "the prompt has 8 tokens, the limit is 6"
    assert refusal == Refusal(Reason.PROMPT_TOO_LONG, detail)
    assert isinstance(tokenize(LETTERS, "x" * 6, "y", "x", 8, truncation=truncation), TokenizedPair)


def test_prompt_and_answers_have_limits_of_their_own() -> None:
    result = tokenize(LETTERS, "xxxxx", "yyyy", "x", 100, 2, 3)
    assert isinstance(result, TokenizedPair)
    prompt, chosen, rejected = ids_of(result.group)
    assert (len(prompt), len(chosen), len(rejected)) == (2, 3, 2)
    assert (result.prompt_cut, result.completion_cut) == (True, True)


LETTER_TEXT = st.text("xyz", max_size=12)


any_pair_and_limits = given(
    texts=st.tuples(LETTER_TEXT, LETTER_TEXT, LETTER_TEXT),
    max_length=st.integers(2, 20),
    max_prompt_length=st.none() | st.integers(1, 19),
    max_completion_length=st.none() | st.integers(1, 20),
    truncation=st.sampled_from(["keep_end", "keep_start", "drop", "error"]),
    bos=st.booleans(),
)


def leaves_a_pair_or_a_reason(
    texts: tuple[str, str, str],
    max_length: int,
    max_prompt_length: int | None,
    max_completion_length: int | None,
    truncation: str,
    bos: bool,
) -> None:
    """What is left is what it was, cut: never empty, never over a limit, never two of the same."""
    tokenizer = LETTERS_WITH_BOS if bos else LETTERS
    if max_prompt_length is not None:
        max_prompt_length = min(max_prompt_length, max_length - 1)
    limits = (max_length, max_prompt_length, max_completion_length, truncation)
    whole = tokenize(tokenizer, *texts)
    result = tokenize(tokenizer, *texts, *limits)
    if isinstance(result, Refusal):
        dropped = result.reason is Reason.PROMPT_TOO_LONG
        same = result.reason is Reason.IDENTICAL_AFTER_TRUNCATION
        unpredicted = result.reason is Reason.NO_PREDICTED_TOKEN
        assert (
            same
            or unpredicted
            or (dropped and truncation in ("drop", "error"))
            or (result == whole)
        )
        return
    assert isinstance(whole, TokenizedPair)
    (prompt, *sides), (whole_prompt, *whole_sides) = ids_of(result.group), ids_of(whole.group)
    assert sides[0] != sides[1]
    assert len(prompt) <= (max_prompt_length or max_length - 1)
    for side, whole_side in zip(sides, whole_sides, strict=True):
        assert side
        assert len(prompt) + len(side) <= max_length
        assert len(side) <= (max_completion_length or max_length)
        assert side == whole_side[: len(side)]
    assert result.completion_cut == (sides != whole_sides)
    assert result.prompt_cut == (prompt != whole_prompt)
    inner, whole_inner = prompt[bos:], whole_prompt[bos:]
    assert prompt[:bos] == whole_prompt[:bos]
    n_kept = len(inner)
    ends = {
        "keep_start": whole_inner[:n_kept],
        "keep_end": whole_inner[len(whole_inner) - n_kept :],
    }
    assert inner == ends.get(truncation, whole_inner)


def test_any_pair_and_any_limits_leave_a_pair_or_a_reason() -> None:
    settings(deadline=None, max_examples=500)(any_pair_and_limits(leaves_a_pair_or_a_reason))()


@pytest.mark.slow
def test_of_many_more_pairs_and_limits_each_leaves_a_pair_or_a_reason() -> None:
    settings(deadline=None, max_examples=5000)(any_pair_and_limits(leaves_a_pair_or_a_reason))()


def test_answers_that_truncation_makes_the_same_are_refused() -> None:
    """`yyx` and `yyy` differ in their third token, and 4 leaves room for two after `xx`."""
    refusal = tokenize(LETTERS, "xxx", "yyx", "yyy", 4)
    assert isinstance(refusal, Refusal)
    assert refusal.reason is Reason.IDENTICAL_AFTER_TRUNCATION
    assert isinstance(tokenize(LETTERS, "xxx", "yyx", "yyy", 5), TokenizedPair)


def test_answers_of_the_same_tokens_are_refused() -> None:
    """Different texts, but the second already writes the end of sequence out."""
    refusal = tokenize(LETTERS, "xxx", "y", "y</s>")
    assert isinstance(refusal, Refusal)
    assert refusal.reason is Reason.IDENTICAL_ANSWERS


def test_an_answer_that_nothing_predicts_is_refused() -> None:
    """With no prompt the first token is no target, so an answer of one token has none."""
    refusal = tokenize(LETTERS, "", "</s>", "y")
    assert isinstance(refusal, Refusal)
    assert refusal.reason is Reason.NO_PREDICTED_TOKEN
    assert isinstance(tokenize(LETTERS, "", "x", "y"), TokenizedPair)
    with_bos = byte_bpe(bos_token="<s>")
    assert isinstance(tokenize(with_bos, "", "</s>", "y"), TokenizedPair)


def test_a_batch_keeps_its_order() -> None:
    texts = [PairText("x" * n, "y" * (n % 3 + 1), "x") for n in range(1, 9)]
    row_ids = [RowId(0, 10 * n) for n in range(len(texts))]
    limits = Limits(7, truncation="drop")
    batch = PairTokenizer(LETTERS, limits).tokenize(texts, row_ids)
    assert [isinstance(result, Refusal) for result in batch] == [n > 4 for n in range(1, 9)]
    for text, row_id, result in zip(texts, row_ids, batch, strict=True):
        alone = PairTokenizer(LETTERS, limits).tokenize([text], [row_id])[0]
        if isinstance(result, TokenizedPair) and isinstance(alone, TokenizedPair):
            assert ids_of(result.group) == ids_of(alone.group)
            assert result.group.row_ids == (row_id,)
        else:
            assert result == alone
    assert PairTokenizer(LETTERS, limits).tokenize([], []) == []


def test_a_tokenizer_without_offsets_is_refused() -> None:
    with pytest.raises(DataError, match=r"model_name_or_path: .*slow tokenizer"):
        PairTokenizer(ByT5Tokenizer(), Limits(8))


def test_a_tokenizer_without_an_end_of_sequence_is_refused() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    with pytest.raises(DataError, match=r"model_name_or_path: .*without an eos_token"):
        PairTokenizer(tokenizer, Limits(8))


@pytest.fixture(scope="module")
def trl_trainer(tmp_path_factory: pytest.TempPathFactory) -> Callable[[list[Any], Any, int], Any]:
    """TRL's own trainer over some rows; making it tokenizes them."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from datasets import Dataset
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    def make(rows: list[Any], tokenizer: Any, max_length: int) -> Any:
        sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
        model = LlamaForCausalLM(
            LlamaConfig(vocab_size=len(tokenizer), num_hidden_layers=1, **sizes)
        )
        # Set at all, it warns of its new name.
        quiet: dict[str, Any] = {"gradient_checkpointing": None}
        args = ORPOConfig(
            output_dir=str(tmp_path_factory.mktemp("trl")),
            max_length=max_length,
            use_cpu=True,
            report_to=[],
            **quiet,
            remove_unused_columns=False,
        )
        return ORPOTrainer(
            model, args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
        )

    return make


@pytest.mark.skipif(not HARMLESS.exists(), reason="hh_rlhf_harmless.jsonl is not here")
@pytest.mark.parametrize("max_length", [10_000, 128])
@pytest.mark.long
def test_real_rows_have_the_ids_that_trl_gives_them(
    trl_trainer: Callable[[list[Any], Any, int], Any], max_length: int
) -> None:
    """All rows of a file, with a tokenizer trained on it; TRL 1.16 as the oracle.

    It marks the prompt's positions in the labels with -100, cuts no prompt, and trains on what is
    then left of an answer, be it nothing: with prompts that are too long dropped here, rows are
    otherwise refused exactly where TRL trains on two equal answers.
    """
    lines = HARMLESS.read_text(encoding="utf-8").splitlines()
    found = [normalise(json.loads(line)) for line in lines]
    records = [record for record in found if isinstance(record, Record)]
    texts = [PairText(str(r.prompt), str(r.chosen), str(r.rejected)) for r in records]
    tokenizer = train_tokenizer([text.prompt + text.chosen for text in texts])
    limits = Limits(max_length, truncation="drop")
    ours = PairTokenizer(tokenizer, limits).tokenize(texts, [ROW] * len(texts))
    rows = [{"prompt": t.prompt, "chosen": t.chosen, "rejected": t.rejected} for t in texts]
    trainer = trl_trainer(rows, tokenizer, max_length)
    n_kept = 0
    for result, row in zip(ours, trainer.train_dataset, strict=True):
        theirs = {}
        for side in ("chosen", "rejected"):
            n_prompt = row[f"{side}_labels"].count(-100)
            ids = row[f"{side}_input_ids"]
            theirs[side] = (ids[:n_prompt], ids[n_prompt:])
        if isinstance(result, Refusal):
            too_long = result.reason is Reason.PROMPT_TOO_LONG
            assert theirs["chosen"] == theirs["rejected"] or (too_long and max_length == 128)
            continue
        prompt, chosen, rejected = ids_of(result.group)
        assert (prompt, chosen) == theirs["chosen"]
        assert (prompt, rejected) == theirs["rejected"]
        n_kept += 1
    assert n_kept > 350
