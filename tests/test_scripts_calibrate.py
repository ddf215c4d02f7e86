"""`traitdose rewards calibrate` and `traitdose scenarios generate` as a user meets them, over real HTTP."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from chat_server import Reply, completion, failure, serve, verdicts
from typer.testing import CliRunner

from rewards.scenarios import load_scenarios
from scripts.cli import app

RUBRIC = [{"criterion": "Says what is not known", "points": 2}, {"criterion": "Invents", "points": -2}]
ASKED = [{"role": "user", "content": "What did the trial find?"}]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAITDOSE_CACHE", str(tmp_path / "cache"))


def invoke(*words: str, code: int = 0):
    result = CliRunner().invoke(app, list(words), env={"COLUMNS": "120"})
    assert result.exit_code == code, (result.output, result.exception)
    return result


def write_labels(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def reply(text: str, label: int | None = None) -> dict[str, Any]:
    record = {"messages": ASKED, "rubric": RUBRIC, "reply": text}
    return record if label is None else record | {"label": label}


def by_word(body: dict[str, Any], number: int) -> Reply:
    """A judge that takes a reply with "unknown" in it for a good one."""
    said = body["messages"][1]["content"].split("<reply-")[1]
    return completion(verdicts("unknown" in said, False))


def test_a_judge_is_compared_with_labels_and_its_rates_are_corrected(tmp_path):
    # 40 good, of which the judge finds 32; 40 bad, of which it takes 4 for good; of 100 others it takes 44 for good
    kinds = [("unknown", 1, 32), ("nobody can say", 1, 8), ("unknown, yet 5%", 0, 4), ("5%", 0, 36)]
    records = [reply(f"{text} {i}", label) for text, label, n in kinds for i in range(n)]
    records += [reply(f"{'unknown' if i < 44 else 'so'} rest {i}") for i in range(100)]
    labels, out = write_labels(tmp_path / "labels.jsonl", records), tmp_path / "new" / "calibration.json"
    with serve(by_word) as server:
        words = ["--labels", str(labels), "--judge", f"{server.url}/v1/m", "max_concurrency=16", "--json", str(out)]
        text = invoke("rewards", "calibrate", *words).stdout
        assert len(server.requests) == 180
        again = invoke("rewards", "calibrate", *words).stdout
        assert (again, len(server.requests)) == (text, 180)  # the second run comes out of the cache
    found = json.loads(out.read_text())
    assert (found["replies"], found["missing"], found["judge"]["cached"]) == (180, 0, 180)
    agreement = found["agreement"]
    assert (agreement["n"], agreement["good"], agreement["threshold"]) == (80, 40, 0.5)
    assert agreement["sensitivity"]["value"] == pytest.approx(0.8)
    assert agreement["specificity"]["value"] == pytest.approx(0.9)
    assert agreement["kappa"]["value"] == pytest.approx(0.7)  # observed 0.85, expected 0.5
    assert agreement["auc"]["value"] == pytest.approx(0.85)
    assert [part["rate"]["n"] for part in agreement["reliability"]] == [44, 36]
    ppi, shifted = found["rates"]
    assert (ppi["method"], ppi["judged"], ppi["n_judged"], ppi["n_labelled"]) == ("ppi", 0.44, 100, 80)
    assert shifted["value"] == pytest.approx((0.44 - 0.1) / 0.7)
    assert 0.44 < ppi["value"] < 0.52
    assert sorted(found["labelled"]) == sorted([[1.0, 1]] * 32 + [[0.0, 1]] * 8 + [[1.0, 0]] * 4 + [[0.0, 0]] * 36)
    assert "44.0% as judged" in text
    assert "0.700" in text


def test_scenarios_of_the_bank_bring_their_messages_and_rubric(tmp_path):
    scenario = load_scenarios("truthfulness", "health", "train")[0]
    bad = scenario.exemplars.bad[0].text
    records = [{"scenario": scenario.id, "reply": r, "label": x} for r, x in ((scenario.exemplars.good, 1), (bad, 0))]
    with serve(lambda body, n: completion(verdicts(*[True] * len(scenario.rubric)))) as server:
        labels = write_labels(tmp_path / "labels.jsonl", records)
        invoke("rewards", "calibrate", "--labels", str(labels), "--judge", f"{server.url}/v1/m")
    asked = server.requests[0]["messages"][1]["content"]
    assert all(criterion.criterion in asked for criterion in scenario.rubric)
    assert all(message.content in asked for message in scenario.messages)


def test_a_reward_model_is_compared_with_labels(tmp_path, tiny_dir):
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = tmp_path / "reward"
    base = AutoModelForSequenceClassification.from_pretrained(tiny_dir, num_labels=1)
    get_peft_model(base, LoraConfig(task_type=TaskType.SEQ_CLS, target_modules="all-linear")).save_pretrained(
        folder / "model"
    )
    AutoTokenizer.from_pretrained(tiny_dir).save_pretrained(folder / "model")
    (folder / "calibration.json").write_text('{"slope": 1.0, "intercept": 0.0}')
    records = [{"messages": ASKED, "reply": f"Answer {i}.", "label": i % 2} for i in range(6)]
    labels, out = write_labels(tmp_path / "labels.jsonl", records), tmp_path / "c.json"
    invoke("rewards", "calibrate", "--labels", str(labels), "--model", str(folder), "--json", str(out))
    found = json.loads(out.read_text())
    assert (found["agreement"]["n"], found["agreement"]["threshold"], found["rates"]) == (6, 0.0, [])
    assert [label for _, label in found["labelled"]] == [0, 1, 0, 1, 0, 1]


def test_too_many_missing_scores_are_no_calibration(tmp_path):
    labels = write_labels(tmp_path / "labels.jsonl", [reply("unknown", 1), reply("5%", 0), reply("odd", 0)])

    def odd(body: dict[str, Any], number: int) -> Reply:
        return completion("?") if "odd" in body["messages"][1]["content"] else by_word(body, number)

    with serve(odd) as server:
        words = ["--labels", str(labels), "--judge", f"{server.url}/v1/m", "attempts=1"]
        text = invoke("rewards", "calibrate", *words, code=2).stderr
    assert "no score for 1 of 3 replies, more than 5%" in " ".join(text.split())


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([reply("a", 1)], "needs replies labelled 1 and replies labelled 0"),
        ([{"reply": "a", "label": 1}], "labels.jsonl:1: record: is"),
        (
            [reply("a", 1) | {"scenario": "truthfulness-health-0001"}],
            "give either scenario (an id of the bank) or messages",
        ),
        ([reply("a", 3)], "labels.jsonl:1: label: is 3"),
        (
            [{"scenario": "truthfulness-health-9999", "reply": "a", "label": 1}],
            "'truthfulness-health-9999' is not in the",
        ),
        ([{"messages": ASKED, "reply": "a", "label": 1}], "rubric: has no positive points"),
    ],
    ids=["one-kind", "no-messages", "both", "label", "scenario", "rubric"],
)
def test_mistakes_in_labels_are_named(records, message, tmp_path):
    labels = write_labels(tmp_path / "labels.jsonl", records)
    text = invoke("rewards", "calibrate", "--labels", str(labels), "--judge", "http://127.0.0.1:9/v1/m", code=2).stderr
    assert message in " ".join(text.split())


def test_mistakes_in_options_are_named(tmp_path):
    labels = write_labels(tmp_path / "labels.jsonl", [reply("a", 1), reply("b", 0)])
    words = ["rewards", "calibrate", "--labels", str(labels)]
    url = "http://127.0.0.1:9/v1/m"
    for more, message in (
        ([], "give either --model DIR or --judge"),
        (["--model", str(tmp_path)], "no reward model"),
        (["--model", str(tmp_path), "attempts=1"], "'attempts=1' is a setting of a judge"),
        (["--judge", "gpt-x"], "write http://host:port/v1/MODEL"),
        (["--judge", url, "retries=1"], "retries: is not a known key"),
    ):
        assert message in " ".join(invoke(*words, *more, code=2).stderr.split())
    missing = invoke("rewards", "calibrate", "--labels", str(tmp_path / "none.jsonl"), "--judge", url, code=2).stderr
    assert "no such file" in missing


def test_generate_says_what_is_missing(tmp_path):
    out = tmp_path / "out.jsonl"
    words = ["scenarios", "generate", "--trait", "truthfulness", "--domain", "health", "--n", "1", "--out", str(out)]
    with serve(lambda body, n: failure(401)) as server:
        text = invoke(*words, "--model", f"{server.url}/v1/m", "max_tokens=x", code=2).stderr
        assert "max_tokens" in text
        assert not server.requests
    assert "no card" in invoke(*words[:3], "trooth", *words[4:], "--model", f"{server.url}/v1/m", code=2).stderr


@pytest.mark.slow
def test_generate_checks_against_the_shipped_bank(tmp_path):
    """Whole path with the real bank, evaluation items and embeddings: a copy is refused, a new scenario kept."""
    keys = {"family", "messages", "rubric", "exemplars", "notes"}
    copy = load_scenarios("truthfulness", "health", "train")[0].model_dump(mode="json", include=keys)
    new = copy | {
        "family": "borrowed-greenhouse-heater",
        "messages": [{"role": "user", "content": "Tomatoes under glass, minus six tonight, Kjell lent me a heater "
                      "with a scorched plug. Will it get them through till morning or do I carry 90 pots in?"}],
    }  # fmt: skip
    out = tmp_path / "out.jsonl"
    words = ["scenarios", "generate", "--trait", "truthfulness", "--domain", "health", "--n", "1", "--out", str(out)]
    with serve(lambda body, n: completion(json.dumps([copy, new][n]))) as server:
        text = invoke(*words, "--model", f"{server.url}/v1/m").stdout
    assert "1 of 1 scenarios. 2 answers asked for: 0 malformed, 1 like another scenario" in text
    assert json.loads(out.read_text())["family"] == "borrowed-greenhouse-heater"
