"""The plan for every weight of a new model, checked completely before anything is written."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from fusion_hf.common.user_values import torch_dtype
from fusion_hf.conversion.key_tables import KeyMap, Row
from fusion_hf.conversion.lora_updates import LoraPair
from fusion_hf.conversion.model_files import ConversionError, first_line
from fusion_hf.conversion.shard_writer import DTYPE_CODES
from fusion_hf.conversion.stored_tensors import StoredTensor, TensorReader
from fusion_hf.model.configuration_fusion import FusionConfig
from fusion_hf.model.modeling_fusion import FusionForConditionalGeneration

EMBEDDING, HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"
NUM_MARKS = 2  # number of rows for <vision_start> and <vision_end>


@dataclass(frozen=True)
class TensorSource:
    """Tensors with one naming scheme. `grows` means that the vocabulary may lack FUSION's two tokens, as in an LLM."""

    tensors: dict[str, StoredTensor]
    table: tuple[Row, ...]
    grows: bool = False


@dataclass(frozen=True)
class WeightRecipe:
    """
    How to create one weight.

    Attributes:
        stored: The weight on disk.
        lora: A low-rank update to add.
        rows: Number of rows to which the matrix is cut. The last two rows become the mean of the others, as in the
            authors' training.
    """

    stored: StoredTensor
    lora: LoraPair | None = None
    rows: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the new weight."""
        return self.stored.shape if self.rows is None else (self.rows, *self.stored.shape[1:])


@dataclass(frozen=True)
class WeightPlan:
    """All weights of the new model, in the order in which they are stored on disk."""

    recipes: dict[str, WeightRecipe]
    num_dropped: int

    @property
    def main_dtype(self) -> torch.dtype:
        """The dtype of most of the stored bytes."""
        sizes: Counter[torch.dtype] = Counter()
        for recipe in self.recipes.values():
            if isinstance(recipe.stored.dtype, torch.dtype):
                sizes[recipe.stored.dtype] += recipe.stored.num_bytes
        return sizes.most_common(1)[0][0]

    def choose_dtype(self, name: str | None) -> torch.dtype:
        """
        Choose the dtype of the new model.

        Args:
            name: Name of the dtype. None chooses the main dtype, or float32 if a model folder cannot have that.
        """
        dtype = self.main_dtype if name is None else torch_dtype(name)
        return dtype if dtype in DTYPE_CODES else torch.float32

    @property
    def num_parameters(self) -> int:
        """Number of parameters of the new model."""
        return sum(torch.Size(recipe.shape).numel() for recipe in self.recipes.values())


def expected_shapes(config: FusionConfig) -> dict[str, tuple[int, ...]]:
    """
    Return the shapes of all weights that a model saves, without allocating memory.

    Args:
        config: Configuration of the model.

    Returns:
        The shapes by name.

    Raises:
        ConversionError: If the language model is not supported.
    """
    try:
        with torch.device("meta"):
            model = FusionForConditionalGeneration(config)
    except (ValueError, RuntimeError) as error:  # torch raises RuntimeError for sizes beyond its integers
        raise ConversionError(f"No model can be created from the configuration: {first_line(error)}.") from error
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del shapes[HEAD]
    return shapes


def make_plan(
    config: FusionConfig,
    sources: Iterable[TensorSource],
    lora: dict[str, LoraPair],
    tower_name: str,
    hint: str = "",
    fresh: re.Pattern[str] | None = None,
) -> WeightPlan:
    """
    Assign a stored tensor to every weight. Later sources replace earlier ones.

    Args:
        config: Configuration of the new model.
        sources: Tensors on disk.
        lora: Low-rank updates by the names of the weights in the authors' checkpoint.
        tower_name: Origin of the tower's sizes, for the error about a wrong tower.
        hint: Advice for missing weights.
        fresh: Pattern of names that are not on disk.

    Returns:
        The plan.

    Raises:
        ConversionError: If tensors are unknown, missing, duplicate or have wrong shapes. The message lists all of
            them.
    """
    sources = list(sources)
    num_stored = sum(len(source.tensors) for source in sources)
    if config.text_config.num_hidden_layers + config.vision_config.num_hidden_layers > num_stored:
        # checked before a model with that many layers is built
        raise ConversionError(
            f"The configuration has {config.text_config.num_hidden_layers} + {config.vision_config.num_hidden_layers} "
            f"layers, but the checkpoint has only {num_stored} tensors."
        )
    recipes: dict[str, WeightRecipe] = {}
    unknown: list[str] = []
    num_dropped = 0
    for source in sources:
        found, dropped = _rename(config, source, unknown)
        recipes.update(found)
        num_dropped += dropped
    _check_tower(config, recipes, tower_name)
    unknown += _attach_lora(recipes, lora, KeyMap(sources[-1].table, config))
    expected = expected_shapes(config)
    if fresh is not None:
        expected = {name: shape for name, shape in expected.items() if not fresh.search(name)}
    _check(recipes, expected, unknown, hint)
    files = list(dict.fromkeys(recipe.stored.file for recipe in recipes.values()))
    ordered = sorted(recipes.items(), key=lambda item: files.index(item[1].stored.file))
    return WeightPlan(dict(ordered), num_dropped)


def _rename(config: FusionConfig, source: TensorSource, unknown: list[str]) -> tuple[dict[str, WeightRecipe], int]:
    """Return recipes by the names of this package, and the number of dropped tensors. Append to `unknown`."""
    key_map = KeyMap(source.table, config)
    recipes: dict[str, WeightRecipe] = {}
    dropped = 0
    for key, tensor in source.tensors.items():
        try:
            name = key_map(key)
        except KeyError:
            unknown.append(key)
            continue
        if name is None or (name == HEAD and config.tie_word_embeddings):
            dropped += 1
        elif name in recipes:
            unknown.append(f"{key} (a second {recipes[name].stored.key})")
        else:
            rows = config.text_config.vocab_size
            grows = source.grows and name in (EMBEDDING, HEAD) and len(tensor.shape) > 1
            has_enough = grows and tensor.shape[0] >= rows - NUM_MARKS
            recipes[name] = WeightRecipe(tensor, rows=rows if has_enough else None)
    return recipes, dropped


def _attach_lora(recipes: dict[str, WeightRecipe], lora: dict[str, LoraPair], key_map: KeyMap) -> list[str]:
    """Add each update to its weight, and return the updates without a weight."""
    homeless = []
    for key, pair in lora.items():
        try:
            name = key_map(key)
        except KeyError:
            name = None
        if name is None or name not in recipes or pair.shape != recipes[name].shape:
            homeless.append(f"{pair.a.key} (an update of shape {pair.shape})")
        else:
            recipes[name] = replace(recipes[name], lora=pair)
    return homeless


def _check_tower(config: FusionConfig, recipes: dict[str, WeightRecipe], tower_name: str) -> None:
    """Compare the sizes of a tower's weights with those in the configuration."""
    prefix = "model.vision_tower."
    shapes = {name.removeprefix(prefix): r.stored.shape for name, r in recipes.items() if name.startswith(prefix)}
    layers = {int(m[1]) for name in shapes if (m := re.match(r"layers\.(\d+)\.", name))}
    patch = shapes.get("embeddings.patch_embedding.weight")
    positions, mlp = shapes.get("embeddings.position_embedding.weight"), shapes.get("layers.0.mlp.fc1.weight")
    if patch is None or positions is None or mlp is None or len(patch) < 3:
        return  # `_check` lists missing tensors and wrong shapes by name
    vision = config.vision_config
    stored = (patch[0], mlp[0], max(layers), patch[2], positions[0])
    wanted = (
        vision.hidden_size,
        vision.intermediate_size,
        vision.num_hidden_layers - 1,
        vision.patch_size,
        config.num_patches_per_side**2,
    )
    if stored != wanted:
        raise ConversionError(
            f"The tower does not fit: that of the checkpoint has {_describe_tower(*stored)}, but {tower_name} has "
            f"{_describe_tower(*wanted)}. Pass the checkpoint's tower as --vision-config."
        )


def _describe_tower(width: int, mlp: int, last_layer: int, patch: int, positions: int) -> str:
    return f"width {width}, MLP {mlp}, {last_layer + 1} kept layers, patches of {patch}, {positions} positions"


def _check(
    recipes: dict[str, WeightRecipe], expected: dict[str, tuple[int, ...]], unknown: list[str], hint: str
) -> None:
    """Compare the recipes with the expected weights, and report all differences at once."""
    unknown = unknown + [recipe.stored.key for name, recipe in recipes.items() if name not in expected]
    missing = [name for name in expected if name not in recipes]
    known = {name: recipe for name, recipe in recipes.items() if name in expected}
    misshapen = [
        f"{r.stored.key} has {list(r.shape)} instead of {list(expected[name])}"
        for name, r in known.items()
        if r.shape != expected[name]
    ]
    mistyped = [
        f"{r.stored.key} is {r.stored.dtype}" for r in known.values() if not isinstance(r.stored.dtype, torch.dtype)
    ]
    problems = [
        f"{title} ({len(names)}): {', '.join(names)}"
        for title, names in (
            ("unknown tensors", unknown),
            ("missing tensors", missing),
            ("wrong shapes", misshapen),
            ("not floating point", mistyped),
        )
        if names
    ]
    if problems:
        advice = f" {hint}" if missing and hint else ""
        raise ConversionError(f"Nothing was written: the checkpoint does not fit. {'; '.join(problems)}.{advice}")


class WeightReader:
    """Creates weights with at most one shard of the checkpoint in memory (and a small adapter file)."""

    def __init__(self) -> None:
        self._shards, self._adapters = TensorReader(), TensorReader()

    def load(self, recipe: WeightRecipe, dtype: torch.dtype) -> torch.Tensor:
        """Load a weight on the CPU, contiguous and in `dtype`."""
        tensor = self._shards.load(recipe.stored)
        if recipe.rows is not None:
            kept = tensor[: recipe.rows - NUM_MARKS]
            mean = kept.mean(dim=0, keepdim=True, dtype=torch.float32).to(kept.dtype)
            tensor = torch.cat([kept, mean.expand(NUM_MARKS, *mean.shape[1:])])
        if recipe.lora is not None:
            tensor = recipe.lora.add_to(tensor, self._adapters)
        return tensor.to(dtype).contiguous()

    def close(self) -> None:
        """Close the files."""
        self._shards.close()
        self._adapters.close()
