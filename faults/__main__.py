"""Kill what can be killed in a run on local multi-node Ray, and compare it with a whole run.

`python -m faults [NAME ...]` runs the faults whose names contain one of the words
(all without), `--kills N` then kills N seeded random processes at random instants. Every case is
the real `jobs/train.py` on two workers on two nodes, ended by real signals or damaged files; the
table says whether the run ended and whether a person had to give the command again, which rows its
ledger misses or doubles, whether the exported weights and the metrics equal the whole run's byte
for byte, and how long it took until the step of the fault was passed again.
"""

import argparse
import hashlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import ray

from faults.cases import DISK_FULL, FAULTS, LONG_INGEST, OTHER_SIZES, Fault, random_kill
from faults.cluster import FaultCluster
from faults.run import N_STEPS, Run, write_inputs
from orpo_ray.runs.files import read_metrics

# Metrics that differ between two runs which are otherwise the same.
_TIMING = ("time", "pairs_per_s", "tokens_per_s", "seconds/")


def weights_and_metrics(directory: Path) -> tuple[list[str], list[dict[str, Any]]]:
    """What has to be equal to the byte."""
    digests = [
        hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.glob("final/*.safetensors"))
    ]
    lines = [
        {name: value for name, value in line.items() if not name.startswith(_TIMING)}
        for line in read_metrics(directory)
    ]
    return digests, lines


def largest_difference(directory: Path, whole: Path, last_step: int) -> float:
    """Of any loss logged up to a step from the whole run's, relative."""
    pairs = zip(read_metrics(directory), read_metrics(whole), strict=True)
    return max(
        abs(a["loss"] / b["loss"] - 1) for a, b in pairs if "loss" in b and b["step"] <= last_step
    )


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
        difference = largest_difference(run.directory, whole, run.hurt_step + 20)
        equal = f"{'losses' if difference < 1e-4 else 'NO: losses'} within {difference:.0e}"
    seconds = "not interrupted" if run.recovered_s is None else f"{run.recovered_s:.0f}"
    survived = "yes" if run.n_starts == 1 else "yes, by the same command given again"
    return f"| {name} | {survived} | {lost} | {doubled} | {equal} | {seconds} |"


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
            lines = []
            for number, (name, fault) in enumerate(chosen.items()):
                cluster.heal()
                case = folder / f"case-{number}"
                lines.append(run_case(cluster, case, name, fault, whole[name in LONG_INGEST]))
                print(lines[-1], flush=True)
                if os.path.ismount(case):
                    subprocess.run(["umount", "--lazy", str(case)], check=True)
                shutil.rmtree(case, ignore_errors=True)
    # Ray has its say between the lines above, so the table stands here in one piece.
    print("\n| fault | survived | rows missing | rows doubled | bytes equal | seconds |")
    print("|---|---|---|---|---|---|", *lines, sep="\n")
    return int(any("NO" in line or "| 0 | 0 |" not in line for line in lines))


if __name__ == "__main__":
    sys.exit(main())
