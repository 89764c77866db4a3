"""The host's time for a step, here and at an earlier revision: `host.py [REVISION] [--rounds N]`.

16 layers, 16 wide, one pair a step: the products take next to nothing, and what is left is what a
GPU waits for, Python, launches and bookkeeping. Both trees run the real `jobs/train.py` with one
worker and one thread, in turn, and log after every 20 steps; a round's number is the median of
those means, and "less by" is of the fastest rounds.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

HERE = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(HERE), str(HERE / "benchmarks")]

from workload import PAIRS_OF_4, make_ranking_folder  # noqa: E402

BEFORE = "8b600fc"  # the last commit of the first round
N_STEPS, EVERY, WARMUP = 200, 20, 40
SETTINGS = (
    "per_device_train_batch_size=1",
    f"max_steps={N_STEPS}",
    f"logging_steps={EVERY}",
    "save_steps=1000",
    "num_workers=1",
    "beta=0.1",
)


def main() -> None:
    """Print milliseconds a step of both trees in fp32 and in bf16, a line each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("revision", nargs="?", default=BEFORE)
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, before = Path(name), Path(name, "before")
        git = ["git", "-C", str(HERE), "worktree"]
        subprocess.run([*git, "add", "--detach", before, arguments.revision], check=True)
        try:
            make_ranking_folder(folder, "narrow", "1k", 40 * PAIRS_OF_4)
            rows = (folder / "pairs.jsonl").read_text().splitlines()[::PAIRS_OF_4]  # one a prompt
            (folder / "pairs.jsonl").write_text("\n".join(rows) + "\n")
            for dtype in ("fp32", "bf16"):
                _compare(folder, {arguments.revision: before, "now": HERE}, dtype, arguments.rounds)
        finally:
            subprocess.run([*git, "remove", "--force", before], check=True)


def _compare(folder: Path, trees: dict[str, Path], dtype: str, n_rounds: int) -> None:
    found: dict[str, list[float]] = {name: [] for name in trees}
    for n in range(n_rounds):
        for name, tree in trees.items():
            found[name].append(_step_ms(tree, folder, f"{dtype}-{name}-{n}", dtype))
    before, now = (min(times) for times in found.values())
    texts = (f"{name} {' '.join(f'{t:.1f}' for t in times)} ms" for name, times in found.items())
    print(f"{dtype}: {', '.join(texts)}; less by {1 - now / before:.0%}", flush=True)


def _step_ms(tree: Path, folder: Path, run: str, dtype: str) -> float:
    """Median milliseconds a step of one run of one tree, as its metrics say."""
    environment = os.environ | {"PYTHONPATH": str(tree), "RAY_ADDRESS": "local"}
    environment["OMP_NUM_THREADS"] = "1"  # else the time is that of waiting for one another
    command = [
        *(sys.executable, "jobs/train.py", f"model_name_or_path={folder / 'model'}"),
        *(f"train_files={folder / 'pairs.jsonl'}", f"output_dir={folder / 'runs'}"),
        *(f"run_name={run}", f"bf16={str(dtype == 'bf16').lower()}", *SETTINGS),
    ]
    result = subprocess.run(
        command, cwd=tree, env=environment, capture_output=True, text=True, check=False
    )
    if result.returncode:
        raise SystemExit(f"{tree}: {result.stderr[-2000:]}")
    (metrics,) = (folder / "runs").glob(f"**/{run}/metrics.jsonl")
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    logged = [(line["step"], line["time"]) for line in lines if "loss" in line]
    return 1e3 * statistics.median(
        (end - start) / (step - earlier)
        for (earlier, start), (step, end) in pairwise(logged)
        if earlier >= WARMUP
    )


if __name__ == "__main__":
    main()
