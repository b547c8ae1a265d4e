"""Names of weights in the authors' checkpoints and SigLIP folders, mapped to the names of this package.

This table is the only place with the authors' names. The first row whose pattern matches a whole name decides. If no
row matches, the name is unknown, and conversion raises an error.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from fusion_hf.model.configuration_fusion import FusionConfig

NEVER_RUN = "FUSION does not run it"
RECOMPUTED = "computed again"


@dataclass(frozen=True)
class Row:
    """
    One rule of the table.

    Attributes:
        pattern: Regular expression for the whole name. `{last_layer}` stands for the index of the tower's last layer.
        target: Name in this package with the groups of the pattern, or None for a weight that is dropped.
            `{sampler_layer}` stands for the LLM layer of the sampler whose index is the group `sampler`.
        note: Reason why a weight is dropped.
    """

    pattern: str
    target: str | None
    note: str = ""


# Names relative to the tower, which is `model.vision_tower.vision_tower.vision_model.` in a checkpoint, and
# `vision_model.` or nothing in a SigLIP folder.
TOWER_ROWS = (
    Row(r"embeddings\.position_ids", None, RECOMPUTED),
    Row(r"embeddings\.(.+)", r"model.vision_tower.embeddings.\1"),
    Row(r"encoder\.layers\.(.+)", r"model.vision_tower.layers.\1"),
    Row(r"post_layernorm\..+", None, NEVER_RUN),
    Row(r"head\..+", None, NEVER_RUN),
)

LANGUAGE_MODEL_ROWS = (
    Row(r"model\.(?:layers\.\d+\.self_attn\.)?rotary_emb\..+", None, RECOMPUTED),
    Row(r"model\.(embed_tokens|norm|layers)\.(.+)", r"model.language_model.\1.\2"),
    Row(r"lm_head\.weight", r"lm_head.weight"),
)

_SAMPLER = r"model\.vision_sampler_layers\.(?P<sampler>\d+)\.layers\.0\."
_OUR_SAMPLER = r"model.language_model.layers.{sampler_layer}.vision_sampler."
FUSION_ROWS = (
    Row(r"model\.mm_projector\.0\.(.+)", r"model.vision_projector.linear_1.\1"),
    Row(r"model\.mm_projector\.2\.(.+)", r"model.vision_projector.linear_2.\1"),
    Row(r"model\.aux_projector\.0\.(.+)", r"model.vision_projector_back.linear_1.\1"),
    Row(r"model\.aux_projector\.2\.(.+)", r"model.vision_projector_back.linear_2.\1"),
    Row(_SAMPLER + r"(proj_in|proj_context|norm)\.(.+)", _OUR_SAMPLER + r"\2.\3"),
    Row(_SAMPLER + r"proj_out\.(linear_1|linear_2)\.(.+)", _OUR_SAMPLER + r"\2.\3"),
    Row(_SAMPLER + r"cross_attn\.(q|k|v)_proj\.0\.(.+)", _OUR_SAMPLER + r"\2_norm.\3"),
    Row(_SAMPLER + r"cross_attn\.(q|k|v)_proj\.1\.(.+)", _OUR_SAMPLER + r"\2_proj.\3"),
    Row(_SAMPLER + r"cross_attn\.o_proj\.(.+)", _OUR_SAMPLER + r"o_proj.\2"),
)


def _prefixed(prefix: str, rows: Iterable[Row]) -> tuple[Row, ...]:
    return tuple(Row(prefix + row.pattern, row.target, row.note) for row in rows)


# Names in a checkpoint of the authors, and names in a SigLIP folder.
CHECKPOINT_TABLE = (
    *_prefixed(r"model\.vision_tower\.vision_tower\.vision_model\.", TOWER_ROWS),
    *FUSION_ROWS,
    *LANGUAGE_MODEL_ROWS,
)
TOWER_TABLE = (
    # The authors' checkpoints lack the last layer, so an extra layer there means that the tower is another one.
    Row(r"(?:vision_model\.)?encoder\.layers\.{last_layer}\..+", None, NEVER_RUN),
    *_prefixed(r"(?:vision_model\.)?", TOWER_ROWS),
    Row(r"text_model\..+", None, NEVER_RUN),
    Row(r"logit_(?:scale|bias)", None, NEVER_RUN),
)


class KeyMap:
    """The table for one configuration. Call it with a name to map."""

    def __init__(self, table: Iterable[Row], config: FusionConfig):
        last_layer = str(config.vision_config.num_hidden_layers)
        self.sampler_layers = config.sampler_layers
        self.rows = [(re.compile(row.pattern.replace("{last_layer}", last_layer)), row.target) for row in table]

    def __call__(self, key: str) -> str | None:
        """
        Map a name.

        Args:
            key: Name in a checkpoint.

        Returns:
            The name in this package, or None if the weight is dropped.

        Raises:
            KeyError: If no row matches.
        """
        for pattern, target in self.rows:
            match = pattern.fullmatch(key)
            if match is None:
                continue
            if target is None:
                return None
            name = match.expand(target)
            if "sampler" not in match.groupdict():
                return name
            index = int(match["sampler"])
            if index >= len(self.sampler_layers):
                break
            return name.replace("{sampler_layer}", str(self.sampler_layers[index]))
        raise KeyError(key)
