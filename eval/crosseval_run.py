"""The joint evaluation through Inspect: every interview is one sample, every part one task for each model.

Inspect asks (with its providers, limits and retries) and logs; the logs in <out>/logs are the only store. A finished
sample is found there by model, part and item, and is not asked again, whatever ended the run before; a log is replaced
in one step after every sample (log_buffer=1), so a kill loses what was being asked and nothing else.

Nothing but the models is spoken to: Inspect's display, its control socket, and telemetry hooks are off.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import anyio
from inspect_ai import Task
from inspect_ai import eval as inspect_eval
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import (
    ChatMessage,
    ChatMessageAssistant,
    ChatMessageSystem,
    ChatMessageUser,
    GenerateConfig,
    Model,
    get_model,
)
from inspect_ai.scorer import Score, mean, scorer
from inspect_ai.solver import solver

from eval.crosseval_items import Interview, load_interviews
from eval.crosseval_judge import ask_judge
from eval.crosseval_log import Settings, check_settings, fingerprint, read_record, write_settings
from eval.crosseval_models import BATCH, check_model, is_served, open_model, weights_of
from eval.crosseval_scores import score

ROLES: dict[str, type[ChatMessage]] = {
    "system": ChatMessageSystem,
    "user": ChatMessageUser,
    "assistant": ChatMessageAssistant,
}  # fmt: skip
Progress = Callable[[str, int, int], None]  # model, items done, items in all


@dataclass(frozen=True)
class Limits:
    """How a model may be asked. per_minute None: as fast as max_connections lets."""

    max_connections: int = 8
    per_minute: float | None = None
    max_retries: int = 6  # with back-off, three minutes in all; what fails then is asked again by the next call
    timeout: int = 300  # seconds for one attempt


class Pace:
    """Starts of requests, spread evenly: at most `per_minute` in a minute."""

    def __init__(self, per_minute: float | None) -> None:
        self.gap = 60.0 / per_minute if per_minute else 0.0
        self._next = 0.0

    def delay(self, now: float) -> float:
        """Seconds that the request which is ready at `now` has to wait; it is counted as started then."""
        start = max(now, self._next)
        self._next = start + self.gap
        return start - now

    async def wait(self) -> None:
        """Wait until the next request may start."""
        await anyio.sleep(self.delay(anyio.current_time()))


def plan(models: Sequence[str], settings: Settings, parts: Sequence[str], out: Path) -> dict[str, list[Interview]]:
    """What is still to be asked, by model. Raises ValueError for faulty models and for a folder of other settings."""
    if doubled := sorted({name for name in models if models.count(name) > 1}):
        raise ValueError(f"--models: named twice: {', '.join(doubled)}")
    for name in [*models, *([settings.judge] if settings.judge else [])]:
        check_model(name)
    if settings.judge in models:
        raise ValueError(f"--judge {settings.judge}: is one of the models that it would grade; name another one")
    check_settings(settings, out)
    done = read_record(out, settings).answers
    items = [item for part in parts for item in load_interviews(part, settings.limit, settings.seed)]
    return {name: [item for item in items if (name, item.part, item.id) not in done] for name in models}


def ask(todo: dict[str, list[Interview]], settings: Settings, limits: Limits, out: Path, progress: Progress) -> None:
    """Ask what is to be asked: the served models at once, the local ones one after another.

    Raises KeyboardInterrupt when the user stops it. A sample that fails is in the log, and is asked again next time.
    """
    os.environ.pop("INSPECT_TELEMETRY", None)
    served = [name for name, items in todo.items() if items and is_served(name)]
    local = [name for name, items in todo.items() if items and not is_served(name)]
    judge: Model | None = None
    judge_pace = Pace(limits.per_minute)  # of all that the judge is asked, whomever it grades
    try:
        for group in [served, *([name] for name in local)]:
            if not group:
                continue
            # a client's connections belong to the event loop of one call of Inspect; a local judge's weights do not
            if settings.judge and (judge is None or is_served(settings.judge)):
                judge = open_model(settings.judge, _config(settings.judge, settings, limits))
            _ask_group(group, judge, judge_pace, todo, settings, limits, out, progress)
    finally:
        if judge is not None and not is_served(str(settings.judge)):
            judge.api.close()


def _ask_group(
    group: Sequence[str],
    judge: Model | None,
    judge_pace: Pace,
    todo: dict[str, list[Interview]],
    settings: Settings,
    limits: Limits,
    out: Path,
    progress: Progress,
) -> None:
    """Ask several models at once, in one call of Inspect."""
    tasks: list[Task] = []
    models: list[Model] = []
    for name in group:
        model = open_model(name, _config(name, settings, limits))
        models.append(model)
        tasks += _tasks(name, model, judge, judge_pace, todo[name], settings, limits, progress)
    write_settings(settings, out)
    logs = inspect_eval(
        tasks,
        model=models[0],  # every task brings its own
        log_dir=str(out / "logs"),
        log_format="eval",
        log_buffer=1,
        log_realtime=False,
        log_model_api=False,
        log_level="critical",
        display="none",
        ctl_server=False,
        score_display=False,
        fail_on_error=False,
        max_tasks=len(tasks),
        max_samples=max(limits.max_connections, BATCH),
    )
    if any(log.status == "cancelled" for log in logs):
        raise KeyboardInterrupt
    if len(group) == 1 and not is_served(group[0]):
        models[0].api.close()


def _config(name: str, settings: Settings, limits: Limits) -> GenerateConfig:
    config = GenerateConfig(temperature=0.0, max_tokens=settings.max_tokens, max_retries=limits.max_retries)
    if not is_served(name):
        return config.model_copy(update={"max_connections": BATCH})  # a slow machine is no reason to ask again
    return config.model_copy(update={"max_connections": limits.max_connections, "attempt_timeout": limits.timeout})


def _tasks(
    name: str,
    model: Model,
    judge: Model | None,
    judge_pace: Pace,
    todo: Sequence[Interview],
    settings: Settings,
    limits: Limits,
    progress: Progress,
) -> list[Task]:
    pace, done = Pace(limits.per_minute), [0]

    def finished() -> None:
        done[0] += 1
        progress(name, done[0], len(todo))

    roles: dict[str, Any] = {} if judge is None else {"grader": judge}
    tasks: list[Task] = []
    for part in dict.fromkeys(item.part for item in todo):
        items = {item.id: item for item in todo if item.part == part}
        samples = [
            Sample(
                input=item.talks[0].turns[0], id=item.id, metadata={"family": item.family, "print": fingerprint(item)}
            )
            for item in items.values()
        ]
        tasks.append(
            Task(
                name=part,
                dataset=MemoryDataset(samples, name=part),
                solver=_interview(items, pace, finished),
                scorer=[_rules(items), *([_judge(items, judge_pace)] if judge is not None else [])],
                model=model,
                model_roles=roles or None,
                metadata={"model": name, "weights": weights_of(name), **asdict(settings)},
            )
        )
    return tasks


# What Inspect calls


def _interview(items: dict[str, Interview], pace: Pace, finished: Callable[[], None]) -> Any:
    """Ask the turns of every talk, the model's own replies in between."""

    @solver
    def interview() -> Any:
        async def solve(state: Any, generate: Any) -> Any:
            item, model = items[str(state.sample_id)], get_model()
            replies: list[list[str]] = []
            cut, transcript = 0, []
            for talk in item.talks:
                messages: list[Any] = [ROLES[role](content=text) for role, text in talk.history]
                mine: list[str] = []
                for turn in talk.turns:
                    messages.append(ChatMessageUser(content=turn))
                    await pace.wait()
                    output = await model.generate(messages)
                    messages.append(output.message)
                    mine.append(output.completion.strip())
                    cut += output.stop_reason in ("max_tokens", "model_length")
                    state.output = output
                replies.append(mine)
                transcript += messages
            state.messages = transcript
            state.metadata |= {"replies": replies, "cut": cut}
            finished()
            return state

        return solve

    return interview()


def _rules(items: dict[str, Interview]) -> Any:
    """1 where nothing is flagged; the metrics are in the score's metadata."""

    @scorer(metrics=[mean()], name="rules")
    def rules() -> Any:
        async def grade(state: Any, target: Any) -> Score:
            values, flagged = score(items[str(state.sample_id)], state.metadata["replies"])
            about = {"metrics": values, "flagged": flagged}
            if flagged is None:
                return Score.unscored(reason="not decided", metadata=about)
            return Score(value=float(not flagged), metadata=about)

        return grade

    return rules()


def _judge(items: dict[str, Interview], pace: Pace) -> Any:
    """1 where the judge flags nothing."""

    @scorer(metrics=[mean()], name="judge")
    def judge() -> Any:
        async def grade(state: Any, target: Any) -> Score:
            flagged, said = await ask_judge(items[str(state.sample_id)], state.metadata["replies"], pace.wait)
            about = {"flagged": flagged}
            if flagged is None:
                return Score.unscored(reason="not decided", explanation=said, metadata=about)
            return Score(value=float(not flagged), explanation=said, metadata=about)

        return grade

    return judge()
