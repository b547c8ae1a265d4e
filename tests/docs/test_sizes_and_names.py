"""What keeps the code easy to find one's way in: no name for two classes, no long function, no long file."""

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

SOURCES = Path(__file__).parents[2] / "src" / "fusion_hf"
COPIES = SOURCES / "checkpoints"
MAX_FUNCTION_LINES, MAX_FILE_LINES = 60, 600


def sources() -> Iterator[tuple[Path, ast.Module]]:
    for path in sorted(SOURCES.rglob("*.py")):
        if COPIES not in path.parents:
            yield path.relative_to(SOURCES), ast.parse(path.read_text(encoding="utf-8"))


def find_shared_names(modules: Iterator[tuple[Path, ast.Module]]) -> set[str]:
    """Names of classes that stand at the beginning of a line in more than one module."""
    places = defaultdict(list)
    for path, tree in modules:
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                places[node.name].append(path)
    return {name for name, paths in places.items() if len(paths) > 1}


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of its statements: parameters and the docstring, which `forward` has many of, do not count."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


def find_long_functions(modules: Iterator[tuple[Path, ast.Module]]) -> set[str]:
    """`file:function` of those that have too many lines."""
    return {
        f"{path.as_posix()}:{node.name}"
        for path, tree in modules
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and body_lines(node) > MAX_FUNCTION_LINES
    }


def test_no_two_classes_have_one_name():
    assert find_shared_names(sources()) == set()


def test_functions_are_short():
    assert find_long_functions(sources()) == set()


def test_files_are_short():
    lengths = {path.as_posix(): (SOURCES / path).read_text(encoding="utf-8").count("\n") for path, _ in sources()}
    assert {path for path, length in lengths.items() if length > MAX_FILE_LINES} == set()


def test_what_is_wrong_is_found():
    body = "        pass\n" * (MAX_FUNCTION_LINES + 1)
    first = ast.parse(f"class Same:\n    def long(self):\n{body}")
    second = ast.parse("class Same:\n    pass\ndef short():\n    pass\n")
    modules = [(Path("a.py"), first), (Path("b.py"), second)]
    assert find_shared_names(iter(modules)) == {"Same"}
    assert find_long_functions(iter(modules)) == {"a.py:long"}
