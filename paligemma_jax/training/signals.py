"""Signals that ask a run to end wait until it can save."""

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator

from paligemma_jax.errors import Stopped

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def held_signals(agreed: Callable[[int], int] = lambda number: number) -> Iterator[Callable[[], None]]:
    """Ctrl-C and SIGTERM wait until the yielded function is called, which raises KeyboardInterrupt or Stopped then.

    In the middle of a step the old state is gone and the new one not yet here. A second signal stops at once.

    Args:
      agreed: the signal that came, 0 for none, to the one that this process shall stop for.
    """
    held: list[int] = []

    def hold(signum: int, frame: object) -> None:
        held.append(signum)
        if len(held) > 1:
            stop_for(signum)
        print("stopping after this step; Ctrl-C again to stop at once", file=sys.stderr)

    def stop_for(number: int) -> None:
        raise KeyboardInterrupt if number == signal.SIGINT else Stopped(number)

    def stop() -> None:
        if number := agreed(held[-1] if held else 0):
            stop_for(number)

    if threading.current_thread() is not threading.main_thread():  # signals are handled there only
        yield stop
        return
    before = {number: signal.signal(number, hold) for number in _SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
