"""Rollouts on plain transformers: the prompt is prefilled once per group, finished sequences leave the batch.

The same distribution as `generate` with temperature sampling over the whole vocabulary (no top-k, no top-p), without
its prefill per copy and without a sort or a softmax over the vocabulary: sampling adds Gumbel noise to the logits and
takes the maximum (Gumbel, 1954; exact).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache


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
    length share a batch. With one generator a sampled completion depends on its batch's noise (its distribution does
    not); with one for each completion, in the order prompt, g, it does not depend on what else is decoded. A list given
    as `logps` is filled with the log-probability of every token as it was sampled, [prompt][g] (needs a temperature).
    """
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
        rows = _decode(
            model,
            [prompts[i] for i in indices],
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
    prompts: list[list[int]],
    group_size: int,
    max_new_tokens: int,
    temperature: float,
    eos_ids: set[int],
    generator: torch.Generator | Sequence[torch.Generator] | None,
    logps: list[list[float]] | None,
) -> list[list[int]]:
    device = next(model.parameters()).device
    width = max(map(len, prompts))
    ids_PT = torch.zeros(len(prompts), width, dtype=torch.long, device=device)
    mask_PT = torch.zeros(len(prompts), width, dtype=torch.long, device=device)
    for row, prompt in enumerate(prompts):  # left padding: every prompt ends in the last column
        ids_PT[row, width - len(prompt) :] = torch.tensor(prompt, device=device)
        mask_PT[row, width - len(prompt) :] = 1
    positions_PT = (mask_PT.cumsum(1) - 1).clamp(min=0)
    out = model(
        input_ids=ids_PT,
        attention_mask=mask_PT,
        position_ids=positions_PT,
        past_key_values=DynamicCache(),
        use_cache=True,
        logits_to_keep=1,
    )
    cache = out.past_key_values
    cache.batch_repeat_interleave(group_size)
    logits_BV = out.logits[:, -1].repeat_interleave(group_size, 0)
    mask_BT = mask_PT.repeat_interleave(group_size, 0)
    position_B = positions_PT[:, -1].repeat_interleave(group_size, 0)

    rows: list[list[int]] = [[] for _ in range(len(prompts) * group_size)]
    if logps is not None:
        logps[:] = [[] for _ in rows]
    alive = list(range(len(rows)))
    for step in range(max_new_tokens):
        noise = [generator[row] for row in alive] if isinstance(generator, Sequence) else generator
        tokens_B = draw(logits_BV, temperature, noise)
        drawn = tokens_B.tolist()
        for row, token in zip(alive, drawn, strict=True):
            rows[row].append(token)
        if logps is not None:
            scaled_BV = logits_BV.float() / temperature
            logp_B = scaled_BV.gather(1, tokens_B[:, None])[:, 0] - scaled_BV.logsumexp(-1)
            for row, logp in zip(alive, logp_B.tolist(), strict=True):
                logps[row].append(logp)
        keep = [i for i, token in enumerate(drawn) if token not in eos_ids]
        if not keep or step == max_new_tokens - 1:
            break
        if len(keep) < len(alive):
            keep_B = torch.tensor(keep, device=device)
            cache.batch_select_indices(keep_B)
            tokens_B, mask_BT, position_B = tokens_B[keep_B], mask_BT[keep_B], position_B[keep_B]
            alive = [alive[i] for i in keep]
        mask_BT = torch.cat([mask_BT, mask_BT.new_ones(len(alive), 1)], 1)
        position_B = position_B + 1
        logits_BV = model(
            input_ids=tokens_B[:, None],
            attention_mask=mask_BT,
            position_ids=position_B[:, None],
            past_key_values=cache,
            use_cache=True,
        ).logits[:, -1]
    return rows


def draw(
    logits_BV: Tensor, temperature: float, generator: torch.Generator | Sequence[torch.Generator] | None = None
) -> Tensor:
    """One token per row, (B,), from softmax(logits / temperature); the most likely one at temperature 0.

    The noise comes from one generator, or from one for each row.
    """
    if temperature == 0:
        return logits_BV.argmax(-1)
    # -log(E) with E ~ Exp(1) is Gumbel noise.
    noise_BV = torch.empty_like(logits_BV, dtype=torch.float32)
    if isinstance(generator, Sequence):
        for noise_V, own in zip(noise_BV, generator, strict=True):
            noise_V.exponential_(generator=own)
    else:
        noise_BV.exponential_(generator=generator)
    noise_BV.log_()
    return (logits_BV.float() / temperature).sub_(noise_BV).argmax(-1)
