"""What a run will do and cost, worked out from the config and file headers: no model is loaded, no connection opened.

Tokens are upper bounds: every completion is taken to be as long as it may be. FLOPs are counted as in the ledger
(train/ledger.py): 2N a token forward and 6N forward and backward for a model of N parameters (Kaplan et al. 2020,
arXiv 2001.08361). Times are "about": the machine's matrix product is timed, and each kind of work takes the share of it
that was measured on CPU cores (docs/LOG.md).
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
import statistics
import struct
import time
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from math import ceil, floor
from pathlib import Path

import psutil
import yaml
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from eval.generalisation_items import GENERATED, load_items, load_suite
from eval.item_forms import AnyItem, as_text, contexts
from models.embedded import EMBEDDED, cache_dir, gguf_path
from rewards.config import RewardConfig
from rewards.preferences import Messages, Preference
from rewards.probes import Probe
from rewards.trait_prompts import source_shares
from scripts.experiment import CHECKOUT, Experiment, find_file, is_hub_id
from scripts.make_stages import default_jobs
from scripts.plan_constitution import READING, fine_tuned_models, part_flops, part_rows
from scripts.run import list_stages, whole_stages
from scripts.tracking import has_wandb_key
from scripts.workers import usable_cores
from train.config import cuda_settings
from train.ledger import Passes
from train.mix import build_mix

# Counted FLOPs as a share of the fp32 matrix product, measured with SmolLM2-135M: docs/LOG.md, "Rates for the plan".
LEARN = 0.69  # packed forward and backward, LoRA
FORWARD = 0.46
SAMPLE = 0.24  # token by token, 32 completions at a time
LOAD_SECONDS = 8  # a stage's imports and weights
SIDE_BY_SIDE = 1.4  # work of two arms on a core each, against one after the other on two: 1.3 to 1.5 was seen

CHARS_PER_TOKEN = 3.8  # English and sums with a vocabulary of 49k; other vocabularies differ by about a fifth
TEMPLATE_TOKENS = 8  # chat template without a system message
CAPABILITY_TOKENS = 55  # a benchmark item with all its choices, mean of 20 from each of the 53
EXAMPLE_TOKENS = 45  # question and answer in the chat template; an answer without the question is half of it
ANSWERS = 4  # authored ones of a probe that the reward model is fitted on, and its question

GB = 1e9


@dataclass(frozen=True)
class Size:
    """A model's size as far as its files tell; layers, hidden, inner and vocabulary are 0 where they do not."""

    parameters: float
    layers: int
    hidden: int
    inner: int
    vocabulary: int
    source: str


@dataclass(frozen=True)
class Cost:
    """An upper bound: tokens that pass through a model, counted FLOPs, and seconds on this machine."""

    tokens: float
    flops: float
    seconds: float


@dataclass(frozen=True)
class ArmPlan:
    """One arm with one seed. Steps and prompts are the least that the budget buys: shorter answers and groups without a
    difference buy more."""

    steps: int
    trait_prompts: int
    standard_prompts: int
    completions: int
    cost: Cost


def model_size(base: str) -> Size | None:
    """A base's size from its GGUF header, its config.json and weight headers, or a hub id's name; else None."""
    folder = Path(base).expanduser()
    if base in EMBEDDED:
        converted = sorted((cache_dir() / "models").glob(f"{base.removeprefix('embedded:')}-*"))
        if not converted:  # the long way: the header holds the whole vocabulary
            return gguf_size(gguf_path(base))
        folder = converted[-1]
    if not folder.is_dir():
        found = re.search(r"(\d+(?:\.\d+)?)([bm])(?![a-z])", base.rsplit("/", 1)[-1].lower())
        return Size(float(found[1]) * {"b": 1e9, "m": 1e6}[found[2]], 0, 0, 0, 0, "its name") if found else None
    keys = ("num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        shape = [int(config.get("text_config", config).get(key) or 0) for key in keys]
        parameters = sum(_safetensors_parameters(file) for file in folder.glob("*.safetensors"))
    except (ValueError, KeyError, AttributeError, struct.error) as error:
        raise ValueError(f"base = {base!r}: a file there is damaged ({error}); download or save it again") from error
    if not parameters:  # *.bin files have no header to read; with 4 bytes a weight this is the least they hold
        parameters = sum(file.stat().st_size for file in folder.glob("*.bin")) / 4
    return Size(parameters, *shape, source="its weight headers")


def plan_arm(experiment: Experiment, arm: str, parameters: float, peak: float) -> ArmPlan:
    """What one arm does with one seed. Prompt lengths are the mean of its first 200 prompts."""
    train, dose, group = experiment.train, experiment.arms[arm].dose, experiment.train.group_size
    most = train.max_steps * train.prompts_per_step
    mix = build_mix(min(most, 200), dose, experiment.seeds[0], experiment.standard.tasks, experiment.reward)
    length = statistics.mean(prompt_tokens(prompt["prompt"]) for prompt in mix)
    rolled = length * (1 if train.prompt_sharing else group) + group * train.max_new_tokens  # tokens of one prompt
    asked = [prompt_tokens(prompt["prompt"]) for prompt in mix if prompt["source"] == "trait"]
    scored = dose * (statistics.mean(asked or [0.0]) + group * train.max_new_tokens)  # by one reward model
    learned = (Passes.of(train).token_flops(parameters) - 2 * parameters) * rolled  # with a critic, if there is one
    flops = (2 * parameters * rolled, 2 * parameters * scored, learned)
    affordable = train.budget_tflops * 1e12 / sum(flops) if parameters else most
    if train.max_tokens is not None:
        affordable = min(affordable, train.max_tokens / (group * train.max_new_tokens))
    prompts = min(affordable, most)
    seconds = sum(work / share for work, share in zip(flops, (SAMPLE, FORWARD, LEARN), strict=True)) / peak
    n = floor(prompts)
    trait = floor(n * dose + 1e-9)
    cost = Cost(prompts * (2 * rolled + scored), prompts * sum(flops), LOAD_SECONDS + prompts * seconds)
    return ArmPlan(ceil(prompts / train.prompts_per_step), trait, n - trait, n * group, cost)


def plan_stages(experiment: Experiment, parameters: float, peak: float) -> dict[str, Cost]:
    """Cost of each kind of stage: start, reward, train/<arm>, eval."""
    warm = experiment.warm_start
    costs = {
        "start": _cost(warm.examples * warm.epochs * EXAMPLE_TOKENS, 6 * parameters, LEARN, peak),
        "reward": plan_rewards(experiment.reward, parameters, peak),
        "eval": plan_eval(experiment, parameters, peak),
    }
    for arm, config in experiment.arms.items():
        if config.method == "trait":
            costs[f"train/{arm}"] = plan_arm(experiment, arm, parameters, peak).cost
        for part, flops in part_flops(experiment, arm).items() if config.method != "trait" else ():
            share = FORWARD if part in READING else LEARN
            costs[f"{part}/{arm}"] = Cost(0, flops if parameters else 0, LOAD_SECONDS + flops / (share * peak))
    return costs


def plan_rewards(reward: RewardConfig, parameters: float, peak: float) -> Cost:
    """Cost of fitting the reward models: on probes of knowledge, or on scenarios, and on what else is asked."""
    from rewards.fit import RECIPE, gather_parts, run_parts  # loads torch

    costs: list[Cost] = []
    for trait in reward.traits:
        learned = run_parts(reward, trait, 0)["train"]
        if "probes" in source_shares(reward, trait):
            asked = reward.probes * EXAMPLE_TOKENS
            costs.append(_cost(asked * reward.own_answers / 2, 2 * parameters, SAMPLE, peak))
            costs.append(_cost(asked * reward.epochs * (ANSWERS + reward.own_answers) / 2, 6 * parameters, LEARN, peak))
        else:
            learned = [*learned, *gather_parts(trait, None, 0)["train"]]
        costs.append(_cost(_preference_tokens(learned) * RECIPE.epochs, 6 * parameters, LEARN, peak))
    return Cost(*map(sum, zip(*map(astuple, costs), strict=True)))


def _preference_tokens(preferences: Sequence[Preference]) -> float:
    """Tokens of the preferences; a prompt is read once for all replies to it."""
    prompts = {preference.prompt_id: preference.prompt for preference in preferences}
    replies = {(p.prompt_id, text) for p in preferences for text in (p.chosen, p.rejected)}
    return sum(map(prompt_tokens, prompts.values())) + sum(text_tokens(text) for _, text in replies)


def plan_eval(experiment: Experiment, parameters: float, peak: float) -> Cost:
    """Cost of evaluating one model on all suites."""
    read = generated = 0.0
    for name, suite in experiment.eval.suites.items():
        path = find_file(suite.file)
        if name == "capability":
            read += CAPABILITY_TOKENS * sum(capability_sizes(path, suite.limit).values())
            continue
        for task in load_suite(path).tasks:
            items = load_items(task, suite.limit, experiment.eval.seed)
            read += sum(item_tokens(item) for item in items)
            if task.source in GENERATED:
                generated += len(items) * (task.max_new_tokens or 0)
    reading = _cost(read, 2 * parameters, FORWARD, peak)
    writing = _cost(generated, 2 * parameters, SAMPLE, peak)
    seconds = reading.seconds + writing.seconds - LOAD_SECONDS
    return Cost(read + generated, reading.flops + writing.flops, seconds)


def capability_sizes(path: Path, limit: int | None) -> dict[str, int]:
    """Benchmark name to the number of its items that are used."""
    try:  # eval.capability checks every key, but loads lm-eval
        benchmarks = yaml.safe_load(path.read_text(encoding="utf-8"))["benchmarks"]
        return {entry["name"]: min(entry["n"], limit or entry["n"]) for entry in benchmarks}
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{path}: no capability suite ({type(error).__name__}: {reason}); it has benchmarks, each with name and n, "
            "as in configs/suites/capability-53-offline.yaml"
        ) from error


def memory_bytes(experiment: Experiment, size: Size) -> float:
    """Peak of the training stage: policy, reward models, logits of a packed forward with gradients, activations.

    With train.gradient_checkpointing the inputs of all layers stand in memory, and one layer's activations.
    """
    train = experiment.train
    tokens = train.token_budget if train.prompt_sharing else train.prompts_per_step * train.group_size * 128
    policy = 1 if train.lora_rank else 4  # all weights: a gradient and two moments each
    weights = 4 * size.parameters * (policy + len(experiment.reward.traits))
    logits = 3 * 4 * tokens * size.vocabulary
    layer = 16 * size.hidden + 4 * size.inner
    kept = size.layers * size.hidden + layer if train.gradient_checkpointing else size.layers * layer
    activations = 4 * tokens * kept
    if train.algorithm == "ppo":
        activations *= 2  # the critic's stand beside the policy's until both go back
        weights += 4 * 4 * size.parameters * (train.critic == "model")  # a copy, its gradient and two moments
    return weights + logits + activations + 0.8 * GB  # the interpreter and its libraries


def missing(experiment: Experiment) -> list[str]:
    """What a run would lack on this machine, and what follows from it."""
    lacks: list[str] = []
    absent = [name for name, pinned in locked_versions().items() if installed_version(name) is None and pinned]
    if absent:
        lacks.append(f"packages of the lock: {', '.join(absent)} (make test installs them)")
    if is_hub_id(experiment.base) and not _in_hub_cache(experiment.base):
        lacks.append(f"{experiment.base} is neither a folder here nor in the hub's cache: the run would download it")
    if (wanted := cuda_settings(experiment.train)) and not has_cuda():
        lacks.append(f"a CUDA device, which {', '.join(wanted)} needs")
    tracking = experiment.tracking
    if tracking.backend == "trackio" and installed_version("trackio") is None:
        lacks.append("package trackio, which tracking.backend asks for (pip install trackio)")
    if tracking.backend == "wandb" and tracking.mode != "offline" and not has_wandb_key():
        lacks.append("a wandb key: " + ("set WANDB_API_KEY" if tracking.mode == "online" else "tracking stays offline"))
    return lacks


def has_cuda() -> bool:
    """Whether torch finds a CUDA device."""
    import torch

    return torch.cuda.is_available()


def locked_versions() -> dict[str, str]:
    """Package to pinned version, from requirements/cpu.lock."""
    lines = (CHECKOUT / "requirements" / "cpu.lock").read_text(encoding="utf-8").splitlines()
    pairs = (line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    return {name.strip(): version.split(";")[0].strip() for name, version in pairs}


def installed_version(package: str) -> str | None:
    """Its version without a local part such as +cpu; None if it is not installed."""
    try:
        return importlib.metadata.version(package).split("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return None


def matrix_rate() -> float:
    """FLOPs a second of this machine's fp32 matrix product, the best of a few tries (half a second in all)."""
    import torch

    n = 1024
    left, right = torch.rand(n, n), torch.rand(n, n)
    seconds: list[float] = []
    for _ in range(12):
        started = time.perf_counter()
        _ = left @ right
        seconds.append(time.perf_counter() - started)
    return 2 * n**3 / min(seconds)


def text_tokens(text: str) -> float:
    """About how many tokens a user message takes in its chat template."""
    return TEMPLATE_TOKENS + len(text) / CHARS_PER_TOKEN


def prompt_tokens(prompt: Messages) -> float:
    """About how many tokens a chat takes in its template."""
    return sum(text_tokens(turn["content"]) for turn in prompt)


def print_plan(experiment: Experiment, run_dir: Path, console: Console) -> None:
    """The whole plan on the terminal."""
    size, cores, peak = model_size(experiment.base), usable_cores(), matrix_rate()
    parameters = size.parameters if size else 0.0
    stages = list_stages(experiment, run_dir)
    whole = whole_stages(stages, run_dir)
    seeds, train = len(experiment.seeds), experiment.train

    console.print(f"[bold]Plan of {experiment.name}[/]  (nothing is loaded or run)\n")
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim")
    facts.add_column(overflow="fold")
    known = (
        f"{parameters / 1e6:.1f} M parameters, from {size.source}" if size else "size unknown until it is downloaded"
    )
    facts.add_row("base", f"{experiment.base}, {known}")
    for trait in experiment.reward.traits:
        facts.add_row("trait", _trait_summary(experiment.reward, trait))
    facts.add_row("standard", ", ".join(experiment.standard.tasks))
    facts.add_row(
        "training",
        f"{train.algorithm}, {train.budget_tflops:g} TFLOPs an arm, in steps of {train.prompts_per_step} prompts x "
        f"{train.group_size} completions, at most {train.max_new_tokens} tokens each and {train.max_steps} steps",
    )
    for name, suite in experiment.eval.suites.items():
        facts.add_row("eval", f"{name}: {_suite_summary(experiment, name, find_file(suite.file), suite.limit)}")
    facts.add_row("folder", str(run_dir))
    facts.add_row("stages", f"{len(whole)} of {len(stages)} are whole already")
    console.print(facts)

    console.print(_arms_table(experiment, parameters, peak))
    costs = plan_stages(experiment, parameters, peak)
    console.print(_stages_table(costs, [stage.name for stage in stages], whole))
    left = time_left([stage.name for stage in stages if stage.name not in whole], costs, default_jobs())
    notes = Table.grid(padding=(0, 2))
    notes.add_column(style="dim")
    notes.add_column(overflow="fold")
    if size:
        notes.add_row(
            "time left",
            f"[bold]about {duration(left)}[/] on {cores} CPU cores that multiply at {peak / 1e9:.0f} GFLOP/s; "
            "a GPU is not estimated",
        )
        memory = (
            f"about {memory_bytes(experiment, size) / GB:.1f} GB" if size.layers else "unknown: no config.json here"
        )
        notes.add_row("memory", f"{memory}, of {psutil.virtual_memory().total / GB:.0f} GB")
        place = next(folder for folder in (run_dir.resolve(), *run_dir.resolve().parents) if folder.exists())
        disk = 4 * parameters * 1.1 + seeds * len(experiment.arms) * 12 * 0.04 * parameters
        disk += 4 * parameters * seeds * fine_tuned_models(experiment)
        notes.add_row("disk", f"about {disk / GB:.1f} GB, {shutil.disk_usage(place).free / GB:.0f} GB are free")
    notes.add_row(
        "counting", "tokens are upper bounds; FLOPs: 2N a token forward, 6N forward and backward (N parameters)"
    )
    for i, lack in enumerate(missing(experiment) or ["nothing"]):
        notes.add_row("missing" if i == 0 else "", lack)
    console.print(notes)


def time_left(stages: Sequence[str], costs: Mapping[str, Cost], jobs: int) -> float:
    """Seconds of the stages; those of arms are made up to `jobs` at once."""
    own = sum(costs[_kind(name)].seconds for name in stages if name.startswith("arms/"))
    shared = sum(costs[_kind(name)].seconds for name in stages) - own
    return shared + own / (SIDE_BY_SIDE if jobs > 1 else 1)


def _arms_table(experiment: Experiment, parameters: float, peak: float) -> Table:
    seeds = ", ".join(map(str, experiment.seeds))
    table = _table(f"Arms, each with one seed (seeds: {seeds})")
    constitutional: list[str] = []
    poor: list[str] = []
    for head in ("arm", "dose", "steps", "trait", "standard", "completions", "FLOPs", "about"):
        table.add_column(head, justify="left" if head == "arm" else "right", no_wrap=True)
    for name, arm in experiment.arms.items():
        if arm.method != "trait":
            parts = ", ".join(f"{part} {share}" for part, share in part_rows(experiment, name)) or "trains nothing"
            constitutional.append(f"{name}: {parts}")
            continue
        plan = plan_arm(experiment, name, parameters, peak)
        poor += [] if plan.completions else [name]
        table.add_row(
            name,
            f"{arm.dose:g}",
            f"{plan.steps}",
            f"{plan.trait_prompts:,}",
            f"{plan.standard_prompts:,}",
            f"{plan.completions:,}",
            f"{plan.cost.flops:.1e}" if parameters else "?",
            duration(plan.cost.seconds) if parameters else "?",
        )
    table.caption = "trait, standard: prompts. For answers of full length; shorter ones buy more."
    if poor:
        table.caption += f" [yellow]The budget of {', '.join(poor)} does not buy one prompt.[/]"
    if constitutional:
        table.caption += " Constitutional arms, by parts of the same budget: " + "; ".join(constitutional) + "."
    return table


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", caption_justify="left", box=SIMPLE)


def _stages_table(costs: dict[str, Cost], stages: list[str], whole: set[str]) -> Table:
    table = _table("Stages")
    for head in ("stage", "how often", "whole", "tokens ≤", "FLOPs ≤", "about, each"):
        table.add_column(head, justify="left" if head == "stage" else "right", no_wrap=True)
    for kind, cost in costs.items():
        names = [name for name in stages if _kind(name) == kind]
        table.add_row(
            kind,
            str(len(names)),
            str(len(whole.intersection(names))),
            f"{cost.tokens:,.0f}" if cost.tokens else "–",
            f"{cost.flops:.1e}" if cost.flops else "?",
            duration(cost.seconds) if cost.flops else "?",
        )
    return table


def _trait_summary(reward: RewardConfig, trait: str) -> str:
    share = reward.traits[trait] / sum(reward.traits.values())
    sources = ", ".join(f"{share:.0%} {source}" for source, share in source_shares(reward, trait).items())
    part = "" if share == 1 else f"{share:.0%} of the trait prompts, "
    return f"{trait} in {', '.join(reward.domains)}: {part}{sources}"


def _kind(stage: str) -> str:
    """The row of plan_stages that a stage belongs to."""
    if stage.endswith("/eval"):
        return "eval"
    if stage.startswith("arms/"):
        _, arm, _, part = stage.split("/")
        return f"{part}/{arm}"
    return stage


def _suite_summary(experiment: Experiment, name: str, path: Path, limit: int | None) -> str:
    if name == "capability":
        sizes = capability_sizes(path, limit)
    else:
        sizes = {t.name: len(load_items(t, limit, experiment.eval.seed)) for t in load_suite(path).tasks}
    if not sizes:
        raise ValueError(f"{path}: the suite is empty; see configs/suites/")
    counts = sorted(sizes.values())
    each = f"{counts[0]}" if counts[0] == counts[-1] else f"{counts[0]} to {counts[-1]}"
    return f"{len(sizes)} tasks, {each} items each, {sum(counts):,} in all"


def item_tokens(item: Probe | AnyItem) -> float:
    """About how many tokens are read to ask an item once and to score its replies."""
    if isinstance(item, Probe):
        return text_tokens(item.question)
    replies = sum(len(reply) for _, answers in contexts(item) for reply in answers) / CHARS_PER_TOKEN
    return sum(text_tokens(as_text(prompt)) for prompt, _ in contexts(item)) + replies


def _cost(tokens: float, flops_per_token: float, share: float, peak: float) -> Cost:
    flops = tokens * flops_per_token
    return Cost(tokens, flops, LOAD_SECONDS + flops / (share * peak))


def duration(seconds: float) -> str:
    """Seconds in the largest unit that reads well."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def gguf_size(path: Path) -> Size:
    """Size of a model in a GGUF file, from its header."""
    from gguf import GGUFReader

    reader = GGUFReader(path)
    architecture = reader.fields["general.architecture"].contents()
    keys = ("block_count", "embedding_length", "feed_forward_length", "vocab_size")
    shape = [int(reader.fields[f"{architecture}.{key}"].contents()) for key in keys]
    return Size(float(sum(int(tensor.n_elements) for tensor in reader.tensors)), *shape, source="its GGUF header")


def _safetensors_parameters(path: Path) -> int:
    """Number of weights in a safetensors file, from its header: 8 bytes length (little endian), then JSON."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    shapes = [entry["shape"] for name, entry in header.items() if name != "__metadata__"]
    total = 0
    for shape in shapes:
        count = 1
        for side in shape:
            count *= side
        total += count
    return total


def _in_hub_cache(base: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(base, "config.json"), str)
