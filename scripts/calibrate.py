"""The command `traitdose rewards calibrate`: a judge or a reward model against people's labels.

The labels are JSON lines, one reply each:

    {"scenario": "truthfulness-health-0001", "reply": "...", "label": 1}
    {"messages": [...], "rubric": [{"criterion": "...", "points": 3}, ...], "reply": "...", "label": 0}
    {"scenario": "truthfulness-health-0002", "reply": "..."}

`label` is 1 for a good reply, 0 for a bad one; lines without it are scored too, and their rate of good replies is
corrected by what the others show. A reward model needs no rubric.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from rich.console import Console
from rich.table import Table

from rewards.scenarios import Criterion, Message, Scenario, load_scenarios
from rewards.traits import Text, describe

if TYPE_CHECKING:
    from rewards.calibration import Agreement, CorrectedRate, Estimate

JUDGE_THRESHOLD = 0.5
REWARD_THRESHOLD = 0.0  # on the price scale of rewards.verifier, where right is 1 and abstained -0.8
MAX_MISSING = 0.05


class LabelledReply(BaseModel):
    """One line of the labels' file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    reply: str
    label: Literal[0, 1] | None = None
    scenario: Text | None = None
    messages: tuple[Message, ...] = ()
    rubric: tuple[Criterion, ...] = Field(())

    @model_validator(mode="after")
    def _one_conversation(self) -> LabelledReply:
        if (self.scenario is None) == (not self.messages):
            raise ValueError("give either scenario (an id of the bank) or messages")
        return self


def calibrate(
    labels: Path,
    model: Path | None,
    judge: str | None,
    changes: list[str],
    threshold: float | None,
    out: Path | None,
    console: Console,
) -> None:
    """Score, compare, print, and write JSON if `out` is given. Raises ValueError for what the user has to mend."""
    if (model is None) == (judge is None):
        raise ValueError("give either --model DIR or --judge ENDPOINT/MODEL")
    if changes and judge is None:
        raise ValueError(f"{changes[0]!r} is a setting of a judge; leave it out with --model")
    replies = read_labels(labels, rubric=judge is not None)
    prompts = [[message.model_dump() for message in reply.messages] for reply in replies]
    if judge is not None:
        source, scores, cost = judge, *_judged(judge, changes, replies, prompts)
    else:
        assert model is not None
        source, scores, cost = str(model), _modelled(model, replies, prompts), {}
    missing = sum(score is None for score in scores)
    if missing > MAX_MISSING * len(replies):
        raise ValueError(
            f"{source}: no score for {missing} of {len(replies)} replies, more than {MAX_MISSING:.0%}; what the others "
            "show would be biased; run again, with attempts=10 for example"
        )
    threshold = (JUDGE_THRESHOLD if judge else REWARD_THRESHOLD) if threshold is None else threshold
    found = _compare(replies, scores, threshold)
    _print(source, len(replies), missing, found, console)
    if out is not None:
        content = {"source": source, "replies": len(replies), "missing": missing, **cost, **found}
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(content, indent=2, default=asdict) + "\n", encoding="utf-8")


def read_labels(path: Path, rubric: bool) -> list[LabelledReply]:
    """The file's replies, each with its messages and, if `rubric`, its rubric. Raises ValueError with file:line."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give one JSON object per line with reply, label and scenario")
    bank: dict[str, Scenario] = {}
    found: list[LabelledReply] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            reply = LabelledReply.model_validate_json(line)
        except ValidationError as error:
            raise ValueError(f"{where}: {'; '.join(describe(error))}") from None
        if reply.scenario is not None:
            bank = bank or {scenario.id: scenario for scenario in load_scenarios()}
            if reply.scenario not in bank:
                raise ValueError(f"{where}: scenario: {reply.scenario!r} is not in the bank; give messages and rubric")
            known = bank[reply.scenario]
            reply = reply.model_copy(update={"messages": known.messages, "rubric": reply.rubric or known.rubric})
        if rubric and not any(criterion.points > 0 for criterion in reply.rubric):
            raise ValueError(f"{where}: rubric: has no positive points; a judge needs criteria to judge by")
        found.append(reply)
    labels = {reply.label for reply in found}
    if not labels >= {0, 1}:
        raise ValueError(
            f"{path}: label: needs replies labelled 1 and replies labelled 0; there are {len(found)} lines"
        )
    return found


def _judged(
    model: str, changes: list[str], replies: Sequence[LabelledReply], prompts: Sequence[list[dict[str, str]]]
) -> tuple[list[float | None], dict[str, Any]]:
    from rewards.endpoint import endpoint_config
    from rewards.judge import Case, Judge, JudgeConfig

    judge = Judge(endpoint_config(JudgeConfig, model, changes))
    scores = judge.scores([Case(p, reply.reply, reply.rubric) for p, reply in zip(prompts, replies, strict=True)])
    return scores, {"judge": asdict(judge.tally)}


def _modelled(
    folder: Path, replies: Sequence[LabelledReply], prompts: Sequence[list[dict[str, str]]]
) -> list[float | None]:
    if not (folder / "calibration.json").is_file():
        raise ValueError(f"{folder}: no reward model (it has no calibration.json); give a run's reward/ folder")
    from models.loading import best_device
    from rewards.reward_model import RewardModel

    return [*RewardModel.load(folder, device=best_device()).score(prompts, [reply.reply for reply in replies]).tolist()]


def _compare(replies: Sequence[LabelledReply], scores: Sequence[float | None], threshold: float) -> dict[str, Any]:
    """Agreement over the labelled replies, and the rates of the unlabelled ones if there are any."""
    from rewards.calibration import agreement, corrected_rate

    scored = [(score, reply.label) for score, reply in zip(scores, replies, strict=True) if score is not None]
    pairs = [(score, label) for score, label in scored if label is not None]
    values, labels = [score for score, _ in pairs], [label for _, label in pairs]
    found: dict[str, Any] = {"agreement": agreement(values, labels, threshold), "rates": []}
    rest = [float(score >= threshold) for score, label in scored if label is None]
    if rest:
        verdicts = [float(score >= threshold) for score in values]
        found["rates"] = [corrected_rate(rest, verdicts, labels, method) for method in ("ppi", "rogan-gladen")]
    return found | {"labelled": [[score, label] for score, label in pairs]}


def _print(source: str, n: int, missing: int, found: dict[str, Any], console: Console) -> None:
    agreement: Agreement = found["agreement"]
    console.print(f"{source}: {n} replies, {missing} without a score; {agreement.n} labelled, {agreement.good} good.")
    table = Table("", "value", "95% interval", "n", title="Agreement with people", title_justify="left")
    for name in ("kappa", "auc", "sensitivity", "specificity"):
        estimate: Estimate = getattr(agreement, name)
        interval = f"{estimate.low:.3f} to {estimate.high:.3f}"
        table.add_row("AUC" if name == "auc" else name, f"{estimate.value:.3f}", interval, str(estimate.n))
    console.print(table, f"A verdict is: score at least {agreement.threshold:g}.", "")
    curve = Table("score", "n", "good", "95% interval", title="Reliability", title_justify="left")
    for part in agreement.reliability:
        scores = f"{part.lowest:.2f} to {part.highest:.2f}"
        curve.add_row(
            scores, str(part.rate.n), f"{part.rate.value:.0%}", f"{part.rate.low:.0%} to {part.rate.high:.0%}"
        )
    console.print(curve, "")
    rates: list[CorrectedRate] = found["rates"]
    if rates:
        title = f"Good replies among the {rates[0].n_judged} without a label: {rates[0].judged:.1%} as judged"
        corrected = Table("corrected by", "rate", "95% interval", title=title, title_justify="left")
        for rate in rates:
            corrected.add_row(rate.method, f"{rate.value:.1%}", f"{rate.low:.1%} to {rate.high:.1%}")
        console.print(corrected)
