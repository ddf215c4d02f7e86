"""The commands under `traitdose eval`: contamination of training and evaluation, the transfer table, the frontier."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from eval.contamination import Hit, Text
from eval.item_forms import ITEMS
from rewards.probes import BANK, Probe, load_probes, probes_of
from rewards.scenarios import BANK as SCENARIOS
from scripts.experiment import Experiment, find_file, load_experiment
from scripts.stages import hash_files, run_stage, write_text

SHOWN = 20  # hits in the table; all of them are in the JSON
ERROR_SHOWN = 200  # characters of a failed task's error in the table


# Contamination


def print_contamination(place: Path, overrides: Sequence[str], out: Path | None, quick: bool, console: Console) -> bool:
    """Check a config, or a run folder with what it really trained on; print (and write) the hits. True if none."""
    is_run = place.is_dir()
    config = place / "config.yaml" if is_run else place
    if is_run and not config.is_file():
        raise ValueError(f"{place}: no run folder (it has no config.yaml); give a run folder or an experiment file")
    experiment = load_experiment(config, overrides)
    training = training_texts(experiment)
    known = {text.text for text in training}
    training += [text for text in (run_texts(place) if is_run else ()) if text.text not in known]
    items = evaluation_texts(experiment, limited=False)
    hits = find_hits(training, items, meaning=not quick)
    console.print(f"{len(training)} training texts against {len(items)} evaluation texts: {len(hits)} hits.")
    if hits:
        _print_hits(hits, console)
    if out is not None:
        _write_json(out, {"training": len(training), "evaluation": len(items), "hits": [_as_record(h) for h in hits]})
    return not hits


def check_run(experiment: Experiment, run_dir: Path) -> None:
    """The step of `traitdose run`: over the items that this run evaluates. Skipped when done.

    Raises ValueError on a hit.
    """

    def work(out: Path) -> None:
        hits = find_hits(training_texts(experiment), evaluation_texts(experiment, limited=True), meaning=True)
        if hits:
            raise ValueError(
                f"contamination: {len(hits)} training texts occur in the evaluation, first: {hits[0]}; list them with "
                "`traitdose eval contamination` and the same config, and take them out of the training"
            )
        _write_json(out / "hits.json", [])

    from scripts import constitution

    files = [find_file(suite.file) for suite in experiment.eval.suites.values()] + constitution.files(experiment)
    inputs = {
        "experiment": experiment.model_dump(mode="json", exclude={"persistence"}),  # checks its own data
        "data": hash_files(*files, BANK, BANK / "kinds", ITEMS, ITEMS / "alignment", *sorted(SCENARIOS.iterdir())),
    }
    run_stage(run_dir / "contamination", inputs, work, name="contamination")


def find_hits(training: Sequence[Text], items: Sequence[Text], meaning: bool) -> list[Hit]:
    """Hits by shared words and, with `meaning`, by sentence embedding."""
    from eval.contamination import shared_meaning, shared_runs

    return [*shared_runs(training, items), *(shared_meaning(training, items) if meaning else ())]


def training_texts(experiment: Experiment) -> list[Text]:
    """Everything that the experiment can train on: probes, pairs, warm start, standard prompts, scenarios."""
    from rewards.pairs import make_pairs
    from rewards.scenarios import load_scenarios
    from rewards.trait_prompts import source_shares, trait_pools
    from scripts import constitution
    from train.mix import standard_prompts
    from train.warm_start import warm_start_examples

    reward, train, texts = experiment.reward, experiment.train, []
    for seed in experiment.seeds:
        probes = probes_of(reward.domains, "train", seed)
        asked = [trait for trait in reward.traits if "conduct" in source_shares(reward, trait)]
        conduct = [p for trait in asked for p in trait_pools(trait, reward.domains, "train", seed).conduct]
        for probe in (*probes, *load_probes("everyday", "train", seed), *conduct):
            texts += _probe_texts(probe)
        for pair in make_pairs([*probes, *conduct], seed):
            texts += [Text(f"pair {pair.probe.id}", text, False) for text in (pair.chosen, pair.rejected)]
        for k, example in enumerate(
            warm_start_examples(experiment.warm_start, reward.domains, experiment.standard.tasks, seed)
        ):
            source = f"warm-start {k} ({example['source']})"
            texts.append(Text(source, example["answer"], False))
            if example["source"] in experiment.standard.tasks:  # the others ask the probes above
                texts.append(Text(source, example["question"], True))
        for prompt in standard_prompts(train.max_steps * train.prompts_per_step, seed, experiment.standard.tasks):
            texts.append(Text(f"standard {prompt['prompt_id']}", prompt["prompt"][0]["content"], True))
    for scenario in load_scenarios(split="train"):
        said = [message.content for message in scenario.messages]
        replies = [scenario.exemplars.good, *(bad.text for bad in scenario.exemplars.bad)]
        texts += [Text(f"scenario {scenario.id}", text, True) for text in said]
        texts += [Text(f"scenario {scenario.id}", text, False) for text in replies]
    return list(dict.fromkeys([*texts, *constitution.training_texts(experiment)]))


def run_texts(run_dir: Path) -> list[Text]:
    """What a run has really trained on: the warm start's examples, the fitted pairs, the prompts of the rollouts."""
    import pandas as pd

    from scripts import constitution

    texts: list[Text] = []
    if (path := run_dir / "start" / "examples.parquet").is_file():
        for row in pd.read_parquet(path).to_dict("records"):
            texts += [Text("warm start", row["question"], True), Text("warm start", row["answer"], False)]
    for path in sorted((run_dir / "reward").rglob("pairs.parquet")):
        pairs: Any = pd.read_parquet(path)
        for row in pairs[pairs["part"] == "train"].to_dict("records"):
            texts += [Text(f"pair {row['prompt_id']}", row[side], False) for side in ("chosen", "rejected")]
    for path in sorted(run_dir.glob("arms/*/seed-*/train/rollouts.parquet")):
        arm = path.parent.parent.parent.name
        rollouts: Any = pd.read_parquet(path, columns=["source", "prompt_id", "prompt"])
        # the trait prompts ask the probes, which are checked with their subjects
        for row in rollouts[rollouts["source"] == "standard"].drop_duplicates().to_dict("records"):
            texts.append(Text(f"rollout {arm} {row['prompt_id']}", row["prompt"], True))
    return list(dict.fromkeys(text for text in (*texts, *constitution.run_texts(run_dir)) if text.text))


def evaluation_texts(experiment: Experiment, limited: bool) -> list[Text]:
    """The items of the experiment's suites: all of them, or with `limited` those that it takes."""
    texts: list[Text] = []
    for name, suite in experiment.eval.suites.items():
        limit = suite.limit if limited else None
        reader = _capability_texts if name == "capability" else _generalisation_texts
        texts += reader(find_file(suite.file), limit, experiment.eval.seed)
    return list(dict.fromkeys(texts))


def _generalisation_texts(file: Path, limit: int | None, seed: int) -> Iterator[Text]:
    from eval.generalisation_items import load_items, load_suite
    from eval.item_forms import item_texts

    for task in load_suite(file).tasks:
        for item in load_items(task, limit, seed):
            if isinstance(item, Probe):
                yield from _probe_texts(item)
                continue
            prompts, replies = item_texts(item)
            yield from (Text(f"{task.name} {item.id}", text, True) for text in prompts)
            yield from (Text(f"{task.name} {item.id}", text, False) for text in replies)


def _capability_texts(file: Path, limit: int | None, _seed: int) -> Iterator[Text]:
    from eval.capability import load_suite
    from eval.capability_tasks import load_items

    suite = load_suite(file)
    for benchmark in suite.benchmarks:
        head, tail = benchmark.prompt.split("{question}", 1)
        for item in load_items(benchmark, suite.seed, limit):
            question = item.prompt.removeprefix(head).removesuffix(tail)
            yield Text(f"{benchmark.name} {item.id}", question, True)
            yield from (Text(f"{benchmark.name} {item.id}", choice, False) for choice in item.choices)


def _probe_texts(probe: Probe) -> list[Text]:
    subject = probe.subject if probe.kind != "false-premise" else ""
    asked = (*(text for _, text in probe.history), probe.question)
    texts = [Text(f"probe {probe.id}", text, True, subject) for text in asked]
    return texts + [Text(f"probe {probe.id}", text, False, subject) for text in (probe.right, *probe.wrong) if text]


def _print_hits(hits: Sequence[Hit], console: Console) -> None:
    table = Table("trained", "evaluated", "rule", "evidence", title="Contamination", title_justify="left")
    for hit in hits[:SHOWN]:
        table.add_row(*(escape(text) for text in (hit.training.source, hit.item.source, hit.rule, hit.evidence)))
    console.print(table)
    if len(hits) > SHOWN:
        console.print(f"{len(hits) - SHOWN} more; --json writes all of them")


def _as_record(hit: Hit) -> dict[str, str]:
    return {
        "training": hit.training.source,
        "item": hit.item.source,
        "rule": hit.rule,
        "evidence": hit.evidence,
        "training_text": hit.training.text,
        "item_text": hit.item.text,
    }


# Tables over several runs


def write_transfer(runs: Sequence[Path], out: Path, console: Console) -> None:
    """The transfer table of one or more runs: transfer.md, transfer.json and transfer.svg in `out`."""
    from eval.report_charts import transfer_chart
    from eval.transfer import cells_of, markdown_table

    cells = cells_of(list(_all_results(runs)))
    if not cells:
        raise ValueError(f"{runs[0]}: the run has no generalisation suite; there is nothing to transfer to")
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "transfer.md", markdown_table(cells))
    _write_json(out / "transfer.json", cells)
    columns = len({cell["column"] for cell in cells})
    _write_svg(out / "transfer.svg", transfer_chart(cells).properties(width=190 * columns))
    _tell(out, ("transfer.md", "transfer.json", "transfer.svg"), console)


def write_frontier(runs: Sequence[Path], out: Path, console: Console) -> None:
    """Share answered against error rate when answering, of every arm of the runs: frontier.json and frontier.svg."""
    from eval.frontier import rows_of
    from eval.report_charts import colours_of, honesty_chart

    rows = rows_of(list(_all_results(runs)))
    if not rows:
        raise ValueError(f"{runs[0]}: the run has no truthfulness probes; name a suite with probes under eval.suites")
    colours = colours_of(list(dict.fromkeys(row["arm"] for row in rows)))
    out.mkdir(parents=True, exist_ok=True)
    _write_json(out / "frontier.json", rows)
    _write_svg(out / "frontier.svg", honesty_chart(rows, colours).properties(width=620))
    _tell(out, ("frontier.json", "frontier.svg"), console)


def _all_results(runs: Sequence[Path]) -> Iterator[dict[str, Any]]:
    from eval.results import build_results

    for run in runs:
        yield build_results(run)


def _write_svg(path: Path, chart: Any) -> None:
    import vl_convert

    write_text(path, vl_convert.vegalite_to_svg(chart.to_dict()))


def _write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def _tell(out: Path, names: Sequence[str], console: Console) -> None:
    for name in names:
        console.print(str(out / name), soft_wrap=True, highlight=False)


# Hub suites


def run_hub(
    model: str,
    suite: Path,
    out: Path | None,
    limit: int | None,
    judge: str | None,
    training_judge: str | None,
    allow_code: bool,
    console: Console,
) -> bool:
    """Run a hub suite and print its scores; True if no task failed.

    Everything a run lacks is said before anything is downloaded.
    """
    from eval.hub import load_suite, run_suite

    plan = load_suite(find_file(str(suite)))
    folder = out or Path("runs") / "hub" / plan.name / (re.sub(r"[^\w.-]+", "-", model).strip("-.") or "model")

    def progress(name: str, done: int, total: int) -> None:
        console.print(f"{done + 1} of {total}: {name}", highlight=False)

    scores, errors = run_suite(plan, model, folder, limit, judge, training_judge, allow_code, progress)
    _write_json(folder / "scores.json", {"model": model, "scores": scores, "errors": errors})
    table = Table("task", "metric", "score", title=f"{plan.name}: {escape(model)}", title_justify="left")
    for task in plan.tasks:
        if task.name in scores:
            table.add_row(task.name, task.metric or "all", escape(json.dumps(scores[task.name])))
        elif task.name in errors:
            table.add_row(task.name, task.metric or "all", f"failed: {escape(errors[task.name][:ERROR_SHOWN])}")
    console.print(table)
    if left_out := [task.name for task in plan.tasks if task.name not in scores and task.name not in errors]:
        console.print(f"left out, because they execute model-written code (--allow-code): {', '.join(left_out)}")
    if errors:
        console.print(f"{len(errors)} tasks failed: {', '.join(errors)}; the same command tries them again")
    _tell(folder, ("scores.json",), console)
    return not errors
