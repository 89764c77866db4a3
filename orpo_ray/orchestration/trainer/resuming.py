"""Which run `resume_from_checkpoint` goes on with; on the driver."""

from pathlib import Path

from orpo_ray.config.schema import ConfigError, ORPOConfig
from orpo_ray.orchestration.start import run_directory_of
from orpo_ray.runs.manifest import FOLDER, MANIFEST, checkpoint_directories
from orpo_ray.runs.resume import newest_manifest
from orpo_ray.storage.folder import Folder

_NAME = "resume_from_checkpoint"


def run_to_resume(args: ORPOConfig, given: bool | str | Path, has_own_name: bool) -> Folder:
    """The run directory that training goes on in.

    Args:
        args: of the trainer.
        given: True, or the path of a run or of its newest checkpoint.
        has_own_name: whether the user named the run.

    Raises:
        ConfigError: when there is none with a checkpoint.
    """
    if given is not True:
        return _run_of(Path(str(given)))
    named = run_directory_of(args)
    if has_own_name:
        if newest_manifest(named.fetch().path) is None:
            raise ConfigError([f"{_NAME}: {named} has no checkpoint"])
        return named
    parent = Folder.at(args.output.output_dir)
    if parent.url is not None:
        raise ConfigError([f"{_NAME}: name the run in {parent} with run_name"])
    runs = {_committed_at(run): run for run in parent.path.glob("*") if run.is_dir()}
    newest = max(runs) if runs else 0.0
    if not newest:
        raise ConfigError([f"{_NAME}: no run in {parent} has a checkpoint"])
    return Folder.at(runs[newest])


def _committed_at(run: Path) -> float:
    """When the newest checkpoint of a run was committed; 0 without one."""
    manifests = [path / MANIFEST for path in checkpoint_directories(run)]
    return max((path.stat().st_mtime for path in manifests if path.exists()), default=0.0)


def _run_of(path: Path) -> Folder:
    """The run that a path is of.

    Raises:
        ConfigError: for a path that is of none, and for a checkpoint that is not its newest.
    """
    is_checkpoint = path.parent.name == FOLDER
    run = path.parent.parent if is_checkpoint else path
    manifest = newest_manifest(run)
    if manifest is None:
        raise ConfigError([f"{_NAME}: {path}: no checkpoint of a run"])
    newest = f"step-{manifest['step']:08d}"
    if is_checkpoint and path.name != newest:
        raise ConfigError([f"{_NAME}: {path}: runs resume from their newest, which is {newest}"])
    return Folder.at(run.absolute())
