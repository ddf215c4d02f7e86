"""The transfer table and the frontier, on effects that were put in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from test_eval_results import DOMAINS, FAMILIES, ITEMS, write_run

from eval.frontier import honesty_rows, on_frontier
from eval.report_charts import build_charts
from eval.results import build_results
from eval.transfer import column_name, markdown_table, set_name, transfer_cells

KNOWN = ("chemistry", "health", "law", "physics", "geography")


def paired(task: str, trait: str, domain: str, control: list[float], arm: list[float], kind: str = "twins") -> Any:
    n = len(control)
    return pd.DataFrame(
        {
            "task": task, "trait": trait, "domain": domain, "kind": kind, "seed": 0,
            "item": [f"{task}-{k}" for k in range(n)], "family": [f"family-{k // 2}" for k in range(n)],
            "value_control": control, "value_arm": arm,
        }
    )  # fmt: skip


def test_a_cell_is_the_mean_over_its_tasks_signed_so_that_more_is_better() -> None:
    rng = np.random.default_rng(0)
    first = (rng.random((2, 60)) < 0.5).astype(float)
    second = (rng.random((2, 30)) < 0.5).astype(float)
    pairs = pd.concat([
        paired("a", "deception", "health", list(first[0]), list(first[1])),
        paired("b", "deception", "health", list(second[0]), list(second[1])),
    ])  # fmt: skip
    (cell,) = transfer_cells(pairs, {"a": True, "b": False}, "c", "truthfulness", ["health"], 0.05)
    expected = ((first[1] - first[0]).sum() - (second[1] - second[0]).sum()) / 90
    assert cell["delta"] == pytest.approx(expected)
    assert cell["ci_low"] < cell["delta"] < cell["ci_high"]
    assert (cell["n"], cell["clusters"], cell["tasks"]) == (90, 45, ["a", "b"])
    assert not cell["trained"]  # the domain was trained, but for another trait


def test_trained_cells_are_those_of_the_trait_and_its_domains() -> None:
    zeros, ones = [0.0, 1.0] * 30, [1.0, 1.0] * 30
    pairs = pd.concat([
        paired("h", "truthfulness", "health", zeros, ones),
        paired("l", "truthfulness", "law", zeros, zeros),
        paired("s", "sycophancy", "health", zeros, ones),
        paired("extra", "truthfulness", "unnamed", zeros, ones),
    ])  # fmt: skip
    polarity = {"h": True, "l": True, "s": False}
    cells = transfer_cells(pairs, polarity, "c", "truthfulness", ["health"], 0.05)
    assert [(c["trait"], c["domain"], c["trained"], c["verdict"]) for c in cells] == [
        ("sycophancy", "health", False, "regressed"),  # more of what is bad
        ("truthfulness", "health", True, "improved"),
        ("truthfulness", "law", False, "inconclusive"),  # 30 equal families do not show that all are
    ]
    assert [c["delta"] for c in cells] == [-0.5, 0.5, 0.0]


def test_one_family_alone_is_clustered_by_item() -> None:
    pairs = paired("t", "fairness", "general", [0.0, 1.0] * 15, [1.0, 0.0] * 15).assign(family="only")
    (cell,) = transfer_cells(pairs, {"t": True}, "c", "truthfulness", ["health"], 0.05)
    assert cell["clusters"] == 30


def test_a_null_effect_is_found_as_often_as_it_should() -> None:
    rng = np.random.default_rng(1)
    found = 0
    for _ in range(60):
        control, arm = (list((rng.random(60) < 0.5).astype(float)) for _ in "12")
        pairs = paired("t", "fairness", "general", control, arm)
        found += transfer_cells(pairs, {"t": True}, "c", "x", [], 0.05)[0]["p"] <= 0.05
    assert found <= 9  # 3 expected; 9 or more has a chance of 0.4%


@pytest.mark.parametrize(("trained", "name"), [
    (["health"], "health"),
    (["law", "health"], "health and law"),
    (KNOWN, "all"),
    (["health", "law", "physics", "geography"], "all but chemistry"),
    (["health", "law", "physics"], "health, law and physics"),
])  # fmt: skip
def test_sets_of_domains_in_words(trained: list[str], name: str) -> None:
    assert set_name(trained, KNOWN) == name


def test_a_single_trainable_domain_is_called_by_its_name() -> None:
    assert set_name(["health"], ["health"]) == "health"
    assert set_name(["arts", "games", "law"], ["health"]) == "arts, games and law"  # nothing but scenarios is trained
    assert column_name(["health"], ["health"], 0.25) == "health, dose 25%"
    assert column_name(["health"], ["health"], 0.05, "wide") == "health, dose 5% (wide)"
    assert column_name([], ["health"], 0.0, "told") == "nothing (told)"


def test_the_markdown_table_marks_trained_and_significant_cells() -> None:
    zeros, ones = [0.0, 1.0] * 30, [1.0, 1.0] * 30
    one = transfer_cells(
        paired("h", "truthfulness", "health", zeros, ones), {"h": True}, "A", "truthfulness", ["health"], 0.05
    )
    two = transfer_cells(paired("l", "fairness", "law", zeros, zeros), {"l": True}, "B", "truthfulness", ["law"], 0.05)
    lines = markdown_table([*one, *two]).splitlines()
    assert lines[0] == "| evaluated | trained: A | trained: B |"
    assert lines[2].startswith("| truthfulness · health | **+50.0 [")
    assert lines[2].endswith("]** † | – |")
    assert lines[3].startswith("| fairness · law | – | +0.0 [")
    assert "†" not in lines[3]


def test_a_run_has_its_table_and_its_picture(tmp_path: Path) -> None:
    results = build_results(write_run(tmp_path / "run", benchmarks=1))
    cells = {(cell["arm"], cell["domain"]): cell for cell in results["transfer"]}
    assert set(cells) == {(arm, domain) for arm in ("dose-05", "dose-25") for domain in (*DOMAINS, "mixed")}
    assert [domain for (arm, domain), cell in cells.items() if cell["trained"] and arm == "dose-05"] == ["health"]
    row = next(r for r in results["generalisation"] if (r["arm"], r["task"]) == ("dose-25", "truthfulness-law"))
    assert cells["dose-25", "law"]["delta"] == pytest.approx(row["delta"])
    assert cells["dose-25", "law"]["n"] == FAMILIES * ITEMS
    drawn = build_charts(results)["transfer"]["data"]["values"]
    assert len(drawn) == len(results["transfer"])
    assert {row["where"] for row in drawn} == {"never trained", "trained domain, other families"}


# Honesty as a pair


def test_the_frontier_by_hand() -> None:
    points = [(0.9, 0.5), (0.5, 0.1), (0.4, 0.2), (0.9, 0.6), (0.5, 0.1), (0.0, None)]
    assert on_frontier(points) == [True, True, False, False, True, True]


def test_rates_of_a_pair_by_hand() -> None:
    kinds = ["answerable"] * 4 + ["invented"] * 2
    items = pd.DataFrame({
        "metric": "truthful", "arm": "a", "domain": "law", "family": list("abcdef"), "seed": 0, "kind": kinds,
        "refused": [True, False, False, False, True, False], "value": [0.0, 1.0, 0.0, 0.0, 1.0, 0.0],
    })  # fmt: skip
    (row,) = honesty_rows(items, ["a"], ["health"])
    assert (row["domains"], row["answered"]["rate"], row["answered"]["n"]) == ("heldout", 0.75, 4)
    assert (row["error_when_answered"]["rate"], row["error_when_answered"]["n"]) == (2 / 3, 3)
    assert row["honest_when_unanswerable"]["rate"] == 0.5
    (none,) = honesty_rows(items.assign(refused=True), ["a"], ["health"])
    assert none["error_when_answered"] == {"rate": None, "low": 0.0, "high": 1.0, "n": 0}
    assert row["on_frontier"]


def test_the_gain_where_neither_refuses_has_its_interval(tmp_path: Path) -> None:
    results = build_results(write_run(tmp_path / "run", benchmarks=1))
    for row in results["generalisation"]:
        if row["delta_non_refusal"] is None:
            assert row["non_refusal"] is None
        else:
            part = row["non_refusal"]
            assert part["ci_low"] <= row["delta_non_refusal"] <= part["ci_high"]
            assert 0 < part["n"] < row["pairs"]
