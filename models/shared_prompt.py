"""The prompt-sharing forward: a prompt and all its continuations go through the model as one sequence.

A tree is a prompt and its branches (the completions of a group, or the choices of a question). It is laid out as
prompt, branch 1, branch 2, ...; position ids restart after the prompt for every branch, and a 4-D mask lets a branch
see the prompt and itself only. So the prompt is encoded once instead of once per branch, and every log-probability and
gradient is exact. Several trees are packed into one sequence without padding; only the positions that predict a branch
token reach the LM head.

The idea of encoding a shared prefix once is Prefix Grouper's (arXiv 2506.05433).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from models.kv_cache import State, common_beginning, read_beginning, roomy_cache
from models.linear import linear
from models.tree_attention import Span, tree_attention

PROMPT = -1  # branch index of a prompt token
FLEX = "flex_attention"
ATTENTION = ("sdpa", "eager", FLEX)  # implementations that take a mask of rows by columns
LAYERS = ("full_attention", "sliding_attention")


@dataclass(frozen=True)
class Tree:
    """A prompt and the branches that continue it, as token ids. The prompt has at least one token."""

    prompt: list[int]
    branches: list[list[int]]

    def __len__(self) -> int:
        return len(self.prompt) + sum(map(len, self.branches))


@dataclass(frozen=True)
class Pack:
    """Trees laid out in one row of T tokens. N branch tokens in all, in the order tree, branch, token."""

    input_ids: Tensor  # (1, T)
    position_ids: Tensor  # (1, T) restart after the prompt for every branch
    tree_of: Tensor  # (T,) the tree of every row
    branch_of: Tensor  # (T,) its branch, or PROMPT
    predictors: Tensor  # (N,) row whose hidden state predicts branch token n
    ends: Tensor  # (branches,) each branch's last row, the prompt's last where it has none
    targets: Tensor  # (N,) branch token ids
    lengths: list[list[int]]  # branch lengths per tree
    spans: list[Span]  # where each tree lies


def pack(trees: Sequence[Tree], device: torch.device | str = "cpu", whole: bool = False) -> Pack:
    """Lay trees out in one row with their positions, their mask, and the rows that predict each branch token.

    A branch's last token predicts nothing and no other row looks at it: it gets a row only in a `whole` pack, which is
    for a model that judges texts at their ends.
    """
    _check_prompts(trees)
    laid = trees if whole else [Tree(tree.prompt, [branch[:-1] for branch in tree.branches]) for tree in trees]
    spans = _spans(laid)
    predictors: list[int] = []
    ends: list[int] = []
    for tree, span in zip(trees, spans, strict=True):
        first = span.start + span.prompt
        last = first - 1
        for branch, n in zip(tree.branches, span.branches, strict=True):
            predictors += [last, *range(first, first + n)][: len(branch)]
            ends.append(first + n - 1 if n else last)
            first += n
    return _lay_out(trees, laid, spans, predictors, ends, device)


def pack_for_forward(trees: Sequence[Tree], device: torch.device | str = "cpu") -> tuple[Pack, Tensor]:
    """Lay trees out so that every row predicts one token, as a model's own forward wants its labels.

    Each branch begins with a copy of the prompt's last token, which the shared part leaves out, and ends before its
    own. Returns the pack and its labels, (1, T): the token that a row predicts, or -100. `targets` are as in `pack`.
    """
    _check_prompts(trees)
    headed = [Tree(tree.prompt[:-1], [tree.prompt[-1:] + branch[:-1] for branch in tree.branches]) for tree in trees]
    spans = _spans(headed)
    predictors: list[int] = []
    ends: list[int] = []
    for tree, span in zip(trees, spans, strict=True):
        first = span.start + span.prompt
        for branch, n in zip(tree.branches, span.branches, strict=True):
            predictors += range(first, first + len(branch))
            ends.append(first + n - 1)
            first += n
    packed = _lay_out(trees, headed, spans, predictors, ends, device)
    labels_T = torch.full_like(packed.input_ids, -100)
    labels_T[0, packed.predictors] = packed.targets
    return packed, labels_T


def _check_prompts(trees: Sequence[Tree]) -> None:
    if not all(tree.prompt for tree in trees):
        raise ValueError("a tree needs a prompt of at least one token: its last token predicts every branch's first")


def _spans(trees: Sequence[Tree]) -> list[Span]:
    """Where each tree lies when they stand one after the other."""
    starts = accumulate((len(tree) for tree in trees), initial=0)
    sizes = [[len(branch) for branch in tree.branches] for tree in trees]
    return [Span(start, len(tree.prompt), n) for start, tree, n in zip(starts, trees, sizes, strict=False)]


def _lay_out(
    trees: Sequence[Tree],
    laid: Sequence[Tree],
    spans: list[Span],
    predictors: list[int],
    ends: list[int],
    device: torch.device | str,
) -> Pack:
    """The pack of `trees` of which the rows of `laid` are computed, where `spans` say; a laid prompt may be empty."""
    ids: list[int] = []
    positions: list[int] = []
    tree_of: list[int] = []
    branch_of: list[int] = []
    for t, tree in enumerate(laid):
        n = len(tree.prompt)
        for b, (part, begin) in enumerate([(tree.prompt, 0), *((branch, n) for branch in tree.branches)], start=PROMPT):
            ids += part
            positions += range(begin, begin + len(part))
            branch_of += [b] * len(part)
        tree_of += [t] * len(tree)
    return Pack(
        input_ids=torch.tensor([ids], device=device),
        position_ids=torch.tensor([positions], device=device),
        tree_of=torch.tensor(tree_of, device=device),
        branch_of=torch.tensor(branch_of, device=device),
        predictors=torch.tensor(predictors, dtype=torch.long, device=device),
        ends=torch.tensor(ends, dtype=torch.long, device=device),
        targets=torch.tensor([t for tree in trees for branch in tree.branches for t in branch], device=device).long(),
        lengths=[[len(branch) for branch in tree.branches] for tree in trees],
        spans=spans,
    )


def fill(sizes: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Indices in order, cut into runs whose sizes sum to at most `budget` (a larger single one stands alone)."""
    run: list[int] = []
    total = 0
    for i, size in enumerate(sizes):
        if run and total + size > budget:
            yield run
            run, total = [], 0
        run.append(i)
        total += size
    if run:
        yield run


def packs(
    trees: Sequence[Tree], token_budget: int, device: torch.device | str = "cpu", whole: bool = False
) -> Iterator[Pack]:
    """The trees, in their order, in packs of at most `token_budget` tokens; a longer tree stands alone."""
    for run in fill([len(tree) for tree in trees], token_budget):
        yield pack([trees[i] for i in run], device, whole)


def packed_logps(model: Any, packed: Pack, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy of every branch token of a pack, each (N,) float32; only the first is differentiable.

    `model` is a causal language model or a PEFT wrapper around one.
    """
    causal_lm = base_model(model)
    rows_ND = packed_hidden(causal_lm.get_decoder(), packed)[packed.predictors]
    head, (scale, softcap) = causal_lm.get_output_embeddings(), logit_transform(causal_lm.config)
    return token_logps(rows_ND, head, packed.targets, temperature, softcap, scale=scale)


def logit_transform(config: Any) -> tuple[float, float | None]:
    """What a model does to its head's logits, by its config: a factor, and then a soft cap or None.

    Granite divides, Cohere and others multiply, Gemma caps. The names are those that TRL's fused head reads.
    """
    text = config.get_text_config()
    softcap = getattr(text, "final_logit_softcapping", None)
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if (scale := getattr(text, name, None)) is not None:
            return scale, softcap
    scaling = getattr(text, "logits_scaling", None)
    if scaling is None:
        return 1.0, softcap
    return scaling if text.model_type == "hyperclovax" else 1 / scaling, softcap


def base_model(model: Any) -> Any:
    """The causal language model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def packed_hidden(decoder: Any, packed: Pack, beginning: Sequence[State] = ()) -> Tensor:
    """Last hidden states of a pack, (T, D), from a decoder without its head.

    beginning: keys and values of what comes before every prompt of the pack (models/kv_cache.py); without a gradient.
    Raises ValueError for a decoder whose layers cannot share a prompt.
    """
    problem = structural_problem(decoder)
    if problem is not None:
        name = getattr(getattr(decoder, "config", None), "name_or_path", None)
        raise ValueError(f"{name or 'the model'} cannot share prompts: {problem}; use another base")
    begun = beginning[0][0].shape[2] if beginning else 0
    masks = attention_masks(packed, decoder.config, decoder.dtype, begun)
    by_tree = decoder.config._attn_implementation == "sdpa" and not _windowed(packed, decoder.config)
    # Layers that are computed again in the backward pass would find the attention of then.
    by_tree = by_tree and not (torch.is_grad_enabled() and decoder.training and decoder.is_gradient_checkpointing)
    place = packed.input_ids.device
    with tree_attention(decoder, packed.spans, place, begun) if by_tree else nullcontext({}) as layout:
        return decoder(
            input_ids=packed.input_ids,
            position_ids=packed.position_ids + begun,
            attention_mask=masks,
            past_key_values=roomy_cache(0, beginning) if beginning else None,
            use_cache=False,
            **layout,
        ).last_hidden_state[0]


def structural_problem(decoder: Any) -> str | None:
    """Why a decoder's structure rules prompt sharing out, or None."""
    if not hasattr(decoder, "_is_stateful"):  # ModernBERT calls its output layer so
        return "its get_decoder() gives no decoder"
    if decoder._is_stateful:
        return "its recurrent layers carry a state from one completion into the next"
    other = sorted(set(getattr(decoder.config, "layer_types", None) or ()) - set(LAYERS))
    if other:
        return f"its layers of type {', '.join(other)} do not take a mask of rows by columns"
    if decoder.config._attn_implementation not in ATTENTION:
        return f"attention implementation {decoder.config._attn_implementation!r} takes no mask of rows by columns"
    return None


def attention_masks(packed: Pack, config: Any, dtype: torch.dtype, begun: int = 0) -> Any:
    """The mask of a pack as a decoder with this config takes it: one for all layers, or one for each type of layer.

    SDPA takes booleans, (1, 1, T, begun + T), eager attention numbers that it adds, FlexAttention a BlockMask, which
    skips the blocks that nobody sees. Every row sees the `begun` tokens that stand before the pack, which only models
    without a window may have.
    """
    window = getattr(config, "sliding_window", None) if _windowed(packed, config) else None
    full = _mask(packed, config._attn_implementation, dtype, begun)
    sliding = full if window is None else _mask(packed, config._attn_implementation, dtype, begun, window)
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        return {"full_attention": full, "sliding_attention": sliding}
    # Without layer types, a window is that of every layer (Mistral, Phi-3).
    return sliding if getattr(config, "layer_types", None) is None else full


def _mask(packed: Pack, implementation: str, dtype: torch.dtype, begun: int, window: int | None = None) -> Any:
    rows, place = len(packed.tree_of), packed.tree_of.device
    if implementation == FLEX:
        from torch.nn.attention.flex_attention import create_block_mask  # imports a compiler

        def seen(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
            return (column < begun) | sees(packed, row, (column - begun).clamp(min=0), window)

        return create_block_mask(seen, None, None, rows, begun + rows, device=place.type)
    number_T = torch.arange(rows, device=place)
    visible = pad(sees(packed, number_T[:, None], number_T, window)[None, None], (begun, 0), value=True)
    if implementation != "eager":
        return visible
    return torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, torch.finfo(dtype).min)


def sees(packed: Pack, row: Tensor, column: Tensor, window: int | None = None) -> Tensor:
    """Whether a row attends to a column, both numbers of rows: to its tree's prompt and its branch, up to itself.

    Indices of shapes that broadcast to the result's, which is bool: (T, 1) and (T,) give the (T, T) mask. A sliding
    window counts positions, not rows: a branch's neighbours in the pack may be far from it in its own text.
    """
    branch = packed.branch_of[column]
    own = (branch == PROMPT) | (branch == packed.branch_of[row])
    visible = own & (packed.tree_of[row] == packed.tree_of[column]) & (column <= row)
    if window is None:
        return visible
    return visible & (packed.position_ids[0, row] - packed.position_ids[0, column] < window)


def _windowed(packed: Pack, config: Any) -> bool:
    """Whether a text of the pack is longer than the model's sliding window."""
    window = getattr(config, "sliding_window", None)
    return window is not None and int(packed.position_ids.max()) >= window


def token_logps(
    hidden_ND: Tensor,
    head: torch.nn.Module,
    targets_N: Tensor,
    temperature: float = 1.0,
    softcap: float | None = None,
    chunk: int = 128,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """LM head, log-softmax and gather in chunks of rows: the (N, vocabulary) logits never stand in memory at once.

    Logits are multiplied by `scale`, then soft-capped, then divided by the temperature (logit_transform). Where only
    the hidden states need a gradient (LoRA: the head is frozen), the backward pass needs no second LM head forward.
    """
    weight: Any = head.weight
    bias: Any = getattr(head, "bias", None)
    frozen = not weight.requires_grad and (bias is None or not bias.requires_grad)
    logps: list[Tensor] = []
    entropies: list[Tensor] = []
    for start in range(0, len(targets_N), chunk):
        rows, wanted = hidden_ND[start : start + chunk], targets_N[start : start + chunk]
        if frozen and softcap is None and torch.is_grad_enabled():
            logp, entropy = _FrozenHeadLogps.apply(rows, weight, bias, wanted, temperature, scale)
        elif torch.is_grad_enabled():
            logp, entropy = checkpoint(  # type: ignore[misc]
                _logps, rows, weight, bias, wanted, temperature, softcap, scale, use_reentrant=False
            )
        else:
            logp, entropy = _logps(rows, weight, bias, wanted, temperature, softcap, scale)
        logps.append(logp)
        entropies.append(entropy)
    if not logps:  # still a result of the model, so that a batch without a token can be trained on, to no effect
        return hidden_ND.float().sum(-1), hidden_ND.new_zeros(0, dtype=torch.float32)
    return torch.cat(logps), torch.cat(entropies).detach()


def _logps(
    rows_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets_N: Tensor,
    temperature: float,
    softcap: float | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    logits_NV = _logits(rows_ND, weight_VD, bias_V, softcap, scale) / temperature
    logz_N = logits_NV.logsumexp(-1)
    logp_N = logits_NV.gather(1, targets_N[:, None])[:, 0] - logz_N
    with torch.no_grad():
        probs_NV = (logits_NV - logz_N[:, None]).exp_()
        entropy_N = logz_N - probs_NV.mul_(logits_NV).sum(-1)  # no product of matrices: autocast would round it
    return logp_N, entropy_N


def _logits(rows_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, softcap: float | None, scale: float) -> Tensor:
    logits_NV = linear(rows_ND, weight_VD, bias_V).float()
    if scale != 1.0:
        logits_NV = logits_NV * scale
    return logits_NV if softcap is None else torch.tanh(logits_NV / softcap) * softcap  # Gemma squashes its logits


class _FrozenHeadLogps(torch.autograd.Function):
    """Token log-probabilities whose row gradients are computed in the forward pass.

    d logp_n / d h_n = sum_v ([v = target_n] - p_nv) W[v] x scale / temperature depends on row n alone, so it is stored
    (N, D) instead of the logits (N, V), and the backward pass only scales it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets_N: Tensor,
        temperature: float,
        scale: float,
    ):
        logits_NV = linear(rows_ND, weight_VD, bias_V).float()
        if scale != 1.0:
            logits_NV *= scale
        if temperature != 1.0:
            logits_NV /= temperature
        # In place, with one more (N, V) only: getting pages for another took longer than the arithmetic.
        logits_NV -= logits_NV.amax(-1, keepdim=True)
        exp_NV = logits_NV.exp()
        sum_N = exp_NV.sum(-1)
        logz_N = sum_N.log()
        logp_N = logits_NV.gather(1, targets_N[:, None])[:, 0] - logz_N
        entropy_N = logz_N - logits_NV.mul_(exp_NV).sum(-1) / sum_N
        # 1 - p in 32 bits: in 16, W[target] less the sum of p W loses what is left of a likely target's gradient.
        delta_NV = exp_NV.neg_()
        delta_NV[torch.arange(len(targets_N), device=targets_N.device), targets_N] += sum_N
        grad_ND = linear(delta_NV.to(weight_VD.dtype), weight_VD.t())
        ctx.save_for_backward(grad_ND.mul_((scale / temperature / sum_N)[:, None]))
        ctx.mark_non_differentiable(entropy_N)
        return logp_N, entropy_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad_ND,) = ctx.saved_tensors
        return grad_ND * grads[0][:, None].to(grad_ND.dtype), None, None, None, None, None


def branch_logps(model: PreTrainedModel, trees: Sequence[Tree], token_budget: int = 1024) -> list[list[Tensor]]:
    """Log-probabilities of every branch's tokens given its prompt: [tree][branch] -> (len(branch),). No gradient.

    A model that cannot share prompts, by its structure or by its numbers (models/self_check.py asks once per model),
    gets a forward for every branch, and a warning says why where only its numbers tell.
    """
    from models.self_check import measured_problem  # which measures by what is below

    causal_lm = base_model(model)
    if structural_problem(causal_lm.get_decoder()) is not None or measured_problem(causal_lm) is not None:
        with torch.inference_mode():
            return [[plain_logps(model, tree.prompt, branch) for branch in tree.branches] for tree in trees]
    return shared_logps(model, trees, token_budget)


def shared_logps(model: PreTrainedModel, trees: Sequence[Tree], token_budget: int = 1024) -> list[list[Tensor]]:
    """branch_logps by shared prompts, without asking whether the model can.

    What all prompts begin with is read once. Trees of like length share a sequence of at most `token_budget` tokens (a
    longer tree stands alone). Raises ValueError for a decoder whose layers cannot share a prompt.
    """
    causal_lm = base_model(model)
    begun = common_beginning(causal_lm, [tree.prompt for tree in trees])
    beginning = read_beginning(causal_lm, trees[0].prompt[:begun]) if begun else []
    trees = [Tree(tree.prompt[begun:], tree.branches) for tree in trees]
    order = sorted(range(len(trees)), key=lambda i: len(trees[i]))
    result: list[list[Tensor]] = [[] for _ in trees]
    device = next(model.parameters()).device
    with torch.inference_mode():
        for run in fill([len(trees[i]) for i in order], token_budget):
            packed = pack([trees[order[i]] for i in run], device)
            logps_N = _logps_alone(causal_lm, packed, beginning)
            pieces = logps_N.split([n for lengths in packed.lengths for n in lengths])
            cursor = 0
            for i, lengths in zip(run, packed.lengths, strict=True):
                result[order[i]] = list(pieces[cursor : cursor + len(lengths)])
                cursor += len(lengths)
    return result


def _logps_alone(causal_lm: Any, packed: Pack, beginning: Sequence[State], chunk: int = 128) -> Tensor:
    """packed_logps without entropies and gradient, (N,): all that scoring needs, for three quarters of the time."""
    rows_ND = packed_hidden(causal_lm.get_decoder(), packed, beginning)[packed.predictors]
    head, (scale, softcap) = causal_lm.get_output_embeddings(), logit_transform(causal_lm.config)
    found = [rows_ND.new_empty(0, dtype=torch.float32)]
    for rows, wanted in zip(rows_ND.split(chunk), packed.targets.split(chunk), strict=True):
        logits_NV = _logits(rows, head.weight, getattr(head, "bias", None), softcap, scale)
        found.append(logits_NV.log_softmax(-1).gather(1, wanted[:, None])[:, 0])
    return torch.cat(found)


def plain_logps(model: Any, prompt: list[int], branch: list[int]) -> Tensor:
    """Log-probabilities of a branch given its prompt, (len(branch),) float32, by one forward of their own."""
    device = next(model.parameters()).device
    logits = model(input_ids=torch.tensor([prompt + branch], device=device)).logits[0]
    rows = logits[len(prompt) - 1 : len(prompt) - 1 + len(branch)].float().log_softmax(-1)
    return rows.gather(1, torch.tensor(branch, dtype=torch.long, device=device)[:, None])[:, 0]
