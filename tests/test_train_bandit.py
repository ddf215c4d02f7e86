"""GRPO, RLOO and PPO on a bandit whose KL-regularised optimum is known in closed form.

Two contexts, ten arms, completions of one token. E[r] - beta KL(pi || start) is greatest where pi is proportional to
start exp(r / beta), and is beta log E_start[exp(r / beta)] there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig

from train.config import TrainConfig
from train.grpo import SharedPromptGRPOTrainer
from train.ppo import SharedPromptPPOTrainer
from train.rloo import SharedPromptRLOOTrainer

WORDS = ["<eos>", "<pad>", "a", "b", "c", "d", "e", "f", "g", "h"]
CONTEXTS = ["a b", "c d"]
BETA, GROUP = 0.5, 64
REWARDS = torch.rand(2, 10, generator=torch.Generator().manual_seed(0)) * 2 - 1


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<eos>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<pad>", unk_token="<eos>")


def policy() -> LlamaForCausalLM:
    torch.manual_seed(3)
    shape = {"vocab_size": 10, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "attn_implementation": "sdpa"}
    tokens = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    return LlamaForCausalLM(LlamaConfig(**shape, **heads, **tokens, initializer_range=0.2)).eval()


@torch.no_grad()
def distribution(model: Any) -> Tensor:
    """The policy's probabilities of the arms in the contexts, (2, 10)."""
    ids = torch.tensor([[WORDS.index(word) for word in context.split()] for context in CONTEXTS])
    return model(input_ids=ids).logits[:, -1].softmax(-1)


def paid(prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [REWARDS[CONTEXTS.index(prompt), ids[0]].item() for prompt, ids in zip(prompts, completion_ids, strict=True)]


def train(algorithm: str, out: Path, steps: int, **settings: Any) -> Any:
    arguments: dict[str, Any] = {
        "output_dir": str(out),
        "max_steps": steps,
        "per_device_train_batch_size": 2 * GROUP,
        "num_generations": GROUP,
        "max_completion_length": 1,
        "top_k": 0,
        "shuffle_dataset": False,
        "learning_rate": 2e-2,
        "lr_scheduler_type": "linear",
        "scale_rewards": "none",
        "loss_type": "dr_grpo",
        "beta": BETA,
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
    }
    common: dict[str, Any] = {
        "model": policy(),
        "reward_funcs": [paid],
        "args": GRPOConfig(**arguments),
        "train_dataset": Dataset.from_list([{"prompt": context} for context in CONTEXTS]),
        "processing_class": tokenizer(),
        "peft_config": LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
        "token_budget": 1024,
        "record": lambda *_: None,
        "keep": len,
    }
    if algorithm == "ppo":
        cfg = TrainConfig.model_validate({"algorithm": "ppo", "lora_rank": 8, "beta": BETA, **settings})
        trainer: Any = SharedPromptPPOTrainer(settings=cfg, **common)
    else:
        trainer = {"grpo": SharedPromptGRPOTrainer, "rloo": SharedPromptRLOOTrainer}[algorithm](**common)
    trainer.train()
    return trainer


def optimum(start: Tensor, rewards: Tensor) -> Tensor:
    weights = start * (rewards / BETA).exp()
    return weights / weights.sum(1, keepdim=True)


PPO = {"epochs": 2, "minibatches": 2, "critic_learning_rate": 2e-2, "value_clip": 1.0, "value_warmup_steps": 10}


@pytest.mark.parametrize(("algorithm", "settings"), [("grpo", {}), ("rloo", {}), ("ppo", PPO)])
def test_all_reach_the_optimum_in_closed_form(tmp_path: Path, algorithm: str, settings: dict[str, Any]) -> None:
    start = distribution(policy())
    best = optimum(start, REWARDS)
    assert (start - best).abs().sum(1).min() / 2 > 0.2  # there is some way to go
    trainer = train(algorithm, tmp_path, 120, **settings)
    reached = distribution(trainer.model)
    # GRPO's group mean contains the completion itself, which shrinks rewards, and not the KL term, by 1 - 1/G.
    target = optimum(start, REWARDS * (1 - 1 / GROUP)) if algorithm == "grpo" else best
    distance = (reached - target).abs().sum(1) / 2

    assert distance.max() < 0.05
    if algorithm == "ppo":
        value = BETA * (start * (REWARDS / BETA).exp()).sum(1).log()
        batch = {
            "prompt_ids": torch.tensor([[2, 3], [4, 5]]),
            "prompt_mask": torch.ones(2, 2, dtype=torch.long),
            "completion_ids": torch.tensor([[6], [6]]),
            "completion_mask": torch.ones(2, 1, dtype=torch.long),
        }
        with torch.no_grad():
            torch.testing.assert_close(trainer.values(batch)[:, 0], value, atol=0.1, rtol=0)
