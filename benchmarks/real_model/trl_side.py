"""TRL's ORPOTrainer on the benchmark's pairs: `python trl_side.py SETTINGS.json`."""

import json
import os
import sys
from pathlib import Path


def main(file: str) -> int:
    """Train with the settings of a file, and save the model."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    given = json.loads(Path(file).read_text())
    tokenizer = AutoTokenizer.from_pretrained(given["base"])
    # Rendered here: TRL would train the line break that the template writes after an answer.
    rows = [
        {
            "prompt": tokenizer.apply_chat_template(
                row["prompt"], tokenize=False, add_generation_prompt=True
            ),
            "chosen": row["chosen"][-1]["content"],
            "rejected": row["rejected"][-1]["content"],
        }
        for row in map(json.loads, Path(given["train"]).read_text().splitlines())
    ]
    trainer = ORPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(given["base"], dtype=torch.float32),
        args=ORPOConfig(
            output_dir=given["output"],
            train_sampling_strategy="sequential",
            use_cpu=not torch.cuda.is_available(),
            gradient_checkpointing=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **given["settings"],
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trainer.train()
    made = Path(given["output"], "final.tmp")
    trainer.save_model(str(made))
    made.rename(Path(given["output"], "final"))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
