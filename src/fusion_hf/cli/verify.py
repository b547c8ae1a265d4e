"""`fusion-hf verify`: compare a converted folder with the authors' own code."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fusion_hf.cli.argument_types import device, positive, tolerance
from fusion_hf.cli.model_options import DEBUG, DEBUG_HELP, make_options
from fusion_hf.cli.terminal import FAILED, printable
from fusion_hf.common.outputs import check_place
from fusion_hf.common.user_values import DTYPE_NAMES
from fusion_hf.conversion.inputs import ConversionOptions, find_conversion_inputs
from fusion_hf.hub.folders import find_folder
from fusion_hf.verification.authors_process import find_environment

if TYPE_CHECKING:
    from fusion_hf.verification.certificate import Certificate

DESCRIPTION = (
    "Run a converted model folder and the authors' own code on the same images and questions. Compare weights, token "
    "ids, pixels, the features of each layer, logits and 16 greedy tokens. Write the result to parity.json in the "
    "folder, which `push` adds to the model card. The code in --authors-code is executed with your rights, so give a "
    "checkout that you trust. The exit status is 0 if everything is equal, 1 if something differs and 2 for wrong "
    "input."
)
EXAMPLES = (
    "fusion-hf verify --model fusion-3b --checkpoint starriver030515/FUSION-Phi3.5-3B --authors-code FUSION "
    "--authors-python authors/bin/python",
)


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add `verify` to the subparsers of `fusion-hf`."""
    parser = commands.add_parser(
        "verify",
        help="Compare a converted model with the authors' code.",
        description=DESCRIPTION,
        examples=EXAMPLES,
    )
    parser.add_argument(
        "--model",
        dest="folder",
        required=True,
        metavar="DIR_OR_REPO",
        help="The model folder that `fusion-hf convert` wrote.",
    )
    parser.add_argument(
        "--checkpoint", required=True, metavar="DIR_OR_REPO", help="The checkpoint from which it was converted."
    )
    parser.add_argument(
        "--authors-code",
        required=True,
        type=Path,
        metavar="DIR",
        help="A checkout of the authors' repository. Its code is executed.",
    )
    parser.add_argument(
        "--authors-python",
        required=True,
        metavar="PYTHON",
        help="The Python of an environment with the authors' requirements (transformers 4.48).",
    )
    parser.add_argument(
        "--vision-config",
        metavar="FILE_DIR_OR_REPO",
        help="The sizes of the vision tower, as given to `fusion-hf convert` (default: those of the tower that the "
        "checkpoint names).",
    )
    _add_comparison_options(parser)
    parser.add_argument(DEBUG, action="store_true", help=DEBUG_HELP)


def _add_comparison_options(parser: argparse.ArgumentParser) -> None:
    """Add what is compared, where, and how closely."""
    parser.add_argument(
        "--input",
        type=Path,
        metavar="QUESTIONS.jsonl",
        help="The questions, as for `fusion-hf ask`: a question and an image in each line (default: questions about "
        "four drawn images).",
    )
    parser.add_argument(
        "--device",
        type=device,
        default="cpu",
        help="Device to run on: cpu, cuda, cuda:1, mps or auto (default: %(default)s).",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPE_NAMES,
        default="float32",
        help="Data type in which both compute (default: %(default)s, which shows differences best).",
    )
    parser.add_argument(
        "--tolerance",
        type=tolerance,
        metavar="X",
        help="Maximum relative error of features and logits (default: 1e-5 in float32, 5e-2 in bfloat16, 1e-2 in "
        "float16).",
    )
    parser.add_argument(
        "--timeout",
        type=positive,
        default=3600,
        metavar="SECONDS",
        help="Maximum time of the authors' code in seconds (default: %(default)s).",
    )


def run(arguments: argparse.Namespace) -> int:
    """Compare both, and return the exit status."""
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
    """Describe a certificate in a line for each stage, with the verdict last."""
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
