"""Load policies and tokenizers from a hub id, a local directory, or the embedded base."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from models.embedded import embedded_model
from models.linear import use_fastest


def resolve_model(name: str) -> str:
    """What from_pretrained takes for `name`: an embedded model's directory, a local directory, or a hub id.

    Raises ValueError for a path that is not a model directory.
    """
    if name.startswith("embedded:"):
        return str(embedded_model(name))
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").exists():
            raise ValueError(f"base: {name} has no config.json, so it is not a Hugging Face model directory")
        return str(path)
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ValueError(
            f"base: {name!r} is neither a directory nor a hub id; use a path with a config.json, a hub id such as "
            "org/model, or embedded:smollm2-135m-instruct"
        )
    return name


def load_model(
    name: str,
    adapter: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    attention: str = "sdpa",
    use_kernels: bool = False,
) -> PreTrainedModel:
    """A causal language model in eval mode; a PEFT adapter, if given, is merged into its weights.

    On a CPU the faster library computes its linear layers (models/linear.py).
    attention: transformers' attn_implementation. use_kernels: layers from the kernels hub, on CUDA.
    """
    with _missing_explained(name):
        model: Any = AutoModelForCausalLM.from_pretrained(
            resolve_model(name), dtype=dtype, attn_implementation=attention, use_kernels=use_kernels
        )
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return use_fastest(model.to(torch.device(device)).eval())


@contextmanager
def _missing_explained(name: str) -> Iterator[None]:
    """A model that is not there, here or at the hub, as a ValueError; transformers raises OSError without a path."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:  # a full disk, a folder that may not be read
            raise
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"base: {name!r} is no model folder here, and the hub did not give it: {reason}") from error


def best_device() -> str:
    """A CUDA device if there is one, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with a pad token (its own or, where it has none, the end-of-sequence token)."""
    with _missing_explained(name):
        tokenizer = AutoTokenizer.from_pretrained(resolve_model(name))
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
