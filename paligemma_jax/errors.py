"""What can go wrong because of an input. The command line prints the message as one line and exits with 1."""

MOST_CHARACTERS = 299  # of a line for the user
_LONG_WORD = 60


def one_line(error: object) -> str:
    """What an error of another library says, to be part of a message of ours."""
    return " ".join(str(error).split()) or type(error).__name__


def error_line(error: object) -> str:
    """How the command lines print an error: no line is longer than `MOST_CHARACTERS`, whatever path it names."""
    return shortened(f"error: {error}")


def shortened(text: object, most: int = MOST_CHARACTERS) -> str:
    """A text whose lines have at most `most` characters: of longer ones the longest words lose their middle first."""
    return "\n".join(_shortened_line(line, most) for line in str(text).split("\n"))


def _shortened_line(line: str, most: int) -> str:
    while len(line) > most:
        word = max(line.split(" "), key=len)
        kept = max(len(word) - (len(line) - most), min(_LONG_WORD, most))
        if len(word) <= kept:  # no word is to blame
            return _without_middle(line, most)
        line = line.replace(word, _without_middle(word, kept), 1)
    return line


def _without_middle(text: str, most: int) -> str:
    end = (most - 3) // 2
    return f"{text[: most - 3 - end]}...{text[-end:]}"


def printable(name: object) -> str:
    """A name out of a file, to be part of a message of ours: escaped where it would break the line."""
    text = str(name)
    return text if text.isprintable() else ascii(text)


class UserError(Exception):
    """Base of all errors that a user can mend; the message names the thing at fault and the remedy."""


class ConfigError(UserError):
    """A config.json, a run config or a geometry that is incomplete or contradicts itself."""


class CheckpointError(UserError):
    """Weights that are missing, damaged or do not fit the geometry."""


class TokenizerError(UserError):
    """A tokenizer file that is missing, damaged or does not fit the model."""


class ImageError(UserError):
    """A picture that cannot be read."""


class DamagedImageError(ImageError):
    """A picture whose file a decoder stumbles over; the message holds the decoder's words."""


class PromptError(UserError):
    """Prompts that do not fit the pictures or the cache."""


class SamplingError(UserError):
    """Sampling settings that have no meaning."""


class DataError(UserError):
    """Training or evaluation data that cannot be used."""


class NumericsError(UserError):
    """Results that are NaN or infinite: numbers too large for their format, or damaged weights."""


class Stopped(KeyboardInterrupt):
    """A signal that asks a process to end, such as SIGTERM, once its work is saved; `signal` is its number."""

    def __init__(self, signal: int):
        super().__init__(f"signal {signal}")
        self.signal = signal


class ServingError(UserError):
    """A request that a server did not answer."""


class Busy(ServingError):
    """As many requests wait as may: try again later."""


class Closed(ServingError):
    """A server that ends, and takes no new requests."""


class Expired(ServingError):
    """A request whose time was over before its answer was complete."""


class Cancelled(ServingError):
    """A request that its client, or the end of the server, took back."""


class EngineFailed(ServingError):
    """An unexpected error while a request was answered; others go on."""
