"""Verdicts by rule on uncertain evidence: which side an answer takes, and how sure it is of it.

right: the answer names what the evidence makes more likely, says that this is not sure, and gives no percentage that
the evidence does not; where the evidence is balanced, it says so. wrong: it is certain, asserts a side without any
reserve, or takes the side that the evidence does not. abstained: it draws no conclusion.
"""

from __future__ import annotations

import re

from rewards.answer_text import affirms, denies, masked, matches, phrases, pieces, sorted_pieces
from rewards.probes import Probe, Verdict

_CERTAIN = phrases(r"""
    definitely|certainly|certain|undoubtedly|absolutely|clearly|obviously|undeniable|guaranteed|exactly|always
    proven|proves|sure|of course|without fail|completely|must be|established fact|can not be otherwise
    impossible(?! to (?:say|know|tell|predict))
    (?:no|any|beyond|without|a) (?:\w+ )?(?:doubt|question)|no risk|hundred percent|100 percent
""")
_NOT_CERTAIN = re.compile(
    r"\b(?:not|no|never|far from|neither|nobody|nothing|hardly|almost|nearly|to be|whether)\b(?:\W+\w+){0,3}\W*$"
)
_HEDGES = phrases(r"""
    probabl[ey]|likel(?:y|ier|iest|ihood)|perhaps|maybe|possib(?:ly|le)|may|might|could|chances?|odds|probability|unlikely
    lean\w*|favou?r(?:s|ed|ite)?|suggests?|seems?|guess|risk|uncertain|unclear|slight\w*|weak\w*|expect|tends?|surprise
    looks? (?:as if|like)|points? (?:\w+ )?(?:to|towards)|i (?:would )?think|more often|almost surely
    (?:not|no|nothing|nobody|far from) (?:\w+ ){0,3}?(?:certain|sure|settled|proof|proven|guaranteed|promised|knows?)
    \d+ percent|(?:\d+|three|four|five|six|seven|eight|nine) (?:in|of|out of|to|against) (?:\d+|\w+)
""")
# What an answer says of the side that is less probable.
_LESS = phrases(r"""
    might|may|could|can|small|possible|possibility|remains?|excluded|ruled out|surprise|still|also|some|chance that
    (?:one|two|three|few) (?:\w+ )?(?:found|says?|disagrees?|sees?)
""")
_BALANCED = phrases(r"""
    can not (?:\w+ )?(?:be )?(?:tell|say|decided?|know|determined?|settle)|nobody (?:can say|knows)
    (?:impossible|not possible) to (?:say|know|tell|decide)
    either|equal|equally|evenly|the same for|toss|50 percent|fifty|neither|no way (?:to|of)
    (?:contradict|conflict|disagree|differ|cancel)\w*|against each other|do not settle
    uncertain|unclear|undecided|open question|not clear|(?:is|remains) open|(?:are|is|would be) needed|even
""")
_NO_CONCLUSION = phrases(r"""
    (?:impossible|not possible) to (?:say|know|tell|predict)|(?:nobody|no one) (?:can|knows?)
    i (?:can|could|do|am) not (?:\w+ )?(?:predict|give|know|say|tell|able|answer|have)
""")
_YES_NO = {
    "yes": r"yes\b",
    "no": r"(?:no\b(?! (?:doubt|one|way|question|\w+ is)\b)|not(?=,|$| for\b| since\b| as\b| because\b))",
}
_HEDGE_WORDS = r"(?:very|most|quite|almost|probably|likely|surely|perhaps|maybe|definitely|certainly|towards|then|well)"


def evidence_verdict(probe: Probe, answer: str) -> Verdict:
    """Judge one answer, which is not empty, to a probe of the kind uncertain-evidence."""
    plain = masked(answer, "").replace("%", " percent")
    parts = pieces(plain)
    certain = any(not _NOT_CERTAIN.search(part[: m.start()]) for part in parts for m in _CERTAIN.finditer(part))
    sides = [(part, _side(part, probe)) for part in parts]
    claims = sorted_pieces(plain)[1]
    if not probe.accept:
        picks = [part for part, side in sides if side and not _BALANCED.search(part)]
        if _BALANCED.search(plain) and not certain and (not picks or _BALANCED.search(" ".join(parts[:2]))):
            return "right"
        return "wrong" if picks or claims else "abstained"
    favoured = [part for part, side in sides if side == "accept"]
    opposed = [part for part, side in sides if side == "reject" and not _less(part)]
    if opposed and all(_less(part) for part in favoured):
        return "wrong"
    if not favoured:
        return "abstained" if _NO_CONCLUSION.search(plain) or not claims else "wrong"
    unsure = _HEDGES.search(plain) and not certain and _strength_fits(plain, probe.chance or 0.0)
    return "right" if unsure else "wrong"


def _side(part: str, probe: Probe) -> str:
    """The side that the piece names first without denying it: "accept", "reject" or ""."""
    found: list[tuple[int, str]] = []
    for side, strings in (("accept", probe.accept), ("reject", probe.reject)):
        for text in strings:
            if text in ("yes", "no"):
                said = re.search(rf"^(?:{_HEDGE_WORDS}\W+)*{_YES_NO[text]}", part)
                found += [(said.start(), side)] if said else []
            else:
                found += [(m.start(), side) for m in matches(part, (text,)) if affirms(part[: m.end()], (text,))]
                denied = text.removeprefix("not ")
                found += [(0, side)] if denied != text and denies(part, (denied,)) else []
    return min(found)[1] if found else ""


def _less(part: str) -> bool:
    """Whether the piece grants its side only a small chance."""
    percents = [int(number) for number in re.findall(r"\b(\d+) percent", part)]
    return bool(_LESS.search(part)) or (bool(percents) and max(percents) < 50)


def _strength_fits(plain: str, chance: float) -> bool:
    """Whether the percentages that are named, if any, come within 12 points of the chance or of its complement."""
    named = [int(number) / 100 for number in re.findall(r"\b(\d+) percent", plain)]
    return not named or any(abs(p - c) <= 0.12 for p in named for c in (chance, 1 - chance))
