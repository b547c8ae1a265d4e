"""The options of every command that asks a model; imports nothing heavy."""

from fusion_hf.cli.argument_types import AUTO, device, dtype, positive, square
from fusion_hf.cli.parser import Parser

DEBUG = "--debug"
MAX_NEW_TOKENS = 256


def model_options(max_new_tokens: int = MAX_NEW_TOKENS) -> Parser:
    """A parser for `parents`.

    Args:
        max_new_tokens: the default of that option.
    """
    shared = Parser(add_help=False)
    shared.add_argument(
        "--model", metavar="DIR_OR_REPO", help="a model folder or a Hub repository; default: the bundled fusion-nano"
    )
    shared.add_argument(
        "--query-len",
        type=square,
        metavar="N",
        help="latent tokens per question, a perfect square: more of them look more closely; default: the model's",
    )
    shared.add_argument(
        "--image-token-grid",
        type=positive,
        metavar="N",
        help="side of the grid of image tokens: a smaller one is faster and sees less; default: the model's",
    )
    shared.add_argument(
        "--max-new-tokens",
        type=positive,
        default=max_new_tokens,
        metavar="N",
        help="longest answer; default: %(default)s",
    )
    shared.add_argument(
        "--device",
        type=device,
        default=AUTO,
        help="cpu, cuda, cuda:1, mps or auto (default: cuda, else mps, else cpu)",
    )
    shared.add_argument(
        "--dtype",
        type=dtype,
        default=AUTO,
        help="float32, bfloat16, float16 or auto (default: bfloat16 on cuda, else float32)",
    )
    shared.add_argument(DEBUG, action="store_true", help="show where an error comes from, and the libraries' notes")
    return shared
