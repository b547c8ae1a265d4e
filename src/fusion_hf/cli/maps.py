"""`fusion-hf maps`: an answer, and images of what the model looked at."""

import argparse
import sys
from pathlib import Path

from fusion_hf.cli.argument_types import positive
from fusion_hf.cli.model_options import answer_settings, find_model, model_options
from fusion_hf.cli.terminal import check_image_exists, check_question, printable
from fusion_hf.common.extras import require
from fusion_hf.common.outputs import check_output, new_folder


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Tell the command line about `maps`, which has the options of `ask` as well."""
    parser = commands.add_parser(
        "maps",
        parents=[model_options()],
        help="draw what the model looked at for its answer",
        description="Answer a question about an image, and draw the attention of the question's words, of the latent "
        "tokens and of the answer's words over it: a PNG for each.",
    )
    parser.add_argument("image", metavar="IMAGE", help="an image file, or an http(s) address")
    parser.add_argument("question", metavar="QUESTION", help="in quotation marks")
    parser.add_argument(
        "--output", type=Path, default=Path("maps"), metavar="DIR", help="a new or empty folder; default: %(default)s"
    )
    parser.add_argument(
        "--layer-groups",
        type=positive,
        default=4,
        metavar="N",
        help="neighbouring layers are averaged in at most so many groups; default: %(default)s",
    )


def run(arguments: argparse.Namespace) -> int:
    """Answer and draw; returns the exit status."""
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
