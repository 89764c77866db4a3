"""Where a run's base model comes from; as light to import as the driver needs it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelSource:
    """Where base model and tokenizer come from: folders or hub ids.

    Args:
        model: of the base model.
        tokenizer: of its tokenizer, usually the same.
        revision: branch, tag or commit of a hub model.
        chat_template: the text of one, instead of the tokenizer's.
    """

    model: str
    tokenizer: str
    revision: str | None = None
    chat_template: str | None = None
