"""Make an untrained FUSION from a language model and a SigLIP tower: the start of a training.

Tested command (a small language model; the defaults suit models with at least 28 layers):

    python conversion/build_from_backbones.py --text TEXT --vision VISION --output OUTPUT --num-samplers 2 --stride 1

`--help` lists all options.
"""

import sys

from fusion_hf.cli.build import main

if __name__ == "__main__":
    sys.exit(main())
