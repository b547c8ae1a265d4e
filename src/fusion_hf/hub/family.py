"""What is published about the six models of the family: names, data, licences and benchmark figures.

The figures are the rows of the table "Model Performance Comparison" in the README of the authors' repository
(github.com/starriver030515/FUSION); they belong to the checkpoints of the last training stage.
"""

from dataclasses import dataclass

from fusion_hf.model.configuration_fusion import FusionConfig

PAPER = "https://arxiv.org/abs/2504.09925"
REPOSITORY = "https://github.com/starriver030515/FUSION"
DATASETS = ("starriver030515/FUSION-Pretrain-10M", "starriver030515/FUSION-Finetune-12M")
LAST_STAGE = "Stage2"
FUSION_L_GRID = 16

BENCHMARKS = (
    "MMB_EN MMB_CN VizWiz POPE MM-Vet MME-P MME-C Seed-Image HallB LLaVA_W MMStar MME-RW RWQA CV-Bench MMVP AI2D "
    "MathVista MMMU SQA TextVQA OCRBench ChartQA DocVQA"
).split()


@dataclass(frozen=True)
class Backbone:
    """A published part: where it is, and under which licence (an identifier of the Hub) a derivative falls."""

    repository: str
    licence: str
    licence_note: str = ""


PHI = Backbone("microsoft/Phi-3.5-mini-instruct", "apache-2.0", "Phi-3.5-mini-instruct is under the MIT licence.")
LLAMA = Backbone(
    "meta-llama/Llama-3.1-8B-Instruct",
    "llama3.1",
    "Built with Llama. The authors publish their checkpoint under Apache-2.0; the Llama 3.1 Community License governs "
    "what is derived from Llama.",
)
SO400M = "google/siglip-so400m-patch14-384"
GIANT = "google/siglip2-giant-opt-patch16-384"


@dataclass(frozen=True)
class FamilyMember:
    """A published model. `checkpoint`: the repository of its last stage; `vision_tokens`: as published."""

    name: str
    checkpoint: str
    backbone: Backbone
    tower: str
    vision_tokens: int

    @property
    def scores(self) -> dict[str, str]:
        """Published figure of each benchmark, as printed."""
        return dict(zip(BENCHMARKS, SCORES[self.name].split(), strict=True))


# In the order of BENCHMARKS.
SCORES = {
    "FUSION 3B": "79.5 71.7 64.6 88.9 57.2 1595.9 416.5 74.6 51.4 84.7 52.4 41.5 "
    "65.1 76.4 76.0 78.9 54.3 44.7 87.1 71.8 60.0 75.7 70.9",
    "FUSION-X 3B": "80.3 74.8 66.1 88.7 60.3 1582.1 440.0 75.3 51.9 85.2 50.9 41.7 "
    "63.7 78.3 78.1 79.2 54.9 44.2 87.3 73.9 63.7 75.8 71.1",
    "FUSION-L 3B": "77.6 70.8 65.3 88.3 56.7 1573.7 406.8 74.1 48.7 77.6 44.7 39.5 "
    "61.8 76.2 77.0 77.3 48.6 43.4 85.6 71.4 56.9 67.7 63.5",
    "FUSION 8B": "80.5 74.9 59.5 89.3 60.0 1592.3 396.1 77.2 52.6 86.9 52.4 46.0 "
    "65.2 78.7 78.7 80.4 56.6 43.1 89.2 77.3 63.8 80.3 78.6",
    "FUSION-X 8B": "82.0 76.2 62.9 88.8 60.0 1607.5 337.2 78.2 51.4 88.0 52.7 44.7 "
    "66.1 79.2 79.9 81.4 59.4 42.2 90.3 74.7 66.6 79.8 77.8",
    "FUSION-L 8B": "80.0 73.6 59.9 88.5 57.3 1601.7 338.9 75.9 46.7 82.1 49.3 42.3 "
    "65.1 78.2 76.7 79.2 55.2 41.8 88.3 72.8 59.5 73.0 66.0",
}

MEMBERS = (
    FamilyMember("FUSION 3B", "starriver030515/FUSION-Phi3.5-3B", PHI, SO400M, 780),
    FamilyMember("FUSION-X 3B", "starriver030515/FUSION-X-Phi3.5-3B", PHI, GIANT, 620),
    FamilyMember("FUSION-L 3B", "starriver030515/FUSION-Phi3.5-3B", PHI, SO400M, 308),
    FamilyMember("FUSION 8B", "starriver030515/FUSION-LLaMA3.1-8B", LLAMA, SO400M, 780),
    FamilyMember("FUSION-X 8B", "starriver030515/FUSION-X-LLaMA3.1-8B", LLAMA, GIANT, 620),
    FamilyMember("FUSION-L 8B", "starriver030515/FUSION-LLaMA3.1-8B", LLAMA, SO400M, 308),
)

# (model type, width, layers) of the language models and (width, kept layers) of the towers that are published
BACKBONE_SIZES = {("phi3", 3072, 32): PHI, ("llama", 4096, 32): LLAMA}
TOWER_SIZES = {(1152, 26): SO400M, (1536, 39): GIANT}


def find_member(config: FusionConfig) -> FamilyMember | None:
    """The published model that has the sizes of `config`, if any."""
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
