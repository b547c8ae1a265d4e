"""The four parts of a FUSION model that can be frozen, trained, and given their own learning rates."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from transformers.integrations import is_deepspeed_zero3_enabled

from fusion_hf.training.recipe_keys import LANGUAGE_MODEL, PARTS, PROJECTORS, SAMPLERS, VISION_TOWER

# Wrappers (PEFT, DDP, compilation) add prefixes to names. Samplers lie inside layers of the language model, so
# everything that matches no other part belongs to the language model.
MODULES_OF_PART = {
    VISION_TOWER: ("vision_tower",),
    PROJECTORS: ("vision_projector", "vision_projector_back"),
    SAMPLERS: ("vision_sampler",),
}


def part_of(name: str) -> str:
    """
    Return the part that a parameter belongs to.

    Args:
        name: the name of the parameter, possibly with prefixes of wrappers.

    Returns:
        One of `PARTS`.
    """
    modules = set(name.split(".")[:-1])
    return next((part for part, own in MODULES_OF_PART.items() if modules.intersection(own)), LANGUAGE_MODEL)


def freeze_except(model: nn.Module, trained: Sequence[str]) -> None:
    """
    Freeze all parameters except those of the given parts.

    Args:
        model: the model, changed in place.
        trained: the parts to train.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) in trained)


def parameter_groups(
    parameters: Iterable[tuple[str, nn.Parameter]],
    learning_rates: Mapping[str, float],
    weight_decay: float,
    decayed: set[str],
) -> list[dict[str, Any]]:
    """
    Make the parameter groups of an optimizer: two for each part, with and without weight decay.

    Args:
        parameters: pairs of name and parameter. Frozen ones are left out.
        learning_rates: the learning rate of each part.
        weight_decay: the weight decay of the parameters in `decayed`.
        decayed: the names of the parameters with weight decay.

    Returns:
        The groups that are not empty.
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
    """
    Count the parameters of each part of a model.

    Args:
        model: the model.
        trained_only: whether to count only parameters that require a gradient.

    Returns:
        The number of parameters by part.
    """
    counts, partitioned = dict.fromkeys(PARTS, 0), is_deepspeed_zero3_enabled()
    for name, parameter in model.named_parameters():  # a tied parameter is listed once
        if parameter.requires_grad or not trained_only:
            # ZeRO-3 replaces a parameter by an empty tensor
            counts[part_of(name)] += parameter.ds_numel if partitioned else parameter.numel()  # type: ignore[attr-defined]
    return counts
