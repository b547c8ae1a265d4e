"""What a package defines, read from its files alone: a release may be one that cannot be imported on this machine."""

import ast
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Definition:
    """A node, and the module that has it; a module's own node is an `ast.Module`."""

    module: str
    node: Any


@dataclass(frozen=True)
class Parameters:
    """
    Of a function, without `self` or `cls`.

    names: those that can be given by name, in order; `positional` of them also by place.
    required: without a default value.
    """

    names: list[str]
    positional: int
    required: set[str]
    variable: bool
    keywords: bool

    def refuse(self, call: ast.Call) -> str | None:
        """Say what is wrong with a call, if anything."""
        given = [keyword.arg for keyword in call.keywords]
        by_place = [argument for argument in call.args if not isinstance(argument, ast.Starred)]
        if len(by_place) > self.positional and not self.variable:
            return f"{len(by_place)} arguments by place, of {self.positional}"
        unknown = {name for name in given if name is not None} - set(self.names)
        if unknown and not self.keywords:
            return f"unknown: {', '.join(sorted(unknown))}"
        if None in given or len(by_place) < len(call.args):  # `*` and `**` may give the others
            return None
        missing = self.required - set(self.names[: len(by_place)]) - set(given)
        return f"missing: {', '.join(sorted(missing))}" if missing else None


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef, bound: bool) -> Parameters:
    """`bound`: the first argument is not the caller's to give."""
    given = function.args
    placed = [argument.arg for argument in [*given.posonlyargs, *given.args]]
    without_default = placed[: len(placed) - len(given.defaults)]
    named = [argument.arg for argument in given.kwonlyargs]
    pairs = zip(named, given.kw_defaults, strict=True)
    required = {*without_default, *(name for name, default in pairs if default is None)}
    first = set(placed[:1]) if bound else set()
    return Parameters(
        [name for name in [*placed, *named] if name not in first],
        len(placed) - len(first),
        required - first,
        given.vararg is not None,
        given.kwarg is not None,
    )


def is_static(function: Any) -> bool:
    return any(isinstance(each, ast.Name) and each.id == "staticmethod" for each in function.decorator_list)


def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Of a module or a class, those behind conditions too."""
    for statement in body:
        yield statement
        for name in ("body", "orelse", "finalbody"):
            if isinstance(statement, (ast.If, ast.Try)):
                yield from statements(getattr(statement, name, []))
        for handler in getattr(statement, "handlers", []):
            yield from statements(handler.body)


def assigned(statement: ast.stmt) -> list[str]:
    if isinstance(statement, ast.AnnAssign):
        targets = [statement.target]
    elif isinstance(statement, ast.Assign):
        targets = list(statement.targets)
    else:
        return []
    return [target.id for target in targets if isinstance(target, ast.Name)]


@dataclass(frozen=True)
class Sources:
    """Packages in a folder of modules, or in a wheel."""

    root: Path | zipfile.Path
    modules: dict[str, Any] = field(default_factory=dict, compare=False)

    @classmethod
    def at(cls, path: str) -> "Sources":
        return cls(zipfile.Path(path) if path.endswith(".whl") else Path(path))

    def module(self, name: str) -> ast.Module | None:
        if name not in self.modules:
            path = name.replace(".", "/")
            files = [self.root / f"{path}.py", self.root / f"{path}/__init__.py"]
            found = next((file for file in files if file.is_file()), None)
            self.modules[name] = ast.parse(found.read_text(encoding="utf-8")) if found else None
        return self.modules[name]

    def is_package(self, name: str) -> bool:
        return (self.root / f"{name.replace('.', '/')}/__init__.py").is_file()

    def find(self, module: str, name: str) -> Definition | None:
        """Where `from module import name` comes from in the end."""
        tree = self.module(module)
        if tree is None:
            return None
        for statement in statements(tree.body):
            if isinstance(statement, (ast.ClassDef, *FUNCTIONS)) and statement.name == name:
                return Definition(module, statement)
            if name in assigned(statement):
                return Definition(module, statement)
            if isinstance(statement, ast.ImportFrom) and (found := self._imported(module, statement, name)):
                return found
        inner = self.module(f"{module}.{name}")
        return Definition(f"{module}.{name}", inner) if inner else None

    def _imported(self, module: str, statement: ast.ImportFrom, name: str) -> Definition | None:
        for alias in statement.names:
            if (alias.asname or alias.name) == name:
                return self.find(self.source(module, statement), alias.name)
            if alias.name == "*" and (found := self.find(self.source(module, statement), name)):
                return found
        return None

    def source(self, module: str, statement: ast.ImportFrom) -> str:
        """The absolute name of the module that a statement imports from."""
        if not statement.level:
            return statement.module or ""
        parts = module.split(".")
        kept = parts[: len(parts) - statement.level + self.is_package(module)]
        return ".".join([*kept, *filter(None, [statement.module])])

    def members(self, cls: Definition) -> dict[str, Definition]:
        """What a class and those above it have, the class's own first; unknown classes above have nothing."""
        found: dict[str, Definition] = {}
        for statement in statements(cls.node.body):
            is_named = isinstance(statement, (ast.ClassDef, *FUNCTIONS))
            for name in [statement.name] if is_named else assigned(statement):
                found.setdefault(name, Definition(cls.module, statement))
        for base in cls.node.bases:
            plain = base.value if isinstance(base, ast.Subscript) else base
            above = self.find(cls.module, plain.id) if isinstance(plain, ast.Name) else None
            if above is not None and isinstance(above.node, ast.ClassDef):
                found = self.members(above) | found
        return found

    def value(self, module: str, name: str) -> Any:
        """The expression that a name stands for."""
        found = self.find(module, name)
        assert found is not None, f"{module} has no {name}"
        return found.node.value


@cache
def parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))
