"""What the server of `tests.helpers.forked` imports: all that a command needs, as far as it is installed."""

import os
from contextlib import suppress

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the Hub's client is imported

import fusion_hf.inference.batching

with suppress(ImportError):
    import fusion_hf.cli.train
    import fusion_hf.training.run
with suppress(ImportError):
    import matplotlib.pyplot  # noqa: F401
with suppress(ImportError):
    import fusion_hf.synthesis.pipeline  # noqa: F401
