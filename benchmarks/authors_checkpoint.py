"""A small checkpoint that the authors' own classes make and save, with random weights.

Run by the Python of the authors' environment, with a checkout of their repository:

    PYTHON benchmarks/authors_checkpoint.py --code CHECKOUT --kind phi --output DIR

In the checkpoint's folder lies that of its tower, whose sizes `fusion-hf convert --vision-config` takes.
"""

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AddedToken, AutoConfig, AutoModelForCausalLM, LlamaTokenizer, PreTrainedTokenizerFast

# constants of the authors' code: layers of the towers, and patches per side
TOWERS = {
    "siglip": {"num_hidden_layers": 27, "patch_size": 14, "image_size": 384},
    "siglip2": {"num_hidden_layers": 40, "patch_size": 16, "image_size": 384},
}
PHI_MARKS = (
    "<|endoftext|> <|assistant|> <|placeholder1|> <|placeholder2|> <|placeholder3|> <|placeholder4|> <|system|>"
)
PHI_MARKS += " <|end|> <|placeholder5|> <|placeholder6|> <|user|>"
LLAMA_MARKS = "<|begin_of_text|> <|end_of_text|> <|reserved_special_token_0|> <|start_header_id|> <|end_header_id|>"
LLAMA_MARKS += " <|eom_id|> <|eot_id|>"
TEXT = (
    "what color is the shape? what is written on the sign? how many shapes are there? describe the image in detail. "
    "You are a helpful AI assistant. You are a helpful, highly intelligent language and vision assistant."
)
IMAGE_MARKS = ("<vision_start>", "<vision_end>")
PIECES = 400
ROPE_STEPS = 2  # numbers of a head for each angle


def make_phi_tokenizer(folder: Path) -> LlamaTokenizer:
    """Make a sentencepiece model with Phi-3's special tokens, which remove white space on their right."""
    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join([*TEXT.split(". "), *TEXT.split(), *map(chr, range(33, 127))] * 3), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(folder / "trained"),
        vocab_size=PIECES,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        # as Llama's does, so that a space before a special token stays
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    marks = PHI_MARKS.split()
    added = {
        PIECES + index: AddedToken(mark, rstrip=index > 0, normalized=False, special=True)
        for index, mark in enumerate(marks)
    }
    tokenizer = LlamaTokenizer(
        str(folder / "trained.model"),
        # unlike with `add_tokens`, these tokens do not remove the white space before them
        added_tokens_decoder=added,
        legacy=False,
        add_bos_token=False,
        eos_token=marks[0],
        pad_token=marks[0],
    )
    for name in ("corpus.txt", "trained.vocab", "trained.model"):
        (folder / name).unlink()
    return tokenizer


def make_llama_tokenizer(vocabulary: int | None) -> PreTrainedTokenizerFast:
    """
    Make a byte-pair tokenizer with Llama 3's special tokens.

    Texts begin with the first special token. Unused tokens fill `vocabulary`.
    """
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=PIECES, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([TEXT], trainer)
    marks = LLAMA_MARKS.split()
    if vocabulary is not None:
        state = json.loads(backend.to_str())
        pieces = state["model"]["vocab"]
        own = len(marks) + len(IMAGE_MARKS)
        pieces.update({f"<unused{number}>": number for number in range(len(pieces), vocabulary - own)})
        backend = Tokenizer.from_str(json.dumps(state))
    backend.add_special_tokens(marks)
    first = backend.token_to_id(marks[0])
    template = processors.TemplateProcessing(
        single=f"{marks[0]} $A", pair=f"{marks[0]} $A {marks[0]} $B", special_tokens=[(marks[0], first)]
    )
    backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=marks[0], eos_token=marks[-1])


def write_tower(folder: Path, family: str, width: int, more: dict[str, int]) -> dict[str, int]:
    """Write the configuration of the tower to a folder with its name, and return its sizes."""
    sizes = {"hidden_size": width, "intermediate_size": 3 * width // 2, "num_attention_heads": 2}
    sizes |= more | TOWERS[family]
    folder.mkdir(parents=True)
    content = {"model_type": "siglip_vision_model", "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, **sizes}
    (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")
    return sizes


def text_sizes(kind: str, width: int, layers: int) -> dict[str, Any]:
    """Return the sizes of the language model."""
    heads = 4
    sizes = {
        "hidden_size": width,
        "intermediate_size": 3 * width // 2,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "tie_word_embeddings": False,
    }
    if kind == "llama":
        return {**sizes, "num_key_value_heads": heads // 2, "max_position_embeddings": 8192}
    angles = width // heads // ROPE_STEPS
    factors = [1 + index / angles for index in range(angles)]
    rope = {"type": "longrope", "short_factor": factors, "long_factor": [4 * factor for factor in factors]}
    lengths = {"max_position_embeddings": 131_072, "original_max_position_embeddings": 4096, "sliding_window": 262_144}
    return {**sizes, **lengths, "rope_scaling": rope, "pad_token_id": 0}


def make(code: Path, kind: str, family: str, output: Path, width: int, layers: int, sizes: dict[str, Any]) -> None:
    """
    Write a checkpoint in the form in which the authors' training saves one.

    Args:
        sizes: overrides of the sizes that `width` and `layers` give: `tower` and `text` with keys of their
            configurations, and `vocabulary` for the kind `"llama"`.
    """
    sys.path[0] = str(code)
    importlib.import_module("fusion.model")
    output.mkdir(parents=True)
    tower = output / f"{family}-tower"
    tower_sizes = write_tower(tower, family, width // 2, sizes.get("tower", {}))
    vocabulary = sizes.get("vocabulary")
    tokenizer = make_phi_tokenizer(output) if kind == "phi" else make_llama_tokenizer(vocabulary)
    tokenizer.add_tokens(list(IMAGE_MARKS), special_tokens=True)
    text = text_sizes(kind, width, layers) | sizes.get("text", {})
    samplers = {"start_of_vision_sampler_layers": 0, "stride_of_vision_sampler_layers": 3}
    config = AutoConfig.for_model(
        f"fusion_{kind}",
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        mm_vision_tower=str(tower),
        mm_hidden_size=tower_sizes["hidden_size"],
        mm_projector_type="mlp2x_gelu",
        mm_use_im_start_end=True,
        mm_use_im_patch_token=False,
        unfreeze_mm_vision_tower=True,
        query_len="4,16,36,64,144",
        window_size=3,
        num_of_vision_sampler_layers=(text["num_hidden_layers"] + 2) // 3,
        image_aspect_ratio="static_hd",
        tokenizer_padding_side="right",
        tokenizer_model_max_length=4096,
        **samplers,
        **text,
    )
    torch.manual_seed(0)
    save_random_tower(tower)
    model = AutoModelForCausalLM.from_config(config)
    randomise(model)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    (tower / "model.safetensors").unlink()  # the checkpoint holds the tower's weights
    name = output / "config.json"
    content = json.loads(name.read_text(encoding="utf-8"))
    name.write_text(json.dumps(content | {"mm_vision_tower": f"google/{family}-so400m"}, indent=2), encoding="utf-8")


def save_random_tower(tower: Path) -> None:
    """Write random weights to the folder of the tower, from which the authors' class loads them."""
    name = "siglip2" if "siglip2" in tower.name else "siglip"
    module = importlib.import_module(f"fusion.model.multimodal_encoder.{name}_encoder")
    prefix = "SigLip2" if name == "siglip2" else "SigLip"
    config = getattr(module, f"{prefix}VisionConfig").from_pretrained(str(tower))
    getattr(module, f"{prefix}VisionModel")(config).save_pretrained(tower)


def randomise(model: torch.nn.Module) -> None:
    """
    Draw weights that are large enough to matter. Those of a new model are so small that a wrong one might change
    nothing.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
            elif "norm" in name and name.endswith("weight"):
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
            else:
                torch.nn.init.normal_(parameter, std=0.1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--code", type=Path, required=True)
    parser.add_argument("--kind", choices=("phi", "llama"), required=True)
    parser.add_argument("--tower", choices=tuple(TOWERS), default="siglip")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--sizes", type=json.loads, default={}, help="sizes as a JSON object, see `make`")
    given = parser.parse_args()
    make(given.code.resolve(), given.kind, given.tower, given.output.resolve(), given.width, given.layers, given.sizes)
