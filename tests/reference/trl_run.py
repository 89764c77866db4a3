"""Train with TRL's ORPOTrainer as a script of its own: `python -m tests.reference.trl_run JOB`.

JOB is a JSON file with `model`, `pairs` (a JSON file of prompt, chosen and rejected lists),
`arguments` (of TRL's ORPOConfig) and `answer`, where the logged metrics are written; the weights
go into `arguments.output_dir`.
"""

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer


def main(job_path: str) -> None:
    job = json.loads(Path(job_path).read_text())
    trainer = ORPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32),
        args=ORPOConfig(**job["arguments"]),
        train_dataset=Dataset.from_dict(json.loads(Path(job["pairs"]).read_text())),
        processing_class=AutoTokenizer.from_pretrained(job["model"]),
    )
    trainer.train()
    trainer.save_model(job["arguments"]["output_dir"])
    Path(job["answer"]).write_text(json.dumps(trainer.state.log_history))


if __name__ == "__main__":
    main(sys.argv[1])
