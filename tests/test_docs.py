"""README.md and docs/ are true: commands and Python run as they stand, configs load, links hold."""

import ast
import json
import re
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from docs import trl_table
from docs.settings_table import PAGE, type_text, with_settings
from orpo_ray import ORPOConfig
from orpo_ray.cli import read_arguments
from orpo_ray.config.file import load_config
from orpo_ray.config.schema import SECTION_OF
from orpo_ray.objective.metrics import N_SUMS, LossWeights, metrics_from_sums
from orpo_ray.objective.objectives import orpo
from orpo_ray.preference.layouts import Shape
from orpo_ray.preference.shapes import ParsedRow, RowReader
from orpo_ray.trl.names import names
from tests.conftest import ROOT

README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
RUN_HERE = [README, *(page for page in DOCS if page.name != "ray.md")]  # tests/trl/test_on_ray.py
LINKED = [README, *DOCS, *(ROOT / name for name in ("cluster/README.md", "SECURITY.md"))]


def blocks(language: str, page: Path) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def commands(start: str, pages: Sequence[Path] = (README, *DOCS)) -> list[list[str]]:
    """The commands that begin so, README's first, then those of docs/, each of them once."""
    shown = [block for page in pages for block in blocks("bash", page)]
    lines = [line for block in shown for line in block.splitlines() if line.startswith(start)]
    return [shlex.split(line) for line in dict.fromkeys(lines)]


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The anchors of the headings, as GitHub and the site make them of plain words."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder as the reader has it: some pairs, and the config file that README shows."""
    path = tmp_path_factory.mktemp("readme")
    pairs = [
        {"prompt": f"What is {i} + 1?", "chosen": f"It is {i + 1}.", "rejected": f"It is {i}."}
        for i in range(200)
    ]
    (path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    (path / "my.yaml").write_text(blocks("yaml", README)[0])
    (path / "recipe.yaml").write_text("{base_model: m, rl: orpo, learning_rate: 1.0e-5}")
    return path


@pytest.mark.commands
@pytest.mark.timeout(900)
def test_the_commands_run_in_the_order_they_are_shown(folder, run_command, ray_cluster):
    for command in commands("orpo-ray", RUN_HERE):
        # A sweep brings its own Ray, with the dashboard that frees what stopped trials held.
        address = None if command[1] == "tune" else ray_cluster
        done = run_command(folder, *command[1:], ray_address=address)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"
        assert "Traceback" not in done.stderr
    log = (folder / "runs" / "first" / "run.log").read_text()
    assert "resumed at step 20 of 30" in log
    assert (folder / "runs" / "sweep" / "sweep_report.html").exists()
    page = (ROOT / "docs" / "runs.md").read_text()
    shown = set(
        re.findall(r"`([\w.]+)(?:/[^`]*)?`", "".join(re.findall(r"^\| .*? \|", page, re.M)))
    )
    for name in ("first", "second"):
        run = folder / "runs" / name
        there = {path.name for path in run.iterdir() if not path.name.startswith(".")}
        assert there <= shown
        always = {"config.yaml", "data_report.json", "metrics.jsonl", "ledger.jsonl"}
        assert always | {"final", "run.log"} <= there
        assert list(run.glob("checkpoints/step-*/MANIFEST.json"))


def test_the_commands_have_settings_that_exist(folder, monkeypatch):
    monkeypatch.chdir(folder)
    for _, name, *arguments in commands("orpo-ray"):
        if name not in ("status", "convert"):
            read_arguments([argument for argument in arguments if not argument.startswith("--")])


def test_every_command_of_the_project_is_shown():
    shown = {command[1] for command in commands("orpo-ray")}
    assert shown == {path.stem for path in (ROOT / "jobs").glob("*.py")}


@pytest.mark.commands
def test_the_python_block_runs(folder, ray_cluster, monkeypatch, capsys):
    python = {block for page in RUN_HERE for block in blocks("python", page)}
    assert len(python) == 1
    monkeypatch.chdir(folder)
    exec(compile(python.pop(), "README.md", "exec"), {})
    model = Path(capsys.readouterr().out.strip().splitlines()[-1])
    assert (model / "model.safetensors").exists()


def test_the_two_commands_are_targets_of_make():
    """They install and run for minutes; here it is shown that make knows what to do."""
    inline = re.findall(r"`(make [\w -]+)`", "".join(prose(page) for page in (README, *DOCS)))
    for command in [*commands("make"), *map(str.split, dict.fromkeys(inline))]:
        done = subprocess.run(
            [command[0], "--dry-run", *command[1:]],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    assert (
        "bin/python jobs/train.py"
        in subprocess.run(
            ["make", "--dry-run", "demo"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
    )


def test_ray_takes_the_job_with_settings_that_exist():
    from ray.dashboard.modules.job import cli

    for command in commands("ray job submit"):
        cli.submit.make_context("submit", command[3:])
        python, script, *settings = command[command.index("--") + 1 :]
        assert python == "python"
        assert (ROOT / script).is_file()
        assert load_config(None, settings).output.run_name
    assert len(commands("ray ")) == len(commands("ray job submit")) == 2


def test_every_yaml_block_is_a_config(tmp_path):
    texts = [text for page in (README, *DOCS) for text in blocks("yaml", page)]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.yaml").write_text(text)
        load_config(str(tmp_path / f"{number}.yaml"), [])
    assert len(texts) >= 4


def test_every_example_of_a_row_is_read():
    """Each row of the table of formats, as one pair with the answers of the example."""
    text = (ROOT / "docs/data.md").read_text(encoding="utf-8")
    examples = re.findall(r"^\| ([^|]+) \| `(\{.*?\})`", text, re.MULTILINE)
    assert len(examples) >= 19
    shapes = set()
    for name, line in examples:
        reader = RowReader(takes_one_answer="objective=sft" in name)
        found = reader.read(json.loads(line))
        assert isinstance(found, ParsedRow), (name, found)
        assert len(found.records) == 1
        assert not found.ignored
        shapes.add(found.shape)
    assert shapes == set(Shape)


@pytest.mark.parametrize("page", [README, *DOCS], ids=lambda page: page.name)
def test_every_setting_in_the_text_exists(page):
    """Those in code, as `name=value`."""
    named = re.findall(r"`(?:orpo-ray )?([a-z_.0-9]+)=[^`=]*`", prose(page))
    known = SECTION_OF.keys() | names().keys() | {"name", "section.name", "search.beta"}
    assert [n for n in named if n not in known and n.partition(".")[2] not in known] == []


@pytest.mark.parametrize("page", LINKED, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.is_file(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", [README, *DOCS], ids=lambda page: page.name)
def test_every_file_of_the_project_in_the_text_exists(page):
    named = re.findall(
        r"`((?:orpo_ray|jobs|tests|docs|benchmarks|cluster|faults)/[^`\s]*)`", prose(page)
    )
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_every_name_in_a_file_exists():
    """`name` in `file`."""
    text = prose(ROOT / "docs" / "development.md")
    found = re.findall(r"`(\w+)` in `([\w/]+\.py)`", text)
    assert len(found) >= 4
    for name, file in found:
        assert re.search(rf"^(?:def|class) {name}\b|^{name}\b.*=", (ROOT / file).read_text(), re.M)


def test_every_page_is_in_the_readme_and_in_the_site():
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    nav = re.findall(r"[\w/]+\.md", json.dumps(site["nav"]))
    pages = [str(page.relative_to(ROOT)) for page in DOCS]
    assert sorted(name for name in nav if name.startswith("docs/")) == pages
    assert set(pages) <= set(re.findall(r"\]\((docs/\w+\.md)\)", README.read_text()))
    assert all((ROOT / name).is_file() for name in nav)


def test_the_readme_is_short():
    assert len(README.read_text().splitlines()) <= 150


def test_every_package_is_described():
    described = re.findall(
        r"^\| `orpo_ray\.(\w+)` \|", (ROOT / "docs/development.md").read_text(), re.M
    )
    there = {path.parent.name for path in (ROOT / "orpo_ray").glob("*/__init__.py")}
    assert set(described) == there | {"cli", "pretrained"}


def test_every_metric_of_the_objective_is_described():
    text = (ROOT / "docs" / "runs.md").read_text()
    metrics = metrics_from_sums([1.0] * N_SUMS, LossWeights(orpo(0.1), router=0.1))
    assert [name for name in metrics if f"`{name}`" not in text] == []


def test_the_table_has_every_name_of_trl():
    page = trl_table.PAGE.read_text()
    assert trl_table.with_names(page) == page, "run `make docs`"


def test_every_default_that_is_not_trls_is_listed():
    defaults = page_section("docs/trl.md", "## Defaults that differ")
    listed = re.findall(r"^\| `(\w+)` \| `(.*?)` \| `(.*?)` \|", defaults, re.M)
    config = ORPOConfig()
    differ = {
        row.name: (row.default, getattr(config, row.name))
        for row in names().values()
        if row.verdict == "same" and getattr(config, row.name) != row.default
    }
    shown = {name: (ast.literal_eval(old), ast.literal_eval(new)) for name, old, new in listed}
    assert shown == differ


def page_section(page: str, heading: str) -> str:
    """The text between a heading and the next."""
    return (ROOT / page).read_text().partition(f"{heading}\n")[2].partition("\n## ")[0]


def test_the_table_has_every_setting_of_the_schema():
    page = PAGE.read_text()
    assert with_settings(page) == page, "run `make docs`"
    shown = re.findall(r"^\| `(\w+)` \|", page.partition("<!-- settings")[2], re.M)
    assert sorted(shown) == sorted(SECTION_OF)


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({"type": "integer", "minimum": 1}, "int >= 1"),
        ({"type": "number", "minimum": 0.0, "exclusiveMaximum": 1.0}, "float in [0, 1)"),
        ({"anyOf": [{"type": "boolean"}, {"type": "null"}]}, "bool or null"),
        ({"enum": ["a", "b"], "type": "string"}, '`"a"`, `"b"`'),
        ({"type": "array", "items": {"type": "string"}}, "list of str"),
        ({"type": "object", "additionalProperties": {"type": "number"}}, "{str: float}"),
        ({"$ref": "#/$defs/A"}, "{path, name}"),
    ],
)
def test_types_are_shown_in_words(schema, text):
    definitions = {"A": {"type": "object", "properties": {"path": {}, "name": {}}}}
    assert type_text(schema, definitions) == text
