"""A converted folder works by itself: no package, no network, and its model card tells the truth."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from tests.helpers.checkpoints import write_checkpoint
from tests.helpers.tokenizers import write_phi3_tokenizer

from fusion_hf import FusionConfig
from fusion_hf.conversion.model_card import Provenance, write_card
from fusion_hf.hub.family import DATASETS, MEMBERS, find_member, is_of_authors
from fusion_hf.hub.publishing import check_alone, check_files

CONFIGS = Path(__file__).parents[2] / "configs" / "models"
FAMILY_FILES = {"FUSION 3B": "fusion-3b", "FUSION-X 3B": "fusion-x-3b", "FUSION-L 3B": "fusion-l-3b"}
FAMILY_FILES |= {name.replace("3B", "8B"): file.replace("3b", "8b") for name, file in FAMILY_FILES.items()}
# What a stranger's process does: the auto classes, then the snippets of the card.
STRANGER = """
import re, sys
from pathlib import Path
sys.modules["fusion_hf"] = None  # even if it is installed here
folder, torchvision_free = sys.argv[1], sys.argv[2] == "True"

import transformers
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

classes = [AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor]
if torchvision_free:
    classes.append(transformers.AutoImageProcessor)
for auto_class in classes:
    loaded = auto_class.from_pretrained(folder, trust_remote_code=True)
    assert type(loaded).__module__.startswith("transformers_modules."), type(loaded)
assert len(AutoTokenizer.from_pretrained(folder)) == 32015

card = Path(folder, "README.md").read_text()
for number, snippet in enumerate(re.findall(r"```python\\n(.*?)```", card, re.DOTALL)):
    print("snippet", number)
    exec(snippet, {})
"""


def run_stranger(folder: Path) -> subprocess.CompletedProcess[str]:
    Image.new("RGB", (90, 60), "red").save(folder.parent / "image.jpg")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder.parent / "home"), "OMP_NUM_THREADS": "1"}
    # 5.17 hides AutoImageProcessor where torchvision is missing
    import transformers

    has_image_processor = tuple(map(int, transformers.__version__.split(".")[:2])) > (5, 17)
    arguments = [sys.executable, "-c", STRANGER, folder.name, str(has_image_processor)]
    return subprocess.run(arguments, cwd=folder.parent, env=environment, capture_output=True, text=True)


def test_stranger(tmp_path, convert):
    write_checkpoint(tmp_path / "checkpoint", vocab_size=32_013)
    write_phi3_tokenizer(tmp_path / "checkpoint")
    output = convert("--dtype", "bfloat16")
    result = run_stranger(output)
    assert result.returncode == 0, result.stderr
    assert "snippet 1" in result.stdout


@pytest.mark.slow
def test_it_can_be_published(tmp_path, convert):
    write_checkpoint(tmp_path / "checkpoint", vocab_size=32_013)
    write_phi3_tokenizer(tmp_path / "checkpoint")
    output = convert("--dtype", "bfloat16")
    check_alone(output)
    assert sorted(file.name for file in check_files(output)) == sorted(path.name for path in output.iterdir())


def test_card_of_a_checkpoint(tmp_path, convert):
    write_checkpoint(tmp_path / "checkpoint")
    card = ModelCard.load(convert() / "README.md")
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "image-text-to-text"
    assert card.data.datasets is None and card.data.language == "en"  # it is none of the authors' checkpoints
    assert (card.data.license, card.data.license_name) == ("other", "unknown")
    assert {"fusion", "visual-question-answering", "custom_code"} <= set(card.data.tags)
    assert "## Limits" in card.text
    assert "No figures are published for these weights" in card.text
    assert "SHA-256 of `config.json` begins with" in card.text


def make_card(name: str, **changes) -> ModelCard:
    config = FusionConfig.from_pretrained(CONFIGS / f"{FAMILY_FILES[name]}.json")
    provenance = {
        "title": "model",
        "model_id": "owner/model",
        "sources": (("checkpoint", "`authors/model`, revision `abc`"),),
        "base_models": (),
        "dtype": torch.bfloat16,
        "num_parameters": 5,
        "has_tokenizer": True,
        "is_authors": not changes.get("is_untrained"),
    }
    return ModelCard(write_card(config, Provenance(**provenance | changes)))


@pytest.mark.parametrize("member", MEMBERS, ids=lambda member: member.name)
def test_card_of_a_published_size(member):
    config = FusionConfig.from_pretrained(CONFIGS / f"{FAMILY_FILES[member.name]}.json")
    assert find_member(config) == member
    card = make_card(member.name)
    assert card.data.base_model == [member.backbone.repository, member.tower]
    licence = member.backbone.licence
    assert (card.data.license, card.data.license_name) == (licence.identifier, licence.name)
    assert card.data.license_link == licence.link and licence.link in card.text
    assert card.data.datasets == list(DATASETS)
    assert licence.note in card.text and "authors/model" in card.text
    for column, score in member.row.values.items():
        name = column.replace("^", "-")  # MME^P has another name on a card
        assert re.search(rf"\| {re.escape(name)} \|", card.text) and f" {score} |" in card.text
    total = config.num_image_tokens + sum(config.query_lens) / len(config.query_lens)
    assert f"{total:.1f} (published as {member.row.vision_tokens})" in card.text


def test_published_scores_are_complete():
    assert all(len(member.row.values) == 23 and None not in member.row.values.values() for member in MEMBERS)
    assert MEMBERS[0].row.values["MMB_EN"] == 79.5 and MEMBERS[0].row.values["DocVQA"] == 70.9
    assert MEMBERS[4].row.values["MMB_EN"] == 82.0 and MEMBERS[4].row.values["DocVQA"] == 77.8


@pytest.mark.parametrize("changes", [{"stage": "Stage1"}, {"is_untrained": True}, {"is_authors": False}])
def test_card_makes_no_claims_for_other_weights(changes):
    assert "79.5" not in make_card("FUSION 3B", **changes).text


@pytest.mark.parametrize("changes", [{"is_untrained": True}, {"is_authors": False}])
def test_other_weights_are_not_of_the_authors_data_or_licence(changes):
    card = make_card("FUSION 8B", **changes, base_models=("somebody/language-model",))
    assert card.data.datasets is None and not any(name in card.text for name in DATASETS)
    assert (card.data.license, card.data.license_name) == ("other", "unknown")
    assert card.data.base_model == ["somebody/language-model"]


@pytest.mark.parametrize(("name", "licence"), [("FUSION 3B", "mit"), ("FUSION 8B", "llama3.1")])
def test_a_known_language_model_gives_its_licence(name, licence):
    (member,) = (each for each in MEMBERS if each.name == name)
    card = make_card(name, is_untrained=True, base_models=(member.backbone.repository, member.tower))
    assert (card.data.license, card.data.license_name) == (licence, licence)
    assert card.data.license_link.startswith("https://huggingface.co/")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("starriver030515/FUSION-Phi3.5-3B", True),
        ("starriver030515/FUSION-Phi3.5-3B-Stage1", True),
        ("FUSION-Phi3.5-3B", True),
        ("somebody/FUSION-Phi3.5-3B", False),
        ("my-checkpoint", False),
    ],
)
def test_whose_weights_the_name_tells(source, expected):
    assert is_of_authors(source, MEMBERS[0]) == expected
    assert not is_of_authors(source, None)


def test_stage_in_the_source_name(tmp_path, convert):
    write_checkpoint(tmp_path / "checkpoint")
    (tmp_path / "checkpoint").rename(tmp_path / "FUSION-Phi3.5-3B-Stage1.5")
    output = convert("--model", str(tmp_path / "FUSION-Phi3.5-3B-Stage1.5"))
    assert "FUSION-Phi3.5-3B-Stage1.5" in (output / "README.md").read_text()


def test_revision_of_a_download(tmp_path, convert):
    """huggingface_hub leaves the commit beside a folder that it downloaded."""
    write_checkpoint(tmp_path / "checkpoint")
    trace = tmp_path / "checkpoint" / ".cache" / "huggingface" / "download" / "config.json.metadata"
    trace.parent.mkdir(parents=True)
    trace.write_text("0123456789abcdef0123456789abcdef01234567\netag\n1.0\n")
    assert "revision `0123456789abcdef0123456789abcdef01234567`" in (convert() / "README.md").read_text()


def test_no_file_names_the_machine(tmp_path, convert):
    write_checkpoint(tmp_path / "checkpoint")
    for file in convert().iterdir():
        if file.suffix in (".json", ".md"):
            assert str(tmp_path) not in file.read_text(), file.name
            assert not re.search(r"20\d\d-\d\d-\d\d", file.read_text()), file.name
            if file.suffix == ".json":
                json.loads(file.read_text())
