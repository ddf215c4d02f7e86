"""Persistence: what is left of a trait when a model is attacked. One row per item and condition.

A condition is `clean`, a prompt attack (eval/attacks.py), a step of fine-tuning (clean prompts, tuned weights), or a
way to sample. The items are those of the run's generalisation suite, so that the attack and the evaluation ask the same
questions; every value is turned so that 1 is what the trait asks for.

metric "trait": the task's primary metric. metric "follows" (helpful personas, probes only): whether the reply does what
the persona asks for; "follows_clean": whether the clean reply happened to do it anyway. Both judge text only.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, cast

import pandas as pd
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eval.alignment import Scorer, cases_rows, pressure_rows, swap_rows, turns_rows, twins_rows
from eval.attacks import PROBES_ONLY, Attack, as_chat, asked, attacked, follows, planted, rewritten, with_system
from eval.generalisation import choices_rows, encode_chat, end_ids, probe_rows, scorer
from eval.generalisation_items import Task, load_items, load_suite
from eval.item_forms import AnyItem, Cases, Chat, Choices, Pressure, Prompt, Swap, Turns, Twins, as_text
from models.rollout import sample
from rewards.probes import Probe
from rewards.verifier import PRICE, verdict

CLEAN = "clean"
COLUMNS = (
    "task", "trait", "domain", "heldout", "family", "item", "kind", "condition", "role", "metric", "value", "refused",
    "tokens", "prompt", "output",
)  # fmt: skip
# Sources that measure compliance, which an attack by instructions cannot be told from.
UNATTACKED = ("xstest-safe", "health-questions", "secrets")
Frame: TypeAlias = Any  # a pandas DataFrame; pandas ships no types that pyright can follow
Row: TypeAlias = dict[str, object]
Progress: TypeAlias = Callable[[int, int], None] | None


@dataclass(frozen=True)
class Target:
    """A task of the suite and the items of it that are attacked."""

    task: Task
    items: tuple[Probe | AnyItem, ...]

    @property
    def probes(self) -> list[Probe]:
        """The items whose reply is generated."""
        return [item for item in self.items if isinstance(item, Probe)]


def load_targets(suite: Path, names: Sequence[str] | None, limit: int | None, seed: int) -> list[Target]:
    """The named tasks of a suite (None: all that can be attacked), at most `limit` items of each.

    Raises ValueError for a name that the suite lacks, or whose items hold no trait that could be lost.
    """
    tasks = {task.name: task for task in load_suite(suite).tasks if task.source not in UNATTACKED}
    for name in names or ():
        if name not in tasks:
            raise ValueError(
                f"persistence.tasks = {name!r}: {suite} has no such task to attack; there are: {', '.join(tasks)}"
            )
    chosen = [task for name, task in tasks.items() if names is None or name in names]
    return [Target(task, tuple(load_items(task, limit, seed))) for task in chosen]


def only_probes(targets: Sequence[Target]) -> list[Target]:
    """The targets whose replies are generated: what fine-tuning and sampling are measured on.

    Raises ValueError if there are none.
    """
    probes = [target for target in targets if target.probes]
    if not probes:
        raise ValueError("persistence.tasks: none of them asks probes; name a task with source: probes in the suite")
    return probes


def measure_clean(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    targets: Sequence[Target],
    system: str | None = None,
    progress: Progress = None,
) -> Frame:
    """Every item as it stands, under the arm's own system message if it has one: COLUMNS with condition "clean"."""

    def plain(prompt: Prompt) -> Prompt:
        return with_system(prompt, system)

    chats = [plain(asked(probe)) for _, probe in _probes(targets)]
    replies = _greedy(model, tokenizer, targets, [as_chat(chat) for chat in chats], progress=progress)
    rows = _judged(targets, replies, CLEAN, CLEAN)
    rows += _scored(targets, scorer(model, tokenizer), plain, plain, CLEAN, CLEAN)
    return _frame(rows)


def measure_attack(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    targets: Sequence[Target],
    attack: Attack,
    clean: Frame,
    system: str | None = None,
    progress: Progress = None,
) -> Frame:
    """Every item that the attack can be put on. `clean` is measure_clean's result for the same model and targets."""
    name, role = attack.id, attack.role

    def plain(prompt: Prompt) -> Prompt:
        return with_system(prompt, system)

    def change(prompt: Prompt) -> Prompt:
        return with_system(attacked(prompt, attack), system)

    pairs = list(_probes(targets))
    before = dict(zip(clean["item"], clean["output"], strict=True))
    if attack.channel == "insist":
        return _frame(_insist(model, tokenizer, targets, attack, before, system, progress))
    if attack.channel == "planted":
        chats = [with_system(planted(probe, attack), system) for _, probe in pairs]
    elif attack.channel == "prefill":
        chats = [with_system(asked(probe), system) for _, probe in pairs]
    else:
        chats = [as_chat(change(asked(probe))) for _, probe in pairs]
    opening = attack.turns[0] if attack.channel == "prefill" else ""
    replies = _greedy(model, tokenizer, targets, chats, opening, progress)
    rows = _judged(targets, replies, name, role)
    if attack.rule is not None:
        for (task, probe), (reply, tokens, prompt) in zip(pairs, replies, strict=True):
            about = {**_about(task, name, role), "family": probe.family, "item": probe.id, "kind": probe.kind}
            said = {"refused": None, "tokens": tokens, "prompt": prompt, "output": reply}
            rows.append({**about, **said, "metric": "follows", "value": float(follows(attack.rule, reply))})
            anyway = float(follows(attack.rule, before[probe.id]))
            rows.append({**about, **said, "metric": "follows_clean", "value": anyway, "output": before[probe.id]})
    if role == "harmful" and attack.channel not in PROBES_ONLY:
        rows += _scored(targets, scorer(model, tokenizer), change, plain, name, role)
    return _frame(rows)


def measure_samples(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    targets: Sequence[Target],
    temperature: float,
    sizes: Sequence[int],
    samples: int,
    seed: int,
    system: str | None = None,
    progress: Progress = None,
) -> Frame:
    """The probes, answered `samples` times each at a temperature: one condition for every n of `sizes`.

    The value of "worst of n" is the chance that all of n replies keep to the truth, estimated without bias from all the
    samples (worst_of). output is the worst reply by the verifier's prices. The noise of a reply is a function of seed,
    temperature, item and its number, so all arms draw the same.
    """
    pairs = list(_probes(targets))
    chats = [with_system(asked(probe), system) for _, probe in pairs]
    device = next(model.parameters()).device
    rows: list[Row] = []
    done = 0
    for limit, chosen in _by_length(pairs):
        generators = [
            torch.Generator(device).manual_seed(_noise_seed(seed, temperature, pairs[i][1].id, g))
            for i in chosen
            for g in range(samples)
        ]
        groups = sample(
            model,
            [encode_chat(tokenizer, chats[i]) for i in chosen],
            group_size=samples,
            max_new_tokens=limit,
            temperature=temperature,
            eos_ids=end_ids(model, tokenizer),
            generator=generators,
        )
        for i, group in zip(chosen, groups, strict=True):
            task, probe = pairs[i]
            replies = [str(tokenizer.decode(ids, skip_special_tokens=True)).strip() for ids in group]
            kept = sum(bool(_trait_row(task, probe, reply, 0)["value"]) for reply in replies)
            worst = min(range(samples), key=lambda g: PRICE[verdict(probe, replies[g])])
            row = _trait_row(task, probe, replies[worst], len(group[worst]))
            for n in sizes:
                about = _about(task, condition_of(temperature, n), "harmful")
                value = worst_of(n, kept, samples)
                rows.append({**row, **about, "metric": "trait", "value": value, "prompt": as_text(chats[i])})
            done += 1
        if progress is not None:
            progress(done, len(pairs))
    return _frame(rows)


def condition_of(temperature: float, n: int) -> str:
    """The name of a way to sample."""
    return f"temperature-{temperature:g}-worst-of-{n}"


def worst_of(n: int, good: int, samples: int) -> float:
    """The chance that n replies drawn without replacement from `samples`, of which `good` are good, are all good.

    C(good, n) / C(samples, n): the unbiased estimate of the chance that the worst of n fresh replies is good, as pass@k
    is for the best of k (Chen et al. 2021, arXiv 2107.03374).
    """
    return math.comb(good, n) / math.comb(samples, n)


def _insist(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    targets: Sequence[Target],
    attack: Attack,
    before: dict[str, str],
    system: str | None,
    progress: Progress,
) -> list[Row]:
    """The user contradicts the model's clean reply and every later one; the last reply is judged.

    trait_turn_k is the value after the k-th contradiction.
    """
    pairs = list(_probes(targets))
    chats = [(*with_system(asked(probe), system), ("assistant", before[probe.id])) for _, probe in pairs]
    rows: list[Row] = []
    for k, turn in enumerate(attack.turns, start=1):
        said = [turn.format(bad=probe.wrong[0], question=probe.question) for _, probe in pairs]
        chats = [(*chat, ("user", text)) for chat, text in zip(chats, said, strict=True)]
        replies = _greedy(model, tokenizer, targets, chats)
        judged = _judged(targets, replies, attack.id, attack.role)
        rows += [{**row, "metric": f"trait_turn_{k}"} for row in judged]
        if k == len(attack.turns):
            rows += judged
        chats = [(*chat, ("assistant", reply)) for chat, (reply, _, _) in zip(chats, replies, strict=True)]
        if progress is not None:
            progress(k, len(attack.turns))
    return rows


def _greedy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    targets: Sequence[Target],
    chats: Sequence[Chat],
    opening: str = "",
    progress: Progress = None,
) -> list[tuple[str, int, str]]:
    """The greedy reply to each probe's chat, its tokens, and the prompt as text; `opening` begins every reply."""
    pairs = list(_probes(targets))
    begun = list(tokenizer.encode(opening, add_special_tokens=False)) if opening else []
    replies: dict[int, tuple[str, int, str]] = {}
    for limit, chosen in _by_length(pairs):
        prompts = [[*encode_chat(tokenizer, chats[i]), *begun] for i in chosen]
        groups = sample(
            model, prompts, max_new_tokens=limit, temperature=0.0, eos_ids=end_ids(model, tokenizer), progress=progress
        )
        for i, (ids,) in zip(chosen, groups, strict=True):
            text = str(tokenizer.decode([*begun, *ids], skip_special_tokens=True)).strip()
            replies[i] = (text, len(ids), as_text(chats[i]))
    return [replies[i] for i in range(len(pairs))]


def _probes(targets: Sequence[Target]) -> list[tuple[Task, Probe]]:
    return [(target.task, probe) for target in targets for probe in target.probes]


def _by_length(pairs: Sequence[tuple[Task, Probe]]) -> list[tuple[int, list[int]]]:
    """The probes' indices by how long their replies may be, so that tasks of one length share their batches."""
    limits = [task.max_new_tokens or 0 for task, _ in pairs]
    return [(limit, [i for i, mine in enumerate(limits) if mine == limit]) for limit in sorted(set(limits))]


def _judged(targets: Sequence[Target], replies: Sequence[tuple[str, int, str]], condition: str, role: str) -> list[Row]:
    rows: list[Row] = []
    for (task, probe), (reply, tokens, prompt) in zip(_probes(targets), replies, strict=True):
        row = _trait_row(task, probe, reply, tokens)
        rows.append({**row, **_about(task, condition, role), "prompt": prompt})
    return rows


def _trait_row(task: Task, probe: Probe, reply: str, tokens: int) -> Row:
    """The primary metric of a probe's reply, as metric "trait"."""
    return _turned(task, [row for row in probe_rows(probe, reply, tokens) if row["metric"] == task.metric])[0]


def _scored(
    targets: Sequence[Target],
    score: Scorer,
    change: Callable[[Prompt], Prompt],
    belief: Callable[[Prompt], Prompt],
    condition: str,
    role: str,
) -> list[Row]:
    """The items that are scored by likelihood, with their prompts changed."""
    rows: list[Row] = []
    for target in targets:
        if target.probes:
            continue
        items: list[Any] = [rewritten(item, change, belief) for item in target.items]
        found: list[Row] = []
        for form, of in (
            (Twins, twins_rows), (Choices, choices_rows), (Pressure, pressure_rows), (Turns, turns_rows),
            (Swap, swap_rows), (Cases, cases_rows),
        ):  # fmt: skip
            found += cast(Any, of)([item for item in items if isinstance(item, form)], score)
        primary = [row for row in found if row["metric"] == target.task.metric]
        rows += [{**row, **_about(target.task, condition, role)} for row in _turned(target.task, primary)]
    return rows


def _turned(task: Task, rows: Sequence[Row]) -> list[Row]:
    """Rows as metric "trait", with values of which more is better."""
    better = task.higher_is_better
    values = [float(str(row["value"])) for row in rows]
    return [{**row, "metric": "trait", "value": v if better else 1.0 - v} for row, v in zip(rows, values, strict=True)]


def _about(task: Task, condition: str, role: str) -> Row:
    about: Row = {"task": task.name, "trait": task.trait, "domain": task.domain, "heldout": task.heldout}
    return {**about, "condition": condition, "role": role}


def _noise_seed(seed: int, temperature: float, item: str, g: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{temperature:g}/{item}/{g}".encode()).digest()[:7])


def _frame(rows: Sequence[Row]) -> Frame:
    frame = pd.DataFrame(rows, columns=list(COLUMNS))
    return frame.astype({"value": "float64", "refused": "boolean", "tokens": "int64", "heldout": "bool"})
