"""Names and texts that others chose, wherever people look: shown as they are, never interpreted."""

import io
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from rich.console import Console

from orpo_ray.config.schema import ORPOConfig
from orpo_ray.reports.card import is_hub_id, write_model_card
from orpo_ray.reports.evaluation import _tables
from orpo_ray.reports.live import LiveView
from orpo_ray.reports.live_sweep import leaderboard
from orpo_ray.reports.page import as_markdown, fenced, render
from orpo_ray.reports.status import _print_table
from orpo_ray.runs.statistics import STATISTICS, Estimate, SetEvaluation
from orpo_ray.runs.sweep import Goal
from orpo_ray.storage.folder import Folder

MARKUP = ["[/red]", "[bold]x", "[link=http://h.example]click[/link]", "a [1] b", "[@click=x]y"]
CONTROLS = ["\x1b[2J", "\x1b]0;title\x07", "a\rb", "\x9b31m", "x\u202ey"]


def shown(*things: object) -> str:
    out = io.StringIO()
    console = Console(file=out, width=200, force_terminal=True, color_system=None)
    for thing in things:
        console.print(thing)
    return out.getvalue()


def everywhere(text: str) -> list[str]:
    """A text as a subset, the name of a set, an evaluation, a cell of a status and a setting."""
    values = dict.fromkeys(STATISTICS, Estimate(0.5, 0.4, 0.6))
    part = SetEvaluation(2, values, {text: {"pairs": 2, "figures": values}}, {}, {}, "s")
    view = LiveView(10)
    view.add_evaluation("eval_", text)
    table = io.StringIO()
    _print_table(Console(file=table, width=200), (text,), [(text, "b")])
    goal = Goal(f"eval_{text}", "eval_", "min", None)
    return [
        shown(*_tables("eval", part)),
        shown(*_tables(text, part)),
        shown(view),
        table.getvalue(),
        shown(leaderboard([], goal)),
    ]


@pytest.mark.parametrize("text", MARKUP)
def test_markup_is_shown_as_text(text):
    for out in everywhere(text):
        assert text in out


@pytest.mark.parametrize("text", CONTROLS)
def test_control_characters_reach_no_terminal(text):
    for out in everywhere(text):
        assert not {"\x1b]", "\x07", "\x9b", "\u202e"}.intersection(out)
        assert "\x1b[2J" not in out
        assert "\\x" in out or "\\r" in out or "\\u202e" in out


def test_pages_escape_markup_and_control_characters_and_hide_secrets():
    text = "<script>x</script>\x1b[2J https://me:s3cretpassword@h.example/x"
    page = render("data.html.j2", title=text, parts=[], columns=[])
    assert "<script>" not in page
    assert "\x1b" not in page
    assert "s3cret" not in page


@pytest.mark.parametrize(
    "text", ["a | b", "<img src=x>", "[x](http://h)", "*a* _b_ `c`", "# a\n- b", "![x](y)", "\\|"]
)
def test_a_text_in_markdown_is_one_line_without_markup(text):
    escaped = as_markdown(text)
    assert "\n" not in escaped
    assert "<img" not in escaped
    for special in "|[]*`":
        assert all(escaped[i - 1] == "\\" for i, c in enumerate(escaped) if c == special)
    assert as_markdown("same_answers in a_b.jsonl") == "same_answers in a_b.jsonl"


def test_no_line_of_a_text_ends_its_block():
    assert fenced("a\n```\nb\n`````\nc", "yaml").splitlines()[0] == "``````yaml"
    assert fenced("a").splitlines() == ["```", "a", "```"]


def write_card(run: Path, **changes) -> ModelCard:
    (run / "final").mkdir(parents=True)
    (run / "final" / "orpo_ray.json").write_text('{"step": 60}')
    paths = {str(run / "private" / "pairs.jsonl"): {}}
    report = {"train": {"rows_kept": 3, "pairs": 3, "sources": paths}}
    config = ORPOConfig(max_steps=60, **changes)
    write_model_card(Folder.at(run), config, report)
    return ModelCard.load(run / "final" / "README.md")


def test_a_card_names_no_place_of_this_machine(tmp_path):
    run = tmp_path / "alice" / "runs" / "first"
    template = tmp_path / "alice" / "chat.jinja"
    template.parent.mkdir(parents=True)
    template.write_text("{{ messages }}")
    card = write_card(
        run,
        model_name_or_path=str(tmp_path / "alice" / "models" / "base"),
        baseline="s3://company-internal/base",
        train_files=[str(run / "private" / "pairs.jsonl"), "s3://company-internal/more.jsonl"],
        eval_files=[{"path": "~/alice/held.jsonl", "name": "held"}],
        output_dir=str(tmp_path / "alice" / "runs"),
        token_cache_dir="s3://company-internal/cache",
        chat_template=str(template),
    )
    text = card.content
    for part in (str(tmp_path), "alice", "private", "company-internal", str(Path.home()) + "/"):
        assert part not in text, part
    for part in ("pairs.jsonl", "more.jsonl", "held.jsonl", "base"):
        assert part in text


def test_the_metadata_is_what_the_hub_knows(tmp_path):
    """Loaded by huggingface_hub, which refuses what is no metadata of a model."""
    card = write_card(tmp_path / "a", model_name_or_path="org/base", dataset_name="org/pairs")
    assert card.data.to_dict() == {
        "base_model": "org/base",
        "datasets": ["org/pairs"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["orpo", "preference", "orpo_ray"],
    }
    assert "base_model" not in write_card(tmp_path / "b").data.to_dict()
    assert [is_hub_id(n) for n in ("org/name", "gpt2", "a/b/c", "../x", "s3://b/x", None)] == [
        *(True, True, False, False, False, False)
    ]


CARDS = {
    "---\nlicense: apache-2.0\n---\n# Base": "apache-2.0",
    "---\nlicense: [mit]\n---\n": None,
    "---\nlicense: '](http://x) <b>'\n---\n": None,
    "---\nlicense: !!python/object/apply:os.system [x]\n---\n": None,
    "---\n- a\n---\n": None,
    "---\na: " + "[" * 2000 + "\n---\n": None,
    "no metadata": None,
    "\xff": None,
}


@pytest.mark.parametrize("text", CARDS, ids=range(len(CARDS)))
def test_the_license_is_that_of_the_base_models_own_card(tmp_path, text):
    """Which is of others, and may hold anything."""
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text(text, encoding="latin-1")
    card = write_card(tmp_path / "run", model_name_or_path=str(base))
    assert card.data.to_dict().get("license") == CARDS[text]


def test_a_prompt_does_not_end_the_block_of_the_settings(tmp_path):
    prompt = "a\n```\n<script>x</script>"
    card = write_card(tmp_path / "a", sample_prompts=[prompt])
    block = card.content[card.content.index("## Settings") : card.content.index("## Citation")]
    assert block.count("````") == 2


def test_a_figure_that_is_not_there_costs_its_line_alone():
    """As in an evaluation of a version that did not compute it."""
    known = {"accuracy": Estimate(0.5, 0.4, 0.6)}
    out = shown(*_tables("eval", SetEvaluation(2, known, {}, {}, {}, "s")))
    assert "accuracy" in out
    assert "perplexity" not in out
