"""TRL's SFTTrainer without padding: examples stand one behind the other, and only answers reach the LM head.

The loss is TRL's with completion_only_loss: the mean over the answers' tokens of a batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from trl import SFTConfig, SFTTrainer

from models.checkpoints import SealedTrainer
from models.fused_lora import fuse_lora
from models.replies import Messages, encode
from models.self_check import sharing_problem
from models.shared_prompt import Tree, base_model, packed_logps, packs

TOKEN_BUDGET = 1024  # of one packed forward; a longer example stands alone


class PackedSFTTrainer(SealedTrainer, SFTTrainer):
    """SFTTrainer on rows of sft_row.

    Raises ValueError for a model whose log-probabilities with shared prompts are not its own (models/self_check.py).
    """

    args: SFTConfig

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(data_collator=sft_batch, **kwargs)
        model = self.accelerator.unwrap_model(self.model)
        # Rounding is no reason to refuse, and it grows with the model.
        if (problem := sharing_problem(model, exact=False)) is not None:
            name = base_model(model).config.name_or_path or "the model"
            raise ValueError(f"{name} cannot be fine-tuned on packed examples: {problem}; use another base")
        fuse_lora(model)

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset  # sft_row has tokenised it

    def compute_loss(
        self, model: Any, inputs: Mapping[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean negative log-likelihood of the batch's answer tokens."""
        trees: list[Tree] = inputs["trees"]
        model, device = self.accelerator.unwrap_model(model), self.accelerator.device
        with self.accelerator.autocast():
            parts = [packed_logps(model, packed) for packed in packs(trees, TOKEN_BUDGET, device)]
        logps_N, entropies_N = (torch.cat(values) for values in zip(*parts, strict=True))
        metrics = self._metrics["train" if model.training else "eval"]
        metrics["entropy"].append(entropies_N.mean().item())
        self._total_train_tokens += sum(len(tree) for tree in trees)
        metrics["num_tokens"] = [self._total_train_tokens]
        return (-logps_N.mean(), {}) if return_outputs else -logps_N.mean()


def sft_row(tokenizer: Any, prompt: Messages, answer: str) -> dict[str, list[int]]:
    """prompt_ids and answer_ids of one example, the answer closed by the end of turn."""
    return {
        "prompt_ids": encode(tokenizer, prompt),
        "answer_ids": [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id],
    }


def row_tokens(row: Mapping[str, Any]) -> int:
    """Tokens of a row, prompt and answer."""
    return len(row["prompt_ids"]) + len(row["answer_ids"])


def sft_batch(rows: Sequence[Mapping[str, list[int]]]) -> dict[str, list[Tree]]:
    """Collate rows of sft_row: a tree with one branch for each."""
    return {"trees": [Tree(row["prompt_ids"], [row["answer_ids"]]) for row in rows]}
