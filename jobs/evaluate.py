"""Evaluate a model on preference pairs: `python jobs/evaluate.py model_name_or_path=... [...]`."""

import sys
from pathlib import Path

# `ray job submit --working-dir .` runs this file without installing the package.
sys.path.append(str(Path(__file__).resolve().parent.parent))

from orpo_ray.cli import run_job
from orpo_ray.config.schema import ORPOConfig


def action(config: ORPOConfig) -> None:
    """Evaluate; imports Ray and torch only once the config is known to be good."""
    from orpo_ray.orchestration.evaluate import evaluate

    evaluate(config)


if __name__ == "__main__":
    sys.exit(run_job(sys.argv[1:], "Evaluate a model on preference pairs, on Ray.", action))
