"""Where a run's base model comes from; as light to import as the driver needs it."""

from dataclasses import dataclass
from typing import Any


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


def load_tokenizer(source: ModelSource) -> Any:
    """The tokenizer with the run's chat template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source.tokenizer, revision=source.revision)
    if source.chat_template is not None:
        tokenizer.chat_template = source.chat_template
    return tokenizer
