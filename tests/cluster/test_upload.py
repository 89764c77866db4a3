"""What `ray job submit --working-dir .` uploads: what a job needs, and little more."""

from collections.abc import Iterator
from pathlib import Path

from ray._private.runtime_env.packaging import get_excludes_from_ignore_files

from tests.conftest import ROOT

KEPT_KIB = 1024


def uploaded(folder: Path) -> Iterator[Path]:
    """The files of a folder that Ray takes along, by Ray's own reading of the ignore files."""
    excluded = get_excludes_from_ignore_files(ROOT, include_gitignore=True)
    for path in folder.iterdir():
        if any(is_excluded(path) for is_excluded in excluded):
            continue
        if path.is_dir():
            yield from uploaded(path)
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
