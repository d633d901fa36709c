"""The engine of one process: reads ahead, but not far, keeps what was answered, and ends with the first real error."""

import pytest

from paligemma_jax.annotate import local
from paligemma_jax.annotate.sources import File
from paligemma_jax.annotate.store import Group
from tests.annotate.conftest import Fake

SOURCES = [File(f"{i}.png", f"nowhere/{i}.png") for i in range(40)]
GROUPS = [Group(0, tuple(range(start, start + 4))) for start in range(0, 40, 4)]


class Watched(Fake):
    """Knows how many pictures were asked for before each answer; dies when it is to answer about one."""

    def __init__(self, deadly: str = "") -> None:
        super().__init__()
        self.deadly, self.read_before = deadly, []
        self.count = 0

    def read(self, source):
        self.count += 1
        return super().read(source)

    def answer(self, pictures):
        self.read_before.append(self.count)
        if self.deadly in [picture.name for picture in pictures]:
            raise KeyboardInterrupt
        super().answer(pictures)


@pytest.mark.parametrize("threads", [1, 5])
def test_pictures_are_read_ahead_but_not_all(threads):
    kept, watched = [], Watched()
    local.annotate(watched, SOURCES, iter(GROUPS), threads, lambda group, rows: kept.append((group, len(rows))))
    assert kept == [(group, 4) for group in GROUPS]
    assert all(4 * i < count <= 4 * (i + 4) for i, count in enumerate(watched.read_before))


def test_what_was_answered_before_an_interrupt_is_kept():
    kept, watched = [], Watched(deadly="22.png")
    with pytest.raises(KeyboardInterrupt):
        local.annotate(watched, SOURCES, iter(GROUPS), 2, lambda group, rows: kept.append(group))
    assert kept == GROUPS[:5]
    assert watched.count <= 4 * 8


@pytest.mark.parametrize("when", [0, 3, 9])
def test_a_full_disk_ends_the_run_at_once(when):
    watched = Watched()

    def keep(group, rows):
        if group == GROUPS[when]:
            raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space left"):
        local.annotate(watched, SOURCES, iter(GROUPS), 2, keep)
    assert len(watched.asked) <= when + 3
