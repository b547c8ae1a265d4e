"""An untrained FUSION from a language model and a SigLIP tower: the start of a training."""

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from fusion_hf.configuration_fusion import FusionConfig
from fusion_hf.conversion import hub
from fusion_hf.conversion.card import Provenance, write_card
from fusion_hf.conversion.checkpoint import check_index, find_weight_files, read_headers, read_json
from fusion_hf.conversion.cli import DTYPES, Parser, add_shared_arguments, run_command
from fusion_hf.conversion.config import (
    convert_text_config,
    fusion_config,
    parse_query_lens,
    read_tower_config,
    sampler_layers,
)
from fusion_hf.conversion.errors import ConversionError
from fusion_hf.conversion.folder import (
    check_output,
    make_generation_config,
    make_processor,
    new_folder,
    set_dtype,
    write_files,
)
from fusion_hf.conversion.hub import Location, locate
from fusion_hf.conversion.keys import LANGUAGE_MODEL_ROWS, TOWER_TABLE, Row
from fusion_hf.conversion.plan import HEAD, NUM_MARKS, Plan, RecipeReader, Source, make_plan
from fusion_hf.conversion.tokenizer import NO_TOKENIZER, add_marks, choose_tokenizer, vocabulary_size
from fusion_hf.conversion.writer import DTYPE_NAMES, write_weights
from fusion_hf.modeling_fusion import FusionForConditionalGeneration
from fusion_hf.modeling_fusion_decoder import DECODER_LAYERS

FRESH = re.compile(r"^model\.vision_projector(?:_back)?\.|\.vision_sampler\.")
UPSTREAM_EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True)
class Options:
    """What the command line says; see its help."""

    text: str
    vision: str
    output: Path
    tokenizer: str | None = None
    query_lens: tuple[int, ...] = (4, 16, 36, 64, 144)
    window_size: int = 3
    num_samplers: int = 10
    start: int = 0
    stride: int = 3
    seed: int = 0
    dtype: torch.dtype | None = None
    push_to_hub: str | None = None
    private: bool = False


def build(options: Options) -> str:
    """Build the folder; returns a line that says what was done. The whole model is in memory, in the target type.

    Raises:
        ConversionError: for backbones that do not fit; nothing is left behind then.
    """
    if options.push_to_hub is not None:
        hub.check_can_push(options.push_to_hub)
    check_output(options.output)
    text, vision = locate(options.text, "--text"), locate(options.vision, "--vision")
    values = read_json(text.path / "config.json")
    model_type = values.get("model_type")
    if model_type not in DECODER_LAYERS:
        allowed = ", ".join(sorted(DECODER_LAYERS))
        raise ConversionError(f"--text: {text.name} is a {model_type!r} model; FUSION supports: {allowed}.")
    text_source = _read(text, LANGUAGE_MODEL_ROWS, grows=True)
    text_config = convert_text_config(values, model_type)
    tokenizer = choose_tokenizer(options.tokenizer, [text], model_type, text_config.max_position_embeddings)
    text_config.vocab_size = _vocab_size(text_source, tokenizer)
    config = fusion_config(
        text_config,
        read_tower_config(vision.path),
        query_lens=list(options.query_lens),
        window_size=options.window_size,
        sampler_layers=sampler_layers(
            options.num_samplers, options.start, options.stride, text_config.num_hidden_layers
        ),
    )
    if tokenizer is not None:
        add_marks(tokenizer, text_config.vocab_size)
        text_config.pad_token_id = tokenizer.pad_token_id
    plan = make_plan(config, [_read(vision, TOWER_TABLE), text_source], {}, vision.name, fresh=FRESH)
    dtype = options.dtype or plan.main_dtype
    if dtype not in DTYPE_NAMES:
        dtype = torch.float32
    set_dtype(config, dtype)

    with new_folder(options.output.absolute()) as folder:
        weights = make_weights(config, plan, dtype, options.seed)
        shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
        write_weights(folder, shapes, dtype, lambda name: weights[name].contiguous())
        settings = text.path / "generation_config.json"
        generation = make_generation_config(config, tokenizer, read_json(settings) if settings.is_file() else {})
        num_parameters = sum(weight.numel() for weight in weights.values())
        provenance = _provenance(options, text, vision, dtype, num_parameters, tokenizer is not None)
        write_files(folder, config, make_processor(config, tokenizer), generation, write_card(config, provenance))
    done = f"Wrote {options.output}: an untrained FUSION of {num_parameters:,} parameters in {DTYPE_NAMES[dtype]}."
    if options.push_to_hub is not None:
        url = hub.push(options.output, options.push_to_hub, options.private, "Build an untrained FUSION")
        done += f" Pushed: {url}"
    return done


def _read(location: Location, table: tuple[Row, ...], grows: bool = False) -> Source:
    files = find_weight_files(location.path) if location.path.is_dir() else []
    if not files:
        raise ConversionError(f"{location.name} has no weights; allowed: model.safetensors or pytorch_model.bin.")
    stored = read_headers(files)
    check_index(location.path, stored)
    return Source(stored, table, grows=grows)


def _vocab_size(text: Source, tokenizer: PreTrainedTokenizerFast | None) -> int:
    """Rows of the new embedding: those that the tokenizer uses (the authors drop a backbone's spare rows), and two."""
    embedding = text.tensors.get(UPSTREAM_EMBEDDING)
    if embedding is None or len(embedding.shape) != 2:
        raise ConversionError(f"--text: the weights have no matrix {UPSTREAM_EMBEDDING}.")
    rows = embedding.shape[0]
    used = rows if tokenizer is None else vocabulary_size(tokenizer)
    if used > rows:
        raise ConversionError(f"--text: the tokenizer has {used} tokens, but the embedding only {rows} rows.")
    return used + NUM_MARKS


def make_weights(config: FusionConfig, plan: Plan, dtype: torch.dtype, seed: int) -> dict[str, torch.Tensor]:
    """All weights of the model: the backbones' as they are, the new parts as the model initialises them."""
    torch.manual_seed(seed)
    model = FusionForConditionalGeneration._from_config(config, dtype=dtype)
    weights = model.state_dict()
    reader = RecipeReader()
    for name, recipe in tqdm(plan.recipes.items(), unit="tensors", disable=None):
        weights[name].copy_(reader.load(recipe, dtype))
    reader.close()
    if config.tie_word_embeddings:
        del weights[HEAD]
    return weights


def _provenance(
    options: Options, text: Location, vision: Location, dtype: torch.dtype, num_parameters: int, has_tokenizer: bool
) -> Provenance:
    return Provenance(
        title=(options.push_to_hub or options.output.name).split("/")[-1],
        model_id=options.push_to_hub or options.output.name,
        sources=(("language model", hub.describe(text)), ("vision tower", hub.describe(vision))),
        base_models=tuple(location.name for location in (text, vision) if "/" in location.name),
        dtype=dtype,
        num_parameters=num_parameters,
        has_tokenizer=has_tokenizer,
        is_untrained=True,
        notes=(
            f"Projectors and samplers are initialised with seed {options.seed}; the rows of the two new tokens are "
            "the mean of the others.",
        ),
    )


def make_parser() -> Parser:
    """The command line of `build_from_backbones.py`."""
    defaults = Options("", "", Path())
    parser = Parser(
        prog="build_from_backbones.py",
        description="Make an untrained FUSION from a language model and a SigLIP tower. The tower's last layer, its "
        "final norm and its pooling head are dropped; projectors and samplers are new.",
    )
    where = "DIR_OR_REPO"
    parser.add_argument("--text", required=True, metavar=where, help=f"language model: {', '.join(DECODER_LAYERS)}")
    parser.add_argument("--vision", required=True, metavar=where, help="SigLIP model or SigLIP vision model")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="a new folder")
    parser.add_argument("--tokenizer", metavar=f"{where}|{NO_TOKENIZER}", help="default: the language model's own")
    lengths = ",".join(map(str, defaults.query_lens))
    parser.add_argument("--query-lens", default=lengths, help="latent tokens to train with; default: %(default)s")
    for name, text in (
        ("window_size", "side of a latent token's window"),
        ("num_samplers", "number of samplers"),
        ("start", "language model layer of the first sampler"),
        ("stride", "layers from one sampler to the next"),
        ("seed", "of the new parts"),
    ):
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=int, default=getattr(defaults, name), help=f"{text}; default: %(default)s")
    add_shared_arguments(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return run_command(make_parser(), _build, argv)


def _build(arguments: argparse.Namespace) -> str:
    values = {name: value for name, value in vars(arguments).items() if name != "debug"}
    values["query_lens"] = tuple(parse_query_lens(arguments.query_lens))
    values["dtype"] = DTYPES.get(arguments.dtype)
    return build(Options(**values))
