"""`fusion-hf ask`: one question or several about one image, or about each of several; or a file of questions."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fusion_hf.cli.argument_types import positive
from fusion_hf.cli.lean_imports import lean_imports
from fusion_hf.cli.model_options import answer_settings, find_model, model_options
from fusion_hf.cli.terminal import FAILED, USER_ERROR, check_image_exists, check_question, one_line, printable
from fusion_hf.common.errors import InputError
from fusion_hf.inference.answer_file import ANSWERS, OUTPUT_FORMATS


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
        help='instead of both, a file with a record per line: {"question", "image" (optional), "id" (optional)}, '
        "or LLaVA's question.jsonl",
    )
    parser.add_argument("--output", metavar="JSONL", help='with --input: a new file for {"id", "answer" or "error"}')
    parser.add_argument(
        "--output-format",
        choices=OUTPUT_FORMATS,
        help="with --input: llava for the lines of LLaVA's answers.jsonl; default: answers",
    )
    parser.add_argument(
        "--image-root", metavar="DIR", help="with --input: folder of the images; default: that of the file"
    )
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
    _check_arguments(arguments)
    if arguments.input is not None:
        return _answer_file(arguments)
    questions = [arguments.question, *arguments.also]
    for question in questions:
        check_question(question)
    for image in arguments.images:
        check_image_exists(image)
    arguments.model = find_model(arguments)

    with lean_imports(arguments.owns_process):
        from tqdm import tqdm

        from fusion_hf.cli.model_loading import AnswerStreamer, load_chat_model
        from fusion_hf.inference.conversation import Conversation

        chat_model = load_chat_model(arguments)
    settings = answer_settings(arguments)
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


def _check_arguments(arguments: argparse.Namespace) -> None:
    """Refuse, with an InputError, what does not go together."""
    if arguments.input is None:
        for name in ("--output", "--output-format", "--image-root", "--batch-size"):
            value = getattr(arguments, name.removeprefix("--").replace("-", "_"))
            if value is not None:
                raise InputError(f"{name} is {value}; allowed only with --input.")
        return
    if arguments.images:
        raise InputError(f"An image or a question is given, {arguments.images[0]!r}; allowed with --input: none.")
    if arguments.also:
        raise InputError(f"--also is {arguments.also[0]!r}; allowed only without --input.")
    if arguments.output is None:
        raise InputError("--output is not given; allowed with --input: a new file for the answers.")
    if arguments.image_root is not None and not Path(arguments.image_root).is_dir():
        raise InputError(f"--image-root is {arguments.image_root}; allowed: a folder of images.")


def _answer_file(arguments: argparse.Namespace) -> int:
    """Answer; returns the exit status, which tells whether a record has an error instead of an answer."""
    from fusion_hf.inference.answer_file import check_output
    from fusion_hf.inference.question_files import read_entries

    read_entries(arguments.input)
    check_output(Path(arguments.output))
    arguments.model = find_model(arguments)

    with lean_imports(arguments.owns_process):
        from fusion_hf.cli.model_loading import silence_libraries
        from fusion_hf.inference.batching import BATCH_SIZE, batch_generate

    if not arguments.debug:
        silence_libraries()
    results = batch_generate(
        arguments.input,
        arguments.model,
        arguments.output,
        batch_size=BATCH_SIZE if arguments.batch_size is None else arguments.batch_size,
        device=arguments.device,
        dtype=arguments.dtype,
        image_root=arguments.image_root,
        output_format=arguments.output_format or ANSWERS,
        **answer_settings(arguments),
    )
    errors = sum("error" in result for result in results)
    sys.stdout.write(f"{arguments.output}: {len(results) - errors} answers\n")
    if errors:
        sys.stderr.write(
            f"error: {errors} of {len(results)} records could not be answered; {arguments.output} says why.\n"
        )
    return FAILED if errors else 0
