"""The page of a run: every chart with its points, before and after, data, faults, config."""

import json
import logging
import math
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from matplotlib.image import imread
from rich.console import Console

from orpo_ray.config.file import to_yaml
from orpo_ray.config.schema import ORPOConfig
from orpo_ray.reports.card import write_model_card
from orpo_ray.reports.live import RunWatcher, sparkline
from orpo_ray.reports.run import write_run_report
from orpo_ray.runs.files import RunFiles
from orpo_ray.storage.folder import Folder
from tests.reports.test_live import Terminal

pytestmark = pytest.mark.long  # pages with a dozen charts each

CONFIG = ORPOConfig(max_steps=60, model_name_or_path="<b>base</b>", beta=0.25)
LEARNED = (
    "loss",
    "nll_loss",
    "log_odds_chosen",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
)
TRAINED_ONLY = ("learning_rate", "grad_norm", "pairs_per_s", "tokens_per_s")
N_CHARTS = 9  # both log-probabilities share one
LOGGED, EVALUATED = (10, 20, 30, 40, 50, 60), (0, 30, 60)


def learned(step: int, prefix: str = "") -> dict[str, float]:
    """What a model that learns would log; accuracies are 0.5 at the start and 0.8 at step 60."""
    figures = {
        "loss": 7.0 - step / 20,
        "rewards/chosen": -1.5,
        "rewards/rejected": -1.75,
        "rewards/accuracies": 0.5 + step / 200,
        "rewards/margins": step / 240,
        "log_odds_chosen": step / 60,
        "log_odds_ratio": -0.6,
        "nll_loss": 6.5 - step / 20,
        "logps/chosen": -7.0 + step / 20,
        "logps/rejected": -7.0 + step / 30,
    }
    return {prefix + name: value for name, value in figures.items()}


def write_lines(run: Path, prefixes: tuple[str, ...] = (), **broken: int) -> None:
    """Metrics of 60 steps, by the writer of the runs; NaN in place of `broken` at those steps."""
    files = RunFiles(Folder.at(run), is_writer=True)
    for step in sorted({*LOGGED, *(EVALUATED if prefixes else ())}):
        line: dict[str, Any] = {"step": step, "epoch": step / 120}
        if step in LOGGED:
            line |= learned(step) | {"learning_rate": 8e-6 * (1 - step / 60), "grad_norm": 1.5}
            line |= {"pairs_per_s": 100.0 + step % 7, "tokens_per_s": 9000.0 + step}
            line |= {"seconds/forward_backward": 3.0, "seconds/data_wait": 0.5}
        for prefix in prefixes if step in EVALUATED else ():
            line |= learned(step, prefix)
        line |= {name: math.nan for name, at in broken.items() if at == step}
        files.metrics(line)


def data_set(**changed: Any) -> dict[str, Any]:
    counts = {
        "rows_read": 100,
        "rows_kept": 97,
        "rows_held_out": 0,
        "rows_refused": 3,
        "truncated_pairs": 5,
    }
    spread = {"mean": 20.5, "p5": 3, "p50": 19, "p95": 44, "max": 61}
    return (
        counts
        | {
            "sources": {"/data/<a>.jsonl": counts},
            "refused": {"empty_chosen": 1, "same_answers": 2},
            "shapes": {"texts": 97},
            "ignored_columns": [],
            "pairs": 97,
            "pairs_left_out": 0,
            "pairs_read": 97,
            "pairs_chosen_longer": 40,
            "pairs_equally_long": 1,
            "truncated_prompts": 5,
            "truncated_completions": 2,
            "duplicate_pairs": 0,
            "tokens": 4000,
            "padded_tokens": 12000,
            "lengths": dict.fromkeys(("prompt", "chosen", "rejected", "longest"), spread),
        }
        | changed
    )


def write_page(run: Path, *eval_names: str) -> str:
    report = {name: data_set() for name in ("train", *eval_names)}
    return write_run_report(run, CONFIG, report).read_text(encoding="utf-8")


def write_little(run: Path) -> None:
    """One metric of one step, for pages that are read for something else than their charts."""
    RunFiles(Folder.at(run), is_writer=True).metrics({"step": 60, "epoch": 0.5, "loss": 4.0})


@pytest.fixture(scope="module")
def trained_page(tmp_path_factory) -> str:
    """Of a run without evaluation."""
    run = tmp_path_factory.mktemp("trained")
    write_lines(run)
    return write_page(run)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory) -> Path:
    """A run with one evaluation set, and its page."""
    run = tmp_path_factory.mktemp("evaluated")
    write_lines(run, ("eval_",))
    write_page(run, "eval")
    return run


@pytest.fixture(scope="module")
def named_page(tmp_path_factory) -> str:
    """Of a run with two evaluation sets, one of which has intervals."""
    run = tmp_path_factory.mktemp("named")
    write_lines(run, ("eval_easy_", "eval_hard_"))
    files = RunFiles(Folder.at(run), is_writer=True)
    for step, low, high in ((0, 0.41, 0.59), (30, 0.1, 0.2), (60, 0.71, 0.88)):
        figures = {"accuracy": (0.8, low, high), "log_odds": (1.0, math.nan, math.nan)}
        files.evaluation(step, "eval_hard_", 97, figures)
    return write_page(run, "eval_easy", "eval_hard")


def n_points(page: str, metric: str) -> int:
    """Points of the line that has this metric as its id, in all of the page's charts."""
    paths = re.findall(rf'<g id="{re.escape(metric)}">\s*<path d="([^"]+)"', page)
    return sum(len(re.findall("[ML]", path)) for path in paths)


def cells(page: str, first: str) -> list[str]:
    """The table row that starts with a cell."""
    row = re.search(rf"<tr><td>{re.escape(first)}</td>(.*?)</tr>", page, flags=re.DOTALL)
    assert row is not None
    return re.findall(r"<td[^>]*>(.*?)</td>", row[1], flags=re.DOTALL)


def test_without_evaluation_every_chart_has_the_points_of_training(trained_page: str) -> None:
    for metric in (*LEARNED, *TRAINED_ONLY):
        assert n_points(trained_page, metric) == len(LOGGED), metric
    assert trained_page.count("<figure>") == N_CHARTS
    assert "Before and after" not in trained_page
    assert cells(trained_page, "steps") == ["60 of 60, 0.5 epochs"]


def test_one_evaluation_set_before_and_after(evaluated: Path) -> None:
    page = (evaluated / "report.html").read_text(encoding="utf-8")
    for metric in LEARNED:
        assert n_points(page, f"eval_{metric}") == len(EVALUATED), metric
    assert cells(page, "evaluation")[:3] == ["97", "0.500", "0.800"]
    assert cells(page, "evaluation data") == ["97 pairs: /data/&lt;a&gt;.jsonl"]


def test_intervals_stand_beside_the_figures_that_have_them(named_page: str) -> None:
    """At the first step and at the last, of the set that they belong to."""
    assert cells(named_page, "hard")[1:5] == [
        "0.500\n(0.410 to 0.590)",
        "0.800\n(0.710 to 0.880)",
        "0.000",
        "1.000",
    ]
    assert cells(named_page, "easy")[1:3] == ["0.500", "0.800"]


def test_where_the_time_went_adds_up(trained_page: str) -> None:
    """Six lines say 3 s and 0.5 s each; between their times lies next to nothing."""
    assert cells(trained_page, "forward backward") == ["18.0", "85.7%"]
    assert cells(trained_page, "data wait") == ["3.0", "14.3%"]
    assert cells(trained_page, "the rest") == ["0.0", "0.0%"]


def test_samples_before_and_after_and_the_first_suspects(tmp_path: Path) -> None:
    """Of the model in final/, which is not the last one; rows with a positive margin are fine."""
    write_little(tmp_path)
    files = RunFiles(Folder.at(tmp_path), is_writer=True)
    for step in (0, 30, 60):
        files.sample(step, "<p>rompt", f"answer at {step}", "preferred")
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "orpo_ray.json").write_text('{"step": 30}')
    suspects = [
        {"file": "a.jsonl", "row": row, "margin_mean": mean, "margin_spread": 0.25, "passes": 3}
        for row, mean in ((7, -0.5), (9, 0.125))
    ]
    (tmp_path / "suspects.jsonl").write_text("".join(json.dumps(s) + "\n" for s in suspects))
    early = write_page(tmp_path)
    assert "too early to tell" in early
    assert "0.5 passes over the data" in early
    assert "a.jsonl</td><td>7" not in early
    files.margins(60, [0.5] * 20)
    page = write_page(tmp_path)
    assert "too early to tell" not in page
    assert cells(page, "prompt") == ["&lt;p&gt;rompt"]
    assert cells(page, "before") == ["answer at 0"]
    assert cells(page, "after") == ["answer at 30"]
    assert cells(page, "a.jsonl") == ["7", "-0.500", "0.250", "3"]
    assert page.count("<td>a.jsonl</td>") == 1


def test_the_card_has_data_figures_and_curves(tmp_path: Path) -> None:
    """Its figures are those of the page; a folder is not named as a hub id."""
    run = tmp_path / "a-run"
    (run / "final").mkdir(parents=True)
    (run / "final" / "orpo_ray.json").write_text('{"step": 60}')
    write_lines(run, ("eval_",))
    files = RunFiles(Folder.at(run), is_writer=True)
    files.evaluation(60, "eval_", 97, {"accuracy": (0.8, 0.71, 0.88)})
    write_page(run, "eval")
    report = {"train": data_set(), "eval": {"rows_kept": 97, "pairs": 97}}
    write_model_card(Folder.at(run), CONFIG.replace(model_name_or_path=str(tmp_path)), report)
    card = ModelCard.load(run / "final" / "README.md")
    assert "base_model" not in card.data.to_dict()
    row = "| evaluation | 97 | 0.500 | 0.800 (0.710 to 0.880) | 0.000 | 1.000 | "
    assert row + "6.500 | 3.500 |" in card.text
    assert "100 rows read, 97 kept, 0 held out, 3 refused (2 same_answers, 1 empty_chosen); " in (
        card.text
    )
    assert "- eval: 97 rows held out of the training files" in card.text
    assert "![Curves of the run](curves.png)" in card.text
    assert (run / "final" / "curves.png").read_bytes() == (run / "curves.png").read_bytes()
    write_model_card(Folder.at(run), CONFIG.replace(model_name_or_path="org/model"), report)
    assert ModelCard.load(run / "final" / "README.md").data.base_model == "org/model"


@pytest.mark.parametrize(
    ("objective", "method", "cited"),
    [("simpo", "with SimPO (", "2405.14734"), ("sft", "with supervised fine-tuning", None)],
)
def test_the_card_and_the_page_name_the_objective(tmp_path: Path, objective, method, cited) -> None:
    run = tmp_path / "a-run"
    (run / "final").mkdir(parents=True)
    (run / "final" / "orpo_ray.json").write_text('{"step": 60}')
    write_lines(run, ("eval_",))
    report = {"train": data_set(), "eval": {"rows_kept": 97, "pairs": 97}}
    config = CONFIG.replace(objective=objective, beta=2.0)
    write_model_card(Folder.at(run), config, report)
    card = ModelCard.load(run / "final" / "README.md")
    assert method in card.text
    assert "with ORPO" not in card.text
    assert objective in card.data.tags
    assert ("bibtex" in card.text) == (cited is not None)
    assert cited is None or f"arXiv:{cited}" in card.text
    assert config.orpo.text in card.text


def test_a_line_of_blocks_goes_from_the_least_to_the_greatest() -> None:
    """Four values in two characters are averaged: 0.5 and 6.5; what is not finite is blank."""
    assert sparkline([0.0, 7.0, 1.0, None], 8) == "▁█▂ "
    assert sparkline([0.0, 1.0, 6.0, 7.0], 2) == "▁█"
    assert sparkline([2.0, 2.0], 8) == "▁▁"
    assert sparkline([None], 8) == " "
    assert sparkline([], 8) == ""


def test_a_terminal_shows_progress_curves_and_the_last_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was last drawn, once the escape sequences are taken away."""
    for name in ("CI", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    text = Terminal()
    console = Console(file=text, force_terminal=True, width=120, legacy_windows=False)
    with RunWatcher(tmp_path, 60, console):
        write_lines(tmp_path, ("eval_",))
        wait_for(text.getvalue, "60/60")
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text.getvalue())
    assert re.search(
        r"step 60/60  0:00:00 left  loss 4\.0000 +accuracy 0\.800 +log odds 1\.0000", shown
    )
    assert "log odds ▁▂▄▅▇█ 1.0000" in shown
    assert "accuracy ▁▂▄▅▇█ 0.800" in shown
    assert "evaluation at step 60: accuracy 0.800 " in shown


def test_every_named_evaluation_set_has_its_row_and_its_points(named_page: str) -> None:
    for name in ("easy", "hard"):
        for metric in LEARNED:
            assert n_points(named_page, f"eval_{name}_{metric}") == len(EVALUATED), metric
        found = [cell.split("\n")[0] for cell in cells(named_page, name)[:3]]
        assert found == ["97", "0.500", "0.800"]
    assert named_page.count("<figure>") == N_CHARTS


def test_the_picture_has_a_coloured_line_in_each_of_its_charts(evaluated: Path) -> None:
    """Three charts in a row; axes, text and grid are grey, lines are not."""
    picture = imread(evaluated / "curves.png")[..., :3]
    is_coloured = (picture.max(axis=2) - picture.min(axis=2)) > 0.2
    n_rows = math.ceil(N_CHARTS / 3)
    height, width = is_coloured.shape[0] / n_rows, is_coloured.shape[1] / 3
    for chart in range(3 * n_rows):
        top, left = int(chart // 3 * height), int(chart % 3 * width)
        cell = is_coloured[top : int(top + height), left : int(left + width)]
        assert bool(cell.any()) == (chart < N_CHARTS), chart


def test_figures_that_are_not_finite_are_gaps_and_named(tmp_path: Path) -> None:
    write_lines(tmp_path, ("eval_",), loss=30, **{"eval_rewards/accuracies": 60})
    page = write_page(tmp_path, "eval")
    assert n_points(page, "loss") == len(LOGGED) - 1
    assert "loss at step 30; eval_rewards/accuracies at step 60." in page
    assert cells(page, "evaluation")[1:3] == ["0.500", "not finite"]


def test_a_metric_that_was_never_finite_has_no_chart(tmp_path: Path) -> None:
    files = RunFiles(Folder.at(tmp_path), is_writer=True)
    files.metrics({"step": 10, "epoch": 0.1, "loss": 2.0, "grad_norm": None})
    page = write_page(tmp_path)
    assert page.count("<figure>") == 1
    assert n_points(page, "loss") == 1


def test_before_the_first_figures_there_is_a_page_without_curves(tmp_path: Path) -> None:
    page = write_page(tmp_path)
    assert "No metrics yet." in page
    assert cells(page, "steps") == ["none yet"]
    assert not (tmp_path / "curves.png").exists()


def test_under_way_nothing_is_called_after(tmp_path: Path) -> None:
    RunFiles(Folder.at(tmp_path), is_writer=True).metrics(
        {"step": 0, "epoch": 0.0} | learned(0, "eval_")
    )
    page = write_page(tmp_path, "eval")
    assert cells(page, "evaluation")[:3] == ["97", "0.500", "-"]


def test_data_events_config_and_command_are_told_and_escaped(tmp_path: Path) -> None:
    run = tmp_path / "<i>a run"
    run.mkdir()
    write_little(run)
    files = RunFiles(Folder.at(run), is_writer=True)
    files.event("step 3: <script>alert(1)</script> left out", rows_skipped=2)
    files.event("resumed at step 20 of 60", resumed=1)
    page = write_page(run)
    assert "<script" not in page
    assert "step 3: &lt;script&gt;alert(1)&lt;/script&gt; left out" in page
    assert "resumed: 1, rows skipped: 2" in page
    assert "<i>" not in page
    assert "/data/<a>" not in page
    assert cells(page, "/data/&lt;a&gt;.jsonl") == ["100", "97", "0", "3", "5"]
    assert cells(page, "same_answers") == ["2"]
    assert page.index("same_answers</td>") < page.index("empty_chosen</td>")
    assert "truncated: 5.2 % of the pairs (5 prompts, 2 with an answer cut)" in page
    assert "  beta: 0.25" in page
    assert "model_name_or_path: &lt;b&gt;base&lt;/b&gt;" in page
    assert "<b>" not in page
    command = re.search(r"<pre>python jobs/train.py (.*)</pre>", page)
    assert command is not None
    assert command[1].startswith("&#39;")  # quoted for a shell
    assert command[1].endswith("a run-again&#39;")


def test_a_torn_event_is_shown_as_it_is(tmp_path: Path) -> None:
    """A writer that was killed leaves half a line, to which the next one adds its own."""
    (tmp_path / "events.jsonl").write_text('{"time": 1, "te{"time": 2}\n{"time": 3, "text": "b')
    page = write_page(tmp_path)
    assert cells(page, "torn") == ["{&#34;time&#34;: 1, &#34;te{&#34;time&#34;: 2}"]


def test_the_page_needs_no_network(evaluated: Path) -> None:
    page = (evaluated / "report.html").read_text(encoding="utf-8")
    assert not re.findall(r'(?:src|href)="(?!#)[^"]*"|url\((?!#)|@import', page)


def test_a_page_that_cannot_be_written_is_said_and_the_watch_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise OSError("no space\nleft")

    caplog.set_level(logging.INFO, "orpo_ray")
    files = RunFiles(Folder.at(tmp_path), is_writer=True)
    with RunWatcher(tmp_path, 60, write_report=fail, first_report_s=0):
        files.metrics({"step": 0, "epoch": 0.0} | learned(0, "eval_"))
        wait_for(lambda: caplog.text, "report.html was not written: OSError: no space left\n")
        files.notice("still there")
        wait_for(lambda: caplog.text, "still there")


def test_the_page_is_written_under_way_and_once_more_when_the_run_fails(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The second time is long before the next one by the clock."""
    caplog.set_level(logging.INFO, "orpo_ray")
    steps = []
    files = RunFiles(Folder.at(tmp_path), is_writer=True)

    def note() -> None:
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
        steps.append(json.loads(lines[-1])["step"])

    def run() -> None:
        with RunWatcher(tmp_path, 60, write_report=note, first_report_s=0):
            files.metrics({"step": 0, "epoch": 0.0} | learned(0, "eval_"))
            wait_for(lambda: caplog.text, "evaluation at step 0")
            files.metrics({"step": 30, "epoch": 0.25} | learned(30, "eval_"))
            wait_for(lambda: caplog.text, "evaluation at step 30")
            raise RuntimeError("a worker died")

    with pytest.raises(RuntimeError, match="a worker died"):
        run()
    assert steps == [0, 30]


def wait_for(shown: Callable[[], str], part: str) -> None:
    deadline = time.monotonic() + 20
    while part not in shown():
        assert time.monotonic() < deadline, shown()
        time.sleep(0.02)


def browse(folder: Path, page: Path, picture: Path, *options: str) -> tuple[str, str]:
    """Open a page in headless Chromium; returns its DOM and what the browser logged."""
    command = [
        "chromium",
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        f"--user-data-dir={folder / 'profile'}",
        "--window-size=1200,2400",
        *options,
    ]
    outputs = []
    for task in ("--dump-dom", f"--screenshot={picture}"):
        done = subprocess.run(
            [*command, task, page.as_uri()],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        outputs.append(done)
    return outputs[0].stdout, outputs[0].stderr + outputs[1].stderr


@pytest.mark.skipif(shutil.which("chromium") is None, reason="there is no chromium on PATH")
def test_a_browser_shows_it_in_light_and_dark_without_an_error(tmp_path: Path) -> None:
    """That an error would be seen is shown by a page that has one."""
    bad = tmp_path / "bad.html"
    bad.write_text("<script>console.error('seen')</script>")
    assert "CONSOLE" in browse(tmp_path, bad, tmp_path / "bad.png")[1]
    write_lines(tmp_path, ("eval_easy_", "eval_hard_"))
    (tmp_path / "config.yaml").write_text(to_yaml(CONFIG))
    write_page(tmp_path, "eval_easy", "eval_hard")
    brightness = {}
    for name, scheme in (("light", 1), ("dark", 0)):
        picture = tmp_path / f"{name}.png"
        option = f"--blink-settings=preferredColorScheme={scheme}"
        dom, logged = browse(tmp_path, tmp_path / "report.html", picture, option)
        assert "CONSOLE" not in logged
        assert "ERR_" not in logged
        for metric in (*LEARNED, *TRAINED_ONLY):
            assert n_points(dom, metric) == len(LOGGED), metric
        brightness[name] = float(imread(picture)[..., :3].mean())
    assert brightness["light"] > 0.9
    assert brightness["dark"] < 0.2
