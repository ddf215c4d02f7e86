"""TRL's padded batches as trees: rows with equal prompts share one, wherever they stand.

A batch is ids and mask, each (B, P + C): prompts padded on the left to the width P, completions on the right.
"""

from __future__ import annotations

from itertools import compress
from typing import Any

import torch
from torch import Tensor

from models.shared_prompt import Tree, fill


def whole_rows(batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Prompts and completions side by side: token ids and mask, each (B, P + C)."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    return ids, torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)


def group_rows(
    input_ids: Tensor, attention_mask: Tensor, width: int, read_B: Tensor | None = None
) -> tuple[list[Tree], list[list[int]]]:
    """Trees of a batch with prompts of padded width `width`, and for each the batch rows of its branches.

    With `read_B`, (B,) of truth values, of those rows alone.
    """
    ids, mask = input_ids.tolist(), attention_mask.bool().tolist()
    read = [True] * len(ids) if read_B is None else read_B.tolist()
    rows_of: dict[tuple[int, ...], list[int]] = {}
    for row in compress(range(len(ids)), read):
        tokens, kept = ids[row], mask[row]
        prompt = tuple(t for t, k in zip(tokens[:width], kept[:width], strict=True) if k)
        rows_of.setdefault(prompt, []).append(row)
    trees = [
        Tree(
            list(prompt),
            [[t for t, k in zip(ids[row][width:], mask[row][width:], strict=True) if k] for row in rows],
        )
        for prompt, rows in rows_of.items()
    ]
    return trees, list(rows_of.values())


def tree_runs(
    input_ids: Tensor, attention_mask: Tensor, width: int, token_budget: int, read_B: Tensor | None = None
) -> list[tuple[list[Tree], Tensor, Tensor]]:
    """Trees for one packed forward each, of at most `token_budget` tokens.

    With the batch row and the completion column of each of their N branch tokens, (N,).
    """
    trees, rows = group_rows(input_ids, attention_mask, width, read_B)
    runs: list[tuple[list[Tree], Tensor, Tensor]] = []
    for run in fill([len(tree) for tree in trees], token_budget):
        branches = [(row, branch) for i in run for row, branch in zip(rows[i], trees[i].branches, strict=True)]
        places = [(row, col) for row, branch in branches for col in range(len(branch))]
        row_N, col_N = torch.tensor(places, dtype=torch.long, device=input_ids.device).view(-1, 2).unbind(1)
        runs.append(([trees[i] for i in run], row_N, col_N))
    return runs


def padded(trees: list[Tree], pad: int, device: torch.device) -> tuple[Tensor, Tensor, int]:
    """Trees as a batch: ids, mask, and the prompt width P."""
    width = max(len(tree.prompt) for tree in trees)
    longest = max(len(branch) for tree in trees for branch in tree.branches)
    ids: list[list[int]] = []
    mask: list[list[int]] = []
    for tree in trees:
        for branch in tree.branches:
            left, right = width - len(tree.prompt), longest - len(branch)
            ids.append([pad] * left + tree.prompt + branch + [pad] * right)
            mask.append([0] * left + [1] * (len(tree.prompt) + len(branch)) + [0] * right)
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device), width
