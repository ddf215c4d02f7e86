"""Does prompt sharing hold for a model? Looked up in its config, then measured against the model's plain forward.

A wrong mask or cache changes log-probabilities by far more than rounding does, so a batch of a few short rows is
enough. Whoever shares prompts asks once per model and takes the plain path where the answer is a reason: scoring does
(branch_logps), the policy's trainers compare with TRL's own path (train/grpo.py), supervised fine-tuning refuses.
"""

from __future__ import annotations

import logging
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from models.rollout import sample
from models.shared_prompt import Tree, base_model, plain_logps, shared_logps, structural_problem

EXACT = 1e-4  # largest difference of log-probabilities in float32
ROUNDED = 0.05  # mean difference in 16-bit arithmetic, where single tokens may differ by more

log = logging.getLogger("traitdose")
_measured: WeakKeyDictionary[Any, str | None] = WeakKeyDictionary()


def check_trees(vocabulary: int) -> list[Tree]:
    """Two prompts and completions of unequal length, one of them empty, all below the vocabulary's size."""
    stream = iter((7919 * k * k + 104729 * k + 3) % max(vocabulary - 3, 1) + min(3, vocabulary - 1) for k in range(99))

    def tokens(n: int) -> list[int]:
        return [next(stream) for _ in range(n)]

    return [Tree(tokens(9), [tokens(4), tokens(1), tokens(7), []]), Tree(tokens(5), [tokens(6), tokens(2)])]


def difference(ours: Tensor, plain: Tensor, exact: bool) -> str | None:
    """What to say about log-probabilities that should be equal, each (N,); None if they are, up to rounding."""
    gap = (ours.float() - plain.float()).abs()
    if not torch.isfinite(gap).all():
        return "its log-probabilities are not finite"
    found = (gap.max() if exact else gap.mean()).item()
    if found <= (EXACT if exact else ROUNDED):
        return None
    return f"its log-probabilities differ from the plain forward's by {found:.2g}"


def measured_problem(causal_lm: Any) -> str | None:
    """sharing_problem of a model without a PEFT wrapper, measured when it is first asked for; a reason is logged."""
    if causal_lm not in _measured:
        _measured[causal_lm] = problem = sharing_problem(causal_lm)
        if problem is not None:
            name = causal_lm.config.name_or_path or "the model"
            text = "prompts are not shared in scoring %s: %s. Every reply gets a forward of its own"
            log.warning(text, name, problem)
    return _measured[causal_lm]


@torch.no_grad()
def sharing_problem(model: Any, exact: bool | None = None) -> str | None:
    """Why a model in memory cannot share prompts in forward passes, or None. Costs a few short forward passes.

    exact: compare as in 32 bits (by default where the model computes in them), or with the room that 16 bits need.
    """
    problem = structural_problem(base_model(model).get_decoder())
    if problem is not None:
        return problem
    was_training = model.training
    try:
        return _difference_from_plain(model.eval(), is_exact(model) if exact is None else exact)  # without dropout
    finally:
        model.train(was_training)


def _difference_from_plain(model: Any, exact: bool) -> str | None:
    trees = check_trees(base_model(model).config.get_text_config().vocab_size)
    plain = [plain_logps(model, tree.prompt, branch) for tree in trees for branch in tree.branches]
    try:
        ours = [logps for branches in shared_logps(model, trees) for logps in branches]
    except Exception as error:  # a model's own code may fail in any way on a layout that it was not written for
        return raised("the shared forward", error)
    return difference(torch.cat(ours), torch.cat(plain), exact)


@torch.no_grad()
def rollout_problem(model: Any, exact: bool) -> str | None:
    """Why models.rollout cannot decode with a model, or None: every greedy token must be its plain forward's best."""
    trees = check_trees(base_model(model).config.get_text_config().vocab_size)
    prompts = [tree.prompt for tree in trees]
    try:
        groups = sample(model, prompts, group_size=2, max_new_tokens=4, temperature=0, eos_ids=[])
    except Exception as error:
        return raised("decoding from a shared prompt", error)
    device = next(model.parameters()).device
    for prompt, group in zip(prompts, groups, strict=True):
        for tokens in group:
            logits = model(input_ids=torch.tensor([prompt + tokens], device=device)).logits[0, len(prompt) - 1 : -1]
            chosen = logits.gather(1, torch.tensor(tokens, device=device)[:, None])[:, 0]
            lost = (logits.max(-1).values - chosen).float().max().item()
            if lost > (EXACT if exact else 10 * ROUNDED):
                return f"greedy decoding from a shared prompt missed the best token by {lost:.2g} in its logit"
    return None


def is_exact(model: Any) -> bool:
    """Whether a model computes in 32 bits, outside of autocast."""
    parameter = next(model.parameters())
    return parameter.dtype == torch.float32 and not torch.is_autocast_enabled(parameter.device.type)


def raised(what: str, error: Exception) -> str:
    """A reason out of an error, in one line."""
    lines = str(error).strip().splitlines()
    return f"{what} raised {type(error).__name__}" + (f": {lines[0]}" if lines else "")
