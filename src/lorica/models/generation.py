"""Greedy answers to many prompts at once: one key-value cache, from which a row is dropped when its answer has ended."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch

from lorica.data.collate import pad


def stop_tokens(model: Any) -> set[int]:
    """Token ids that end an answer, by the model's and its generation configuration."""
    found: set[int] = set()
    for config in (model.config, getattr(model, "generation_config", None)):
        eos = getattr(config, "eos_token_id", None)
        found |= set(eos if isinstance(eos, list) else [eos] if eos is not None else [])
    return found


@torch.no_grad()
def greedy(model: Any, prompts: Sequence[Sequence[int]], pad_id: int, stops: Collection[int], max_new_tokens: int) -> list[list[int]]:
    """The most likely continuation of each prompt, token by token, up to and without a stop token.

    Args:
        model: transformers' causal model. prompts: token ids; they are padded on the left into one batch.
    """
    from transformers import DynamicCache

    device = model.get_output_embeddings().weight.device  # input embeddings may be in host memory
    ids, mask = (x.to(device) for x in pad(prompts, pad_id, left=True))
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    answers: list[list[int]] = [[] for _ in prompts]
    alive = list(range(len(prompts)))
    for _ in range(max_new_tokens):
        out = model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1)
        chosen = out.logits[:, -1].argmax(-1)
        tokens = chosen.tolist()
        going = [i for i, token in enumerate(tokens) if token not in stops and token != pad_id]
        for i in going:
            answers[alive[i]].append(tokens[i])
        if not going:
            break
        positions = positions[:, -1:] + 1
        if len(going) < len(alive):
            kept = torch.tensor(going, device=device)
            cache.batch_select_indices(kept)
            chosen, mask, positions, alive = chosen[kept], mask[kept], positions[kept], [alive[i] for i in going]
        ids = chosen[:, None]
        mask = torch.cat([mask, mask.new_ones(len(alive), 1)], 1)
    return answers
