"""Parameters of classes and functions, read from their source text: no import, so that help and mistakes need no torch.

Importing a method's class takes seconds, for torch and transformers; its source says the same in milliseconds. What the
text alone does not decide is `Undecided`, and the caller imports. A test holds every class that the configurations name
against its import.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.machinery import PathFinder
from importlib.util import find_spec
from inspect import Parameter
from pathlib import Path
from typing import Any

# Packages whose modules are read, and those that are so small that they are imported.
READ = ("specbench", "lightning")
IMPORTED = ("pydantic", "pydantic_core", "typing_extensions")
LIGHT = ("specbench.ranges",)
KINDS = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
# Bases of other libraries that add no parameters to a constructor.
PLAIN_BASES = ("abc.ABC", "typing.Protocol", "typing.Generic", "torch.nn.Module", "builtins.object")
Definition = ast.FunctionDef | ast.ClassDef


class Undecided(Exception):
    """The source text does not say it."""


class _Unread(type):
    """What stands for something of a library that is not imported: a type that can be named in annotations."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _unread(name)

    def __getitem__(cls, item: object) -> Any:
        return cls


@cache
def _unread(name: str) -> Any:
    return _Unread(name, (), {})


class _Names(dict):
    """The names of a module as its annotations and defaults see them."""

    def __init__(self, module: _Module) -> None:
        super().__init__()
        self.module = module

    def __missing__(self, name: str) -> Any:
        if name in self.module.imports:
            found = _imported(*self.module.imports[name])
        elif name in self.module.definitions:
            found = _unread(name)
        elif name in self.module.values:
            found = self.module.evaluated(self.module.values[name])
        elif hasattr(builtins, name):
            found = getattr(builtins, name)
        else:
            raise NameError(name)  # for type checkers alone
        self[name] = found
        return found


@dataclass(frozen=True)
class _Module:
    """A module's source: what it imports as (module, name or None), defines and assigns at its top."""

    name: str
    imports: Mapping[str, tuple[str, str | None]]
    definitions: Mapping[str, Definition]
    values: Mapping[str, ast.expr]

    def evaluated(self, expression: ast.expr) -> Any:
        """The value of an expression of the module's text. Errors: NameError; Undecided for what needs an import."""
        code = compile(ast.Expression(expression), self.name, "eval")
        try:
            return eval(code, {"__builtins__": {}}, _Names(self))  # the text of an installed module
        except NameError:
            raise
        except Exception as error:
            raise Undecided(f"{self.name}: {ast.unparse(expression)}") from error


def parameters(name: str) -> list[Parameter]:
    """The named parameters of a class's constructor or of a function, with annotations as objects (Any where they are
    for type checkers alone); of a default only whether it is there and is None.

    Errors: Undecided.
    """
    module, path = _split(name)
    definition = module.definitions.get(path[0])
    if isinstance(definition, ast.ClassDef) and len(path) == 1:
        return _constructor(module, definition)
    if isinstance(definition, ast.ClassDef) and len(path) == 2:
        for owner, part in _lineage(module, definition):
            for method in part.body:
                if isinstance(method, ast.FunctionDef) and method.name == path[1]:
                    return _all_of(owner, method)[1:]
    if isinstance(definition, ast.FunctionDef) and len(path) == 1:
        return _all_of(module, definition)
    raise Undecided(name)


def lineage(name: str) -> list[str]:
    """Dotted names of a class (or of the one whose method is named) and its bases, as they are defined, itself first.

    Errors: Undecided.
    """
    module, path = _split(name)
    definition = module.definitions.get(path[0])
    if not isinstance(definition, ast.ClassDef):
        raise Undecided(name)
    return [f"{owner.name}.{part.name}" for owner, part in _lineage(module, definition)]


def _lineage(module: _Module, definition: ast.ClassDef) -> list[tuple[_Module, ast.ClassDef]]:
    """The class and its bases, in the order in which Python looks through them where none is inherited twice."""
    found = [(module, definition)]
    for base in definition.bases:
        expression = base.value if isinstance(base, ast.Subscript) else base
        name = _dotted(module, expression)
        if name in PLAIN_BASES:
            continue
        owner, path = _split(name)
        inner = owner.definitions.get(path[0])
        if not isinstance(inner, ast.ClassDef) or len(path) > 1:
            raise Undecided(ast.unparse(base))
        found += [pair for pair in _lineage(owner, inner) if pair not in found]
    return found


def _constructor(module: _Module, definition: ast.ClassDef) -> list[Parameter]:
    """As far as constructors pass on what they do not name themselves."""
    found: dict[str, Parameter] = {}
    family = _lineage(module, definition)
    for at, (owner, part) in enumerate(family):
        written = [one for one in part.body if isinstance(one, ast.FunctionDef) and one.name == "__init__"]
        if written:
            arguments = written[0].args
            for one in _named(owner, arguments)[1:]:
                found.setdefault(one.name, one)
            if arguments.kwarg is None:
                break
        elif _is_dataclass(part):
            fields = {
                one.name: one
                for holder, base in reversed(family[at:])
                if _is_dataclass(base)
                for one in _fields(holder, base)
            }
            rest = (one for name, one in fields.items() if name not in found)
            return [*found.values(), *sorted(rest, key=lambda one: one.kind)]
    return list(found.values())


def _is_dataclass(definition: ast.ClassDef) -> bool:
    return any("dataclass" in ast.unparse(one) for one in definition.decorator_list)


def _fields(module: _Module, definition: ast.ClassDef) -> Iterator[Parameter]:
    named = "kw_only=True" in "".join(map(ast.unparse, definition.decorator_list))
    for one in definition.body:
        if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name):
            if "ClassVar" in ast.unparse(one.annotation):
                continue
            default = "" if one.value is None else ast.unparse(one.value)
            if "init=False" in default:
                continue
            kind = KINDS[named or "kw_only=True" in default]
            yield _parameter(module, one.target.id, one.annotation, one.value, kind)


def _all_of(module: _Module, function: ast.FunctionDef) -> list[Parameter]:
    if function.args.vararg is not None or function.args.kwarg is not None:
        raise Undecided(function.name)
    return _named(module, function.args)


def _named(module: _Module, arguments: ast.arguments) -> list[Parameter]:
    placed = [*arguments.posonlyargs, *arguments.args]
    defaults: list[ast.expr | None] = [None] * (len(placed) - len(arguments.defaults)) + list(arguments.defaults)
    found = [
        _parameter(module, one.arg, one.annotation, default, KINDS[0])
        for one, default in zip(placed, defaults, strict=True)
    ]
    pairs = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    return found + [_parameter(module, one.arg, one.annotation, default, KINDS[1]) for one, default in pairs]


def _parameter(
    module: _Module, name: str, annotation: ast.expr | None, default: ast.expr | None, kind: Any
) -> Parameter:
    there: Any = Parameter.empty
    if default is not None:
        there = None if isinstance(default, ast.Constant) and default.value is None else default
    found: Any = Any
    if annotation is not None:
        if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
            annotation = ast.parse(annotation.value, mode="eval").body
        try:
            found = module.evaluated(annotation)
        except NameError:
            found = Any
    return Parameter(name, kind, default=there, annotation=found)


def _dotted(module: _Module, expression: ast.expr) -> str:
    """The dotted name that a base class is written as."""
    if isinstance(expression, ast.Name):
        if expression.id in module.definitions:
            return f"{module.name}.{expression.id}"
        if expression.id in module.imports:
            where, name = module.imports[expression.id]
            return where if name is None else f"{where}.{name}"
        if hasattr(builtins, expression.id):
            return f"builtins.{expression.id}"
    elif isinstance(expression, ast.Attribute):
        return f"{_dotted(module, expression.value)}.{expression.attr}"
    raise Undecided(ast.unparse(expression))


def _split(name: str) -> tuple[_Module, list[str]]:
    """The module that defines a dotted name, followed through the packages that hand it on, and what is left of it."""
    parts = name.split(".")
    if parts[0] not in READ:
        raise Undecided(name)
    for end in range(len(parts) - 1, 0, -1):
        module = _module(".".join(parts[:end]))
        if module is None:
            continue
        rest = parts[end:]
        if rest[0] in module.definitions:
            return module, rest
        if rest[0] in module.imports:
            where, inner = module.imports[rest[0]]
            return _split(".".join([where, *([] if inner is None else [inner]), *rest[1:]]))
        break
    raise Undecided(name)


def _imported(where: str, name: str | None) -> Any:
    root = where.partition(".")[0]
    if root in sys.stdlib_module_names or root in IMPORTED or where in LIGHT:
        module = importlib.import_module(where)
        return module if name is None else getattr(module, name)
    if root in READ and name is not None:
        found = _module(where)
        if found is not None:
            try:
                return _Names(found)[name]
            except NameError as error:
                raise Undecided(f"{where}.{name}") from error
    return _unread(name or where)


@cache
def _module(name: str) -> _Module | None:
    """The source of a module that is looked up and not imported; None where there is none."""
    path: list[str] | None = None
    spec = None
    walked: list[str] = []
    for part in name.split("."):
        walked.append(part)
        # A package at the top may be found in other ways than by a path, as an editable installation is.
        spec = find_spec(part) if path is None else PathFinder.find_spec(".".join(walked), path)
        if spec is None:
            return None
        path = list(spec.submodule_search_locations or [])
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return None
    imports: dict[str, tuple[str, str | None]] = {}
    definitions: dict[str, Definition] = {}
    values: dict[str, ast.expr] = {}
    for one in ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body:
        if isinstance(one, ast.Import):
            for alias in one.names:
                where = alias.name if alias.asname else alias.name.partition(".")[0]
                imports[alias.asname or where] = (where, None)
        elif isinstance(one, ast.ImportFrom) and one.module and not one.level:
            imports |= {alias.asname or alias.name: (one.module, alias.name) for alias in one.names}
        elif isinstance(one, (ast.FunctionDef, ast.ClassDef)):
            definitions[one.name] = one
        elif isinstance(one, ast.Assign):
            values |= {target.id: one.value for target in one.targets if isinstance(target, ast.Name)}
        elif isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name) and one.value is not None:
            values[one.target.id] = one.value
    return _Module(name, imports, definitions, values)
