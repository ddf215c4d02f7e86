"""Attention of a decoding step: query heads that share keys are queries of one batch, so keys are read once.

With grouped-query attention several query heads attend to the same keys and values. transformers' SDPA path repeats
these for each head (under a mask), and SDPA itself reads them again for each (without one). In a decoding step a
sequence has one query a head, so the heads of a group can stand where the positions of a longer query would: the same
products and softmax, with a third of the reading for three heads a group.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "grouped_sdpa"


@contextmanager
def grouped_queries(causal_lm: Any) -> Iterator[None]:
    """Within it a model that attends by SDPA does so in groups when it decodes; any other attends as it does."""
    config = causal_lm.get_decoder().config
    before = config._attn_implementation
    if before == "sdpa":
        config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before


def _attend(
    module: Any,
    query: Tensor,  # (B, heads, T, d)
    key: Tensor,  # (B, key heads, S, d)
    value: Tensor,
    attention_mask: Tensor | None,  # (B, 1, T, S)
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface; returns (B, T, heads, d)."""
    groups = key.shape[1]
    if query.shape[2] > 1 or query.shape[1] == groups or kwargs.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    grouped = query.unflatten(1, (groups, -1))[:, :, :, 0]  # (B, key heads, heads of a group, d)
    found = attention(grouped, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling)
    return found.flatten(1, 2)[:, None], None


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
