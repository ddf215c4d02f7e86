"""Chat completions from a served model: any OpenAI-compatible endpoint (vLLM, `transformers serve`), OpenAI, Anthropic.

A model is named `https://host/v1/MODEL`, `openai/MODEL` or `anthropic/MODEL`. Keys come from the environment alone:
TRAITDOSE_API_KEY (may be missing for a local server), OPENAI_API_KEY, ANTHROPIC_API_KEY.

A failure that another attempt may mend (time-out, 408, 409, 429, 5xx, a body that is no completion) raises
TransientError, which `with_retries` answers with exponential back-off; what only the user can mend (a wrong key, an
unknown model, a parameter that the endpoint refuses) raises ValueError at once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_attempt, wait_exponential_jitter

from rewards.traits import describe

T = TypeVar("T")
Messages = list[dict[str, str]]

MAX_WAIT = 60.0  # seconds between two attempts, at most, whatever a Retry-After header asks for
TOP_LOGPROBS = 5  # alternatives a token; every endpoint known to give any gives five
TRANSIENT = (408, 409, 429)


class EndpointConfig(BaseModel):
    """A served model and how it is asked."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(description="Served model: https://host/v1/MODEL, openai/MODEL or anthropic/MODEL.")
    temperature: float | None = Field(
        0.0, ge=0, le=2, description="Sampling temperature; null for models that accept only their own."
    )
    max_tokens: int = Field(2048, ge=1, description="Tokens of an answer, at most, reasoning included.")
    max_concurrency: int = Field(8, ge=1, description="Requests under way at once.")
    timeout_seconds: float = Field(120.0, gt=0, description="Seconds until a request is given up and asked again.")
    attempts: int = Field(5, ge=1, description="How often one thing is asked before it counts as failed.")
    backoff_seconds: float = Field(
        1.0, ge=0, description="First wait between attempts; it doubles each time, up to a minute, plus up to a second."
    )

    @field_validator("model")
    @classmethod
    def _known_form(cls, model: str) -> str:
        split_model(model)
        return model


@dataclass(frozen=True)
class Token:
    """One token of an answer, its bytes, and its likeliest alternatives (itself among them) with log-probabilities."""

    raw: bytes
    alternatives: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Answer:
    """What came back; `cut` if max_tokens ended it. `tokens` is None where the endpoint gives no log-probabilities."""

    text: str
    cut: bool
    tokens: tuple[Token, ...] | None
    input_tokens: int
    output_tokens: int


class TransientError(Exception):
    """An answer that is missing or unusable; another attempt may mend it. `wait`: seconds asked for by the endpoint."""

    def __init__(self, message: str, wait: float = 0.0) -> None:
        super().__init__(message)
        self.wait = wait


class _Shape(BaseModel):
    """What is read of a completion. The client packages build their objects from any JSON without looking at it."""


class _Top(_Shape):
    token: str
    logprob: float


class _Logprob(_Top):
    bytes: list[int] | None = None
    top_logprobs: list[_Top] | None = None


class _Logprobs(_Shape):
    content: list[_Logprob] | None = None


class _Reply(_Shape):
    content: str


class _Choice(_Shape):
    message: _Reply
    finish_reason: str | None = None
    logprobs: _Logprobs | None = None


class _Usage(_Shape):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Completion(_Shape):
    choices: list[_Choice] = Field(min_length=1)
    usage: _Usage | None = None


class _Block(_Shape):
    type: str
    text: str = ""


class _AnthropicUsage(_Shape):
    input_tokens: int
    output_tokens: int


class _Message(_Shape):
    content: list[_Block]
    stop_reason: str | None = None
    usage: _AnthropicUsage


class Chat:
    """An open connection to the model of `cfg`; use it as `async with Chat(cfg) as chat`, in one event loop."""

    def __init__(self, cfg: EndpointConfig) -> None:
        self.cfg = cfg
        self.kind, self.base_url, self.model = split_model(cfg.model)
        self._stack = AsyncExitStack()
        self._client: Any = None

    async def __aenter__(self) -> Self:
        key = _key(self.kind)
        # the clients' own retries are off: with_retries decides, and counts
        settings: dict[str, Any] = {"api_key": key, "timeout": self.cfg.timeout_seconds, "max_retries": 0}
        if self.kind == "anthropic":
            from anthropic import AsyncAnthropic

            self._client = await self._stack.enter_async_context(AsyncAnthropic(**settings))
        else:
            from openai import AsyncOpenAI

            self._client = await self._stack.enter_async_context(AsyncOpenAI(base_url=self.base_url, **settings))
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._stack.aclose()

    async def complete(
        self, messages: Messages, *, logprobs: bool = False, schema: dict[str, Any] | None = None
    ) -> Answer:
        """One completion, asked for once. `schema` is a JSON schema for endpoints that can hold an answer to it.

        Raises TransientError or ValueError, see above.
        """
        try:
            if self.kind == "anthropic":
                return await self._anthropic(messages, schema)
            return await self._openai(messages, logprobs, schema)
        except (json.JSONDecodeError, UnicodeDecodeError, ValidationError) as error:
            raise TransientError(f"{self.cfg.model}: no completion ({_one_line(error)})") from error
        except Exception as error:
            if type(error).__module__.partition(".")[0] not in ("openai", "anthropic"):
                raise
            raise self._sorted(error) from error

    async def _openai(self, messages: Messages, logprobs: bool, schema: dict[str, Any] | None) -> Answer:
        limit = "max_completion_tokens" if self.kind == "openai" else "max_tokens"  # reasoning models refuse the latter
        request: dict[str, Any] = {"model": self.model, "messages": messages, limit: self.cfg.max_tokens}
        if self.cfg.temperature is not None:
            request["temperature"] = self.cfg.temperature
        if logprobs:
            request |= {"logprobs": True, "top_logprobs": TOP_LOGPROBS}
        if schema is not None:
            form = {"name": "answer", "schema": schema, "strict": True}
            request["response_format"] = {"type": "json_schema", "json_schema": form}
        done = _Completion.model_validate(await self._client.chat.completions.create(**request), from_attributes=True)
        choice = done.choices[0]
        given = choice.logprobs.content if choice.logprobs else None
        tokens = tuple(_token(token) for token in given) if given else None
        usage = done.usage or _Usage()
        cut = choice.finish_reason == "length"
        return Answer(choice.message.content, cut, tokens, usage.prompt_tokens, usage.completion_tokens)

    async def _anthropic(self, messages: Messages, schema: dict[str, Any] | None) -> Answer:
        system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
        turns = [message for message in messages if message["role"] != "system"]
        request: dict[str, Any] = {"model": self.model, "messages": turns, "max_tokens": self.cfg.max_tokens}
        if system:
            request["system"] = system
        if self.cfg.temperature is not None:
            request["extra_body"] = {"temperature": self.cfg.temperature}  # the client has no argument for it any more
        if schema is not None:
            request["output_config"] = {"format": {"type": "json_schema", "schema": schema}}
        done = _Message.model_validate(await self._client.messages.create(**request), from_attributes=True)
        text = "".join(block.text for block in done.content if block.type == "text")
        return Answer(text, done.stop_reason == "max_tokens", None, done.usage.input_tokens, done.usage.output_tokens)

    def _sorted(self, error: Exception) -> Exception:
        """TransientError or ValueError for an error of a client package."""
        status = getattr(error, "status_code", None)
        text = f"{self.cfg.model}: {_one_line(error) or type(error).__name__}"
        if status is None or status < 400 or status in TRANSIENT or status >= 500:
            return TransientError(text, _retry_after(error))
        return ValueError(f"{text}; {_remedy(self.kind, status)}")


async def with_retries(cfg: EndpointConfig, attempt: Callable[[], Awaitable[T]]) -> T:
    """The result of `attempt`, which is made up to cfg.attempts times. Raises the last attempt's TransientError."""
    backoff = wait_exponential_jitter(initial=cfg.backoff_seconds, max=MAX_WAIT, jitter=min(1.0, cfg.backoff_seconds))

    def wait(state: RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        return max(backoff(state), min(MAX_WAIT, error.wait if isinstance(error, TransientError) else 0.0))

    async for trial in AsyncRetrying(
        stop=stop_after_attempt(cfg.attempts), wait=wait, retry=retry_if_exception_type(TransientError), reraise=True
    ):
        with trial:
            return await attempt()
    raise AssertionError("tenacity reraises the last failure")


def endpoint_config(kind: type[EndpointConfig], model: str, changes: list[str] | None = None, **fixed: Any) -> Any:
    """A config of the given kind from a model and `key=value` changes. Raises ValueError for what is not right."""
    from omegaconf import OmegaConf

    words = changes or []
    if bad := [word for word in words if "=" not in word]:
        raise ValueError(f"{bad[0]!r} is no key=value; there are: {', '.join(kind.model_fields)}")
    values: Any = OmegaConf.to_container(OmegaConf.from_dotlist(words))
    try:
        return kind.model_validate({"model": model, **fixed, **values})
    except ValidationError as error:
        raise ValueError(f"{'; '.join(describe(error))}; there are: {', '.join(kind.model_fields)}") from None


def split_model(name: str) -> tuple[str, str | None, str]:
    """(kind, base URL or None, model) of a name such as http://localhost:8000/v1/org/model or anthropic/claude-..."""
    if name.startswith(("http://", "https://")):
        base, found, model = name.partition("/v1/")
        if found and model:
            return "compatible", f"{base}/v1", model
    else:
        kind, _, model = name.partition("/")
        if kind in ("openai", "anthropic") and model:
            return kind, None, model
    raise ValueError(
        f"model {name!r} is not a served model; write http://host:port/v1/MODEL, openai/MODEL or anthropic/MODEL"
    )


def _key(kind: str) -> str:
    variable = {"openai": "OPENAI_API_KEY", "anthropic": "ANTHROPIC_API_KEY"}.get(kind)
    if variable is None:
        return os.environ.get("TRAITDOSE_API_KEY") or "none"  # the client wants one, a local server takes any
    if not os.environ.get(variable):
        raise ValueError(f"{variable} is not set; export it, or name a local model: http://host:port/v1/MODEL")
    return os.environ[variable]


def _remedy(kind: str, status: int) -> str:
    if status in (401, 403):
        variable = {"openai": "OPENAI_API_KEY", "anthropic": "ANTHROPIC_API_KEY"}.get(kind, "TRAITDOSE_API_KEY")
        return f"check {variable}"
    if status == 404:
        return "check the address and the model's name"
    return "change the setting that it refuses, for example logprobs=false, json_schema=false or temperature=null"


def _retry_after(error: Exception) -> float:
    """Seconds of a Retry-After header; 0 without one, or with a date."""
    headers = getattr(getattr(error, "response", None), "headers", None) or {}
    try:
        return max(0.0, float(headers.get("retry-after", 0)))
    except ValueError:
        return 0.0


def _token(given: _Logprob) -> Token:
    raw = bytes(given.bytes) if given.bytes is not None else given.token.encode()
    alternatives = {top.token: top.logprob for top in (*(given.top_logprobs or ()), given)}
    return Token(raw, tuple(alternatives.items()))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
