"""The commands: arguments in, exit code out, and nothing heavy imported before it is needed."""

import argparse
import difflib
import json
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from orpo_ray.config.file import load_config, to_yaml
from orpo_ray.config.schema import SECTIONS, ConfigError, ORPOConfig
from orpo_ray.orchestration.stopping import TERMINATED, SignalInterrupt, ending, received
from orpo_ray.preference.errors import DataError
from orpo_ray.storage.files import first_line
from orpo_ray.storage.hiding import hide, printable
from orpo_ray.training.errors import StoppedError, TrainingError
from orpo_ray.version import __version__

if TYPE_CHECKING:
    from rich.console import Console

PROGRAM = "orpo-ray"
DEMO = "demo.yaml"
DONE, FAILED, REFUSED = 0, 1, 2
# Read when Ray is imported. A sweep's many small processes are no reason for a warning.
_QUIET_RAY = {"RAY_DEDUP_LOGS_SKIP_REGEX": "PYTHON worker processes have been started"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `orpo-ray COMMAND [arguments]` and return its exit code.

    Args:
        argv: the command and its arguments. Default: those of this process.

    Returns:
        0 done; 2 bad usage, config or data, said in one or two lines each; 130 ended by Ctrl-C and
        143 by SIGTERM or SIGHUP, with a checkpoint where there were steps to keep; 1 anything else,
        with its traceback if it was not foreseen.
    """
    name, *arguments = [*(sys.argv[1:] if argv is None else argv)] or [""]
    if name in ("-h", "--help"):
        print(_overview())
        return DONE
    if name == "--version":
        print(f"{PROGRAM} {__version__}")
        return DONE
    if name == "status":
        return _run_status(arguments)
    if name == "doctor":
        return _run_doctor(arguments)
    if name == "convert":
        return _run_convert(arguments)
    if name in _ACTIONS:
        return _run_on_config(name, arguments)
    print(f"error: {_no_such_command(name)}", file=sys.stderr)
    return REFUSED


def _train(config: ORPOConfig, console: "Console") -> None:
    from orpo_ray.orchestration.train import end_text, train

    result = train(config, console=console)
    console.print(printable(hide(end_text(result, config, _called("train")))), markup=False)


def _tune(config: ORPOConfig, console: "Console") -> None:
    from orpo_ray.orchestration.sweep.tune import end_text, tune

    result = tune(config, console=console)
    console.print(printable(hide(end_text(result, config, _called("train")))), markup=False)
    if result.has_failed:
        raise TrainingError(f"all {len(result.trials)} trials failed")


def _evaluate(config: ORPOConfig, console: "Console") -> None:
    from orpo_ray.orchestration.evaluate import evaluate
    from orpo_ray.reports.evaluation import show_evaluation

    show_evaluation(evaluate(config, console=console), console)


def _prepare(config: ORPOConfig, console: "Console") -> None:
    from orpo_ray.orchestration.train import prepare

    prepare(config)


def _status(directory: str, as_json: bool) -> None:
    from orpo_ray.reports.status import show_status
    from orpo_ray.storage.folder import VIEWS, Folder
    from orpo_ray.storage.names import UnsafeNameError

    try:
        folder = Folder.at(directory, VIEWS)
    except UnsafeNameError as error:
        raise ConfigError([str(error)]) from error
    show_status(folder, as_json)


_ACTIONS: Mapping[str, Callable[[ORPOConfig, "Console"], None]] = {
    "train": _train,
    "tune": _tune,
    "evaluate": _evaluate,
    "prepare": _prepare,
}
_SUMMARIES = {
    "train": "Train a model on preference pairs with ORPO.",
    "tune": "Search beta, the learning rate or any other setting with Ray Tune.",
    "evaluate": "Evaluate a model on preference pairs.",
    "prepare": "Check and tokenize preference pairs, without training.",
    "status": "Print where a run or a sweep stands, from its files alone.",
    "convert": "Print a recipe of axolotl, LLaMA-Factory or alignment-handbook as a config.",
    "doctor": "Print what a bug report needs: versions, cluster, limits, storage, model and data.",
}


def _run_on_config(name: str, argv: Sequence[str]) -> int:
    """Run a command that takes `[CONFIG.yaml] [key=value ...]`; returns its exit code."""
    arguments = _config_parser(name).parse_args(argv)
    if arguments.print_schema:
        print(json.dumps(ORPOConfig.model_json_schema(), indent=2))
        return DONE
    for variable, value in _QUIET_RAY.items():
        os.environ.setdefault(variable, value)

    def run() -> None:
        config = read_arguments(arguments.settings)
        if name == "prepare" and (arguments.list_cache or arguments.clear_cache):
            from orpo_ray.reports.cache import show_cache

            show_cache(config, arguments.clear_cache)
            return
        if arguments.dry_run:
            _print_plan(config)
            return
        with _logging_to_console() as console:
            _ACTIONS[name](config, console)

    return exit_code(run)


def _run_status(argv: Sequence[str]) -> int:
    """Run the command that takes a directory; returns its exit code."""
    parser = _Parser(
        prog=_called("status"),
        description=_SUMMARIES["status"],
        usage="%(prog)s RUN_DIR [options]",
    )
    parser.add_argument("directory", metavar="RUN_DIR", help="folder or URL of a run or a sweep")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args(argv)
    return exit_code(lambda: _status(arguments.directory, arguments.json))


def _run_convert(argv: Sequence[str]) -> int:
    """Run the command that takes a recipe of another project; returns its exit code."""
    parser = _Parser(
        prog=_called("convert"), description=_SUMMARIES["convert"], usage="%(prog)s RECIPE.yaml"
    )
    parser.add_argument("recipe", metavar="RECIPE.yaml", help="it is not changed")
    return exit_code(lambda: _convert(Path(parser.parse_args(argv).recipe)))


def _convert(recipe: Path) -> None:
    from orpo_ray.trl.recipes import converted_text

    print(printable(hide(converted_text(recipe))), end="")


def _run_doctor(argv: Sequence[str]) -> int:
    """Run the command that examines machine, cluster and config; returns its exit code."""
    arguments = _config_parser("doctor").parse_args(argv)
    found: list[int] = []

    def run() -> None:
        from orpo_ray.orchestration.doctor import examine

        with _logging_to_console() as console:
            examination = examine(
                lambda: read_arguments(arguments.settings),
                lambda text: console.print(hide(text), markup=False),
            )
        for line in (*examination.problems, *examination.config_problems):
            print(f"error: {hide(line)}", file=sys.stderr)
        if examination.problems:
            found.append(FAILED)
        elif examination.config_problems:
            found.append(REFUSED)

    return exit_code(run) or (found or [DONE])[0]


def exit_code(action: Callable[[], object]) -> int:
    """Run a command's action; an error that it raises is printed, and becomes the exit code."""
    try:
        code = _exit_code(action)
    except SignalInterrupt as interrupt:  # while an error was printed
        code = _print_interrupt(interrupt)
    with ending():
        _disconnect()
    return code


def _exit_code(action: Callable[[], object]) -> int:
    try:
        action()
    except (ConfigError, DataError) as error:
        for line in error.lines:
            print(f"error: {printable(line)}", file=sys.stderr)
        return REFUSED
    except TrainingError as error:
        print(f"error: {printable(hide(str(error)))}", file=sys.stderr)
        return FAILED
    except StoppedError as error:
        print(f"{error}; the same command with the same run_name goes on")
        return TERMINATED
    except KeyboardInterrupt as interrupt:
        return _print_interrupt(interrupt)
    except Exception as error:
        number = received()
        if number is None:
            print(printable(hide(traceback.format_exc())), end="", file=sys.stderr)
            return FAILED
        # What the signal ended besides, such as a Ray of this machine, fails in ways of its own.
        print(f"{type(error).__name__}: {printable(first_line(error))}", file=sys.stderr)
        return _print_interrupt(SignalInterrupt(number))
    return DONE


def _print_interrupt(interrupt: KeyboardInterrupt) -> int:
    if not isinstance(interrupt, SignalInterrupt):  # Ray raises its own for any signal
        interrupt = SignalInterrupt(received() or signal.SIGINT)
    print(interrupt.line, file=sys.stderr)
    return interrupt.exit_code


def _disconnect() -> None:
    """End the Ray that the command started, if it came that far."""
    cluster = sys.modules.get("orpo_ray.orchestration.cluster.connection")
    if cluster is not None:
        cluster.disconnect()


class _ConsoleHandler(logging.Handler):
    """Prints messages as they are on a console, above a live view if it shows one."""

    def __init__(self, console: "Console") -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        try:
            mark = "warning: " if record.levelno >= logging.WARNING else ""
            text = printable(hide(record.getMessage()))
            self._console.print(f"{mark}{text}", markup=False)
        except Exception:
            self.handleError(record)


@contextmanager
def _logging_to_console() -> Iterator["Console"]:
    """A console on stdout: unwrapped lines, wide tables in a file, and what the package logs."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = 160  # of tables in a file
    logger, handler = logging.getLogger("orpo_ray"), _ConsoleHandler(console)
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False  # a library that configures the root logger would print it again
    try:
        yield console
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]


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


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line each."""

    def error(self, message: str) -> NoReturn:
        self.exit(REFUSED, f"error: {message}; `{self.prog} --help` shows the arguments\n")


def _config_parser(name: str) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=_called(name),
        description=_SUMMARIES[name],
        epilog=_settings_text(name),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [CONFIG.yaml] [key=value ...] [options]",
    )
    parser.add_argument(
        "settings", nargs="*", metavar="CONFIG.yaml | key=value", help="none: the embedded demo"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the config, batch, steps and memory, and stop"
    )
    parser.add_argument("--print-schema", action="store_true", help="print the JSON schema")
    if name == "prepare":
        parser.add_argument(
            "--list-cache",
            action="store_true",
            help="print token sets and else that runs left behind, and stop",
        )
        parser.add_argument(
            "--clear-cache",
            metavar="older_than=30d",
            help="delete what of it is older (d, h or m), print that, and stop",
        )
    return parser


def _settings_text(name: str) -> str:
    """Every setting with its default, by section."""
    lines = ["settings, as section.name=value or name=value:"]
    for section, model in SECTIONS.items():
        lines.append(f"\n{section}: {model.__doc__}")
        for setting, field in model.model_fields.items():
            default = json.dumps(field.get_default(), default=list)
            lines.append(f"  {setting} = {default}\n      {field.description}")
    lines += [
        f"\nsearch: what {_called('tune')} searches, by setting:",
        "  search.beta='loguniform(0.05, 0.5)'   uniform, randint, choice, grid likewise",
        "\nexamples:",
        f"  {_called(name)}",
        f"  {_called(name)} my.yaml beta=0.2 num_workers=4 run_name=first",
    ]
    return "\n".join(lines).replace("%", "%%")


def _overview() -> str:
    """What `orpo-ray --help` prints."""
    return "\n".join(
        [
            f"usage: {_called('COMMAND')} [arguments]\n",
            "ORPO preference training on Ray.\n",
            "commands:",
            *(f"  {name:<10}{summary}" for name, summary in _SUMMARIES.items()),
            f"\n`{_called('COMMAND')} --help` shows the arguments of a command.",
        ]
    )


def _no_such_command(name: str) -> str:
    known = f"the commands are {', '.join(_SUMMARIES)}"
    if not name:
        return f"no command given; {known}"
    close = difflib.get_close_matches(name, _SUMMARIES, n=1)
    return f"{name}: no such command; {f'did you mean {close[0]}?' if close else known}"


def _called(command: str) -> str:
    """How to start a command in the way that this process was started."""
    script = Path(sys.argv[0])
    with suppress(FileNotFoundError):  # The working directory may be gone at the end of a run.
        script = script.resolve()
    if script.parent.name == "jobs" and script.suffix == ".py":
        return f"python jobs/{command}.py"
    if script.name == "__main__.py":
        return f"python -m orpo_ray {command}"
    return f"{PROGRAM} {command}"


def _print_plan(config: ORPOConfig) -> None:
    """What a run would do, as far as it can be told without data tasks and workers."""
    from orpo_ray.training.estimate import plan_lines

    print(to_yaml(config))
    for line in plan_lines(config):
        print(line)
