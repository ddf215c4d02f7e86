"""Asking a served model: names, what is sent, and every kind of failure over real HTTP."""

from __future__ import annotations

import asyncio
import socket
import time
from typing import Any

import pytest
from chat_server import Reply, completion, failure, message, serve

from rewards.endpoint import Answer, Chat, EndpointConfig, TransientError, endpoint_config, split_model, with_retries

HELLO = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]


def ask(model: str, **settings: Any) -> Answer:
    cfg = EndpointConfig(model=model, **({"backoff_seconds": 0.0, "timeout_seconds": 5.0} | settings))

    async def run() -> Answer:
        async with Chat(cfg) as chat:
            return await with_retries(cfg, lambda: chat.complete(HELLO))

    return asyncio.run(run())


def test_a_model_is_named_by_its_endpoint_or_its_maker():
    assert split_model("http://localhost:8000/v1/org/model") == ("compatible", "http://localhost:8000/v1", "org/model")
    assert split_model("http://h:1/v1//models/mine") == ("compatible", "http://h:1/v1", "/models/mine")
    assert split_model("openai/gpt-x") == ("openai", None, "gpt-x")
    assert split_model("anthropic/claude-x") == ("anthropic", None, "claude-x")
    for name in ("gpt-x", "org/model", "http://localhost:8000/model", "http://localhost:8000/v1/", "openai/"):
        with pytest.raises(ValueError, match="write http://host:port/v1/MODEL"):
            split_model(name)


def test_changes_are_checked_by_key_and_value():
    cfg = endpoint_config(EndpointConfig, "openai/x", ["temperature=null", "max_tokens=7"])
    assert (cfg.temperature, cfg.max_tokens) == (None, 7)
    with pytest.raises(ValueError, match=r"max_tokns: is not a known key.*max_tokens"):
        endpoint_config(EndpointConfig, "openai/x", ["max_tokns=7"])
    with pytest.raises(ValueError, match="max_tokens: is 0"):
        endpoint_config(EndpointConfig, "openai/x", ["max_tokens=0"])
    with pytest.raises(ValueError, match="'logprobs' is no key=value"):
        endpoint_config(EndpointConfig, "openai/x", ["logprobs"])


def test_a_local_server_gets_the_request_and_needs_no_key(monkeypatch):
    monkeypatch.delenv("TRAITDOSE_API_KEY", raising=False)
    with serve(lambda body, n: completion("hi")) as server:
        answer = ask(f"{server.url}/v1/org/model", max_tokens=9)
        monkeypatch.setenv("TRAITDOSE_API_KEY", "key-1")
        ask(f"{server.url}/v1/org/model", temperature=None)
    assert answer == Answer("hi", False, None, 100, 10)
    first, second = server.requests
    assert first == {
        "path": "/v1/chat/completions", "model": "org/model", "messages": HELLO, "max_tokens": 9, "temperature": 0.0
    }  # fmt: skip
    assert "temperature" not in second
    assert {k.lower(): v for k, v in server.headers[1].items()}["authorization"] == "Bearer key-1"


def test_openai_and_anthropic_are_asked_in_their_own_form(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "key-2")
    monkeypatch.setenv("ANTHROPIC_API_KEY", "key-3")
    with serve(lambda body, n: message("hi") if "system" in body else completion("ho")) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", f"{server.url}/v1")
        monkeypatch.setenv("ANTHROPIC_BASE_URL", server.url)
        assert ask("openai/gpt-x").text == "ho"
        answer = ask("anthropic/claude-x", max_tokens=9)
    assert answer == Answer("hi", False, None, 100, 10)
    openai, anthropic = server.requests
    assert (openai["max_completion_tokens"], "max_tokens" in openai) == (2048, False)
    assert anthropic["path"] == "/v1/messages"
    assert (anthropic["system"], anthropic["messages"]) == ("Be brief.", HELLO[1:])
    assert (anthropic["max_tokens"], anthropic["temperature"]) == (9, 0.0)
    assert {k.lower(): v for k, v in server.headers[1].items()}["x-api-key"] == "key-3"


def test_a_missing_key_is_named(monkeypatch):
    monkeypatch.delenv("ANTHROPIC_API_KEY", raising=False)
    with pytest.raises(ValueError, match="ANTHROPIC_API_KEY is not set"):
        ask("anthropic/claude-x")


@pytest.mark.parametrize(
    "bad",
    [
        failure(429, retry_after="0"),
        failure(500),
        failure(503),
        failure(408),
        Reply(b"<html>gateway</html>", content_type="text/html"),
        Reply(b'{"choices": ['),
        Reply(b'{"choices": []}'),
        Reply(b'{"choices": [{"message": {"content": null}}]}'),
        Reply(b'{"choices": ["x"]}'),
        Reply(b'"choices"'),
        Reply(b""),
        Reply(b"\xff\xfe\x00"),
        Reply(b"{}", delay=1.5),  # past the time-out
    ],
    ids=["429", "500", "503", "408", "html", "cut", "empty-list", "null", "shape", "string", "empty", "bytes", "slow"],
)
def test_a_passing_failure_is_asked_again(bad):
    with serve(lambda body, n: bad if n < 2 else completion("hi")) as server:
        url = f"{server.url}/v1/m"
        timeout = 0.3 if bad.delay else 5.0
        assert ask(url, attempts=3, timeout_seconds=timeout).text == "hi"
        assert len(server.requests) == 3
    with serve(lambda body, n: bad) as server:
        with pytest.raises(TransientError, match="/v1/m"):
            ask(f"{server.url}/v1/m", attempts=2, timeout_seconds=timeout)
        assert len(server.requests) == 2


@pytest.mark.parametrize(
    ("status", "remedy"),
    [(401, "TRAITDOSE_API_KEY"), (404, "the model's name"), (400, "logprobs=false"), (422, "logprobs=false")],
)
def test_what_the_user_has_to_mend_is_not_asked_twice(status, remedy):
    with serve(lambda body, n: failure(status, "logprobs are not supported")) as server:
        with pytest.raises(ValueError, match=remedy) as error:
            ask(f"{server.url}/v1/m")
        assert "not supported" in str(error.value)
        assert len(server.requests) == 1


def test_a_server_that_is_not_there_is_a_passing_failure():
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(TransientError, match="onnection"):
        ask(f"http://127.0.0.1:{port}/v1/m", attempts=2)


def test_waits_double_and_a_server_may_ask_for_more():
    for first, least in ((failure(500), 0.3), (failure(429, retry_after="0.7"), 0.8)):
        with serve(lambda body, n, first=first: [first, failure(500), completion("hi")][n]) as server:
            start = time.monotonic()
            ask(f"{server.url}/v1/m", backoff_seconds=0.1)
            assert least <= time.monotonic() - start < least + 5


def test_a_text_that_was_cut_is_marked():
    with serve(lambda body, n: completion("hi", finish="length")) as server:
        assert ask(f"{server.url}/v1/m").cut
