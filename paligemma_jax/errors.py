"""What can go wrong because of an input. The command line prints the message as one line and exits with 1."""


def one_line(error: object) -> str:
    """What an error of another library says, to be part of a message of ours."""
    return " ".join(str(error).split()) or type(error).__name__


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


class PromptError(UserError):
    """Prompts that do not fit the pictures or the cache."""


class SamplingError(UserError):
    """Sampling settings that have no meaning."""


class DataError(UserError):
    """Training or evaluation data that cannot be used."""
