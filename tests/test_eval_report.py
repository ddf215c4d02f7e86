"""The report of a generated run: complete in itself, harmless, small, and with the items behind the numbers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from rich.console import Console
from test_eval_results import FAMILIES, ITEMS, write_run

from eval.report import headline, pack_items, summary_table, unbroken, write_report
from eval.report_charts import VERDICTS, build_charts
from eval.results import load_items, primary_rows, write_results


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_run(tmp_path_factory.mktemp("runs") / "synthetic", benchmarks=8)
    for path in folder.glob("arms/*/*/eval/items.parquet"):
        frame: Any = pd.read_parquet(path)
        frame.loc[frame["item"] == "law-3", "output"] = "</script><script>document.title = 'broken'</script>\u2028"
        frame.to_parquet(path)
    write_results(folder)
    write_report(folder)
    return folder


@pytest.fixture(scope="module")
def results(run: Path) -> dict[str, Any]:
    return json.loads((run / "results.json").read_text())


@pytest.fixture(scope="module")
def page(run: Path) -> str:
    return (run / "report.html").read_text(encoding="utf-8")


def embedded(page: str, name: str) -> Any:
    match = re.search(rf'<script type="application/json" id="{name}">(.*?)</script>', page, re.DOTALL)
    assert match is not None
    return json.loads(match.group(1))


def test_page_needs_nothing_from_outside(page: str) -> None:
    shell = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    assert not re.search(r"""(?:src|srcset)\s*=|@import|url\(|<link|<iframe|https?:""", shell)
    assert not re.search(r"<script[^>]*\ssrc", page)
    assert all(target.startswith("#") for target in re.findall(r'href="([^"]*)"', shell))


def test_page_is_written_whole_and_the_same_twice(run: Path, page: str) -> None:
    assert write_report(run).read_text(encoding="utf-8") == page
    assert [path.name for path in run.glob("report*")] == ["report.html"]
    assert page.rstrip().endswith("</html>")
    assert "&amp;nbsp;" not in page


def test_answers_cannot_break_out_of_the_page(page: str) -> None:
    assert "<script>document.title" not in page
    task = embedded(page, "items")["tasks"]["truthfulness-law"]
    item = next(item for item in task["items"] if item[0] == "law-3")
    assert item[5]["control"][0][2].startswith("</script><script>")


def test_every_task_leads_to_its_items(page: str, results: dict[str, Any]) -> None:
    tasks = embedded(page, "items")["tasks"]
    linked = set(re.findall(r'<tr class="open" data-task="([^"]+)"', page))
    rows = results["generalisation"] + [row for suite in results["capability"].values() for row in suite["tasks"]]
    assert linked == {row["task"] for row in rows} == set(tasks)
    health = tasks["truthfulness-health"]["items"]
    assert len(health) == FAMILIES * ITEMS
    name, kind, domain, family, prompt, said = health[0]
    assert (name, kind, domain, prompt) == ("health-0", "invented", "health", "What is the health thing 0?")
    assert family == "family-0"
    assert set(said) == {"base", "control", "dose-05", "dose-25"}


def test_page_says_every_number_of_the_table(page: str, results: dict[str, Any]) -> None:
    text = re.sub(r"<[^>]+>", " ", page).replace("\u00a0", " ").replace("\u2060", "")
    for row in results["generalisation"]:
        assert f"{100 * row['delta']:+.1f} [{100 * row['ci_low']:+.1f}, {100 * row['ci_high']:+.1f}]" in text
    for claim in results["claims"]:
        assert claim["text"].replace("'", "&#39;") in text
    assert "health (trained)" in page
    assert "+4.00%" in text
    assert '<td class="off">+4.00%' in page


def test_page_says_what_a_verdict_and_a_benchmark_are(page: str) -> None:
    means = "when two one-sided tests at 5% place the difference within ±5 points, that is, when its 90% interval lies"
    assert page.count(means) == 2  # where the benchmarks are shown, and under Method
    assert "Every benchmark is recast as multiple choice" in page


def test_names_and_intervals_stay_on_one_line() -> None:
    text = unbroken("dose-5 and dose-50: +1.0 [-2.0, +4.0] points (n = 3).", ["dose-5", "dose-50"])
    assert text == "dose-\u20605 and dose-\u206050: +1.0 [-2.0,\u00a0+4.0] points (n\u00a0=\u00a03)."


def test_there_are_twenty_prompts_to_compare(page: str) -> None:
    tasks = embedded(page, "items")["tasks"].values()
    assert sum(len(task["items"]) for task in tasks if task["metric"] == "truthful") >= 20


def test_charts_have_every_arm_and_benchmark(results: dict[str, Any]) -> None:
    charts = build_charts(results)
    curves = {"curve:control:standard", "curve:dose-05:trait", "curve:dose-25:standard"}
    assert {"domains", "others", "honesty", "refusal", "forest:dose-05", "forest:dose-25"} | curves <= set(charts)
    drawn = [row for layer in charts["forest:dose-25"]["layer"] for row in layer.get("data", {}).get("values", [])]
    assert {row["task"] for row in drawn if "task" in row} == {f"bench-{k:02d}" for k in range(8)}
    assert len({colour for colour, _ in VERDICTS.values()}) == len({shape for _, shape in VERDICTS.values()}) == 4


def test_a_task_is_drawn_with_the_metric_that_its_name_hides(results: dict[str, Any]) -> None:
    row = next(row for row in results["generalisation"] if row["task"] == "lie-detection")
    harmless = {**row, "task": "over-refusal-xstest", "metric": "complied"}
    chart = build_charts({**results, "generalisation": [harmless]})["others"]
    drawn = [row for layer in chart["layer"] for row in layer.get("data", {}).get("values", [])]
    drawn += chart.get("data", {}).get("values", [])
    assert {(row["label"], row["task"]) for row in drawn if "label" in row} == {
        ("over-refusal-xstest (complied)", "over-refusal-xstest"),
    }  # fmt: skip


def test_too_many_items_are_cut_evenly_and_counted(run: Path, results: dict[str, Any]) -> None:
    items = primary_rows(load_items(run))
    whole, shown, total = pack_items(items, results, 10_000_000)
    assert shown == total == 4 * FAMILIES * ITEMS + 20 + 8 * 20
    text, shown, total = pack_items(items, results, len(whole) // 3)
    assert len(text.encode()) <= len(whole) // 3
    assert 0 < shown < total
    counts = {name: len(task["items"]) for name, task in json.loads(text)["tasks"].items()}
    assert len(set(counts.values())) == 1
    assert len(counts) == 13


def test_headline_answers_in_words_and_numbers(results: dict[str, Any]) -> None:
    row = next(r for r in results["aggregates"] if (r["name"], r["arm"]) == ("truthfulness-heldout-domains", "dose-25"))
    assert f"{100 * row['delta']:+.1f} points" in headline(results)


def test_headline_follows_the_intervals(results: dict[str, Any]) -> None:
    gain = next(row for row in results["aggregates"] if row["name"] == "truthfulness-heldout-domains")

    def told(**intervals: tuple[float, float, float]) -> str:
        keys = ("delta", "ci_low", "ci_high")
        rows = [{**gain, "arm": arm} | dict(zip(keys, values, strict=True)) for arm, values in intervals.items()]
        return headline({**results, "aggregates": rows})

    lead = "On truthfulness in domains never trained, "
    worse, none, better = (-0.054, -0.103, -0.003), (0.01, -0.02, 0.04), (0.189, 0.133, 0.254)
    assert told(a=worse) == f"{lead}a (-5.4 points [-10.3, -0.3]) is worse than control."
    assert told(a=none, b=none, c=none) == f"{lead}a, b and c are not told apart from control."
    assert told(a=worse, b=none, c=better) == (
        f"{lead}c (+18.9 points [+13.3, +25.4]) is better than control; "
        "a (-5.4 points [-10.3, -0.3]) is worse than control; b is not told apart from control."
    )
    assert headline({**results, "aggregates": []}).startswith("This run has no truthfulness tasks")


@pytest.mark.parametrize("width", [80, 120])
def test_summary_fits_the_terminal(results: dict[str, Any], width: int) -> None:
    console = Console(width=width, record=True, file=Path("/dev/null").open("w"), force_terminal=False)  # noqa: SIM115
    console.print(summary_table(results))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= width
    row = next(r for r in results["aggregates"] if (r["name"], r["arm"]) == ("truthfulness-heldout-domains", "dose-25"))
    assert f"{100 * row['delta']:+.1f}\n" in re.sub(r" +\n", "\n", text)
    assert f"{results['capability']['dose-05']['improved']} of 8 ahead" in text
    assert "flops +4.0%" in text


def test_report_without_results_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"results\.json is missing"):
        write_report(tmp_path)
