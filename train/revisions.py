"""The revisions of a constitutional arm: answer, critique under a drawn principle, revise, filter.

Bai et al. 2022 (arXiv 2212.08073), section 3.1. The prompts are those of the trait arm (train/mix.py, same seed).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from models.loading import best_device, load_model, load_tokenizer
from models.replies import Messages, Reply, reply
from rewards.config import RewardConfig
from rewards.constitution import Constitution, critique_chat, drawn, revision_chat, shown
from rewards.revision_filter import REASONS, reason_against
from train.config import TrainConfig
from train.constitution_config import ConstitutionConfig
from train.ledger import Account
from train.mix import trait_prompts
from train.parts import CHUNK, Progress, Row, part_ledger, sample_chunks

Overlaps = Callable[[Sequence[str]], list[bool]]  # which texts occur in the evaluation


def sample_revisions(
    cfg: ConstitutionConfig,
    train: TrainConfig,
    constitution: Constitution,
    reward: RewardConfig,
    start: Path,
    out: Path,
    seed: int,
    allowance: float,
    overlaps: Overlaps,
    progress: Progress | None = None,
) -> Row:
    """Answer, criticise and revise trait prompts with the model in `start` until the allowance (FLOPs) is spent.

    Writes revisions.parquet (a row per prompt and round); returns the ledger, with what the filter
    dropped. A revision that `overlaps` with the evaluation is dropped, too. Raises ValueError if none is left.
    """
    model: Any = load_model(str(start), device=best_device())
    tokenizer = load_tokenizer(str(start))
    n = sum(p.numel() for p in model.parameters())

    def say(chats: Sequence[Messages], keys: Sequence[str], longest: int, temperature: float) -> list[Reply]:
        return reply(model, tokenizer, chats, keys, longest, temperature)

    def make(chunk: int) -> list[Row]:
        prompts = trait_prompts((chunk + 1) * CHUNK, seed, reward)[-CHUNK:]
        keys = [f"{seed}/revisions/{chunk * CHUNK + i}" for i in range(len(prompts))]
        shots = shown(constitution, cfg.demonstrations, f"{seed}/revisions/{chunk}")  # alike, so they are read once
        first = say([p["prompt"] for p in prompts], keys, train.max_new_tokens, train.temperature)
        texts = [answer.text for answer in first]
        rows: list[Row] = []
        for r in range(cfg.rounds):
            principles = [drawn(constitution, 1, key, r)[0] for key in keys]
            asked = [
                critique_chat(constitution, shots, p["prompt"], text, principle)
                for p, text, principle in zip(prompts, texts, principles, strict=True)
            ]
            critiques = say(asked, [f"{key}/critique/{r}" for key in keys], cfg.critique_tokens, cfg.temperature)
            chats = [
                revision_chat(chat, c.text, principle)
                for chat, c, principle in zip(asked, critiques, principles, strict=True)
            ]
            revised = say(chats, [f"{key}/revision/{r}" for key in keys], train.max_new_tokens, cfg.temperature)
            for i, prompt in enumerate(prompts):
                why = reason_against(texts[i], critiques[i].text, principles[i].revision, revised[i].text)
                said = [critiques[i], revised[i], *([first[i]] if r == 0 else [])]
                rows.append(
                    {
                        "position": chunk * CHUNK + i,
                        **{key: prompt[key] for key in ("prompt_id", "trait", "task", "kind")},
                        "prompt": prompt["prompt"][-1]["content"],
                        "messages": json.dumps(prompt["prompt"]),
                        "round": r,
                        "principle": principles[i].id,
                        "first": first[i].text,
                        "answer": texts[i],
                        "critique": critiques[i].text,
                        "revision": revised[i].text,
                        "kept": not why,
                        "why": why,
                        "generated_tokens": sum(s.generated for s in said),
                        "flops": 2.0 * n * sum(s.encoded + s.generated for s in said),
                    }
                )
                texts[i] = texts[i] if why else revised[i].text
        return rows

    rows = sample_chunks(out / "revisions.jsonl", allowance, make, progress)
    for row, found in zip(rows, overlaps([row["revision"] for row in rows]), strict=True):
        if row["kept"] and found:
            row |= {"kept": False, "why": "evaluation"}
    rounds = len({(row["position"], row["round"]) for row in rows})
    account = Account(
        prompts=len({row["position"] for row in rows}),
        completions=2 * rounds + len({row["position"] for row in rows}),
        generated_tokens=sum(row["generated_tokens"] for row in rows),
        flops=sum(row["flops"] for row in rows),
    )
    dropped = Counter(row["why"] for row in rows if row["why"])
    counts = {name: dropped[name] for name in (*REASONS, "evaluation")}
    if not any(row["kept"] for row in rows):
        raise ValueError(
            f"constitution: none of {len(rows)} revisions may be trained on ({_words(counts)}); raise "
            "constitution.demonstrations or train.max_new_tokens, or begin with a more able base"
        )
    pd.DataFrame(rows).to_parquet(out / "revisions.parquet")
    return part_ledger({"trait": account}, n, revisions=len(rows), dropped=counts)


def accepted(revisions: pd.DataFrame) -> list[Row]:
    """{"prompt", "rejected": first answer, "chosen": last accepted revision} of every prompt that has one."""
    frame: Any = revisions
    kept = frame[frame["kept"]].sort_values(["position", "round"]).groupby("position").last()
    return [
        {"prompt": json.loads(row["messages"]), "rejected": row["first"], "chosen": row["revision"]}
        for row in kept.to_dict("records")
    ]


def _words(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items() if count)
