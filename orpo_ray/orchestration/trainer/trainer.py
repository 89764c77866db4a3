"""ORPOTrainer: what a TRL user writes, with the import changed; on the driver."""

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from transformers import EarlyStoppingCallback, EvalPrediction, PrinterCallback, TrainerState
from transformers.trainer_utils import PredictionOutput

from orpo_ray.config import schema
from orpo_ray.config.schema import ConfigError
from orpo_ray.orchestration.evaluate import evaluate
from orpo_ray.orchestration.inputs import RunInputs, find_inputs
from orpo_ray.orchestration.start import run_directory_of, with_run_name
from orpo_ray.orchestration.train import TrainResult, train
from orpo_ray.orchestration.trainer.adapters import (
    adapter_config,
    frozen_weights,
    lora_settings,
    refuse_encoder_decoder,
    with_adapters,
    with_trained_weights,
)
from orpo_ray.orchestration.trainer.callbacks import Callbacks, RunFollower
from orpo_ray.orchestration.trainer.history import add_entry
from orpo_ray.orchestration.trainer.memory import KeptInputs, tokenizer_of
from orpo_ray.orchestration.trainer.refusals import refuse_arguments, refuse_overrides, way_of
from orpo_ray.orchestration.trainer.resuming import run_to_resume
from orpo_ray.orchestration.trainer.saving import Saving
from orpo_ray.orchestration.trainer.scores import computed_metrics, pair_scores
from orpo_ray.preference.errors import DataError
from orpo_ray.pretrained import ModelSource, load_model, load_model_config, load_tokenizer
from orpo_ray.runs.files import FINISH, REQUESTS, holds_run
from orpo_ray.runs.lock import claimed
from orpo_ray.runs.statistics import EvaluationResult
from orpo_ray.storage.folder import Folder
from orpo_ray.trl.arguments import ORPOConfig

_log = logging.getLogger(__name__)
_TAGS = ["orpo", "orpo_ray"]


class ORPOTrainer(Saving):
    """Train a model on preference pairs with ORPO, on the Ray cluster at hand or this machine.

    The arguments are those of TRL's `ORPOTrainer`, in its order; `docs/trl.md` says what differs.

    Args:
        model: folder, hub id, or a model in memory; unset: the one that `args` names.
        args: the run.
        data_collator: refused.
        train_dataset: a path or glob, a hub id, a `datasets.Dataset`, a Ray Dataset, a pandas
            frame, or a dict of lists with `prompt`, `chosen` and `rejected`; unset: the files that
            `args` names.
        eval_dataset: the same, or a dict of such data sets by name, whose metrics are then
            `eval_<name>_...`.
        processing_class: the tokenizer; unset: the model's own.
        model_init: makes the model, in place of `model`.
        callbacks: transformers' callbacks, called on the driver when lines are logged.
        optimizers: refused.
        preprocess_logits_for_metrics: refused.
        peft_config: a `peft.LoraConfig`, in place of the settings `lora_...`.
        compute_metrics: gets the scores of the pairs at every evaluation, in training on a worker,
            as `EvalPrediction`: mean log-probabilities of chosen and rejected, and the label 0.
        tokenizer: another name of `processing_class`.

    Raises:
        ConfigError: for arguments that are refused, and while another driver has the run directory.
        DataError: for missing files, data that cannot be read, and a model without data.
    """

    def __init__(
        self,
        model: Any = None,
        args: schema.ORPOConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        model_init: Callable[[], Any] | None = None,
        callbacks: Sequence[Any] | None = None,
        optimizers: Any = (None, None),
        preprocess_logits_for_metrics: Any = None,
        peft_config: Any = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
        *,
        tokenizer: Any = None,
    ) -> None:
        refuse_overrides(type(self), ORPOTrainer)
        refuse_arguments(
            args,
            data_collator=data_collator,
            optimizers=optimizers,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            tokenizer=tokenizer if processing_class is not None else None,
            model_init=model_init if model is not None else None,
        )
        model = model_init() if model_init is not None else model
        refuse_encoder_decoder(model)
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        self.compute_metrics = compute_metrics
        self.result: TrainResult | None = None
        self._given = None if isinstance(model, str | Path) else model
        self._tokenizer = tokenizer if processing_class is None else processing_class
        if self._given is not None and self._tokenizer is None:
            self._tokenizer = tokenizer_of(self._given)
        self._loaded: Any = None
        config = _as_arguments(args)
        if self._given is None and model is not None:
            config = config.replace(model_name_or_path=str(model))
        if (adapters := peft_config or adapter_config(self._given)) is not None:
            config = config.replace(**lora_settings(adapters, self._model_type(config)))
        if config.model.lora_r is None and (frozen := frozen_weights(self._given)):
            config = config.replace(frozen_weights=frozen)
        if peft_config is not None and self._given is not None:
            self._given = with_adapters(self._given, peft_config)
        self._peft_config = peft_config
        more = {"model": self._given, "processing_class": self._tokenizer}
        self._callbacks = Callbacks((PrinterCallback,), more)
        for callback in callbacks or ():
            config = self._with_callback(config, callback)
        self._has_own_name = config.output.run_name is not None
        self._prepare(with_run_name(config))
        self._callbacks.call("on_init_end", self.args)

    def _prepare(self, config: ORPOConfig) -> None:
        """Write what is in memory into the run directory of the config, and find the rest."""
        self._run_directory = run_directory_of(config)
        kept = KeptInputs(self._run_directory / "inputs")
        has_data = self.train_dataset is not None or config.data.train_files is not None
        has_data = has_data or config.data.dataset_name is not None
        has_model = self._given is not None or config.model.model_name_or_path is not None
        if has_model and not has_data and self.eval_dataset is None:
            raise DataError(["train_dataset: a model, but no pairs to train it on; give them"])
        self._trains = has_data or not has_model
        with claimed(self._run_directory):
            if self._given is not None:
                config = config.replace(model_name_or_path=kept.model(self._given).address)
            if self.train_dataset is not None:
                files = kept.files(self.train_dataset)
                config = config.replace(train_files=files, dataset_name=None)
                config = self._with_special_tokens(config, kept)
            inputs = find_inputs(config, self._run_directory.parent, not self._trains)
            if self.eval_dataset is not None:
                inputs = dataclasses.replace(inputs, eval_files=kept.eval_files(self.eval_dataset))
            if self._tokenizer is not None:
                folder = kept.tokenizer(self._tokenizer)
                source = dataclasses.replace(inputs.model, tokenizer=folder)
                inputs = dataclasses.replace(inputs, model=source)
        self.args, self._inputs = config, inputs

    def _with_special_tokens(self, config: ORPOConfig, kept: KeptInputs) -> ORPOConfig:
        """Encode the special tokens of texts as TRL does, where a chat template wrote them."""
        data = config.data
        if isinstance(self.train_dataset, str | Path) or data.special_tokens_in_text == "allow":
            return config
        tokenizer = self._tokenizer
        if tokenizer is None and (name := config.model.model_name_or_path) is not None:
            tokenizer = load_tokenizer(ModelSource.from_config(config.model, name))
        files = [str(file) for file in data.train_files or ()]
        if tokenizer is None or not kept.are_templated(files, tokenizer):
            return config
        _log.warning(
            "train_dataset: its texts have the special tokens of a chat template, which are "
            "encoded as such: special_tokens_in_text=allow"
        )
        return config.replace(special_tokens_in_text="allow")

    def train(
        self,
        resume_from_checkpoint: bool | str | Path | None = None,
        trial: None = None,
        ignore_keys_for_eval: Any = None,
    ) -> TrainResult:
        """Train; with the `run_name` of an earlier run, resume from its newest checkpoint.

        Args:
            resume_from_checkpoint: True: go on with the newest run below `output_dir` that has a
                checkpoint, or with that of `run_name`. A path: with the run that it is of.
            trial: refused; `orpo_ray.tune` runs sweeps.
            ignore_keys_for_eval: without effect, as no logits are kept.

        Raises:
            ConfigError: when there is no checkpoint to resume from. Others: see `orpo_ray.train`.
            DataError: without training data.
        """
        if trial is not None:
            raise ConfigError(["trial: orpo_ray.tune(config) runs sweeps"])
        if resume_from_checkpoint:
            run = run_to_resume(self.args, resume_from_checkpoint, self._has_own_name)
            if run != self._run_directory:
                if not self._has_own_name and not holds_run(self._run_directory.path):
                    self._run_directory.remove()  # it was made for this trainer, and has inputs
                named = {"output_dir": run.parent.address, "run_name": run.name}
                self._prepare(self.args.replace(**named, **self._own_names()))
        if not self._trains:
            raise DataError(["train_dataset: this trainer has no pairs to train on; give them"])
        if self.result is not None:
            _log.warning("train() again goes on with the same run: what it has done stays done")
        started = time.monotonic()
        self._remove_requests()
        self._callbacks.begin(self.args)
        follower = RunFollower(self._callbacks, self.args, self._run_directory)
        try:
            result = train(self.args, self._inputs, follower=follower, compute_metrics=self._scorer)
        finally:
            self._remove_requests()
        self._end(result, time.monotonic() - started)
        follower.look_for_checkpoints()
        self._callbacks.call("on_train_end", self.args)
        if follower.error is not None:
            raise follower.error
        if self.args.push_to_hub:
            self.push_to_hub()
        return self.result or result

    def _remove_requests(self) -> None:
        for name in (FINISH, REQUESTS):
            self._run_directory.remove(name)

    def _own_names(self) -> dict[str, Any]:
        """What the config says of inputs that are kept elsewhere when the run is another."""
        named: dict[str, Any] = {}
        if self.train_dataset is not None:
            named["train_files"] = None
        if self._given is not None:
            named["model_name_or_path"] = None
        return named

    def _end(self, result: TrainResult, seconds: float) -> None:
        """Note the result, with what transformers adds to the metrics, and the trained weights."""
        state = self._callbacks.state
        summary = {
            "train_runtime": seconds,
            "train_steps_per_second": result.global_step / seconds,
            "train_loss": result.training_loss,
        }
        place = {"epoch": state.epoch, "step": result.global_step}
        state.log_history.append(summary | place)
        self.result = dataclasses.replace(result, metrics=result.metrics | summary)
        self._loaded = None
        if self._given is not None:
            folder = Folder.at(result.model_directory).fetch().path
            self._loaded = with_trained_weights(self._given, folder)

    @property
    def state(self) -> TrainerState:
        """The history and the step, as transformers has them."""
        return self._callbacks.state

    @property
    def control(self) -> Any:
        """What callbacks have asked for."""
        return self._callbacks.control

    @property
    def model(self) -> Any:
        """The model: the one that was given, with the trained weights once there are some.

        One that was named is loaded on first use.
        """
        if self._loaded is None:
            source = self._inputs.model
            if self.result is not None:
                source = dataclasses.replace(source, model=Folder.at(self.result.model_directory))
            self._loaded = self._given if self.result is None else None
            if self._loaded is None:
                self._loaded = load_model(source, "auto")
                if self._peft_config is not None and self.result is None:
                    self._loaded = with_adapters(self._loaded, self._peft_config)
            self._loaded.add_model_tags(_TAGS)
        return self._loaded

    @property
    def processing_class(self) -> Any:
        """The tokenizer: the one that was given, or the model's, which is loaded on first use."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self._inputs.model)
        return self._tokenizer

    tokenizer = processing_class

    def _model_type(self, config: ORPOConfig) -> str | None:
        found = getattr(self._given, "config", None)
        if found is None and (name := config.model.model_name_or_path) is not None:
            found = load_model_config(ModelSource.from_config(config.model, name))
        return getattr(found, "model_type", None)

    def _with_callback(self, config: ORPOConfig, callback: Any) -> ORPOConfig:
        """Add a callback; early stopping is a setting, which workers follow at once."""
        if isinstance(callback, EarlyStoppingCallback) and not callback.early_stopping_threshold:
            return config.replace(early_stopping_patience=callback.early_stopping_patience)
        self._callbacks.add(callback)
        return config

    def add_callback(self, callback: Any) -> None:
        """Add a callback of transformers, an instance or a class."""
        self.args = self._with_callback(self.args, callback)

    def pop_callback(self, callback: Any) -> Any:
        """Remove a callback, by itself or by its class; returns it, or None."""
        return self._callbacks.pop(callback)

    def remove_callback(self, callback: Any) -> None:
        """Remove a callback, by itself or by its class."""
        self._callbacks.pop(callback)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Metrics on evaluation data: of the trained model, before `train()` of the base.

        The run directory then has what `orpo_ray.evaluate` writes.

        Args:
            eval_dataset: as in the constructor; unset: the one given there.
            ignore_keys: without effect, as no logits are kept.
            metric_key_prefix: begins the metrics' names in place of `eval`.

        Raises:
            DataError: without evaluation data.
        """
        _, metrics = self._evaluate(eval_dataset, metric_key_prefix)
        place = {"epoch": self.state.epoch or 0.0, "step": self.state.global_step}
        add_entry(self.state, metrics | place, self.args)
        self._callbacks.call("on_log", self.args, logs=dict(metrics))
        self._callbacks.call("on_evaluate", self.args, metrics=dict(metrics))
        return metrics

    def predict(
        self, test_dataset: Any, ignore_keys: Any = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """Score pairs: the mean log-probability of a token of chosen and of rejected, a row a pair.

        Args:
            test_dataset: as `eval_dataset`.
            ignore_keys: without effect.
            metric_key_prefix: begins the metrics' names.
        """
        result, metrics = self._evaluate(test_dataset, metric_key_prefix)
        scores = np.concatenate([pair_scores(self._table(name, result)) for name in result.sets])
        return PredictionOutput(scores, np.zeros(len(scores), np.int64), metrics)

    def _evaluate(self, dataset: Any, prefix: str) -> tuple[EvaluationResult, dict[str, float]]:
        inputs: RunInputs = self._inputs
        if dataset is not None:
            kept = KeptInputs(self._run_directory / "inputs")
            inputs = dataclasses.replace(inputs, eval_files=kept.eval_files(dataset))
        if self.result is not None:
            model = Folder.at(self.result.model_directory)
            trained = dataclasses.replace(inputs.model, model=model)
            inputs = dataclasses.replace(inputs, model=trained)
        result = evaluate(self.args, inputs)
        metrics = dict(result.metrics)
        if self._scorer is not None:
            metrics |= self._scorer(
                {_prefix(name): self._table(name, result) for name in result.sets}
            )
        named = {prefix + name.removeprefix("eval"): value for name, value in metrics.items()}
        return result, named

    @property
    def _scorer(self) -> Callable[[Mapping[str, pa.Table]], dict[str, float]] | None:
        if self.compute_metrics is None:
            return None
        return partial(computed_metrics, self.compute_metrics)

    def _table(self, name: str, result: EvaluationResult) -> pa.Table:
        return pq.read_table(self._run_directory.path / Path(result.sets[name].scores).name)

    def is_world_process_zero(self) -> bool:
        """Whether this is the process that writes: the driver always is."""
        return True

    is_local_process_zero = is_world_process_zero

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(way_of(name))


def _prefix(name: str) -> str:
    """The prefix of an evaluation set's metrics."""
    return "eval_" if name == "eval" else f"eval_{name}_"


def _as_arguments(args: Any) -> ORPOConfig:
    """The config as users of TRL read it back."""
    if args is None or isinstance(args, ORPOConfig):
        return args or ORPOConfig()
    return ORPOConfig(**args.model_dump())
