"""What commands write is whole or not there at all, and what cannot be written is told before the work."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest
from tests.helpers.light_runs import light_environment

from fusion_hf.common.errors import InputError, short_name
from fusion_hf.common.outputs import atomic_file, check_output, check_space, new_folder

KIBIBYTE = 2**10
SECONDS = 300
# writes as a command does, under the limit of the process
WRITE = """
import sys
from pathlib import Path
from fusion_hf.cli.terminal import guarded
from fusion_hf.common.outputs import new_folder

def write():
    with new_folder(Path("new")) as folder:
        (folder / "small").write_bytes(b"x")
        (folder / "large").write_bytes(b"x" * 100_000)
    return 0

sys.exit(guarded(write, False))
"""


def limited(folder: Path, command: list[str], size: int, **variables: str) -> subprocess.CompletedProcess[str]:
    """A process that can write no file of more than `size` bytes, as on a disk that gets full."""
    return subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=light_environment(folder) if command[0] == "-c" else None,
        capture_output=True,
        encoding="utf-8",
        timeout=SECONDS,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)),
    )


def test_half_a_folder_is_removed(tmp_path: Path):
    done = limited(tmp_path, ["-c", WRITE], 10 * KIBIBYTE)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --output: new cannot be written: File too large.\n"
    assert [path.name for path in tmp_path.iterdir()] == ["refuse"]


@pytest.mark.parametrize(
    ("arguments", "size"),
    [
        (("maps", "IMAGE", "what color is the shape?", "--output", "new"), 20 * KIBIBYTE),
        pytest.param(("export", "--output", "new"), 200 * KIBIBYTE, marks=pytest.mark.slow),
    ],
)
def test_commands_leave_nothing(tmp_path: Path, image_path: str, arguments: tuple[str, ...], size: int):
    words = [str(Path(image_path).absolute()) if word == "IMAGE" else word for word in arguments]
    done = limited(tmp_path, ["-m", "fusion_hf", *words], size)
    assert done.returncode == 2
    assert done.stderr == "error: --output: new cannot be written: File too large.\n"
    assert list(tmp_path.iterdir()) == []


def test_what_is_whole_is_kept(tmp_path: Path):
    output = tmp_path / "a" / "new"
    with new_folder(output) as folder:
        assert not output.exists()
        (folder / "file").write_text("x")
    assert (output / "file").read_text() == "x"
    assert [path.name for path in output.parent.iterdir()] == ["new"]


@pytest.mark.parametrize("kind", ["empty", "link", "dots"])
def test_folders_that_a_result_can_replace(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    monkeypatch.chdir(tmp_path / "empty")
    output = {"empty": tmp_path / "empty", "link": tmp_path / "link", "dots": Path("../empty")}[kind]
    with new_folder(output) as folder:
        (folder / "file").touch()
    assert (tmp_path / "empty" / "file").is_file() and (tmp_path / "link" / "file").is_file()


@pytest.mark.parametrize("kind", ["file", "full", "dangling", "in a file", "mount"])
def test_folders_that_none_can_replace(tmp_path: Path, kind: str):
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    (tmp_path / "dangling").symlink_to("nothing")
    places = {"in a file": tmp_path / "file" / "new", "mount": Path("/proc/sys/fs/binfmt_misc")}
    output = places.get(kind, tmp_path / kind)
    if kind == "mount" and not (output.is_mount() and not any(output.iterdir())):
        output = Path("/proc/new")  # where nobody can make a folder
    with pytest.raises(InputError) as error:
        check_output(output)
    message = str(error.value)
    assert message.startswith("--output") and short_name(str(output)) in message


def test_an_error_of_the_work_is_not_the_disks(tmp_path: Path):
    with pytest.raises(FileNotFoundError), new_folder(tmp_path / "new"):
        (tmp_path / "other" / "gone").read_bytes()
    with pytest.raises(RuntimeError, match="mine"), new_folder(tmp_path / "new"):
        raise RuntimeError("mine")
    assert list(tmp_path.iterdir()) == []


def test_space_is_asked_for_before(tmp_path: Path):
    check_space(tmp_path, 1)
    with pytest.raises(InputError, match=r"must have 1000000000\.000 GB of free space, got"):
        check_space(tmp_path, 10**18)


def test_files_are_whole_or_absent(tmp_path: Path):
    with pytest.raises(RuntimeError), atomic_file(tmp_path / "file") as stream:
        stream.write(b"half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_export_says_what_it_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from fusion_hf.cli.terminal import wrote

    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "b.onnx").write_bytes(bytes(1_500_000))
    (tmp_path / "new" / "part").mkdir()
    (tmp_path / "new" / "part" / "c.onnx").write_bytes(bytes(500_000))
    (tmp_path / "new" / "a.json").write_bytes(b"{}")
    monkeypatch.chdir(tmp_path)
    named = "b.onnx (1.5 MB), part/c.onnx (0.5 MB), 1 other files"
    assert wrote(Path("new")) == f"Wrote new: {named}; 2.0 MB in all."
