"""`fusion-hf ask`: one question or several about one image, or about each of several; or a file of questions."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from fusion_hf.cli import ask_file
from fusion_hf.cli.argument_types import positive
from fusion_hf.cli.model_options import model_options
from fusion_hf.cli.models import find_model
from fusion_hf.cli.terminal import USER_ERROR, check_image_exists, check_question, one_line, printable
from fusion_hf.common.errors import InputError


class InsteadOf(argparse.Action):
    """An option whose value makes required arguments unnecessary."""

    def __init__(self, *args: Any, others: Sequence[argparse.Action], **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.others = others

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        for other in self.others:
            other.required = False  # read after all arguments are; each command line has its own parser
        setattr(namespace, self.dest, values)


def add_parser(commands: Any) -> None:
    """Tell the command line about `ask`."""
    parser = commands.add_parser(
        "ask",
        parents=[model_options()],
        help="answer a question about one or more images, or a file of questions",
        description="Answer a question about one image, or about several: one line for each, after its name. Or "
        "answer a file of questions: a run that was killed goes on with the same command.",
    )
    images = parser.add_argument("images", nargs="+", metavar="IMAGE", help="an image file, or an http(s) address")
    question = parser.add_argument("question", metavar="QUESTION", help="in quotation marks")
    parser.add_argument(
        "--input",
        action=InsteadOf,
        others=(images, question),
        metavar="JSONL",
        help='instead of both, a file with a record per line: {"question", "image" (optional), "id" (optional)}',
    )
    parser.add_argument("--output", metavar="JSONL", help='with --input: a new file for {"id", "answer" or "error"}')
    parser.add_argument(
        "--batch-size", type=positive, metavar="N", help="with --input: questions answered together; default: 8"
    )
    parser.add_argument(
        "--also",
        action="append",
        default=[],
        metavar="QUESTION",
        help="another question about the same images, answered by itself in a line of its own; may be repeated",
    )


def run(arguments: argparse.Namespace) -> int:
    """Answer; returns the exit status. An image that cannot be read does not keep the others from being answered."""
    ask_file.check_arguments(arguments)
    if arguments.input is not None:
        return ask_file.run(arguments)
    questions = [arguments.question, *arguments.also]
    for question in questions:
        check_question(question)
    for image in arguments.images:
        check_image_exists(image)
    arguments.model = find_model(arguments)

    from tqdm import tqdm

    from fusion_hf.cli.model_loading import AnswerStreamer, load_chat_model
    from fusion_hf.inference.conversation import Conversation

    chat_model = load_chat_model(arguments)
    settings = {
        "max_new_tokens": arguments.max_new_tokens,
        "query_len": arguments.query_len,
        "image_token_grid": arguments.image_token_grid,
    }
    if len(arguments.images) == len(questions) == 1:
        conversation = Conversation(chat_model, chat_model.open_image(arguments.images[0]), **settings)
        conversation.ask(arguments.question, AnswerStreamer(chat_model.processor.tokenizer))
        return 0

    status = 0
    for source in tqdm(arguments.images, desc="ask", unit="image", disable=None):  # no bar where there is no terminal
        try:
            image = chat_model.open_image(source)
        except InputError as error:
            tqdm.write(f"error: {one_line(error)}", file=sys.stderr)
            status = USER_ERROR
            continue
        name = f"{source}: " if len(arguments.images) > 1 else ""
        for answer in chat_model.answer_each(image, questions, **settings):
            line = " ".join(printable(f"{name}{answer}").split("\n"))
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()
    return status
