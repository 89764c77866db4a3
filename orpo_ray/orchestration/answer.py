"""What rank 0 of the workers returns; on the driver, in workers and in Ray Train's controller.

Alone in its module: the controller, which hands it on, imports no more for it. With what workers
import that was seconds, after the last step.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class WorkerAnswer:
    """How the workers ended, by rank 0; or why another attempt would end the same way.

    Args:
        metrics: of an evaluation.
        notices: lines that an evaluation has for the user.
        refusal: a message for whoever wrote the config.
        failure: a message about the training itself.
        stopped: where it stopped, when it was asked to.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    notices: tuple[str, ...] = ()
    refusal: str | None = None
    failure: str | None = None
    stopped: str | None = None
