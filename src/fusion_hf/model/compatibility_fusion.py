"""What differs between the releases of transformers that FUSION supports. It imports no torch.

No other Hub file contains a version. The two names of the cache are handled in `modeling_fusion_base.py`.
"""

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


check_transformers(transformers.__version__)
