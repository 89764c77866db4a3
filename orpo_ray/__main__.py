"""The entry of every command: signals are handled before anything slow is imported."""

import sys
from collections.abc import Sequence

from orpo_ray.orchestration.stopping import SignalInterrupt, command_signals
from orpo_ray.reports.terminal import unfailing_output


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command as `orpo_ray.cli.main` does, whatever it is sent and wherever it prints to."""
    with command_signals(), unfailing_output():
        try:
            from orpo_ray.cli import main as run

            return run(argv)
        except SignalInterrupt as interrupt:  # while modules are imported
            print(interrupt.line, file=sys.stderr)
            return interrupt.exit_code


if __name__ == "__main__":
    sys.exit(main())
