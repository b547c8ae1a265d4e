"""`python -m fusion_hf` is `fusion-hf`."""

import sys

from fusion_hf.cli import main

if __name__ == "__main__":
    sys.exit(main())
