"""What the cards of all model folders share: their metadata, licences, how a model is used and what its limits are."""

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
# of a model whose trainer is the only one who knows: the Hub's identifier, and the name that it asks for with it
OTHER_LICENCE, UNKNOWN_LICENCE = "other", "unknown"


def render_card(template: Path, **values: Any) -> str:
    """
    Fill a card's template, which may include the shared parts beside this file.

    Args:
        template: the file.
        values: all that it names; one that is missing is an error.
    """
    loader = FileSystemLoader([template.parent, Path(__file__).parent])
    # the card is Markdown, and no page
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
    Write the metadata of a card as YAML.

    Args:
        licence: None: unknown here.
        base_models, datasets: of the Hub.
        tags: beside those that all cards have.
        fields: further ones.
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
    """The metadata of a folder's card; nothing if it has none that can be read."""
    path = folder / CARD
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            return {}
        return ModelCard(path.read_text(encoding="utf-8")).data.to_dict()
    except (OSError, ValueError, TypeError, YAMLError):
        return {}


def licence_of_card(metadata: dict[str, Any]) -> Licence | None:
    """The licence that a card names, if it names one."""
    identifier, name, link = (metadata.get(key) for key in ("license", "license_name", "license_link"))
    if not isinstance(identifier, str) or name == UNKNOWN_LICENCE:
        return None
    return Licence(identifier, name if isinstance(name, str) else identifier, link if isinstance(link, str) else None)
