"""Score continuations for lm-eval with the prompt-sharing forward: the choices of a question share one pass over it.

lm-eval's own HFLM runs every (context, continuation) pair through the model, padded to the longest of its batch. Here
the pairs that share a context become one tree, many trees are packed into one sequence, nothing is padded, and only
continuation positions reach the LM head (models/shared_prompt.py). Tokens are HFLM's: context and continuation are
encoded together and split where the context ends, spaces at the end of a context move to the continuation, and too long
contexts lose tokens on the left.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from models.shared_prompt import Tree, branch_logps, fill

Request = tuple[tuple[str, str], list[int], list[int]]  # ((context, continuation), context ids, continuation ids)
PACKS_PER_CALL = 4  # how often progress is told and scores are kept


class SharedContextLM(TemplateLM):
    """An lm-eval LM over a model in memory. It scores continuations (`loglikelihood`); it does not generate.

    max_context: how many tokens of a context are kept, from the right. progress gets (pairs done, pairs in all).
    kept: a file that scores are appended to as they are made; what it holds is not computed again.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_context: int = 1024,
        token_budget: int = 1024,
        progress: Callable[[int, int], None] | None = None,
        kept: Path | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.tokenizer: Any = tokenizer
        self.max_context = max_context
        self.token_budget = token_budget
        self.progress = progress
        self.kept = kept
        self._single: list[bool] = []  # per request: is it its item's only one?

    @property
    def eot_token_id(self) -> int:
        """End of text, as in HFLM."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What an empty context is replaced by, as in HFLM: the beginning-of-sequence token, else end of text."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: object) -> list[int]:
        """Token ids; the tokenizer's own special tokens unless told otherwise or already in the text."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.tokenizer.decode([self.prefix_token_id]))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """(summed log-probability, is greedy) of every (context, continuation); progress goes to the callback alone.

        The greedy flag is exact for an item with one request, where lm-eval's `loglikelihood` tasks read it. For the
        choices of a question it is False: acc and acc_norm ignore it, and it would cost a pass per choice.
        """
        per_item = Counter((request.task_name, request.doc_id) for request in requests)
        self._single = [per_item[request.task_name, request.doc_id] == 1 for request in requests]
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: list[Request], **kwargs: object) -> list[tuple[float, bool]]:
        """Group pairs by their context ids and score each group as one tree.

        A choice whose context has other ids than its siblings' lands in another tree.
        """
        groups: dict[tuple[int, ...], list[int]] = {}
        for i, (texts, context, continuation) in enumerate(requests):
            if not continuation:
                raise ValueError(f"continuation {texts[1]!r} has no token of its own after {texts[0][-40:]!r}")
            groups.setdefault(tuple(context[-self.max_context :]), []).append(i)
        trees = [Tree(list(context), [requests[i][2] for i in members]) for context, members in groups.items()]
        members = list(groups.values())

        scores = _read_scores(self.kept)
        keys = [""] * len(requests)
        for tree, rows in zip(trees, members, strict=True):
            for i, branch in zip(rows, tree.branches, strict=True):
                keys[i] = _key(tree.prompt, branch, self._single[i])
        order = sorted(range(len(trees)), key=lambda t: len(trees[t]))
        done = 0
        for run in fill([len(trees[t]) for t in order], PACKS_PER_CALL * self.token_budget):
            chunk = [order[i] for i in run]
            done += sum(len(members[t]) for t in chunk)
            if all(keys[i] in scores for t in chunk for i in members[t]):
                continue
            new: dict[str, tuple[float, bool]] = {}
            scored = branch_logps(self.model, [trees[t] for t in chunk], self.token_budget)
            for t, logps in zip(chunk, scored, strict=True):
                for i, branch, logp_N in zip(members[t], trees[t].branches, logps, strict=True):
                    greedy = self._single[i] and self._is_greedy(trees[t].prompt, branch, logp_N.min().item())
                    new[keys[i]] = (logp_N.double().sum().item(), greedy)
            scores |= new
            if self.kept is not None:
                with self.kept.open("a", encoding="utf-8") as file:
                    file.writelines(f"\n{json.dumps([key, *score])}" for key, score in new.items())
            if self.progress is not None:
                self.progress(done, len(requests))
        return [scores[key] for key in keys]

    def _is_greedy(self, context: list[int], continuation: list[int], lowest_logp: float) -> bool:
        """Whether greedy decoding would give this continuation; costs a pass only where probabilities leave it open."""
        probability = torch.tensor(lowest_logp).exp().item()
        if probability > 0.5:
            return True
        if probability * self.model.config.vocab_size < 1.0:  # below the mean, so some other token is likelier
            return False
        with torch.inference_mode():
            ids = torch.tensor([context + continuation[:-1]], device=self.device)
            logits_NV = self.model(ids, logits_to_keep=len(continuation)).logits[0]
        return logits_NV.argmax(-1).tolist() == continuation

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Not offered."""
        raise ValueError("the shared-context scorer has no perplexity tasks; use lm-eval's own `--model hf` for them")

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Not offered."""
        raise ValueError("the shared-context scorer does not generate; use lm-eval's own `--model hf` for such tasks")


def _key(context: list[int], continuation: list[int], single: bool) -> str:
    return hashlib.sha256(repr((context, continuation, single)).encode()).hexdigest()[:32]


def _read_scores(path: Path | None) -> dict[str, tuple[float, bool]]:
    """What an interrupted call has left: (summed log-probability, is greedy) by context and continuation."""
    scores: dict[str, tuple[float, bool]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path is not None and path.exists() else ():
        try:
            key, logp, greedy = json.loads(line)
        except ValueError:  # empty, or cut off by what stopped the call
            continue
        scores[key] = (logp, greedy)
    return scores
