"""Files of a Hub folder besides its weights: configurations, processor, code, and model card."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerFast
from transformers.utils import GENERATION_CONFIG_NAME

from fusion_hf.conversion.marked_tokenizer import find_chat_format
from fusion_hf.conversion.model_files import read_json
from fusion_hf.hub.publishing import CODE_FOLDER, CODE_PATTERN
from fusion_hf.model.configuration_fusion import AUTO_MAP, FusionConfig
from fusion_hf.model.image_processing_fusion import FusionImageProcessor
from fusion_hf.model.processing_fusion import FusionProcessor
from fusion_hf.model.turns_fusion import describe_turns

AUTO_MAPS = {
    "config.json": AUTO_MAP,
    "preprocessor_config.json": {"AutoImageProcessor": "image_processing_fusion.FusionImageProcessor"},
    "processor_config.json": {
        "AutoImageProcessor": "image_processing_fusion.FusionImageProcessor",
        "AutoProcessor": "processing_fusion.FusionProcessor",
    },
}
# Tokens that end an answer, by chat format; and their ids in the published checkpoints, for use without a tokenizer.
STOP_TOKENS = {
    "phi3": ("<|end|>", "<|assistant|>", "<|endoftext|>"),
    "llama3": ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
    "chatml": ("<|im_end|>", "<|endoftext|>"),
}
PUBLISHED_STOP_IDS = {("phi3", 32_013): (32_007, 32_001, 32_000), ("llama", 128_258): (128_001, 128_008, 128_009)}


def set_dtype(config: FusionConfig, dtype: torch.dtype) -> None:
    """Set the dtype of the weights in a configuration and in both of its sub-configurations."""
    for part in (config, config.text_config, config.vision_config):
        part.dtype = dtype


def make_generation_config(
    config: FusionConfig, tokenizer: PreTrainedTokenizerFast | None, source: dict[str, Any]
) -> GenerationConfig:
    """
    Create a generation configuration: greedy decoding that stops at end tokens and never generates FUSION's tokens.

    Args:
        config: Configuration of the new model.
        tokenizer: Tokenizer that knows the end tokens. Without it, the published ids or the backbone's own are used.
        source: Content of the checkpoint's `generation_config.json`, which may be empty.
    """
    text = config.text_config
    ends = _as_list(source.get("eos_token_id")) or _as_list(text.eos_token_id)
    if tokenizer is not None:
        names = STOP_TOKENS[find_chat_format(tokenizer.backend_tokenizer)]
        ends += [i for i in map(tokenizer.backend_tokenizer.token_to_id, names) if i is not None]
    else:
        ends += PUBLISHED_STOP_IDS.get((text.model_type, text.vocab_size), ())
    stops = sorted({end for end in ends if isinstance(end, int) and 0 <= end < text.vocab_size})
    return GenerationConfig(
        bos_token_id=text.bos_token_id,
        eos_token_id=stops,
        pad_token_id=text.pad_token_id,
        suppress_tokens=[
            config.vision_start_token_id,
            config.vision_end_token_id,
            config.image_token_id,
            config.latent_token_id,
        ],
        do_sample=False,
    )


def read_generation_config(folder: Path) -> dict[str, Any]:
    """
    Read the content of a folder's `generation_config.json`.

    Args:
        folder: Folder of a checkpoint or a language model.

    Returns:
        The content, or an empty dict if there is no such file.

    Raises:
        ConversionError: If the file cannot be read.
    """
    path = folder / GENERATION_CONFIG_NAME
    return read_json(path) if path.is_file() else {}


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list) else [] if value is None else [value]


def make_processor(
    config: FusionConfig, tokenizer: PreTrainedTokenizerFast | None
) -> FusionProcessor | FusionImageProcessor:
    """Create the processor, or only the image processor if there is no tokenizer."""
    side = config.vision_config.image_size
    image_processor = FusionImageProcessor(size={"height": side, "width": side})
    if tokenizer is None:
        return image_processor
    return FusionProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        chat_format=find_chat_format(tokenizer.backend_tokenizer),
        num_image_tokens=config.num_image_tokens,
        query_len=config.query_len,
        instruct_pad_token_id=config.instruct_pad_token_id,
    )


def write_files(
    folder: Path,
    config: FusionConfig,
    processor: FusionProcessor | FusionImageProcessor,
    generation_config: GenerationConfig,
    card: str,
) -> None:
    """
    Write all files of a Hub folder except the weights.

    Args:
        folder: The folder.
        config: Configuration of the model.
        processor: Its processor.
        generation_config: Its generation configuration.
        card: Text of the model card.
    """
    if isinstance(processor, FusionProcessor):
        config.update(describe_turns(processor))
    config.save_pretrained(folder)
    generation_config.save_pretrained(folder)
    processor.save_pretrained(folder)
    if isinstance(processor, FusionProcessor):
        processor.image_processor.save_pretrained(folder)
    for name, auto_map in AUTO_MAPS.items():
        if (folder / name).exists():
            content = json.loads((folder / name).read_text(encoding="utf-8")) | {"auto_map": auto_map}
            (folder / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for file in sorted(CODE_FOLDER.glob(CODE_PATTERN)):
        shutil.copyfile(file, folder / file.name)
    (folder / "README.md").write_text(card, encoding="utf-8")
