"""`python -m orpo_ray COMMAND`: the same as the installed command `orpo-ray`."""

import sys

from orpo_ray.cli import main

if __name__ == "__main__":
    sys.exit(main())
