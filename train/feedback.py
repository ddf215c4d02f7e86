"""AI feedback of a constitutional arm, and the preference model on it.

Bai et al. 2022 (arXiv 2212.08073), sections 4.1 and 4.2, with the policy itself or an endpoint as the feedback model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from models.loading import best_device, load_model, load_tokenizer
from models.replies import reply
from rewards.ai_feedback import EndpointFeedback, Feedback, Pair, PolicyFeedback, label_pairs
from rewards.config import RewardConfig
from rewards.constitution import Constitution, drawn
from rewards.preference_model import fit_preference_model, row_tokens, soft_label_row
from rewards.reward_model import Recipe
from train.config import TrainConfig
from train.constitution_config import ConstitutionConfig
from train.ledger import Account
from train.mix import trait_prompts
from train.parts import CHUNK, Progress, Row, part_ledger, passes, sample_chunks, until_spent


def sample_feedback(
    cfg: ConstitutionConfig,
    train: TrainConfig,
    constitution: Constitution,
    reward: RewardConfig,
    start: Path,
    out: Path,
    seed: int,
    first_position: int,
    allowance: float,
    progress: Progress | None = None,
) -> Row:
    """Two replies of the model in `start` to each trait prompt from `first_position` on, compared under principles.

    Until the allowance (FLOPs) is spent. Writes pairs.parquet, a row for every prompt whose two replies differ;
    returns the ledger. The tokens of an endpoint are told apart ("outside_tokens"): nobody here knows its
    FLOPs. Raises ValueError if all replies are alike.
    """
    model: Any = load_model(str(start), device=best_device())
    tokenizer = load_tokenizer(str(start))
    n = sum(p.numel() for p in model.parameters())
    clamp = cfg.clamp if cfg.chain_of_thought else None

    def make(chunk: int) -> list[Row]:
        begin = first_position + chunk * CHUNK
        prompts = trait_prompts(begin + CHUNK, seed, reward)[-CHUNK:]
        keys = [f"{seed}/feedback/{begin + i}" for i in range(CHUNK)]
        chats = [prompt["prompt"] for prompt in prompts for _ in range(2)]
        said = reply(
            model, tokenizer, chats, [f"{key}/{g}" for key in keys for g in range(2)],
            train.max_new_tokens, train.temperature,
        )  # fmt: skip
        feedback: Feedback = (
            PolicyFeedback(model, tokenizer, cfg.thought_tokens, cfg.temperature)
            if cfg.feedback is None
            else EndpointFeedback(cfg.feedback)
        )
        differ = [i for i in range(CHUNK) if said[2 * i].text != said[2 * i + 1].text]
        pairs = [
            Pair(
                prompts[i]["prompt"],
                said[2 * i].text,
                said[2 * i + 1].text,
                tuple(drawn(constitution, cfg.principles, keys[i])),
                keys[i],
            )
            for i in differ
        ]
        labels = dict(zip(differ, label_pairs(feedback, pairs, clamp), strict=True))
        spent = 2.0 * n * (sum(s.encoded + s.generated for s in said) + feedback.read) / CHUNK
        return [
            {
                "position": begin + i,
                **{key: prompts[i][key] for key in ("prompt_id", "trait", "task", "kind")},
                "prompt": prompts[i]["prompt"][-1]["content"],
                "messages": json.dumps(prompts[i]["prompt"]),
                "first": said[2 * i].text,
                "second": said[2 * i + 1].text,
                "label": labels[i].p if i in labels else None,
                "principles": [p.id for p in drawn(constitution, cfg.principles, keys[i])] if i in labels else [],
                "votes": list(labels[i].votes) if i in labels else [],
                "thoughts": list(labels[i].thoughts) if i in labels else [],
                "generated_tokens": said[2 * i].generated + said[2 * i + 1].generated,
                "flops": spent,
                "outside_tokens": feedback.outside if i == 0 else 0,
            }
            for i in range(CHUNK)
        ]

    rows = sample_chunks(out / "pairs.jsonl", allowance, make, progress)
    compared = [row for row in rows if row["label"] is not None]
    if not compared:
        raise ValueError(
            f"constitution: both replies to each of {len(rows)} prompts are the same, so there is nothing to compare; "
            "raise train.temperature"
        )
    pd.DataFrame(compared).to_parquet(out / "pairs.parquet")
    account = Account(
        prompts=len(rows),
        completions=2 * len(rows),
        generated_tokens=sum(row["generated_tokens"] for row in rows),
        flops=sum(row["flops"] for row in rows),
    )
    outside = sum(row["outside_tokens"] for row in rows)
    facts = {"pairs": len(compared), "alike": len(rows) - len(compared), "outside_tokens": outside}
    return part_ledger({"trait": account}, n, **facts)


def fit_on_feedback(
    cfg: ConstitutionConfig,
    train: TrainConfig,
    pairs: pd.DataFrame,
    start: Path,
    out: Path,
    seed: int,
    allowance: float,
    progress: Progress | None = None,
) -> Row:
    """Fit the preference model on the labelled pairs, over and over until the allowance (FLOPs) is spent.

    `start` is the policy's model, which gives the backbone. Writes what RewardModel.load reads; returns the
    ledger.
    """
    tokenizer = load_tokenizer(str(start))
    n = sum(p.numel() for p in load_model(str(start)).parameters())
    records: list[Any] = pairs.to_dict("records")
    labelled = [
        {"prompt": json.loads(r["messages"]), **{key: r[key] for key in ("first", "second", "label")}} for r in records
    ]
    rows = [soft_label_row(tokenizer, pair) for pair in labelled]
    stream = until_spent(passes(rows, f"{seed}/preference"), lambda row: 6.0 * n * row_tokens(row), allowance)
    recipe = Recipe(1.0, cfg.preference_learning_rate, cfg.lora_rank, cfg.batch_size, train.save_every)
    accuracy = fit_preference_model(stream, labelled, str(start.resolve()), out, seed, recipe, progress)
    account = Account(
        prompts=len(stream),
        trained_tokens=sum(map(row_tokens, stream)),
        flops=sum(6.0 * n * row_tokens(row) for row in stream),
    )
    return part_ledger({"trait": account}, n, epochs=len(stream) / len(rows), agreement=accuracy["agreement"])
