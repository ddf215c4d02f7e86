"""Attention by tree equals attention under the full mask, in values and gradients."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from models.shared_prompt import Tree, attention_masks, pack, pack_for_forward, packed_hidden
from models.tree_attention import NAME, layout
from tests.conftest import tiny_llama

TREES = [
    Tree([5, 6, 7, 8, 9], [[10, 11, 12], [13], [], [14, 15]]),
    Tree([20], [[21, 22]]),
    Tree([30, 31, 32], [[]]),
    Tree([40, 41], [[42, 43, 44, 45], [46, 47]]),
]


def under_the_mask(decoder: Any, packed: Any) -> torch.Tensor:
    return decoder(
        input_ids=packed.input_ids,
        position_ids=packed.position_ids,
        attention_mask=attention_masks(packed, decoder.config, decoder.dtype),
        use_cache=False,
    ).last_hidden_state[0]


@pytest.mark.parametrize("lay_out", [pack, partial(pack, whole=True), lambda trees: pack_for_forward(trees)[0]])
@pytest.mark.parametrize("trees", [TREES, TREES[1:2], TREES[2:3], TREES[::-1]])
def test_hidden_states_and_gradients(trees: list[Tree], lay_out: Any) -> None:
    decoder, packed = tiny_llama().get_decoder(), lay_out(trees)
    up = torch.randn(packed.input_ids.shape[1], 64, generator=torch.Generator().manual_seed(0))
    found = []
    for forward in (packed_hidden, under_the_mask):
        decoder.zero_grad()
        hidden = forward(decoder, packed)
        (hidden * up).sum().backward()
        found.append([hidden.detach(), *(p.grad.clone() for p in decoder.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1]) > 5
    for ours, masked in zip(*found, strict=True):
        assert (ours - masked).norm() <= 1e-5 * masked.norm() + 1e-7


def test_rows_by_hand() -> None:
    lay = layout(pack([Tree([5, 6], [[7], [8, 9]])], whole=True).spans)
    assert lay.prompts.tolist() == [[0, 1]]
    assert lay.branches.tolist() == [[2, 2], [3, 4]]
    assert lay.keys.tolist() == [[0, 1, 2, 2], [0, 1, 3, 4]]
    assert lay.visible[0].tolist() == [[True, True, True, False], [True] * 4]  # the second row is padding
    assert lay.visible[1].tolist() == [[True, True, True, False], [True] * 4]
    assert lay.found.tolist() == [0, 1, 2, 4, 5]


def test_the_model_is_left_as_it_was() -> None:
    decoder = tiny_llama().get_decoder()
    packed_hidden(decoder, pack(TREES))
    assert decoder.config._attn_implementation == "sdpa"
    decoder.config._attn_implementation = NAME  # layers that do not hand the layout down attend by the mask
    try:
        plain = under_the_mask(decoder, pack(TREES))
    finally:
        decoder.config._attn_implementation = "sdpa"
    torch.testing.assert_close(plain, packed_hidden(decoder, pack(TREES)), rtol=1e-4, atol=1e-5)
