"""A whole JSON file, for the formats that are one."""

import json
from pathlib import Path
from typing import Any

from paligemma_jax.errors import DataError
from paligemma_jax.files import read_text


def load(path: Path) -> Any:
    """What a file holds; DataError when it is missing or no JSON."""
    try:
        return json.loads(read_text(path))
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): give a data set that is there") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON ({error}): export the data set again") from None
