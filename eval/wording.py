"""How a difference is put into words: by its interval, and by whether more of the measure is better.

All sentences of the terminal, the report and docs/results.md take their words from here, so that an interval wholly on
the harmful side of zero is never called a mere lack of a gain. The verdicts of eval/stats.py are another matter: they
go by q, so a comparison among many can be "inconclusive" although its own interval leaves zero out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

Side = Literal["better", "worse", "not told apart"]
SIDES: tuple[Side, ...] = get_args(Side)
TELLING = ("complied",)  # metrics without which a task's name reads as its opposite: more of it is less over-refusal
AS_CHOICES = (
    "Every benchmark is recast as multiple choice, sets with free answers too: the answer is the choice of the largest "
    "log-likelihood and nothing is generated, so the values do not compare with published ones."
)


def side(difference: Mapping[str, Any], higher_is_better: bool) -> Side:
    """On which side of zero the interval (`ci_low`, `ci_high`) lies; one that touches zero tells nothing apart."""
    if difference["ci_low"] > 0:
        return "better" if higher_is_better else "worse"
    if difference["ci_high"] < 0:
        return "worse" if higher_is_better else "better"
    return "not told apart"


def against(difference: Mapping[str, Any], higher_is_better: bool, other: str = "control") -> str:
    """The same in words: "better than control", "worse than control", "not told apart from control"."""
    found = side(difference, higher_is_better)
    return f"{found} from {other}" if found == "not told apart" else f"{found} than {other}"


def speaks_for(difference: Mapping[str, Any], higher_is_better: bool) -> bool | None:
    """A claim's `holds`: True for better, False for worse, None where the two are not told apart."""
    return {"better": True, "worse": False, "not told apart": None}[side(difference, higher_is_better)]


def points(row: Mapping[str, Any], key: str = "delta") -> str:
    """A difference, kept as a fraction under `key`, and its interval in points: "+12.3 [+4.0, +20.1]"."""
    value, low, high = (100 * float(row[name]) for name in (key, "ci_low", "ci_high"))
    return f"{value:+z.1f} [{low:+z.1f}, {high:+z.1f}]"


def listed(names: Sequence[str]) -> str:
    """One or more names in a sentence: "a", "a and b", "a, b and c"."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def task_label(row: Mapping[str, Any]) -> str:
    """A task's name in a list of tasks, with what its values count where the name alone would mislead."""
    about = [row["metric"]] if row["metric"] in TELLING else []
    about += [] if row["higher_is_better"] else ["less is better"]
    return str(row["task"]) + (f" ({', '.join(about)})" if about else "")


def equivalent_means(margin: float) -> str:
    """When a verdict is "equivalent", as a clause; margin is a fraction."""
    return (
        f"when two one-sided tests at 5% place the difference within ±{100 * margin:g} points, that is, when its 90% "
        "interval lies within them (each comparison by itself: there is no correction for how many are tested)"
    )
