"""Who is answered next: a pure state of waiting and running requests, and functions from one state to the next.

Clients take turns: each gives its oldest request to the next free slot, then goes to the end of the line. So a client
with a thousand requests delays another one's by one answer at most. Times are seconds of whatever clock the caller has.
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from typing import Any

from paligemma_jax.errors import Busy


@dataclasses.dataclass(frozen=True)
class Entry:
    """A request as the scheduler sees it.

    id: of this request alone.
    client: whose turn it takes.
    deadline: when its time is over, waiting or running.
    """

    id: int
    client: str = ""
    deadline: float = math.inf


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Requests that run and wait.

    slots: who has each slot, None for a free one.
    max_waiting: how many may wait.
    queues: of each client with waiting requests, those from the oldest; the client whose turn is next comes first.
    """

    slots: tuple[Entry | None, ...]
    max_waiting: int
    queues: tuple[tuple[Entry, ...], ...] = ()

    @property
    def running(self) -> dict[int, int]:
        """Slot of each running request, by id."""
        return {entry.id: slot for slot, entry in enumerate(self.slots) if entry is not None}

    @property
    def waiting(self) -> int:
        return sum(map(len, self.queues))

    @property
    def entries(self) -> Iterator[Entry]:
        """All of them, those that run first."""
        yield from (entry for entry in self.slots if entry is not None)
        for queue in self.queues:
            yield from queue

    @property
    def next_deadline(self) -> float:
        return min((entry.deadline for entry in self.entries), default=math.inf)


def idle(num_slots: int, max_waiting: int) -> Schedule:
    """A schedule without requests."""
    return Schedule((None,) * num_slots, max_waiting)


def check_room(schedule: Schedule) -> None:
    """Raise Busy unless one more request may wait."""
    if schedule.waiting >= schedule.max_waiting:
        raise Busy(f"{schedule.waiting} requests are waiting, which is the most that may: try again later")


def submit(schedule: Schedule, entry: Entry) -> Schedule:
    """With one more request that waits; Busy when as many wait as may."""
    check_room(schedule)
    queues = list(schedule.queues)
    for i, queue in enumerate(queues):
        if queue[0].client == entry.client:
            queues[i] = (*queue, entry)
            break
    else:
        queues.append((entry,))
    return dataclasses.replace(schedule, queues=tuple(queues))


def expired(schedule: Schedule, now: float) -> list[int]:
    """Requests whose time is over, by id."""
    return [entry.id for entry in schedule.entries if entry.deadline <= now]


def remove(schedule: Schedule, ids: Collection[int]) -> Schedule:
    """Without some requests: their slots are free, and they no longer wait. Ids that are not there change nothing."""
    if not ids:
        return schedule
    slots = tuple(None if entry is not None and entry.id in ids else entry for entry in schedule.slots)
    queues = (tuple(entry for entry in queue if entry.id not in ids) for queue in schedule.queues)
    return dataclasses.replace(schedule, slots=slots, queues=tuple(filter(None, queues)))


def admit(schedule: Schedule, most: int) -> tuple[Schedule, list[tuple[int, Entry]]]:
    """Give free slots, at most so many, to those whose turn it is.

    Returns the schedule afterwards, and the new (slot, request) pairs in the order of their turns.
    """
    slots, queues = list(schedule.slots), list(schedule.queues)
    free = [slot for slot, entry in enumerate(slots) if entry is None][:most]
    admitted = []
    for slot in free:
        if not queues:
            break
        first, *rest = queues.pop(0)
        if rest:
            queues.append(tuple(rest))
        slots[slot] = first
        admitted.append((slot, first))
    return dataclasses.replace(schedule, slots=tuple(slots), queues=tuple(queues)), admitted


def batches(
    items: Sequence[Any], bucket: Callable[[Any], Hashable], sizes: Callable[[Any], Sequence[int]]
) -> list[list[Any]]:
    """Items that share a program: of one bucket, and as many as a program takes, so that none is padded.

    Args:
      bucket: of an item.
      sizes: how many items of a bucket are taken at once, the most first, 1 at last.
    """
    groups: dict[Hashable, list[Any]] = {}
    for item in items:
        groups.setdefault(bucket(item), []).append(item)
    found = []
    for key, group in groups.items():
        start = 0
        for size in split(len(group), sizes(key)):
            found.append(group[start : start + size])
            start += size
    return found


def split(count: int, sizes: Sequence[int]) -> list[int]:
    """A count as a sum of sizes, which end with 1, the largest first."""
    found = []
    for size in sizes:
        found += [size] * (count // size)
        count %= size
    return found
