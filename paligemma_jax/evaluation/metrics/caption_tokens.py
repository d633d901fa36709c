"""Captions to words, as the metrics of COCO captions want them.

The reference is Stanford's PTBTokenizer, a Java program that pycocoevalcap calls with `-lowerCase`, followed by the
removal of punctuation. This is our own pattern for the same language; `tests/golden/captions.json` holds captions with
the words that the Java program made of them. A known difference: its lists of abbreviations are longer.
"""

import re

_REMOVED = frozenset(("'", '"', ".", "?", "!", ",", ":", "-", "--", "...", ";"))
_LETTER = r"(?:[^\W\d_\u0300-\u036f][\u0300-\u036f]*)"
_WORD = rf"(?:{_LETTER}|\d|_)+"
_TOKEN = re.compile(
    rf"""
    https?://\S+ | [\w.+-]+@[\w-]+\.[\w.]+ | <\w+>      # addresses and tags
    | (?-i:[A-Z]+(?:&[A-Z]+)+)                          # AT&T
    | (?:{_LETTER}\.){{2,}}                             # u.s., p.m.
    | (?:mr|mrs|ms|dr|st|jr|sr|vs|etc|prof|gen|ave|blvd|rd|inc|co|corp|ltd|ft)\.
    | (?:jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec|mon|tues?|wed|thurs?|fri)\.(?=\s)
    | no\.(?=\s?\d) | (?<!\w){_LETTER}\.(?=\s+\S)       # no. 5, and initials
    | '(?:s|m|re|ve|d|ll)(?!\w) | n't(?!\w) | 'n' | '?\b(?:o'clock|d'{_WORD})
    | \b(?:y'(?=all) | can(?=not\b) | gon(?=na\b) | wan(?=na\b) | got(?=ta\b) | gim(?=me\b) | lem(?=me\b))
    | \d+(?:st|nd|rd|th)\b | \d+(?:[.,:/]\d+)+(?=[ap]m\b) | \d+(?=[ap]m\b)
    | {_WORD}?(?=n't(?!\w))                             # the word before n't
    | {_LETTER}+\.{_LETTER}+ | {_WORD}(?:[-/]{_WORD}|(?<=\d)[.,:](?=\d)\d+)*
    | \.\.\. | -{{2,}} | [?!]{{2,}} | \S
    """,
    re.VERBOSE | re.IGNORECASE,
)
_LOOKS = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "—": "--", "…": "..."})
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}


def words(caption: str) -> list[str]:
    """The words of a caption in lower case, without punctuation; contractions and brackets are words of their own."""
    found = map(str.lower, _TOKEN.findall(caption.translate(_LOOKS)))
    return [_BRACKETS.get(token, token) for token in found if token and token not in _REMOVED]
