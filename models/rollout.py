"""Rollouts on plain transformers: the prompt is prefilled once per group, what all prompts begin with once for all,
and finished sequences leave the batch.

The same distribution as `generate` with temperature sampling over the whole vocabulary (no top-k, no top-p), without
its prefill per copy and without a sort over the vocabulary: a token is drawn by inverting the cumulative distribution
at one random number a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from models.decode_attention import Groups, group_attention
from models.kv_cache import State, common_beginning, completions_cache, read_beginning, roomy_cache
from models.shared_prompt import base_model

LEAVE = 1 / 8  # share of a batch that has to be finished before it leaves: moving the cache costs as much as a row
BLOCK = 256  # entries of the vocabulary that invert_cdf first sums up


def sample(
    model: Any,
    prompts: Sequence[list[int]],
    *,
    group_size: int = 1,
    max_new_tokens: int,
    temperature: float = 1.0,
    eos_ids: Sequence[int],
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    batch_size: int = 64,
    progress: Callable[[int, int], None] | None = None,
    logps: list[list[list[float]]] | None = None,
) -> list[list[list[int]]]:
    """Sample `group_size` completions of every prompt: [prompt][g] -> token ids, the end token kept if reached.

    Temperature 0 is greedy. `batch_size` counts sequences (prompts x group_size) decoded at once. Prompts of like
    length share a batch, and what all of them begin with is read once (common_beginning). With one generator a sampled
    completion depends on its batch's noise (its distribution does not); with one for each completion, in the order
    prompt, g, it does not depend on what else is decoded. A list given as `logps` is filled with the log-probability of
    every token as it was sampled, [prompt][g] (needs a temperature).
    """
    begun = common_beginning(model, prompts)
    beginning = read_beginning(model, prompts[0][:begun]) if begun else []
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    per_batch = max(1, batch_size // group_size)
    completions: list[list[list[int]]] = [[] for _ in prompts]
    if logps is not None:
        logps[:] = [[] for _ in prompts]
    done = 0
    for start in range(0, len(order), per_batch):
        indices = order[start : start + per_batch]
        noise = generator
        if isinstance(generator, Sequence):
            noise = [generator[i * group_size + g] for i in indices for g in range(group_size)]
        sampled: list[list[float]] | None = None if logps is None else []
        rest = [prompts[i][begun:] for i in indices]
        with group_attention(base_model(model), begun + max(map(len, rest)) + max_new_tokens) as groups:
            rows = _decode(
                model,
                rest,
                beginning,
                groups,
                group_size,
                max_new_tokens,
                temperature,
                set(eos_ids),
                noise,
                sampled,
            )
        for j, i in enumerate(indices):
            completions[i] = rows[j * group_size : (j + 1) * group_size]
            if logps is not None and sampled is not None:
                logps[i] = sampled[j * group_size : (j + 1) * group_size]
        done += len(indices)
        if progress is not None:
            progress(done, len(order))
    return completions


@torch.inference_mode()
def _decode(
    model: Any,
    prompts: list[list[int]],  # what comes after the beginning
    beginning: Sequence[State],
    groups: Groups | None,
    group_size: int,
    max_new_tokens: int,
    temperature: float,
    eos_ids: set[int],
    generator: torch.Generator | Sequence[torch.Generator] | None,
    logps: list[list[float]] | None,
) -> list[list[int]]:
    device = next(model.parameters()).device
    width, begun = max(map(len, prompts)), beginning[0][0].shape[2] if beginning else 0
    ids_PT = torch.zeros(len(prompts), width, dtype=torch.long, device=device)
    mask_PT = torch.zeros(len(prompts), width, dtype=torch.long, device=device)
    for row, prompt in enumerate(prompts):  # left padding: every prompt ends in the last column
        ids_PT[row, width - len(prompt) :] = torch.tensor(prompt, device=device)
        mask_PT[row, width - len(prompt) :] = 1
    mask_PT = torch.cat([mask_PT.new_ones(len(prompts), begun), mask_PT], 1)
    positions_PT = (mask_PT.cumsum(1) - 1).clamp(min=0)
    out = model(
        input_ids=ids_PT,
        attention_mask=mask_PT,
        position_ids=positions_PT[:, begun:],
        past_key_values=roomy_cache(max_new_tokens, beginning, len(prompts)),
        use_cache=True,
        logits_to_keep=1,
        **({} if groups is None else {"groups": groups}),
    )
    cache = out.past_key_values
    if groups is not None and len(groups.states) == len(cache.layers):
        groups.begin(mask_PT, group_size)
        cache = completions_cache(max_new_tokens)
    else:  # a layer attends in its own way, or was not handed the groups
        groups = None
        cache.batch_repeat_interleave(group_size)
    logits_BV = out.logits[:, -1].repeat_interleave(group_size, 0)
    mask_BT = mask_PT.repeat_interleave(group_size, 0)
    position_B = positions_PT[:, -1].repeat_interleave(group_size, 0)

    rows: list[list[int]] = [[] for _ in range(len(prompts) * group_size)]
    if logps is not None:
        logps[:] = [[] for _ in rows]
    here, going = list(range(len(rows))), [True] * len(rows)  # the batch's rows, and which of them are not finished
    for step in range(max_new_tokens):
        noise = [generator[row] for row in here] if isinstance(generator, Sequence) else generator
        tokens_B, logps_B = draw(logits_BV, temperature, noise)
        for i, (row, token, logp) in enumerate(zip(here, tokens_B.tolist(), logps_B.tolist(), strict=True)):
            if going[i]:
                rows[row].append(token)
                if logps is not None:
                    logps[row].append(logp)
                going[i] = token not in eos_ids
        if not any(going) or step == max_new_tokens - 1:
            break
        if going.count(False) >= len(going) * LEAVE:
            keep_B = torch.tensor([i for i, on in enumerate(going) if on], device=device)
            cache.batch_select_indices(keep_B)
            if groups is not None:
                groups.keep(keep_B)
            tokens_B, mask_BT, position_B = tokens_B[keep_B], mask_BT[keep_B], position_B[keep_B]
            here = [row for row, on in zip(here, going, strict=True) if on]
            going = [True] * len(here)
        position_B = position_B + 1
        seen: dict[str, Any] = {"groups": groups}
        if groups is None:
            mask_BT = torch.cat([mask_BT, mask_BT.new_ones(len(here), 1)], 1)
            seen = {"attention_mask": mask_BT}
        logits_BV = model(
            input_ids=tokens_B[:, None],
            position_ids=position_B[:, None],
            past_key_values=cache,
            use_cache=True,
            **seen,
        ).logits[:, -1]
    return rows


def draw(
    logits_BV: Tensor, temperature: float, generator: torch.Generator | Sequence[torch.Generator] | None = None
) -> tuple[Tensor, Tensor]:
    """One token per row from softmax(logits / temperature), and its log-probability there, (B,) each.

    The noise, one number a row, comes from one generator, or from one for each row. At temperature 0 the token is the
    most likely one, and the log-probability that at temperature 1. Raises ValueError for logits that are NaN or +inf.
    """
    scaled_BV = logits_BV.float() if temperature in (0, 1) else logits_BV.float() / temperature
    probs_BV = scaled_BV.softmax(-1)
    if probs_BV[:, 0].isnan().any():  # one such logit makes all of its row NaN
        raise ValueError(
            "the model's logits are not finite: its weights are broken or its numbers overflow; start again from whole "
            "weights, with a lower learning rate or in a wider dtype"
        )
    if temperature == 0:
        tokens_B = logits_BV.argmax(-1)
    elif isinstance(generator, Sequence):
        tokens_B = invert_cdf(probs_BV, torch.cat([_uniform(1, own) for own in generator]))
    else:
        tokens_B = invert_cdf(probs_BV, _uniform(len(probs_BV), generator, probs_BV.device))
    return tokens_B, probs_BV.gather(1, tokens_B[:, None])[:, 0].log()


def invert_cdf(probs_BV: Tensor, noise_B: Tensor) -> Tensor:
    """Per row the first index at which the cumulative sum exceeds noise x total, for noise in [0, 1): (B,).

    Sums are of 64 bits. First the block of BLOCK entries is found, then the entry in it: one long cumulative sum over
    a vocabulary takes as long as several layers of a small model.
    """
    vocabulary = probs_BV.shape[1]
    blocks_BKL = pad(probs_BV, (0, -vocabulary % BLOCK)).unflatten(1, (-1, BLOCK))
    upto_BK = blocks_BKL.sum(-1, dtype=torch.float64).cumsum(-1)
    mark_B1 = (noise_B * upto_BK[:, -1])[:, None]
    block_B1 = torch.searchsorted(upto_BK, mark_B1, right=True).clamp(max=upto_BK.shape[1] - 1)
    before_B1 = pad(upto_BK, (1, 0)).gather(1, block_B1)
    inside_BL = blocks_BKL.gather(1, block_B1[:, :, None].expand(-1, -1, BLOCK))[:, 0].cumsum(-1, dtype=torch.float64)
    # Rounding may put the mark a little beyond the block's own sum: then its last entry with a share is meant.
    total_B1 = inside_BL[:, -1:]
    within_B1 = torch.minimum(mark_B1 - before_B1, total_B1.nextafter(torch.zeros_like(total_B1)))
    return (block_B1 * BLOCK + torch.searchsorted(inside_BL, within_B1, right=True))[:, 0]


def _uniform(n: int, generator: torch.Generator | None, device: torch.device | None = None) -> Tensor:
    place = device if generator is None else generator.device
    return torch.rand(n, generator=generator, dtype=torch.float64, device=place)
