"""The export of the last or the best model to `final/`; in workers."""

import torch.distributed as dist

from orpo_ray.models.export import export_model
from orpo_ray.models.orpo_model import OrpoModel
from orpo_ray.runs.files import FINAL, RunFiles, exported_step
from orpo_ray.runs.manifest import checkpoint, find_damage
from orpo_ray.training.checkpoint.evaluations import Evaluations
from orpo_ray.training.checkpoint.saver import load_weights
from orpo_ray.training.job import TrainingJob


def write_final(
    job: TrainingJob, model: OrpoModel, evaluations: Evaluations, files: RunFiles, step: int
) -> None:
    """Export the last or the best model to `final/` unless it is there already; a collective.

    Args:
        job: of this rank.
        model: after the last step; its weights are replaced by the exported ones.
        evaluations: of the run.
        files: of the run directory.
        step: the last step.
    """
    choice = [_choose(evaluations, files, step) if files.is_writer else None]
    dist.broadcast_object_list(choice)
    exported = choice[0]
    if exported is None:
        return
    if exported != step:
        load_weights(files.folder, exported, model)
    export_model(files.folder / FINAL, model, job.model, job.config.model, exported)
    if evaluations.keep_best:
        files.notice(evaluations.export_text(exported))


def _choose(evaluations: Evaluations, files: RunFiles, step: int) -> int | None:
    """The step to export, or None if it is in `final/` already; on rank 0.

    If the best evaluation's checkpoint is lost, the best of the remaining ones is exported.
    """
    ranking = evaluations.ranking if evaluations.keep_best else ()
    done = exported_step(files.directory / FINAL)
    lost: str | None = None
    for candidate in (*ranking, step):
        damage = None
        if candidate not in (step, done):
            damage = find_damage(checkpoint(files.folder, candidate).fetch())
        if damage is None:
            break
        lost = lost or f"the checkpoint of the best evaluation, step {candidate}, is lost: {damage}"
    if candidate == done:
        return None
    if lost:
        files.event(lost, best_checkpoints_lost=1)
    return candidate
