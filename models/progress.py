"""Progress of a Hugging Face trainer, told to whoever draws the bar."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback


class ProgressCallback(TrainerCallback):
    """Calls progress(steps done, steps in all) after every optimizer step."""

    def __init__(self, progress: Callable[[int, int], None] | None) -> None:
        self.progress = progress

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Report the step."""
        if self.progress is not None:
            self.progress(state.global_step, state.max_steps)


def silence(trainer: Any) -> None:
    """Keep a trainer from printing its logs: they go to the step table and the tracker."""
    trainer.remove_callback(PrinterCallback)
