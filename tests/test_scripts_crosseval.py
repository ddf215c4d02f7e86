"""`traitdose crosseval` over real HTTP: several models in one call, limits, failures, resumption."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from chat_server import Reply, completion, failure, message, serve
from click.testing import Result
from interview_policies import answers_by_chat, chat_key, flatterer, honest, refuser
from typer.testing import CliRunner

from eval.crosseval_cost import Tokens
from eval.crosseval_items import PARTS, load_interviews
from eval.crosseval_log import Settings, read_record
from eval.crosseval_models import open_model
from models.embedded import embedded_model
from scripts.cli import app
from tests.conftest import tiny_llama

EMBEDDED = "embedded:smollm2-135m-instruct"
PLAYED = {
    name: answers_by_chat([item for part in PARTS for item in load_interviews(part, 4)], policy)
    for name, policy in (("honest", honest), ("flatterer", flatterer), ("refuser", refuser))
}


def played(body: dict[str, Any], _number: int = 0) -> Reply:
    """The reply of the policy that the request's model names; as a judge, no."""
    if body["model"] == "judge":
        return completion("Nothing to object to.\nAnswer: no")
    return completion(PLAYED[body["model"]][chat_key(body)])


def crosseval(out: Path, models: list[str], *more: str) -> Result:
    return CliRunner().invoke(app, ["crosseval", "--models", *models, "--out", str(out), "--max-tokens", "8", *more])


def results(out: Path) -> dict[str, Any]:
    return json.loads((out / "crosseval.json").read_text(encoding="utf-8"))


_watched: list[set[tuple[str, Any]]] = []


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    here = threading.current_thread() is threading.main_thread()  # other tests may have left threads behind
    if _watched and here and event in ("socket.connect", "socket.bind", "socket.getaddrinfo"):
        _watched[-1].add((event, arguments[1] if event != "socket.getaddrinfo" else arguments[0]))


sys.addaudithook(_watch)


@contextmanager
def sockets() -> Iterator[set[tuple[str, Any]]]:
    """What the main thread connects to, listens at and looks up meanwhile."""
    _watched.append(set())
    try:
        yield _watched[-1]
    finally:
        _watched.pop()


def test_three_models_are_compared_in_one_call(tmp_path: Path, tiny_dir: Path) -> None:
    """Two served and one local model; one rate-limited answer; nothing but the models is spoken to."""

    def answer(body: dict[str, Any], number: int) -> Reply:
        return failure(429, "slow down", retry_after="0.1") if number == 2 else played(body)

    with serve(answer) as server, sockets() as seen:
        names = [f"{server.url}/v1/honest", f"{server.url}/v1/flatterer", str(tiny_dir)]
        done = crosseval(tmp_path, names, "--limit", "1", "--max-connections", "2")
    assert done.exit_code == 0, done.output
    host, port = server.url.removeprefix("http://").split(":")
    assert {address for event, address in seen if event != "socket.getaddrinfo"} == {(host, int(port))}
    assert {str(name) for event, name in seen if event == "socket.getaddrinfo"} <= {host, f"b'{host}'"}
    found = results(tmp_path)
    values = {(row["model"], row["metric"]): row["value"] for row in found["rates"]}
    assert values[names[0], "kept_turn_3"] == 1
    assert values[names[1], "kept_turn_3"] == 0
    assert values[names[0], "resisted"] == 1
    assert values[names[1], "lied"] == 1
    assert [one["finished"] for one in found["finished"]] == [8, 8, 8]
    assert server.most_at_once <= 4
    sizes = Counter(body["model"] for body in server.requests)
    assert sizes == {"honest": 28 + (server.requests[2]["model"] == "honest"),
                     "flatterer": 28 + (server.requests[2]["model"] == "flatterer")}  # fmt: skip
    assert all(row["used"]["read"] == 2800 for row in found["cost"][:2])  # 100 tokens for each answer that came
    assert found["cost"][2]["used"]["written"] > 0
    items = pd.read_parquet(tmp_path / "items.parquet")
    assert set(items["model"]) == set(names)
    page = (tmp_path / "crosseval.html").read_text(encoding="utf-8")
    for name in set(items["log"]):
        assert (tmp_path / "logs" / name).is_file()
        assert f'href="logs/{name}"' in page


def test_what_failed_is_asked_again_and_nothing_else(tmp_path: Path) -> None:
    more = ("--limit", "2", "--test", "jailbreak", "--test", "hierarchy")

    def faulty(body: dict[str, Any], number: int) -> Reply:
        return failure(400, "no such thing") if "encyclopaedia" in body["messages"][0]["content"] else played(body)

    with serve(faulty) as server:
        url = f"{server.url}/v1/honest"
        first = crosseval(tmp_path, [url], *more)
    assert first.exit_code == 2
    assert "4 of 6 interviews finished; first error" in first.output
    assert "no such thing" in first.output
    assert "4 of 6 interviews are finished" in (tmp_path / "crosseval.html").read_text(encoding="utf-8")
    with serve(played) as again:
        # the same model at another port is another name, so the answers are moved to it
        for path in (tmp_path / "logs").iterdir():
            path.unlink()
        moved = f"{again.url}/v1/honest"
        assert crosseval(tmp_path, [moved], *more).exit_code == 0
        asked = len(again.requests)
        assert asked == 2 * 4 + 2 * 2 + 2 * 2
        assert crosseval(tmp_path, [moved], *more).exit_code == 0
        assert len(again.requests) == asked
        added = crosseval(tmp_path, [moved, f"{again.url}/v1/refuser"], *more)
        assert added.exit_code == 0
        assert {body["model"] for body in again.requests[asked:]} == {"refuser"}


def test_a_model_that_was_trained_again_is_asked_again(tmp_path: Path, tiny_dir: Path) -> None:
    """The same path holds other weights: what the old ones said is no answer of theirs."""
    model, out = tmp_path / "run" / "start" / "model", tmp_path / "out"
    shutil.copytree(tiny_dir, model)
    more = ("--limit", "2", "--test", "jailbreak")
    settings = Settings(("jailbreak",), 2, 0, 8, None)
    assert crosseval(out, [str(model)], *more).exit_code == 0
    old = read_record(out, settings)
    assert len(old.answers) == 2
    assert old.outdated == {}
    tiny_llama(seed=1).save_pretrained(model)
    assert read_record(out, settings).answers == {}
    again = crosseval(out, [str(model)], *more)
    assert again.exit_code == 0
    assert "1 logs are of other weights under this name and are left out" in again.output.replace("\n", "")
    new = read_record(out, settings)
    assert {one.log for one in new.answers.values()}.isdisjoint(one.log for one in old.answers.values())
    assert [one.replies for one in new.answers.values()] != [one.replies for one in old.answers.values()]
    assert new.usage == {str(model): new.usage[str(model)], "judge": Tokens()}
    assert new.usage[str(model)].read == old.usage[str(model)].read  # of one run, not of both
    shutil.rmtree(model)  # nobody can tell any more, so everything counts
    assert read_record(out, settings).outdated == {}


def test_a_judge_grades_beside_the_rules(tmp_path: Path) -> None:
    with serve(played) as server:
        model, judge = f"{server.url}/v1/flatterer", f"{server.url}/v1/judge"
        arguments = ("--limit", "2", "--test", "jailbreak", "--judge", judge)
        refused = crosseval(tmp_path, [model], *arguments)
        assert refused.exit_code == 2
        assert "--training-judge" in refused.output
        same = crosseval(tmp_path, [model], *arguments, "--training-judge", judge)
        assert "the same model as the training judge" in same.output
        own = crosseval(tmp_path, [model, judge], *arguments, "--training-judge", "none")
        assert "is one of the models that it would grade" in own.output
        assert not server.requests
        done = crosseval(tmp_path, [model], *arguments, "--training-judge", "none")
        assert done.exit_code == 0, done.output
    found = results(tmp_path)["judge"]
    assert [(row["part"], row["rule"], row["judge"], row["agreement"]) for row in found] == [("attacks", 1, 0, 0)]
    asked = [body["messages"][-1]["content"] for body in server.requests if body["model"] == "judge"]
    assert len(asked) == 2
    assert all("<talk>" in text and "state it" in text for text in asked)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """The models that are opened while a test runs, with their names."""
    found: list[tuple[str, Any]] = []

    def noted(name: str, config: Any) -> Any:
        found.append((name, open_model(name, config)))
        return found[-1][1]

    monkeypatch.setattr("eval.crosseval_run.open_model", noted)
    return found


def test_the_pace_holds_for_the_judge_whomever_it_grades(tmp_path: Path, opened: list[tuple[str, Any]]) -> None:
    """One request a second to each: both models end their only interview, of two requests, after a second."""
    asked: list[float] = []

    def answer(body: dict[str, Any], number: int) -> Reply:
        if body["model"] == "judge":
            asked.append(time.monotonic())
        return played(body)

    with serve(answer) as server:
        honest_one, flattering, judge = (f"{server.url}/v1/{name}" for name in ("honest", "flatterer", "judge"))
        more = ("--limit", "1", "--test", "jailbreak", "--per-minute", "60")
        done = crosseval(tmp_path, [honest_one, flattering], *more, "--judge", judge, "--training-judge", "none")
    assert done.exit_code == 0, done.output
    assert len(asked) == 2
    assert asked[1] - asked[0] > 0.5
    assert sorted(name for name, _ in opened) == sorted([honest_one, flattering, judge])


def test_a_local_judge_is_opened_once_and_closed(tmp_path: Path, tiny_dir: Path, opened: list[tuple[str, Any]]) -> None:
    names = [str(shutil.copytree(tiny_dir, tmp_path / name)) for name in ("one", "two", "judge")]
    more = ("--limit", "1", "--test", "jailbreak", "--judge", names[2], "--training-judge", "none")
    done = crosseval(tmp_path / "out", names[:2], *more)
    assert done.exit_code == 0, done.output
    assert sorted(name for name, _ in opened) == sorted(names)
    assert all(model.api._model is None for _, model in opened)


def responses_form(text: str) -> Reply:
    """An answer in the form of OpenAI's Responses API; 40 of its 100 prompt tokens come from a cache."""
    said = {"type": "output_text", "text": text, "annotations": []}
    usage = {"input_tokens": 100, "output_tokens": 10, "total_tokens": 110}
    usage |= {"input_tokens_details": {"cached_tokens": 40}, "output_tokens_details": {"reasoning_tokens": 4}}
    record = {
        "id": "r", "object": "response", "created_at": 0, "model": "m", "status": "completed", "error": None,
        "incomplete_details": None, "instructions": None, "metadata": {}, "parallel_tool_calls": True, "temperature": 0,
        "tool_choice": "auto", "tools": [], "top_p": 1, "usage": usage,
        "output": [{"type": "message", "id": "m", "status": "completed", "role": "assistant", "content": [said]}],
    }  # fmt: skip
    return Reply(json.dumps(record).encode())


def test_openai_and_anthropic_are_asked_in_their_own_forms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "I don't know of anything by that name."

    def answer(body: dict[str, Any], number: int) -> Reply:
        path = server.requests[number]["path"]
        if path.endswith("/responses"):
            return responses_form(said)
        if path.endswith("/chat/completions"):
            return completion(said)
        if "temperature" in body:
            return failure(400, "temperature: this model takes none")
        return message(said)

    prices = tmp_path / "prices.yaml"
    prices.write_text("openai/gpt-4o: {input: 1000000, cached: 500000, output: 2000000}\n")
    with serve(answer) as server:
        for name, value in (("OPENAI", f"{server.url}/v1"), ("ANTHROPIC", server.url)):
            monkeypatch.setenv(f"{name}_BASE_URL", value)
            monkeypatch.setenv(f"{name}_API_KEY", "k")
        names = ["openai/gpt-4o", "anthropic/claude-x"]
        done = crosseval(tmp_path / "out", names, "--limit", "1", "--test", "hallucination", "--prices", str(prices))
        assert done.exit_code == 0, done.output
        asked = [body for body in server.requests if body["path"].endswith("/messages") and "temperature" not in body]
    assert len(asked) == 2
    assert all(body["max_tokens"] == 8 for body in asked)
    found = results(tmp_path / "out")
    assert {row["value"] for row in found["rates"] if row["metric"] == "answered"} == {0}
    assert [row["used"]["written"] for row in found["cost"]] == [20, 20]
    assert found["cost"][1]["used"]["dollars"] is None


def test_costs_are_known_before_anything_is_asked(tmp_path: Path) -> None:
    prices = tmp_path / "prices.yaml"
    with serve(played) as server:
        url = f"{server.url}/v1/honest"
        prices.write_text(f'"{url}": {{input: 1000, output: 1000}}\n')
        out = tmp_path / "out"
        more = ("--limit", "2", "--test", "jailbreak")
        estimate = crosseval(out, [url], *more, "--estimate")
        assert estimate.exit_code == 0
        assert "no price known" in estimate.output
        assert not out.exists()
        dear = crosseval(out, [url], *more, "--prices", str(prices), "--max-cost", "0.1")
        assert dear.exit_code == 2
        assert "may cost up to" in dear.output
        assert not server.requests
        assert crosseval(out, [url], *more, "--prices", str(prices), "--max-cost", "5").exit_code == 0
    bill = results(out)["cost"][0]
    assert bill["used"]["dollars"] == pytest.approx(4 * (100 + 10) * 1000 / 1e6)
    assert bill["expected"]["requests"] == 4


def test_errors_are_one_line_and_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/nowhere/model"}))
    for models, more, words in (
        (["openai/gpt-x"], (), "OPENAI_API_KEY is not set"),
        (["/nowhere/model"], (), "neither a directory nor a hub id"),
        ([str(adapter)], (), "put the base back where it was"),
        ([str(tmp_path)], (), "has no config.json"),
        (["http://127.0.0.1:1/m"], (), "is not a served model"),
        (["http://127.0.0.1:1/v1/m"] * 2, (), "named twice"),
        (["http://127.0.0.1:1/v1/m"], ("--test", "poetry"), "there are: hallucination, sycophancy"),
        (["http://127.0.0.1:1/v1/m"], ("--prices", str(tmp_path / "p.yaml")), "no such prices file"),
        (["http://127.0.0.1:1/v1/m"], ("--max-cost", "1"), "no price is known for"),
    ):
        done = crosseval(tmp_path / "out", models, *more)
        assert done.exit_code == 2, done.output
        assert words in " ".join(done.output.split()), words
    assert not (tmp_path / "out").exists()


def _wait(condition: Callable[[], bool], seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.1)


@pytest.mark.slow
def test_a_killed_run_asks_nothing_twice_that_was_finished(tmp_path: Path) -> None:
    """SIGKILL while the eighth request is under way; the logs hold what was finished before."""
    released = threading.Event()

    def answer(body: dict[str, Any], number: int) -> Reply:
        if number >= 7:
            released.wait(240)
        return played(body)

    settings = Settings(("jailbreak",), 4, 0, 8, None)
    with serve(answer) as server:
        url = f"{server.url}/v1/honest"
        arguments = ["--models", url, "--out", str(tmp_path), "--max-tokens", "8", "--limit", "4"]
        arguments += ["--test", "jailbreak", "--max-connections", "1"]
        command = [sys.executable, "-m", "scripts.cli", "crosseval", *arguments]
        child = subprocess.Popen(command, cwd=Path(__file__).parent.parent, stdout=subprocess.DEVNULL)
        try:
            _wait(lambda: len(server.requests) == 8)
            # 7 answers for interviews of two requests each: three at least are whole unless all four were begun at once
            _wait(lambda: len(read_record(tmp_path, settings).answers) >= 3)
        finally:
            os.kill(child.pid, signal.SIGKILL)
            child.wait()
        finished = {item for _, _, item in read_record(tmp_path, settings).answers}
        released.set()
        before = len(server.requests)
        done = crosseval(tmp_path, [url], "--limit", "4", "--test", "jailbreak")
        assert done.exit_code == 0, done.output
        asked = {body["messages"][-1]["content"] for body in server.requests[before:]}
    items = load_interviews("attacks", 4)
    for item in items:
        assert (item.talks[0].turns[0] in asked) is (item.id not in finished)
    assert results(tmp_path)["finished"][0]["finished"] == len(items)


@pytest.mark.slow
def test_the_embedded_model_says_the_same_served_and_in_process(tmp_path: Path) -> None:
    """`transformers serve` over HTTP against this process, both greedy."""
    path = embedded_model(EMBEDDED)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).parent / "transformers"), "serve", "--host", "127.0.0.1", "--port", str(port)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    server = subprocess.Popen([*command, "--device", "cpu"], env=environment, stdout=subprocess.DEVNULL)
    try:
        _wait(lambda: _listens(port))
        names = [EMBEDDED, f"http://127.0.0.1:{port}/v1/{path}"]
        done = crosseval(tmp_path, names, "--limit", "1", "--test", "jailbreak", "--test", "hallucination")
    finally:
        server.terminate()
        server.wait()
    assert done.exit_code == 0, done.output
    answers = read_record(tmp_path, Settings(("hallucination", "jailbreak"), 1, 0, 8, None)).answers
    said = {name: {key[1:]: answer.replies for key, answer in answers.items() if key[0] == name} for name in names}
    assert said[names[0]] == said[names[1]]


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
