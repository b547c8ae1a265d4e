"""`fusion-hf export`: export a model to ONNX."""

import argparse
import logging
import sys
from pathlib import Path

from fusion_hf.cli.model_options import DEBUG, DEBUG_HELP, budget_options, find_model
from fusion_hf.cli.terminal import wrote
from fusion_hf.common.outputs import check_output
from fusion_hf.onnx_export.exported_folder import check_packages


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add `export` to the subparsers of `fusion-hf`."""
    parser = commands.add_parser(
        "export",
        parents=[budget_options()],
        help="Export a model to ONNX.",
        description="Export a model to two ONNX graphs in float32: one encodes the image, the other one is the "
        "language model with its samplers. Requires the extra `onnx`.",
        examples=("fusion-hf export --output fusion-nano-onnx",),
    )
    parser.add_argument(
        "--output", required=True, type=Path, metavar="DIR", help="The folder to write, which must not exist."
    )
    parser.add_argument(DEBUG, action="store_true", help=DEBUG_HELP)


def run(arguments: argparse.Namespace) -> int:
    """Export the model, and return the exit status."""
    check_packages()
    output: Path = arguments.output
    check_output(output)
    model = find_model(arguments)
    if not arguments.debug:
        from fusion_hf.cli.model_loading import silence_libraries

        silence_libraries()
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it misses torchvision, which is not needed
    from fusion_hf.inference.chat_model import ChatModel
    from fusion_hf.onnx_export.export import export_onnx

    chat_model = ChatModel.load(model, device="cpu", dtype="float32")
    export_onnx(chat_model, output, arguments.query_len, arguments.image_token_grid)
    sys.stdout.write(f"{wrote(output)}\n")
    return 0
