"""The capability suite: 53 benchmarks that really give items, the same ones every time; rows for items.parquet."""

from __future__ import annotations

import random
import socket
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from eval.capability import COLUMNS, Suite, evaluate_capability, load_suite
from eval.capability_tasks import Benchmark, load_items
from models import scoring

SUITE = Path(__file__).parents[1] / "configs/suites/capability-53-offline.yaml"
TRAINED = {
    *("letter_counting", "chain_sum", "spell_backward", "gcd", "leg_counting"),
    *("simple_equations", "number_sequence", "basic_arithmetic", "word_sorting", "count_bits"),
}


@pytest.fixture(scope="module")
def suite() -> Suite:
    return load_suite(SUITE)


@pytest.fixture(scope="module")
def small_suite(suite: Suite, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four benchmarks of the real suite, one for each way of scoring."""
    names = ["openbookqa", "winogrande", "syllogism", "products"]
    path = tmp_path_factory.mktemp("suites") / "small.yaml"
    content = suite.model_dump(mode="json")
    content["benchmarks"] = [entry for entry in content["benchmarks"] if entry["name"] in names]
    path.write_text(yaml.safe_dump(content))
    return path


def test_53_benchmarks_none_of_them_trained_on_or_kept_for_generalisation(suite: Suite) -> None:
    assert len(suite.benchmarks) == 53
    sources = [benchmark.source.split(":")[1] for benchmark in suite.benchmarks]
    assert len(set(sources)) == 53
    assert not TRAINED & set(sources)
    assert not {"truthfulqa", "xstest", "medfailbench_hard30"} & set(sources)
    assert all(benchmark.n >= 100 for benchmark in suite.benchmarks)


def test_every_benchmark_gives_sound_items(suite: Suite) -> None:
    for benchmark in suite.benchmarks:
        items = load_items(benchmark, suite.seed, limit=6)  # raises if the full set does not have n items
        assert len({item.id for item in items}) == 6
        for item in items:
            assert len(item.choices) == len(set(item.choices)) == benchmark.choices
            assert 0 <= item.gold < benchmark.choices
            assert all(choice.strip() for choice in item.choices)
            assert item.prompt.strip()


def test_closed_answer_sets_are_balanced_in_full_and_in_a_subset(suite: Suite) -> None:
    for benchmark in suite.benchmarks:
        if benchmark.classes:
            for limit in (None, 4 * len(benchmark.classes)):
                items = load_items(benchmark, suite.seed, limit)
                counts = Counter(item.choices[item.gold] for item in items)
                assert set(counts.values()) == {len(items) // len(benchmark.classes)}, benchmark.name


def test_right_answers_are_right(suite: Suite) -> None:
    """Recomputed by hand from the prompt, where that is easy."""
    by_name = {benchmark.name: benchmark for benchmark in suite.benchmarks}
    for item in load_items(by_name["products"], suite.seed):
        a, b = (int(part.strip(" .?=")) for part in item.prompt.split(":")[-2].removesuffix("\nAnswer").split("*"))
        assert int(item.choices[item.gold]) == a * b
        assert all(int(choice) != a * b for i, choice in enumerate(item.choices) if i != item.gold)
    for item in load_items(by_name["palindrome_generation"], suite.seed):
        palindromes = [choice for choice in item.choices if choice == choice[::-1]]
        assert palindromes == [item.choices[item.gold]]
    for item in load_items(by_name["needle_haystack"], suite.seed):
        assert all(choice in item.prompt for choice in item.choices)


def test_subsets_are_spread_over_the_set_and_the_same_each_time(suite: Suite) -> None:
    mmlu = next(benchmark for benchmark in suite.benchmarks if benchmark.name == "mmlu_science")
    subset = load_items(mmlu, suite.seed, 20)
    assert subset == load_items(mmlu, suite.seed, 20)
    assert len({item.id.rsplit("-", 1)[0] for item in subset}) >= 18  # nearly every item from another subject
    assert {item.id for item in subset} <= {item.id for item in load_items(mmlu, suite.seed)}


def test_every_model_gets_the_same_items(suite: Suite) -> None:
    """Whatever was drawn before: a generator of reasoning-gym takes numbers from Python's own generator."""
    drawn = []
    for before in (1, 2):
        random.seed(before)
        drawn.append([load_items(benchmark, suite.seed, 100) for benchmark in suite.benchmarks])
        after = random.random()
        random.seed(before)
        assert random.random() == after  # and drawing items leaves that one as it was
    for benchmark, first, second in zip(suite.benchmarks, *drawn, strict=True):
        assert first == second, benchmark.name


def test_rows(small_suite: Path, tiny_model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("the offline suite opened a socket")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    seen: list[tuple[int, int]] = []
    table = evaluate_capability(tiny_model, tokenizer, small_suite, 6, lambda done, total: seen.append((done, total)))
    assert list(table.columns) == COLUMNS
    assert len(table) == 4 * 6 * 2
    pairs = 6 * (4 + 2 + 2 + 4)
    assert seen[-1] == (pairs, pairs)
    right = table[table.metric != "gold_logprob"]
    assert set(right.value) <= {0.0, 1.0}
    assert (right.groupby("task").size() == 6).all()
    logps = table[table.metric == "gold_logprob"]
    assert (logps.value < 0).all()
    assert (logps.item.to_numpy() == right.item.to_numpy()).all()
    assert (table.tokens >= 1).all()
    assert table.heldout.all()
    assert set(table.suite) == {"capability"}


def test_an_interrupted_evaluation_goes_on(
    small_suite: Path, tiny_model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "PACKS_PER_CALL", 1)
    kept, before, after = tmp_path / "scores.jsonl", [], []

    def stop(done: int, total: int) -> None:
        before.append(done)
        if len(before) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate_capability(tiny_model, tokenizer, small_suite, 6, stop, kept=kept)
    kept.write_text(kept.read_text()[:-3])  # the third call's last line was cut off
    table = evaluate_capability(
        tiny_model, tokenizer, small_suite, 6, lambda done, total: after.append(done), kept=kept
    )
    assert after[0] == before[2]
    assert table.equals(evaluate_capability(tiny_model, tokenizer, small_suite, 6))


def test_value_is_whether_the_output_is_the_right_choice(small_suite: Path, tiny_model: Any, tokenizer: Any) -> None:
    table = evaluate_capability(tiny_model, tokenizer, small_suite, 6)
    suite = load_suite(small_suite)
    for benchmark in suite.benchmarks:
        rows = table[(table.task == benchmark.name) & (table.metric == benchmark.metric)].set_index("item")
        for item in load_items(benchmark, suite.seed, 6):
            assert rows.loc[item.id, "value"] == (rows.loc[item.id, "output"] == item.choices[item.gold])


def test_unknown_key_wrong_value_and_missing_file_are_named(tmp_path: Path, suite: Suite) -> None:
    content = suite.model_dump(mode="json")
    path = tmp_path / "suite.yaml"

    content["benchmarks"][0]["shots"] = 3
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=r"suite.yaml: benchmarks.arc_challenge.shots: .*not permitted.*3"):
        load_suite(path)
    del content["benchmarks"][0]["shots"]

    content["benchmarks"][1]["name"] = "arc_challenge"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match="stand twice: arc_challenge"):
        load_suite(path)

    with pytest.raises(ValueError, match="no such file"):
        load_suite(tmp_path / "nowhere.yaml")
    path.write_text("a: [")
    with pytest.raises(ValueError, match="not YAML"):
        load_suite(path)


def test_a_set_that_shrank_is_an_error(suite: Suite) -> None:
    arc = suite.benchmarks[0]
    with pytest.raises(ValueError, match="n is 9999, but benchkit:arc_challenge gives 966"):
        load_items(arc.model_copy(update={"n": 9999}), suite.seed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chance": 0.5}, "is not 1 / choices"),
        ({"wrong": "classes"}, "needs `classes`"),
        ({"prompt": "Question:"}, "does not contain"),
    ],
)
def test_inconsistent_entries_are_refused(suite: Suite, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Benchmark.model_validate({**suite.benchmarks[0].model_dump(), **change})


@pytest.mark.parametrize("source", ["benchkit:nothing", "reasoning-gym:nothing", "mmlu-dev:nothing"])
def test_unknown_sources_are_named(suite: Suite, source: str) -> None:
    with pytest.raises(ValueError, match=source.split(":")[1]):
        load_items(suite.benchmarks[0].model_copy(update={"source": source}), suite.seed)


def test_limit_must_be_positive(small_suite: Path, tiny_model: Any, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="limit 0"):
        evaluate_capability(tiny_model, tokenizer, small_suite, 0)
