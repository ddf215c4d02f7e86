"""A reward model on a tiny real base: it learns, it is what stock libraries load, it goes on after a kill."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rewards.preferences import Preference
from rewards.reward_model import (
    Recipe,
    RewardModel,
    answer_scores,
    calibrate,
    measure,
    pair_accuracy,
    share,
    train_reward_model,
)
from rewards.reward_trainer import TOKEN_BUDGET, preference_rows

RECIPE = Recipe(epochs=4.0, learning_rate=5e-3, lora_rank=4, batch_size=4)


def preferences(n: int = 16, family: str = "trained") -> list[Preference]:
    """A reply that shouts is worse. Two preferences to a prompt."""
    rng = random.Random(family)
    found: list[Preference] = []
    for i in range(n):
        prompt = [{"role": "user", "content": f"{family} {i}: {rng.choice(['how', 'why', 'where'])}?"}]
        word = rng.choice(["soon", "there", "now", "by day"])
        for contrast, bad in (("shout", f"{word}!!!!"), ("shout twice", f"{word}!!!! {word}!!!!")):
            found.append(Preference(f"{family}/{i}", prompt, f"{word}.", bad, (1.0, -1.0), contrast, "home", family))
    return found


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def fitted(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RewardModel, Path]:
    out = tmp_path_factory.mktemp("reward")
    model = train_reward_model(preferences(), str(tiny_dir), out, 0, RECIPE)
    parts = {"train": preferences(), "validation": preferences(4, "kept"), "test": preferences(8, "heldout")}
    measure(model, "truthfulness", parts, out)
    return model, out


def test_it_learns_and_says_how_well_on_what_it_has_not_seen(fitted: tuple[RewardModel, Path]) -> None:
    accuracy = json.loads((fitted[1] / "accuracy.json").read_text())
    heldout = accuracy["heldout"]
    assert heldout["n"] == 16
    assert heldout["accuracy"] >= 0.9
    assert set(heldout["contrasts"]) == {"shout", "shout twice"}
    assert heldout["contrasts"]["shout"]["n"] == heldout["domains"]["home"]["n"] / 2 == 8
    assert heldout["ci_low"] < heldout["accuracy"] <= heldout["ci_high"] + 1e-9
    assert accuracy["pairs"] == 32


def test_stock_peft_and_transformers_give_the_same_scores(fitted: tuple[RewardModel, Path]) -> None:
    from peft import AutoPeftModelForSequenceClassification
    from transformers import AutoTokenizer

    model, out = fitted
    loaded = RewardModel.load(out)
    stock: Any = AutoPeftModelForSequenceClassification.from_pretrained(out / "model", num_labels=1).eval()
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    stock.config.pad_token_id = tokenizer.pad_token_id
    rows = preferences(3, "heldout")
    prompts, answers = [p.prompt for p in rows] * 2, [p.chosen for p in rows] + [p.rejected for p in rows]
    expected = []
    for prompt, answer in zip(prompts, answers, strict=True):
        text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text + answer + tokenizer.eos_token, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            expected.append(stock(input_ids=ids).logits[0, 0].item())
    np.testing.assert_allclose(model.raw_scores(prompts, answers), expected, atol=2e-4)
    np.testing.assert_allclose(loaded.raw_scores(prompts, answers), expected, atol=2e-4)
    line = json.loads((out / "calibration.json").read_text())
    prices = np.clip(line["slope"] * np.array(expected) + line["intercept"], -1.5, 1.5)
    np.testing.assert_allclose(loaded.score(prompts, answers), prices, atol=2e-4 * line["slope"])


def test_a_prompt_with_more_replies_than_a_pack_holds_is_scored_the_same(fitted: tuple[RewardModel, Path]) -> None:
    prompt = preferences(1)[0].prompt
    answers = [f"{'so ' * 80}{i}" for i in range(9)]  # 9 x 241 bytes
    assert sum(map(len, answers)) > 2 * TOKEN_BUDGET
    together = fitted[0].raw_scores([prompt] * 9, answers)
    alone = [fitted[0].raw_scores([prompt], [answer])[0] for answer in answers]
    np.testing.assert_allclose(together, alone, atol=1e-4)


def test_a_fit_begins_where_another_ended(fitted: tuple[RewardModel, Path], tiny_dir: Path, tmp_path: Path) -> None:
    still = Recipe(epochs=1.0, learning_rate=0.0, lora_rank=4, batch_size=8)
    train_reward_model(preferences(), str(tiny_dir), tmp_path, 1, still, start=fitted[1])
    before, after = adapter(fitted[1]), adapter(tmp_path)
    assert before.keys() == after.keys()
    assert any("score" in name for name in before)
    for name, weight in before.items():
        torch.testing.assert_close(after[name], weight, atol=0, rtol=0)


def test_a_killed_fit_goes_on_to_the_same_weights(tiny_dir: Path, tmp_path: Path) -> None:
    recipe = Recipe(epochs=2.0, learning_rate=1e-3, lora_rank=4, batch_size=4, save_every=1)

    def kill(done: int, total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    train_reward_model(preferences(), str(tiny_dir), tmp_path / "whole", 0, recipe)
    with pytest.raises(KeyboardInterrupt):
        train_reward_model(preferences(), str(tiny_dir), tmp_path / "killed", 0, recipe, kill)
    newest = tmp_path / "killed" / "trainer" / "checkpoint-4" / "optimizer.pt"
    newest.write_bytes(newest.read_bytes()[:-9])  # and the power went while it was written
    seen: list[int] = []
    train_reward_model(
        preferences(), str(tiny_dir), tmp_path / "killed", 0, recipe, lambda done, total: seen.append(done)
    )
    assert seen == [4, 5, 6, 7, 8]  # the fifth update was cut before its checkpoint, the fourth's is damaged
    whole, resumed = adapter(tmp_path / "whole"), adapter(tmp_path / "killed")
    for name, weight in whole.items():
        torch.testing.assert_close(resumed[name], weight, atol=1e-6, rtol=1e-5)


def test_rows_hold_every_reply_once(tokenizer: Any) -> None:
    rows = preference_rows(tokenizer, preferences(2))
    assert len(rows) == 2
    assert [len(row["answer_ids"]) for row in rows] == [3, 3]
    assert rows[0]["better"] == [0, 0]
    assert rows[0]["worse"] == [1, 2]
    assert rows[0]["answer_ids"][0][-1] == tokenizer.eos_token_id


class Raw:
    """Raw scores by the reply's number of exclamation marks."""

    def raw_scores(self, prompts: Any, answers: list[str]) -> np.ndarray:
        return np.array([-float(answer.count("!")) for answer in answers])


def test_calibration_is_the_least_squares_line() -> None:
    """Every answer counts once, however many preferences it stands in: a at 1, c! at 0, b!! at -1."""
    rows = [("a", "b!!", (1.0, -1.0)), ("a", "c!", (1.0, 0.0)), ("c!", "b!!", (0.0, -1.0))]
    priced = [Preference("p", [], good, bad, prices, "", "home", "f") for good, bad, prices in rows]
    scores = answer_scores(Raw(), priced)  # type: ignore[arg-type]
    line = calibrate(scores, priced)
    assert (line.slope, line.intercept) == (pytest.approx(1.0), pytest.approx(1.0))
    np.testing.assert_allclose(line(np.array([0.0, -2.0, 9.0])), [1.0, -1.0, 1.5])
    with pytest.raises(ValueError, match="validation"):
        calibrate(scores, [replace(p, prices=(-p.prices[0], -p.prices[1])) for p in priced])


def test_accuracy_counts_ties_as_half() -> None:
    one, two = preferences(1)
    tie = Preference("t", one.prompt, "x", "y", (1.0, -1.0), "tie", "away", "f")
    wrong = Preference("w", one.prompt, "x!", "y", (1.0, -1.0), "wrong", "away", "f")
    rows = [one, two, tie, wrong]
    found = pair_accuracy(answer_scores(Raw(), rows), rows)  # type: ignore[arg-type]
    assert found["accuracy"] == pytest.approx(2.5 / 4)
    assert found["domains"] == {"away": share([0.5, 0.0]), "home": share([1.0, 1.0])}
    assert found["contrasts"]["tie"]["accuracy"] == 0.5
    assert share([])["accuracy"] is None
    # Wilson for 8 of 10, 95%: 0.490 to 0.943
    assert share([1.0] * 8 + [0.0] * 2)["ci_low"] == pytest.approx(0.4902, abs=1e-4)
    assert share([1.0] * 8 + [0.0] * 2)["ci_high"] == pytest.approx(0.9433, abs=1e-4)


def test_a_folder_without_a_reward_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rewards fit"):
        RewardModel.load(tmp_path)
