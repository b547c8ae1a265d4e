"""`fusion-hf verify`: a converted folder beside the authors' own code."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fusion_hf.cli.argument_types import device, positive, tolerance
from fusion_hf.cli.model_options import DEBUG, make_options
from fusion_hf.cli.terminal import FAILED, printable
from fusion_hf.common.outputs import check_place
from fusion_hf.common.user_values import DTYPE_NAMES
from fusion_hf.conversion.inputs import ConversionOptions, find_conversion_inputs
from fusion_hf.hub.folders import find_folder
from fusion_hf.verification.authors_process import find_environment

if TYPE_CHECKING:
    from fusion_hf.verification.certificate import Certificate

DESCRIPTION = (
    "Run a converted model folder and the authors' own code on the same images and questions, compare weights, ids, "
    "pixels, features by layer, logits and 16 greedy tokens, and write parity.json into the folder, which `push` puts "
    "into the model card. The code in --authors-code is executed, with your rights: give a checkout that you trust. "
    "The exit status is 1 if anything differs."
)


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Tell the command line about `verify`."""
    parser = commands.add_parser(
        "verify", help="compare a converted folder with the authors' code, layer by layer", description=DESCRIPTION
    )
    parser.add_argument(
        "--model", dest="folder", required=True, metavar="DIR_OR_REPO", help="what `fusion-hf convert` wrote"
    )
    parser.add_argument("--checkpoint", required=True, metavar="DIR_OR_REPO", help="what it was converted from")
    parser.add_argument(
        "--authors-code",
        required=True,
        type=Path,
        metavar="DIR",
        help="a checkout of the authors' repository; its code is executed because you name it here",
    )
    parser.add_argument(
        "--authors-python",
        required=True,
        metavar="PYTHON",
        help="the Python of an environment with their requirements (transformers 4.48)",
    )
    parser.add_argument(
        "--vision-config",
        metavar="FILE_DIR_OR_REPO",
        help="as given to `convert`: the tower's sizes, if not those of its name",
    )
    parser.add_argument(
        "--input",
        type=Path,
        metavar="QUESTIONS.jsonl",
        help="what is asked, as for `ask`: a question and an image in each line; default: four drawn images",
    )
    parser.add_argument(
        "--device", type=device, default="cpu", help="cpu, cuda, cuda:1, mps or auto; default: %(default)s"
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPE_NAMES,
        default="float32",
        help="what both compute in; default: %(default)s, in which differences are plainest",
    )
    parser.add_argument(
        "--tolerance",
        type=tolerance,
        metavar="X",
        help="largest relative error of features and logits; default: 1e-5, of bfloat16 5e-2, of float16 1e-2",
    )
    parser.add_argument(
        "--timeout",
        type=positive,
        default=3600,
        metavar="SECONDS",
        help="how long the authors' code may take; default: %(default)s",
    )
    parser.add_argument(DEBUG, action="store_true", help="show where an error comes from")


def run(arguments: argparse.Namespace) -> int:
    """Compare; returns the exit status."""
    from fusion_hf.verification.questions import draw_questions, read_questions  # they import NumPy and Pillow

    environment = find_environment(arguments.authors_code, arguments.authors_python)
    arguments.folder = find_folder(arguments.folder)
    check_place(arguments.folder, "--model")
    options = ConversionOptions(arguments.checkpoint, None, arguments.vision_config)
    inputs = find_conversion_inputs(options, "--checkpoint")
    questions = draw_questions() if arguments.input is None else read_questions(arguments.input)

    from fusion_hf.cli.model_loading import silence_libraries
    from fusion_hf.verification.certificate import VerificationOptions, verify

    if not arguments.debug:
        silence_libraries()
    certificate = verify(make_options(VerificationOptions, arguments), environment, inputs, questions)
    for line in describe(certificate, arguments.folder):
        sys.stdout.write(printable(line) + "\n")
    return 0 if certificate.is_equal else FAILED


def describe(certificate: "Certificate", folder: Path) -> list[str]:
    """What was found out, a line for each stage, the verdict last."""
    from fusion_hf.evaluation.stage_comparison import IDS

    content, weights = certificate.content, certificate.weights
    asked = certificate.questions
    differing = f"{len(weights.different)} differ, such as {weights.different[0]}" if weights.different else "equal"
    right = sum(all(not stage.differs for stage in question.stages if stage.stage == IDS) for question in asked)
    lines = [f"weights: {weights.compared:,} tensors, {differing}", f"ids: equal in {right} of {len(asked)} questions"]
    for stage in content["stages"]:
        relative = "no number" if stage["relative"] is None else f"{stage['relative']:.1e}"
        lines.append(f"{stage['name']}: largest relative error {relative}, tolerance {stage['tolerance']:.0e}")
    equal = sum(question.tokens == question.authors_tokens for question in asked)
    lines.append(f"tokens: {content['num_tokens']} of each answer, equal in {equal} of {len(asked)}")
    first = content["first_difference"]
    if first is None:
        lines.append(f"The folder computes what the authors' code computes. Wrote {folder / 'parity.json'}.")
        return lines
    part = "" if first["part"] is None else f", {first['part']}"
    place = "" if first["question"] is None else f" (question {first['question'] + 1})"
    lines.append(f"The folder differs, first at: {first['stage']}{part}{place}: {first['detail']}.")
    return lines
