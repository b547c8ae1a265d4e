"""`fusion-hf ask`: answer questions about one or more images, or a file of questions."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fusion_hf.cli.argument_types import positive
from fusion_hf.cli.lean_imports import lean_imports
from fusion_hf.cli.model_options import (
    IMAGE_HELP,
    JSON_HELP,
    QUESTION_HELP,
    answer_settings,
    find_model,
    model_options,
    read_sampling,
    sampling_options,
    takes_lean_imports,
)
from fusion_hf.cli.terminal import FAILED, USER_ERROR, check_image_exists, check_question, one_line, printable
from fusion_hf.common.errors import InputError
from fusion_hf.inference.answer_file import ANSWERS, OUTPUT_FORMATS
from fusion_hf.inference.sampling_options import SamplingOptions


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
    """Add `ask` to the subparsers of `fusion-hf`."""
    parser = commands.add_parser(
        "ask",
        parents=[model_options(), sampling_options()],
        help="Answer questions about images.",
        description="Answer a question about one image or several. With several images, each answer is a line that "
        "begins with the name of the image. Alternatively, answer a file of questions in batches; if the run was "
        "interrupted, the same command resumes it. The exit status is 0 if all questions were answered, 1 if a record "
        "of a file has no answer and 2 for wrong input or an image that cannot be read.",
        examples=(
            'fusion-hf ask photo.jpg "What is in the image?"',
            'fusion-hf ask photo.jpg "Describe the image." --temperature 0.7 --top-p 0.9 --seed 1',
            "fusion-hf ask --input questions.jsonl --output answers.jsonl",
        ),
    )
    images = parser.add_argument("images", nargs="+", metavar="IMAGE", help=f"{IMAGE_HELP} Give one or more.")
    question = parser.add_argument("question", metavar="QUESTION", help=QUESTION_HELP)
    parser.add_argument(
        "--input",
        action=InsteadOf,
        others=(images, question),
        metavar="JSONL",
        help='Answer the questions in this file instead. Each line is a record {"question", "image" (optional), "id" '
        "(optional)}, or a record of LLaVA's question.jsonl.",
    )
    parser.add_argument(
        "--output",
        metavar="JSONL",
        help='With --input: the file to write, which must not exist. Each line is {"id", "answer" or "error"}.',
    )
    parser.add_argument(
        "--output-format",
        choices=OUTPUT_FORMATS,
        help="With --input: the format of the output. llava writes the lines of LLaVA's answers.jsonl (default: "
        "answers).",
    )
    parser.add_argument(
        "--image-root",
        metavar="DIR",
        help="With --input: the folder of relative image paths (default: the folder of the file).",
    )
    parser.add_argument(
        "--batch-size",
        type=positive,
        metavar="N",
        help="With --input: number of questions that are answered together (default: 8).",
    )
    parser.add_argument(
        "--also",
        action="append",
        default=[],
        metavar="QUESTION",
        help="Another question about the same images, which is answered independently. May be repeated.",
    )
    parser.add_argument("--json", action="store_true", help=f"{JSON_HELP} Each answer is a line.")


def run(arguments: argparse.Namespace) -> int:
    """Answer, and return the exit status. If an image cannot be read, the others are still answered."""
    _check_arguments(arguments)
    sampling = read_sampling(arguments)
    if arguments.input is not None:
        return _answer_file(arguments, sampling)
    questions = [arguments.question, *arguments.also]
    for question in questions:
        check_question(question)
    for image in arguments.images:
        check_image_exists(image)
    arguments.model = find_model(arguments)

    with lean_imports(takes_lean_imports(arguments)):
        from tqdm import tqdm

        from fusion_hf.cli.model_loading import AnswerStreamer, load_chat_model
        from fusion_hf.inference.conversation import Conversation

        chat_model = load_chat_model(arguments)
    settings = answer_settings(arguments)
    if len(arguments.images) == len(questions) == 1 and not arguments.json:
        image = chat_model.open_image(arguments.images[0])
        conversation = Conversation(chat_model, image, sampling=sampling, **settings)
        streamer = AnswerStreamer.of(chat_model, sampling)
        answer = conversation.ask(arguments.question, streamer)
        if streamer is None:
            sys.stdout.write(f"{printable(answer)}\n")
        return 0

    status = 0
    for number, source in enumerate(
        tqdm(arguments.images, desc="ask", unit="image", disable=None)
    ):  # no bar where there is no terminal
        try:
            image = chat_model.open_image(source)
        except InputError as error:
            tqdm.write(f"error: {one_line(error)}", file=sys.stderr)
            status = USER_ERROR
            continue
        name = f"{source}: " if len(arguments.images) > 1 else ""
        own = sampling.of_answer(number * len(questions))
        for question, answer in zip(
            questions, chat_model.answer_each(image, questions, sampling=own, **settings), strict=True
        ):
            line = " ".join(printable(f"{name}{answer}").split("\n"))
            if arguments.json:
                line = json.dumps({"image": source, "question": question, "answer": answer})
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()
    return status


def _check_arguments(arguments: argparse.Namespace) -> None:
    """Refuse, with an InputError, what does not go together."""
    if arguments.input is None:
        for name in ("--output", "--output-format", "--image-root", "--batch-size"):
            value = getattr(arguments, name.removeprefix("--").replace("-", "_"))
            if value is not None:
                raise InputError(f"`{name}` is only allowed with `--input`, got {value}.")
        return
    if arguments.images:
        raise InputError(f"`--input` cannot be combined with an image or a question, got {arguments.images[0]!r}.")
    if arguments.also:
        raise InputError(f"`--also` cannot be combined with `--input`, got {arguments.also[0]!r}.")
    if arguments.output is None:
        raise InputError("`--output` is required with `--input`: a new file for the answers.")
    if arguments.image_root is not None and not Path(arguments.image_root).is_dir():
        raise InputError(f"`--image-root` must be a folder of images, got {arguments.image_root}.")


def _answer_file(arguments: argparse.Namespace, sampling: SamplingOptions) -> int:
    """Answer a file, and return the exit status, which tells whether a record has an error instead of an answer."""
    from fusion_hf.inference.answer_file import check_output
    from fusion_hf.inference.question_files import read_entries

    read_entries(arguments.input)
    check_output(Path(arguments.output))
    arguments.model = find_model(arguments)

    with lean_imports(takes_lean_imports(arguments)):
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
        bits=arguments.bits,
        image_root=arguments.image_root,
        output_format=arguments.output_format or ANSWERS,
        sampling=sampling,
        **answer_settings(arguments),
    )
    errors = sum("error" in result for result in results)
    counts = {"output": arguments.output, "answers": len(results) - errors, "errors": errors}
    text = json.dumps(counts) if arguments.json else f"{arguments.output}: {len(results) - errors} answers"
    sys.stdout.write(f"{text}\n")
    if errors:
        sys.stderr.write(
            f"error: {errors} of {len(results)} records could not be answered; {arguments.output} says why.\n"
        )
    return FAILED if errors else 0
