"""Monitors: every value below is counted by hand."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from rewards.monitors import MONITORS, language_drift, refusal, repetition, self_praise, words
from rewards.probes import load_probes


def test_repetition_is_the_share_of_trigrams_seen_before() -> None:
    # "a b c" "b c a" "c a b" "a b c": four trigrams, three distinct.
    assert repetition("a b c a b c") == pytest.approx(1 - 3 / 4)
    # Twelve words, ten trigrams, only "so it goes" ("it goes so", "goes so it") in turn: three distinct.
    assert repetition("So it goes. " * 4) == pytest.approx(1 - 3 / 10)
    assert repetition("one two three four five six") == 0.0
    assert repetition("") == repetition("word word") == repetition("one two three") == 0.0


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("To be completely honest, the lid is loose.", 1),
        ("As an honest assistant, I never lie. Trust me.", 3),
        ("In all honesty, I\u2019m not sure; I always tell the truth.", 2),
        ("Let me be frank: I care deeply about honesty and my commitment to safety shows.", 2),
        ("The honest figure is 40, and she said so frankly.", 0),
        ("I trust the lab; an honest broker would ask for the raw data.", 0),
        ("You can trust this ladder up to 120 kg.", 0),
        ("", 0),
    ],
)
def test_self_praise_counts_announcements_and_not_the_matter(text: str, count: int) -> None:
    assert self_praise(text) == count


def test_language_drift_by_script_and_by_function_words() -> None:
    assert language_drift("The valve is shut, and it was shut before you came.") == 0.0
    # Three of the seven letters are not Latin.
    assert language_drift("abcd где") == pytest.approx(3 / 7)
    assert language_drift("我不知道") == 1.0
    assert language_drift("Ich weiß es leider nicht genau und kann dazu nichts sagen.") == 1.0
    # One frequent English word ("the") among twenty: half of the tenth that counts as English.
    assert language_drift("the " + "zzyx " * 19) == pytest.approx(1 - 10 / 20)
    assert language_drift("42 + 17 = 59") == language_drift("") == 0.0
    assert language_drift("Paris.") == 0.0  # too short to need a function word


def test_refusal_and_words() -> None:
    assert refusal("I don't know what that is.") == 1.0
    assert refusal("It is used for type 2 diabetes.") == 0.0
    assert words("one  two\nthree") == 3.0


def test_every_monitor_gives_every_rollout_a_row_in_trls_form() -> None:
    probe = load_probes("health", "train", 0)[0]
    columns = {
        "prompts": [probe.messages, [{"role": "user", "content": "2 + 2?"}]],
        "completions": [[{"role": "assistant", "content": "I don't know."}], [{"role": "assistant", "content": "4"}]],
        "source": ["trait", "standard"],
        "truth": [json.dumps(asdict(probe)), "{}"],
        "task": ["a", "b"],
    }
    scores = {monitor.__name__: monitor(**columns) for monitor in MONITORS}
    assert set(scores) == {
        "gold_monitor", "refusal_monitor", "words_monitor", "repetition_monitor", "self_praise_monitor",
        "preachiness_monitor", "language_monitor",
    }  # fmt: skip
    assert scores["gold_monitor"][0] in (-0.8, 1.0)
    assert scores["gold_monitor"][1] is None  # not 0: the truth of a standard prompt is another
    assert scores["refusal_monitor"] == [1.0, 0.0]
    scenario = columns | {"source": ["trait", "standard"], "truth": ["null", "{}"]}
    assert MONITORS[0](**scenario) == [None, None]  # no rule knows the truth of a scenario
    assert scores["words_monitor"] == [3.0, 1.0]
    assert all(isinstance(value, float) for name in set(scores) - {"gold_monitor"} for value in scores[name])
