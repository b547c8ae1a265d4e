"""What differs between the releases of transformers that FUSION supports. It imports no torch.

No other Hub file contains a version. The two names of the cache are handled in `modeling_fusion_base.py`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import transformers
from transformers.utils import logging

# one name for all copies of this file, so that `warning_once` holds for the process
logger = logging.get_logger("fusion_hf")

# (major, minor): the oldest and the newest release that the test suite passes on
OLDEST_TESTED, NEWEST_TESTED = (5, 17), (5, 24)
TESTED = " to ".join(".".join(map(str, release)) for release in (OLDEST_TESTED, NEWEST_TESTED))
CACHE_NAMES = ("cache", "past_key_values")  # since 5.24, and before


def check_transformers(version: str) -> None:
    """
    Compare a version of transformers with the tested range.

    Args:
        version (`str`): such as `"5.24.0"` or `"5.25.0.dev0"`.

    Raises:
        ImportError: if it is older than the oldest tested release. A newer one causes a warning.
    """
    release = tuple(int(part) for part in version.split(".")[:2])
    if release < OLDEST_TESTED:
        raise ImportError(f"FUSION needs transformers {TESTED}, got {version}.")
    if release > NEWEST_TESTED:
        advice = "If something fails, install a tested release."
        logger.warning_once(f"FUSION was tested with transformers {TESTED}, got {version}. {advice}")


def as_dicts(message: Any) -> Any:
    """
    Turn a chat message, and the blocks in it, into dicts; images stay as they are.

    Since 5.24 transformers takes dataclasses and pydantic models, such as the messages of the OpenAI package. As
    there, a message's fields that are None are left out.
    """
    if isinstance(message, (list, tuple)):
        return [as_dicts(item) for item in message]
    if callable(getattr(message, "model_dump", None)):
        message = message.model_dump()
    elif dataclasses.is_dataclass(message) and not isinstance(message, type):
        # not `dataclasses.asdict`, which would copy images
        message = {field.name: getattr(message, field.name) for field in dataclasses.fields(message)}
    if not isinstance(message, Mapping):
        return message
    return {name: as_dicts(value) for name, value in message.items() if value is not None}


check_transformers(transformers.__version__)
