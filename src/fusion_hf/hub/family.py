"""Published facts about the six models of the family: names, data, licences and benchmark results.

The results belong to the checkpoints of the last training stage.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

if TYPE_CHECKING:  # tables of results do not need torch
    from fusion_hf.model.configuration_fusion import FusionConfig

PAPER = "https://arxiv.org/abs/2504.09925"
REPOSITORY = "https://github.com/starriver030515/FUSION"
DATASETS = ("starriver030515/FUSION-Pretrain-10M", "starriver030515/FUSION-Finetune-12M")
AUTHORS = "starriver030515"  # on the Hub
LAST_STAGE = "Stage2"
FUSION_L_GRID = 16

PUBLISHED_FILE = Path(__file__).with_name("published_results.yaml")


@dataclass(frozen=True)
class Licence:
    """A licence as model cards name it: identifier on the Hub, name, link to the text, and a note for the reader."""

    identifier: str
    name: str
    link: str | None = None
    note: str = ""


@dataclass(frozen=True)
class Backbone:
    """A published language model: its repository, its licence, and the licence of the authors' models based on it."""

    repository: str
    own_licence: Licence
    licence: Licence


PHI = Backbone(
    "microsoft/Phi-3.5-mini-instruct",
    Licence("mit", "mit", "https://huggingface.co/microsoft/Phi-3.5-mini-instruct/resolve/main/LICENSE"),
    Licence(
        "apache-2.0",
        "apache-2.0",
        "https://www.apache.org/licenses/LICENSE-2.0",
        "The authors publish their checkpoint under it; Phi-3.5-mini-instruct is under the MIT licence, which allows "
        "that, and the tower is under Apache-2.0.",
    ),
)
_LLAMA_LICENCE = Licence(
    "llama3.1",
    "llama3.1",
    "https://huggingface.co/meta-llama/Llama-3.1-8B-Instruct/blob/main/LICENSE",
    "Built with Llama. The authors publish their checkpoint under Apache-2.0; the Llama 3.1 Community License governs "
    "what is derived from Llama, and asks whoever passes it on for a copy of that licence, a notice, and a name that "
    'begins with "Llama". The tower is under Apache-2.0.',
)
LLAMA = Backbone("meta-llama/Llama-3.1-8B-Instruct", _LLAMA_LICENCE, _LLAMA_LICENCE)
BACKBONES = (PHI, LLAMA)
SO400M = "google/siglip-so400m-patch14-384"
GIANT = "google/siglip2-giant-opt-patch16-384"


@dataclass(frozen=True)
class PublishedRow:
    """The row of a model in the published table. Entries of `values` are None if they are not published."""

    name: str
    group: str
    vision_tokens: int | None
    values: dict[str, float | None]


@cache
def published_rows() -> dict[str, PublishedRow]:
    """Return the rows of the published table by the names of the models, in order."""
    content = yaml.safe_load(PUBLISHED_FILE.read_text(encoding="utf-8"))
    rows = {}
    for model in content["models"]:
        values = dict(zip(content["columns"], model.pop("values"), strict=True))
        rows[model["name"]] = PublishedRow(**model, values=values)
    return rows


@dataclass(frozen=True)
class FamilyMember:
    """A published model. `checkpoint` is the repository of its last stage."""

    name: str
    checkpoint: str
    backbone: Backbone
    tower: str

    @property
    def row(self) -> PublishedRow:
        """Row of the model in the published table."""
        return published_rows()[self.name]


MEMBERS = (
    FamilyMember("FUSION 3B", "starriver030515/FUSION-Phi3.5-3B", PHI, SO400M),
    FamilyMember("FUSION-X 3B", "starriver030515/FUSION-X-Phi3.5-3B", PHI, GIANT),
    FamilyMember("FUSION-L 3B", "starriver030515/FUSION-Phi3.5-3B", PHI, SO400M),
    FamilyMember("FUSION 8B", "starriver030515/FUSION-LLaMA3.1-8B", LLAMA, SO400M),
    FamilyMember("FUSION-X 8B", "starriver030515/FUSION-X-LLaMA3.1-8B", LLAMA, GIANT),
    FamilyMember("FUSION-L 8B", "starriver030515/FUSION-LLaMA3.1-8B", LLAMA, SO400M),
)

# (model type, width, layers) of the published language models, and (width, kept layers) of the published towers
BACKBONE_SIZES = {("phi3", 3072, 32): PHI, ("llama", 4096, 32): LLAMA}
TOWER_SIZES = {(1152, 26): SO400M, (1536, 39): GIANT}


def is_of_authors(name: str, member: FamilyMember | None) -> bool:
    """
    Return whether a checkpoint with published sizes was published by the authors, after any stage, by its name.

    Args:
        name: A repository, or the name of a folder.
        member: Published model with the sizes of the checkpoint.
    """
    owner, _, title = name.rpartition("/")
    return member is not None and owner in ("", AUTHORS) and title.startswith(member.checkpoint.rpartition("/")[2])


def find_member(config: "FusionConfig") -> FamilyMember | None:
    """Find the published model with the sizes of a configuration. Return None if there is none."""
    text, vision = config.text_config, config.vision_config
    backbone = BACKBONE_SIZES.get((text.model_type, text.hidden_size, text.num_hidden_layers))
    tower = TOWER_SIZES.get((vision.hidden_size, vision.num_hidden_layers))
    if config.image_token_grid not in (None, FUSION_L_GRID):
        return None
    is_reduced = config.image_token_grid is not None
    for member in MEMBERS:
        if (member.backbone, member.tower, "-L " in member.name) == (backbone, tower, is_reduced):
            return member
    return None
