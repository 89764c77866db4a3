"""What of TRL's trainer stays out, each with the way to get it; on the driver."""

from typing import Any

from orpo_ray.config.schema import ConfigError, ORPOConfig

_LOOP = "workers run the training loop of orpo_ray.training; "
_WAYS = {
    "optimizer": "it lives in the workers; learning_rate, weight_decay and adam_... set it",
    "lr_scheduler": "it lives in the workers; lr_scheduler_type and lr_scheduler_kwargs set it",
    "callback_handler": "add_callback() and pop_callback() change the callbacks",
    "data_collator": "rows are packed without padding",
    "ref_model": "ORPO has no reference model",
    "hyperparameter_search": "orpo_ray.tune(config) runs sweeps",
    "compute_loss": _LOOP + "beta and nll_scope set the loss",
    "training_step": _LOOP + "batch sizes and gradient_accumulation_steps set a step",
    "prediction_step": _LOOP + "predict() returns the scores of the pairs",
    "evaluation_loop": _LOOP + "evaluate() returns the metrics",
    "log": _LOOP + "a callback's on_log gets what is logged",
    "create_optimizer": "learning_rate, weight_decay and adam_... set the optimizer",
    "create_scheduler": "lr_scheduler_type and lr_scheduler_kwargs set the schedule",
    "create_optimizer_and_scheduler": "learning_rate, lr_scheduler_type and their like set both",
    "get_train_dataloader": "Ray Data feeds the workers; train_dataset is what it reads",
    "get_eval_dataloader": "Ray Data feeds the workers; eval_dataset is what it reads",
    "get_batch_loss_metrics": _LOOP + "metrics.jsonl has the metrics",
    "get_batch_samples": "samples.jsonl has answers to sample_prompts",
    "concatenated_forward": _LOOP + "orpo_ray.objective has the mathematics",
    "concatenated_inputs": _LOOP + "orpo_ray.dataset packs rows",
    "odds_ratio_loss": "orpo_ray.objective.odds_ratio has it",
    "tokenize_row": "chat_template, max_length and truncation set how rows are tokenized",
    "build_tokenized_answer": "chat_template and max_length set how rows are tokenized",
}
_ARGUMENTS = {
    "data_collator": "rows are packed without padding; a data set is train_dataset=",
    "optimizers": "learning_rate, weight_decay, adam_... and lr_scheduler_type set them",
    "preprocess_logits_for_metrics": "logits are never kept",
    "tokenizer": "it is another name of processing_class: give one of the two",
    "model_init": "it makes the model: give one of the two",
}


class Driver:
    """What scripts ask of `trainer.accelerator`: here it is the driver, which is alone."""

    is_main_process = is_local_main_process = is_last_process = True
    process_index = local_process_index = 0
    num_processes = 1
    print = staticmethod(print)

    def wait_for_everyone(self) -> None:
        """Nothing waits: there is one process."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"accelerator has no {name!r}: training runs in Ray workers")


def refuse_arguments(args: Any, **given: Any) -> None:
    """Refuse arguments of TRL's trainer that would have no effect.

    Raises:
        ConfigError: with a line for each.
    """
    problems = [
        f"{name}: not taken; {_ARGUMENTS[name]}"
        for name, value in given.items()
        if value is not None and not (name == "optimizers" and value == (None, None))
    ]
    if args is not None and not isinstance(args, ORPOConfig):
        problems.append(f"args: a {type(args).__name__}; give an orpo_ray.ORPOConfig")
    if problems:
        raise ConfigError(problems)


def refuse_overrides(kind: type, base: type) -> None:
    """Refuse a subclass with methods that would never be called.

    Raises:
        TypeError: naming them, with the way to get what they are for.
    """
    bases = kind.__mro__[: kind.__mro__.index(base)]
    names = [name for name in _WAYS if any(name in vars(part) for part in bases)]
    if names:
        ways = "; ".join(f"{name}: {_WAYS[name]}" for name in names)
        raise TypeError(f"{kind.__name__} overrides what is never called here: {ways}")


def way_of(name: str) -> str:
    """What is said of an attribute that the trainer does not have."""
    way = f": {_WAYS[name]}" if name in _WAYS else "; docs/trl.md lists what it has"
    return f"ORPOTrainer has no {name!r}{way}"
