"""What a trainer writes besides its run: copies of the model, results, cards; on the driver."""

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerState

from orpo_ray.orchestration.trainer.hub import describe, push
from orpo_ray.orchestration.trainer.refusals import Driver
from orpo_ray.runs.files import FINAL
from orpo_ray.storage.folder import Folder
from orpo_ray.trl.arguments import ORPOConfig


class Saving:
    """The part of `ORPOTrainer` that writes; `args` and the run directory are the trainer's."""

    accelerator = Driver()
    args: ORPOConfig
    _run_directory: Folder

    @property
    def state(self) -> TrainerState:
        """The history and the step, as transformers has them."""
        raise NotImplementedError

    def save_model(self, output_dir: str | Path | None = None, _internal_call: bool = False) -> str:
        """Copy the trained model, ready for `from_pretrained`; returns where it lies.

        Args:
            output_dir: made if missing; unset: it stays where it is, in the run directory.

        Raises:
            FileNotFoundError: before `train()` has ended.
        """
        final = self._final()
        if output_dir is None:
            return final.address
        shutil.copytree(final.fetch(), output_dir, dirs_exist_ok=True)
        return str(output_dir)

    def _final(self) -> Folder:
        final = self._run_directory / FINAL
        if not final.path.is_dir():
            raise FileNotFoundError(f"{final}: no trained model yet; call train() first")
        return final

    @property
    def hub_model_id(self) -> str:
        """Where `push_to_hub` pushes to; by default the name of the output directory."""
        args = self.args
        name = args.hub_model_id or args.push_to_hub_model_id
        return str(name or Path(args.output.output_dir).absolute().name)

    def log_metrics(self, split: str, metrics: Mapping[str, Any]) -> None:
        """Print metrics as a table, as transformers does."""
        width = max(map(len, metrics), default=0)
        print(f"***** {split} metrics *****")
        for name in sorted(metrics):
            value = metrics[name]
            shown = f"{value:.4f}" if isinstance(value, float) else value
            print(f"  {name:<{width}} = {shown:>10}")

    def save_metrics(self, split: str, metrics: Mapping[str, Any], combined: bool = True) -> None:
        """Write metrics as `<output_dir>/<split>_results.json`, and into `all_results.json`."""
        folder = Folder.at(self.args.output.output_dir).make()
        folder.write_json(f"{split}_results.json", dict(metrics), indent=4)
        if combined:
            known = folder.read_json("all_results.json")
            folder.write_json("all_results.json", known | dict(metrics), indent=4)

    def save_state(self) -> None:
        """Write the state as `<output_dir>/trainer_state.json`."""
        folder = Folder.at(self.args.output.output_dir).make()
        text = json.dumps(dataclasses.asdict(self.state), default=str, indent=2)
        folder.write_text("trainer_state.json", text)

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | Sequence[str] | None = None,
        tags: str | Sequence[str] | None = None,
    ) -> None:
        """Add a name, data sets of the hub and tags to the card that the run has written."""
        describe(self._final().fetch().path, model_name, dataset_name, tags)

    def push_to_hub(
        self,
        commit_message: str = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        **card: Any,
    ) -> Any:
        """Push the trained model with its card; `hub_model_id` and its like of `args` say where.

        Args:
            commit_message: of the commit.
            blocking: wait until it is there.
            token: unset: `HF_TOKEN` of the environment.
            revision: branch; unset: `hub_revision` of `args`.
            card: see `create_model_card`.
        """
        self.create_model_card(**card)
        args = self.args
        return push(
            self._final().fetch().path,
            self.hub_model_id,
            message=commit_message,
            private=args.hub_private_repo,
            token=token,
            revision=revision or args.hub_revision,
            blocking=blocking,
        )
