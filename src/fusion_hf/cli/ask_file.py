"""`fusion-hf ask --input QUESTIONS --output ANSWERS`: a file of questions."""

import argparse
import sys
from pathlib import Path

from fusion_hf.cli.models import find_model
from fusion_hf.cli.terminal import FAILED
from fusion_hf.common.errors import InputError


def check_arguments(arguments: argparse.Namespace) -> None:
    """
    Raises:
        InputError: if what is given does not go together.
    """
    if arguments.input is None:
        for name, value in (("--output", arguments.output), ("--batch-size", arguments.batch_size)):
            if value is not None:
                raise InputError(f"{name} is {value}; allowed only with --input.")
        return
    if arguments.images:
        raise InputError(f"An image or a question is given, {arguments.images[0]!r}; allowed with --input: none.")
    if arguments.also:
        raise InputError(f"--also is {arguments.also[0]!r}; allowed only without --input.")
    if arguments.output is None:
        raise InputError("--output is not given; allowed with --input: a new file for the answers.")


def run(arguments: argparse.Namespace) -> int:
    """Answer; returns the exit status, which tells whether a record has an error instead of an answer."""
    from fusion_hf.inference.answer_file import check_output
    from fusion_hf.inference.question_records import read_entries

    read_entries(arguments.input)
    check_output(Path(arguments.output))
    arguments.model = find_model(arguments)

    from fusion_hf.cli.model_loading import silence_libraries
    from fusion_hf.inference.batching import BATCH_SIZE, batch_generate

    if not arguments.debug:
        silence_libraries()
    results = batch_generate(
        arguments.input,
        arguments.model,
        arguments.output,
        batch_size=BATCH_SIZE if arguments.batch_size is None else arguments.batch_size,
        max_new_tokens=arguments.max_new_tokens,
        query_len=arguments.query_len,
        image_token_grid=arguments.image_token_grid,
        device=arguments.device,
        dtype=arguments.dtype,
    )
    errors = sum("error" in result for result in results)
    sys.stdout.write(f"{arguments.output}: {len(results) - errors} answers\n")
    if errors:
        sys.stderr.write(
            f"error: {errors} of {len(results)} records could not be answered; {arguments.output} says why.\n"
        )
    return FAILED if errors else 0
