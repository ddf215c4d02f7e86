"""A system prompt for an evaluation: the arm that is told its principles instead of being trained on them.

- generalisation: every chat begins with it. A chat that brings a system message of its own keeps it, after this one.
- capability: lm-eval's `system_instruction`, the text in front of every question; the context may be longer by it.
"""

from __future__ import annotations

import copy
import json

from transformers import PreTrainedTokenizerBase


def with_system_prompt(tokenizer: PreTrainedTokenizerBase, system: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer, or a copy whose chat template puts `system` before every chat.

    Raises ValueError for a template that takes no system message.
    """
    if system is None:
        return tokenizer
    told = copy.deepcopy(tokenizer)
    text = json.dumps(system)  # a JSON string is a Jinja string
    told.chat_template = (
        "{%- if messages[0]['role'] == 'system' -%}"
        f"{{%- set own = {text} + '\\n\\n' + messages[0]['content'] -%}}"
        "{%- set messages = [{'role': 'system', 'content': own}] + messages[1:] -%}"
        "{%- else -%}"
        f"{{%- set messages = [{{'role': 'system', 'content': {text}}}] + messages -%}}"
        "{%- endif -%}" + str(tokenizer.chat_template)
    )
    chat = [{"role": "user", "content": "?"}]
    try:
        shown = str(told.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # templates refuse by an error of their own
        raise ValueError(_refused(tokenizer, str(error))) from error
    if system not in shown:
        raise ValueError(_refused(tokenizer, "it leaves system messages out"))
    return told


def _refused(tokenizer: PreTrainedTokenizerBase, reason: str) -> str:
    return (
        f"base: the chat template of {tokenizer.name_or_path!r} takes no system message ({reason}); use another "
        "base, or remove the constitution-prompt arm"
    )
