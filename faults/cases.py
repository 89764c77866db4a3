"""What is killed, filled or damaged, and when: each a function of a run that goes on."""

import contextlib
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from faults.run import EVAL_STEPS, N_STEPS, SAVE_STEPS, Run

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
    """Ray Train's controller is killed; the driver starts another one."""
    run.until_step(40)
    run.hurt()
    run.processes("TrainController")[-1].kill()


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

    return fault
