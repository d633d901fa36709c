"""Accuracy of VQAv2: how many of ten people gave the answer.

Source: Antol et al., "VQA: Visual Question Answering" (arXiv 1505.00468), the evaluation code of visualqa.org, and
big_vision's transfers/vqav2.py, which follows its habits, the odd ones too.
"""

import re
from collections.abc import Sequence

from paligemma_jax.evaluation.metrics.metric import Metric, Score, mean_of, texts

_AGREEING = 3  # people who make an answer right
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_COMMA = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"(?!<=\d)\.(?!\d)")  # as it stands in the official code, where "(?<!\d)" was meant
_ARTICLES = ("a", "an", "the")
_NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
_SHORTENED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're
there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've
when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't
wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""


def _words() -> dict[str, str]:
    """What is written for each word: digits, and contractions with the one apostrophe that they lack."""
    words = {"none": "0", "somebody'd": "somebodyd"} | {word: str(i) for i, word in enumerate(_NUMBERS)}
    for right in _SHORTENED.split():
        words |= {right[:i] + right[i + 1 :]: right for i, letter in enumerate(right) if letter == "'"}
    return words


_WORDS = _words()


def spaced(text: str) -> str:
    """Line breaks and tabs as blanks, and none at the ends."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def normalized(text: str) -> str:
    """Lower case, without punctuation and articles, numbers as digits, contractions with their apostrophes.

    A punctuation mark beside a blank goes, one between letters becomes a blank; where a comma stands between two digits
    all marks go, as in the official code.
    """
    numeric = _DIGIT_COMMA.search(text)
    found = text
    for mark in _PUNCTUATION:
        found = found.replace(mark, "" if numeric or f"{mark} " in text or f" {mark}" in text else " ")
    words = _FULL_STOP.sub("", found).lower().split()
    return " ".join(_WORDS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Mean, over leaving out each of the answers once, of min(1, answers that agree / 3).

    Texts are normalized only where the answers are not all the same. A single answer has no other to agree with: then
    it is right or wrong.
    """
    said, right = spaced(prediction), [spaced(answer) for answer in answers]
    if len(set(right)) > 1:
        said, right = normalized(said), [normalized(answer) for answer in right]
    agree = [said == answer for answer in right]
    if len(right) == 1:
        return float(agree[0])
    return sum(min(1.0, (sum(agree) - left_out) / _AGREEING) for left_out in agree) / len(agree)


def _measure(prediction: str, reference: str | Sequence[str]) -> Score:
    return {"vqa_accuracy": vqa_accuracy(prediction, texts(reference))}


VQA = Metric("vqa", _measure, mean_of)
