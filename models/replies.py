"""Replies of a model to whole chats, each with its own noise and its count of tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from models.kv_cache import common_beginning
from models.rollout import sample

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Reply:
    """A sampled reply; `encoded` and `generated` count the tokens that were read for it and its own.

    What all chats of a call begin with is read once, and counted with the first of them.
    """

    text: str
    encoded: int
    generated: int


def encode(tokenizer: Any, chat: Messages) -> list[int]:
    """The token ids of a chat up to where the assistant begins to speak."""
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def reply(
    model: Any,
    tokenizer: Any,
    chats: Sequence[Messages],
    keys: Sequence[str],
    max_new_tokens: int,
    temperature: float,
    batch_size: int = 32,
) -> list[Reply]:
    """One reply to every chat; its noise is a function of its key alone, whatever else is sampled beside it."""
    prompts = [encode(tokenizer, chat) for chat in chats]
    sampled = sample(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        eos_ids=[tokenizer.eos_token_id],
        generator=[torch.Generator(model.device).manual_seed(_seed(key)) for key in keys],
        batch_size=batch_size,
    )
    begun = common_beginning(model, prompts)
    read = [len(prompt) - (begun if i else 0) for i, prompt in enumerate(prompts)]
    return [
        Reply(str(tokenizer.decode(ids, skip_special_tokens=True)).strip(), encoded, len(ids))
        for encoded, (ids,) in zip(read, sampled, strict=True)
    ]


def _seed(key: str) -> int:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1
