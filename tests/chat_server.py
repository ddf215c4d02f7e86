"""A small HTTP server on this machine that speaks the chat-completions protocol and fails when it is told to."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Reply:
    """One HTTP response."""

    body: bytes
    status: int = 200
    content_type: str = "application/json"
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0  # seconds before anything is sent


@dataclass
class Server:
    """What the server saw."""

    url: str
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    most_at_once: int = 0


def completion(text: str, tokens: list[dict[str, Any]] | None = None, finish: str = "stop") -> Reply:
    """A chat completion, with log-probabilities if tokens are given."""
    choice: dict[str, Any] = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
    choice["logprobs"] = None if tokens is None else {"content": tokens}
    usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
    record = {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage}
    return Reply(json.dumps(record).encode())


def message(text: str) -> Reply:
    """The same in Anthropic's form."""
    content = [{"type": "text", "text": text}]
    usage = {"input_tokens": 100, "output_tokens": 10}
    record = {"id": "x", "type": "message", "role": "assistant", "model": "m", "content": content, "usage": usage}
    return Reply(json.dumps(record | {"stop_reason": "end_turn", "stop_sequence": None}).encode())


def failure(status: int, text: str = "no", **headers: str) -> Reply:
    """An error in the protocol's form."""
    return Reply(json.dumps({"error": {"message": text, "type": "t"}}).encode(), status, headers=headers)


def verdicts(*met: bool) -> str:
    """A judge's answer."""
    entries = [{"criterion": i, "evidence": f"line {i}", "met": value} for i, value in enumerate(met, start=1)]
    return json.dumps({"verdicts": entries})


def tokens_with(text: str, probabilities: list[float]) -> list[dict[str, Any]]:
    """`text` in tokens of one character, except that true and false are whole, with P(true) as given, in order.

    Each decision leaves 0.1 of its mass to a word that is neither.
    """
    found: list[dict[str, Any]] = []
    given = iter(probabilities)
    place = 0
    while place < len(text):
        word = next((w for w in ("true", "false") if text.startswith(w, place)), text[place])
        tops = [{"token": word, "logprob": 0.0, "bytes": list(word.encode())}]
        if len(word) > 1:
            p = next(given)
            masses = {"true": 0.9 * p, "false": 0.9 * (1 - p), "perhaps": 0.1}
            tops = [{"token": w, "logprob": math.log(m) if m else -9999.0, "bytes": None} for w, m in masses.items()]
        own = next(top for top in tops if top["token"] == word)
        found.append(own | {"top_logprobs": tops, "bytes": list(word.encode())})
        place += len(word)
    return found


class HTTPServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # connections that may wait to be taken


@contextmanager
def serve(answer: Callable[[dict[str, Any], int], Reply]) -> Iterator[Server]:
    """A running server. `answer` gets the request's body and its number, from 0."""
    seen = Server("")
    lock = threading.Lock()
    now = 0

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            nonlocal now
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            with lock:
                number = len(seen.requests)
                seen.requests.append(body | {"path": self.path})
                seen.headers.append(dict(self.headers))
                now += 1
                seen.most_at_once = max(seen.most_at_once, now)
            try:
                reply = answer(body, number)
                time.sleep(reply.delay)
            finally:
                with lock:
                    now -= 1
            try:
                self.send_response(reply.status)
                self.send_header("content-type", reply.content_type)
                self.send_header("content-length", str(len(reply.body)))
                for name, value in reply.headers.items():
                    self.send_header(name.replace("_", "-"), value)
                self.end_headers()
                self.wfile.write(reply.body)
            except OSError:
                pass  # the client has given up on this request

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    seen.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield seen
    finally:
        server.shutdown()
        server.server_close()
