"""The authors' model in a separate process, which records its results for images and questions stage by stage.

`python authors_worker.py JOB.json` runs with the Python of the authors' environment, with their repository on its
path. Therefore this file imports nothing of the package, and the package contains nothing of theirs. Job and report
are JSON, tensors are safetensors. `load`, `make_prompt` and `generate` are also used to measure their code.

The authors' code is written for CUDA and float16. Each workaround has a comment.
"""

from __future__ import annotations

import importlib
import json
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

NUM_TILES = 4
OVERVIEW, TILES = "overview", "tiles"
# model types whose tokenizer the authors' scripts read with the slow class, and their conversation templates
SLOW_TOKENIZERS = ("fusion_phi", "fusion_llama")
CONVERSATIONS = {
    "fusion_phi": "phi_3",
    "fusion_llama": "llama_3",
    "fusion_qwen": "qwen_2",
    "fusion_mistral": "mistral_instruct",
}


class Recorder:
    """
    Records the results of modules while one prompt is processed, the first value for each name.

    Both sides of a comparison use it. Later steps call modules again with one token, and their values are ignored.
    Tiles are distinguished from the overview by their number.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self._handles: list[Any] = []

    def keep(self, name: str, tensor: torch.Tensor) -> None:
        """
        Keep a tensor, without a batch dimension of one.

        Args:
            name: Name of the tensor. `{image}` is replaced by `tiles` or `overview`.
            tensor: The tensor.
        """
        name = name.format(image=TILES if tensor.shape[0] == NUM_TILES else OVERVIEW)
        if name not in self.tensors:
            kept = tensor.detach().squeeze(0) if tensor.shape[0] == 1 else tensor.detach()
            self.tensors[name] = kept.to("cpu", copy=True).contiguous()

    def watch_output(
        self, module: nn.Module, name: str, choose: Callable[[Any, Any], torch.Tensor] | None = None
    ) -> None:
        """Record the output of a module, or what `choose` computes from its arguments and output."""

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            self.keep(name, first if choose is None else choose(args, output))

        self._handles.append(module.register_forward_hook(hook))

    def watch_input(
        self, module: nn.Module, name: str, choose: Callable[[Any], torch.Tensor] = lambda args: args[0]
    ) -> None:
        """Record what `choose` takes from the positional arguments of a module."""

        def hook(module: nn.Module, args: Any) -> None:
            self.keep(name, choose(args))

        self._handles.append(module.register_forward_pre_hook(hook))

    def watch_layers(self, layers: nn.ModuleList, name: str) -> None:
        """Record the input of the first layer and the output of each layer."""
        self.watch_input(layers[0], f"{name}.embeddings")
        for index, layer in enumerate(layers):
            self.watch_output(layer, f"{name}.layers.{index}")

    def close(self) -> None:
        """Remove all hooks."""
        for handle in self._handles:
            handle.remove()


@dataclass
class Loaded:
    """The authors' model with its tokenizer."""

    model: Any
    tokenizer: Any
    model_type: str


@dataclass
class AuthorsPrompt:
    """Inputs of the authors' model: ids with their marks (1, S), ids of the question (1, T), and tiles."""

    input_ids: torch.Tensor
    instructs: torch.Tensor
    images: torch.Tensor


def load(job: dict[str, Any]) -> Loaded:
    """
    Load the authors' model for inference, with the steps of their `load_pretrained_model`.

    That function always moves the tower to CUDA in float16, whatever device you pass.

    Args:
        job: Job of the worker.
    """
    importlib.import_module("fusion.model")  # registers their classes
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, logging

    logging.set_verbosity_error()
    checkpoint, model_type = job["checkpoint"], job["model_type"]
    slow = {"use_fast": False} if model_type in SLOW_TOKENIZERS else {}
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, **slow)
    config = AutoConfig.from_pretrained(checkpoint)
    # otherwise the tower would be fetched by its name, although its weights are in the checkpoint
    config.mm_vision_tower = job["tower"]
    config.unfreeze_mm_vision_tower = bool(job["has_tower"])
    # their code draws a number for each prompt at random from the training's numbers
    config.query_len = str(job["query_len"])
    model, info = AutoModelForCausalLM.from_pretrained(
        checkpoint, config=config, torch_dtype=getattr(torch, job["weights_dtype"]), output_loading_info=True
    )
    if info["missing_keys"]:
        raise ValueError(
            f"the checkpoint lacks {len(info['missing_keys'])} weights, such as {info['missing_keys'][0]}"
        )
    add_marks(tokenizer, model)
    tower = model.get_vision_tower()
    if not tower.is_loaded:
        tower.load_model()
    model = model.to(device=job["device"], dtype=getattr(torch, job["dtype"])).eval()
    # ignore sampling, penalties and end tokens of the checkpoint, so that a fixed number of tokens is compared
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)
    return Loaded(model, tokenizer, model_type)


def add_marks(tokenizer: Any, model: Any) -> None:
    """Add the special tokens that the checkpoint's tokenizer lacks, as `load_pretrained_model` does."""
    constants = importlib.import_module("fusion.constants")
    if getattr(model.config, "mm_use_im_patch_token", True):
        tokenizer.add_tokens([constants.DEFAULT_IMAGE_PATCH_TOKEN], special_tokens=True)
    if getattr(model.config, "mm_use_im_start_end", False):
        marks = [constants.DEFAULT_IM_START_TOKEN, constants.DEFAULT_IM_END_TOKEN]
        tokenizer.add_tokens(marks, special_tokens=True)
    model.resize_token_embeddings(len(tokenizer))


def make_prompt(loaded: Loaded, image_path: str, question: str) -> AuthorsPrompt:
    """
    Prepare an image and a question as the authors' `run_fusion.py` does, without moving them to CUDA in float16.

    Args:
        loaded: The authors' model.
        image_path: Path of the image.
        question: Text of the question.

    Returns:
        Inputs of the authors' model.
    """
    from PIL import Image

    constants = importlib.import_module("fusion.constants")
    templates = importlib.import_module("fusion.conversation").conv_templates
    utils = importlib.import_module("fusion.mm_utils")
    start, end, mark = constants.DEFAULT_IM_START_TOKEN, constants.DEFAULT_IM_END_TOKEN, constants.DEFAULT_IMAGE_TOKEN
    framed = start + mark + end if loaded.model.config.mm_use_im_start_end else mark
    text = framed + "\n" + question
    conversation = templates[CONVERSATIONS[loaded.model_type]].copy()
    conversation.append_message(conversation.roles[0], text)
    conversation.append_message(conversation.roles[1], None)
    ids = utils.tokenizer_image_token(conversation.get_prompt(), loaded.tokenizer, return_tensors="pt")
    asked = text.replace(mark, "").replace(start, "").replace(end, "").strip()
    instructs = torch.tensor(loaded.tokenizer(asked).input_ids, dtype=torch.long)
    with Image.open(image_path) as image:
        processor = loaded.model.get_vision_tower().image_processor
        images = utils.process_images([image.convert("RGB")], processor, loaded.model.config)
    device = loaded.model.device
    return AuthorsPrompt(ids.unsqueeze(0).to(device), instructs.unsqueeze(0).to(device), images.to(device))


def generate(loaded: Loaded, prompt: AuthorsPrompt, num_tokens: int) -> Any:
    """
    Generate tokens greedily.

    Args:
        loaded: The authors' model.
        prompt: Its inputs.
        num_tokens: Number of tokens to generate.

    Returns:
        The output of the authors' `generate`, with logits.
    """
    with torch.inference_mode():
        return loaded.model.generate(
            prompt.input_ids,
            images=prompt.images.to(loaded.model.dtype),
            instructs=prompt.instructs,
            do_sample=False,
            max_new_tokens=num_tokens,
            use_cache=True,
            output_logits=True,
            return_dict_in_generate=True,
        )


def watch(model: Any) -> Recorder:
    """Record the authors' modules under the names that both sides use."""
    recorder, core = Recorder(), model.get_model()
    recorder.watch_output(core.aux_projector, "projector_back")
    recorder.watch_layers(model.get_vision_tower().vision_tower.vision_model.encoder.layers, "tower.{image}")
    recorder.watch_output(core.mm_projector, "projector.{image}")
    recorder.watch_layers(core.layers, "text")
    recorder.watch_output(core.norm, "text.norm")
    config = model.config
    for index, sampler in enumerate(core.vision_sampler_layers):
        layer = config.start_of_vision_sampler_layers + index * config.stride_of_vision_sampler_layers
        if index == 0:
            recorder.watch_input(sampler, "context", lambda args: args[1])
        recorder.watch_output(sampler, f"samplers.{layer}")
    return recorder


def record(loaded: Loaded, image_path: str, question: str, num_tokens: int) -> dict[str, torch.Tensor]:
    """
    Record all stages of one question.

    Args:
        loaded: The authors' model.
        image_path: Path of the image.
        question: Text of the question.
        num_tokens: Number of tokens to generate.

    Returns:
        Ids, pixels, features, logits and tokens by name.
    """
    prompt = make_prompt(loaded, image_path, question)
    recorder = watch(loaded.model)
    try:
        output = generate(loaded, prompt, num_tokens)
    finally:
        recorder.close()
    return recorder.tensors | {
        "ids": prompt.input_ids[0].cpu(),
        "instruct_ids": prompt.instructs[0].cpu(),
        "pixels": prompt.images[0].cpu().contiguous(),
        "logits": torch.cat(output.logits).float().cpu(),
        "tokens": output.sequences[0, -num_tokens:].cpu().contiguous(),
    }


def describe(loaded: Loaded) -> dict[str, Any]:
    """Describe the versions, and the ids with which the authors mark image and latent tokens."""
    import transformers

    constants = importlib.import_module("fusion.constants")
    return {
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "model_class": type(loaded.model).__name__,
        "image_mark": constants.IMAGE_TOKEN_INDEX,
        "latent_mark": constants.LATENT_IMAGE_TOKEN_INDEX,
    }


def main(path: Path) -> None:
    """
    Run a job: write `question_N.safetensors` for each question, and finally `report.json`, into its folder.

    Args:
        path: Path of the job, a JSON file.
    """
    job = json.loads(path.read_text(encoding="utf-8"))
    sys.path[0] = job["code"]  # instead of this file's folder, whose modules are not theirs
    torch.backends.cudnn.allow_tf32 = False  # TF32 rounds the patch embedding on recent GPUs
    if job["threads"]:
        torch.set_num_threads(job["threads"])
    loaded = load(job)
    folder = Path(job["folder"])
    for number, question in enumerate(job["questions"]):
        tensors = record(loaded, question["image"], question["text"], job["num_tokens"])
        save_file(tensors, folder / f"question_{number}.safetensors")
    (folder / "report.json").write_text(json.dumps(describe(loaded)), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
