"""Kill what can be killed in a run on local multi-node Ray, and compare it with a whole run.

`python benchmarks/faults.py [NAME ...]` runs the faults whose names contain one of the words
(all without), `--kills N` then kills N seeded random processes at random instants. Every case is
the real `jobs/train.py` on two workers on two nodes, ended by real signals or damaged files; the
table says whether the run ended, which rows its ledger misses or doubles, whether the exported
weights and the metrics equal the whole run's byte for byte, and how long it took until the step
of the fault was passed again.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import ray

from fault_cluster import FaultCluster
from orpo_ray.training.run_files import TIMING, read_metrics

ROOT = Path(__file__).resolve().parent.parent
N_PAIRS, BATCH, N_STEPS, SAVE_STEPS, EVAL_STEPS = 96, 4, 120, 15, 30
SETTINGS = {
    "train_files": "pairs.jsonl",
    "eval_files": "held_out.jsonl",
    "max_steps": N_STEPS,
    "save_steps": SAVE_STEPS,
    "eval_steps": EVAL_STEPS,
    "logging_steps": 5,
    "global_batch_size": BATCH,
    "num_workers": 2,
    "resources_per_worker": "{CPU: 1}",
    "health_check_timeout_s": 15,
    "max_failures": 5,
}


@dataclass
class Run:
    """One run of `jobs/train.py` on the cluster, perhaps by several drivers one after another.

    Args:
        cluster: it runs on.
        folder: with its inputs; the run directory is below it.
        settings: besides `SETTINGS`.
    """

    cluster: FaultCluster
    folder: Path
    settings: dict[str, Any] = field(default_factory=dict)
    hurt_at: float = 0.0
    hurt_step: int = 0
    recovered_s: float | None = None
    driver: "subprocess.Popen[bytes] | None" = None

    @property
    def directory(self) -> Path:
        """The run directory."""
        return self.folder / "runs" / "run"

    def start(self, **changes: Any) -> None:
        """Start a driver."""
        settings = SETTINGS | self.settings | changes | {"run_name": "run"}
        command = [sys.executable, str(ROOT / "jobs/train.py")]
        self.driver = subprocess.Popen(
            [*command, *(f"{name}={value}" for name, value in settings.items())],
            cwd=self.folder,
            env=os.environ | {"RAY_ADDRESS": self.cluster.address},
            stdout=(self.folder / "out").open("ab"),
            stderr=subprocess.STDOUT,
        )

    def wait(self, timeout_s: float = 300) -> int:
        """Wait for the driver to end, minding when the step of the fault is passed."""
        assert self.driver is not None
        deadline = time.monotonic() + timeout_s
        while self.driver.poll() is None:
            self._mind_recovery()
            if time.monotonic() > deadline:
                self.driver.kill()
                self.driver.wait()
                return -1
            time.sleep(0.05)
        self._mind_recovery()
        return self.driver.returncode

    def _mind_recovery(self) -> None:
        passed = min(self.hurt_step + 1, N_STEPS)
        if self.hurt_at and self.recovered_s is None and self._step_since() >= passed:
            self.recovered_s = time.monotonic() - self.hurt_at

    def _step_since(self) -> int:
        """The newest step, but 0 until the run was seen to start again."""
        log = self.directory / "run.log"
        starts = log.read_text().count("attention:") if log.exists() else 0
        return self.step() if starts > self._starts else 0

    def hurt(self) -> None:
        """Note that the fault is now."""
        log = self.directory / "run.log"
        self._starts = log.read_text().count("attention:") if log.exists() else 0
        self.hurt_at, self.hurt_step = time.monotonic(), self.step()

    def step(self) -> int:
        """Steps in the ledger."""
        path = self.directory / "ledger.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def saved_steps(self) -> list[int]:
        """Steps of committed checkpoints."""
        manifests = self.directory.glob("checkpoints/step-*/MANIFEST.json")
        return [int(path.parent.name.removeprefix("step-")) for path in manifests]

    def until(self, condition: Callable[[], object], timeout_s: float = 240) -> None:
        """Wait for something to be true while the driver runs."""
        assert self.driver is not None
        deadline = time.monotonic() + timeout_s
        while not condition():
            if self.driver.poll() is not None:
                raise RuntimeError(f"the driver ended early:\n{(self.folder / 'out').read_text()}")
            if time.monotonic() > deadline:
                raise RuntimeError("waited in vain")
            time.sleep(0.002)

    def until_step(self, step: int) -> None:
        """Wait for a step."""
        self.until(lambda: self.step() >= step)

    def processes(self, name: str) -> list[psutil.Process]:
        """Living processes of this cluster by a part of their title, oldest first."""
        found = []
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                title = " ".join(process.cmdline()) or process.name()
                if title.startswith("ray::") and name in title:
                    found.append(process)
        return sorted(found, key=lambda process: process.create_time())

    def kill_driver(self) -> None:
        """SIGKILL, and wait until its workers are gone."""
        assert self.driver is not None
        self.driver.kill()
        self.driver.wait()
        psutil.wait_procs(self.processes("RayTrainWorker"), timeout=60)


Fault = Callable[[Run], None]


def signalled(number: int) -> Fault:
    """A worker gets a signal at step 40."""

    def fault(run: Run) -> None:
        run.until_step(40)
        worker = run.processes("RayTrainWorker")[-1]
        run.hurt()
        worker.send_signal(number)

    return fault


def injected(what: str) -> Fault:
    """A worker's training thread does something of its own at step 40."""

    def fault(run: Run) -> None:
        run.until_step(40)
        worker = run.processes("RayTrainWorker")[-1]
        run.hurt()
        run.cluster.inject(worker.pid, what)

    return fault


def node_killed(run: Run) -> None:
    """A node with a worker is gone at once; another one joins."""
    run.until_step(40)
    run.hurt()
    run.cluster.kill_node()
    run.cluster.add_node()


def node_killed_for_good(run: Run) -> None:
    """A node with a worker is gone, and the run goes on with the other worker alone."""
    run.until_step(40)
    run.hurt()
    run.cluster.kill_node()


def raylet_terminated(run: Run) -> None:
    """A node is shut down by SIGTERM, as a deleted pod is; another one joins."""
    run.until_step(40)
    run.hurt()
    run.cluster.terminate_node()
    run.cluster.add_node()


def node_drained(run: Run) -> None:
    """A spot node is given notice; the run saves before the node goes."""
    run.until_step(37)
    run.cluster.drain_node(deadline_s=20)
    run.until(lambda: "saving at once" in (run.directory / "run.log").read_text())
    step = run.step()
    run.until(lambda: any(s % SAVE_STEPS for s in run.saved_steps()) or run.step() > step + 30)
    assert any(s % SAVE_STEPS for s in run.saved_steps()), "nothing was saved at the notice"
    run.hurt()
    run.cluster.kill_node()
    run.cluster.add_node()


def driver_killed(run: Run) -> None:
    """The driver is killed and the same command given again."""
    run.until_step(40)
    run.hurt()
    run.kill_driver()
    run.start()


def controller_killed(run: Run) -> None:
    """Ray Train's controller is killed; if Ray gives up, the same command is given again."""
    run.until_step(40)
    run.hurt()
    run.processes("TrainController")[-1].kill()
    _again_if_ended(run)


def _again_if_ended(run: Run) -> None:
    assert run.driver is not None
    with contextlib.suppress(subprocess.TimeoutExpired):
        if run.driver.wait(timeout=60):
            psutil.wait_procs(run.processes("RayTrainWorker"), timeout=60)
            run.start()


def ingest_killed(run: Run) -> None:
    """The process of a data task dies while it tokenizes."""
    run.until(lambda: run.processes("Map("))
    run.hurt()
    run.processes("Map(")[-1].kill()


def ingest_node_killed(run: Run) -> None:
    """A node goes away while it ingests, with the object-store blocks that it holds."""
    run.until(lambda: list(run.folder.glob("runs/token_cache/*/*.parquet")))
    run.hurt()
    run.cluster.kill_node()
    run.cluster.add_node()


def ingest_driver_killed(run: Run) -> None:
    """The driver dies while ingesting; the second one must not write finished shards again."""
    run.until(lambda: list(run.folder.glob("runs/token_cache/*/*.parquet")))
    run.kill_driver()
    time.sleep(5)
    shards = {p: p.stat().st_mtime_ns for p in run.folder.glob("runs/token_cache/*/*.parquet")}
    run.hurt()
    run.start()
    run.until_step(1)
    again = [path for path, time_ns in shards.items() if path.stat().st_mtime_ns != time_ns]
    assert not again, f"{len(again)} of {len(shards)} finished shards were written again"


def in_a_save(run: Run) -> None:
    """A worker dies between the first byte of a checkpoint and its manifest."""
    folder = run.directory / "checkpoints" / f"step-{3 * SAVE_STEPS:08d}"
    run.until(folder.exists)
    run.hurt()
    run.processes("RayTrainWorker")[-1].kill()


def driver_in_a_save(run: Run) -> None:
    """The driver dies there."""
    folder = run.directory / "checkpoints" / f"step-{3 * SAVE_STEPS:08d}"
    run.until(folder.exists)
    run.hurt()
    run.kill_driver()
    run.start()


def in_an_evaluation(run: Run) -> None:
    """A worker dies between the step and the figures of its evaluation."""
    run.until_step(2 * EVAL_STEPS)
    run.hurt()
    run.processes("RayTrainWorker")[-1].kill()


def in_the_export(run: Run) -> None:
    """A worker dies while the model is written."""
    run.until(lambda: (run.directory / "final.tmp").exists())
    run.hurt()
    run.processes("RayTrainWorker")[0].kill()


def disk_full(run: Run) -> None:
    """Something else takes all the room on the run's disk, until an alarm is given."""
    run.until_step(SAVE_STEPS + 2)
    run.until(lambda: run.saved_steps())
    run.hurt()
    ballast = run.folder / "ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    started = run.step()
    time.sleep(4)
    assert run.driver is not None
    assert run.driver.poll() is None, "the run ended on a full disk"
    os.truncate(ballast, 0)
    run.until(lambda: "ALARM" in (run.directory / "run.log").read_text())
    print(f"  (no byte of room from step {started} on, for 4 s)", file=sys.stderr)


def file_limit(run: Run) -> None:
    """No file of a worker may grow beyond 64 KiB until the first alarm."""
    run.until_step(SAVE_STEPS + 2)
    workers = run.processes("RayTrainWorker")
    before = {worker: worker.rlimit(psutil.RLIMIT_FSIZE) for worker in workers}
    run.hurt()
    for worker, (_, hard) in before.items():
        worker.rlimit(psutil.RLIMIT_FSIZE, (64 << 10, hard))
    run.until(lambda: "ALARM" in (run.directory / "run.log").read_text())
    for worker, limits in before.items():
        worker.rlimit(psutil.RLIMIT_FSIZE, limits)


def damaged(damage: Callable[[Path], None]) -> Fault:
    """The driver is killed at step 50, and something is wrong with what lies on disk then."""

    def fault(run: Run) -> None:
        run.until_step(50)
        run.hurt()
        run.kill_driver()
        damage(run.directory)
        run.start()

    return fault


def _newest_shard(directory: Path) -> Path:
    manifest = max(directory.glob("checkpoints/step-*/MANIFEST.json"))
    return max(manifest.parent.glob("__1_*.distcp"))


def torn(directory: Path) -> None:
    """The newest checkpoint's shard loses its second half."""
    shard = _newest_shard(directory)
    os.truncate(shard, shard.stat().st_size // 2)


def flipped(directory: Path) -> None:
    """One bit of it is another."""
    shard = _newest_shard(directory)
    content = bytearray(shard.read_bytes())
    content[len(content) // 3] ^= 8
    shard.write_bytes(content)


def flipped_manifest(directory: Path) -> None:
    """One bit of the manifest is another."""
    path = max(directory.glob("checkpoints/step-*/MANIFEST.json"))
    content = bytearray(path.read_bytes())
    content[content.index(b'"epoch"') + 10] ^= 1
    path.write_bytes(content)


def missing(directory: Path) -> None:
    """It is gone."""
    _newest_shard(directory).unlink()


def torn_snapshot(directory: Path) -> None:
    """Ray Train's own state is half a file."""
    (directory / "checkpoint_manager_snapshot.json").write_text('{"checkpoint_results": [{')


def stale_snapshot(directory: Path) -> None:
    """Ray Train's own state names a folder that is gone."""
    entry = {"checkpoint_dir_name": "checkpoints/step-00000001", "metrics": {}}
    content = {"checkpoint_results": [entry], "latest_checkpoint_result": entry}
    (directory / "checkpoint_manager_snapshot.json").write_text(json.dumps(content))


def second_driver(run: Run) -> None:
    """Another driver on the same run directory: it refuses, the first is not disturbed."""
    run.until_step(10)
    other = Run(run.cluster, run.folder)
    run.hurt()
    other.start()
    assert other.wait() == 2, "the second driver did not refuse"
    assert "is in use by process" in (run.folder / "out").read_text()


def changed_config(run: Run) -> None:
    """Another beta: refused with both values; then the old one goes on."""
    run.until_step(40)
    run.hurt()
    run.kill_driver()
    run.start(beta=0.25)
    assert run.wait() == 2, "another beta was not refused"
    assert "beta: " in (run.folder / "out").read_text()
    run.start()


def changed_data(run: Run) -> None:
    """One answer more letters: refused; then the old data goes on."""
    run.until_step(40)
    run.hurt()
    run.kill_driver()
    path = run.folder / "pairs.jsonl"
    text = path.read_text()
    path.write_text(text.replace("answer 7 ", "another answer 7 ", 1))
    run.start()
    assert run.wait() == 2, "other pairs were not refused"
    path.write_text(text)
    run.start()


DISK_FULL = "disk full in a save"
FAULTS: dict[str, Fault] = {
    "worker SIGKILL": signalled(signal.SIGKILL),
    "worker SIGTERM": signalled(signal.SIGTERM),
    "worker SIGSEGV": signalled(signal.SIGSEGV),
    "worker SIGSTOP": signalled(signal.SIGSTOP),
    "worker exception": injected("exception"),
    "worker exit(0)": injected("exit"),
    "node killed": node_killed,
    "node killed, one worker goes on": node_killed_for_good,
    "raylet SIGTERM": raylet_terminated,
    "node drained": node_drained,
    "driver SIGKILL": driver_killed,
    "controller SIGKILL": controller_killed,
    "data task SIGKILL": ingest_killed,
    "node with blocks killed in ingest": ingest_node_killed,
    "driver SIGKILL in ingest": ingest_driver_killed,
    "worker SIGKILL in a save": in_a_save,
    "driver SIGKILL in a save": driver_in_a_save,
    "worker SIGKILL in an evaluation": in_an_evaluation,
    "worker SIGKILL in the export": in_the_export,
    DISK_FULL: disk_full,
    "file size limit in a save": file_limit,
    "newest checkpoint torn": damaged(torn),
    "one bit flipped": damaged(flipped),
    "one bit of a manifest flipped": damaged(flipped_manifest),
    "shard missing": damaged(missing),
    "Ray's snapshot torn": damaged(torn_snapshot),
    "Ray's snapshot stale": damaged(stale_snapshot),
    "second driver": second_driver,
    "config changed": changed_config,
    "data changed": changed_data,
}
# Cases with other settings, which are compared by their figures and not by their bytes.
OTHER_SIZES = {"node killed, one worker goes on": {"num_workers": "[1,2]"}}
# A larger input for what has to happen while it is ingested.
LONG_INGEST = {"data task SIGKILL", "node with blocks killed in ingest", "driver SIGKILL in ingest"}


def random_kill(seed: int) -> Fault:
    """A worker, the controller or the driver dies at some step."""

    def fault(run: Run) -> None:
        rng = random.Random(seed)
        victim = rng.choice(["worker", "worker", "controller", "driver"])
        run.until_step(rng.randrange(1, N_STEPS))
        time.sleep(rng.random() * 0.1)
        run.hurt()
        if victim == "driver":
            run.kill_driver()
            run.start()
        elif victim == "worker":
            rng.choice(run.processes("RayTrainWorker") or [run.driver]).kill()
        else:
            run.processes("TrainController")[-1].kill()
            _again_if_ended(run)

    return fault


def write_inputs(folder: Path, long: bool) -> dict[str, Any]:
    """Pairs whose answers say the prompt's number or another one; returns settings for them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, first, count in (("pairs", 0, 6000 if long else N_PAIRS), ("held_out", 10**6, 12)):
        with (folder / f"{name}.jsonl").open("w") as file:
            for i in range(first, first + count):
                row = {
                    "prompt": f"question {i}?",
                    "chosen": f"answer {i} " + "yes " * (i % 9),
                    "rejected": f"answer {i * 7} " + "no " * (i % 5),
                }
                file.write(json.dumps(row) + "\n")
    return {"shard_rows": 100} if long else {}


def weights_and_metrics(directory: Path) -> tuple[list[str], list[dict[str, Any]]]:
    """What has to be equal to the byte."""
    digests = [
        hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.glob("final/*.safetensors"))
    ]
    lines = [
        {name: value for name, value in line.items() if name not in TIMING}
        for line in read_metrics(directory)
    ]
    return digests, lines


def largest_difference(directory: Path, whole: Path) -> float:
    """Of any logged loss from the whole run's, relative."""
    pairs = zip(read_metrics(directory), read_metrics(whole), strict=True)
    return max(abs(a["loss"] / b["loss"] - 1) for a, b in pairs if "loss" in b)


def rows_missing_and_doubled(directory: Path, whole: Path) -> tuple[int, int]:
    """By the ledger, over all epochs, against the whole run's."""

    def rows(path: Path) -> Counter[tuple[int, ...]]:
        lines = [json.loads(line) for line in (path / "ledger.jsonl").read_text().splitlines()]
        return Counter((line["epoch"], *row) for line in lines for row in line["rows"])

    wanted, found = rows(whole), rows(directory)
    assert max(wanted.values()) == 1, "the whole run trained a row twice in an epoch"
    return (wanted - found).total(), (found - wanted).total()


def run_case(cluster: FaultCluster, folder: Path, name: str, fault: Fault, whole: Path) -> str:
    """One case as a line of the table."""
    other = OTHER_SIZES.get(name, {})
    if name == DISK_FULL:
        folder.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=80m", "tmpfs", str(folder)]
        if subprocess.run(mount, check=False, capture_output=True).returncode:
            return f"| {name} | not tried: only root can make a small disk | | | | |"
    run = Run(cluster, folder, write_inputs(folder, name in LONG_INGEST) | other)
    run.start()
    try:
        fault(run)
        code = run.wait()
        problem = "" if code == 0 else f"exit code {code}"
    except (AssertionError, RuntimeError, psutil.Error, IndexError) as error:
        problem = f"{type(error).__name__}: {error}".splitlines()[0]
        if run.driver is not None:
            run.kill_driver()
    if problem:
        shutil.copy(folder / "out", Path(tempfile.gettempdir()) / "faults-last-failure.txt")
        return f"| {name} | NO: {problem} | | | | |"
    lost, doubled = rows_missing_and_doubled(run.directory, whole)
    equal = "yes" if weights_and_metrics(run.directory) == weights_and_metrics(whole) else "NO"
    if other:
        equal = f"figures within {largest_difference(run.directory, whole):.0e}"
    seconds = "not interrupted" if run.recovered_s is None else f"{run.recovered_s:.0f}"
    return f"| {name} | yes | {lost} | {doubled} | {equal} | {seconds} |"


def main() -> int:
    """Run the cases, printing each line of the table when it is known."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="run the faults whose names contain one of these")
    parser.add_argument("--kills", type=int, default=None, help="seeded random kills (60)")
    parser.add_argument("--first-seed", type=int, default=0)
    arguments = parser.parse_args()
    chosen = {
        name: fault
        for name, fault in FAULTS.items()
        if not arguments.words or any(word in name for word in arguments.words)
    }
    kills = arguments.kills if arguments.kills is not None else 0 if arguments.words else 60
    for seed in range(arguments.first_seed, arguments.first_seed + kills):
        chosen[f"random kill, seed {seed}"] = random_kill(seed)
    with tempfile.TemporaryDirectory(prefix="orpo-faults-") as name:
        folder = Path(name)
        (folder / "token").write_text(secrets.token_hex(32))
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(folder / "token")
        with FaultCluster(folder / "injected") as cluster:
            whole = {}
            for long in sorted({name in LONG_INGEST for name in chosen}):
                inputs = folder / f"whole-{long}"
                run = Run(cluster, inputs, write_inputs(inputs, long))
                run.start()
                assert run.wait() == 0, (inputs / "out").read_text()
                whole[long] = run.directory
            print(f"ray {ray.__version__}, 2 workers on 2 nodes, {N_STEPS} steps", flush=True)
            print("| fault | survived | rows missing | rows doubled | bytes equal | seconds |")
            print("|---|---|---|---|---|---|", flush=True)
            lines = []
            for number, (name, fault) in enumerate(chosen.items()):
                cluster.heal()
                case = folder / f"case-{number}"
                lines.append(run_case(cluster, case, name, fault, whole[name in LONG_INGEST]))
                print(lines[-1], flush=True)
                if os.path.ismount(case):
                    subprocess.run(["umount", "--lazy", str(case)], check=True)
                shutil.rmtree(case, ignore_errors=True)
    return int(any("NO" in line or "| 0 | 0 |" not in line for line in lines))


if __name__ == "__main__":
    sys.exit(main())
