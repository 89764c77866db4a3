"""Callbacks of transformers on the driver, called as the lines of a run arrive.

They are called in the thread that follows the run, soon after workers have written a line, and not
between two steps: workers do not wait for them.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from orpo_ray.config.schema import ORPOConfig
from orpo_ray.orchestration.trainer.history import add_entry, entries, is_evaluation
from orpo_ray.runs.files import FINISH, REQUESTS, read_metrics
from orpo_ray.runs.manifest import MANIFEST, checkpoint_directories
from orpo_ray.storage.folder import Folder

_NOT_CALLED = (
    *("on_step_begin", "on_step_end", "on_substep_end", "on_epoch_begin", "on_prediction_step"),
    *("on_pre_optimizer_step", "on_optimizer_step"),
)
_log = logging.getLogger(__name__)


class Callbacks:
    """Callbacks with the state that they see.

    Args:
        callbacks: instances or classes.
        more: what every event is called with besides, as `model`.
    """

    def __init__(self, callbacks: Sequence[Any], more: Mapping[str, Any]) -> None:
        self.state, self.control = TrainerState(), TrainerControl()
        self.state.is_world_process_zero = self.state.is_local_process_zero = True
        self._all: list[TrainerCallback] = []
        self._more = dict(more)
        for callback in callbacks:
            self.add(callback)

    def add(self, callback: Any) -> None:
        """Add a callback, or one of a class; events of it that never come are logged."""
        callback = callback() if isinstance(callback, type) else callback
        overridden = [
            name
            for name in _NOT_CALLED
            if getattr(type(callback), name, None) is not getattr(TrainerCallback, name, None)
        ]
        if overridden:
            _log.warning(
                "callback %s: %s are not called: callbacks run on the driver, where lines arrive",
                *(type(callback).__name__, ", ".join(overridden)),
            )
        self._all.append(callback)

    def pop(self, callback: Any) -> Any:
        """Remove a callback, by itself or by its class; returns it, or None."""
        for one in self._all:
            if one is callback or (isinstance(callback, type) and isinstance(one, callback)):
                self._all.remove(one)
                return one
        return None

    def call(self, event: str, args: ORPOConfig, **more: Any) -> None:
        """Call an event of all callbacks."""
        for callback in self._all:
            made = getattr(callback, event)(args, self.state, self.control, **self._more, **more)
            self.control = made if made is not None else self.control

    def begin(self, args: ORPOConfig) -> None:
        """Begin with an empty history."""
        self.state.log_history = []
        self.state.best_metric = self.state.best_global_step = None
        self.control = TrainerControl()


class RunFollower:
    """Passes on the lines of a run to callbacks; what they ask for, to the workers.

    An error of a callback ends the run after its next step; `error` is then raised.

    Args:
        callbacks: to be called.
        args: of the run.
        run: its directory.
    """

    def __init__(self, callbacks: Callbacks, args: ORPOConfig, run: Folder) -> None:
        self._callbacks, self._args, self._run = callbacks, args, run
        # An earlier attempt's lines are history, of which nothing is called again.
        self._earlier = {(line["step"], line["time"]) for line in read_metrics(run.path)}
        self._saved = self._committed()
        self._epoch = 0
        self._requests = {"saves": 0, "evaluations": 0}
        self.error: BaseException | None = None

    def begin(self, n_steps: int, steps_per_epoch: int) -> None:
        """Called once the number of steps is known, before workers start."""
        state = self._callbacks.state
        state.max_steps = n_steps
        state.num_train_epochs = -(-n_steps // steps_per_epoch)
        self._call("on_train_begin")

    def log(self, line: Mapping[str, Any]) -> None:
        """Called with every line of the run, also of an earlier attempt."""
        is_new = (line["step"], line["time"]) not in self._earlier
        for entry in entries(line):
            add_entry(self._callbacks.state, entry, self._args)
            if not is_new:
                continue
            logs = {name: value for name, value in entry.items() if name != "step"}
            self._call("on_log", logs=logs)
            if is_evaluation(entry):
                self._call("on_evaluate", metrics=logs)
        if is_new and int(line["epoch"]) > self._epoch:
            self._call("on_epoch_end")
        self._epoch = int(line["epoch"])
        self.look_for_checkpoints()

    def look_for_checkpoints(self) -> None:
        """Call `on_save` for every checkpoint that was committed since the last call."""
        for _ in sorted(self._committed() - self._saved):
            self._call("on_save")
        self._saved |= self._committed()

    def _committed(self) -> set[str]:
        made = checkpoint_directories(self._run.path)
        return {path.name for path in made if (path / MANIFEST).exists()}

    def _call(self, event: str, **more: Any) -> None:
        if self.error is not None:
            return
        try:
            self._callbacks.call(event, self._args, **more)
        except BaseException as error:  # raised by ORPOTrainer.train
            self.error = error
        control = self._callbacks.control
        if control.should_save or control.should_evaluate:
            self._requests["saves"] += control.should_save
            self._requests["evaluations"] += control.should_evaluate
            control.should_save = control.should_evaluate = False
            self._run.write_json(REQUESTS, self._requests)
        if self.error is not None or control.should_training_stop:
            (self._run.path / FINISH).touch()
