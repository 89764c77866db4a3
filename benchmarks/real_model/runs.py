"""The commands of the benchmark, each a process of its own; what is finished is not run again."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orpo_ray.runs.files import read_metrics
from real_model.plan import ONE_PASS, SFT, Plan, Side

ROOT = Path(__file__).resolve().parents[2]
_TRL_SETTINGS = (
    *("per_device_train_batch_size", "num_train_epochs", "warmup_steps", "lr_scheduler_type"),
    *("bf16", "beta", "learning_rate", "seed", "max_length"),
)
_TRL_SLOWER = 2  # than another side, in half of its passes, for the time that is left only


class CommandError(RuntimeError):
    """A command that did not end with 0."""


@dataclass(frozen=True)
class Runs:
    """The runs of one benchmark.

    Args:
        out: folder of everything; `runs`, `pairs` and `base` are below it.
        common: settings of all sides.
    """

    out: Path
    common: Mapping[str, Any]

    def choose_rate(self, rates: Sequence[float], usual: float) -> dict[str, Any]:
        """The learning rate of all sides, and what it was chosen by.

        Args:
            rates: to try; with none it is the usual one.
            usual: learning rate.

        Returns:
            `rate`, and `dev_nll` by rate.
        """
        file = self.out / "rates.json"
        found: dict[str, float] = json.loads(file.read_text()) if file.exists() else {}
        dev = str(self._pairs("dev"))
        for rate in rates:
            if f"{rate:g}" in found:
                continue
            side = Side(f"rate-{rate:g}", 0, {**SFT, **ONE_PASS, "eval_files": dev})
            self.train(side, rate)
            run = self.folder(side)
            lines = [line for line in read_metrics(run) if "eval_nll_loss" in line]
            found[f"{rate:g}"] = lines[-1]["eval_nll_loss"]
            file.write_text(json.dumps(found, indent=1) + "\n")
            shutil.rmtree(run / "final")
        best = min(found, key=lambda rate: found[rate], default=f"{usual:g}")
        return {"rate": float(best), "dev_nll": found}

    def train(self, side: Side, rate: float) -> float:
        """Train a side unless its model is there; seconds that it took.

        Raises:
            CommandError: when its command fails.
        """
        run = self.folder(side)
        record = _beside(run, ".json")
        if (run / "final").is_dir() and record.exists():
            return float(json.loads(record.read_text())["seconds"])
        settings = {**self.common, **side.settings, "seed": side.seed}
        settings["learning_rate"] = rate * side.rate_factor
        command = self._trl(run, settings) if side.by_trl else self._ours(side, settings)
        seconds = self._call(command, _beside(run, ".log"))
        shutil.rmtree(run / "checkpoints", ignore_errors=True)
        measured = [] if side.by_trl else [m["tokens_per_s"] for m in _trained(run)]
        told = {"seconds": seconds, "tokens_per_s": measured[-1:], "command": self._shown(command)}
        record.write_text(json.dumps(told, indent=1) + "\n")
        rate_text = "".join(f", {value:.0f} tokens/s" for value in measured[-1:])
        print(f"{side.name}: {seconds:.0f} s{rate_text}", file=sys.stderr, flush=True)
        return seconds

    def evaluate(self, name: str, model: Path) -> Path:
        """Score the held-out pairs with a model, unless they are; the file of scores.

        Raises:
            CommandError: when its command fails.
        """
        run = self.out / "runs" / f"{name}-held-out"
        scores = run / "scores.parquet"
        if not scores.exists():
            settings = {
                "model_name_or_path": model,
                "eval_files": self._pairs("held-out"),
                "max_length": self.common["max_length"],
                "bf16": self.common["bf16"],
                "output_dir": run.parent,
                "run_name": run.name,
            }
            self._call(_job("evaluate", settings), _beside(run, ".log"))
        return scores

    def commands(self, sides: Sequence[Side]) -> dict[str, str]:
        """The commands that trained the sides, by their names."""
        records = {side.name: _beside(self.folder(side), ".json") for side in sides}
        return {name: json.loads(file.read_text())["command"] for name, file in records.items()}

    def folder(self, side: Side) -> Path:
        """The run directory of a side."""
        return self.out / "runs" / side.name

    def _pairs(self, name: str) -> Path:
        return self.out / "pairs" / f"{name}.jsonl"

    def _ours(self, side: Side, settings: Mapping[str, Any]) -> list[str]:
        places = {
            "model_name_or_path": self.out / "base",
            "train_files": self._pairs("train"),
            "output_dir": self.out / "runs",
            "run_name": side.name,
            "save_steps": 0.5,
        }
        return _job("train", {**places, **settings})

    def _trl(self, run: Path, settings: Mapping[str, Any]) -> list[str]:
        run.mkdir(parents=True, exist_ok=True)
        given = {
            "base": str(self.out / "base"),
            "train": str(self._pairs("train")),
            "output": str(run),
            "settings": {name: settings[name] for name in _TRL_SETTINGS},
        }
        file = run / "settings.json"
        file.write_text(json.dumps(given, indent=1) + "\n")
        return [sys.executable, str(Path(__file__).with_name("trl_side.py")), str(file)]

    def _call(self, command: Sequence[str], log: Path) -> float:
        """Run a command with its output in a file; seconds that it took."""
        print(self._shown(command), file=sys.stderr, flush=True)
        log.parent.mkdir(parents=True, exist_ok=True)
        started = time.perf_counter()
        with (
            log.open("ab") as output,
            subprocess.Popen(command, stdout=output, stderr=output) as process,
        ):
            try:
                code = process.wait()
            except BaseException:  # a signal, on which the command ends in its own way
                process.terminate()
                raise
        if code:
            raise CommandError(f"{log.stem}: its command ended with {code}; see {log}")
        return round(time.perf_counter() - started, 1)

    def _shown(self, command: Sequence[str]) -> str:
        text = " ".join(["python", *command[1:]])
        return text.replace(str(self.out), "OUT").replace(f"{ROOT}/", "")


def _beside(run: Path, suffix: str) -> Path:
    """A file beside a run directory, whose name may hold a number such as 0.25."""
    return run.with_name(run.name + suffix)


def _job(name: str, settings: Mapping[str, Any]) -> list[str]:
    texts = [f"{key}={_as_text(value)}" for key, value in settings.items()]
    return [sys.executable, str(ROOT / "jobs" / f"{name}.py"), *texts]


def _as_text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _trained(run: Path) -> list[Mapping[str, Any]]:
    return [line for line in read_metrics(run) if "tokens_per_s" in line]


def minutes_left(plan: Plan, done: Mapping[str, float]) -> float:
    """Minutes that the sides which are not done will train, by the seconds of those that are."""
    weights = {side.name: _TRL_SLOWER if side.by_trl else 1 for side in plan.sides()}
    spent = sum(seconds for name, seconds in done.items() if weights.get(name) == 1)
    each = spent / max(1, sum(weights.get(name) == 1 for name in done))
    return sum(weight for name, weight in weights.items() if name not in done) * each / 60
