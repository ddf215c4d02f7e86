"""Attention of a decoding step: a group's completions read the keys and values of their prompt once, not one by one.

The queries of all completions of a prompt, and of all heads that share keys, are rows of one product with the prompt's
keys; each completion's own keys are another product, and one softmax runs over both (the idea of Hydragen, Juravsky et
al. 2024, arXiv 2402.05099; there the two softmaxes are joined afterwards). The prompt's keys are kept once per group,
so a cache takes less memory, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from models.kv_cache import State
from models.tree_attention import padded_rows

NAME = "grouped_sdpa"


@dataclass
class Groups:
    """The keys and values of P prompts by layer, and where the rows of the batch, B, stand among their groups.

    While the prompts are read the layers are written down; after that, decoding may begin.
    """

    states: dict[int, State] = field(default_factory=dict)  # layer -> (P, key heads, L, d) each
    decoding: bool = False
    hidden: Tensor | None = None  # (P, 1, 1, L), added to the scores of a prompt's keys; None where nothing is padded
    owners: Tensor = field(init=False)  # (B,) every row's prompt, in ascending order
    rows: Tensor = field(init=False)  # (P, R) the rows of every prompt, padded with its last one
    places: Tensor = field(init=False)  # (B,) where every row stands in `rows`, flattened
    full: bool = field(init=False)  # no padding: then groups are slices of the batch

    def begin(self, mask_PL: Tensor, group_size: int) -> None:
        """Every prompt has `group_size` rows from now on; mask_PL is 0 where a prompt is padded."""
        self.decoding = True
        self.hidden = None if mask_PL.all() else torch.finfo().min * (mask_PL == 0)[:, None, None]
        self._stand(torch.arange(len(mask_PL), device=mask_PL.device).repeat_interleave(group_size))

    def keep(self, rows: Tensor) -> None:
        """Only these rows go on; a prompt without rows is forgotten."""
        prompts, prompt_B = self.owners[rows].unique_consecutive(return_inverse=True)
        if len(prompts) < len(self.rows):
            self.states = {layer: (keys[prompts], values[prompts]) for layer, (keys, values) in self.states.items()}
            self.hidden = None if self.hidden is None else self.hidden[prompts]
        self._stand(prompt_B)

    def gather(self, states: Tensor) -> Tensor:
        """(B, key heads, n, d) -> (P, key heads, R n, d), for groups of up to R rows, padded with their last one."""
        rows = states.unflatten(0, self.rows.shape) if self.full else states[self.rows]
        return rows.transpose(1, 2).flatten(2, 3)

    def scatter(self, states: Tensor) -> Tensor:
        """The way back of `gather`."""
        rows = states.unflatten(2, (self.rows.shape[1], -1)).transpose(1, 2).flatten(0, 1)
        return rows if self.full else rows[self.places]

    def _stand(self, prompt_B: Tensor) -> None:
        sizes = prompt_B.bincount()
        starts, widest = sizes.cumsum(0) - sizes, int(sizes.max())
        within = torch.arange(len(prompt_B), device=prompt_B.device) - starts[prompt_B]
        self.owners, self.places = prompt_B, prompt_B * widest + within
        self.rows = padded_rows(starts, sizes, widest)[0]
        self.full = len(prompt_B) == self.rows.numel()


@contextmanager
def group_attention(causal_lm: Any, length: int) -> Iterator[Groups | None]:
    """Within it a model that is given the Groups as `groups` notes its prompts, and then decodes by group.

    None for a model that does not attend by SDPA, or whose window is shorter than texts of `length` tokens.
    """
    config = causal_lm.get_decoder().config
    before, window = config._attn_implementation, getattr(config, "sliding_window", None)
    if before != "sdpa" or (window is not None and window < length):
        yield None
        return
    config._attn_implementation = NAME
    try:
        yield Groups()
    finally:
        config._attn_implementation = before


def _attend(
    module: Any,
    query: Tensor,  # (B, heads, T, d)
    key: Tensor,  # (B, key heads, S, d)
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    groups: Groups | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface; returns (B, T, heads, d)."""
    if groups is None or not groups.decoding:
        if groups is not None and kwargs.get("position_bias") is None:
            # A product of batches would copy the strided ones of several prompts at every step.
            groups.states[module.layer_idx] = (key.contiguous(), value.contiguous())
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    prompt_keys, prompt_values = groups.states[module.layer_idx]
    shared = prompt_keys.shape[2]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    grouped = (query * scale).unflatten(1, (key.shape[1], -1))[:, :, :, 0]  # (B, key heads, heads of a group, d)
    scores = groups.gather(grouped) @ prompt_keys.transpose(2, 3)
    if groups.hidden is not None:
        scores = scores + groups.hidden
    scores = torch.cat([groups.scatter(scores), grouped @ key.transpose(2, 3)], 3)
    shares = scores.softmax(3, dtype=torch.float32).to(value.dtype)
    found = groups.scatter(groups.gather(shares[..., :shared]) @ prompt_values) + shares[..., shared:] @ value
    return found.flatten(1, 2)[:, None], None


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
