"""What a run tells the libraries before they are imported: the network is out of reach unless something needs it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from scripts.environment import set_environment
from scripts.experiment import CHECKOUT, load_experiment

OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")


@pytest.mark.parametrize(
    ("overrides", "offline"),
    [
        ([], True),
        (["train.attention=flex_attention"], True),
        (["train.use_kernels=true"], False),
        (["train.attention=kernels-community/vllm-flash-attn3"], False),
        (["train.attention=flash_attention_2"], False),
        (["base=org/model"], False),
    ],
)
def test_the_hub_is_in_reach_of_what_comes_from_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, overrides: list[str], offline: bool
) -> None:
    monkeypatch.setattr(os, "environ", {key: value for key, value in os.environ.items() if key not in OFFLINE})
    experiment = load_experiment(CHECKOUT / "configs" / "experiments" / "quickstart.yaml", overrides)
    set_environment(experiment, tmp_path)
    assert [os.environ.get(key) for key in OFFLINE] == ["1" if offline else None] * 3
