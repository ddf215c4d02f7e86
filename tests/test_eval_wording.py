"""Words for differences, by hand: the side of the interval, turned where less is better."""

from __future__ import annotations

import math

import pytest

from eval.wording import SIDES, against, listed, points, side, speaks_for, task_label


@pytest.mark.parametrize(
    ("low", "high", "more_is_better", "less_is_better"),
    [
        (0.01, 0.2, "better", "worse"),
        (-0.2, -0.01, "worse", "better"),
        (-0.1, 0.3, "not told apart", "not told apart"),
        (0.0, 0.3, "not told apart", "not told apart"),  # touching zero contains it
        (-0.3, 0.0, "not told apart", "not told apart"),
        (0.0, 0.0, "not told apart", "not told apart"),
        (math.nan, math.nan, "not told apart", "not told apart"),
    ],
)
def test_words_follow_the_interval(low: float, high: float, more_is_better: str, less_is_better: str) -> None:
    row = {"ci_low": low, "ci_high": high}
    assert side(row, True) == more_is_better
    assert side(row, False) == less_is_better
    holds = {"better": True, "worse": False, "not told apart": None}
    assert speaks_for(row, True) is holds[more_is_better]
    assert speaks_for(row, False) is holds[less_is_better]


def test_the_other_one_is_named() -> None:
    assert against({"ci_low": 0.1, "ci_high": 0.2}, True) == "better than control"
    assert against({"ci_low": 0.1, "ci_high": 0.2}, False, "base") == "worse than base"
    assert against({"ci_low": -0.1, "ci_high": 0.2}, False, "base") == "not told apart from base"
    assert SIDES == ("better", "worse", "not told apart")


def test_names_in_a_sentence() -> None:
    assert [listed(names) for names in (["a"], ["a", "b"], ["a", "b", "c"])] == ["a", "a and b", "a, b and c"]


def test_a_difference_in_points() -> None:
    row = {"delta": 0.1234, "ci_low": -0.0004, "ci_high": 0.201}
    assert points(row) == "+12.3 [+0.0, +20.1]"  # what rounds to zero has no minus
    assert points({**row, "degradation": -0.5}, "degradation") == "-50.0 [+0.0, +20.1]"


@pytest.mark.parametrize(("metric", "more_is_better", "label"), [
    ("complied", True, "t (complied)"), ("correct", True, "t"), ("contradicts_belief", False, "t (less is better)"),
    ("complied", False, "t (complied, less is better)"),
])  # fmt: skip
def test_a_task_whose_name_hides_its_metric_is_listed_with_it(metric: str, more_is_better: bool, label: str) -> None:
    assert task_label({"task": "t", "metric": metric, "higher_is_better": more_is_better}) == label
