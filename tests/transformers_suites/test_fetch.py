"""What is fetched from a package index is not trusted, and a missing index is a failure that says what to do."""

import io
import os
import sys
import tarfile
from pathlib import Path

import pytest
from tests.transformers_suites import fetch, suites


def make_archive(path: Path, names: list[str]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = len(name)
            tar.addfile(member, io.BytesIO(name.encode()))
        link = tarfile.TarInfo("root/tests/test_link.py")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    return path


def test_only_test_files_are_extracted(tmp_path: Path) -> None:
    good = ["root/tests/test_one.py", "root/tests/folder/test_two.py"]
    bad = ["root/tests/../../evil.py", "/tests/evil.py", "../tests/evil.py", "root/evil.py", "root/tests/evil.so"]
    folder = fetch.extract_tests(make_archive(tmp_path / "a.tar.gz", good + bad), tmp_path / "target" / "tests")
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file() or path.is_symlink()}
    expected = {"__init__.py", "test_one.py", "folder/test_two.py"}
    assert files == {"a.tar.gz", *(f"target/tests/{name}" for name in expected)}
    assert (folder / "test_one.py").read_text() == good[0]


def test_an_archive_without_tests_is_refused(tmp_path: Path) -> None:
    with pytest.raises(fetch.SuitesUnavailableError, match="has no folder tests"):
        fetch.extract_tests(make_archive(tmp_path / "a.tar.gz", ["root/setup.py"]), tmp_path / "tests")


def test_without_an_index_the_suites_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(fetch.CACHE_VARIABLE, str(tmp_path))
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": "", "CONFIG_FILE": os.devnull}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    for name in [name for name in sys.modules if name.partition(".")[0] == suites.PACKAGE]:
        monkeypatch.delitem(sys.modules, name)
    suite = suites.mixin("test_modeling_common", "ModelTesterMixin")
    with pytest.raises(fetch.SuitesUnavailableError, match="Run them with a package index within reach"):
        suite().test_suite_is_available()
