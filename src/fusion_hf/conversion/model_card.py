"""The model card: `README.md` of a Hub folder. The same input gives the same text; it holds no date and no path."""

from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import ModelCardData
from jinja2 import StrictUndefined, Template

from fusion_hf.common.user_values import dtype_name
from fusion_hf.hub.family import DATASETS, LAST_STAGE, PAPER, REPOSITORY, FamilyMember, find_member
from fusion_hf.model.compatibility_fusion import TESTED
from fusion_hf.model.configuration_fusion import FusionConfig

UNTRAINED_TAG = "untrained"
HUB = "https://huggingface.co/"
BENCHMARKS_PER_LINE = 12
TEMPLATE = Path(__file__).with_name("model_card.jinja")


@dataclass(frozen=True)
class Provenance:
    """Where a folder comes from.

    Attributes:
        title: name of the new model.
        model_id: what the usage snippets load.
        sources: role -> name and revision of what went into it, such as `("checkpoint", "owner/name at commit abc")`.
        base_models: repositories that the Hub should link, as far as they are known.
        dtype: type of the weights.
        num_parameters: parameters of the model.
        has_tokenizer: whether the folder can answer questions.
        is_untrained: whether FUSION's own parts are fresh.
        stage: the authors' training stage that the source's name tells, if it is not the last.
        notes: further sentences about the conversion.
    """

    title: str
    model_id: str
    sources: tuple[tuple[str, str], ...]
    base_models: tuple[str, ...]
    dtype: torch.dtype
    num_parameters: int
    has_tokenizer: bool
    is_untrained: bool = False
    stage: str = LAST_STAGE
    notes: tuple[str, ...] = ()


def write_card(config: FusionConfig, provenance: Provenance) -> str:
    """Write the whole text of `README.md`."""
    member = None if provenance.is_untrained else find_member(config)
    template = Template(TEMPLATE.read_text(encoding="utf-8"), undefined=StrictUndefined, keep_trailing_newline=True)
    return template.render(
        config=config,
        provenance=provenance,
        member=member,
        metadata=_metadata(provenance, member),
        dtype=dtype_name(provenance.dtype),
        mean_tokens=config.num_image_tokens + sum(config.query_lens) / len(config.query_lens),
        releases=TESTED,
        last_stage=LAST_STAGE,
        benchmarks_per_line=BENCHMARKS_PER_LINE,
        paper=PAPER,
        repository=REPOSITORY,
        datasets=DATASETS,
        hub=HUB,
    )


def _metadata(provenance: Provenance, member: FamilyMember | None) -> str:
    base_models = [member.backbone.repository, member.tower] if member else list(provenance.base_models)
    data = ModelCardData(
        base_model=base_models or None,
        datasets=None if provenance.is_untrained else list(DATASETS),
        language="en",
        library_name="transformers",
        license=member.backbone.licence if member else "other",
        pipeline_tag="image-text-to-text",
        tags=["fusion", "vision-language", *([UNTRAINED_TAG] if provenance.is_untrained else [])],
    )
    return data.to_yaml(line_break="\n").strip()
