"""`fusion-hf serve`: serve a model with an OpenAI-compatible API."""

import argparse
import os
from pathlib import Path
from typing import Any

from fusion_hf.cli.argument_types import LARGEST_PORT, positive, whole_number
from fusion_hf.cli.model_options import find_model, model_options
from fusion_hf.common.endpoints import check_key, read_key
from fusion_hf.common.errors import InputError
from fusion_hf.common.image_hosts import HostPolicy
from fusion_hf.hub.folders import find_folder, nano_path, split_revision
from fusion_hf.serving.limits import Limits

HOST, PORT = "127.0.0.1", 8000
INSTALL = "pip install 'fusion_hf[serve]'"
INSTALL_VLLM = "pip install 'fusion_hf[serve,vllm]'"
DEFAULTS = Limits()
ENGINES = ("transformers", "vllm")
MAXIMA = {  # the limits that have an option `--max-...`
    "image_bytes": "Maximum size of an image file in bytes",
    "image_pixels": "Maximum number of pixels of an image",
    "image_seconds": "Maximum processor time for decoding an image, in seconds",
    "body_bytes": "Maximum size of a request in bytes",
    "upload_bytes": "Maximum size of all requests that are being received, in bytes",
    "prompt_tokens": "Maximum number of tokens in a prompt, with image and latent tokens",
}
PARALLEL = {"transformers": DEFAULTS.parallel, "vllm": 64}


def add_parser(commands: Any) -> None:
    """Add `serve` to the subparsers of `fusion-hf`."""
    parser = commands.add_parser(
        "serve",
        parents=[model_options()],
        help="Serve a model with an OpenAI-compatible API.",
        description="Serve a model with an OpenAI-compatible HTTP API: POST /v1/chat/completions, GET /v1/models and "
        "GET /health. Requires the extra `serve`.",
        examples=(
            "fusion-hf serve --model DIR_OR_REPO",
            "fusion-hf serve --engine vllm --model DIR_OR_REPO --concurrency 32 -- --gpu-memory-utilization 0.85",
        ),
    )
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        default=ENGINES[0],
        help="The engine: transformers, or vLLM for many concurrent clients, which requires the extra `vllm` "
        "(default: %(default)s).",
    )
    parser.add_argument(
        "--host", default=HOST, help="Address to listen on (default: %(default)s, this computer only)."
    )
    parser.add_argument(
        "--port",
        type=whole_number(0, LARGEST_PORT),
        default=PORT,
        metavar="N",
        help="Port to listen on. With 0, the system chooses a free one, which is printed (default: %(default)s).",
    )
    parser.add_argument(
        "--name",
        metavar="NAME",
        help="The name of the model in requests (default: that of its folder or repository).",
    )
    parser.add_argument(
        "--api-key-env",
        metavar="NAME",
        help="The environment variable with the API key that clients must send (default: none is required).",
    )
    parser.add_argument(
        "--allow-image-host",
        action="append",
        default=[],
        metavar="HOST[:PORT]",
        help="Fetch images from this host if its addresses are public. May be repeated (default: no host).",
    )
    parser.add_argument(
        "--allow-private-image-host",
        action="append",
        default=[],
        metavar="HOST[:PORT]",
        help="Fetch images from this host even if its addresses are private or those of this computer. May be "
        "repeated.",
    )
    _add_limits(parser)
    parser.add_argument(
        "engine_arguments",
        nargs="*",
        metavar="-- ARGUMENTS",
        help="Further options of vLLM's own server, only with --engine vllm.",
    )


def _add_limits(parser: argparse.ArgumentParser) -> None:
    """Add the options that limit the cost of requests."""
    for name, text in MAXIMA.items():
        option, value = f"--max-{name.replace('_', '-')}", getattr(DEFAULTS, name)
        parser.add_argument(option, type=positive, default=value, metavar="N", help=f"{text} (default: %(default)s).")
    parser.add_argument(
        "--concurrency",
        dest="parallel",
        type=positive,
        metavar="N",
        help="Maximum number of requests that are answered concurrently (default: "
        + ", ".join(f"{number} with {engine}" for engine, number in PARALLEL.items())
        + ").",
    )
    parser.add_argument(
        "--image-cache-bytes",
        type=whole_number(0),
        default=DEFAULTS.image_cache_bytes,
        metavar="N",
        help="Size of the cache of image features for further questions, in bytes; 0 for no cache. Not with vLLM "
        "(default: %(default)s).",
    )
    parser.add_argument(
        "--max-seconds",
        type=positive,
        metavar="N",
        help=f"Maximum time of a request in seconds, including its time in the queue. Not with vLLM (default: "
        f"{DEFAULTS.seconds}).",
    )
    parser.add_argument(
        "--queue-length",
        type=whole_number(0),
        default=DEFAULTS.queue_length,
        metavar="N",
        help="Maximum number of requests that wait in the queue. Further requests get the status 429 (default: "
        "%(default)s).",
    )


def run(arguments: argparse.Namespace) -> int:
    """Serve until the process is told to end, and return the exit status."""
    check_key(arguments.api_key_env, "--api-key-env")
    if arguments.engine == "vllm":
        _run_vllm(arguments)
        return 0
    if arguments.engine_arguments:
        given = " ".join(arguments.engine_arguments)
        raise InputError(f"Arguments behind `--` are only allowed with `--engine vllm`, got {given!r}.")
    name = arguments.name or _name(arguments.model or nano_path())
    hosts = HostPolicy.parse(arguments.allow_image_host, arguments.allow_private_image_host)
    arguments.model = find_model(arguments)
    try:
        from fusion_hf.serving.app import Service
        from fusion_hf.serving.server import listen, serve
    except ImportError as error:
        raise InputError(f"Serving requires the extra `serve` ({error}): {INSTALL}") from error
    from fusion_hf.cli.model_loading import load_chat_model

    listener = listen(arguments.host, arguments.port)  # a taken port is told before the model is loaded
    chat_model = load_chat_model(arguments)
    service = Service(
        chat_model,
        name,
        _limits(arguments),
        hosts,
        None if arguments.api_key_env is None else read_key(arguments.api_key_env),
        chat_model.token_budget(arguments.query_len, arguments.image_token_grid),
    )
    serve(service, listener)
    return 0


def _run_vllm(arguments: argparse.Namespace) -> None:
    """Serve with vLLM; an InputError for options that vLLM decides by itself, or without vLLM."""
    decided = {
        "--device": (arguments.device, "auto"),
        "--image-cache-bytes": (arguments.image_cache_bytes, DEFAULTS.image_cache_bytes),
        "--max-seconds": (arguments.max_seconds, None),
        "--load-in-8bit or --load-in-4bit": (arguments.bits, None),
    }
    for option, (value, allowed) in decided.items():
        if value != allowed:
            raise InputError(
                f"`{option}` is not allowed with `--engine vllm`, which decides by itself, got {value!r}."
            )
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # read when vLLM is imported
    try:
        from fusion_hf.vllm.api_server import ServerOptions, serve
        from fusion_hf.vllm.request_middleware import MiddlewareSettings
    except ImportError as error:
        raise InputError(
            f"`--engine vllm` requires the extras `serve` and `vllm` ({error}): {INSTALL_VLLM}"
        ) from error
    name = str(arguments.model or nano_path())
    middleware = MiddlewareSettings(
        name=arguments.name or _name(name),
        api_key_env=arguments.api_key_env,
        public_hosts=arguments.allow_image_host,
        private_hosts=arguments.allow_private_image_host,
        query_len=arguments.query_len,
        image_token_grid=arguments.image_token_grid,
        limits=_limits(arguments),
    )
    model = model_of_vllm(name)
    serve(
        ServerOptions(model, arguments.host, arguments.port, arguments.dtype, middleware, arguments.engine_arguments)
    )


def model_of_vllm(name: str) -> str:
    """Name the model so that vLLM can load it: vLLM fetches a repository itself, but reads neither the authors'
    checkpoints nor a revision behind `@`."""
    from fusion_hf.hub.checkpoint_names import find_converted

    _, revision = split_revision(name)
    if revision is not None:
        return str(find_folder(name))
    return str(find_converted(name) or name)


def _name(model: str) -> str:
    folder = Path(model).expanduser()
    return folder.resolve().name if folder.is_dir() else model


def _limits(arguments: argparse.Namespace) -> Limits:
    return Limits(
        **{name: getattr(arguments, f"max_{name}") for name in MAXIMA},
        answer_tokens=arguments.max_new_tokens,
        image_cache_bytes=arguments.image_cache_bytes,
        parallel=arguments.parallel or PARALLEL[arguments.engine],
        queue_length=arguments.queue_length,
        seconds=arguments.max_seconds or DEFAULTS.seconds,
    )
