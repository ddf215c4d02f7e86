"""The shared-context scorer against lm-eval's own HFLM: same tokens, same log-likelihoods, same accuracies."""

from __future__ import annotations

import string
import time
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from eval.capability import lm_eval_task, load_suite
from eval.capability_tasks import load_items
from models.scoring import SharedContextLM

SUITE = Path(__file__).parents[1] / "configs/suites/capability-53-offline.yaml"
# own choices, partial contexts, one-token classes, code after a line break, no delimiter, others' answers, reordered
KINDS = ["arc_challenge", "hellaswag", "piqa", "winogrande", "boolq", "humaneval", "mbpp", "gsm8k", "number_sorting"]


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE with merges, so that where a text is cut changes its tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=259, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet[:150])
    tokenizer.train_from_iterator(["the answer is the best answer of all the answers"] * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>")


def instance(context: str, continuation: str, item: int = 0) -> Instance:
    return Instance("loglikelihood", {}, (context, continuation), idx=0, metadata=("task", item, 1))


def hflm(model: Any, tokenizer: Any, batch_size: int = 8) -> HFLM:
    return HFLM(pretrained=model, tokenizer=tokenizer, device="cpu", batch_size=batch_size, max_length=2048)


def run(lm: Any, names: list[str], limit: int) -> dict[str, Any]:
    suite = load_suite(SUITE)
    chosen = [benchmark for benchmark in suite.benchmarks if benchmark.name in names]
    tasks = {b.name: lm_eval_task(b, load_items(b, suite.seed, limit)) for b in chosen}
    return cast(dict[str, Any], evaluate(lm, cast(Any, tasks), bootstrap_iters=0))


def test_equals_hflm_on_nine_kinds_of_task(tiny_model: Any, tokenizer: Any) -> None:
    ours = run(SharedContextLM(tiny_model, tokenizer), KINDS, limit=4)
    theirs = run(hflm(tiny_model, tokenizer), KINDS, limit=4)
    for name in KINDS:
        for mine, other in zip(ours["samples"][name], theirs["samples"][name], strict=True):
            assert mine["arguments"] == other["arguments"]
            logps = [[logp for logp, _ in sample["filtered_resps"]] for sample in (mine, other)]
            np.testing.assert_allclose(logps[0], logps[1], atol=1e-3)
        metric = next(key for key in ours["results"][name] if key.startswith("acc"))
        assert ours["results"][name][metric] == theirs["results"][name][metric]


@pytest.mark.parametrize("kind", ["bytes", "merging"])
def test_tokens_and_greedy_flags_equal_hflm(kind: str, tiny_model: Any, tokenizer: Any) -> None:
    chosen = tokenizer if kind == "bytes" else merging_tokenizer()
    reference = hflm(tiny_model, chosen)
    scorer = SharedContextLM(tiny_model, chosen)
    pairs = [
        ("the answer is ", "the best"),  # the space moves to the continuation
        ("the answer is", " the best"),
        ("the ans", "wer is of"),  # cut inside a merge
        ("", "the answer"),  # empty context
        ("all the answers", " of all"),
        ("all the answers", " of the best"),
    ]
    for context, continuation in pairs:
        if context:
            assert scorer._encode_pair(context, continuation) == reference._encode_pair(context, continuation)
    # what the model itself would say, so that a greedy flag is True somewhere
    start = chosen.encode("the best answer")
    generated = tiny_model.generate(
        input_ids=chosen("the best answer", return_tensors="pt").input_ids, max_new_tokens=1, do_sample=False
    )[0, len(start) :]
    greedy = chosen.decode(generated)
    if chosen.encode("the best answer" + greedy)[len(start) :] == generated.tolist():
        pairs.append(("the best answer", greedy))
    requests = [instance(*pair, item=i) for i, pair in enumerate(pairs)]
    for pair, mine, other in zip(
        pairs, scorer.loglikelihood(requests), reference.loglikelihood(requests, disable_tqdm=True), strict=True
    ):
        assert mine[0] == pytest.approx(other[0], abs=1e-3), pair
        assert mine[1] == other[1], pair


def test_greedy_flag_is_exact_for_a_model_that_is_sure_and_one_that_is_not(tiny_model: Any, tokenizer: Any) -> None:
    scorer = SharedContextLM(tiny_model, tokenizer)
    reference = hflm(tiny_model, tokenizer)
    requests = [instance(f"context {c}", c, item=i) for i, c in enumerate(string.ascii_letters + string.digits)]
    mine = [greedy for _, greedy in scorer.loglikelihood(requests)]
    assert mine == [greedy for _, greedy in reference.loglikelihood(requests, disable_tqdm=True)]


def test_long_contexts_lose_their_left_end(tiny_model: Any, tokenizer: Any) -> None:
    end = "the last twenty here"
    cut = SharedContextLM(tiny_model, tokenizer, max_context=len(end)).loglikelihood(
        [instance("x" * 500 + end, " yes"), instance("x" * 500 + end, " no")]
    )
    whole = SharedContextLM(tiny_model, tokenizer).loglikelihood([instance(end, " yes"), instance(end, " no")])
    np.testing.assert_allclose([logp for logp, _ in cut], [logp for logp, _ in whole], atol=1e-5)


def test_results_do_not_depend_on_order_or_packing(tiny_model: Any, tokenizer: Any) -> None:
    requests = [instance(f"question {i // 3} {'?' * i}", f" answer {i}") for i in range(24)]
    one = SharedContextLM(tiny_model, tokenizer).loglikelihood(requests)
    other = SharedContextLM(tiny_model, tokenizer, token_budget=64).loglikelihood(requests[::-1])[::-1]
    np.testing.assert_allclose([logp for logp, _ in one], [logp for logp, _ in other], atol=1e-4)


def test_progress_counts_every_pair(tiny_model: Any, tokenizer: Any) -> None:
    seen: list[tuple[int, int]] = []
    scorer = SharedContextLM(tiny_model, tokenizer, progress=lambda done, total: seen.append((done, total)))
    scorer.loglikelihood([instance(f"q{i // 2}", f" a{i}") for i in range(80)])
    assert seen[-1] == (80, 80)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


def test_what_it_cannot_do_is_said(tiny_model: Any, tokenizer: Any) -> None:
    scorer = SharedContextLM(tiny_model, tokenizer)
    with pytest.raises(ValueError, match="does not generate"):
        scorer.generate_until([])
    with pytest.raises(ValueError, match="no perplexity"):
        scorer.loglikelihood_rolling([])
    with pytest.raises(ValueError, match="no token of its own"):
        scorer.loglikelihood([instance("question", "")])


@pytest.mark.slow
def test_throughput_against_hflm_on_the_embedded_model(capsys: pytest.CaptureFixture[str]) -> None:
    """CPU seconds of one thread, which a busy machine does not change, on tasks with four short choices."""
    from models.loading import load_model, load_tokenizer

    base = "embedded:smollm2-135m-instruct"
    model, tokenizer = load_model(base), load_tokenizer(base)
    names = ["gsm8k", "needle_haystack", "family_relationships", "maze", "aiw", "boolq", "ifeval", "arc_challenge"]
    scorers = {"shared": SharedContextLM(model, tokenizer), "hflm": hflm(model, tokenizer)}
    seconds: dict[str, float] = {}
    outcomes: dict[str, dict[str, Any]] = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        run(scorers["shared"], names[:1], limit=1)  # first pass pays for one-time set-up
        for label, scorer in scorers.items():
            started = time.process_time()
            outcomes[label] = run(scorer, names, limit=4)
            seconds[label] = time.process_time() - started
    finally:
        torch.set_num_threads(threads)
    for name in names:
        for mine, other in zip(outcomes["shared"]["samples"][name], outcomes["hflm"]["samples"][name], strict=True):
            logps = [[logp for logp, _ in sample["filtered_resps"]] for sample in (mine, other)]
            np.testing.assert_allclose(logps[0], logps[1], atol=1e-3)
    ratio = seconds["hflm"] / seconds["shared"]
    with capsys.disabled():
        print(f"\nCPU seconds: shared {seconds['shared']:.1f}, HFLM {seconds['hflm']:.1f}, ratio {ratio:.2f}")
    assert ratio > 2
