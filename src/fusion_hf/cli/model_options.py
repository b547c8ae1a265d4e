"""The options of commands that ask a model, and the model that they name; imports nothing heavy before it must."""

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from fusion_hf.cli.argument_types import AUTO, DTYPES, device, positive, share, square, temperature, whole_number
from fusion_hf.cli.parser import Parser
from fusion_hf.common.errors import InputError
from fusion_hf.common.extras import require
from fusion_hf.hub.folders import CONFIG, find_folder, nano_path, read_config
from fusion_hf.inference.sampling_options import LARGEST_SEED, MOST_LIKELY, SamplingOptions

Options = TypeVar("Options")
DEBUG = "--debug"
DEBUG_HELP = "Show the traceback of an error and the messages of libraries."
JSON_HELP = "Write JSON instead of text."
MODEL_HELP = "A model folder or a Hub repository (default: the bundled fusion-nano)."
IMAGE_HELP = "An image file or an http(s) address."
QUESTION_HELP = "The question. Quote it if it has several words."
MAX_NEW_TOKENS = 1024


def budget_options() -> Parser:
    """Make a parser for `parents`: a model, and the tokens that it spends on an image."""
    shared = Parser(add_help=False)
    shared.add_argument("--model", metavar="DIR_OR_REPO", help=MODEL_HELP)
    shared.add_argument(
        "--query-len",
        type=square,
        metavar="N",
        help="Number of latent tokens per question, a perfect square (default: the value of the model).",
    )
    shared.add_argument(
        "--image-token-grid",
        type=positive,
        metavar="N",
        help="Side of the grid of image tokens: N x N tokens per image. A smaller grid is faster and less accurate "
        "(default: the value of the model).",
    )
    return shared


def model_options() -> Parser:
    """Make a parser for `parents`: whatever asks a model."""
    shared = Parser(add_help=False, parents=[budget_options()])
    shared.add_argument(
        "--max-new-tokens",
        type=positive,
        default=MAX_NEW_TOKENS,
        metavar="N",
        help="Maximum number of tokens in an answer (default: %(default)s).",
    )
    shared.add_argument(
        "--device",
        type=device,
        default=AUTO,
        help="Device to run on: cpu, cuda, cuda:1, mps or auto (default: auto, which chooses cuda, else mps, else "
        "cpu).",
    )
    shared.add_argument(
        "--dtype",
        choices=DTYPES,
        default=AUTO,
        help="Data type of the weights (default: auto, which chooses bfloat16 on cuda, and on a CPU that is faster in "
        "bfloat16 if the model was saved in it; otherwise float32).",
    )
    quantization = shared.add_mutually_exclusive_group()
    for bits in (8, 4):
        quantization.add_argument(
            f"--load-in-{bits}bit",
            dest="bits",
            action="store_const",
            const=bits,
            help=f"Quantize the language model to {bits} bits while loading. Requires the extra `quant`.",
        )
    shared.add_argument(DEBUG, action="store_true", help=DEBUG_HELP)
    return shared


def sampling_options() -> Parser:
    """Make a parser for `parents`: how an answer is chosen."""
    shared = Parser(add_help=False)
    shared.add_argument(
        "--temperature",
        type=temperature,
        default=MOST_LIKELY.temperature,
        metavar="T",
        help="Sampling temperature, from 0 to 2. With 0, the answer is the most likely one (default: %(default)g).",
    )
    shared.add_argument(
        "--top-p",
        type=share,
        metavar="P",
        help="Sample only from the most likely tokens whose probabilities add up to P. Requires a temperature above 0 "
        f"(default: {MOST_LIKELY.top_p:g}).",
    )
    shared.add_argument(
        "--seed",
        type=whole_number(0, LARGEST_SEED),
        metavar="N",
        help="Seed of the random numbers: the same seed gives the same answer. Requires a temperature above 0 "
        f"(default: {MOST_LIKELY.seed}).",
    )
    shared.add_argument(
        "--num-beams",
        type=positive,
        default=MOST_LIKELY.num_beams,
        metavar="N",
        help="Number of beams of a beam search. Requires temperature 0 (default: %(default)s, no beam search).",
    )
    return shared


def read_sampling(arguments: argparse.Namespace) -> SamplingOptions:
    """
    Read the options of `sampling_options`.

    Raises:
        InputError: If they cannot be combined.
    """
    given = {name: value for name in ("top_p", "seed") if (value := getattr(arguments, name)) is not None}
    if arguments.temperature == 0:
        for name, value in given.items():
            raise InputError(f"`--{name.replace('_', '-')}` requires `--temperature` above 0, got {value}.")
    elif arguments.num_beams > 1:
        raise InputError(f"`--num-beams` must be 1 with `--temperature` above 0, got {arguments.num_beams}.")
    return SamplingOptions(temperature=arguments.temperature, num_beams=arguments.num_beams, **given)


def find_model(arguments: argparse.Namespace) -> str:
    """
    Find the folder of the model that `--model` names, fetched if it is on the Hub.

    Raises:
        InputError: If there is no such FUSION, or if a package is missing that the options require.
    """
    bits = vars(arguments).get("bits")  # some commands cannot quantize
    if bits is not None:
        require(("bitsandbytes",), f"`--load-in-{bits}bit`", "quant")
    name = nano_path() if arguments.model is None else arguments.model
    if not arguments.debug and not Path(name).is_dir():
        silence_hub()
    return str(find_folder(name))


def takes_lean_imports(arguments: argparse.Namespace) -> bool:
    """Tell whether a command may leave out imports, which quantized weights and further commands of a process need."""
    is_quantized = "quantization_config" in read_config(Path(arguments.model) / CONFIG)
    return arguments.owns_process and arguments.bits is None and not is_quantized


def answer_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what an answer depends on beside the model."""
    return {name: getattr(arguments, name) for name in ("max_new_tokens", "query_len", "image_token_grid")}


def silence_hub() -> None:
    """Silence the advice of the Hub's client; downloads keep their progress bars."""
    import huggingface_hub

    huggingface_hub.logging.set_verbosity_error()


def make_options(kind: type[Options], arguments: argparse.Namespace) -> Options:
    """Make a dataclass of options from the arguments that are named as its fields."""
    names = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: value for name, value in vars(arguments).items() if name in names})
