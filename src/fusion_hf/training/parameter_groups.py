"""The four parts of a FUSION that are frozen, trained and given learning rates apart."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from transformers.integrations import is_deepspeed_zero3_enabled

from fusion_hf.training.recipe_keys import LANGUAGE_MODEL, PARTS, PROJECTORS, SAMPLERS, VISION_TOWER

# Wrappers (PEFT, DDP, compilation) put names in front. A sampler lies inside a layer of the language model, whose
# part is whatever is left.
MODULES_OF_PART = {
    VISION_TOWER: ("vision_tower",),
    PROJECTORS: ("vision_projector", "vision_projector_back"),
    SAMPLERS: ("vision_sampler",),
}


def part_of(name: str) -> str:
    """Name the part that a parameter belongs to."""
    modules = set(name.split(".")[:-1])
    return next((part for part, own in MODULES_OF_PART.items() if modules.intersection(own)), LANGUAGE_MODEL)


def freeze_except(model: nn.Module, trained: Sequence[str]) -> None:
    """Let only the parameters of `trained` parts require gradients."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) in trained)


def parameter_groups(
    parameters: Iterable[tuple[str, nn.Parameter]],
    learning_rates: Mapping[str, float],
    weight_decay: float,
    decayed: set[str],
) -> list[dict[str, Any]]:
    """
    Make one group of an optimizer per part, and per part one without weight decay.

    Args:
        parameters: names and parameters; frozen ones are left out.
        learning_rates: of each part.
        decayed: names of the parameters that decay.
    """
    groups: dict[tuple[str, bool], dict[str, Any]] = {}
    for name, parameter in parameters:
        if not parameter.requires_grad:
            continue
        part, decays = part_of(name), name in decayed
        group = groups.setdefault(
            (part, decays),
            {"params": [], "lr": learning_rates[part], "weight_decay": weight_decay if decays else 0.0, "part": part},
        )
        group["params"].append(parameter)
    return list(groups.values())


def count_by_part(model: nn.Module, trained_only: bool = False) -> dict[str, int]:
    """Count the parameters of each part."""
    counts, partitioned = dict.fromkeys(PARTS, 0), is_deepspeed_zero3_enabled()
    for name, parameter in model.named_parameters():  # a tied parameter comes once
        if parameter.requires_grad or not trained_only:
            # ZeRO-3 leaves an empty tensor in place of a parameter
            counts[part_of(name)] += parameter.ds_numel if partitioned else parameter.numel()  # type: ignore[attr-defined]
    return counts
