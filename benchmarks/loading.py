"""Compare the data loader of training with what none can avoid: decoding each image and resizing it twice."""

import json
import time
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

from measure import paired_ratios, turned
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from workload import SEED, TrainingSize, make_photo

from fusion_hf import FusionConfig, FusionImageProcessor, FusionProcessor, nano_path
from fusion_hf.data import load_records
from fusion_hf.model.configuration_fusion import TILES_PER_SIDE
from fusion_hf.training import FusionDataCollator
from fusion_hf.training.sampler import StepLayout, StepSampler

WORKERS = (1, 2)
JPEG_QUALITY = 90
MAX_LENGTH = 2048  # as in stage 1
QUESTION, ANSWER = "what color is the shape on the left of the circle?", "the shape on the left of it is red."
TOKEN_IDS = ("image_token_id", "latent_token_id", "vision_start_token_id", "vision_end_token_id")


def write_records(folder: Path, size: TrainingSize, count: int) -> Path:
    """Write a JSON file of conversations, each with a JPEG of its own."""
    content = make_photo(size.image)
    records: list[dict[str, Any]] = []
    for number in range(count):
        name = f"{number}.jpg"
        content.save(folder / name, quality=JPEG_QUALITY)
        turns = [turn for _ in range(size.turns) for turn in (("human", QUESTION), ("gpt", ANSWER))]
        conversation = [{"from": speaker, "value": text} for speaker, text in turns]
        records.append({"id": name, "image": name, "conversations": conversation})
    path = folder / "records.json"
    path.write_text(json.dumps(records))
    return path


def make_processor(config: FusionConfig) -> FusionProcessor:
    """
    Make a processor for the images of `config` with the tokenizer of `fusion-nano`, and set the token ids in
    `config`.
    """
    nano = FusionProcessor.from_pretrained(nano_path())
    tokenizer = nano.tokenizer
    tokenizer.model_max_length = MAX_LENGTH
    ids = tokenizer.convert_tokens_to_ids(["<image>", "<latent_image>", "<vision_start>", "<vision_end>"])
    for name, token_id in zip(TOKEN_IDS, ids, strict=True):
        setattr(config, name, token_id)
    config.instruct_pad_token_id = tokenizer.pad_token_id
    side = config.vision_config.image_size
    return FusionProcessor(
        FusionImageProcessor(size={"height": side, "width": side}),
        tokenizer,
        chat_format=nano.chat_format,
        num_image_tokens=config.num_image_tokens,
        query_len=config.query_len,
        instruct_pad_token_id=tokenizer.pad_token_id,
    )


class PlainImages(Dataset):
    """Decode a JPEG with PIL and resize it for the tiles and for the overview, without returning the result."""

    def __init__(self, folder: Path, count: int, side: int):
        self.paths = [folder / f"{number}.jpg" for number in range(count)]
        self.side = side

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> int:
        with Image.open(self.paths[index]) as image:
            for target in (TILES_PER_SIDE * self.side, self.side):
                image.resize((target, target), Image.Resampling.BICUBIC)
        return index


class LoaderBenchmark:
    """Loaders of the same images with running workers, and all measurements so far."""

    def __init__(self, size: TrainingSize, folder: Path, workers: tuple[int, ...]):
        self.records, self.workers = size.records, workers
        config = size.config()
        processor = make_processor(config)
        ours = load_records(write_records(folder, size, size.records), cache=folder / "cache")
        layout = StepLayout(size.loaded)
        sampler = StepSampler(size.records, layout, [size.query_len], SEED, lengths=ours.lengths)
        collator = FusionDataCollator(processor, [size.query_len], MAX_LENGTH, compact=True)
        plain = PlainImages(folder, size.records, config.vision_config.image_size)
        self.loaders: dict[str, DataLoader] = {}
        for number in workers:
            settings: dict[str, Any] = {
                "batch_size": size.loaded,
                "num_workers": number,
                "persistent_workers": True,
            }
            self.loaders[f"ours_{number}"] = DataLoader(ours, sampler=sampler, collate_fn=collator, **settings)
            self.loaders[f"plain_{number}"] = DataLoader(plain, **settings)
        self.measured: dict[str, list[float]] = defaultdict(list)

    def time_round(self, index: int) -> None:
        """Let each loader read the records once."""
        for name in turned(list(self.loaders), index):
            begin = time.perf_counter()
            for _ in self.loaders[name]:
                pass
            self.measured[name].append(self.records / (time.perf_counter() - begin))

    def result(self) -> dict[str, Any]:
        """
        Return records per second, and the ratio of FUSION's loader to the plain one with as many workers, paired
        by round.
        """
        ratios = {
            str(number): paired_ratios(self.measured[f"ours_{number}"], self.measured[f"plain_{number}"])
            for number in self.workers
        }
        return {
            "ratios": ratios,
            "medians": {name: median(values) for name, values in self.measured.items()},
            "rounds": dict(self.measured),
        }
