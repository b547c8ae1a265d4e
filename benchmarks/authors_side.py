"""The authors' side of `authors.py`, which the Python of their environment runs; see `authors_timing`."""

import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from authors_timing import Clock, serve
from PIL import Image
from safetensors.torch import load_file
from torch.nn.utils.rnn import pad_sequence


def load_worker(path: str) -> ModuleType:
    """Load `fusion_hf.verification.authors_worker` without the package, which their environment lacks."""
    spec = importlib.util.spec_from_file_location("authors_worker", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look up their module here
    spec.loader.exec_module(module)
    return module


class AuthorsSide:
    """
    Call the authors' classes as their `run_fusion.py` does: with a KV cache, SDPA where they use it, and no
    gradients.
    """

    def __init__(self, job: dict[str, Any]):
        self.worker = load_worker(job["worker"])
        self.job = job
        sys.path[0] = job["code"]  # replaces this folder, whose modules are not theirs
        self.loaded = self.worker.load(job)
        self.model = self.loaded.model
        self.utils = importlib.import_module("fusion.mm_utils")

    def preprocess(self, path: str) -> Callable[[], Any]:
        image = Image.open(path).convert("RGB")
        processor = self.model.get_vision_tower().image_processor
        return lambda: self.utils.process_images([image], processor, self.model.config)

    def prepare(self, path: str, question: str) -> Any:
        return self.worker.make_prompt(self.loaded, path, question)

    @torch.inference_mode()
    def generate(self, prompt: Any, tokens: int, clock: Clock | None) -> list[int]:
        output = self.model.generate(
            prompt.input_ids,
            images=prompt.images.to(self.model.dtype),
            instructs=prompt.instructs,
            do_sample=False,
            max_new_tokens=tokens,
            use_cache=True,
            streamer=clock,
        )
        return output[0, -tokens:].tolist()

    def answer(self, paths: list[str], questions: list[str], tokens: int) -> list[str]:
        """Answer questions one by one, since `run_fusion.py` has batches of one."""
        answers = []
        for path, question in zip(paths, questions, strict=True):
            ids = self.generate(self.prepare(path, question), tokens, None)
            answers.append(self.loaded.tokenizer.decode(ids, skip_special_tokens=True).strip())
        return answers

    def answer_each(self, path: str, questions: list[str], tokens: int) -> list[str]:
        return self.answer([path] * len(questions), questions, tokens)

    def train(self) -> None:
        """
        Prepare training as their `train.py` does after the first stage. Their tower class freezes the tower when
        it loads it.
        """
        self.model.train().requires_grad_(True)
        self.model.gradient_checkpointing_enable({"use_reentrant": False})

    def read_batch(self, path: str) -> dict[str, Any]:
        """
        Return rows with a mark for each block of image or latent tokens, and one on the last id of each turn's
        prompt.
        """
        constants = importlib.import_module("fusion.constants")
        marks = {
            self.job["image_token_id"]: constants.IMAGE_TOKEN_INDEX,
            self.job["latent_token_id"]: constants.LATENT_IMAGE_TOKEN_INDEX,
        }
        batch = load_file(path)
        rows, labels = [], []
        for ids, own_labels, is_token, ends in zip(
            batch["input_ids"].tolist(),
            batch["labels"],
            batch["attention_mask"].tolist(),
            batch["prompt_end_positions"],
            strict=True,
        ):
            own_labels[ends[ends >= 0]] = constants.INSTRUCT_INDEX
            # the first id of a block
            kept = [
                place
                for place, number in enumerate(ids)
                if is_token[place] and not (number in marks and place > 0 and ids[place - 1] == number)
            ]
            rows.append(torch.tensor([marks.get(ids[place], ids[place]) for place in kept]))
            labels.append(own_labels[kept])
        input_ids = pad_sequence(rows, batch_first=True)
        lengths = torch.tensor([len(row) for row in rows])
        return {
            "input_ids": input_ids,
            "labels": pad_sequence(labels, batch_first=True, padding_value=constants.IGNORE_INDEX),
            "attention_mask": torch.arange(input_ids.shape[1]) < lengths[:, None],
            "images": batch["pixel_values"],
            "instructs": batch["instruct_input_ids"] * batch["instruct_attention_mask"],
        }

    def loss(self, batch: dict[str, Any]) -> torch.Tensor:
        return self.model(**batch, use_cache=False).loss


if __name__ == "__main__":
    serve(AuthorsSide)
