"""Pushing an exported model to the hub, with its card; on the driver."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard

from orpo_ray.runs.files import RECORD


def describe(
    folder: Path, name: str | None, dataset: str | Sequence[str] | None, tags: Any
) -> None:
    """Add to the card of an exported model.

    Args:
        folder: with the card that the run has written.
        name: of the model.
        dataset: hub ids of the data.
        tags: one or several, which are added to the card's own.
    """
    path = folder / "README.md"
    card = ModelCard.load(path)
    if name is not None:
        card.data.model_name = name
    if dataset is not None:
        card.data.datasets = [dataset] if isinstance(dataset, str) else list(dataset)
    more = [tags] if isinstance(tags, str) else list(tags or ())
    card.data.tags = list(dict.fromkeys([*(card.data.tags or ()), *more]))
    card.save(path)


def push(
    folder: Path,
    repo_id: str,
    *,
    message: str,
    private: bool | None,
    token: str | None,
    revision: str | None,
    blocking: bool,
) -> Any:
    """Create the repository if it is missing, and commit the model; as `upload_folder` returns.

    Args:
        folder: of the exported model.
        repo_id: `owner/name`, or a name of the token's owner.
        message: of the commit.
        private: of a repository that is created.
        token: unset: that of the environment.
        revision: branch, which is created if it is missing.
        blocking: wait until it is there.
    """
    hub: Any = HfApi(token=token)
    repo_id = str(hub.create_repo(repo_id, private=private, exist_ok=True).repo_id)
    if revision is not None:
        hub.create_branch(repo_id, branch=revision, exist_ok=True)
    return hub.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        commit_message=message,
        revision=revision,
        ignore_patterns=[RECORD],
        run_as_future=not blocking,
    )
