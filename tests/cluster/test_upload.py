"""What `ray job submit --working-dir .` uploads: what a job needs, and little more."""

from collections.abc import Iterator
from pathlib import Path

from ray._private.runtime_env.packaging import get_excludes_from_ignore_files

from tests.conftest import ROOT

KEPT_KIB = 1024


def uploaded(root: Path, folder: Path | None = None) -> Iterator[Path]:
    """The files of a folder that Ray takes along, by Ray's own reading of the ignore files."""
    excluded = get_excludes_from_ignore_files(root, include_gitignore=True)
    for path in (folder or root).iterdir():
        if any(is_excluded(path) for is_excluded in excluded):
            continue
        if path.is_dir():
            yield from uploaded(root, path)
        else:
            yield path


def test_a_job_has_its_code_and_no_more():
    files = {str(path.relative_to(ROOT)): path.stat().st_size for path in uploaded(ROOT)}
    assert {"jobs/train.py", "jobs/tune.py", "orpo_ray/__init__.py", "orpo_ray/demo/demo.yaml"} <= {
        *files
    }
    assert {name.split("/")[0] for name in files if "/" in name} == {"jobs", "orpo_ray"}
    assert sum(files.values()) < KEPT_KIB * 1024


def test_folders_of_the_package_are_not_taken_for_those_at_the_top():
    code = set((ROOT / "orpo_ray").rglob("*.py"))
    assert code <= {*uploaded(ROOT)}


def test_what_lies_beside_the_code_stays_here(tmp_path):
    """Neither keys nor environments, data nor runs, whatever they are called."""
    ours = ["jobs/train.py", "orpo_ray/cli.py", "orpo_ray/reports/templates/run.html.j2", "my.yaml"]
    theirs = [
        *(".env", ".env.local", "id_rsa", "key.pem", "secrets.json", "credentials", "notes.txt"),
        *("venv/lib/x.py", "env/x.py", ".venv/x.py", "data/pairs.jsonl", "pairs.parquet"),
        *("runs/a/config.yaml", "out/final/model.safetensors", "mlruns/0/meta.yaml", "my/x.py"),
        *("jobs/.env", "jobs/data/a.jsonl", "orpo_ray/.env", "orpo_ray/demo/key.pem"),
        *("orpo_ray/runs/a.jsonl", "jobs/__pycache__/train.pyc", "orpo_ray/__pycache__/x.py"),
        *(".aws/credentials", ".huggingface/token", "docs/x.md", "tests/test_x.py"),
    ]
    for name in (*ours, *theirs):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    for name in (".rayignore", ".gitignore"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    found = {str(path.relative_to(tmp_path)) for path in uploaded(tmp_path)}
    assert found == set(ours)
