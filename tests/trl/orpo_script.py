"""A script as TRL's examples/scripts/orpo.py is: the same calls, and data in a local folder."""

import os
from dataclasses import dataclass, field

from datasets import load_from_disk
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser
from trl import ModelConfig, get_peft_config

from orpo_ray import ORPOConfig, ORPOTrainer


@dataclass
class ScriptArguments:
    """What is trained on."""

    dataset: str = field(metadata={"help": "A folder of `save_to_disk`."})


def main() -> None:
    """Train, and save the model into the output directory."""
    parser = HfArgumentParser((ScriptArguments, ORPOConfig, ModelConfig))
    script, args, config = parser.parse_args_into_dataclasses()
    place, trusted = config.model_name_or_path, args.trust_remote_code  # where TRL 1.16 has it
    model = AutoModelForCausalLM.from_pretrained(place, trust_remote_code=trusted)
    tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=trusted)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    splits = load_from_disk(script.dataset)
    if args.debug:
        for name in splits:
            splits[name] = splits[name].select(range(2))

    def process(row: dict) -> dict:
        for name in ("chosen", "rejected"):
            row[name] = tokenizer.apply_chat_template(row[name], tokenize=False)
        return row

    n_processes = 1 if args.debug else min(2, os.cpu_count() or 1)
    splits = splits.map(process, num_proc=n_processes, load_from_cache_file=False)
    trainer = ORPOTrainer(
        model,
        args=args,
        train_dataset=splits["train"],
        eval_dataset=splits["test"],
        tokenizer=tokenizer,
        peft_config=get_peft_config(config),
    )
    trainer.train()
    trainer.save_model(args.output_dir)


if __name__ == "__main__":
    main()
