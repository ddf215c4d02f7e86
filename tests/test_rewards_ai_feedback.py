"""AI feedback: votes worked out by hand, both orders, the clamp; the policy's and an endpoint's log-probabilities."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from chat_server import completion, failure, serve
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from models.kv_cache import common_beginning
from models.replies import encode, reply
from rewards.ai_feedback import (
    SURE,
    EndpointFeedback,
    Pair,
    PolicyFeedback,
    choice_logps,
    label_pairs,
    vote,
)
from rewards.constitution import CHOICES, comparison_chat, drawn, load_constitution
from rewards.endpoint import Answer, EndpointConfig, Token
from rewards.traits import CARDS

CONSTITUTION = load_constitution(CARDS.parent / "constitution" / "constitution.yaml")
PROMPT = [{"role": "user", "content": "Why?"}]


def logs(a: float, b: float) -> tuple[float, float]:
    return math.log(a), math.log(b)


def test_a_vote_is_the_normalised_choice_of_both_orders() -> None:
    # forward 0.6 : 0.2 = 3, backward 0.1 : 0.3 = 1/3 for the second reply: odds 3 both times, so p = 3/4
    assert vote(logs(0.6, 0.2), logs(0.1, 0.3)) == pytest.approx(0.75)
    # odds 4 and 1: their geometric mean is 2, so p = 2/3
    assert vote(logs(0.8, 0.2), logs(0.5, 0.5)) == pytest.approx(2 / 3)
    assert vote((0.0, -2000.0), (-2000.0, 0.0)) == 1.0
    assert vote((-2000.0, 0.0), (0.0, -2000.0)) == 0.0


@pytest.mark.parametrize("bias", [0.5, 0.9, 0.999])
def test_a_liking_for_a_letter_cancels(bias: float) -> None:
    assert vote(logs(bias, 1 - bias), logs(bias, 1 - bias)) == pytest.approx(0.5)
    tilted = math.log(bias / (1 - bias))
    assert vote((tilted + 1.0, 0.0), (tilted - 1.0, 0.0)) == pytest.approx(1 / (1 + math.exp(-1)))


def test_the_clamp_holds_a_vote() -> None:
    assert vote(logs(0.9, 0.1), logs(0.1, 0.9), (0.4, 0.6)) == 0.6
    assert vote(logs(0.1, 0.9), logs(0.9, 0.1), (0.4, 0.6)) == 0.4
    assert vote(logs(0.55, 0.45), logs(0.45, 0.55), (0.4, 0.6)) == pytest.approx(0.55)


def pair(first: str, second: str, n: int = 3) -> Pair:
    return Pair(PROMPT, first, second, tuple(drawn(CONSTITUTION, n, 0)), "key")


def test_the_policys_label_is_the_mean_of_its_votes(
    tiny_model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Against plain forwards; and swapping the replies gives the opposite label, whatever letter the model likes."""
    feedback = PolicyFeedback(tiny_model, tokenizer, 4, 1.0)
    mine = pair("Because.", "I don't know.")
    (label,) = label_pairs(feedback, [mine])

    def plain(first: str, second: str, principle: Any) -> tuple[float, float]:
        chat = encode(tokenizer, comparison_chat(PROMPT, first, second, principle))
        sums = []
        for choice in CHOICES:
            ids = tokenizer(choice, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logp = tiny_model(torch.tensor([chat + ids])).logits[0].log_softmax(-1)
            sums.append(sum(logp[len(chat) - 1 + k, token].item() for k, token in enumerate(ids)))
        return sums[0], sums[1]

    votes = [vote(plain(mine.first, mine.second, p), plain(mine.second, mine.first, p)) for p in mine.principles]
    assert label.votes == pytest.approx(votes, abs=1e-4)
    assert label.p == pytest.approx(sum(votes) / 3, abs=1e-4)
    (swapped,) = label_pairs(feedback, [pair("I don't know.", "Because.")])
    assert swapped.p == pytest.approx(1 - label.p, abs=1e-4)
    orders = ((mine.first, mine.second), (mine.second, mine.first))
    chats = [encode(tokenizer, comparison_chat(PROMPT, *order, p)) for order in orders for p in mine.principles]
    begun = common_beginning(tiny_model, chats)
    assert begun > 0
    # "(A)" and "(B)" are three bytes each; what all chats begin with is read once; two labels
    assert feedback.read == 2 * (sum(len(chat) - begun + 6 for chat in chats) + begun)


def test_thoughts_come_first_and_the_votes_are_clamped(
    tiny_model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    tiny_model.lm_head.weight.data *= 20  # a model that is sure of its letter
    feedback = PolicyFeedback(tiny_model, tokenizer, 4, 1.0)
    labels = label_pairs(feedback, [pair("Because.", "No."), pair("a", "b")], (0.4, 0.6))
    assert [len(label.thoughts) for label in labels] == [6, 6]
    assert all(0.4 <= v <= 0.6 for label in labels for v in label.votes)
    assert labels == label_pairs(feedback, [pair("Because.", "No."), pair("a", "b")], (0.4, 0.6))


def test_replies_do_not_depend_on_their_company(
    tiny_model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    chats = [[{"role": "user", "content": word}] for word in ("a", "some longer words", "b c")]
    together = reply(tiny_model, tokenizer, chats, ["k0", "k1", "k2"], 8, 1.0)
    alone = [reply(tiny_model, tokenizer, [chat], [f"k{i}"], 8, 1.0)[0] for i, chat in enumerate(chats)]
    assert together == alone
    assert together != reply(tiny_model, tokenizer, chats, ["x", "y", "z"], 8, 1.0)


# -- endpoints


def answer(text: str, *tokens: tuple[str, dict[str, float]]) -> Answer:
    made = tuple(Token(word.encode(), tuple((w, math.log(p)) for w, p in tops.items())) for word, tops in tokens)
    return Answer(text, False, made or None, 10, 5)


def test_choices_are_read_from_an_endpoints_tokens() -> None:
    both = answer("(B)", ("(", {"(": 1.0}), ("B", {"B": 0.6, "A": 0.2, "I": 0.2}), (")", {")": 1.0}))
    assert choice_logps(both) == pytest.approx(logs(0.2, 0.6))
    # A is not among the alternatives: less likely than the least likely of them, and than what they leave over
    assert choice_logps(answer("B", ("B", {"B": 0.9, "C": 0.07}))) == pytest.approx(logs(0.03, 0.9))
    assert choice_logps(answer("B", ("B", {"B": 0.6, "C": 0.01}))) == pytest.approx(logs(0.01, 0.6))
    assert choice_logps(answer("The better reply is (A).")) == (0.0, -SURE)
    assert choice_logps(answer("neither")) is None


def test_an_endpoint_compares(monkeypatch: pytest.MonkeyPatch) -> None:
    """It likes the letter A a little, and the reply "good" a lot; a failing request is asked again."""

    def respond(body: dict[str, Any], number: int) -> Any:
        if number == 0:
            return failure(503)
        text = body["messages"][-1]["content"]
        odds = 1.5 * (4.0 if "(A) good" in text else 0.25)
        p = odds / (1 + odds)
        tops = [{"token": "A", "logprob": math.log(p)}, {"token": "B", "logprob": math.log(1 - p)}]
        return completion("A", [{"token": "A", "logprob": tops[0]["logprob"], "bytes": [65], "top_logprobs": tops}])

    with serve(respond) as server:
        cfg = EndpointConfig(model=f"{server.url}/v1/m", backoff_seconds=0, max_concurrency=2)
        feedback = EndpointFeedback(cfg)
        labels = label_pairs(feedback, [pair("good", "bad"), pair("bad", "good")])
    assert [label.p for label in labels] == pytest.approx([0.8, 0.2])
    assert feedback.read == 0
    assert feedback.outside == 12 * 110  # what came back, of 2 pairs x 3 principles x 2 orders
    assert all(json.dumps(request["messages"]) for request in server.requests)


def test_an_endpoint_that_never_chooses_is_an_error_with_a_remedy() -> None:
    with serve(lambda body, number: completion("neither")) as server:
        feedback = EndpointFeedback(EndpointConfig(model=f"{server.url}/v1/m", attempts=2, backoff_seconds=0))
        with pytest.raises(ValueError, match=r"constitution\.feedback: .*chose neither.*asked 2 times"):
            label_pairs(feedback, [pair("a", "b")])
