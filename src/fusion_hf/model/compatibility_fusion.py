"""Differences between the releases of transformers that FUSION supports. This file does not import torch.

No other Hub file mentions a version. `modeling_fusion_base.py` handles the two names of the cache.
"""

import transformers
from transformers.utils import logging

# One name for all copies of this file, so that `warning_once` warns once per process.
logger = logging.get_logger("fusion_hf")

# (major, minor) of the oldest and the newest release that pass the test suite.
OLDEST_TESTED, NEWEST_TESTED = (5, 17), (5, 24)
TESTED = " to ".join(".".join(map(str, release)) for release in (OLDEST_TESTED, NEWEST_TESTED))
CACHE_NAMES = ("cache", "past_key_values")  # the name since 5.24, and the name before


def check_transformers(version: str) -> None:
    """
    Compare a version of transformers with the tested range. A version that is too new causes a warning.

    Args:
        version (`str`): Version of transformers, such as `"5.24.0"` or `"5.25.0.dev0"`.

    Raises:
        ImportError: If the version is older than the oldest tested release.
    """
    release = tuple(int(part) for part in version.split(".")[:2])
    if release < OLDEST_TESTED:
        raise ImportError(f"FUSION requires transformers {TESTED}, got {version}.")
    if release > NEWEST_TESTED:
        advice = "If something fails, install a tested release."
        logger.warning_once(f"FUSION was tested with transformers {TESTED}, but you use {version}. {advice}")


check_transformers(transformers.__version__)
