"""Samples of a model during training: its answers to a few prompts; in training workers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from transformers import GenerationConfig

from orpo_ray.models.orpo_model import OrpoModel
from orpo_ray.models.whole_root import whole_root
from orpo_ray.preference.groups import PromptGroup
from orpo_ray.preference.rendering import apply_template
from orpo_ray.preference.templates import dated_template
from orpo_ray.pretrained import load_tokenizer
from orpo_ray.runs.files import RunFiles
from orpo_ray.training.job import TrainingJob

_N_CANDIDATES = 256  # groups that held-out prompts are taken from


@dataclass(frozen=True)
class SamplePrompt:
    """A prompt that is answered at every evaluation.

    Args:
        ids: its tokens.
        text: the prompt as decoded by the tokenizer.
        chosen: its chosen answer; None for a prompt from the config.
    """

    ids: tuple[int, ...]
    text: str
    chosen: str | None = None


@dataclass(frozen=True)
class Sampler:
    """Generates greedy answers to the same prompts at every evaluation.

    Every rank answers all prompts as one batch, in up to `max_new_tokens` forward passes; under
    FSDP every layer is all-gathered in each of them.

    Args:
        prompts: the prompts to answer.
        tokenizer: of the model.
        max_new_tokens: maximum number of new tokens per answer.
    """

    prompts: tuple[SamplePrompt, ...]
    tokenizer: Any
    max_new_tokens: int

    @staticmethod
    def from_job(job: TrainingJob, model: OrpoModel, files: RunFiles) -> "Sampler | None":
        """The sampler of a run, or None if there are no prompts.

        Prompts that with `max_new_tokens` exceed the model's positions are left out.
        """
        wanted, n_new = job.config.train.sample_prompts, job.config.train.max_new_tokens
        if not wanted or (isinstance(wanted, int) and not job.evals):
            return None
        tokenizer = load_tokenizer(job.model)
        text_config = model.causal_lm.config.get_text_config()
        n_positions = getattr(text_config, "max_position_embeddings", None) or 1 << 30
        if isinstance(wanted, int):
            groups = next(iter(job.evals.values())).first_groups(_N_CANDIDATES)
            prompts = _held_out(groups, tokenizer)
        else:
            date = job.config.data.template_date
            prompts = [_own(text, tokenizer, date) for text in wanted]
        fitting = [prompt for prompt in prompts if len(prompt.ids) + n_new <= n_positions]
        if isinstance(wanted, int):
            fitting = fitting[:wanted]
        elif len(fitting) < len(prompts):
            files.notice(
                f"sample_prompts: {len(prompts) - len(fitting)} of {len(prompts)} leave no room "
                f"for max_new_tokens={n_new} in {n_positions} positions"
            )
        return Sampler(tuple(fitting), tokenizer, n_new) if fitting else None

    @torch.no_grad()
    def answer(self, model: OrpoModel, device: torch.device) -> list[str]:
        """Answer every prompt; a collective.

        Args:
            model: sharded; left in training mode.
            device: of this rank.
        """
        eos = self.tokenizer.eos_token_id
        longest = max(len(prompt.ids) for prompt in self.prompts)
        ids = torch.full((len(self.prompts), longest), eos)
        mask = torch.zeros_like(ids)
        for index, prompt in enumerate(self.prompts):
            ids[index, longest - len(prompt.ids) :] = torch.tensor(prompt.ids)
            mask[index, longest - len(prompt.ids) :] = 1
        # Models cannot compute a router loss for one cached token and the mask of all tokens.
        options = {"output_router_logits": False} if model.has_router else {}
        with whole_root(model, device):
            output: Any = model.causal_lm.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                generation_config=self._settings(model),
                synced_gpus=dist.get_world_size() > 1,
                **options,
            )
        answers = output[:, longest:].tolist()
        texts: list[str] = self.tokenizer.batch_decode(answers, skip_special_tokens=True)
        return texts

    def _settings(self, model: OrpoModel) -> GenerationConfig:
        """Greedy decoding up to the EOS token of the tokenizer or one of the model's."""
        eos = self.tokenizer.eos_token_id
        own = model.causal_lm.generation_config.eos_token_id
        ends = own if isinstance(own, list) else [own] * (own is not None)
        return GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            use_cache=True,
            pad_token_id=eos,
            eos_token_id=sorted({eos, *ends}),
        )


def _held_out(groups: Sequence[PromptGroup], tokenizer: Any) -> list[SamplePrompt]:
    """Each distinct prompt of some groups, with the chosen answer of its first pair."""
    found = {}
    for group in groups:
        ids = tuple(group.prompt.tolist())
        if ids and ids not in found:
            chosen = group.completions[group.pairs[0][0]]
            answer = tokenizer.decode(chosen, skip_special_tokens=True)
            found[ids] = SamplePrompt(ids, tokenizer.decode(ids), answer)
    return list(found.values())


def _own(text: str, tokenizer: Any, date: str) -> SamplePrompt:
    """A prompt from the config: one user turn if the tokenizer has a chat template, else text."""
    if tokenizer.chat_template:
        turn = [{"role": "user", "content": text}]
        text = apply_template(
            tokenizer,
            turn,
            chat_template=dated_template(tokenizer, date),
            add_generation_prompt=True,
        )
    ids = tokenizer.encode(text, add_special_tokens=False)
    bos = tokenizer.bos_token_id
    if bos is not None and ids[:1] != [bos] and not tokenizer.chat_template:
        ids = [bos, *ids]
    return SamplePrompt(tuple(ids), tokenizer.decode(ids))
