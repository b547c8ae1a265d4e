"""Entry point of `python -m fusion_hf`, which is the same as `fusion-hf`."""

import sys

from fusion_hf.cli import main

if __name__ == "__main__":
    sys.exit(main())
