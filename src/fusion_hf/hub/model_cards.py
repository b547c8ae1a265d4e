"""Common parts of all model cards: metadata, licences, usage and limitations."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from yaml import YAMLError

from fusion_hf.hub.family import Licence
from fusion_hf.hub.folders import MAX_CONFIG_BYTES

CARD = "README.md"
USAGE = Path(__file__).with_name("model_usage.jinja")
HUB = "https://huggingface.co/"
LIBRARY, TASK = "transformers", "image-text-to-text"
TAGS = ("fusion", "vision-language", "visual-question-answering", "custom_code")
# licence of a model that only its trainer knows: the Hub's identifier, and the name that goes with it
OTHER_LICENCE, UNKNOWN_LICENCE = "other", "unknown"


def render_card(template: Path, **values: Any) -> str:
    """
    Render the template of a card, which may include the shared parts beside this file.

    Args:
        template: Path of the template.
        values: Values for all variables of the template. A missing one is an error.

    Returns:
        The text of the card.
    """
    loader = FileSystemLoader([template.parent, Path(__file__).parent])
    # a card is Markdown, not HTML
    environment = Environment(loader=loader, undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False)
    return environment.get_template(template.name).render(**values)


def card_metadata(
    licence: Licence | None,
    base_models: Sequence[str] = (),
    datasets: Sequence[str] = (),
    tags: Sequence[str] = (),
    **fields: Any,
) -> str:
    """
    Create the metadata of a card as YAML.

    Args:
        licence: Licence of the model, or None if it is unknown.
        base_models, datasets: Repositories on the Hub.
        tags: Tags besides those of all cards.
        fields: Further fields.

    Returns:
        The YAML text.
    """
    data = ModelCardData(
        base_model=list(base_models) or None,
        datasets=list(datasets) or None,
        language="en",
        library_name=LIBRARY,
        license=OTHER_LICENCE if licence is None else licence.identifier,
        license_name=UNKNOWN_LICENCE if licence is None else licence.name,
        license_link=None if licence is None else licence.link,
        pipeline_tag=TASK,
        tags=[*TAGS, *tags],
        **fields,
    )
    return data.to_yaml(line_break="\n").strip()


def read_card_metadata(folder: Path) -> dict[str, Any]:
    """Read the metadata of a folder's card. Return an empty dict if there is none that can be read."""
    path = folder / CARD
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            return {}
        return ModelCard(path.read_text(encoding="utf-8")).data.to_dict()
    except (OSError, ValueError, TypeError, YAMLError):
        return {}


def licence_of_card(metadata: dict[str, Any]) -> Licence | None:
    """Return the licence that the metadata of a card names, or None."""
    identifier, name, link = (metadata.get(key) for key in ("license", "license_name", "license_link"))
    if not isinstance(identifier, str) or name == UNKNOWN_LICENCE:
        return None
    return Licence(identifier, name if isinstance(name, str) else identifier, link if isinstance(link, str) else None)
