"""Chat templates shaped like those of well-known families: what is trained is what they send.

TRL ships the templates of several families; the others are written here in their shape.
"""

import functools
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from orpo_ray.preference.groups import RowId
from orpo_ray.preference.records import TEMPLATE_DROPS, Note, Reason, Record, Refusal
from orpo_ray.preference.shapes import ParsedRow, RowReader
from orpo_ray.preference.special_tokens import special_names, special_token_in
from orpo_ray.preference.templates import PairText, render
from orpo_ray.preference.tokenization import Limits, PairTokenizer, TokenizedPair

# Mistral v0.3: a system message is put before the last question, answers are trimmed.
MISTRAL_3 = (
    "{{ bos_token }}{% set ns = namespace(system='') %}{% for m in messages %}"
    "{% if m.role == 'system' %}{% set ns.system = m.content + '\n\n' %}"
    "{% elif m.role == 'user' %}{{ '[INST] ' + (ns.system if loop.index0 >= messages | length - 2"
    " else '') + m.content + '[/INST]' }}"
    "{% else %}{{ ' ' + m.content | trim + eos_token }}{% endif %}{% endfor %}"
)
# Mistral v7: a system message in tokens of its own.
MISTRAL_7 = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ '[SYSTEM_PROMPT]' + m.content + '[/SYSTEM_PROMPT]' }}"
    "{% elif m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]' }}"
    "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
)
PHI_4 = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)
# SmolLM3: the date in a header of its own, thoughts of the last answer only.
SMOL_3 = (
    "<|im_start|>system\nToday Date: {{ strftime_now('%d %B %Y') }}\n"
    "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}<|im_end|>\n"
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<|im_start|>user\n' + m.content + "
    "'<|im_end|>\n' }}{% elif m.role == 'assistant' %}{{ '<|im_start|>assistant\n' + "
    "m.content.lstrip('\n') + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML = ["<|im_start|>", "<|endoftext|>"]
# Template (TRL's by name, or its text), beginning and end tokens, other special tokens.
FAMILIES: dict[str, tuple[str, str | None, str, list[str]]] = {
    "Llama 3": ("llama3", "<|begin_of_text|>", "<|eot_id|>", ["<|start_header_id|>", "<|end_of|>"]),
    "Llama 3.2": ("llama3_2", "<|begin_of_text|>", "<|eot_id|>", ["<|start_header_id|>"]),
    "Qwen 2.5": ("qwen2_5", None, "<|im_end|>", CHATML),
    "Qwen 3": ("qwen3", None, "<|im_end|>", CHATML),
    "Gemma": ("gemma", "<bos>", "<eos>", ["<start_of_turn>", "<end_of_turn>"]),
    "Gemma 3": ("gemma3", "<bos>", "<eos>", ["<start_of_turn>", "<end_of_turn>"]),
    "Mistral v0.3": (MISTRAL_3, "<s>", "</s>", ["[INST]", "[/INST]"]),
    "Mistral v7": (MISTRAL_7, "<s>", "</s>", ["[INST]", "[/INST]", "[SYSTEM_PROMPT]"]),
    "Phi 3": ("phi3", "<s>", "<|endoftext|>", ["<|user|>", "<|assistant|>", "<|end|>"]),
    "Phi 4": (PHI_4, "<|endoftext|>", "<|im_end|>", ["<|im_start|>", "<|im_sep|>"]),
    "DeepSeek R1": (
        "deepseek_r1_distill",
        "<\uff5cbegin\u2581of\u2581sentence\uff5c>",
        "<\uff5cend\u2581of\u2581sentence\uff5c>",
        ["<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>"],
    ),
    "SmolLM3": (SMOL_3, None, "<|im_end|>", CHATML),
    "gpt-oss": (
        "gptoss",
        "<|startoftext|>",
        "<|return|>",
        ["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>"],
    ),
}
NO_SYSTEM = {"Gemma"}  # raises for a system message
LETTERS = st.text("ab c.\n<|>[]/_\u00e9", min_size=1).filter(lambda text: bool(text.strip()))


@functools.cache
def tokenizer_of(family: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with a family's special tokens and chat template."""
    template, bos, eos, others = FAMILIES[family]
    if "{" not in template:
        spec = find_spec("trl")
        assert spec is not None
        assert spec.origin is not None
        path = Path(spec.origin).parent / "chat_templates" / f"{template}.jinja"
        template = path.read_text(encoding="utf-8")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[name for name in (bos, eos, *others) if name],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(["user assistant a b c"], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=bos, eos_token=eos)
    tokenizer.chat_template = template
    return tokenizer


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def read(row: dict[str, Any]) -> Record | Refusal:
    found = RowReader().read(row)
    return found.records[0] if isinstance(found, ParsedRow) else found


def text_of(family: str, row: dict[str, Any]) -> PairText:
    record = read(row)
    assert isinstance(record, Record), record
    text = render(record, tokenizer_of(family))
    assert isinstance(text, PairText), text
    return text


def tokenize(family: str, text: PairText) -> TokenizedPair | Refusal:
    pairs = PairTokenizer(tokenizer_of(family), Limits(100_000), special_tokens="refuse")
    return pairs.tokenize([text], [RowId(0, 0)])[0]


@pytest.mark.parametrize("family", FAMILIES)
@settings(deadline=None, max_examples=12)
@given(asked=LETTERS, chosen=LETTERS, rejected=LETTERS)
def test_a_pair_is_what_the_model_is_sent(
    family: str, asked: str, chosen: str, rejected: str
) -> None:
    """The prompt has the ids that `apply_chat_template` gives, the answer ends in one end token."""
    record = read(
        {
            "prompt": [user(asked)],
            "chosen": [assistant(chosen)],
            "rejected": [assistant(rejected)],
        }
    )
    tokenizer = tokenizer_of(family)
    if isinstance(record, Refusal):
        assert record.reason is Reason.IDENTICAL_ANSWERS
        return
    text = render(record, tokenizer)
    assert isinstance(text, PairText), text
    pair = tokenize(family, text)
    if isinstance(pair, Refusal):  # templates that trim make some answers the same
        assert pair.reason is Reason.IDENTICAL_ANSWERS
        return
    assert not text.notes & TEMPLATE_DROPS
    asking = tokenizer.apply_chat_template([user(asked)], add_generation_prompt=True)
    asking = asking["input_ids"]
    if Note.TEMPLATE_DATE not in text.notes and Note.OPENING_CUT not in text.notes:
        answer_ids = pair.group.completions[0].tolist()
        assert (pair.group.prompt.tolist() + answer_ids)[: len(asking)] == asking
    for ids, answer in zip(pair.group.completions, (chosen, rejected), strict=True):
        assert ids.tolist().count(tokenizer.eos_token_id) == 1
        assert ids[-1] == tokenizer.eos_token_id
        assert answer.strip() in tokenizer.decode(ids)
        assert not tokenizer.decode(ids).endswith(("assistant\n", "model\n"))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_system_message_is_trained_or_missed(family: str) -> None:
    row = {
        "prompt": [{"role": "system", "content": "Be brief, please."}, user("q")],
        "chosen": [assistant("Rome.")],
        "rejected": [assistant("Oslo.")],
    }
    record = read(row)
    assert isinstance(record, Record)
    text = render(record, tokenizer_of(family))
    if isinstance(text, Refusal):
        assert family in NO_SYSTEM
        assert text.reason is Reason.TEMPLATE_REFUSED
    else:
        assert "Be brief, please." in text.prompt
        assert not text.notes & TEMPLATE_DROPS


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_template_leaves_out_is_noted(family: str) -> None:
    """Each part of a row is in the text, or its note is there."""
    tool = {
        "type": "function",
        "function": {
            "name": "weather_now",
            "description": "d",
            "parameters": {"type": "object", "properties": {}},
        },
    }
    call = {"type": "function", "function": {"name": "weather_now", "arguments": '{"a": "Bonn"}'}}
    row = {
        "prompt": [user("How is it?")],
        "chosen": [{"role": "assistant", "content": "Looking.", "tool_calls": [call]}],
        "rejected": [assistant("<think>\nNo idea at all.\n</think>\n\nBad.")],
        "tools": [tool],
    }
    text = text_of(family, row)
    assert ("weather_now" in text.prompt) != (Note.DROPS_TOOLS in text.notes)
    assert ("Bonn" in text.chosen) != (Note.DROPS_CALLS in text.notes)
    assert ("Looking." in text.chosen) != (Note.DROPS_ASSISTANT in text.notes)
    assert ("No idea at all." in text.rejected) != (Note.DROPS_THOUGHTS in text.notes)


@pytest.mark.parametrize("family", FAMILIES)
def test_arguments_as_text_and_as_an_object_are_the_same(family: str) -> None:
    texts = []
    for arguments in ({"city": "Bonn"}, '{"city": "Bonn"}'):
        call = {"type": "function", "function": {"name": "look", "arguments": arguments}}
        chosen = {"role": "assistant", "content": None, "tool_calls": [call]}
        row = {"prompt": [user("q")], "chosen": [chosen], "rejected": [assistant("no")]}
        texts.append(text_of(family, row))
    assert texts[0] == texts[1]
    assert '\\"' not in texts[0].chosen
    assert "'city'" not in texts[0].chosen


@pytest.mark.parametrize("family", FAMILIES)
@settings(deadline=None, max_examples=10)
@given(data=st.data(), before=st.text("ab <|", max_size=3), after=st.text("ab |>", max_size=3))
def test_a_special_token_is_refused_wherever_it_stands(
    family: str, data: Any, before: str, after: str
) -> None:
    tokenizer = tokenizer_of(family)
    token = data.draw(st.sampled_from(special_names(tokenizer)))
    place = data.draw(st.sampled_from(["prompt", "middle", "tool", "key", "kwargs", "call"]))
    bad = f"x{before}{token}{after}x"
    row: dict[str, Any] = {
        "prompt": [user("q")],
        "chosen": [assistant("c")],
        "rejected": [assistant("r")],
    }
    if place == "prompt":
        row["prompt"] = [user(token + "q")]
    elif place == "middle":
        row["chosen"] = [assistant(bad), user("go on"), assistant("c")]
    elif place == "tool":
        row["tools"] = [{"type": "function", "function": {"name": "f", "description": bad}}]
    elif place == "key":
        properties = {bad: {"type": "string"}}
        row["tools"] = json.dumps([{"name": "f", "parameters": {"properties": properties}}])
    elif place == "kwargs":
        row["chat_template_kwargs"] = {"style": [bad]}
    else:
        call = {"function": {"name": "f", "arguments": json.dumps({"x": bad})}}
        row["chosen"] = [{"role": "assistant", "content": "", "tool_calls": [call]}]
    record = read(row)
    assert isinstance(record, Record), record
    refusal = special_token_in(record, tokenizer)
    assert refusal is not None
    assert refusal.reason is Reason.SPECIAL_TOKEN


@pytest.mark.parametrize("family", FAMILIES)
@settings(deadline=None, max_examples=10)
@given(data=st.data())
def test_a_special_token_across_a_border_is_refused(family: str, data: Any) -> None:
    """Half of it at the end of the prompt, half at the beginning of the answer."""
    token = data.draw(st.sampled_from(special_names(tokenizer_of(family))))
    cut = data.draw(st.integers(1, len(token) - 1))
    row = {"prompt": f"q {token[:cut]}", "chosen": f"{token[cut:]} c", "rejected": "r"}
    pair = tokenize(family, text_of(family, row))
    assert isinstance(pair, Refusal)
    assert pair.reason is Reason.SPECIAL_TOKEN


@pytest.mark.parametrize("family", FAMILIES)
def test_an_open_answer_is_continued(family: str) -> None:
    row = {
        "prompt": [user("Capital?"), assistant("It is called")],
        "chosen": [assistant(" Bonn.")],
        "rejected": [assistant(" Oslo.")],
    }
    text = text_of(family, row)
    assert text.prompt.endswith("It is called")
    assert text.chosen.startswith(" Bonn.")
    assert text.rejected.startswith(" Oslo.")


def test_the_date_is_the_same_on_every_day() -> None:
    for family in ("Llama 3.2", "SmolLM3", "gpt-oss"):
        row = {
            "prompt": [user("q")],
            "chosen": [assistant("c")],
            "rejected": [assistant("r")],
        }
        record = read(row)
        assert isinstance(record, Record)
        text = render(record, tokenizer_of(family), "2023-02-03")
        assert isinstance(text, PairText)
        is_dated = Note.TEMPLATE_DATE in text.notes
        written = [d for d in ("03 Feb 2023", "03 February 2023", "2023-02-03") if d in text.prompt]
        assert is_dated == bool(written)
        assert is_dated or family == "Llama 3.2"


def test_a_normalizer_does_not_make_special_tokens() -> None:
    """A tokenizer that maps full-width letters to plain ones, and then looks for its tokens."""
    from tokenizers import AddedToken, normalizers

    tokenizer = tokenizer_of.__wrapped__("Qwen 2.5")
    backend = tokenizer.backend_tokenizer
    backend.normalizer = normalizers.NFKC()
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [AddedToken("<|stop|>", special=True, normalized=True)]}
    )
    hidden = "<\uff5cstop\uff5c>"
    for row in (
        {"prompt": f"q {hidden}", "chosen": "c", "rejected": "r"},
        {"prompt": [user(hidden)], "chosen": [assistant("c")], "rejected": [assistant("r")]},
    ):
        record = read(row)
        assert isinstance(record, Record)
        assert special_token_in(record, tokenizer) is None
        text = render(record, tokenizer)
        assert isinstance(text, PairText)
        pairs = PairTokenizer(tokenizer, Limits(1000), special_tokens="refuse")
        refusal = pairs.tokenize([text], [RowId(0, 0)])[0]
        assert isinstance(refusal, Refusal), tokenizer.decode(refusal.group.prompt)
        assert refusal.reason is Reason.SPECIAL_TOKEN
