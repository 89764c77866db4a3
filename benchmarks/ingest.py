"""Ingest beside `datasets.map`: rows a second in one run, and peak memory over millions of rows.

`python benchmarks/ingest.py` makes 100,000 short pairs and tokenizes them in turn (A B A B A B)
with `datasets` (reading JSON lines, `map(batched=True, num_proc=2)`) and with this project's
ingest on a Ray that is up; it prints the medians and their ratio, and how long a cached ingest
takes. `--memory-rows N` instead tokenizes N rows and a tenth of them, and prints the peak memory
of the driver and of all of Ray's processes.
"""

import argparse
import json
import os
import random
import secrets
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

WORKERS = 2
_WORDS = 4000
_SAMPLE_S = 1.0


def write_pairs(path: Path, n_rows: int) -> None:
    """Pairs of words that a seeded generator makes up: 40 words of prompt, 10 to 40 an answer."""
    rng = random.Random(0)
    letters = "etaoinshrdlucmfwypvbgk"
    words = ["".join(rng.choices(letters, k=rng.randint(2, 9))) for _ in range(_WORDS)]
    with path.open("w") as file:
        for row in range(n_rows):
            prompt, chosen, rejected = (
                " ".join(rng.choices(words, k=rng.randint(low, high)))
                for low, high in ((30, 50), (10, 40), (10, 40))
            )
            pair = {"prompt": f"{row} {prompt}", "chosen": f" {chosen}", "rejected": f" {rejected}"}
            file.write(json.dumps(pair) + "\n")


def make_tokenizer(pairs: Path, folder: Path) -> str:
    """A byte-level BPE trained on the first pairs."""
    from orpo_ray.demo.model import train_tokenizer

    texts = []
    with pairs.open() as file:
        for _ in range(2000):
            pair = json.loads(file.readline())
            texts += [pair["prompt"] + pair["chosen"], pair["prompt"] + pair["rejected"]]
    train_tokenizer(texts).save_pretrained(folder)
    return str(folder)


def with_datasets(pairs: Path, tokenizer_folder: str, cache: Path) -> int:
    """Read and tokenize both sides of every pair; returns the rows."""
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)

    def tokenize(batch: dict[str, list[str]]) -> dict[str, Any]:
        columns = {}
        for side in ("chosen", "rejected"):
            texts = [p + a for p, a in zip(batch["prompt"], batch[side], strict=True)]
            columns[f"{side}_ids"] = tokenizer(texts, add_special_tokens=False)["input_ids"]
        return columns

    rows = datasets.load_dataset("json", data_files=str(pairs), split="train", cache_dir=str(cache))
    mapped = rows.map(tokenize, batched=True, num_proc=WORKERS, remove_columns=rows.column_names)
    return len(mapped)


def with_ray(pairs: Path, tokenizer_folder: str, cache: Path, shard_rows: int) -> int:
    """Ingest the same file; returns the rows that were kept."""
    from orpo_ray.dataset.ingest import ingest
    from orpo_ray.dataset.request import IngestRequest
    from orpo_ray.orchestration.tasks import map_tasks
    from orpo_ray.preference.tokenization import Limits

    request = IngestRequest(
        files=(str(pairs),),
        tokenizer=tokenizer_folder,
        revision=None,
        limits=Limits(1024),
        shard_rows=shard_rows,
        cache_directory=str(cache),
    )
    return int(ingest(request, map_tasks).report["rows_kept"])


def timed(work: Callable[[], int], n_rows: int) -> float:
    """Rows a second."""
    start = time.perf_counter()
    assert work() == n_rows
    return n_rows / (time.perf_counter() - start)


def compare(folder: Path, n_rows: int, rounds: int) -> dict[str, float]:
    """Both ways in turn on the same file, each time without any cache."""
    pairs = folder / "pairs.jsonl"
    write_pairs(pairs, n_rows)
    tokenizer = make_tokenizer(pairs, folder / "tokenizer")
    rates: dict[str, list[float]] = {"datasets": [], "ray": []}
    for number in range(rounds):
        cache = folder / f"cache-{number}"
        rates["datasets"].append(
            timed(lambda cache=cache: with_datasets(pairs, tokenizer, cache / "hf"), n_rows)
        )
        rates["ray"].append(
            timed(lambda cache=cache: with_ray(pairs, tokenizer, cache / "ray", 4096), n_rows)
        )
        print({name: round(values[-1]) for name, values in rates.items()}, flush=True)
    start = time.perf_counter()
    with_ray(pairs, tokenizer, cache / "ray", 4096)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    return {
        "rows": n_rows,
        "datasets_rows_per_s": medians["datasets"],
        "ray_rows_per_s": medians["ray"],
        "ratio": medians["ray"] / medians["datasets"],
        "cached_s": time.perf_counter() - start,
    }


class MemoryWatch:
    """Samples the proportional memory of this process and all below it, in bytes."""

    def __init__(self) -> None:
        self.driver = self.largest_worker = self.total = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "MemoryWatch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        me = psutil.Process()
        while not self._ended.wait(_SAMPLE_S):
            sizes = {}
            for process in [me, *me.children(recursive=True)]:
                try:
                    sizes[process.pid] = (process.name(), process.memory_full_info().pss)
                except psutil.Error:
                    continue
            workers = [size for name, size in sizes.values() if name.startswith("ray::")]
            self.driver = max(self.driver, sizes[me.pid][1])
            self.largest_worker = max([self.largest_worker, *workers])
            self.total = max(self.total, sum(size for _, size in sizes.values()))


def memory(folder: Path, n_rows: int) -> dict[str, float]:
    """Peak memory of an ingest of so many rows."""
    pairs = folder / f"{n_rows}.jsonl"
    write_pairs(pairs, n_rows)
    tokenizer = make_tokenizer(pairs, folder / "tokenizer")
    with MemoryWatch() as watch:
        rate = timed(lambda: with_ray(pairs, tokenizer, folder / str(n_rows), 4096), n_rows)
    mib = 2**20
    return {
        "rows": n_rows,
        "file_mib": round(pairs.stat().st_size / mib),
        "rows_per_s": round(rate),
        "driver_mib": round(watch.driver / mib),
        "largest_worker_mib": round(watch.largest_worker / mib),
        "all_processes_mib": round(watch.total / mib),
    }


def main() -> int:
    """Run what the command line asks for, and print one JSON line for each part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cpus", type=int, default=WORKERS, help="of Ray; datasets keeps its own")
    parser.add_argument("--memory-rows", type=int, default=0, help="instead: peak memory")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="orpo-ingest-") as name:
        folder = Path(name)
        (folder / "token").write_text(secrets.token_hex(32))
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(folder / "token")
        import ray

        ray.init(
            address="local",
            num_cpus=arguments.cpus,
            include_dashboard=False,
            log_to_driver=False,
        )
        if arguments.memory_rows:
            for n_rows in (arguments.memory_rows // 10, arguments.memory_rows):
                print(json.dumps(memory(folder, n_rows)), flush=True)
        else:
            print(json.dumps(compare(folder, arguments.rows, arguments.rounds)))
        ray.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
