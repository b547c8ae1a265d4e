"""`fusion-hf export`: a model as ONNX graphs."""

import argparse
import logging
import sys
from pathlib import Path

from fusion_hf.cli.model_options import budget_options, find_model
from fusion_hf.cli.terminal import wrote
from fusion_hf.common.outputs import check_output
from fusion_hf.onnx_export.exported_folder import check_packages


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Tell the command line about `export`."""
    parser = commands.add_parser(
        "export",
        parents=[budget_options()],
        help="write a model as ONNX graphs, for onnxruntime",
        description="Write a model as two ONNX graphs in float32: the image's side, and the language model with its "
        "samplers. Needs the extra onnx.",
    )
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="a new folder")
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")


def run(arguments: argparse.Namespace) -> int:
    """Export; returns the exit status."""
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
