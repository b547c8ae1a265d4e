"""The command, and snippets, in processes that are forked from one that has imported everything.

A process of its own takes seconds to import torch; this server forks one in no time, and has no state of other tests.
It is no place for what depends on a fresh interpreter: its environment, its streams' encoding, or what it imports.
"""

import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path

SECONDS = 300  # a hung process fails its test
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.helpers.forked_imports"])


def start_forked(
    arguments: Sequence[object],
    folder: Path,
    cwd: Path | None = None,
    stdin: str = "",
    file_size_limit: int | None = None,
    new_session: bool = False,
    is_code: bool = False,
) -> ForkServerProcess:
    """
    Begin `fusion-hf ARGUMENTS`.

    Args:
        arguments: or, with `is_code`, a single text, which is run as a script.
        folder: gets its streams, `stdin.txt`, `stdout.txt` and `stderr.txt`.
        cwd: default: this process's.
        file_size_limit: writing larger files fails in the process.
        new_session: whether signals to its group reach it and its children alone.
    """
    (folder / "stdin.txt").write_text(stdin, encoding="utf-8")
    words = [str(argument) for argument in arguments]
    process = SERVER.Process(
        target=_run, args=(words, folder, cwd or Path.cwd(), file_size_limit, new_session, is_code)
    )
    process.start()
    return process


def run_forked(
    arguments: Sequence[object],
    cwd: Path | None = None,
    stdin: str = "",
    file_size_limit: int | None = None,
    is_code: bool = False,
) -> subprocess.CompletedProcess[str]:
    """What `fusion-hf ARGUMENTS` gives, or a script with `is_code`."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        process = start_forked(arguments, folder, cwd, stdin, file_size_limit, is_code=is_code)
        process.join(SECONDS)
        if process.is_alive():
            process.kill()
            raise AssertionError(f"it hangs: {arguments}")
        assert process.exitcode is not None
        out, err = ((folder / f"{stream}.txt").read_text(encoding="utf-8") for stream in ("stdout", "stderr"))
        return subprocess.CompletedProcess(list(arguments), process.exitcode, out, err)


def _run(
    words: list[str], folder: Path, cwd: Path, file_size_limit: int | None, new_session: bool, is_code: bool
) -> None:
    from fusion_hf.cli import main

    assert "torch" in sys.modules, "the server has imported nothing"
    if new_session:
        os.setsid()
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        flags = os.O_RDONLY if name == "stdin" else os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        os.dup2(os.open(folder / f"{name}.txt", flags), number)
    sys.stdin = os.fdopen(0, encoding="utf-8")  # multiprocessing has put nothing in its place
    os.chdir(cwd)
    if file_size_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size_limit, file_size_limit))
    sys.modules["torch"].set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of data workers, as in a command that no server forked
    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.argv = ["fusion-hf", *words]
    if is_code:
        exec(compile(words[0], "<snippet>", "exec"), {"__name__": "__main__"})
        sys.stdout.flush()
    else:
        sys.exit(main(words))
