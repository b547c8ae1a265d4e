"""`fusion-hf export`: a model as ONNX graphs."""

import argparse
import logging
from pathlib import Path

from fusion_hf.cli.values import positive, square


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Tell the command line about `export`."""
    parser = commands.add_parser(
        "export",
        help="write a model as ONNX graphs, for onnxruntime",
        description="Write a model as two ONNX graphs in float32: the picture's side, and the language model with its "
        "samplers. Needs the extra onnx.",
    )
    parser.add_argument(
        "--model", metavar="DIR_OR_REPO", help="a model folder or a Hub repository; default: the bundled fusion-nano"
    )
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="a new folder")
    parser.add_argument(
        "--query-len", type=square, metavar="N", help="latent tokens per question; default: the model's"
    )
    parser.add_argument(
        "--image-token-grid", type=positive, metavar="N", help="side of the grid of image tokens; default: the model's"
    )
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")


def run(arguments: argparse.Namespace) -> int:
    """Export; returns the exit status."""
    if not arguments.debug:
        from fusion_hf.cli.session import silence_libraries

        silence_libraries()
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it misses torchvision, which is not needed
    from fusion_hf.inference import Assistant
    from fusion_hf.interchange.export import check_packages, export_onnx

    check_packages()  # before a model is loaded
    assistant = Assistant.load(arguments.model, device="cpu", dtype="float32")
    export_onnx(assistant, arguments.output, arguments.query_len, arguments.image_token_grid)
    return 0
