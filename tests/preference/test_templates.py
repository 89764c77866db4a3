"""Rendering messages with a chat template."""

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from orpo_ray.demo.model import train_tokenizer
from orpo_ray.preference.errors import DataError
from orpo_ray.preference.records import Message, Reason, Record, Refusal
from orpo_ray.preference.special_tokens import special_token_in
from orpo_ray.preference.templates import (
    PairText,
    empty_answer,
    render,
    shared_length,
    template_text,
)

CHATML = (
    "{% for message in messages %}"
    "<|{{ message.role }}|>{{ message.content }}<|eos|>{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# Opens the answer with an empty thought that a finished answer does not show.
THINKING = CHATML.replace("<|assistant|>{% endif %}", "<|assistant|><think></think>{% endif %}")
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(["some text"])


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


CHAT = Record((user("hi"),), (assistant("yes"),), (assistant("no"),))


def rendered(tokenizer: Any, template: str | None, record: Record) -> PairText:
    tokenizer.chat_template = template
    return render(record, tokenizer)


@pytest.mark.parametrize("template", [CHATML, None])
def test_text_stays_as_it_is(tokenizer: Any, template: str | None) -> None:
    """But for white space after an end token, which would be trained before the added one."""
    record = Record("p <|eos|>\n", " c\n", "r<|eos|>\n")
    assert rendered(tokenizer, template, record) == PairText("p <|eos|>\n", " c\n", "r<|eos|>")


def test_messages_ask_for_the_answer_and_end_with_it(tokenizer: Any) -> None:
    """The template's line end after the last `<|eos|>` is no part of the answer."""
    assert rendered(tokenizer, CHATML, CHAT) == PairText(
        "<|user|>hi<|eos|>\n<|assistant|>", "yes<|eos|>", "no<|eos|>"
    )


def test_a_template_that_does_not_end_its_answers(tokenizer: Any) -> None:
    """What follows the answer stays when it is not an end of sequence: the model learns it."""
    assert rendered(tokenizer, CHATML.replace("<|eos|>", "<|end|>"), CHAT) == PairText(
        "<|user|>hi<|end|>\n<|assistant|>", "yes<|end|>", "no<|end|>"
    )


def test_several_turns_and_several_messages_an_answer(tokenizer: Any) -> None:
    tool = {"role": "tool", "content": "42"}
    record = Record(
        ({"role": "system", "content": "be short"}, user("a"), assistant("b"), user("c")),
        (assistant("look"), tool, assistant("42")),
        (assistant("41"),),
    )
    text = rendered(tokenizer, CHATML, record)
    assert text.prompt == (
        "<|system|>be short<|eos|>\n<|user|>a<|eos|>\n<|assistant|>b<|eos|>\n"
        "<|user|>c<|eos|>\n<|assistant|>"
    )
    assert text.chosen == "look<|eos|>\n<|tool|>42<|eos|>\n<|assistant|>42<|eos|>"
    assert text.rejected == "41<|eos|>"


def test_the_prompt_is_what_all_renderings_share(tokenizer: Any) -> None:
    """An opened thought that the finished answers do not have is in neither part."""
    text = rendered(tokenizer, THINKING, CHAT)
    assert text == PairText("<|user|>hi<|eos|>\n<|assistant|>", "yes<|eos|>", "no<|eos|>")


def test_a_prompt_that_ends_with_the_assistant_leaves_its_turn_open(tokenizer: Any) -> None:
    record = Record((user("hi"), assistant("Well,")), (assistant("yes"),), (assistant("no"),))
    text = rendered(tokenizer, CHATML, record)
    assert text == PairText("<|user|>hi<|eos|>\n<|assistant|>Well,", "yes<|eos|>", "no<|eos|>")


def test_answers_without_a_prompt(tokenizer: Any) -> None:
    record = Record((), (assistant("yes"),), (assistant("no"),))
    assert rendered(tokenizer, CHATML, record) == PairText(
        "", "<|assistant|>yes<|eos|>", "<|assistant|>no<|eos|>"
    )


@pytest.mark.parametrize("template", [CHATML, THINKING])
def test_prompt_and_answer_are_the_template_of_the_whole(tokenizer: Any, template: str) -> None:
    text = rendered(tokenizer, template, CHAT)
    for side, messages in ((text.chosen, CHAT.chosen), (text.rejected, CHAT.rejected)):
        whole = tokenizer.apply_chat_template([*CHAT.prompt, *messages], tokenize=False)
        assert text.prompt + side == whole.rstrip("\n")


def test_further_fields_of_a_message_reach_the_template(tokenizer: Any) -> None:
    template = CHATML.replace("message.content", "(message.name or '') + message.content")
    record = Record(({**user("hi"), "name": "Ann: "},), CHAT.chosen, CHAT.rejected)
    assert rendered(tokenizer, template, record).prompt.startswith("<|user|>Ann: hi<|eos|>")


@pytest.mark.parametrize("template", [None, ""])
def test_messages_need_a_template(tokenizer: Any, template: str | None) -> None:
    with pytest.raises(DataError, match=r"no chat template.*use a chat model's tokenizer"):
        rendered(tokenizer, template, CHAT)


def test_shared_length() -> None:
    assert shared_length("abcd", "abce", "abx") == 2
    assert shared_length("ab", "abc") == 2
    assert shared_length("", "a") == 0
    assert shared_length([1, 2], [3, 2]) == 0


# Repeats the system's words in the last turn only, as a template that does not keep prefixes.
UNSTABLE = (
    "{% for m in messages %}{{ '[again]' if loop.last and m.role == 'user' }}{{ m.content }}|"
    "{% endfor %}"
)


def test_a_prompt_that_an_answer_changes_is_refused(tokenizer: Any) -> None:
    tokenizer.chat_template = UNSTABLE
    refusal = render(CHAT, tokenizer)
    assert isinstance(refusal, Refusal)
    assert refusal.reason is Reason.UNSTABLE_BORDER
    assert "from '[again]hi|' on" in refusal.detail


def test_what_a_template_raises_is_said(tokenizer: Any) -> None:
    tokenizer.chat_template = NO_SYSTEM + CHATML
    record = Record(({"role": "system", "content": "s"},), CHAT.chosen, CHAT.rejected)
    refusal = render(record, tokenizer)
    assert refusal == Refusal(Reason.TEMPLATE_REFUSED, "the chat template raised: no system turn")


def test_a_row_may_bring_arguments_and_tools(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% if tools %}tools: {{ tools[0].function.name }}\n{% endif %}"
        "{% if formal %}formally\n{% endif %}" + CHATML
    )
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    record = Record(CHAT.prompt, CHAT.chosen, CHAT.rejected, {"tools": tools, "formal": True})
    text = render(record, tokenizer)
    assert isinstance(text, PairText)
    assert text.prompt == "tools: look\nformally\n<|user|>hi<|eos|>\n<|assistant|>"


def test_the_end_of_turn_is_trained_where_it_is_not_the_end_of_sequence(tokenizer: Any) -> None:
    tokenizer.chat_template = CHATML.replace("<|eos|>", "<|im_end|>")
    text = render(CHAT, tokenizer)
    assert isinstance(text, PairText)
    assert (text.chosen, text.rejected) == ("yes<|im_end|>", "no<|im_end|>")


@pytest.mark.parametrize(
    ("record", "found"),
    [
        (Record("<|bos|>p", "c<|eos|>", "r <|eos|>"), None),
        (Record("p", "c", "r<|eos|>\n"), None),
        (Record("p", "c", "r"), None),
        (Record("p <|bos|>", "c", "r"), "prompt contains the special token <|bos|>"),
        (Record("p", "c<|eos|>d", "r"), "chosen contains the special token <|eos|>"),
        (Record("p", "c", "<|pad|>r"), "rejected contains the special token <|pad|>"),
        (
            Record((user("<|eos|>"),), CHAT.chosen, CHAT.rejected),
            "prompt contains the special token <|eos|>",
        ),
        (CHAT, None),
    ],
)
def test_special_tokens_in_texts_are_found(
    tokenizer: Any, record: Record, found: str | None
) -> None:
    refusal = special_token_in(record, tokenizer)
    if found is None:
        assert refusal is None
    else:
        assert refusal is not None
        assert refusal.detail.startswith(found)


def test_a_template_is_a_text_or_a_file(tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text(CHATML)
    assert template_text(CHATML) == CHATML
    assert template_text(str(tmp_path / "t.jinja")) == CHATML
    with pytest.raises(DataError, match=r"chat_template: gone\.jinja: no such file"):
        template_text("gone.jinja")


@pytest.mark.parametrize("template", ["{{ 1 / 0 }}", "{{ messages.index('x') }}", "{{ 'a' + 1 }}"])
def test_whatever_a_template_raises_costs_one_row(tokenizer: Any, template: str) -> None:
    tokenizer.chat_template = template
    refusal = render(CHAT, tokenizer)
    assert isinstance(refusal, Refusal)
    assert refusal.reason is Reason.TEMPLATE_REFUSED


def test_special_tokens_are_found_in_calls_of_tools_too(tokenizer: Any) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": ["<|eos|>"]}}}
    answer: Message = {"role": "assistant", "content": "", "tool_calls": [call]}
    refusal = special_token_in(Record(CHAT.prompt, (answer,), CHAT.rejected), tokenizer)
    assert refusal is not None
    assert refusal.detail.startswith("chosen contains the special token <|eos|>")


def test_an_answer_of_nothing_but_its_end_is_empty(tokenizer: Any) -> None:
    for answer in ("<|eos|>", " <|eos|>\n", "  "):
        refusal = empty_answer(PairText("p", "c", answer), tokenizer)
        assert refusal is not None
        assert refusal.reason is Reason.EMPTY_REJECTED
    assert empty_answer(PairText("p", "c<|eos|>", "r"), tokenizer) is None
