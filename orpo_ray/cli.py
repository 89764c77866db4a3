"""The front of every command: arguments in, exit code out, and nothing heavy imported before."""

import argparse
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib import resources

from orpo_ray.config.file import load_config, to_yaml
from orpo_ray.config.schema import SECTIONS, ConfigError, ORPOConfig
from orpo_ray.config.secrets import hide
from orpo_ray.preference.errors import DataError

# Read when Ray is imported. A sweep's many small processes are no reason for a warning.
_QUIET_RAY = {"RAY_DEDUP_LOGS_SKIP_REGEX": "PYTHON worker processes have been started"}
DONE, FAILED, REFUSED, INTERRUPTED = 0, 1, 2, 130
DEMO = "demo.yaml"


def run_job(argv: Sequence[str], description: str, action: Callable[[ORPOConfig], object]) -> int:
    """Parse a command line, run `action` on its config, and give the exit code.

    Args:
        argv: `[CONFIG.yaml] [key=value ...] [--dry-run] [--print-schema] [--help]`.
        description: what the command does, for `--help`.
        action: the one function of the command; may import what it likes.

    Returns:
        0 done; 2 bad config or bad data, said in one or two lines each; 130 interrupted; 1
        anything else, with its traceback.
    """
    arguments = _parser(description).parse_args(argv)
    if arguments.print_schema:
        print(json.dumps(ORPOConfig.model_json_schema(), indent=2))
        return DONE
    for name, value in _QUIET_RAY.items():
        os.environ.setdefault(name, value)

    def run() -> None:
        config = read_arguments(arguments.settings)
        if arguments.dry_run:
            _print_plan(config)
        else:
            action(config)

    return _exit_code(run)


def run_directory_job(
    argv: Sequence[str], description: str, action: Callable[[str, bool], object]
) -> int:
    """The same for a command that is about a directory, and may print JSON.

    Args:
        argv: `RUN_DIR [--json] [--help]`.
        description: what the command does, for `--help`.
        action: the one function of the command, given the directory and whether to print JSON.
    """
    parser = argparse.ArgumentParser(
        description=description, usage="python %(prog)s RUN_DIR [options]"
    )
    parser.add_argument("directory", metavar="RUN_DIR", help="folder or URL of a run or a sweep")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args(argv)
    return _exit_code(lambda: action(arguments.directory, arguments.json))


def _exit_code(action: Callable[[], object]) -> int:
    """Run a command's action; what it raises is said on stderr."""
    try:
        action()
    except (ConfigError, DataError) as error:
        for line in error.lines:
            print(f"error: {hide(line)}", file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        print("interrupted; the same command with the same run_name goes on", file=sys.stderr)
        return INTERRUPTED
    except Exception:
        print(hide(traceback.format_exc()), end="", file=sys.stderr)
        return FAILED
    return DONE


def read_arguments(settings: Sequence[str]) -> ORPOConfig:
    """The config of `[CONFIG.yaml] [key=value ...]`; with neither file nor model, the demo's.

    Raises:
        ConfigError: with every finding.
    """
    files = [setting for setting in settings if "=" not in setting]
    overrides = [setting for setting in settings if "=" in setting]
    if len(files) > 1:
        raise ConfigError([f"{name}: a second config file" for name in files[1:]])
    if files:
        return load_config(files[0], overrides)
    config = load_config(None, overrides)
    if config.model.model_name_or_path is not None:
        return config  # the demo's learning rate is for a model that knows nothing yet
    with resources.as_file(resources.files("orpo_ray.demo") / DEMO) as demo:
        return load_config(str(demo), overrides)


def _parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description,
        epilog=_settings_text(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="python %(prog)s [CONFIG.yaml] [key=value ...] [options]",
    )
    parser.add_argument(
        "settings", nargs="*", metavar="CONFIG.yaml | key=value", help="none: the embedded demo"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the config, batch, steps and memory, and stop"
    )
    parser.add_argument("--print-schema", action="store_true", help="print the JSON schema")
    return parser


def _settings_text() -> str:
    """Every setting with its default, by section."""
    lines = ["settings, as section.name=value or name=value:"]
    for section, model in SECTIONS.items():
        lines.append(f"\n{section}: {model.__doc__}")
        for name, field in model.model_fields.items():
            default = json.dumps(field.get_default(), default=list)
            lines.append(f"  {name} = {default}\n      {field.description}")
    lines += [
        "\nsearch: what jobs/tune.py searches, by setting:",
        "  search.beta='loguniform(0.05, 0.5)'   uniform, randint, choice, grid likewise",
        "\nexamples:",
        "  python jobs/train.py",
        "  python jobs/train.py my.yaml beta=0.2 num_workers=4 run_name=first",
    ]
    return "\n".join(lines).replace("%", "%%")


def _print_plan(config: ORPOConfig) -> None:
    """What a run would do, as far as it can be told without data tasks and workers."""
    from orpo_ray.training.estimate import plan_lines

    print(to_yaml(config))
    for line in plan_lines(config):
        print(line)
