"""Attention over packed trees without the pairs that the mask forbids.

A pack's mask is sparse: a row sees its own tree's prompt and its own branch. Attention with the (T, T) mask computes
all pairs; here prompts and branches are each a batch of their own, padded to the longest, so that the work grows with
the squares of the prompts and with branches x (prompt + branch), not with the square of the pack. Each row's softmax
runs over the same keys as under the mask, so the numbers differ by rounding only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.functional import scaled_dot_product_attention as attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

NAME = "tree_sdpa"


@dataclass(frozen=True)
class Span:
    """Where a tree lies in its pack: rows [start, start + prompt), then every branch's rows one after the other."""

    start: int
    prompt: int
    branches: list[int]


@dataclass(frozen=True)
class Layout:
    """Rows of the two batches, and where each row of the pack is found among their results.

    P prompts of up to L rows, N branches of up to C rows; padding repeats some row and is never read. All of them see
    the S keys of the pack's beginning, if it has one, which stand before those of its rows.
    """

    begun: int  # S
    prompts: Tensor  # (P, L) row in the pack
    prompt_keys: Tensor  # (P, S + L) the beginning and the prompt
    prompt_sees: Tensor  # (L, S + L) bool
    branches: Tensor  # (N, C)
    keys: Tensor  # (N, K) the beginning, a branch's prompt, and itself, K = S + L + C
    visible: Tensor  # (N, C, K) bool
    found: Tensor  # (T,) index into `prompts` and then `branches`, both flattened


def layout(spans: Sequence[Span], device: torch.device | str = "cpu", begun: int = 0) -> Layout:
    """The batches of a pack's attention, after a beginning of `begun` tokens whose keys are known."""
    longest = max(span.prompt for span in spans)
    widest = max((n for span in spans for n in span.branches), default=0)
    prompts = torch.tensor([[span.start, span.prompt] for span in spans]).T  # (2, P)
    starts, sizes, trees = [], [], []
    for t, span in enumerate(spans):
        first = span.start + span.prompt
        for n in span.branches:
            if n:
                starts.append(first)
                sizes.append(n)
                trees.append(t)
            first += n
    tree_N = torch.tensor(trees, dtype=torch.long)
    start_N, size_N = torch.tensor(starts, dtype=torch.long), torch.tensor(sizes, dtype=torch.long)
    prompt_PL, real_PL = padded_rows(prompts[0], prompts[1], longest)
    branch_NC, real_NC = padded_rows(start_N, size_N, widest)
    causal_CC = torch.ones(widest, widest, dtype=torch.bool).tril()
    sees_prompt_NCL = real_PL[tree_N][:, None].expand(-1, widest, -1)
    sees_itself_NCC = causal_CC & real_NC[:, None]
    visible_NCK = torch.cat([sees_prompt_NCL, sees_itself_NCC], 2) | ~real_NC[:, :, None]  # padding sees anything
    visible_NCK = pad(visible_NCK, (begun, 0), value=True)
    sees_LK = pad(torch.ones(longest, longest, dtype=torch.bool).tril(), (begun, 0), value=True)
    real = torch.cat([real_PL.flatten(), real_NC.flatten()])
    rows = torch.cat([prompt_PL.flatten(), branch_NC.flatten()])
    found_T = torch.empty(int(real.sum()), dtype=torch.long)
    found_T[rows[real]] = real.nonzero()[:, 0]
    before_PS = torch.arange(begun).expand(len(spans), -1)
    prompt_PK = torch.cat([before_PS, begun + prompt_PL], 1)
    keys_NK = torch.cat([prompt_PK[tree_N], begun + branch_NC], 1)
    parts = (prompt_PL, prompt_PK, sees_LK, branch_NC, keys_NK, visible_NCK, found_T)
    return Layout(begun, *(part.to(device) for part in parts))


def padded_rows(start_B: Tensor, size_B: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """(B, width) row numbers from each start on, the last one repeated, and which of them are real."""
    step_W = torch.arange(width, device=start_B.device)
    return start_B[:, None] + torch.minimum(step_W, (size_B - 1).clamp(min=0)[:, None]), step_W < size_B[:, None]


@contextmanager
def tree_attention(
    decoder: Any, spans: Sequence[Span], device: torch.device, begun: int = 0
) -> Iterator[dict[str, Any]]:
    """Within it the decoder attends by tree; yields the arguments that its forward needs for that."""
    config = decoder.config
    before = config._attn_implementation
    config._attn_implementation = NAME
    try:
        yield {"tree_layout": layout(spans, device, begun)}
    finally:
        config._attn_implementation = before


def _attend(
    module: Any,
    query: Tensor,  # (1, heads, T, d)
    key: Tensor,  # (1, key heads, S + T, d)
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    tree_layout: Layout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface; returns (1, T, heads, d)."""
    if tree_layout is None:  # the model's layers do not hand it down: the mask says the same
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    lay = tree_layout
    heads = query.shape[1]
    queries, keys, values = (states[0].transpose(0, 1).flatten(1) for states in (query, key, value))  # (.., heads x d)

    def batch(states: Tensor, rows_BR: Tensor, heads: int) -> Tensor:
        """(B, heads, R, d)"""
        return (
            states.index_select(0, rows_BR.flatten())
            .unflatten(0, rows_BR.shape)
            .unflatten(2, (heads, -1))
            .transpose(1, 2)
        )

    options: dict[str, Any] = {"dropout_p": dropout, "scale": scaling, "enable_gqa": key.shape[1] != heads}
    found = []
    if lay.prompts.shape[1]:
        q = batch(queries, lay.prompts, heads)
        k, v = (batch(s, lay.prompt_keys, key.shape[1]) for s in (keys, values))
        seen = {"attn_mask": lay.prompt_sees} if lay.begun else {"is_causal": True}  # causal alone is faster
        found.append(attention(q, k, v, **seen, **options))
    if len(lay.branches):
        q = batch(queries, lay.branches, heads)
        k, v = (batch(s, lay.keys, key.shape[1]) for s in (keys, values))
        found.append(attention(q, k, v, attn_mask=lay.visible[:, None], **options))
    rows = torch.cat([part.transpose(1, 2).flatten(0, 1) for part in found])
    return rows.index_select(0, lay.found)[None], None


AttentionInterface.register(NAME, _attend)
