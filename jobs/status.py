"""Print where a run or a sweep stands: `python jobs/status.py RUN_DIR [--json]`."""

import sys
from pathlib import Path

# `ray job submit --working-dir .` runs this file without installing the package.
sys.path.append(str(Path(__file__).resolve().parent.parent))

from orpo_ray.cli import run_directory_job


def action(directory: str, as_json: bool) -> None:
    """Print it; reads files only, and imports neither Ray nor torch."""
    from orpo_ray.reports.status import show_status
    from orpo_ray.storage.folder import VIEWS, Folder

    show_status(Folder.at(directory, VIEWS), as_json)


if __name__ == "__main__":
    sys.exit(run_directory_job(sys.argv[1:], "Print where a run or a sweep stands.", action))
