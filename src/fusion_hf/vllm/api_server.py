"""vLLM's OpenAI server with the settings that FUSION needs, behind [`RequestMiddleware`]."""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from vllm.entrypoints.launchers.api_server.entry import run_server_worker
from vllm.platforms import current_platform
from vllm.utils.argparse_utils import FlexibleArgumentParser

from fusion_hf.common.errors import InputError
from fusion_hf.model.configuration_fusion import FusionConfig
from fusion_hf.serving.server import BoundedProtocol, address_of, listen
from fusion_hf.vllm.request_middleware import MiddlewareSettings, RequestMiddleware
from fusion_hf.vllm.settings import ENGINE_ARGUMENTS

try:
    from vllm.entrypoints.common.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.common.startup import cli_env_setup
except ModuleNotFoundError:  # vLLM 0.32
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup

# one step of an accelerator may take several prompts, each as a whole; a CPU is busy with one
TOKENS_PER_STEP = 0 if current_platform.is_cpu() else 8192


@dataclass(frozen=True)
class ServerOptions:
    """
    model: a folder or a repository of the Hub.
    dtype: as vLLM names it.
    engine_arguments: further options, as vLLM's own command takes them.
    """

    model: str
    host: str
    port: int
    dtype: str
    middleware: MiddlewareSettings
    engine_arguments: Sequence[str] = ()


def serve(options: ServerOptions) -> None:
    """
    Serve until the process is told to end.

    Raises:
        InputError: if the address is taken.
        ValueError: vLLM's, for settings that it or FUSION refuses.
    """
    cli_env_setup()
    listener = listen(options.host, options.port)
    address = address_of(listener)
    middleware = replace(options.middleware, address=address)
    middleware.to_environment()
    arguments = parse(server_arguments(options))
    try:
        asyncio.run(run_server_worker(address, listener, arguments, http=BoundedProtocol))
    except KeyboardInterrupt:  # which is how a person ends it
        pass
    finally:
        listener.close()


def server_arguments(options: ServerOptions) -> list[str]:
    """Return the command line for vLLM's server; the user's own arguments come last, and win."""
    limits = options.middleware.limits
    # the same answers as of FUSION's own server: the most likely one, unless a client asks for another
    defaults = {"temperature": 0.0, "max_new_tokens": limits.answer_tokens}
    length = model_length(options.model, limits.prompt_tokens + limits.answer_tokens)
    values: dict[str, Any] = {
        "model": options.model,
        "served-model-name": options.middleware.name,
        "host": options.host,
        "port": options.port,
        "dtype": options.dtype,
        "max-model-len": length,
        # the longest prompt fits in beside all answers that are being written
        "max-num-batched-tokens": max(length + limits.parallel, TOKENS_PER_STEP),
        "max-num-seqs": limits.parallel,
        "override-generation-config": json.dumps(defaults),
        "middleware": f"{RequestMiddleware.__module__}.{RequestMiddleware.__qualname__}",
        "uvicorn-log-level": "warning",
    }
    flags = [f"--{'' if wanted else 'no-'}{name.replace('_', '-')}" for name, wanted in ENGINE_ARGUMENTS.items()]
    # the renderer takes two numbers of them, which it checks
    flags.append("--trust-request-mm-kwargs")
    return [*(f"--{name}={value}" for name, value in values.items()), *flags, *options.engine_arguments]


def model_length(model: str, wanted: int) -> int:
    """The longest prompt with its answer, in tokens: what is wanted, unless the model was trained with less."""
    return min(wanted, FusionConfig.from_pretrained(model).text_config.max_position_embeddings)


def parse(arguments: Sequence[str]) -> Any:
    """Parse a command line as vLLM does, or raise an `InputError` for what it does not know."""
    parser = make_arg_parser(FlexibleArgumentParser(prog="fusion-hf serve --engine vllm --"))
    try:
        parsed = parser.parse_args(list(arguments))
    except SystemExit as error:  # the parser has said on standard error what is wrong
        raise InputError("vLLM does not take these arguments.") from error
    validate_parsed_serve_args(parsed)
    return parsed
