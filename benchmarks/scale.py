"""What whole commands cost as rows and files grow: `python benchmarks/scale.py`.

Each command (train, again from the cached tokens, resume, evaluate, prepare) is run on made-up
pairs with a tiny model, as a process of its own, at every number of rows (in one file) and of files
(of two rows each). It prints a JSON line for each, and one with the powers by which wall time, CPU
time, memory and files grow from the least size to the largest: 1 is linear, 2 quadratic. The
default sizes take some minutes. `--tree` measures another checkout of this project.
"""

import argparse
import json
import math
import os
import secrets
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

from ingest import write_pairs

COMMANDS = ("train", "again", "resume", "evaluate", "prepare")
ROWS_A_FILE = 2
EVALUATED_ROWS = 256
_SAMPLE_S = 0.5
_MIB = 2**20
_GROWING = ("wall_s", "cpu_s", "driver_mib", "worker_mib", "tasks_mib", "files")


class Usage:
    """Samples CPU time and memory of a process and all below it.

    Args:
        process: the driver.
    """

    def __init__(self, process: psutil.Process) -> None:
        self._process = process
        self._cpu_s: dict[int, float] = {}
        self.peaks = {"driver": 0, "worker": 0, "tasks": 0}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._repeat, daemon=True)

    def __enter__(self) -> "Usage":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    @property
    def cpu_s(self) -> float:
        """Of all processes, short-lived ones but for their last half second."""
        return sum(self._cpu_s.values())

    def _repeat(self) -> None:
        while not self._ended.wait(_SAMPLE_S):
            sizes: dict[str, list[int]] = {role: [0] for role in self.peaks}
            for process, role in self._processes():
                try:
                    times, memory = process.cpu_times(), process.memory_info()
                except psutil.Error:
                    continue
                self._cpu_s[process.pid] = times.user + times.system
                if role:
                    sizes[role].append(memory.rss - getattr(memory, "shared", 0))
            for role, found in sizes.items():
                self.peaks[role] = max(self.peaks[role], *found)

    def _processes(self) -> Iterator[tuple[psutil.Process, str | None]]:
        """The processes, and what they are; None for Ray's own."""
        yield self._process, "driver"
        try:
            below = self._process.children(recursive=True)
        except psutil.Error:
            return
        for process in below:
            try:
                command = " ".join(process.cmdline()[:1])
            except psutil.Error:
                continue
            is_worker = "RayTrainWorker" in command
            yield process, "worker" if is_worker else "tasks" if "ray::" in command else None


def make_data(folder: Path, n_rows: int, n_files: int) -> Path:
    """Pairs in so many files of a folder, with a model and evaluation pairs beside it."""
    from orpo_ray.demo.model import make_demo_model

    write_pairs(folder / "all.jsonl", n_rows)
    data = folder / "train"
    data.mkdir()
    with (folder / "all.jsonl").open() as file:
        lines = iter(file)
        for number in range(n_files):
            part = [next(lines) for _ in range(n_rows // n_files)]
            (data / f"{number:06d}.jsonl").write_text("".join(part))
    (folder / "all.jsonl").unlink()
    write_pairs(folder / "eval.jsonl", EVALUATED_ROWS)
    with (folder / "eval.jsonl").open() as file:
        pairs = [json.loads(line) for line in file]
    make_demo_model(str(folder / "model"), [p["prompt"] + p["chosen"] for p in pairs], 0)
    return data


def arguments_of(command: str, folder: Path, data: Path, steps: int) -> list[str]:
    """The command line after the interpreter."""
    run = {"again": "b"}.get(command, "a")
    name = command if command in ("evaluate", "prepare") else "train"
    settings: dict[str, Any] = {
        "output_dir": folder / "runs",
        "model_name_or_path": folder / "model",
        "max_length": 128,
        "run_name": run if name == "train" else name,
        "sample_prompts": 0,
    }
    if name == "evaluate":
        settings["eval_files"] = folder / "eval.jsonl"
    else:
        settings["train_files"] = data
    if name == "train":
        settings |= {"per_device_train_batch_size": 16, "logging_steps": 1}
        more = command == "resume"
        settings |= {"max_steps": steps + more * 4} if steps else {"num_train_epochs": 1 + more}
    return [f"jobs/{name}.py", *(f"{key}={value}" for key, value in settings.items())]


def measure(tree: Path, command: str, folder: Path, data: Path, steps: int) -> dict[str, Any]:
    """Run one command to its end.

    Returns:
        Seconds, peak memory in MiB, and files and MB below the output folder.
    """
    environment = os.environ | {"PYTHONPATH": str(tree), "RAY_worker_niceness": "0"}
    arguments = arguments_of(command, folder, data, steps)
    with (folder / f"{command}.log").open("w") as log:
        started, begun = time.perf_counter(), time.time()
        process = psutil.Popen(
            [sys.executable, *arguments], cwd=tree, env=environment, stdout=log, stderr=log
        )
        with Usage(psutil.Process(process.pid)) as usage:
            code = process.wait()
        wall_s = time.perf_counter() - started
    if code:
        tail = (folder / f"{command}.log").read_text()[-2000:]
        raise RuntimeError(f"{' '.join(arguments)} ended with {code}: {tail}")
    files = [path for path in (folder / "runs").rglob("*") if path.is_file()]
    figures = {
        "wall_s": round(wall_s, 1),
        "cpu_s": round(usage.cpu_s, 1),
        **{f"{role}_mib": round(peak / _MIB) for role, peak in usage.peaks.items()},
        "files": len(files),
        "mb": round(sum(path.stat().st_size for path in files) / 1e6, 1),
    }
    metrics = folder / "runs" / {"again": "b"}.get(command, "a") / "metrics.jsonl"
    if command in ("train", "again", "resume"):
        times = [json.loads(line)["time"] for line in metrics.read_text().splitlines()]
        new = [at for at in times if at > begun]
        figures["start_s"] = round(new[0] - begun, 1)
        figures["end_s"] = round(begun + wall_s - new[-1], 1)
    return figures


def powers(results: Sequence[dict[str, Any]], size: str) -> list[dict[str, Any]]:
    """By what power each figure of a command grows with a size, from its least to its largest."""
    found = []
    for command in dict.fromkeys(result["command"] for result in results):
        ours = sorted((r for r in results if r["command"] == command), key=lambda r: r[size])
        if len(ours) < 2:
            continue
        (first, *_, last) = ours
        span = math.log(last[size] / first[size])
        row = {
            name: round(math.log(max(last[name], 1e-3) / max(first[name], 1e-3)) / span, 2)
            for name in _GROWING
        }
        found.append({"command": command, "from": first[size], "to": last[size], **row})
    return found


def sizes(text: str) -> list[int]:
    """Numbers between commas."""
    return [int(part) for part in text.split(",") if part]


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=sizes, default=[1000, 10_000], help="rows, in one file")
    parser.add_argument("--files", type=sizes, default=[200, 2000], help="files, of two rows each")
    parser.add_argument("--commands", type=lambda text: text.split(","), default=list(COMMANDS))
    parser.add_argument("--steps", type=int, default=20, help="of training; 0 for a whole epoch")
    parser.add_argument("--tree", type=Path, default=Path(__file__).resolve().parent.parent)
    arguments = parser.parse_args()
    tree = arguments.tree.resolve()
    sys.path.insert(0, str(tree))
    for size in ("rows", "files"):
        results = []
        for number in getattr(arguments, size):
            with tempfile.TemporaryDirectory(prefix="orpo-scale-") as name:
                folder = Path(name)
                (folder / "token").write_text(secrets.token_hex(32))
                os.environ["RAY_AUTH_TOKEN_PATH"] = str(folder / "token")
                n_files = number if size == "files" else 1
                n_rows = number * ROWS_A_FILE if size == "files" else number
                data = make_data(folder, n_rows, n_files)
                for command in arguments.commands:
                    figures = measure(tree, command, folder, data, arguments.steps)
                    results.append({"command": command, "rows": n_rows, "files_in": n_files})
                    results[-1] |= figures
                    print(json.dumps(results[-1]), flush=True)
        for row in powers(results, "rows"):
            print(json.dumps({"power of": size, **row}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
