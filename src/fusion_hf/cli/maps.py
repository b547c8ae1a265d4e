"""`fusion-hf maps`: an answer and its attention maps."""

import argparse
import sys
from pathlib import Path

from fusion_hf.cli.argument_types import positive
from fusion_hf.cli.model_options import IMAGE_HELP, QUESTION_HELP, answer_settings, find_model, model_options
from fusion_hf.cli.terminal import check_image_exists, check_question, printable
from fusion_hf.common.extras import require
from fusion_hf.common.outputs import check_output, new_folder


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add `maps` to the subparsers of `fusion-hf`."""
    parser = commands.add_parser(
        "maps",
        parents=[model_options()],
        help="Draw attention maps of an answer.",
        description="Answer a question about an image. Then draw the attention of the words of the question, of the "
        "latent tokens and of the words of the answer over the image, one PNG file for each. Requires the extra "
        "`maps`.",
        examples=('fusion-hf maps photo.jpg "Where is the dog?" --output maps',),
    )
    parser.add_argument("image", metavar="IMAGE", help=IMAGE_HELP)
    parser.add_argument("question", metavar="QUESTION", help=QUESTION_HELP)
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("maps"),
        metavar="DIR",
        help="The folder to write, which must be new or empty (default: %(default)s).",
    )
    parser.add_argument(
        "--layer-groups",
        type=positive,
        default=4,
        metavar="N",
        help="Maximum number of groups of adjacent layers whose attention is averaged (default: %(default)s).",
    )


def run(arguments: argparse.Namespace) -> int:
    """Answer and draw, and return the exit status."""
    check_question(arguments.question)
    check_image_exists(arguments.image)
    require(("matplotlib",), "Drawing maps", "maps")
    output: Path = arguments.output
    check_output(output)
    arguments.model = find_model(arguments)

    from fusion_hf.cli.model_loading import load_chat_model
    from fusion_hf.maps import attention_maps
    from fusion_hf.maps.drawing import save_overlays

    chat_model = load_chat_model(arguments)
    image = chat_model.open_image(arguments.image)
    settings = {"layer_groups": arguments.layer_groups, **answer_settings(arguments)}
    result = attention_maps(image, arguments.question, chat_model, **settings)
    sys.stdout.write(f"{printable(result.answer)}\n")
    with new_folder(output) as folder:
        names = [path.name for path in save_overlays(result, image, folder)]
    for name in names:
        sys.stdout.write(f"{printable(str(output / name))}\n")
    return 0
