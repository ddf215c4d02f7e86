"""What a folder of the joint evaluation holds: its settings, and the answers and the usage in Inspect's logs."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from inspect_ai.log import EvalLog, read_eval_log
from inspect_ai.model import ModelUsage
from inspect_ai.scorer import Score

from eval.crosseval_cost import Tokens
from eval.crosseval_items import Interview, load_interviews
from eval.crosseval_models import weights_of
from eval.item_forms import as_text
from eval.kept_settings import check_kept, write_kept

UNUSED = {"events", "store", "attachments", "timelines", "messages"}  # of a log, when only the replies are read


@dataclass(frozen=True)
class Settings:
    """What decides the answers. A folder holds one set of them; models can be added."""

    tests: tuple[str, ...]
    limit: int
    seed: int
    max_tokens: int
    judge: str | None


@dataclass(frozen=True)
class Answer:
    """A finished interview: replies by talk and turn; judged is the judge's flag."""

    model: str
    item: Interview
    replies: list[list[str]]
    judged: bool | None
    cut: int  # replies that ended at max_tokens
    log: str


@dataclass
class Record:
    """What the logs of a folder hold. usage: of every model, and of the judge under "judge"."""

    answers: dict[tuple[str, str, str], Answer] = field(default_factory=dict)  # by model, part, item
    usage: dict[str, Tokens] = field(default_factory=dict)
    errors: dict[tuple[str, str, str], str] = field(default_factory=dict)
    logs: dict[str, list[str]] = field(default_factory=dict)  # model -> log files
    outdated: dict[str, list[str]] = field(default_factory=dict)  # the same, of other weights under the same name
    unreadable: list[str] = field(default_factory=list)


def check_settings(settings: Settings, out: Path) -> None:
    """Raises ValueError if the folder holds answers to other settings."""
    check_kept(out / "settings.json", _plain(settings))


def write_settings(settings: Settings, out: Path) -> None:
    """Note the settings in the folder, before the first answer."""
    write_kept(out / "settings.json", _plain(settings))


def _plain(settings: Settings) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(settings)))


def fingerprint(item: Interview) -> str:
    """Changes when what is asked changes, so that an old answer is not taken for one to a new question."""
    texts = [[as_text(talk.history), *talk.turns] for talk in item.talks]
    return hashlib.sha256(json.dumps(texts, ensure_ascii=False).encode()).hexdigest()[:16]


def read_record(out: Path, settings: Settings) -> Record:
    """Everything that the logs of a folder hold, the newest answer to each item.

    A local model that has other files now, since its run was made again, is another model: of its old logs only what
    the judge has used counts.
    """
    record = Record()
    known: dict[str, dict[str, Interview]] = {}
    for path, log in _logs(out, record):
        about, part = log.eval.metadata or {}, log.eval.task
        name, outdated = str(about.get("model")), _outdated(about)
        (record.outdated if outdated else record.logs).setdefault(name, []).append(path.name)
        if part not in known:
            known[part] = {item.id: item for item in load_interviews(part, settings.limit, settings.seed)}
        if log.error is not None and not outdated:  # of the task as a whole
            record.errors[name, part, ""] = _cause(log.error.message)
        for one in log.samples or ():
            key = (name, part, str(one.id))
            graded = one.role_usage.get("grader", ModelUsage())
            spent = sum(one.model_usage.values(), ModelUsage())
            mine = [] if outdated else [(name, _tokens(spent) - _tokens(graded))]
            for whose, tokens in (*mine, ("judge", _tokens(graded))):
                record.usage[whose] = record.usage.get(whose, Tokens()) + tokens
            if outdated:
                continue
            item = known[part].get(str(one.id))
            if one.error is not None or "replies" not in one.metadata or item is None:
                if one.error is not None:
                    record.errors[key] = _cause(one.error.message)
                continue
            if one.metadata.get("print") != fingerprint(item):
                continue
            judged = ((one.scores or {}).get("judge") or Score(value=0.0)).metadata or {}
            record.answers[key] = Answer(
                name, item, one.metadata["replies"], judged.get("flagged"), int(one.metadata["cut"]), path.name
            )
    record.errors = {key: text for key, text in record.errors.items() if key not in record.answers}
    return record


def _outdated(about: Mapping[str, Any]) -> bool:
    """Whether the model of a log has other files now; one whose files are gone cannot be told from what it was."""
    try:
        return about.get("weights") != weights_of(str(about.get("model")))
    except ValueError:
        return False


def _tokens(usage: ModelUsage) -> Tokens:
    cached = usage.input_tokens_cache_read or 0
    return Tokens(0, usage.input_tokens + cached + (usage.input_tokens_cache_write or 0), usage.output_tokens, cached)


def _cause(message: str) -> str:
    """The last line of an error; before it Inspect puts the request, which the log shows. Its \\n may be escaped."""
    lines = [line.strip() for line in re.split(r"\n|\\n", message)]
    return next((line for line in reversed(lines) if len(line) > 2), message)


def _logs(out: Path, record: Record) -> Iterator[tuple[Path, EvalLog]]:
    """The readable logs of a folder, the oldest first."""
    for path in sorted((out / "logs").glob("*.eval")):
        try:
            log = read_eval_log(path, exclude_fields=UNUSED)
        except Exception:  # the reader raises whatever zip, JSON or pydantic do
            record.unreadable.append(path.name)
            continue
        yield path, log
