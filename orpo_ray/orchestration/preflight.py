"""Comparing a base model with the data before workers start; on the driver."""

import logging
import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING

from orpo_ray.config.schema import ConfigError, ORPOConfig
from orpo_ray.dataset.ingest import pairs_longer_than
from orpo_ray.dataset.request import TRAIN
from orpo_ray.dataset.shards import TokenSet
from orpo_ray.pretrained import ModelSource, UnsupportedModelError, load_tokenizer
from orpo_ray.storage.files import first_line, some_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Schedules that need no argument.
_WITHOUT_ARGUMENTS = ("linear", "cosine", "constant", "constant_with_warmup")
_log = logging.getLogger(__name__)


def check_model(
    config: ORPOConfig,
    source: ModelSource,
    token_sets: Mapping[str, TokenSet],
    setting: str = "model_name_or_path",
) -> None:
    """Refuse a model that cannot be trained or evaluated on some token sets; reads no weights.

    What is no fault for sure is logged: weights that the model does not use, and pairs longer than
    the positions that it was trained for.

    Args:
        config: settled by the cluster.
        source: of the model.
        token_sets: of its tokenizer, by the name of the data set in the feed.
        setting: that names the model.

    Raises:
        ConfigError: with every finding that does not hide another.
    """
    from orpo_ray.models.adapters import add_adapters, base_of
    from orpo_ray.models.outline import outline, unused_weights
    from orpo_ray.models.packing_check import refuse_unknown
    from orpo_ray.models.quantized import refuse_unreadable

    try:
        base, _ = base_of(source)
        model = outline(base)
        refuse_unreadable(base.model, model.config, bool(config.ray.use_gpu))
        unused = unused_weights(base, model)
        refuse_unknown(model)
    except (OSError, ValueError, KeyError) as error:  # also what transformers says of a config
        text = first_line(error).removeprefix(f"{setting}: ")
        raise ConfigError([f"{setting}: {text}"]) from error
    if unused:
        _log.warning(
            "%s: %s has weights that the model does not have and that are not used: %s",
            *(setting, base.model, some_of(unused)),
        )
    problems = _tokens_without_embedding(model, source, token_sets, setting)
    problems += _beyond_positions(model, token_sets, setting)
    if TRAIN in token_sets and config.model.lora_r:
        try:
            with warnings.catch_warnings(action="ignore"):  # of peft, for whoever uses it directly
                add_adapters(model, config.model, config.train.seed)
        except UnsupportedModelError as error:
            problems += str(error).splitlines()
    if problems:
        raise ConfigError(problems)


def check_schedule(config: ORPOConfig) -> None:
    """Refuse arguments that the learning-rate schedule does not take, or lacks.

    Raises:
        ConfigError: with what transformers says of them.
    """
    if (
        config.train.lr_scheduler_type in _WITHOUT_ARGUMENTS
        and not config.train.lr_scheduler_kwargs
    ):
        return
    import torch

    from orpo_ray.training.optimizer import build_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    try:
        build_scheduler(optimizer, config.train, n_steps=10)
    except (TypeError, ValueError) as error:
        raise ConfigError([f"train.lr_scheduler_kwargs: {first_line(error)}"]) from error


def check_optimizer(config: ORPOConfig) -> None:
    """Refuse an optimizer whose package is not installed.

    Raises:
        ConfigError: with the extra that has it.
    """
    if config.train.optim == "adamw_8bit" and find_spec("torchao") is None:
        raise ConfigError(
            [
                "train.optim: adamw_8bit needs the package torchao: "
                "pip install 'orpo_ray[adamw-8bit]'"
            ]
        )


def _tokens_without_embedding(
    model: "PreTrainedModel",
    source: ModelSource,
    token_sets: Mapping[str, TokenSet],
    setting: str,
) -> list[str]:
    """Name the largest token id if the model has no embedding of it.

    A model may have more embeddings than its tokenizer has tokens: they are often padded.
    """
    n_rows = model.get_input_embeddings().weight.shape[0]
    found = [t.report["largest_token"] for t in token_sets.values() if t.report["largest_token"]]
    largest = max(found, key=lambda token: int(token["id"]), default={"id": 0})
    token_id = largest["id"]
    if token_id < n_rows:
        return []
    tokenizer = load_tokenizer(source)
    where = f"in {largest['file']}:{largest['row']}"
    if token_id == tokenizer.eos_token_id:
        where = "which is trained as the end of every answer"
    elif token_id == tokenizer.bos_token_id:
        where = "which is put before every prompt"
    return [
        f"{setting}: {source.tokenizer}: the token {tokenizer.convert_ids_to_tokens(token_id)!r} "
        f"(id {token_id}), {where}, has no embedding: the model has {n_rows} (vocab_size), its "
        f"tokenizer {len(tokenizer)} tokens; give the tokenizer that the model was trained with, "
        "or enlarge the model with resize_token_embeddings()"
    ]


def _beyond_positions(
    model: "PreTrainedModel", token_sets: Mapping[str, TokenSet], setting: str
) -> list[str]:
    """Count the pairs that are longer than the model's positions: refused, or logged with RoPE."""
    from orpo_ray.models.outline import positions

    limit = positions(model)
    if limit is None:
        return []
    problems = []
    for name, tokens in token_sets.items():
        n_longer, longest = pairs_longer_than(tokens, limit.n)
        if not n_longer:
            continue
        text = (
            f"{setting}: {n_longer} of {tokens.n_pairs} pairs of the {name.rstrip('_')} data are "
            f"longer than the model's {limit.n} positions (max_position_embeddings), the longest "
            f"has {longest} tokens"
        )
        if limit.is_table:
            problems.append(f"{text}: set max_length={limit.n} or less")
        else:
            _log.warning("%s: max_length=%d truncates them", text, limit.n)
    return problems
