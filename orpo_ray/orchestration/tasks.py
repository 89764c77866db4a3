"""Running one function over many small descriptions with Ray Data; on the driver."""

import json
from typing import Any


def map_tasks(items: list[dict[str, Any]], work: Any, **how: Any) -> list[dict[str, Any]]:
    """Apply `work` to every item in a Ray Data task of its own; items and answers are JSON.

    An error of `work` is raised here as it was raised there.

    Args:
        items: small descriptions.
        work: takes `{"item": JSON}` and gives a list of such; a class is made once an actor.
        how: options of Ray Data's `flat_map`.
    """
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.raise_original_map_exception = True
    rows = [{"item": json.dumps(item)} for item in items]
    dataset = ray.data.from_items(rows, override_num_blocks=max(1, len(rows)))
    answers = dataset.flat_map(work, **how).take_all()
    return [json.loads(answer["item"]) for answer in answers]
