"""Train a model on preference pairs with ORPO: `python jobs/train.py [CONFIG.yaml] [key=value]`."""

import sys
from pathlib import Path

# `ray job submit --working-dir .` runs this file without installing the package.
sys.path.append(str(Path(__file__).resolve().parent.parent))

from orpo_ray.cli import run_job
from orpo_ray.config.schema import ORPOConfig


def action(config: ORPOConfig) -> None:
    """Train; imports Ray and torch only once the config is known to be good."""
    from orpo_ray.orchestration.train import train

    train(config)


if __name__ == "__main__":
    sys.exit(run_job(sys.argv[1:], "Train a model on preference pairs with ORPO, on Ray.", action))
