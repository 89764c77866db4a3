"""What lies in `final/` at the end: the last model or the best one; in training workers."""

from pathlib import Path

import torch.distributed as dist

from orpo_ray.runs.files import FINAL, RunFiles, exported_step
from orpo_ray.runs.manifest import checkpoint_directory, find_damage
from orpo_ray.storage.mirror import fetch_folder
from orpo_ray.training.best import Evaluations
from orpo_ray.training.checkpoint import load_weights
from orpo_ray.training.export import export_model
from orpo_ray.training.job import TrainingJob
from orpo_ray.training.model import OrpoModel


def write_final(
    job: TrainingJob, model: OrpoModel, evaluations: Evaluations, files: RunFiles, step: int
) -> None:
    """Export the last model, or that of the best evaluation, unless an earlier attempt did.

    Args:
        job: of this rank; every rank has to call this.
        model: as it is after the last step; afterwards it is the exported one.
        evaluations: of the run.
        files: of the run directory.
        step: the last one.
    """
    choice = [_choose(evaluations, files, step) if files.is_writer else None]
    dist.broadcast_object_list(choice)
    exported = choice[0]
    if exported is None:
        return
    if exported != step:
        load_weights(job.run_directory, exported, model)
    final = str(Path(job.run_directory, FINAL))
    export_model(final, model, job.model, job.config.model, exported)
    if evaluations.keep_best:
        files.notice(evaluations.export_text(exported))


def _choose(evaluations: Evaluations, files: RunFiles, step: int) -> int | None:
    """The step whose model is to be exported, or None where it lies there already; on rank 0.

    Where the best one's checkpoint is lost, it is the best of those that are there.
    """
    ranking = evaluations.ranking if evaluations.keep_best else ()
    done = exported_step(files.directory / FINAL)
    lost: str | None = None
    for candidate in (*ranking, step):
        damage = None
        if candidate not in (step, done):
            directory = fetch_folder(checkpoint_directory(files.directory, candidate))
            damage = find_damage(directory)
        if damage is None:
            break
        lost = lost or f"the checkpoint of the best evaluation, step {candidate}, is lost: {damage}"
    if candidate == done:
        return None
    if lost:
        files.event(lost, best_checkpoints_lost=1)
    return candidate
