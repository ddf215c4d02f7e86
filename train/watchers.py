"""Watchers: what goes wrong in policy optimisation, seen in the step table.

Every watcher is a function of the table so far, its threshold and the window, and judges the last step of the table.
`proxy` is what the policy is paid, `gold` the verifiable truth (docs/architecture.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
from accelerate.utils import broadcast_object_list
from peft.tuners.lora import LoraLayer
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from transformers import TrainerCallback

from models.checkpoints import latest, step_of
from models.loading import load_model
from train.config import WatchConfig
from train.ledger import Ledger

Frame: TypeAlias = Any  # a pandas DataFrame; pandas ships no types that pyright can follow
STANDARD_ERRORS = 2.0  # a rise or a fall within so many standard errors is noise


@dataclass(frozen=True)
class Alert:
    """What a watcher saw at `step`, and the first step of it (`since`), both counted from 0."""

    watcher: str
    action: str
    step: int
    since: int
    text: str


Finding = tuple[int, str]  # since, text


def check(table: Frame, cfg: WatchConfig) -> list[Alert]:
    """The alerts at the last step of a step table, in the order of WATCHERS.

    A column that is missing, or empty at a step, is not judged there.
    """
    alerts: list[Alert] = []
    last = int(table["step"].iloc[-1])
    for name, watcher in WATCHERS.items():
        settings = getattr(cfg, name)
        found = None if settings.threshold is None else watcher(table, settings.threshold, cfg.window)
        if found is not None:
            # No checkpoint from before a longer stretch need exist, and none from within the window is trusted.
            since = max(found[0], last - cfg.window + 1)
            alerts.append(Alert(name, settings.action, last, since, found[1]))
    return alerts


def non_finite(table: Frame, threshold: float, window: int) -> Finding | None:
    """The last step is broken, and more than `threshold` steps are: NaN or infinity, or a completion without reward."""
    names = [name for name in ("loss", "grad_norm", "proxy") if name in table]
    values = table[names].to_numpy(dtype=float)
    unpaid = table["unpaid"].to_numpy(dtype=float) > 0 if "unpaid" in table else np.zeros(len(table), dtype=bool)
    broken = ~np.isfinite(values).all(1) | unpaid
    if not broken[-1] or broken.sum() <= threshold:
        return None
    seen = [f"{name} {value}" for name, value in zip(names, values[-1], strict=True) if not np.isfinite(value)]
    seen += ["completions without a reward"] if unpaid[-1] else []
    return int(table["step"][broken].iloc[0]), f"{', '.join(seen)}; steps of that kind: {broken.sum()}"


def reward_collapse(table: Frame, threshold: float, window: int) -> Finding | None:
    """The window's mean proxy is at least `threshold` below that of the best window before it."""
    steps, values = _column(table, "proxy")
    if len(values) < 2 * window:
        return None
    means = np.convolve(values, np.full(window, 1 / window), "valid")
    best, now = means[:-window].max(), means[-1]
    if best - now < threshold:
        return None
    return steps[-window], f"mean reward {now:.3g}, after {best:.3g} in the best {window} steps"


def zero_variance(table: Frame, threshold: float, window: int) -> Finding | None:
    """At least the share `threshold` of the window's groups has one reward throughout."""
    steps, values = _column(table, "zero_variance_groups")
    if len(values) < window or (share := values[-window:].mean()) < threshold:
        return None
    return steps[-window], f"{100 * share:.0f}% of the groups of {window} steps have equal rewards and teach nothing"


def kl(table: Frame, threshold: float, window: int) -> Finding | None:
    """The window's mean KL to the start is at least `threshold` nats per token."""
    steps, values = _column(table, "kl")
    if len(values) < window or not (mean := values[-window:].mean()) >= threshold:
        return None
    return steps[-window], f"KL to the start {mean:.3g} nats per token over {window} steps"


def entropy_rise(table: Frame, threshold: float, window: int) -> Finding | None:
    """The window's mean entropy is at least `threshold` times that of the first window."""
    return _ratio(table, "entropy", window, lambda ratio: ratio >= threshold, "entropy {now:.3g} nats per token")


def entropy_fall(table: Frame, threshold: float, window: int) -> Finding | None:
    """The window's mean entropy is at most `threshold` times that of the first window."""
    return _ratio(table, "entropy", window, lambda ratio: ratio <= threshold, "entropy {now:.3g} nats per token")


def length_drift(table: Frame, threshold: float, window: int) -> Finding | None:
    """The window's mean completion is at least `threshold` times as long, or as short, as in the first window."""
    text = "completions of {now:.3g} tokens"
    return _ratio(table, "mean_tokens", window, lambda ratio: ratio >= threshold or ratio <= 1 / threshold, text)


def proxy_gold_gap(table: Frame, threshold: float, window: int) -> Finding | None:
    """On trait prompts the proxy has risen and gold has fallen by `threshold` since the window before, beyond noise."""
    if not {"trait_proxy", "gold"} <= set(table):
        return None
    trait = table.dropna(subset=["trait_proxy", "gold"])
    if len(trait) < 2 * window:
        return None
    rise, rise_error = _change(trait["trait_proxy"].to_numpy(dtype=float)[-2 * window :])
    change, error = _change(trait["gold"].to_numpy(dtype=float)[-2 * window :])
    if rise < max(threshold, STANDARD_ERRORS * rise_error) or -change < max(threshold, STANDARD_ERRORS * error):
        return None
    since = int(trait["step"].iloc[-window])
    text = f"on trait prompts the proxy rose by {rise:.3g} and gold fell by {-change:.3g} within {2 * window} steps"
    return since, text


def sampling_gap(table: Frame, threshold: float, window: int) -> Finding | None:
    """The last step's log-probabilities in sampling and in training differ by `threshold` nats per token or more."""
    steps, values = _column(table, "sampling_gap")
    if not len(values) or steps[-1] != table["step"].iloc[-1] or values[-1] < threshold:
        return None
    return steps[-1], f"sampling and training differ by {values[-1]:.3g} nats per token: the sampler runs other weights"


WATCHERS: dict[str, Callable[[Frame, float, int], Finding | None]] = {
    "non_finite": non_finite,
    "reward_collapse": reward_collapse,
    "zero_variance": zero_variance,
    "kl": kl,
    "entropy_rise": entropy_rise,
    "entropy_fall": entropy_fall,
    "proxy_gold_gap": proxy_gold_gap,
    "length_drift": length_drift,
    "sampling_gap": sampling_gap,
}


class StepLog(Protocol):
    """Where the watchers read and write: the journal of an arm. The main process looks, and tells the others."""

    ledger: Ledger
    main: bool

    def steps(self, log_history: Sequence[Mapping[str, Any]]) -> Frame:
        """The step table up to the step that was logged last."""
        ...


class Watch(TrainerCallback):
    """Asks the watchers after every step. Each speaks once, in the ledger; the first that stops ends the arm."""

    def __init__(self, cfg: WatchConfig, journal: StepLog) -> None:
        self.cfg, self.journal = cfg, journal

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Note new alerts. The step at which the arm is stopped is not saved."""
        if "loss" not in (logs or {}):
            return
        ledger = self.journal.ledger
        known = {alert["watcher"] for alert in ledger.alerts}
        found: list[Any] = [check(self.journal.steps(state.log_history), self.cfg) if self.journal.main else None]
        for alert in broadcast_object_list(found)[0]:
            if alert.watcher in known:
                continue
            ledger.alerts.append(asdict(alert))
            if alert.action == "stop":
                control.should_training_stop, control.should_save = True, False
                if not stopped_by_watcher(ledger):
                    by, step = f"train.watch.{alert.watcher}", ledger.steps
                    ledger.ended = {"by": by, "step": step, "kept_step": step, "text": alert.text}


def stopped_by_watcher(ledger: Ledger) -> bool:
    """Whether a watcher ended the arm."""
    return ledger.ended is not None and ledger.ended["by"].startswith("train.watch.")


def keep_healthy(trainer: Any, ledger: Ledger, start: Path) -> None:
    """If a watcher has ended the arm, put back the newest saved weights from before what it saw.

    Those are the last checkpoint whose own rollouts came before the first bad step or, without one, the starting model
    in `start`. The ledger's `kept_step` says how many steps the weights have taken. DeepSpeed puts weights back only
    when a training begins: there the last ones stay, and `kept_step` says that, too.
    """
    if ledger.ended is None or not stopped_by_watcher(ledger) or trainer.is_deepspeed_enabled:
        return
    since = min(alert["since"] for alert in ledger.alerts if alert["action"] == "stop")
    folder = Path(trainer.args.output_dir)
    [kept] = broadcast_object_list([latest(folder, before=since) if trainer.accelerator.is_main_process else None])
    if kept is None:
        _back_to_start(trainer.accelerator.unwrap_model(trainer.model), start)
    else:
        trainer._load_from_checkpoint(str(kept), trainer.model_wrapped if trainer.is_fsdp_enabled else None)
    ledger.ended["kept_step"] = 0 if kept is None else step_of(kept)


def _back_to_start(model: Any, start: Path) -> None:
    if hasattr(model, "peft_config"):
        for module in model.modules():
            if isinstance(module, LoraLayer):
                module.reset_lora_parameters("default", init_lora_weights=True)  # A anew, B zero: no effect
    else:
        whole = StateDictOptions(full_state_dict=True)  # the model may be sharded
        set_model_state_dict(model, load_model(str(start)).state_dict(), options=whole)


def _column(table: Frame, name: str) -> tuple[list[int], np.ndarray]:
    """Steps and values of a column where it has a value; empty if there is no such column."""
    if name not in table:
        return [], np.zeros(0)
    kept = table[["step", name]].dropna()
    return [int(step) for step in kept["step"]], kept[name].to_numpy(dtype=float)


def _ratio(table: Frame, name: str, window: int, beyond: Callable[[float], bool], text: str) -> Finding | None:
    """The last window's mean against the first window's; `text` is told the present mean."""
    steps, values = _column(table, name)
    if len(values) < 2 * window or (first := values[:window].mean()) <= 0:
        return None
    now = values[-window:].mean()
    if not beyond(now / first):
        return None
    return steps[-window], f"{text.format(now=now)} over {window} steps, {first:.3g} in the first {window}"


def _change(values: np.ndarray) -> tuple[float, float]:
    """Mean of the second half less that of the first, and its standard error."""
    before, after = np.split(values, 2)
    error = np.sqrt(before.var(ddof=1) / len(before) + after.var(ddof=1) / len(after))
    return float(after.mean() - before.mean()), float(error)
