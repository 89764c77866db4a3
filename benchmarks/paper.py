"""The ORPO paper's claims on a small model: `python benchmarks/paper.py`.

Trains the demo's decoder from scratch on Ray with the demo's settings, for SFT alone (beta=0) and
the weights of the paper's appendix E, from the same weights and with the same order for one seed:
on real pairs of hh-rlhf, of which some prompts are held out, and on the pairs that the project
generates. Prints a table, and for each claim whether the numbers show it, on held-out pairs and
on trained ones (as the paper's figures 3 and 7 do): those of an epoch, as their batches come.
"""

import argparse
import json
import math
import os
import secrets
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from claims import Curve, Curves, Point, all_claims, spread
from orpo_ray.cli import read_arguments
from orpo_ray.config.schema import ORPOConfig
from orpo_ray.demo.model import make_demo_model
from orpo_ray.orchestration.train import train
from orpo_ray.runs.files import read_metrics
from workload import pair_texts

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT.parent / "shared" / "data" / "hh_rlhf_harmless.jsonl"
BETAS = (0.0, 0.1, 0.5, 1.0)
HELD_OUT, TRAINED = "held-out", "trained"
# Five epochs of the real pairs, which are few, with an evaluation after each.
REAL = {"val_set_size": 0.15, "max_length": 256, "max_prompt_length": 96, "num_train_epochs": 5}
REAL_EVAL_STEPS, GENERATED_EVAL_STEPS = 53, 125


def settings(folder: Path, data: str | None, seed: int) -> ORPOConfig:
    """The demo's run, on its own pairs or on those of a file, without a beta."""
    demo = read_arguments([]).replace(
        output_dir=str(folder),
        seed=seed,
        num_workers=1,
        resources_per_worker={"CPU": 1},
        logging_steps=10,
        eval_steps=GENERATED_EVAL_STEPS,
        save_steps=10_000,
    )
    if data is None:
        return demo
    model = folder / f"real-{seed}"
    if not model.exists():
        texts = (p.prompt + a for p in pair_texts(data) for a in (p.chosen, p.rejected))
        make_demo_model(str(model), texts, seed)
    return demo.replace(
        train_files=(data,), model_name_or_path=str(model), eval_steps=REAL_EVAL_STEPS, **REAL
    )


def run(config: ORPOConfig) -> dict[str, Curve]:
    """Train; gives every evaluation of held-out pairs, and every epoch of trained ones."""
    lines = read_metrics(Path(train(config).run_directory))
    epochs: dict[int, list[Point]] = {}
    for line in lines:
        if "loss" in line:
            epochs.setdefault(math.ceil(line["epoch"]), []).append(_point(line, ""))
    return {
        HELD_OUT: [_point(line, "eval_") for line in lines if "eval_loss" in line],
        TRAINED: [_mean(points) for _, points in sorted(epochs.items())],
    }


def _point(line: Mapping[str, Any], prefix: str) -> Point:
    return Point(
        step=line["step"],
        chosen=line[f"{prefix}logps/chosen"],
        rejected=line[f"{prefix}logps/rejected"],
        log_odds=line[f"{prefix}log_odds_chosen"],
        accuracy=line[f"{prefix}rewards/accuracies"],
        nll=line[f"{prefix}nll_loss"],
    )


def _mean(points: Sequence[Point]) -> Point:
    columns = {name: [getattr(p, name) for p in points] for name in asdict(points[0])}
    means = {name: statistics.mean(values) for name, values in columns.items()}
    return Point(**means | {"step": points[-1].step})


def run_all(
    folder: Path, data: str | None, betas: Sequence[float], seeds: int
) -> dict[str, Curves]:
    """Every beta with every seed, on one data set."""
    curves: dict[str, dict[float, list[Curve]]] = {
        pairs: {beta: [] for beta in betas} for pairs in (HELD_OUT, TRAINED)
    }
    name = "generated" if data is None else "real"
    for seed in range(seeds):
        config = settings(folder, data, seed)
        for beta in betas:
            started = time.perf_counter()
            run_name = f"{name}-seed-{seed}-beta-{beta:g}"
            for pairs, curve in run(config.replace(beta=beta, run_name=run_name)).items():
                curves[pairs][beta].append(curve)
            print(f"{run_name}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    return curves


def table(curves: Curves) -> Iterator[str]:
    """One row a beta: means over the seeds, and after +- half of their range."""
    yield "| beta | chosen | rejected | log odds | accuracy | margin | NLL |"
    yield "|---|---|---|---|---|---|---|"
    for beta, of_seeds in curves.items():
        cells = []
        for name in ("chosen", "rejected", "log_odds", "accuracy", "margin", "nll"):
            ends = [getattr(curve[-1], name) for curve in of_seeds]
            before = statistics.mean(getattr(curve[0], name) for curve in of_seeds)
            start = f"{before:.2f} to " if name in ("chosen", "rejected", "log_odds") else ""
            cells.append(f"{start}{statistics.mean(ends):.3f} ±{spread(ends) / 2:.3f}")
        yield f"| {beta:g} | " + " | ".join(cells) + " |"


def main() -> int:
    """Run all, print tables and claims, and last one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default=str(DATA), help="real pairs")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--betas", type=float, nargs="+", default=list(BETAS), help="0 among them")
    parser.add_argument("--output-dir", default=str(ROOT / "runs" / "paper"))
    arguments = parser.parse_args()
    if 0.0 not in arguments.betas or len(set(arguments.betas)) < 2:
        parser.error("--betas: 0 and at least one other")
    folder = Path(arguments.output_dir).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"torch": version("torch"), "ray": version("ray")}
    with tempfile.NamedTemporaryFile("w") as token:
        token.write(secrets.token_hex(32))
        token.flush()
        os.environ["RAY_AUTH_TOKEN_PATH"] = token.name
        import ray

        ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
        for name, data in (("real", arguments.data), ("generated", None)):
            by_pairs = run_all(folder, data, sorted(set(arguments.betas)), arguments.seeds)
            for pairs, curves in by_pairs.items():
                claims = all_claims(curves)
                print(f"\n{name} pairs, {pairs}\n", *table(curves), "", sep="\n")
                for claim in claims:
                    shown = "shown" if claim.shown else "NOT SHOWN"
                    print(f"- {shown}: {claim.says}: {claim.numbers}", flush=True)
                result[f"{name} {pairs}"] = {
                    "claims": {claim.says: claim.shown for claim in claims},
                    "curves": {
                        b: [list(map(asdict, c)) for c in of_b] for b, of_b in curves.items()
                    },
                }
        ray.shutdown()
    print("\n" + json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
