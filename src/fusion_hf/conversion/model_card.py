"""The model card, `README.md` of a Hub folder. Equal inputs give equal texts, without a date and without a path."""

from dataclasses import dataclass
from pathlib import Path

import torch

from fusion_hf.common.user_values import dtype_name
from fusion_hf.hub.family import (
    BACKBONES,
    DATASETS,
    LAST_STAGE,
    PAPER,
    REPOSITORY,
    FamilyMember,
    Licence,
    find_member,
)
from fusion_hf.hub.model_cards import HUB, card_metadata, render_card
from fusion_hf.model.compatibility_fusion import TESTED
from fusion_hf.model.configuration_fusion import FusionConfig

UNTRAINED_TAG = "untrained"
BENCHMARKS_PER_LINE = 12
TEMPLATE = Path(__file__).with_name("model_card.jinja")


@dataclass(frozen=True)
class Provenance:
    """
    Origin of a model folder.

    Attributes:
        title: Name of the new model.
        model_id: Name that the usage snippets load.
        sources: Roles, with names and revisions of what was used, such as `("checkpoint", "owner/name at commit
            abc")`.
        base_models: Repositories that the Hub should link, if they are known.
        dtype: Dtype of the weights.
        num_parameters: Number of parameters of the model.
        has_tokenizer: Whether the folder can answer questions.
        is_untrained: Whether FUSION's own parts are randomly initialized.
        is_authors: Whether the weights are those of a checkpoint that the authors published.
        stage: Training stage of the authors in the name of the source, if it is not the last.
        notes: Further sentences about the conversion.
    """

    title: str
    model_id: str
    sources: tuple[tuple[str, str], ...]
    base_models: tuple[str, ...]
    dtype: torch.dtype
    num_parameters: int
    has_tokenizer: bool
    is_untrained: bool = False
    is_authors: bool = False
    stage: str = LAST_STAGE
    notes: tuple[str, ...] = ()


def write_card(config: FusionConfig, provenance: Provenance) -> str:
    """
    Write the text of `README.md`.

    Args:
        config: Configuration of the model.
        provenance: Origin of the model folder.

    Returns:
        The text.
    """
    member = None if provenance.is_untrained else find_member(config)
    licence = find_licence(provenance, member)
    base_models = find_base_models(provenance, member)
    return render_card(
        TEMPLATE,
        config=config,
        provenance=provenance,
        member=member,
        metadata=card_metadata(
            licence,
            base_models,
            DATASETS if provenance.is_authors else (),
            [UNTRAINED_TAG] if provenance.is_untrained else [],
        ),
        licence=licence,
        base_models=base_models,
        has_tokenizer=provenance.has_tokenizer,
        model_id=provenance.model_id,
        query_lens=config.query_lens,
        side=config.vision_config.image_size,
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


def find_base_models(provenance: Provenance, member: FamilyMember | None) -> list[str]:
    """Return the repositories of the base models: the published ones for the authors' models, else as named."""
    if member is not None and provenance.is_authors:
        return [member.backbone.repository, member.tower]
    return list(provenance.base_models)


def find_licence(provenance: Provenance, member: FamilyMember | None) -> Licence | None:
    """
    Find the licence of a model.

    The authors' weights have the authors' licence. Other models have the licence of their language model, if it is
    known, because derived models may not be freer.

    Args:
        provenance: Origin of the model folder.
        member: Published model with the same sizes.

    Returns:
        The licence, or None if only the person who trained the weights knows it.
    """
    if member is not None and provenance.is_authors:
        return member.backbone.licence
    named = (each.own_licence for each in BACKBONES if each.repository in provenance.base_models)
    return next(named, None)
