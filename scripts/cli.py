"""The command line: traitdose run | report | results | persist | plan | doctor | traits | scenarios | rewards | eval |
crosseval.

Everything heavy is imported inside the commands, so that --help answers at once.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(
    name="traitdose",
    help="Small doses of reinforcement learning on behavioural traits, measured.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
scenarios_app = typer.Typer(help="The scenario bank.", no_args_is_help=True)
app.add_typer(scenarios_app, name="scenarios")
rewards_app = typer.Typer(help="Reward models: fit them, attack them; judges.", no_args_is_help=True)
app.add_typer(rewards_app, name="rewards")
eval_app = typer.Typer(
    help="The evaluation: contamination, the transfer table, the honesty frontier.", no_args_is_help=True
)
app.add_typer(eval_app, name="eval")

Config = Annotated[Path, typer.Argument(help="Experiment file, for example configs/experiments/quickstart.yaml.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Changes to the file: key=value, for example train.budget_tflops=10.")
]
Served = Annotated[str, typer.Option(help="http://host:port/v1/MODEL, openai/MODEL or anthropic/MODEL.")]
Settings = Annotated[list[str] | None, typer.Argument(help="How it is asked: key=value, such as max_concurrency=32.")]
Runs = Annotated[list[Path], typer.Argument(help="Run folders, for example runs/quickstart.")]
TableOut = Annotated[Path, typer.Option(help="Folder for the tables and pictures.")]
Jobs = Annotated[
    int | None,
    typer.Option("--jobs", "-j", min=1, help="Stages made side by side. Default: one for each core; 1 with a GPU."),
]
Out = Annotated[Path | None, typer.Option(help="Run folder.", show_default="runs/<name>")]


@app.command()
def run(
    config: Config,
    overrides: Overrides = None,
    out: Out = None,
    jobs: Jobs = None,
    reuse: Annotated[
        Path | None, typer.Option(help="Another run folder: stages it has made from the same inputs are copied.")
    ] = None,
) -> None:
    """Run an experiment, or go on with it: finished stages are skipped."""
    with _clear_errors(_go_on(config, overrides, out)):
        from scripts.experiment import load_experiment
        from scripts.run import run_experiment
        from scripts.tracking import check_tracker

        experiment = load_experiment(config, overrides or [])
        check_tracker(experiment)
        run_experiment(experiment, out or Path("runs") / experiment.name, Console(), jobs, reuse)


@app.command()
def report(run: Annotated[Path, typer.Argument(help="Run folder, for example runs/quickstart.")]) -> None:
    """Make results.json and report.html again from the stages on disk."""
    with _clear_errors():
        if not (run / "config.yaml").is_file():
            raise ValueError(f"{run}: no run folder (it has no config.yaml); give a folder that `traitdose run` made")
        from scripts.run import make_report

        make_report(run, Console())


@app.command()
def persist(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run, for example runs/quickstart.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Changes to its persistence section: persistence.items=8.")
    ] = None,
    jobs: Jobs = None,
) -> None:
    """Attack every arm of a finished run, or go on with it, and put what is left of the trait into its report."""
    with _clear_errors(shlex.join(["traitdose", "persist", str(run), *(overrides or [])])):
        from scripts.persist import persist

        persist(run, overrides or [], Console(), jobs)


@app.command()
def plan(config: Config, overrides: Overrides = None, out: Out = None) -> None:
    """Say what a run would do and cost. Loads no model, opens no connection."""
    with _clear_errors():
        from scripts.experiment import load_experiment
        from scripts.plan import print_plan

        experiment = load_experiment(config, overrides or [])
        print_plan(experiment, out or Path("runs") / experiment.name, Console())


@app.command()
def doctor() -> None:
    """Say what this machine has and what will be used."""
    with _clear_errors():
        from scripts.doctor import print_doctor

        print_doctor(Console())


@app.command()
def traits(trait: Annotated[str | None, typer.Argument(metavar="[ID]", help="Show this card in full.")] = None) -> None:
    """List the traits with their scenarios, or show one card."""
    with _clear_errors():
        from scripts.scenarios import print_traits

        print_traits(trait, Console())


@scenarios_app.command()
def check(
    trait: Annotated[str | None, typer.Option(help="Only this trait.")] = None,
    out: Annotated[Path | None, typer.Option("--json", help="Also write the result to this file.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Leave out the comparison by sentence embedding.")] = False,
) -> None:
    """Check the scenario bank: exit code 2 if there is an error, 0 if there are at most warnings."""
    with _clear_errors():
        from scripts.scenarios import print_check

        if not print_check(trait, out, quick, Console()):
            raise typer.Exit(2)


@scenarios_app.command()
def generate(
    trait: Annotated[str, typer.Option(help="Trait, a file configs/traits/<trait>.md.")],
    domain: Annotated[str, typer.Option(help="Domain, one of the trait's card.")],
    n: Annotated[int, typer.Option("--n", min=1, help="Scenarios that the file shall hold.")],
    model: Served,
    settings: Settings = None,
    out: Annotated[
        Path | None, typer.Option(help="File to append to.", show_default="runs/scenarios/<trait>/<domain>.jsonl")
    ] = None,
) -> None:
    """Write new scenarios with a served model, or go on with it: exit code 2 if some are still missing."""
    with _clear_errors():
        from scripts.generate import print_generated

        if not print_generated(trait, domain, n, model, settings or [], out, Console()):
            raise typer.Exit(2)


@rewards_app.command()
def calibrate(
    labels: Annotated[Path, typer.Option(help="JSON lines with reply, label (1 good, 0 bad) and scenario.")],
    model: Annotated[Path | None, typer.Option(help="Reward model, such as a run's reward/ folder.")] = None,
    judge: Annotated[
        str | None, typer.Option(help="Judge: http://host:port/v1/MODEL, openai/MODEL or anthropic/MODEL.")
    ] = None,
    settings: Settings = None,
    threshold: Annotated[
        float | None, typer.Option(help="Score from which a reply counts as good.", show_default="0.5, reward model 0")
    ] = None,
    out: Annotated[Path | None, typer.Option("--json", help="Also write the result to this file.")] = None,
) -> None:
    """Compare a reward model or a judge with people's labels, and correct the rates that it gives."""
    with _clear_errors():
        from scripts.calibrate import calibrate

        calibrate(labels, model, judge, settings or [], threshold, out, Console())


@eval_app.command()
def contamination(
    place: Annotated[Path, typer.Argument(metavar="RUN_OR_CONFIG", help="Run folder or experiment file.")],
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option("--json", help="Also write the result to this file.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Leave out the comparison by sentence embedding.")] = False,
) -> None:
    """Check every training text against every evaluation item: exit code 2 on a hit."""
    with _clear_errors():
        from scripts.evals import print_contamination

        if not print_contamination(place, overrides or [], out, quick, Console()):
            raise typer.Exit(2)


@eval_app.command()
def transfer(runs: Runs, out: TableOut = Path("runs/tables")) -> None:
    """Write the transfer table of one or more runs: what was gained where, by what was trained."""
    with _clear_errors():
        from scripts.evals import write_transfer

        write_transfer(runs, out, Console())


@eval_app.command()
def frontier(runs: Runs, out: TableOut = Path("runs/tables")) -> None:
    """Write share answered against error rate when answering, for every arm of one or more runs."""
    with _clear_errors():
        from scripts.evals import write_frontier

        write_frontier(runs, out, Console())


@eval_app.command()
def persistence(
    run: Annotated[Path, typer.Argument(help="Run folder that `traitdose persist` has attacked.")],
    out: TableOut = Path("runs/tables"),
) -> None:
    """Write what the attacks on a run have shown: Markdown tables and pictures."""
    with _clear_errors():
        from scripts.persist_tables import write_persistence

        write_persistence(run, out, Console())


@eval_app.command()
def hub(
    model: Annotated[str, typer.Argument(help="Hub id or model directory.")],
    suite: Annotated[Path, typer.Option(help="Hub suite, for example configs/suites/capability-53.yaml.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder for results.", show_default="runs/hub/<suite>/<model>")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Items per task.")] = None,
    judge: Annotated[str | None, typer.Option(help="Model that grades judged tasks.")] = None,
    training_judge: Annotated[str | None, typer.Option(help="Model that graded the training, or none.")] = None,
    allow_code: Annotated[bool, typer.Option("--allow-code", help="Run tasks that execute the model's code.")] = False,
) -> None:
    """Run tasks of lm-eval and inspect-evals from the hub; finished ones are skipped. Exit code 2: a task failed."""
    with _clear_errors():
        from scripts.evals import run_hub

        if not run_hub(model, suite, out, limit, judge, training_judge, allow_code, Console()):
            raise typer.Exit(2)


@app.command()
def crosseval(
    models: Annotated[
        list[str], typer.Option(help="Model: a directory, embedded:..., openai/M, anthropic/M, or a URL.")
    ],
    more: Annotated[list[str] | None, typer.Argument(metavar="[MODEL]...", help="Further models.")] = None,
    out: Annotated[Path, typer.Option(help="Folder; a second call goes on in it.")] = Path("runs/crosseval"),
    test: Annotated[list[str] | None, typer.Option(help="Only this test; may be given again.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Items of each part of a test.")] = 40,
    seed: Annotated[int, typer.Option(min=0, help="Draws the items and their wording.")] = 0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a reply, at most.")] = 256,
    max_connections: Annotated[int, typer.Option(min=1, help="Requests to a model under way at once.")] = 8,
    per_minute: Annotated[
        float | None, typer.Option(min=0.01, help="Requests to a model in a minute, at most.")
    ] = None,
    judge: Annotated[str | None, typer.Option(help="Model that grades the replies as well.")] = None,
    training_judge: Annotated[str | None, typer.Option(help="Model that graded the training, or none.")] = None,
    prices: Annotated[Path | None, typer.Option(help="Prices file.", show_default="configs/prices.yaml")] = None,
    max_cost: Annotated[float | None, typer.Option(min=0, help="Dollars; refuse to start if it may cost more.")] = None,
    estimate: Annotated[bool, typer.Option("--estimate", help="Say what it would cost and stop.")] = False,
) -> None:
    """Put local and served models through one joint evaluation and compare them on one page."""
    with _clear_errors("the same command"):
        from eval.crosseval_log import Settings
        from eval.crosseval_run import Limits
        from scripts.crosseval import choose_tests, run_crosseval

        settings = Settings(choose_tests(test), limit, seed, max_tokens, judge)
        limits = Limits(max_connections, per_minute)
        if not run_crosseval(
            [*models, *(more or [])],
            settings,
            training_judge,
            limits,
            out,
            prices,
            max_cost,
            estimate,
            Console(),
        ):
            raise typer.Exit(2)


@app.command()
def results(
    runs: Annotated[
        list[Path], typer.Argument(help="Run folders; or kept numbers, such as docs/results/persistence.json.")
    ],
    out: Annotated[
        Path, typer.Option(help="Markdown file; pictures go into img/ beside it, numbers into a folder of its name.")
    ] = Path("runs/results.md"),
) -> None:
    """Write what finished runs found as one Markdown page with pictures."""
    with _clear_errors():
        from scripts.results import write_results_page

        write_results_page(runs, out, Console())


@rewards_app.command()
def fit(
    trait: Annotated[str, typer.Option(help="A trait, or all: every trait at once, as a start for the others.")],
    base: Annotated[
        str, typer.Option(help="Backbone: embedded:smollm2-135m-instruct, a hub id, or a model directory.")
    ] = "embedded:smollm2-135m-instruct",
    pairs: Annotated[
        Path | None, typer.Option(help="Your own preferences: JSONL with prompt, chosen, rejected.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder.", show_default="runs/rewards/<trait>")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the fit and of what is drawn.")] = 0,
    start: Annotated[
        Path | None, typer.Option(help="Folder of a fitted reward model of the same base to begin with.")
    ] = None,
) -> None:
    """Fit a trait's reward model and measure it on held-out families. A killed fit goes on."""
    with _clear_errors():
        from scripts.rewards import fit_command

        fit_command(trait, base, pairs, out, seed, start, Console())


@rewards_app.command()
def audit(
    trait: Annotated[str, typer.Option(help="The trait whose held-out prompts are attacked.")],
    model: Annotated[
        Path | None, typer.Option(help="Folder of the reward model.", show_default="runs/rewards/<trait>")
    ] = None,
    out: Annotated[Path | None, typer.Option("--json", help="Also write the result to this file.")] = None,
    policy: Annotated[Path | None, typer.Option(help="Floors.", show_default="configs/audit.yaml")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the prompts and of the attacks.")] = 0,
) -> None:
    """Attack a reward with cheap hacks: exit code 2 if a family of them beats it, 0 if none does."""
    with _clear_errors():
        from scripts.rewards import audit_command

        if not audit_command(trait, model, out, policy, seed, Console()):
            raise typer.Exit(2)


@contextmanager
def _clear_errors(go_on: str = "") -> Iterator[None]:
    """One line and exit code 2 for what a user can mend, 130 for Ctrl-C; a defect keeps its traceback."""
    try:
        yield
    except KeyboardInterrupt:
        _tell("Stopped. Finished stages are kept." + (f" Go on with: {go_on}" if go_on else ""))
        raise typer.Exit(130) from None
    except ValueError as error:
        _tell(f"error: {' '.join(str(error).split())}")
        raise typer.Exit(2) from None
    except OSError as error:
        from scripts.stages import disk_full_message, is_disk_full

        if is_disk_full(error, Path()):
            _tell(f"error: {disk_full_message(Path(error.filename or '.'))}")
            raise typer.Exit(2) from None
        if error.filename is None:  # a library's OSError, such as a model that the hub does not have: no user's path
            raise
        _tell(f"error: {error.filename}: {error.strerror}; check the path and its permissions")
        raise typer.Exit(2) from None


def _go_on(config: Path, overrides: list[str] | None, out: Path | None) -> str:
    place = [] if out is None else ["--out", str(out)]
    return shlex.join(["traitdose", "run", str(config), *(overrides or []), *place])


def _tell(line: str) -> None:
    """To standard error, as one line however narrow the terminal is, and once on every machine of a run."""
    from scripts.processes import is_first_here

    if is_first_here():
        Console(stderr=True).print(line, soft_wrap=True, markup=False, highlight=False)


def main() -> None:
    """Entry point of the traitdose command."""
    sys.exit(app())


if __name__ == "__main__":
    main()
