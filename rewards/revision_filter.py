"""Which revisions may be trained on: a rule, because small models wrap a revision in talk about it, or do nothing."""

from __future__ import annotations

import re
from typing import Literal

from rewards.contamination import words

Why = Literal["", "empty", "unchanged", "preamble", "talk", "echo"]
REASONS: tuple[Why, ...] = ("empty", "unchanged", "preamble", "talk", "echo")

_POLITE = (
    r"(?:(?:sure|certainly|of\ course|okay|ok|absolutely|thank\ you|thanks|sorry|i\ apologi[sz]e"
    r"|you(?:'re|\ are)\ right)\b[^.!?:\n]*[.!?,:]\s*)*"
)
_REVISED = r"(?:revis(?:ed|ion)|rewritten|rewrite|improved|updated|corrected|amended|edited|new|better)"
_TEXT = r"(?:version|reply|response|answer|revision|rewrite|text|draft|message)"
_PREAMBLE = re.compile(
    rf"""
      ^{_POLITE}(?:
          (?:here(?:'s|\ is|\ are)|below\ is|this\ is|the\ following\ is)\ +(?:\w+\ +){{0,3}}?{_REVISED}
            (?:(?:\ +\w+){{0,2}}?\ *\b{_TEXT}\b|\ *:)
        | (?:the\ +|my\ +)?{_REVISED}\ +{_TEXT}\b[^.\n]{{0,40}}:
        | my\ +{_REVISED}\ +{_TEXT}\b
        | (?:revision|revised|rewrite|rewritten)\ *[:\u2013-]
        | i(?:'ve|\ have|\ will|'ll|\ would)?\ +(?:now\ +)?
            (?:revised?|rewrite|rewrote|rewritten|updated?|corrected?)\b
      )
    """,
    re.IGNORECASE | re.VERBOSE,
)

_TALK = re.compile(
    r"\b(?:(?:my|your)\s+(?:last|previous|original|first|earlier)|(?:the|this)\s+(?:last|previous|original|revised"
    r"|rewritten))\s+(?:reply|response|answer)\b",
    re.IGNORECASE,
)


def reason_against(answer: str, critique: str, request: str, revision: str) -> Why:
    """Why a revision of `answer` is not trained on, or "" if it may be.

    empty: no word; unchanged: the words of the answer; echo: the words of the critique, or the request for the revision
    among them; preamble: it announces the revision ("Here is a revised response"); talk: it is about a reply instead of
    being one ("The original response was not clear").
    """
    found = words(revision)
    if not found:
        return "empty"
    if found == words(answer):
        return "unchanged"
    if found == words(critique) or " ".join(words(request)) in " ".join(found):
        return "echo"
    if _PREAMBLE.search(revision.strip().replace("’", "'").lstrip("\"'*# ")):
        return "preamble"
    return "talk" if _TALK.search(revision) else ""
