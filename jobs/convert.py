"""Run `orpo-ray convert` from a checkout, without installing the package."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))

from orpo_ray.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
