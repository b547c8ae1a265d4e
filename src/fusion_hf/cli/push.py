"""`fusion-hf push`: check a model folder and publish it on the Hub."""

import argparse
import sys
from pathlib import Path

from fusion_hf.cli.model_options import DEBUG, DEBUG_HELP, JSON_HELP, silence_hub
from fusion_hf.cli.terminal import printable
from fusion_hf.common.outputs import json_bytes


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add `push` to the subparsers of `fusion-hf`."""
    parser = commands.add_parser(
        "push",
        help="Publish a model folder on the Hub.",
        description="Check that a model folder is complete, that it holds nothing unsafe and that the model answers "
        "without this package. Then upload it in one commit. From the folder of a training run, only the model is "
        "uploaded, not the checkpoints, the log and the recipe.",
        examples=(
            "fusion-hf push --model my-model --repo-id OWNER/NAME --dry-run",
            "fusion-hf push --model my-model --repo-id OWNER/NAME --private --tag v1.0",
        ),
    )
    parser.add_argument(
        "--model", required=True, type=Path, metavar="DIR", help="A model folder, or the folder of a finished run."
    )
    parser.add_argument(
        "--repo-id",
        required=True,
        metavar="OWNER/NAME",
        help="The repository on the Hub. It is created if it does not exist.",
    )
    parser.add_argument("--private", action="store_true", help="Make the repository private if it is created.")
    parser.add_argument(
        "--tag", metavar="VERSION", help="A tag for the uploaded version, such as v1.0 (default: none)."
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="Check the folder and list the files that would be uploaded; upload nothing.",
    )
    parser.add_argument("--json", action="store_true", help=JSON_HELP)
    parser.add_argument(DEBUG, action="store_true", help=DEBUG_HELP)


def run(arguments: argparse.Namespace) -> int:
    """Check and publish the folder, and return the exit status."""
    from fusion_hf.hub import publishing

    if not arguments.debug:
        silence_hub()
    tag: str | None = arguments.tag
    if tag is not None:
        publishing.check_tag(tag)
    if arguments.dry_run:
        publishing.check_name(arguments.repo_id, "--repo-id")
    else:
        publishing.check_repository(arguments.repo_id, "--repo-id")
    files = publishing.check_files(arguments.model)
    if not arguments.dry_run:
        publishing.check_remote(arguments.repo_id, arguments.private, tag)
    if not publishing.names_licence(arguments.model):
        advice = "Add `license` to it, so that others know how they may use the model"
        sys.stderr.write(printable(f"WARNING: {arguments.model / publishing.CARD} names no licence. {advice}.\n"))
    publishing.check_alone(arguments.model)  # last, for it takes half a minute
    as_version = "" if tag is None else f" as {tag}"
    report = {
        "repo_id": arguments.repo_id,
        "tag": tag,
        "files": [{"name": file.name, "size": file.size} for file in files],
        "size": sum(file.size for file in files),
    }
    if arguments.dry_run and arguments.json:
        sys.stdout.write(json_bytes({**report, "url": None}, indent=2).decode())
        return 0
    if arguments.dry_run:
        width = len(f"{sum(file.size for file in files):,}")
        for file in files:
            sys.stdout.write(f"{file.size:>{width},}  {file.name}\n")
        sys.stdout.write(
            f"{sum(file.size for file in files):,} bytes would be sent to {arguments.repo_id}{as_version}\n"
        )
        return 0
    version = "" if tag is None else f" ({tag})"
    message = f"Upload {arguments.model.resolve().name}{version}"
    names = [file.name for file in files]
    url = publishing.upload(arguments.model, names, arguments.repo_id, arguments.private, message, tag)
    sys.stdout.write(json_bytes({**report, "url": url}, indent=2).decode() if arguments.json else f"{url}\n")
    return 0
