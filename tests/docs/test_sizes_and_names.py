"""What keeps the code easy to find one's way in: no name for two classes, no long function, no long file."""

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

SOURCES = Path(__file__).parents[2] / "src" / "fusion_hf"
COPIES = SOURCES / "checkpoints"
MAX_FUNCTION_LINES, MAX_FILE_LINES = 60, 600

# what is still open: shrinks to nothing
LONG_FUNCTIONS: set[str] = {
    "model/modeling_fusion.py:forward",
}
LONG_FILES: set[str] = set()


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


def find_long_functions(modules: Iterator[tuple[Path, ast.Module]]) -> set[str]:
    """`file:function` of those that have too many lines, decorators not counted."""
    return {
        f"{path.as_posix()}:{node.name}"
        for path, tree in modules
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES
    }


def test_no_two_classes_have_one_name():
    assert find_shared_names(sources()) == set()


def test_functions_are_short():
    assert find_long_functions(sources()) <= LONG_FUNCTIONS


def test_files_are_short():
    lengths = {path.as_posix(): (SOURCES / path).read_text(encoding="utf-8").count("\n") for path, _ in sources()}
    assert {path for path, length in lengths.items() if length > MAX_FILE_LINES} <= LONG_FILES


def test_what_is_wrong_is_found():
    body = "        pass\n" * MAX_FUNCTION_LINES
    first = ast.parse(f"class Same:\n    def long(self):\n{body}")
    second = ast.parse("class Same:\n    pass\ndef short():\n    pass\n")
    modules = [(Path("a.py"), first), (Path("b.py"), second)]
    assert find_shared_names(iter(modules)) == {"Same"}
    assert find_long_functions(iter(modules)) == {"a.py:long"}
