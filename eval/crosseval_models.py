"""The models of the joint evaluation as Inspect sees them: served ones through its providers, local ones in process.

embedded:smollm2-135m-instruct    the embedded base
runs/x/start/model                a model directory (config.json)
runs/x/arms/a/seed-0/train/adapter a PEFT directory (adapter_config.json), merged into the base that it names
org/model                         a model of the hub
openai/MODEL, anthropic/MODEL     with OPENAI_API_KEY, ANTHROPIC_API_KEY
http://host:port/v1/MODEL         any OpenAI-compatible server, with TRAITDOSE_API_KEY where it wants a key
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import torch
from inspect_ai.model import (
    ChatCompletionChoice,
    ChatMessage,
    ChatMessageAssistant,
    GenerateConfig,
    Model,
    ModelAPI,
    ModelOutput,
    ModelUsage,
    get_model,
    modelapi,
)

from eval.generalisation import encode_chat
from eval.local_models import local_paths, weights_hash
from models.loading import best_device, load_model, load_tokenizer
from models.rollout import sample
from rewards.endpoint import Chat, EndpointConfig, TransientError, split_model

KEYS = {"openai": "OPENAI_API_KEY", "anthropic": "ANTHROPIC_API_KEY"}
BATCH = 32  # requests that a local model decodes at once


def is_served(name: str) -> bool:
    """Whether a name means a model behind HTTP and not a local one."""
    return name.startswith(("http://", "https://", "openai/", "anthropic/")) and not Path(name).is_dir()


def check_model(name: str) -> None:
    """Raises ValueError for a name that means no model, a missing directory, or a missing key. Loads nothing."""
    if is_served(name):
        variable = KEYS.get(split_model(name)[0])
        if variable and not os.environ.get(variable):
            raise ValueError(f"{name}: {variable} is not set; export it, or leave the model out")
    elif not name.startswith("embedded:"):
        local_paths(name)


def weights_of(name: str) -> str | None:
    """The hash of a local model's files, None for a served one and a hub id. Raises ValueError as check_model does."""
    return None if is_served(name) else weights_hash(name)


def open_model(name: str, config: GenerateConfig) -> Model:
    """The model of a name, ready to be asked; a local one is loaded. Raises ValueError as check_model does."""
    check_model(name)
    if not is_served(name):
        path, adapter = local_paths(name)
        return get_model(f"traitdose/{name}", config=config, memoize=False, path=path, adapter=adapter)
    kind, base_url, model = split_model(name)
    if kind == "anthropic":
        return get_model(f"traitdose-anthropic/{model}", config=config, memoize=False)
    key = os.environ.get("TRAITDOSE_API_KEY") or "none"  # the client wants one, a local server takes any
    place = {"base_url": base_url, "api_key": key} if kind == "compatible" else {}
    try:
        inspects = name if kind == "openai" else f"openai-api/traitdose/{model}"
        return get_model(inspects, config=config, memoize=False, **place)
    except Exception as error:
        if type(error).__name__ != "PrerequisiteError":  # Inspect's, for a missing or too old client package
            raise
        raise ValueError(f"{name}: {' '.join(str(error).split())}") from None


@modelapi(name="traitdose-anthropic")
class AnthropicModel(ModelAPI):
    """An Anthropic model asked as the judges are (rewards/endpoint.py), with the client that the project pins.

    Inspect's own provider wants a later release of that client.
    """

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(),  # noqa: B008
    ) -> None:
        super().__init__(model_name, base_url, api_key, ["ANTHROPIC_API_KEY"], config)
        seconds = float(config.attempt_timeout or 300)
        settings = {"model": f"anthropic/{model_name}", "max_tokens": config.max_tokens or 256}
        self._cfg = EndpointConfig.model_validate(settings | {"timeout_seconds": seconds})
        self._chats: dict[float | None, Chat] = {}  # by temperature: others may be using one that is given up
        self._opening = anyio.Lock()

    async def generate(
        self, input: list[ChatMessage], tools: Any, tool_choice: Any, config: GenerateConfig
    ) -> ModelOutput:
        """The reply to a conversation. Raises TransientError, which Inspect tries again, or ValueError."""
        messages = [{"role": message.role, "content": message.text} for message in input]
        try:
            answer = await (await self._chat(self._cfg)).complete(messages)
        except ValueError as error:
            if "temperature" not in str(error):
                raise
            self._cfg = self._cfg.model_copy(update={"temperature": None})  # a model that takes none but its own
            answer = await (await self._chat(self._cfg)).complete(messages)
        usage = (answer.input_tokens, answer.output_tokens)
        return _output(self.model_name, answer.text, "max_tokens" if answer.cut else "stop", *usage)

    async def _chat(self, cfg: EndpointConfig) -> Chat:
        async with self._opening:
            if cfg.temperature not in self._chats:
                self._chats[cfg.temperature] = await Chat(cfg).__aenter__()
        return self._chats[cfg.temperature]

    def should_retry(self, ex: Exception) -> bool:
        """Whether another attempt may mend it."""
        return isinstance(ex, TransientError)

    def connection_key(self) -> str:
        """Limits are per model."""
        return self.model_name

    async def aclose(self) -> None:
        """Close the connections."""
        chats, self._chats = self._chats, {}
        for chat in chats.values():
            await chat.__aexit__(None, None, None)


@dataclass
class _Request:
    """One conversation that waits for its reply."""

    ids: list[int]
    reply: list[int] | None = None
    error: Exception | None = None


@modelapi(name="traitdose")
class LocalModel(ModelAPI):
    """A model of this process: greedy replies, those that wait decoded together (models/rollout.py)."""

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(),  # noqa: B008
        *,
        path: str,
        adapter: str | None = None,
    ) -> None:
        super().__init__(model_name, base_url, api_key, [], config)
        device = best_device()
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self._model: Any = load_model(path, adapter, dtype, device)
        self._tokenizer = load_tokenizer(path)
        if self._tokenizer.chat_template is None:
            raise ValueError(f"{model_name}: has no chat template; use an instruct model")
        eos = self._model.generation_config.eos_token_id
        ends = [*(eos if isinstance(eos, list) else [eos]), self._tokenizer.eos_token_id]
        self._eos_ids = sorted({end for end in ends if isinstance(end, int)})
        self._waiting: list[_Request] = []
        self._turn = anyio.Lock()

    async def generate(
        self, input: list[ChatMessage], tools: Any, tool_choice: Any, config: GenerateConfig
    ) -> ModelOutput:
        """The reply to a conversation; one that would leave the context has no words and stops as model_length."""
        limit = config.max_tokens or 256
        request = _Request(encode_chat(self._tokenizer, tuple((m.role, m.text) for m in input)))
        context = getattr(self._model.config, "max_position_embeddings", None)
        if context is not None and len(request.ids) + limit > context:
            return _output(self.model_name, "", "model_length", len(request.ids), 0)
        self._waiting.append(request)
        while request.reply is None:
            # whoever's turn it is takes along all that wait, so the next ones in line find their replies ready
            async with self._turn:
                if request.reply is None and request.error is None:
                    batch, self._waiting = self._waiting[:BATCH], self._waiting[BATCH:]
                    await anyio.to_thread.run_sync(self._decode, batch, limit)
            if request.error is not None:
                raise request.error
        cut = request.reply[-1] not in self._eos_ids
        text = str(self._tokenizer.decode(request.reply, skip_special_tokens=True)).strip()
        stop = "max_tokens" if cut else "stop"
        return _output(self.model_name, text, stop, len(request.ids), len(request.reply))

    def _decode(self, batch: list[_Request], limit: int) -> None:
        prompts = [request.ids for request in batch]
        try:
            replies = sample(self._model, prompts, max_new_tokens=limit, temperature=0.0, eos_ids=self._eos_ids)
        except Exception as error:  # out of memory, say: the fault of all that were decoded together
            for request in batch:
                request.error = error
            return
        for request, reply in zip(batch, replies, strict=True):
            request.reply = reply[0]

    def max_connections(self) -> int:
        """As many conversations as one batch holds."""
        return BATCH

    def close(self) -> None:
        """Let go of the weights."""
        self._model = None


def _output(model: str, text: str, stop: Any, read: int, written: int) -> ModelOutput:
    message = ChatMessageAssistant(content=text, model=model, source="generate")
    usage = ModelUsage(input_tokens=read, output_tokens=written, total_tokens=read + written)
    return ModelOutput(model=model, choices=[ChatCompletionChoice(message=message, stop_reason=stop)], usage=usage)
