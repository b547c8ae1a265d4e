"""From the authors' checkpoint to stage 2: the recorded one is converted and trained by the published recipe."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.helpers.tokenizers import LLAMA3_NAMED
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from tokenizers.pre_tokenizers import ByteLevel

from fusion_hf import FusionForConditionalGeneration, FusionProcessor
from fusion_hf.cli.convert import main as convert
from fusion_hf.training import run as training
from fusion_hf.training.parameter_groups import PARTS, part_of
from fusion_hf.training.recipe import load_recipe

ROOT = Path(__file__).parents[2]
RECORDED = ROOT / "tests" / "fixtures" / "parity" / "llama-siglip2"
BEGIN = "<|begin_of_text|>"


def write_small_tokenizer(folder: Path, size: int) -> None:
    """One token per byte, Llama 3's special tokens, and unused ones up to `size`."""
    alphabet = sorted(ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    unused = [f"<|unused_{number}|>" for number in range(size - len(alphabet) - len(LLAMA3_NAMED))]
    tokenizer.add_special_tokens([*LLAMA3_NAMED, *unused])
    assert tokenizer.get_vocab_size() == size
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, tokenizer.token_to_id(BEGIN))]
    )
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BEGIN, "eos_token": "<|eot_id|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def tokens_of(file: Path) -> dict:
    """The special tokens that a configuration names."""
    content = json.loads(file.read_text())
    content |= content.get("text_config", {})
    return {key: value for key, value in content.items() if key.endswith("token_id")}


@pytest.fixture
def converted(tmp_path: Path) -> Path:
    rows = json.loads((RECORDED / "checkpoint" / "config.json").read_text())["vocab_size"]
    write_small_tokenizer(tmp_path / "tokenizer", rows - 2)  # the two marks come behind it
    arguments = [
        *("--model", str(RECORDED / "checkpoint"), "--vision-config", str(RECORDED / "vision_config.json")),
        *("--tokenizer", str(tmp_path / "tokenizer"), "--output", str(tmp_path / "converted")),
    ]
    assert convert(arguments) == 0
    return tmp_path / "converted"


@pytest.mark.slow
def test_stage_2_starts_from_it(recipe: Path, converted: Path, tmp_path: Path):
    values = load_recipe(
        ROOT / "configs" / "recipes" / "fusion-8b" / "stage2.yaml",
        [
            *(f"model={converted}", f"data={recipe.parent / 'data' / 'records.json'}", "data_root=null"),
            *(f"data_cache={tmp_path / 'cache'}", f"output_dir={tmp_path / 'stage2'}"),
            *("bf16=false", "global_batch_size=4", "max_steps=5", "learning_rate=3e-3", "max_length=2048"),
            *("vision_tower_learning_rate=3e-4", "dataloader_num_workers=0", "disable_tqdm=true"),
        ],
    )
    assert training.run(values)
    log = [json.loads(line) for line in (tmp_path / "stage2" / "log.jsonl").read_text().splitlines()]
    losses = [entry["language_loss"] for entry in log if "language_loss" in entry]
    assert np.isfinite(losses).all() and len(losses) == 5
    assert min(losses[-2:]) < losses[0]
    before = FusionForConditionalGeneration.from_pretrained(converted, dtype=torch.float32).state_dict()
    after = FusionForConditionalGeneration.from_pretrained(tmp_path / "stage2").state_dict()
    changed = {part_of(name) for name, weight in after.items() if not torch.equal(weight, before[name])}
    assert changed == set(PARTS)
    for file in ("config.json", "generation_config.json"):
        assert tokens_of(tmp_path / "stage2" / file) == tokens_of(converted / file)
    assert FusionProcessor.from_pretrained(tmp_path / "stage2").chat_format == "llama3"
