"""`traitdose crosseval`: the joint evaluation of any mix of local and served models, and its comparison page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from eval.crosseval import build, item_rows
from eval.crosseval_cost import Price, Tokens, at_most, check_budget, dollars, judge_at_most, load_prices
from eval.crosseval_items import PARTS, TESTS, Interview, load_interviews
from eval.crosseval_log import Record, Settings, read_record
from eval.crosseval_models import is_served
from eval.crosseval_page import dollars_text, interval, labels, write_page
from eval.crosseval_run import Limits, ask, plan
from eval.crosseval_scores import METRICS
from eval.hub import check_judge
from scripts.experiment import find_file
from scripts.stages import write_text


def choose_tests(names: Sequence[str] | None) -> tuple[str, ...]:
    """The tests in their order. Raises ValueError for one that does not exist."""
    if unknown := sorted(set(names or ()) - set(TESTS)):
        raise ValueError(f"--test {unknown[0]}: there is no such test; there are: {', '.join(TESTS)}")
    return tuple(test for test in TESTS if not names or test in names)


def run_crosseval(
    models: Sequence[str],
    settings: Settings,
    training_judge: str | None,
    limits: Limits,
    out: Path,
    prices_file: Path | None,
    max_cost: float | None,
    only_estimate: bool,
    console: Console,
) -> bool:
    """Ask what is not answered yet, write crosseval.json, items.parquet and crosseval.html; True if nothing is missing.

    Raises ValueError for what the user can mend, before anything is asked.
    """
    if settings.judge:
        check_judge(settings.judge, training_judge, len(settings.tests))
    prices = load_prices(prices_file or find_file("configs/prices.yaml"))
    parts = [part for part in PARTS if any(part in TESTS[test] for test in settings.tests)]
    todo = plan(models, settings, parts, out)
    estimate = expected_tokens(todo, settings)
    costs = _print_estimate(estimate, prices, settings, console)
    check_budget(costs, max_cost)
    if only_estimate:
        return True
    if any(todo.values()):
        _ask(todo, settings, limits, out, console)
    record = read_record(out, settings)
    size = sum(len(load_interviews(part, settings.limit, settings.seed)) for part in parts)
    for name in models:
        if name in record.outdated:
            text = f"{name}: {len(record.outdated[name])} logs are of other weights under this name and are left out"
            console.print(text, highlight=False, markup=False, soft_wrap=True)
    results = build(models, record, settings, dict.fromkeys(models, size), estimate, prices)
    _write(results, record, models, out)
    _print_results(results, console)
    for name in ("crosseval.html", "crosseval.json", "items.parquet", "logs"):
        console.print(str(out / name), soft_wrap=True, highlight=False)
    return all(one["finished"] == one["asked"] for one in results["finished"])


def expected_tokens(todo: dict[str, list[Interview]], settings: Settings) -> dict[str, Tokens]:
    """What is still to be asked, by model, and by the judge under its key "judge"."""
    estimate = {name: at_most(items, settings.max_tokens) for name, items in todo.items()}
    if settings.judge:
        items = [item for mine in todo.values() for item in mine]
        estimate["judge"] = judge_at_most(items, settings.max_tokens)
    return estimate


def _print_estimate(
    estimate: dict[str, Tokens], prices: dict[str, Price], settings: Settings, console: Console
) -> dict[str, float | None]:
    """Print and return the expected dollars of the models that are to be asked; local ones cost nothing."""
    table = Table(
        "model", "requests", "tokens read", "written at most", "cost", title="To be asked", title_justify="left"
    )
    costs: dict[str, float | None] = {}
    label = labels([key for key in estimate if key != "judge"])
    for key, tokens in estimate.items():
        name = str(settings.judge) if key == "judge" else key
        cost = dollars(tokens, prices.get(name)) if is_served(name) and tokens.requests else 0.0
        costs[name] = (costs.get(name, 0.0) or 0.0) + cost if cost is not None else None
        shown = "local" if not is_served(name) else "nothing to ask" if not tokens.requests else dollars_text(cost)
        about = (f"about {tokens.read:,}", f"{tokens.written:,}")
        table.add_row(
            f"judge: {escape(name)}" if key == "judge" else escape(label[name]), f"{tokens.requests:,}", *about, shown
        )
    console.print(table)
    return costs


def _ask(todo: dict[str, list[Interview]], settings: Settings, limits: Limits, out: Path, console: Console) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    label = labels(list(todo))
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        tasks = {name: bars.add_task(escape(label[name]), total=len(items)) for name, items in todo.items() if items}

        def progress(name: str, done: int, _total: int) -> None:
            bars.update(tasks[name], completed=done)

        ask(todo, settings, limits, out, progress)


def _write(results: dict[str, Any], record: Record, models: Sequence[str], out: Path) -> None:
    import pandas as pd

    answers = [answer for (model, *_), answer in record.answers.items() if model in models]
    write_text(out / "crosseval.json", json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    said = {(a.model, a.item.part, a.item.id): json.dumps(a.replies, ensure_ascii=False) for a in answers}
    rows = [{**row, "replies": said[row["model"], row["part"], row["item"]]} for row in item_rows(answers)]
    partial = out / "items.parquet.partial"
    pd.DataFrame(rows).to_parquet(partial)
    partial.replace(out / "items.parquet")
    write_page(results, answers, out / "crosseval.html")


def _print_results(results: dict[str, Any], console: Console) -> None:
    """The headline rates, one column a model."""
    label = labels(results["models"])
    table = Table(
        "", *(escape(label[name]) for name in results["models"]), title="Joint evaluation", title_justify="left"
    )
    found = {(row["model"], row["part"], row["metric"]): row for row in results["rates"]}
    for part, metrics in METRICS.items():
        for name, metric in metrics.items():
            if metric.headline and any((model, part, name) in found for model in results["models"]):
                cells = [interval(found.get((model, part, name))) for model in results["models"]]
                table.add_row(metric.title + (" (less is better)" if metric.higher_is_better is False else ""), *cells)
    console.print(table)
    for row in results["cost"]:
        if not row["local"]:
            used = f"{row['used']['read']:,} tokens read, {row['used']['written']:,} written"
            console.print(
                f"{row['model']}: {used}, {dollars_text(row['used']['dollars'])}", highlight=False, markup=False
            )
    for one in results["finished"]:
        if one["finished"] < one["asked"]:
            first = f"; first error: {' '.join(one['errors'][0].split())[:300]}" if one["errors"] else ""
            counts = f"{one['model']}: {one['finished']} of {one['asked']} interviews finished"
            text = f"{counts}{first}; the same command asks for the rest"
            console.print(text, highlight=False, markup=False, soft_wrap=True)
