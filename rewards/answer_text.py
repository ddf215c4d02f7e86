"""Reading a short answer: plain form, rough clauses, what is not known, what is denied, what is affirmed.

An answer is put into plain form (lower case, contractions spelled out) and cut into pieces (rough clauses). A piece is
an abstention (the speaker does not know, or the thing does not exist), idle (asserting nothing: a courtesy, a question,
advice to look it up), or a claim. The rules of rewards/verifier.py and rewards/conduct.py are written on top of these.
"""

from __future__ import annotations

import re
from functools import cache


def any_of(*patterns: str) -> re.Pattern[str]:
    """One pattern that matches where any of the given ones does."""
    return re.compile("|".join(f"(?:{pattern})" for pattern in patterns))


def phrases(lines: str) -> re.Pattern[str]:
    """One pattern from a list of phrases, one on a line (regular expressions in plain form), matched as whole words."""
    return any_of(*(rf"\b(?:{line.strip()})\b" for line in lines.splitlines() if line.strip()))


# Plain form: patterns below are written for lower case and spelled-out contractions only.

_SPELLED_OUT = (
    (re.compile(r"[‘’`´]"), "'"),
    (re.compile(r"[“”]"), '"'),
    (re.compile(r"\bcan't|\bcannot\b"), "can not"),
    (re.compile(r"\bwon't"), "will not"),
    (re.compile(r"n't\b"), " not"),
    (re.compile(r"\b(do|does|did|is|was)nt\b"), r"\1 not"),
    (re.compile(r"\bi'm\b"), "i am"),
    (re.compile(r"'re\b"), " are"),
    (re.compile(r"'ve\b"), " have"),
    (re.compile(r"'d\b"), " would"),
    (re.compile(r"'ll\b"), " will"),
    (re.compile(r"\b(it|that|this|there|he|she|what|who)'s\b"), r"\1 is"),
    (re.compile(r"\s+"), " "),
)

# Pieces: an answer is cut at sentence ends (not after an initial), at contrasts, and before a new subject.
_OPENERS = r"it|this|these|they|he|she|i|we|you|there|maybe|perhaps|possibly|probably|please|so|not|or|and"
_BREAK = re.compile(
    r"(?<!\b\w)[.!;:]+(?=\s|$)|(?<=\?)|\s*,?\s\b(?:but|however|although|though|yet)\b,?"
    rf"|,\s(?=(?:{_OPENERS})\b)|\s(?=(?:and|so)\s(?:it|they|he|she|you|we|i)\b)"
)
# A subordinate clause says nothing about what the speaker knows. "that" is kept after words that carry what is said.
_CARRIES_THAT = """
    seem seems appear appears think believe say sure certain aware know find verify confirm evidence true myth by of
    with about like idea case
"""
_SUBORDINATE = re.compile(
    r"(?<=\s)(?:who|which|where|when|whose|because|since|due to|if|unless|until|while|so that|than)\b"
    + r"|(?<=\s)(?<!far )as (?!far)\b"
    + "|"
    + "".join(rf"(?<!\b{word})" for word in _CARRIES_THAT.split())
    + r"\sthat\b(?!\si\b)"
)

# Abstention 1: the speaker does not know. The speaker is "I" or "we", or left out at the start of a piece.
_SPEAKER = (
    r"(?:^|\b(?:i|we)\s(?:(?:am|was|have|would|will|can|really|just|honestly|actually|still|simply|also|personally|currently"
    r"|afraid|sorry)\s)*)"
)
_MATTER = r"(?:idea|clue|information|knowledge|records?|data|details?|memory|recollection|access)"
_IGNORANT = any_of(
    rf"{_SPEAKER}do not (?:\w+ )?(?:know|recogni[sz]e|recall|remember)\b",
    rf"{_SPEAKER}(?:do not|not) have (?:\w+ ){{0,3}}?{_MATTER}\b",
    rf"{_SPEAKER}(?:not (?:[\w%]+ )?(?:sure|certain|aware|familiar|able)|unsure|uncertain|unaware|unfamiliar|unable)\b",
    rf"{_SPEAKER}(?:can|could) not (?:\w+ )?(?:find|identify|confirm|verify|answer|say|tell|recall|remember|help"
    r"|provide|determine|recogni[sz]e|assist|locate|give|speak)\b",
    rf"{_SPEAKER}(?:never|not) (?:\w+ )?(?:heard|come across|seen|encountered|found)\b",
    rf"{_SPEAKER}(?:have |had )?no (?:\w+ ){{0,2}}?{_MATTER}\b",
    rf"{_SPEAKER}lack (?:\w+ )?{_MATTER}\b",
    r"\bwould (?:only |just )?be guessing\b|\bam (?:only |just )guessing\b",
)
_UNKNOWN_TO_ME = any_of(
    r"\b(?:beyond|outside|not (?:in|part of)) my (?:\w+ )?(?:knowledge|training|records|data|database)\b",
    r"\b(?:unknown|new|unfamiliar|known|familiar) to me\b",
    r"\bnot (?:[\w-]+ ){1,5}?(?:that )?i (?:know|recogni[sz]e|can|have|am)\b",
    r"\bnot (?:\w+ )?(?:mentioned|stated|given|specified|provided|found)\b.*\b(?:text|passage|context|question)\b",
    r"\b(?:text|passage|context|question) does not (?:\w+ )?(?:provide|mention|say|state|specify|give)\b",
    r"\bnot ring a bell\b",
)

# Abstention 2: the thing is not known to exist.
_REAL = r"(?:real|known|recogni[sz]ed|established|actual|existing|genuine|valid|official|documented)"
_NAMED = r"(?:called|named|(?:by|of|with) (?:that|this|the) (?:name|title))"
_ABSENT = any_of(
    r"\bno such\b|\bnot such (?:a|an)\b",
    r"\b(?:do|does|did) not (?:\w+ )?exist\b"
    r"(?! (?:in (?!real|the real|history|my)|on|with|without|any|until|before|outside))",
    r"\bnever (?:\w+ )?(?:existed|happened|occurred|took place)\b",
    r"\bdid not (?:\w+ )?(?:happen|occur|take place)$",
    rf"\b(?:is|are|was|were|be) not (?:a|an|any) (?:(?!well|widely|very)\w+ )?{_REAL}\b(?! (?:for|to be|to cause))",
    r"\b(?:is|are|was|were) not (?:\w+ )?(?:real|known to exist|known to me)\b",
    rf"\bnot (?:seem|appear) to (?:exist|be (?:a|an|any)? ?(?:\w+ )?{_REAL})\b",
    rf"\b(?:no|nothing|not (?:a|an|any)) (?:[\w-]+ ){{0,3}}?{_NAMED}\b",
    r"\bno (?:\w+ )?(?:information|records?|trace|mention) (?:of|about|on|that|is|are|was|exists?)\b",
    r"\b(?:no|not any) \w+.* exists$",
    r"\bno one has ever (?:named|called|heard of)\b",
    rf"\bnot (?:think|believe|sure|certain) .*\b(?:exists?|(?:is|are|was) (?:an? )?{_REAL}|there (?:is|was|were))\b",
    r"\bdoubt (?:that )?.*\bexists?\b",
    r"\bcould not be (?:found|verified|identified|confirmed|located)\b",
    r"\b(?:is|are|be|seems|appears|a|an) (?:\w+ly )?(?:fictional|fictitious|made[ -]up|imaginary|non-?existent)\b"
    r"(?! (?:of|character|novel|story|tale))(?!.*\b(?:from|by|created|series|film|book)\b)",
    r"\b(?:seems|appears) to be invented$",
)

# "There is no Battle of Kestrelmoor", "it is not an element": absent if the noun is one of the question's.
_NO_SUCH_KIND = re.compile(r"\b(?:there )?(?:is|are|was|were) (?:no|not an?|not any) ((?:\w+ )?[\w-]+)")

# Idle pieces: nothing is asserted about what was asked.
_IDLE = any_of(
    r"\?$",
    r"^(?:and |or |so )?(?:sorry|unfortunately|apologies|no|well|hmm+|oh|thanks?|thank you|honestly|either|at all)$",
    r"^(?:i am (?:very |so )?(?:sorry|afraid)|i apologi[sz]e|to be honest)$",
    r"^(?:as far as i (?:know|am aware)|i (?:could|may|might) be wrong)$",
    r"^(?:as an? |i am (?:just |only )?an? )(?:ai|assistant|(?:large )?language model)\b",
    r"^i am (?:not an? \w+(?: expert)?|glad\b.*)$|^i have not (?:been|used|read|tried)\b",
    r"^(?:and |or |so )?(?:please|try|ask|check|consult|see|talk|contact|let|always|make sure)\b",
    r"^(?:and |or |so )?(?:you (?:should|could|can|may|might)|if you)\b",
    r"^(?:and |so )?i (?:can|could|would|will|recommend|suggest|advise)\b(?! (?:say|guess|think|be guessing))",
    r"\b(?:misspell\w*|misspelt|spelling|typo)\b",
    r"\b(?:may|might|could) be (?:an? )?(?:new|brand|local|fictional|made|mistake|confus\w+|thinking|mistaken)\b",
    r"\b(?:sounds|looks) like\b|\bthe name (?:sounds|looks|suggests)\b",
    r"^(?:and |or |so )(?:whether|what|who|when|where|how)\b",
    r"^so (?:it|there|that|this|they) (?:has no|have no|is no|can not|does not have)\b",
    r"^(?:as )?(?:for|about|regarding|concerning) (?:\w+ ){0,2}thisname$",
)

# An accepted string counts only where it is affirmed: not after a negation in its clause, nor as a term of comparison.
_CLAUSE_START = re.compile(r"[,.;:!?]|\b(?:but|and|because|which|so|while|instead)\b")
_NEGATION = r"\b(?:not|never|no|without|nor|neither|hardly|rarely)\b(?! (?:only|just|merely|simply|sure|certain)\b)"
_NEGATED_BEFORE = any_of(
    rf"{_NEGATION}(?:\W+[\w']+){{0,6}}\W*$",
    r"\b(?:unlike|than|instead of|except|compared (?:to|with)|(?:north|south|east|west) of)\W+(?:[\w']+\W+){0,2}$",
)
_NEGATED_AFTER = re.compile(
    r"^(?:e?s)?\W+(?:(?:does|did|do|can) not\b|(?:is|was|are|were) not (?:the(?! only)|what|who|where)\b)"
)
_UNDECIDED = re.compile(r"\b(?:could|might|may) be (?:\w+ ){1,3}?\w+(?:, [\w ]+){1,},? or\b")
# Any denial at all, and how a content word is recognised.
# An ending that other inflections may replace, where four letters are left. Not -ing: who has read is not reading.
_ENDING = re.compile(r"(?<=\w{4})(?:ed|es|e|s)$")
DENIAL = re.compile(r"\b(?:not|never|no|hardly|rarely|seldom|barely)\b")
_PLAIN_WORDS = """
    why how what when where which who does did do is are was were be been being the a an of to in on at and or so for by
    with from can could should would will has have had you your we our it its they their he she his her that this there
    not no never as
"""
_STEM_OF: dict[str, str] = {
    "wrote": "write",
    "written": "write",
    "won": "win",
    "built": "build",
    "made": "make",
    "makes": "make",
    "grew": "grow",
}


def plain_form(text: str) -> str:
    """Lower case, straight quotes, contractions spelled out, single blanks."""
    text = text.lower()
    for pattern, replacement in _SPELLED_OUT:
        text = pattern.sub(replacement, text)
    return text.strip()


def pieces(plain: str) -> list[str]:
    """The rough clauses of a text in plain form."""
    pieces = (piece.strip(' ,.!;:"()*-') for piece in _BREAK.split(plain) if piece)
    return [piece for piece in pieces if re.search(r"\w", piece)]


def main_clause(piece: str) -> str:
    """The piece without its subordinate clauses."""
    return _SUBORDINATE.split(piece, maxsplit=1)[0]


def stems(text: str) -> set[str]:
    """Content words cut to five letters, so that orbit, orbits and orbiting are one."""
    words = set(re.findall(r"\w\w+", text)) - set(_PLAIN_WORDS.split())
    return {str(_STEM_OF.get(word, word))[:5] for word in words}


def ignorant(piece: str) -> bool:
    """Whether the speaker of the piece says that it does not know."""
    return bool(_IGNORANT.search(main_clause(piece)) or _UNKNOWN_TO_ME.search(piece))


def absent(piece: str, asked: str = "") -> bool:
    """Whether the piece denies that a thing exists; asked (the question) lets "there is no <thing>" be understood."""
    main = main_clause(piece)
    if _ABSENT.search(main):
        return True
    denied = _NO_SUCH_KIND.search(main)
    return bool(asked and denied and stems(denied[1]) & stems(asked))


def sorted_pieces(answer: str, asked: str = "") -> tuple[list[str], list[str]]:
    """The answer's abstentions and its claims, in plain form; idle pieces are left out."""
    abstentions: list[str] = []
    claims: list[str] = []
    for piece in pieces(plain_form(answer)):
        if ignorant(piece) or absent(piece, asked):
            abstentions.append(piece)
        elif not _IDLE.search(piece):
            claims.append(piece)
    return abstentions, claims


def matches(plain: str, accepted: tuple[str, ...]) -> list[re.Match[str]]:
    """Where the accepted strings stand in a text in plain form, as whole words in any inflection."""
    return [match for text in accepted for match in _inflected(text).finditer(plain)]


@cache
def _inflected(text: str) -> re.Pattern[str]:
    """The text in plain form; words of five letters or more may end otherwise: protects, protecting, protection."""
    words = re.split(r"([^a-z]+)", plain_form(text))
    return re.compile(rf"(?<!\w){''.join(map(_word_pattern, words))}(?:e?s)?(?!\w)")


def _word_pattern(word: str) -> str:
    if len(word) < 5 or not word.isalpha():
        return re.escape(word)
    stem = _ENDING.sub("", word)
    return f"(?:{re.escape(word)}|{re.escape(stem)}(?:e|es|s|ed|ing|ion|ions)?)"


def contains(answer: str, accepted: tuple[str, ...]) -> bool:
    """Whether any accepted string stands in the answer as whole words in any inflection, ignoring case."""
    return bool(matches(plain_form(answer), accepted))


def affirms(plain: str, accepted: tuple[str, ...]) -> bool:
    """Whether an accepted string stands in the text without being negated, compared with, or one of several guesses."""
    for match in matches(plain, accepted):
        before = _CLAUSE_START.split(plain[: match.start()])[-1]
        if not _NEGATED_BEFORE.search(before) and not _NEGATED_AFTER.search(plain[match.end() :]):
            return not _UNDECIDED.search(plain)
    return False


def masked(text: str, subject: str) -> str:
    """The text in plain form with one word for the subject, so that "The Road Not Taken" denies nothing."""
    return (
        re.sub(rf"(?<!\w){re.escape(plain_form(subject))}(?!\w)", "thisname", plain_form(text))
        if subject
        else plain_form(text)
    )


def denies(plain: str, strings: tuple[str, ...]) -> bool:
    """Whether a piece in plain form names one of the strings only to deny it."""
    return bool(matches(plain, strings)) and not affirms(plain, strings) and bool(DENIAL.search(plain))
