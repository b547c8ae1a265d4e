"""Tiny checkpoints as the authors' code writes them, with random weights. Names follow the authors' modules.

`our_name` is a second, independent account of the renaming that `fusion_hf.conversion.key_tables` declares.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

WIDTH, MLP, HEADS, LAYERS, VOCABULARY = 32, 48, 4, 4, 66
TOWER = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 5,
    "num_attention_heads": 2,
    "patch_size": 14,
    "image_size": 56,
}
SAMPLERS = {
    "num_of_vision_sampler_layers": 2,
    "start_of_vision_sampler_layers": 1,
    "stride_of_vision_sampler_layers": 2,
}
SAMPLER_LAYERS = [1, 3]
TOWER_PREFIX = "model.vision_tower.vision_tower.vision_model."
# What upstream's files hold beside the sizes, and what must not survive.
BAGGAGE = {
    "_name_or_path": "/home/somebody/phi",
    "architectures": ["FusionPhiForCausalLM"],
    "auto_map": {"AutoModelForCausalLM": "evil--modeling.Evil"},
    "mm_hidden_size": 16,
    "mm_projector_type": "mlp2x_gelu",
    "mm_use_im_start_end": True,
    "temperature": 0.3,
    "max_length": 20,
    "torch_dtype": "float32",
    "transformers_version": "4.48.1",
    "use_cache": False,
    "image_aspect_ratio": "static_hd",
    "tokenizer_padding_side": "right",
}


def upstream_config(kind: str = "phi", **changes: Any) -> dict[str, Any]:
    """Content of `config.json`; `kind` is `phi`, `llama`, `qwen` or `mistral`."""
    if kind == "phi":
        own = {
            "rope_scaling": {"type": "longrope", "long_factor": [1.5, 2.0, 3.0, 4.0], "short_factor": [1.0] * 4},
            "original_max_position_embeddings": 4096,
            "max_position_embeddings": 131072,
        }
    else:
        own = {"num_key_value_heads": 2, "max_position_embeddings": 8192}
    config = {
        **BAGGAGE,
        "model_type": f"fusion_{kind}",
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": MLP,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
        "mm_vision_tower": "google/siglip-so400m-patch14-384",
        "query_len": "4,16,36,64,144",
        "window_size": 3,
        "tokenizer_model_max_length": 512,
        **SAMPLERS,
        **own,
    }
    return config | changes


def tower_shapes(tower: dict[str, int], num_layers: int) -> dict[str, tuple[int, ...]]:
    """Names (below the tower) and shapes of a SigLIP tower."""
    width, mlp = tower["hidden_size"], tower["intermediate_size"]
    positions = (tower["image_size"] // tower["patch_size"]) ** 2
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.patch_embedding.weight": (width, 3, tower["patch_size"], tower["patch_size"]),
        "embeddings.patch_embedding.bias": (width,),
        "embeddings.position_embedding.weight": (positions, width),
        "post_layernorm.weight": (width,),
        "post_layernorm.bias": (width,),
    }
    for index in range(num_layers):
        layer = f"encoder.layers.{index}."
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes[f"{layer}self_attn.{name}.weight"] = (width, width)
            shapes[f"{layer}self_attn.{name}.bias"] = (width,)
        for name in ("layer_norm1", "layer_norm2"):
            shapes[f"{layer}{name}.weight"] = shapes[f"{layer}{name}.bias"] = (width,)
        shapes |= {f"{layer}mlp.fc1.weight": (mlp, width), f"{layer}mlp.fc1.bias": (mlp,)}
        shapes |= {f"{layer}mlp.fc2.weight": (width, mlp), f"{layer}mlp.fc2.bias": (width,)}
    return shapes


def text_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the language model."""
    width, mlp, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    kv = width // heads * config["num_key_value_heads"]
    shapes = dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), (config["vocab_size"], width))
    shapes["model.norm.weight"] = (width,)
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}."
        shapes[f"{layer}input_layernorm.weight"] = shapes[f"{layer}post_attention_layernorm.weight"] = (width,)
        if config["model_type"].endswith(("phi", "phi3")):
            shapes[f"{layer}self_attn.qkv_proj.weight"] = (width + 2 * kv, width)
            shapes[f"{layer}mlp.gate_up_proj.weight"] = (2 * mlp, width)
        else:
            shapes[f"{layer}self_attn.q_proj.weight"] = (width, width)
            shapes |= {f"{layer}self_attn.{name}_proj.weight": (kv, width) for name in "kv"}
            shapes |= {f"{layer}mlp.{name}_proj.weight": (mlp, width) for name in ("gate", "up")}
        if config["model_type"].endswith("qwen"):
            shapes |= {f"{layer}self_attn.{name}_proj.bias": (width if name == "q" else kv,) for name in "qkv"}
        shapes[f"{layer}self_attn.o_proj.weight"] = (width, width)
        shapes[f"{layer}mlp.down_proj.weight"] = (width, mlp)
    return shapes


def adapter_shapes(config: dict[str, Any], tower: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the projectors and samplers."""
    width, vision = config["hidden_size"], tower["hidden_size"]
    shapes = {}
    for name, inner, outer in (("mm_projector", 3 * vision, width), ("aux_projector", width, vision)):
        shapes |= {f"model.{name}.0.weight": (outer, inner), f"model.{name}.0.bias": (outer,)}
        shapes |= {f"model.{name}.2.weight": (outer, outer), f"model.{name}.2.bias": (outer,)}
    for index in range(config["num_of_vision_sampler_layers"]):
        sampler = f"model.vision_sampler_layers.{index}.layers.0."
        shapes[f"{sampler}proj_in.weight"] = (width, 2 * width)
        for name in ("proj_context", "proj_out.linear_1", "proj_out.linear_2", "cross_attn.o_proj"):
            shapes[f"{sampler}{name}.weight"] = (width, width)
        for name in ("norm", *(f"cross_attn.{part}_proj.0" for part in "qkv")):
            shapes[f"{sampler}{name}.weight"] = shapes[f"{sampler}{name}.bias"] = (width,)
        shapes |= {f"{sampler}cross_attn.{part}_proj.1.weight": (width, width) for part in "qkv"}
    return shapes


def checkpoint_shapes(config: dict[str, Any], tower: dict[str, int] | None = None) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a full checkpoint; upstream has cut the tower's last layer away."""
    tower = TOWER if tower is None else tower
    vision = tower_shapes(tower, tower["num_hidden_layers"] - 1)
    return {
        **text_shapes(config),
        **adapter_shapes(config, tower),
        **{TOWER_PREFIX + name: shape for name, shape in vision.items()},
    }


def random_tensors(
    shapes: dict[str, tuple[int, ...]], seed: int = 0, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """A random tensor for each shape."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def our_name(key: str, sampler_layers: Sequence[int] = SAMPLER_LAYERS) -> str | None:
    """The name in this package; None for what it drops."""
    if key.startswith(TOWER_PREFIX):
        name = key.removeprefix(TOWER_PREFIX)
        if name.startswith("post_layernorm"):
            return None
        return "model.vision_tower." + name.removeprefix("encoder.")
    for theirs, ours in (("mm_projector", "vision_projector"), ("aux_projector", "vision_projector_back")):
        if key.startswith(f"model.{theirs}."):
            return key.replace(theirs, ours).replace(".0.", ".linear_1.").replace(".2.", ".linear_2.")
    match = re.match(r"model\.vision_sampler_layers\.(\d+)\.layers\.0\.(.*)", key)
    if match:
        rest = match[2].replace("proj_out.", "").replace("cross_attn.", "")
        rest = re.sub(r"([qkv])_proj\.0", r"\1_norm", rest)
        rest = re.sub(r"([qkv])_proj\.1", r"\1_proj", rest)
        return f"model.language_model.layers.{sampler_layers[int(match[1])]}.vision_sampler.{rest}"
    return key if key.startswith("lm_head") else key.replace("model.", "model.language_model.", 1)


def renamed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of a full checkpoint under our names."""
    return {name: tensor for key, tensor in tensors.items() if (name := our_name(key)) is not None}


def write_json(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def save_weights(
    folder: Path, tensors: dict[str, torch.Tensor], num_shards: int = 1, suffix: str = ".safetensors"
) -> list[Path]:
    """Weights in one file or in shards with an index, as safetensors or `.bin`; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = "model" if suffix == ".safetensors" else "pytorch_model"
    names = list(tensors)
    weight_map, files = {}, []
    for shard in range(num_shards):
        name = f"{stem}{suffix}" if num_shards == 1 else f"{stem}-{shard + 1:05}-of-{num_shards:05}{suffix}"
        part = {key: tensors[key] for key in names[shard::num_shards]}
        weight_map.update(dict.fromkeys(part, name))
        files.append(folder / name)
        if suffix == ".safetensors":
            save_file(part, folder / name, metadata={"format": "pt"})
        else:
            torch.save(part, folder / name)
    if num_shards > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        write_json(
            folder / f"{stem}{suffix}.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
        )
    return files


def write_checkpoint(
    folder: Path, kind: str = "phi", num_shards: int = 1, suffix: str = ".safetensors", **changes: Any
) -> dict[str, torch.Tensor]:
    """A full checkpoint beside a `vision_config.json`; returns its tensors."""
    config = upstream_config(kind, **changes)
    tensors = random_tensors(checkpoint_shapes(config))
    write_json(folder / "config.json", config)
    write_json(folder.parent / "vision_config.json", TOWER)
    save_weights(folder, tensors, num_shards, suffix)
    return tensors
