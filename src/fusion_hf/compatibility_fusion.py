"""What differs between the releases of transformers that FUSION supports, in one place.

Every other Hub file asks here and contains no version of its own.
"""

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import logging

# one name for all copies of this file, so that `warning_once` holds for the process
logger = logging.get_logger("fusion_hf")

# (major, minor): the oldest and the newest release that the test suite passes on
OLDEST_TESTED, NEWEST_TESTED = (5, 17), (5, 24)
TESTED = " to ".join(".".join(map(str, release)) for release in (OLDEST_TESTED, NEWEST_TESTED))
CACHE_NAMES = ("cache", "past_key_values")
# 5.24 renamed `past_key_values` to `cache`, in outputs, in `forward` and in `generate`
CACHE_NAME = next(
    name for name in CACHE_NAMES if name in {field.name for field in dataclasses.fields(BaseModelOutputWithPast)}
)


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


def cache_keyword(cache: Any) -> dict[str, Any]:
    """Return the cache as the keyword argument that this release of transformers uses."""
    return {CACHE_NAME: cache}


def rename_cache(arguments: dict[str, Any]) -> dict[str, Any]:
    """
    Return keyword arguments in which the cache has the name that this release of transformers uses.

    Raises:
        ValueError: if they hold a cache under both names.
    """
    others = {name: value for name, value in arguments.items() if name not in CACHE_NAMES}
    cache = either_cache(*(arguments.get(name) for name in CACHE_NAMES))
    return others if cache is None else others | cache_keyword(cache)


def either_cache(cache: Any, past_key_values: Any) -> Any:
    """
    Return the cache that a caller gave under one of its two names, or None.

    As in transformers, the older name causes a `FutureWarning` where the newer one is in use.

    Raises:
        ValueError: if both are given.
    """
    if past_key_values is not None and cache is not None:
        raise ValueError("`cache` and `past_key_values` are two names of one argument: pass one of them.")
    if past_key_values is not None and CACHE_NAME != "past_key_values" and not torch.compiler.is_compiling():
        warnings.warn(f"`past_key_values` is deprecated. Use `{CACHE_NAME}` instead.", FutureWarning, stacklevel=3)
    return past_key_values if cache is None else cache


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
