"""Search beta and the learning rate, or any setting: `python jobs/tune.py [CONFIG.yaml] [...]`."""

import sys
from pathlib import Path

# `ray job submit --working-dir .` runs this file without installing the package.
sys.path.append(str(Path(__file__).resolve().parent.parent))

from orpo_ray.cli import run_job
from orpo_ray.config.schema import ORPOConfig


def action(config: ORPOConfig) -> None:
    """Sweep; imports Ray only once the config is known to be good."""
    from orpo_ray.orchestration.sweep.tune import tune

    tune(config)


if __name__ == "__main__":
    sys.exit(run_job(sys.argv[1:], "Search settings of ORPO, with Ray Tune.", action))
