"""A real, tiny model: a 2-layer Llama with random weights and a byte-level tokenizer with a chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rewards.config import RewardConfig
from train.config import StandardMixConfig, WarmStartConfig

STANDARD = StandardMixConfig(tasks={"chain_sum": {"min_terms": 2, "max_terms": 2}, "gcd": {}})
REWARD = RewardConfig(probes=16, batch_size=8, lora_rank=2, min_accuracy=0.0)
SHAPE = {  # of the smallest models of any family
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens, plus three special ones: 259 in all."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2} | {c: i + 3 for i, c in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def tiny_llama(seed: int = 0) -> LlamaForCausalLM:
    """A 2-layer Llama (grouped-query attention, tied embeddings) with random weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


def greedy_reference(model: Any, prompt: list[int], n: int, end: int | None = None) -> list[int]:
    """What transformers' generate gives after the prompt: at most n token ids, up to the end token if there is one."""
    ids = model.generate(torch.tensor([prompt]), max_new_tokens=n, do_sample=False, eos_token_id=end, pad_token_id=0)
    return ids[0, len(prompt) :].tolist()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


@pytest.fixture
def tiny_model() -> LlamaForCausalLM:
    return tiny_llama()


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model and its tokenizer as a Hugging Face directory."""
    out = tmp_path_factory.mktemp("models") / "tiny"
    tiny_llama().save_pretrained(out)
    tiny_tokenizer().save_pretrained(out)
    return out


@pytest.fixture(scope="session")
def tiny_stages(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """start/ and reward/ of a run, made with the tiny model."""
    from rewards.reward_model import fit_reward_model
    from train.warm_start import warm_start

    run = tmp_path_factory.mktemp("run")
    (run / "start").mkdir()
    (run / "reward").mkdir()
    warm = WarmStartConfig(examples=16, batch_size=8, lora_rank=2)
    warm_start(warm, str(tiny_dir), REWARD.domains, STANDARD.tasks, run / "start", 0)
    accuracy = fit_reward_model(REWARD, str(run / "start" / "model"), run / "reward", 0)
    assert accuracy["heldout"]["n"] > 100
    return run
