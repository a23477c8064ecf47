"""When an answer is right: exact match, and the soft accuracy of VQA-v2."""

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, get_args

Metric = Literal["exact", "vqa"]
METRICS: tuple[Metric, ...] = get_args(Metric)

ANNOTATORS = 10
"""Answers to a question that the metric ``vqa`` is defined for."""

_QUOTES = "\"'`«»\u2018\u2019\u201c\u201d\u201e"
# A minus and a decimal point before a number belong to it.
_MARKS_BEFORE = f"{_QUOTES}([{{*_!?;:,"
_MARKS_BEHIND = f"{_QUOTES})]}}*_!?;:,."
_ARTICLES = frozenset(("a", "an", "the"))
_NUMBER_WORDS = "zero one two three four five six seven eight nine ten"
_DIGITS = {word: str(number) for number, word in enumerate(_NUMBER_WORDS.split())}

_VQA_DIGITS = {"none": "0", **_DIGITS}
_VQA_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_VQA_PERIOD = re.compile(r"\.(?!\d)")
_VQA_COMMA = re.compile(r"\d,\d")
# Words that are often written without their apostrophe.
_CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've
needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've
somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's
there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't
what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're
why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
_CONTRACTIONS = {word.replace("'", ""): word for word in _CONTRACTED.split()}


def normalise(text: str) -> str:
    """Return an answer without what does not change its meaning.

    Unicode NFKC, lower case, blanks collapsed, punctuation at both ends and the articles dropped, number words up to
    ten as digits. Where nothing would be left, as of the letter "A", the last step that leaves something counts.
    """
    text = " ".join(unicodedata.normalize("NFKC", text).lower().split())
    text = text.lstrip(_MARKS_BEFORE).rstrip(_MARKS_BEHIND).strip() or text
    return _without_articles([_DIGITS.get(word, word) for word in text.split()])


def normalise_vqa(text: str) -> str:
    """Return an answer as the evaluation of VQA compares it.

    Punctuation, number words, articles and contractions are treated as described at
    https://visualqa.org/evaluation.html.
    """
    text = " ".join(text.split())
    is_split = _VQA_COMMA.search(text) is not None
    stripped = text
    for mark in _VQA_MARKS:
        is_dropped = is_split or f"{mark} " in text or f" {mark}" in text
        stripped = stripped.replace(mark, "" if is_dropped else " ")
    stripped = _VQA_PERIOD.sub("", stripped)
    return _without_articles([_vqa_word(word) for word in stripped.lower().split()]) or text.lower()


def exact_match(answer: str, accepted: Sequence[str]) -> float:
    """Return 1 if the answer is one of the accepted ones, both normalised, else 0."""
    found = normalise(answer)
    return float(bool(found) and any(found == normalise(other) for other in accepted))


def vqa_accuracy(answer: str, accepted: Sequence[str]) -> float:
    """Return min(matches / 3, 1), the mean over all sets of answers that leave one annotator out.

    Args:
        answer: the answer to score.
        accepted: one answer of every annotator, so the same one may stand there more than once.

    Source: Antol et al., VQA: Visual Question Answering, arXiv:1505.00468, and its evaluation code.
    """
    found = normalise_vqa(answer)
    matches = [bool(found) and found == normalise_vqa(other) for other in accepted]
    return sum(min(1.0, (sum(matches) - left_out) / 3) for left_out in matches) / len(matches)


SCORERS: Mapping[Metric, Callable[[str, Sequence[str]], float]] = {"exact": exact_match, "vqa": vqa_accuracy}


def _without_articles(words: Sequence[str]) -> str:
    return " ".join(word for word in words if word not in _ARTICLES) or " ".join(words)


def _vqa_word(word: str) -> str:
    return _VQA_DIGITS.get(word) or _CONTRACTIONS.get(word.replace("'", ""), word)
