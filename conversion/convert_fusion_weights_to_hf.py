"""Convert a checkpoint of the authors' FUSION code to a complete Hub folder; the same as `fusion-hf convert`.

Tested command (a checkpoint of FUSION's shape; published ones name their tower, so they need no --vision-config):

    python conversion/convert_fusion_weights_to_hf.py --model CHECKPOINT --vision-config vision_config.json \
        --tokenizer TOKENIZER --output OUTPUT

`--help` lists all options; `--dry-run` checks a checkpoint of any size from its headers alone.
"""

import sys

from fusion_hf.cli.convert import main

if __name__ == "__main__":
    sys.exit(main())
