"""A hundred simulated ranks read their share of a token set of ten million rows.

`python benchmarks/ranks.py --folder DIR` writes the token set into DIR (once; 10 M pairs of about
24 tokens, in real shards), then starts every rank as a process of its own, two at a time, as a
worker would: it receives its pickled stream, opens it at the first step, in the middle of the
second epoch and before the end of the first, and takes three steps from each. Prints whether all
ranks saw the same rows in the same steps, whether their microbatches together hold each pair of a
step once, and the peak memory of a rank beside that of a process that only imports the code.
"""

import argparse
import json
import pickle
import resource
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

SHARD_ROWS = 4096
STEPS = 3


def write_token_set(folder: Path, n_rows: int) -> None:
    """Shards of short pairs with ids of their own, and their manifest."""
    from orpo_ray.dataset.shards import TokenSet, write_shard
    from orpo_ray.preference.groups import PromptGroup, RowId
    from orpo_ray.storage.folder import Folder

    folder.mkdir(parents=True, exist_ok=True)
    shards = []
    for first in range(0, n_rows, SHARD_ROWS):
        rng = np.random.default_rng(first)
        lengths = rng.integers(4, 13, size=(SHARD_ROWS, 3))
        ids = rng.integers(0, 30_000, size=int(lengths.sum()), dtype=np.int32)
        parts = iter(np.split(ids, np.cumsum(lengths.ravel())[:-1]))
        groups = []
        for row in range(first, min(first + SHARD_ROWS, n_rows)):
            prompt, chosen, rejected = next(parts), next(parts), next(parts)
            groups.append(PromptGroup(prompt, (chosen, rejected), ((0, 1),), (RowId(0, row),)))
        shards.append(write_shard(str(folder / f"{first:010}.parquet"), groups, source=0))
    TokenSet(Folder.at(folder), tuple(shards), ("made.jsonl",), {"rows_read": n_rows}).save()


def stream_of(folder: Path, rank: int, world_size: int, batch_groups: int) -> Any:
    """What a worker receives."""
    from orpo_ray.dataset.order import Order
    from orpo_ray.dataset.shards import TokenSet
    from orpo_ray.dataset.stream import BatchPlan, TokenStream

    tokens = TokenSet.load(folder)
    if tokens is None:
        raise SystemExit(f"{folder}: no token set")
    lengths = tuple(shard.n_groups for shard in tokens.shards)
    order = Order(lengths, window_shards=16, seed=42, shuffle=True)
    plan = BatchPlan(batch_groups, budget_tokens=4096, chunk_tokens=1024, prompt_counts=True)
    return TokenStream(tokens, order, plan, rank, world_size)


def read_as_rank(path: Path) -> None:
    """One rank, in this process: prints what it saw, as JSON."""
    import orpo_ray.dataset.stream  # noqa: F401  (part of the base, not of the feed)

    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    stream = pickle.loads(path.read_bytes())
    seen = xxhash.xxh3_128()
    own: list[list[int]] = []
    epoch = stream.steps_per_epoch
    for first in (0, epoch + epoch // 2, epoch - STEPS):
        for batch in stream.batches(first, first + STEPS):
            rows = [(row_id.source, row_id.row) for row_id in batch.row_ids]
            seen.update(json.dumps([batch.step, batch.epoch, batch.n_tokens, rows]).encode())
            own.append([batch.step, batch.n_pairs, sum(len(row.row_ids) for row in batch.rows)])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    answer = {"seen": seen.hexdigest(), "own": own, "base_mib": base / 1024}
    answer |= {"peak_mib": peak / 1024, "seconds": time.perf_counter() - started}
    print(json.dumps(answer))


def main() -> None:
    """Write the token set, start the ranks, compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--ranks", type=int, default=100)
    parser.add_argument("--pairs", type=int, default=6400, help="a step, over all ranks")
    parser.add_argument("--at-once", type=int, default=2)
    parser.add_argument("--as-rank", type=Path)
    options = parser.parse_args()
    if options.as_rank:
        read_as_rank(options.as_rank)
        return
    if not (options.folder / "manifest.json").exists():
        started = time.perf_counter()
        write_token_set(options.folder, options.rows)
        print(f"wrote {options.rows:,} rows in {time.perf_counter() - started:.0f} s")

    def run(rank: int) -> dict[str, Any]:
        path = options.folder / f"rank-{rank}.pickle"
        stream = stream_of(options.folder, rank, options.ranks, options.pairs)
        path.write_bytes(pickle.dumps(stream))
        command = [
            sys.executable,
            __file__,
            "--folder",
            str(options.folder),
            "--as-rank",
            str(path),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"rank {rank}: {done.stderr[-2000:]}")
        answer: dict[str, Any] = json.loads(done.stdout)
        answer["pickle_kib"] = path.stat().st_size / 1024
        path.unlink()
        return answer

    with ThreadPoolExecutor(options.at_once) as threads:
        answers = list(threads.map(run, range(options.ranks)))
    agree = len({answer["seen"] for answer in answers}) == 1
    together = np.array([[part for _, _, part in answer["own"]] for answer in answers]).sum(axis=0)
    asked = [n_pairs for _, n_pairs, _ in answers[0]["own"]]
    added = [answer["peak_mib"] - answer["base_mib"] for answer in answers]
    print(f"{options.ranks} ranks agree on the rows of {len(asked)} steps: {agree}")
    print(f"their shares add up to every step's pairs: {together.tolist() == asked}")
    print(
        f"memory of a rank's feed: {max(added):.0f} MiB at most, {min(added):.0f} at least, on a "
        f"base of {answers[0]['base_mib']:.0f}; its pickled stream: {answers[0]['pickle_kib']:.0f} "
        f"KiB; seconds for 9 steps and 3 openings: {max(a['seconds'] for a in answers):.1f} at most"
    )


if __name__ == "__main__":
    main()
