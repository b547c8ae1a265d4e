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

# a step on an accelerator may process several whole prompts, but a CPU is busy with one
TOKENS_PER_STEP = 0 if current_platform.is_cpu() else 8192


@dataclass(frozen=True)
class ServerOptions:
    """
    The options of the server.

    Attributes:
        model: a model folder or a repository of the Hub.
        host: the address to listen on.
        port: the port to listen on.
        dtype: the dtype, as vLLM names it.
        middleware: the settings of the middleware.
        engine_arguments: further options of vLLM's own command.
    """

    model: str
    host: str
    port: int
    dtype: str
    middleware: MiddlewareSettings
    engine_arguments: Sequence[str] = ()


def serve(options: ServerOptions) -> None:
    """
    Serve until the process is told to stop.

    Args:
        options: the options.

    Raises:
        InputError: if the address is in use.
        ValueError: if vLLM or FUSION rejects a setting.
    """
    cli_env_setup()
    listener = listen(options.host, options.port)
    address = address_of(listener)
    middleware = replace(options.middleware, address=address)
    middleware.to_environment()
    arguments = parse(server_arguments(options))
    try:
        asyncio.run(run_server_worker(address, listener, arguments, http=BoundedProtocol))
    except KeyboardInterrupt:  # Ctrl-C stops the server
        pass
    finally:
        listener.close()


def server_arguments(options: ServerOptions) -> list[str]:
    """
    Return the command line of vLLM's server. The user's arguments come last and take precedence.

    Args:
        options: the options.
    """
    limits = options.middleware.limits
    # as in FUSION's own server, the default is the most likely answer
    defaults = {"temperature": 0.0, "max_new_tokens": limits.answer_tokens}
    length = model_length(options.model, limits.prompt_tokens + limits.answer_tokens)
    values: dict[str, Any] = {
        "model": options.model,
        "served-model-name": options.middleware.name,
        "host": options.host,
        "port": options.port,
        "dtype": options.dtype,
        "max-model-len": length,
        # leaves room for the longest prompt next to all answers in progress
        "max-num-batched-tokens": max(length + limits.parallel, TOKENS_PER_STEP),
        "max-num-seqs": limits.parallel,
        "override-generation-config": json.dumps(defaults),
        "middleware": f"{RequestMiddleware.__module__}.{RequestMiddleware.__qualname__}",
        "uvicorn-log-level": "warning",
    }
    flags = [f"--{'' if wanted else 'no-'}{name.replace('_', '-')}" for name, wanted in ENGINE_ARGUMENTS.items()]
    # the renderer reads two numbers of the request, and checks them
    flags.append("--trust-request-mm-kwargs")
    return [*(f"--{name}={value}" for name, value in values.items()), *flags, *options.engine_arguments]


def model_length(model: str, wanted: int) -> int:
    """
    Return the maximum number of tokens of a prompt with its answer, limited by what the model was trained with.

    Args:
        model: a model folder or a repository of the Hub.
        wanted: the requested maximum.
    """
    return min(wanted, FusionConfig.from_pretrained(model).text_config.max_position_embeddings)


def parse(arguments: Sequence[str]) -> Any:
    """
    Parse a command line as vLLM does.

    Args:
        arguments: the arguments.

    Raises:
        InputError: if an argument is unknown or invalid.
    """
    parser = make_arg_parser(FlexibleArgumentParser(prog="fusion-hf serve --engine vllm --"))
    try:
        parsed = parser.parse_args(list(arguments))
    except SystemExit as error:  # the parser has written the error to the standard error
        raise InputError("vLLM rejects these arguments. See its message above.") from error
    validate_parsed_serve_args(parsed)
    return parsed
