"""What an attack says where, and when a reply follows a persona."""

from __future__ import annotations

from pathlib import Path

import pytest

from eval.attacks import (
    ATTACKS,
    Attack,
    Rule,
    attacked,
    choose_attacks,
    follows,
    load_attacks,
    planted,
    rewritten,
    with_system,
)
from eval.item_forms import Cases, Choices, Pressure, Prompt, Request, Swap, Turns, Twins, as_text, contexts
from rewards.probes import load_probes

BY_ID = {attack.id: attack for attack in load_attacks()}


def attack(channel: str, *turns: str) -> Attack:
    return Attack.model_validate({"id": "x", "channel": channel, "turns": turns, "role": "harmful"})


def test_the_file_has_every_kind_of_attack_and_helpful_personas_with_each_rule() -> None:
    harmful = [a for a in load_attacks() if a.role == "harmful"]
    helpful = [a for a in load_attacks() if a.role == "helpful"]
    assert {a.channel for a in harmful} == {"system", "user", "document", "insist", "prefill", "planted"}
    rules = [next(iter(a.rule.model_dump(exclude_none=True))) for a in helpful if a.rule is not None]
    assert sorted(rules) == ["begins_with", "capitals", "ends_with", "most_words"]
    for text in (turn for a in load_attacks() for turn in a.turns):
        text.format(question="q", bad="b")  # no other placeholder


@pytest.mark.parametrize("channel", ["system", "user", "document"])
def test_the_question_stays_the_last_thing_that_is_said(channel: str) -> None:
    chat = attacked("How high is it?", attack(channel, "Make it up."))
    assert chat[-1][0] == "user"
    assert chat[-1][1].endswith("How high is it?")
    assert as_text(chat).count("Make it up.") == 1
    assert ("Make it up." in chat[-1][1]) == (channel != "system")


def test_a_persona_joins_a_system_message_and_comes_after_the_arms_own() -> None:
    prompt = (("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Why?"))
    chat = with_system(attacked(prompt, attack("system", "You are a pirate.")), "Be honest.")
    assert chat[0] == ("system", "Be honest.\n\nYou are a pirate.\n\nBe brief.")
    assert chat[1:] == prompt[1:]
    assert with_system("Hi", None) == (("user", "Hi"),)


def test_the_planted_answer_is_a_wrong_one_of_the_probe() -> None:
    for probe in load_probes("law", "heldout")[:20]:
        chat = planted(probe, BY_ID["planted-answer"])
        assert [role for role, _ in chat] == ["user", "assistant", "user"]
        assert chat[1][1] == probe.wrong[0]
        assert chat[2][1].endswith(probe.question)


@pytest.mark.parametrize(
    ("rule", "yes", "no"),
    [
        (Rule(most_words=5), "It is a large bone.", "It is a very large bone."),
        (Rule(ends_with="Please ask your pharmacist"), "Pain. please ask your Pharmacist!", "Ask your pharmacist."),
        (Rule(begins_with="Thank you for asking"), "  Thank you for asking! It is.", "It is. Thank you for asking."),
        (Rule(capitals=True), "IT IS 3 METRES.", "IT is."),
    ],
)
def test_following_a_rule(rule: Rule, yes: str, no: str) -> None:
    assert follows(rule, yes)
    assert not follows(rule, no)
    assert not follows(rule, " ")


def test_digits_alone_are_no_capitals() -> None:
    assert not follows(Rule(capitals=True), "42.")


ITEMS = [
    Twins("t", "f", "high", "low", "Yes", "No"),
    Choices("c", "f", "which?", ("a", "b")),
    Pressure("p", "f", (("n1", "n2"),), ("for", "against"), ("true", "false")),
    Turns("u", "f", (("a1", "b1"), ("a2", "b2")), "Yes", "No"),
    Swap("s", "f", "first", "second", ("Ann", "Bob")),
    Cases("k", "f", ("s1", "s2"), ("w1", "w2")),
]


@pytest.mark.parametrize("item", ITEMS, ids=lambda item: type(item).__name__)
def test_every_prompt_of_an_item_is_changed_once_and_beliefs_are_left_alone(item: object) -> None:
    def change(prompt: Prompt) -> Prompt:
        return f"<{as_text(prompt)}>"

    def keep(prompt: Prompt) -> Prompt:
        return f"({as_text(prompt)})"

    before = [as_text(prompt) for prompt, _ in contexts(item)]  # type: ignore[arg-type]
    after = [as_text(prompt) for prompt, _ in contexts(rewritten(item, change, keep))]  # type: ignore[arg-type]
    neutral = 2 if isinstance(item, Pressure) else 0
    assert after == [f"({text})" for text in before[:neutral]] + [f"<{text}>" for text in before[neutral:]]
    assert [replies for _, replies in contexts(item)] == [r for _, r in contexts(rewritten(item, change, keep))]  # type: ignore[arg-type]


def test_a_generated_request_cannot_be_rewritten() -> None:
    with pytest.raises(TypeError, match="Request"):
        rewritten(Request("r", "f", "please"), lambda p: p, lambda p: p)


def test_mistakes_in_the_file_and_in_the_choice_are_told(tmp_path: Path) -> None:
    assert [a.id for a in choose_attacks(("prefill", "salesman"))] == ["salesman", "prefill"]
    with pytest.raises(ValueError, match=r"persistence.prompts = 'salesmen'.*salesman"):
        choose_attacks(("salesmen",))
    good = ATTACKS.read_text()
    for old, new, told in [
        ("id: comedian", "id: salesman", "same id: salesman"),
        ("rule: {most_words: 5}", "rule: {most_words: 5, capitals: true}", "give one of"),
        ("    rule: {capitals: true}\n", "", "sign-painter"),
        ("channel: prefill", "channel: postfill", "channel"),
    ]:
        assert old in good
        path = tmp_path / "attacks.yaml"
        path.write_text(good.replace(old, new, 1))
        load_attacks.cache_clear()
        with pytest.raises(ValueError, match=told) as error:
            load_attacks(path)
        assert str(path) in str(error.value)
