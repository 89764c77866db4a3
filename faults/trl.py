"""The faults of `faults.py` that apply to TRL's ORPOTrainer, for the comparison.

`python -m faults.trl` trains the demo's decoder with TRL on the same pairs, kills it or
damages its newest checkpoint, and runs the same script again with `resume_from_checkpoint=True`.
The table says whether the second run ended, and whether its weights are the whole run's bytes.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from faults.run import N_STEPS, ROOT, SAVE_STEPS, write_inputs

ENVIRONMENT = os.environ | {"TRL_EXPERIMENTAL_SILENCE": "1", "OMP_NUM_THREADS": "1"}


def train(folder: Path, beta: float) -> None:
    """What a user's script does; it goes on from the newest checkpoint where there is one."""
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.trainer_utils import get_last_checkpoint
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    arguments = ORPOConfig(
        output_dir=str(folder / "run"),
        per_device_train_batch_size=4,
        max_steps=N_STEPS,
        save_steps=SAVE_STEPS,
        save_total_limit=2,
        logging_steps=5,
        learning_rate=1e-3,
        beta=beta,
        max_length=128,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        dataloader_pin_memory=False,
    )
    trainer = ORPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder / "model"),
        args=arguments,
        train_dataset=load_dataset("json", data_files=str(folder / "pairs.jsonl"), split="train"),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
    )
    resume = (folder / "run").exists() and get_last_checkpoint(str(folder / "run")) is not None
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(str(folder / "final"))


def start(folder: Path, beta: float = 0.1) -> "subprocess.Popen[bytes]":
    """The script above in a process of its own."""
    command = [sys.executable, "-m", "faults.trl", "train", str(folder), str(beta)]
    with (folder / "out").open("ab") as out:
        return subprocess.Popen(
            command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, env=ENVIRONMENT
        )


def newest(folder: Path) -> Path:
    """The newest checkpoint."""
    found = (folder / "run").glob("checkpoint-*")
    return max(found, key=lambda path: int(path.name.split("-")[1]))


def until(process: "subprocess.Popen[bytes]", path: Path) -> None:
    """Wait for a file while the process runs."""
    while not path.exists():
        assert process.poll() is None, "TRL ended early"
        time.sleep(0.002)


def torn(folder: Path) -> None:
    """Half of the optimizer's state is lost."""
    path = newest(folder) / "optimizer.pt"
    os.truncate(path, path.stat().st_size // 2)


def flipped(folder: Path) -> None:
    """One bit of the weights is another."""
    path = newest(folder) / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 8
    path.write_bytes(content)


def missing(folder: Path) -> None:
    """The optimizer's state is gone."""
    (newest(folder) / "optimizer.pt").unlink()


def other_data(folder: Path) -> None:
    """One answer has more letters."""
    path = folder / "pairs.jsonl"
    path.write_text(path.read_text().replace("answer 7 ", "another answer 7 ", 1))


def nothing(folder: Path) -> None:
    """The script is killed, and that is all."""


DAMAGES: dict[str, tuple[Callable[[Path], None], float]] = {
    "process SIGKILL": (nothing, 0.1),
    "newest checkpoint torn": (torn, 0.1),
    "one bit flipped": (flipped, 0.1),
    "file missing": (missing, 0.1),
    "config changed (beta 0.1 to 0.25)": (nothing, 0.25),
    "data changed": (other_data, 0.1),
}


def digest(folder: Path) -> str:
    """SHA-256 of the final weights."""
    return hashlib.sha256((folder / "final" / "model.safetensors").read_bytes()).hexdigest()


def main() -> None:
    """Run all cases and print the table."""
    with tempfile.TemporaryDirectory() as name:
        whole = Path(name, "whole")
        write_inputs(whole, long=False)
        make_model(whole)
        assert start(whole).wait() == 0, (whole / "out").read_text()[-2000:]
        print("| fault, TRL 1.16 | second run | bytes equal | what it said of it |")
        print("|---|---|---|---|", flush=True)
        for number, (fault, (damage, beta)) in enumerate(DAMAGES.items()):
            folder = Path(name, str(number))
            write_inputs(folder, long=False)
            shutil.copytree(whole / "model", folder / "model")
            process = start(folder)
            until(process, folder / "run" / f"checkpoint-{3 * SAVE_STEPS}" / "trainer_state.json")
            process.kill()
            process.wait()
            damage(folder)
            (folder / "out").unlink()
            code = start(folder, beta).wait()
            text = (folder / "out").read_text().strip().splitlines()
            telling = re.compile(r"(Error|UserWarning|RuntimeWarning):")
            errors = [line for line in text if telling.search(line)]
            equal = "yes" if code == 0 and digest(folder) == digest(whole) else "NO"
            said = errors[-1].strip()[:120].replace("|", "/") if errors else "nothing"
            ended = "ended" if code == 0 else f"exit code {code}"
            print(f"| {fault} | {ended} | {equal} | {said} |", flush=True)


def make_model(folder: Path) -> None:
    """A small decoder and a tokenizer of the pairs' bytes, as `jobs/train.py` has without one."""
    from orpo_ray.config.schema import ORPOConfig
    from orpo_ray.orchestration.inputs import find_inputs

    config = ORPOConfig(train_files=str(folder / "pairs.jsonl"))
    found = find_inputs(config, folder / "base")
    shutil.copytree(found.model.model, folder / "model")


if __name__ == "__main__":
    if sys.argv[1:2] == ["train"]:
        train(Path(sys.argv[2]), float(sys.argv[3]))
    else:
        main()
