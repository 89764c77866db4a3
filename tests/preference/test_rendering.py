"""Chat templates that loop for ever or fill the memory."""

import pickle
import subprocess
import sys
import threading

import pytest
from transformers import PreTrainedTokenizerFast

from orpo_ray.dataset.ingest import ingest
from orpo_ray.demo.model import train_tokenizer
from orpo_ray.preference import rendering
from orpo_ray.preference.errors import DataError
from orpo_ray.preference.records import Reason, Record, Refusal
from orpo_ray.preference.rendering import TemplateLimitError, apply_template
from orpo_ray.preference.templates import PairText, render
from tests.reference.ingest import map_tasks, request_of, write_rows

LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
DOUBLES = (
    "{% set n = namespace(s='x') %}{% for a in range(29) %}{% set n.s = n.s ~ n.s %}{% endfor %}"
)
CALLS = "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(99) }}"
TURN = [{"role": "user", "content": "hi"}]
CHAT = Record(tuple(TURN), ({"role": "assistant", "content": "yes"},), tuple(TURN))


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(["some text"])


@pytest.mark.parametrize("template", [LOOPS, CALLS, "hi {{ ('x' * 9999)|list|sort }}" + LOOPS])
def test_a_template_without_an_end_ends_the_run(tokenizer, template, monkeypatch) -> None:
    """In a thread, as in training workers; the next conversation of the thread is rendered."""
    monkeypatch.setattr(rendering, "CPU_S", 0.3)
    found: list[object] = []

    def work() -> None:
        for tokenizer.chat_template in (template, "{{ messages[0].content }}"):
            try:
                found.append(apply_template(tokenizer, TURN))
            except DataError as error:
                found.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert isinstance(found[0], TemplateLimitError)
    assert len(found[0].lines) == 1
    assert "took more than 0.3 s" in found[0].lines[0]
    assert found[1] == "hi"


def test_a_template_that_fills_the_memory_ends_the_run(tokenizer, monkeypatch) -> None:
    """2^29 characters, and half of them; what is left of it is freed."""
    monkeypatch.setattr(rendering, "GIB", 0.05)
    tokenizer.chat_template = DOUBLES + LOOPS
    with pytest.raises(TemplateLimitError, match=r"0\.05 GiB for one conversation"):
        render(CHAT, tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert isinstance(render(CHAT, tokenizer), PairText)


def test_a_row_that_a_template_makes_too_long_is_refused(tokenizer) -> None:
    tokenizer.chat_template = "{% for m in messages %}{{ m.content * 3000 }}{% endfor %}"
    refused = render(CHAT, tokenizer, most_characters=5999)
    assert isinstance(refused, Refusal)
    assert refused.reason is Reason.TOO_LARGE
    assert isinstance(render(CHAT, tokenizer, most_characters=15000), PairText)


@pytest.mark.long
def test_a_call_that_never_returns_ends_its_process() -> None:
    """As Ray starts another one for the data task, a few times, and then names the file.

    The power has a billion digits, which one instruction of Python computes.
    """
    script = (
        "from orpo_ray.preference import rendering\n"
        "from orpo_ray.demo.model import train_tokenizer\n"
        "rendering.CPU_S, rendering._GRACE_S = 0.2, 0.3\n"
        "tokenizer = train_tokenizer(['some text'])\n"
        "tokenizer.chat_template = '{{ messages[0].content * (10 ** (10 ** n)) }}'\n"
        "rendering.apply_template(tokenizer, [{'role': 'user', 'content': 'a'}], n=9)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert done.returncode == -26  # SIGVTALRM


def test_an_ingest_with_such_a_template_ends(tokenizer, tmp_path, monkeypatch) -> None:
    """With an error, not an item among others, as every other split would take as long."""
    monkeypatch.setattr(rendering, "CPU_S", 0.3)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    answers = {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    file = write_rows(tmp_path / "a.jsonl", [{"prompt": TURN, **answers}])
    request = request_of((file,), str(tmp_path / "tokenizer"), tmp_path, chat_template=LOOPS)
    with pytest.raises(TemplateLimitError, match=r"a\.jsonl:1: .*tokenizer took") as caught:
        ingest(request, map_tasks)
    assert isinstance(pickle.loads(pickle.dumps(caught.value)), TemplateLimitError)
