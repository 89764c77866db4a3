"""Run `orpo-ray doctor` from a checkout, without installing the package."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))

from orpo_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["doctor", *sys.argv[1:]]))
