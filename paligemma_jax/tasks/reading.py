"""Where the objects of a text stand, and which words are whose label.

Words belong to the box before them, up to the next `;`, line break or object, as the released models write. Some
fine-tunes write them in front of the box instead: of two or more objects that shows, as then words stand close before
each box and none behind the last. Of a single one it does not, and only words that were asked for are its label.
"""

import dataclasses
import re
from collections.abc import Collection, Iterator, Sequence

NUM_CODES = 16  # segmentation tokens of one mask
NUM_SIDES = 4  # location tokens of one box

_LOC = r"<loc(?P<loc>0[0-9]{3}|10[01][0-9]|102[0-3])>"
_SEG = r"<seg(?P<seg>0[0-9]{2}|1[01][0-9]|12[0-7])>"
# A token, or what is left of one: `broken` is malformed, or cut off at the end.
_TOKEN = re.compile(rf"{_LOC}|{_SEG}|(?P<broken><(?:loc|seg)[^<>;\s]*>?|<(?:lo?|se?)(?![\w>]))")
_COMMAS = ",，、；"
_CUT = re.compile(r"[;\r\n]|<(?:eos|pad)>")
# Words that are no label: marks alone, the number of a line, what joins boxes.
_FILLER = re.compile(rf"[\s\x00-\x1f.:!?|&+\-–—•*·…。：()\[\]{{}}\"'{_COMMAS}]*|\s*(?:\d+[.)]|and)\s*")
_WRAPPING = re.compile(
    r"(?:[:：]|[-–—•*/](?=\s)|(?:</?\w+>)+)?(?P<words>.*?)(?:(?:</?\w+>)+|(?<=\s)[/|]|\\n)?", re.DOTALL
)
_QUOTED = re.compile(r"([\"'`])(?P<words>[^\"'`]+)\1")
_OPENING = re.compile(rf"(?:[\s{_COMMAS}|&+]|[-–—•*](?=\s)|and\s)*")


@dataclasses.dataclass
class Item:
    """Something written with location or segmentation tokens.

    start, stop: in the text, of the tokens alone.
    locs: y0, x0, y1, x1 of an object; () for what is incomplete.
    codes: of its mask; () without one.
    label: "" when there is none.
    span: start and end of the item with its label.
    """

    start: int
    stop: int
    locs: tuple[int, ...] = ()
    codes: tuple[int, ...] = ()
    label: str = ""
    span: tuple[int, int] = (0, 0)


def read(text: str, labels: Sequence[str] = ()) -> list[Item]:
    """Everything in a text that is written with location or segmentation tokens, in order, with its label.

    Args:
      labels: the classes asked for, if they are known: they decide whose label words are, and the only one is that of
        an object without.
    """
    if "<loc" not in text and "<seg" not in text:
        return []
    items = [item for run in _runs(text) for item in _objects(text, run)]
    ends = [item.stop for item in items]
    gaps = list(zip([0, *ends], [*(item.start for item in items), len(text)], strict=True))
    for item, (start, stop) in zip(items, gaps[1:], strict=True):
        item.label, end = _label_behind(text[start:stop], stop < len(text))
        item.span = item.start, start + end
    labels = [labels] if isinstance(labels, str) else labels
    asked = {name.casefold(): name for label in labels if (name := " ".join(label.split()))}
    before = [_label_before(text[slice(*gap)]) for gap in gaps[:-1]]
    if _is_before(text, gaps, [label for label, _ in before], [item.label for item in items], asked.keys()):
        for item, (start, _), (label, begin) in zip(items, gaps, before, strict=False):
            item.label, item.span = label, (start + begin, item.stop)
    else:
        free = 0  # the end of what is another item's label
        for item, (start, _), (label, begin) in zip(items, gaps, before, strict=False):
            if not item.label and label.casefold() in asked and start + begin >= free:
                item.label, item.span = label, (start + begin, item.stop)
            free = item.span[1]
    if len(asked) == 1:
        for item in items:
            item.label = item.label or next(iter(asked.values()))
    return items


def is_label(text: str) -> bool:
    """Whether an object can have this label, so that it is read again behind its box."""
    label = " ".join(text.split())
    return bool(label) and not _TOKEN.search(label) and _label_behind(f" {label}", False)[0] == label


def _runs(text: str) -> Iterator[list[re.Match[str]]]:
    """Tokens with nothing but white space between them: locations, then perhaps mask codes."""
    run: list[re.Match[str]] = []
    for token in _TOKEN.finditer(text):
        if run:
            between = text[run[-1].end() : token.start()]
            is_new = not _is_seg(token) and (
                _is_seg(run[-1]) or ("\n" in between and len(run) % NUM_SIDES == 0)  # a box is a line of its own
            )
            if is_new or (between and not between.isspace()):
                yield run
                run = []
        run.append(token)
    if run:
        yield run


def _objects(text: str, run: list[re.Match[str]]) -> Iterator[Item]:
    """The objects of a run, and what is incomplete in it.

    Boxes that follow each other directly have four locations each; a mask is the last one's. When the number does not
    come out even, nobody knows which locations are a box, unless it is the end of the text that came too early.
    """
    locs = [token for token in run if not _is_seg(token)]
    segs = run[len(locs) :]
    codes = tuple(int(token["seg"]) for token in segs if token["seg"])
    is_cut = not segs and not text[run[-1].end() :].strip()
    groups = [locs[i : i + NUM_SIDES] for i in range(0, len(locs), NUM_SIDES)]
    whole = [len(group) == NUM_SIDES and all(token["loc"] for token in group) for group in groups]
    if not all(whole) and not is_cut:
        groups = []
    count = whole.index(False) if groups and not all(whole) else len(groups)
    is_masked = len(segs) == len(codes) == NUM_CODES
    if segs and not is_masked:
        count -= 1
    for i, group in enumerate(groups[:count]):
        of_mask = codes if i == len(groups) - 1 else ()
        stop = segs[-1].end() if of_mask else group[-1].end()
        yield Item(group[0].start(), stop, tuple(int(token["loc"]) for token in group), of_mask)
    rest = run[NUM_SIDES * max(count, 0) :] if count < len(groups) or not groups else []
    if rest:
        yield Item(rest[0].start(), rest[-1].end())


def _is_seg(token: re.Match[str]) -> bool:
    return token[0].startswith("<s")


def _label_behind(gap: str, is_followed: bool) -> tuple[str, int]:
    """The label at the beginning of what stands behind a box, perhaps before another one, and its end there."""
    lead = len(gap) - len(gap.lstrip())
    body = gap[lead:]
    cut = _CUT.search(body)
    line = body[: cut.start()] if cut else body
    if line[:1] in _COMMAS or gap[:lead].count("\n") > 1:
        return "", 0
    words = _without_link(line) if is_followed and not cut else line.rstrip().rstrip(_COMMAS)
    if _FILLER.fullmatch(words):
        return "", 0
    end = len(line) if words == line.rstrip() else len(words)
    label = " ".join(_bare(words).split())
    return ("", 0) if _FILLER.fullmatch(label) else (label, lead + end)


def _bare(words: str) -> str:
    """A label without what is written around labels: bullets, quotes, tags, a slash, a line break in letters."""
    shorter = _WRAPPING.fullmatch(words.strip())["words"].strip(f" {_COMMAS}")
    if quoted := _QUOTED.fullmatch(shorter):
        shorter = quoted["words"].strip()
    return words if shorter in ("", words) else _bare(shorter)


def _without_link(words: str) -> str:
    """A label without what joins it to the object that follows: commas, "and" and the like."""
    while (shorter := words.rstrip().rstrip(_COMMAS + "|&+ ").removesuffix(" and")) != words:
        words = shorter
    return words


def _label_before(gap: str) -> tuple[str, int]:
    """The words at the end of what stands before a box, and their start there; "" for numbers and the like."""
    line = gap.rstrip()
    start = max((match.end() for match in _CUT.finditer(line)), default=0)
    start += _OPENING.match(line[start:]).end()
    label = " ".join(_bare(line[start:].rstrip(" :：([=-")).split())
    return (label, start) if any(letter.isalpha() for letter in label) else ("", len(gap))


def _is_before(
    text: str, gaps: Sequence[tuple[int, int]], before: Sequence[str], behind: Sequence[str], known: Collection[str]
) -> bool:
    """Whether labels stand in front of their boxes, see the top of the file."""
    if len(before) < 2 or not all(before) or behind[-1]:
        return False
    parts = [text[slice(*gap)] for gap in gaps[:-1]]
    after = [_distance(part[len(part.rstrip(" \t\r\n" + _COMMAS + ";")) :]) for part in parts]
    ahead = [_distance(part[: len(part) - len(part.lstrip(" \t\r\n" + _COMMAS + ";"))]) for part in parts[1:]]
    single = all(len([s for s in _CUT.split(part) if s.strip(" \t" + _COMMAS)]) == 1 for part in parts[1:])
    if not single or max(after) > 1 or len(set(after)) > 1 or min(ahead) < after[0]:
        return False
    first, *others = (label.casefold() in known for label in before)
    return first or not any(others)  # else the first words are no label


def _distance(between: str) -> int:
    """How far words are from a box: 0 beside it, 1 on another line, 2 behind a separator."""
    return 2 if any(c in between for c in _COMMAS + ";") else 1 if "\n" in between else 0
