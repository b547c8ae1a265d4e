"""What the Hub files take from transformers is there, and docs/architecture.md has the reason for each of it."""

import ast
import re
from importlib import import_module
from pathlib import Path

import pytest

from fusion_hf.hub.publishing import CODE_FOLDER, CODE_PATTERN
from fusion_hf.model import compatibility_fusion
from fusion_hf.model.image_processing_fusion import FusionImageProcessor
from fusion_hf.model.modeling_fusion import FusionForConditionalGeneration, FusionModel
from fusion_hf.model.modeling_fusion_vision import FusionVisionModel
from fusion_hf.model.processing_fusion import FusionProcessor

HUB_FILES = sorted(CODE_FOLDER.glob(CODE_PATTERN))
DOCUMENT = Path(__file__).parents[2] / "docs" / "architecture.md"
CLASSES = (FusionForConditionalGeneration, FusionModel, FusionVisionModel, FusionImageProcessor, FusionProcessor)
ROW = re.compile(r"^\| `(transformers[\w.]*)` \| (.+?) \| (.+?) \|$", re.MULTILINE)
OVERRIDDEN = re.compile(r"^\| `(_\w+)` \| (.+?) \|$", re.MULTILINE)


def imported() -> set[tuple[str, str]]:
    """Modules and names of transformers in the import statements of all Hub files."""
    found = set()
    for file in HUB_FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            if (
                isinstance(node, ast.ImportFrom)
                and node.level == 0
                and node.module.partition(".")[0] == "transformers"
            ):
                found |= {(node.module, alias.name) for alias in node.names}
            elif isinstance(node, ast.Import):
                found |= {(a.name, "__version__") for a in node.names if a.name.partition(".")[0] == "transformers"}
    return found


def overridden() -> set[str]:
    """Private names of transformers' classes that ours define as well."""
    found = set()
    for cls in CLASSES:
        ours = [base for base in cls.__mro__ if base.__module__.startswith("fusion_hf")]
        theirs = [base for base in cls.__mro__ if base.__module__.startswith("transformers")]
        for name in {name for base in ours for name in vars(base) if re.match("_[a-z]", name)}:
            if name not in GENERATED and any(name in vars(base) for base in theirs):
                found.add(name)
    return found


# set by Python, torch or transformers on each class, not by us
GENERATED = {"_auto_class", "_abc_impl", "_is_stateful"}


def test_every_imported_name_has_its_reason_in_the_document() -> None:
    listed = {
        (module, name)
        for module, names, reason in ROW.findall(DOCUMENT.read_text())
        for name in re.findall(r"`(\w+)`", names)
    }
    assert listed == imported()


def test_every_overridden_private_name_has_its_reason_in_the_document() -> None:
    listed = {name for name, reason in OVERRIDDEN.findall(DOCUMENT.read_text())}
    assert listed == overridden()


@pytest.mark.parametrize(("module", "name"), sorted(imported()))
def test_every_imported_name_is_there(module: str, name: str) -> None:
    assert hasattr(import_module(module), name)


def test_no_hub_file_names_a_release_of_its_own() -> None:
    """`compatibility_fusion.py` alone knows about releases."""
    for file in HUB_FILES:
        if file.name != f"{compatibility_fusion.__name__.rpartition('.')[2]}.py":
            assert not re.search(r"__version__|packaging|hasattr\(transformers", file.read_text()), file.name
