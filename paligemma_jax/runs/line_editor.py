"""Lines as a user types them: history of earlier sessions, Tab completion, and Ctrl-C that clears the line."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

from paligemma_jax.files import expanded
from paligemma_jax.runs.notes import note

_HISTORY = 1000  # lines that are kept
_QUOTED = " \t\"'\\"

Complete = Callable[[str], list[str]]  # from the line up to the cursor to what its last word may become


def lines(prompt: str, complete: Complete) -> Iterator[str]:
    """What is typed until Ctrl-D, without the white space around it; Ctrl-C clears a line, as in a shell.

    Args:
      complete: what Tab offers.
    """
    with _edited(complete):
        while True:
            try:
                yield input(prompt).strip(" \t")
            except EOFError:
                note("")
                return
            except KeyboardInterrupt:
                note("\n(Ctrl-D or /quit leaves)")


def history_file() -> Path | None:
    """Where lines are kept for the next session, as the XDG rules have it; None for a user without a home."""
    root = os.environ.get("XDG_STATE_HOME", "")
    path = Path(root) if os.path.isabs(root) else expanded("~/.local/state")
    return path / "paligemma_jax" / "chat_history" if path.is_absolute() else None


def paths(start: str) -> list[str]:
    """The paths that begin so, folders with a slash at the end; white space and quotes in them are escaped."""
    typed = unescaped(start)
    folder, _, name = typed.rpartition("/")
    root = expanded(f"{folder}/") if "/" in typed else Path()
    try:
        found = sorted(p for p in root.iterdir() if p.name.startswith(name) and (name or not p.name.startswith(".")))
    except (OSError, ValueError):
        return []
    prefix = f"{folder}/" if "/" in typed else ""
    return [escaped(f"{prefix}{p.name}") + ("/" if p.is_dir() else "") for p in found]


def escaped(text: str) -> str:
    """A word as a shell would take it, with backslashes."""
    return "".join(f"\\{c}" if c in _QUOTED else c for c in text)


def unescaped(text: str) -> str:
    """A word that may be quoted, or have backslashes before white space and quotes; other backslashes stay.

    Those of Windows' paths do, and an odd quote is a character of the name.
    """
    text = text.strip(" \t")
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":
        return text[1:-1]
    found, rest = [], iter(text)
    for c in rest:
        following = next(rest, "") if c == "\\" else ""
        found.append(following if following and following in _QUOTED else c + following)
    return "".join(found)


@contextlib.contextmanager
def _edited(complete: Complete) -> Iterator[None]:
    """`input` with a history of its own, which is kept, and completion."""
    try:
        import readline
    except ImportError:  # some systems have none
        yield
        return
    file = history_file()
    if file is not None:
        with contextlib.suppress(OSError, UnicodeDecodeError):
            readline.read_history_file(file)
    _bind(readline, complete)
    try:
        yield
    finally:
        readline.set_completer(None)
        if file is not None:
            with contextlib.suppress(OSError):  # a chat is no worse without
                _keep(readline, file)


def _bind(readline: ModuleType, complete: Complete) -> None:
    def completer(_: str, state: int) -> str | None:
        found = complete(readline.get_line_buffer()[: readline.get_endidx()])
        return found[state] if state < len(found) else None

    readline.set_completer_delims("")  # the whole line: paths may hold white space
    readline.set_completer(completer)
    is_libedit = "libedit" in (readline.__doc__ or "")
    readline.parse_and_bind("bind ^I rl_complete" if is_libedit else "tab: complete")


def _keep(readline: ModuleType, file: Path) -> None:
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    readline.set_history_length(_HISTORY)
    readline.write_history_file(file)
    file.chmod(0o600)  # what somebody asked about his pictures is his
