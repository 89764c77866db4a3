"""Runs the parts of the GPU check in the order of what they decide, each under its own limit.

What is finished when time runs out is in $OUT: `results.jsonl`, and `log.txt` with the output of
every part. Parts of a stage run beside one another; those that are timed have a stage of their own.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
KIT = ROOT / ".gpu"  # what `fetch.sh` filled
STARTED = float(os.environ.get("STARTED", time.time()))


@dataclass(frozen=True)
class Part:
    """One process of the check.

    Args:
        name: in the results and the log.
        limit_s: it is killed after so many seconds.
        least_s: it is left out when fewer are left.
        command: run in the root of the checkout.
    """

    name: str
    limit_s: float
    least_s: float
    command: tuple[str, ...]


@dataclass(frozen=True)
class Ended:
    """How a part ended.

    Args:
        name: of the part.
        state: its exit code, "out of time" or "left out".
        seconds: that it ran.
        tail: the last lines that it printed.
    """

    name: str
    state: str
    seconds: float
    tail: list[str]


def script(name: str, *arguments: str) -> tuple[str, ...]:
    """A part of this folder."""
    return (sys.executable, "-u", str(HERE / f"{name}.py"), *arguments)


def tests(*arguments: str) -> tuple[str, ...]:
    """The tests that need a GPU. A library's warning is printed, and fails no test."""
    options = ("-q", "-W", "default", "-p", "no:cacheprovider", "--timeout", "140", "-rA")
    selected = ("-m", "needs_gpu", "tests/training")
    return (sys.executable, "-u", "-m", "pytest", *options, *selected, *arguments)


def throughput(pairs: Path, model: str, *arguments: str) -> tuple[str, ...]:
    """The benchmark against TRL."""
    path = str(ROOT / "benchmarks" / "throughput.py")
    return (sys.executable, "-u", path, "--model", model, "--data", str(pairs), *arguments)


def stages(call: str, dry: bool, pairs: Path) -> list[list[Part]]:
    """The parts in order, those of a stage side by side."""
    large, small = ("5m", "5m") if dry else ("1b", "0.5b")
    workers = () if dry else ("-n", "6")
    trl = ("--trl-gradient-checkpointing",)
    size = ("--batch", "2", "--steps", "1", "--rounds", "1") if dry else ("--steps", "6", *trl)
    first = [
        [Part("environment", 75, 15, script("environment"))],
        [
            Part("smoke", 200, 40, script("smoke")),
            Part("attention", 150, 40, script("attention")),
            Part("tests", 150, 40, tests("-k", "not flex")),
            Part("tests-flex", 180, 60, tests("-k", "flex", *workers)),
            Part("resume", 150, 60, script("resume")),
        ],
        [Part("budget", 60, 25, script("memory", "budget", small))],
        [Part("saving", 60, 25, script("memory", "saving", small))],
    ]
    second = [
        [Part("ours-large", 200, 60, script("speed", large))],
        [Part("throughput-large", 170, 90, throughput(pairs, large, *size))],
        [Part("lora-8b", 80, 45, script("speed", "8b", "lora"))],
        [Part("throughput-small", 120, 70, throughput(pairs, small, *size))],
        [Part("ours-small", 90, 45, script("speed", small))],
        [Part("long", 60, 30, script("memory", "long", small))],
    ]
    return {"first": first, "second": second, "all": first + second}[call]


class Check:
    """One call: where results go, until when parts may run, and how they ended.

    Args:
        out: folder of `results.jsonl` and `log.txt`.
        deadline: seconds since 1970.
        environment: of every part.
    """

    def __init__(self, out: Path, deadline: float, environment: dict[str, str]) -> None:
        self.results, self.log = out / "results.jsonl", out / "log.txt"
        self.deadline, self.environment = deadline, environment
        self.ended: list[Ended] = []
        for path in (self.results, self.log):
            path.unlink(missing_ok=True)

    def run(self, stage: Sequence[Part]) -> None:
        """Run the parts of a stage side by side."""
        began, running = time.time(), []
        for part in stage:
            if self.deadline - began < part.least_s:
                self.record(part.name, state="left out", left_s=round(self.deadline - began))
                self.ended.append(Ended(part.name, "left out", 0.0, []))
            else:
                running.append(_Running(part, self, min(part.limit_s, self.deadline - began - 3)))
        try:
            while running:
                for one in list(running):
                    if state := one.state():
                        running.remove(one)
                        self._end(one, state, time.time() - began)
                time.sleep(0.2)
        finally:
            for one in running:
                one.kill()

    def _end(self, one: "_Running", state: str, seconds: float) -> None:
        """Record how a part ended; the benchmark's last line is its metrics."""
        one.reader.join(2)
        name = one.part.name
        metrics = [line for line in one.tail if line.startswith("{") and line.endswith("}")]
        if name.startswith("throughput") and metrics:
            self.record(name, **json.loads(metrics[-1]))
        self.record(name, state=state, seconds=round(seconds, 1))
        print(f"{time.time() - STARTED:5.0f} s  {name}: {state}", flush=True)
        self.ended.append(Ended(name, state, seconds, list(one.tail)))

    def record(self, part: str, **values: Any) -> None:
        """Append a line to the results."""
        line = {"part": part, "at_s": round(time.time() - STARTED, 1)} | values
        with self.results.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def print_table(self) -> None:
        """The last lines of parts that failed, the results, and how every part ended."""
        for one in self.ended:
            if one.state not in ("0", "left out"):
                print(f"\n--- {one.name}: {one.state}", *one.tail[-14:], sep="\n")
        print("\n--- results")
        for text in self.results.read_text().splitlines():
            line = json.loads(text)
            if "state" not in line:
                print(_short(line))
        for one in self.ended:
            print(f"{one.name:18s} {one.state:12s} {one.seconds:6.1f} s")


@dataclass
class _Running:
    """A part that was started, at the head of a process group of its own."""

    part: Part
    check: Check
    limit_s: float
    tail: deque[str] = field(default_factory=lambda: deque(maxlen=25))

    def __post_init__(self) -> None:
        self.began = time.time()
        self.process = subprocess.Popen(
            self.part.command,
            cwd=ROOT,
            env=self.check.environment | {"ENDS": str(self.began + self.limit_s)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.check.log.open("a") as log:
            for line in self.process.stdout:
                self.tail.append(line.rstrip())
                log.write(f"[{self.part.name}] {line.rstrip()}\n")
                log.flush()

    def state(self) -> str | None:
        """How it ended; None while it runs inside its limit."""
        code = self.process.poll()
        if code is None and time.time() - self.began > self.limit_s:
            self.kill()
            return "out of time"
        return None if code is None else str(code)

    def kill(self) -> None:
        """End it with all that it started."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        self.process.wait()


def main(arguments: Sequence[str]) -> int:
    """Run the stages and print a table; 0 when every part ended with 0 or was left out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("call", choices=("first", "second", "all"))
    parser.add_argument("--seconds", type=float, default=280, help="of all parts, from the start")
    parser.add_argument("--only", help="names of parts, separated by commas")
    parser.add_argument("--dry-run", action="store_true", help="tiny, on a CPU, without Ray")
    args = parser.parse_args(arguments)
    out = Path(os.environ.get("OUT", KIT / "out")).resolve()
    out.mkdir(parents=True, exist_ok=True)
    wanted = set(args.only.split(",")) if args.only else None
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory() as folder:
        pairs = _dry_pairs(folder) if args.dry_run else KIT / "pairs.jsonl"
        environment = _environment(Path(folder), out, pairs, args.dry_run)
        check = Check(out, STARTED + args.seconds, environment)
        for stage in stages(args.call, args.dry_run, pairs):
            check.run([part for part in stage if wanted is None or part.name in wanted])
    check.print_table()
    # What does not fit into the time of a call is no failure; a dry run has to run every part.
    fine = {"0"} if args.dry_run else {"0", "left out"}
    return int(any(one.state not in fine for one in check.ended))


def _dry_pairs(folder: str) -> Path:
    """The demo's pairs: a dry run needs nothing that a clone does not have."""
    sys.path.insert(0, str(ROOT))
    from orpo_ray.demo.pairs import write_demo_pairs

    pairs, _ = write_demo_pairs(folder, 600, 10, seed=0)
    return Path(pairs)


def _environment(folder: Path, out: Path, pairs: Path, dry: bool) -> dict[str, str]:
    """Of every part: the checkout importable, NCCL and gloo on the loopback interface.

    In a dry run `import ray` fails, as it will on the machine with the GPU.
    """
    paths = [str(ROOT), str(ROOT / "benchmarks")]
    if dry:
        (folder / "ray.py").write_text("raise ModuleNotFoundError('there is no Ray here')\n")
        paths.insert(0, str(folder))
    return os.environ | {
        "PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")]),
        "OUT": str(out),
        "STARTED": str(STARTED),
        "PAIRS": str(pairs),
        "COMMIT": _commit(dry),
        "DRY_RUN": "1" if dry else "",
        "NCCL_SOCKET_IFNAME": "lo",
        "GLOO_SOCKET_IFNAME": "lo",
        "HF_HUB_OFFLINE": "1",
        "TRL_EXPERIMENTAL_SILENCE": "1",
    }


def _commit(dry: bool) -> str:
    """Of this checkout; where it is a copy, without git or its history, what `fetch.sh` noted."""
    if not dry:
        return (KIT / "commit").read_text().strip()
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()


def _short(line: dict[str, Any]) -> str:
    """A result on one line of the terminal; of the benchmark its rates and ratios."""
    shown = []
    for name, value in line.items():
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
        is_metric = isinstance(value, float) or name in ("part", "model")
        if name == "at_s" or ("trl_pairs_per_s" in line and not is_metric):
            continue
        shown.append(text if name == "part" else f"{name}={text[:300]}")
    return " ".join(shown)[:440]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
