"""Conversations made of the running Python's standard library: its source for code, its docstrings for prose.

Nothing is imported: the files are read and parsed. Every conversation names the file it came from, because the
split is by file. The tasks are narrow on purpose (finish, rename, keep in a class, test; describe, shorten, list):
a target of a million parameters is predictable on them, and drafts differ only where a target is predictable.
"""

from __future__ import annotations

import ast
import hashlib
import os
import re
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from textwrap import dedent

LEFT_OUT = {"test", "tests", "idlelib", "idle_test", "lib2to3", "site-packages", "dist-packages", "turtledemo",
            "ensurepip", "encodings", "__pycache__", "pydoc_data"}  # fmt: skip
RENAMES = {"name": "label", "value": "item", "key": "index", "data": "content", "path": "place",
           "other": "second", "text": "string", "args": "arguments", "msg": "message", "x": "number", "s": "source",
           "f": "stream", "i": "position", "n": "count", "cls": "kind", "obj": "thing", "func": "callback",
           "line": "row", "result": "answer", "file": "handle", "size": "length", "url": "address",
           "self": "this"}  # fmt: skip
CODE_CHARACTERS = 480
PROSE_CHARACTERS = 360


@dataclass(frozen=True)
class Task:
    """One exchange: `source` is the file it came from (relative, with slashes), `kind` the sort of task."""

    source: str
    name: str
    kind: str
    turns: tuple[str, ...]


@dataclass(frozen=True)
class Function:
    source: str
    module: str
    owner: str | None
    node: ast.FunctionDef
    text: str

    @property
    def name(self) -> str:
        return f"{self.owner}.{self.node.name}" if self.owner else self.node.name

    @property
    def arguments(self) -> list[tuple[str, str | None]]:
        """Names and defaults, without self or cls."""
        a = self.node.args
        plain = [*a.posonlyargs, *a.args]
        defaults = [None] * (len(plain) - len(a.defaults)) + [ast.unparse(x) for x in a.defaults]
        named = list(zip([x.arg for x in plain], defaults, strict=True))
        named += [(x.arg, d and ast.unparse(d)) for x, d in zip(a.kwonlyargs, a.kw_defaults, strict=True)]
        return [(n, d) for n, d in named if n not in ("self", "cls")]


def _fits(text: str, low: int, high: int) -> bool:
    return low <= len(text) <= high and text.isascii() and "\t" not in text and "```" not in text


def _sources(dropped: Counter[str]) -> Iterator[tuple[str, Path]]:
    """Relative name and path of every file; what is left out is counted in `dropped`."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for folder, folders, names in os.walk(root):
        dropped["folders left out"] += len(LEFT_OUT & set(folders))
        folders[:] = sorted(set(folders) - LEFT_OUT)
        for path in sorted(Path(folder, name) for name in names if name.endswith(".py")):
            yield path.relative_to(root).as_posix(), path


def fingerprint() -> str:
    """Changes with any file of the library, with the Python version, and with this module."""
    found = hashlib.sha256(f"{sys.version}\n{Path(__file__).read_text(encoding='utf-8')}".encode())
    for name, path in sorted(_sources(Counter())):
        facts = path.stat()
        found.update(f"{name} {facts.st_size} {facts.st_mtime_ns}\n".encode())
    return found.hexdigest()[:16]


@lru_cache(maxsize=1)
def parsed_modules() -> tuple[tuple[tuple[str, ast.Module, str], ...], dict[str, int]]:
    """Every parsed file as (relative name, tree, text), and how many were left out and why."""
    files, dropped = [], Counter()
    for name, path in _sources(dropped):
        try:
            text = path.read_text(encoding="utf-8")
            files.append((name, ast.parse(text), text))
        except (SyntaxError, UnicodeDecodeError):
            dropped["files that do not parse as UTF-8 Python"] += 1
    return tuple(sorted(files, key=lambda file: file[0])), dict(dropped)


def module_of(source: str) -> str:
    return source.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def functions() -> Iterator[Function]:
    """Functions of modules and methods of their classes, in file order."""
    for source, tree, text in parsed_modules()[0]:
        lines = text.splitlines()
        for node in tree.body:
            members = [(node.name, x) for x in node.body] if isinstance(node, ast.ClassDef) else [(None, node)]
            for owner, x in members:
                if isinstance(x, ast.FunctionDef):
                    body = dedent("\n".join(lines[x.lineno - 1 : x.end_lineno]))
                    yield Function(source, module_of(source), owner, x, body)


def _fence(code: str) -> str:
    return f"```python\n{code}\n```"


def _camel(name: str) -> str:
    return "".join(part[:1].upper() + part[1:] for part in name.split("_") if part)


def _rename(function: Function) -> tuple[str, str, str] | None:
    """Old name, new name and the text with it renamed, where the name is a plain word of the function only."""
    named = {x.arg for x in ast.walk(function.node.args) if isinstance(x, ast.arg)}
    for old, new in RENAMES.items():
        if old not in named:
            continue
        uses = re.findall(rf"(?<![\w.'\"-]){old}\b(?![\w'\"-])", function.text)
        every = re.findall(rf"(?<!\w){old}(?!\w)", function.text)
        if len(uses) == len(every) >= 2 and not re.search(rf"\b{new}\b", function.text):
            return old, new, re.sub(rf"\b{old}\b", new, function.text)
    return None


def _signature(arguments: list[tuple[str, str | None]]) -> str:
    return ", ".join(n if d is None else f"{n}={d}" for n, d in arguments)


def _keeper(name: str, arguments: list[tuple[str, str | None]]) -> str:
    names = [n for n, _ in arguments]
    lines = [f"class {name}:", f"    def __init__(self, {_signature(arguments)}):"]
    lines += [f"        self.{n} = {n}" for n in names]
    shown = ", ".join(f"{n}={{self.{n}!r}}" for n in names)
    equal = " and ".join(f"self.{n} == other.{n}" for n in names)
    lines += ["", "    def __repr__(self):", f'        return f"{name}({shown})"']
    lines += ["", "    def __eq__(self, other):", f"        return {equal}"]
    return "\n".join(lines)


def _tests(function: Function, names: list[str]) -> str:
    name = function.node.name
    lines = ["import unittest", f"from {function.module} import {name}", "", ""]
    lines += [f"class Test{_camel(name)}(unittest.TestCase):"]
    lines += [f"    def test_{name}(self):", f"        result = {name}({', '.join(names)})"]
    lines += ["        self.assertIsNotNone(result)"]
    for n in names:
        lines += ["", f"    def test_without_{n}(self):", "        with self.assertRaises(TypeError):"]
        lines += [f"            {name}({', '.join(m for m in names if m != n)})"]
    return "\n".join(lines)


def code_tasks() -> Iterator[Task]:
    """Finish a function, rename a name in it, keep its arguments in a class, test it."""
    for f in functions():
        name, arguments = f.node.name, f.arguments
        if _fits(f.text, 80, CODE_CHARACTERS) and f.text.count("\n") >= 2:
            lines = f.text.split("\n")
            head = "\n".join(lines[: max(1, len(lines) // 2)])
            ask = f"Complete the function `{name}` of `{f.module}`:\n\n{_fence(head)}"
            yield Task(f.source, f.name, "complete", (ask, _fence(f.text)))
        if _fits(f.text, 60, CODE_CHARACTERS // 2) and (renamed := _rename(f)):
            old, new, text = renamed
            ask = f"Rename `{old}` to `{new}`:\n\n{_fence(f.text)}"
            yield Task(f.source, f.name, "rename", (ask, _fence(text)))
        signature = _signature(arguments)
        if not (2 <= len(arguments) <= 4 and _fits(signature, 4, 80) and not name.startswith("__")):
            continue
        if f.owner is None:
            ask = f"Write a test class for `{name}({signature})` of `{f.module}`."
            yield Task(f.source, f.name, "test", (ask, _fence(_tests(f, [n for n, _ in arguments]))))
        kept = (f"Write a class `{_camel(name)}` that keeps `{signature}`.", _fence(_keeper(_camel(name), arguments)))
        call = f"{_camel(name)}({', '.join(f'{n}={n}' for n, _ in arguments)})"
        more = ("Now make an instance of it.", _fence(f"{name.strip('_')} = {call}"))
        yield Task(f.source, f.name, "class", kept + more if len(signature) % 5 == 0 else kept)


def _listing(words: list[str]) -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


def _paragraph(docstring: str | None) -> str:
    first = re.split(r"\n\s*\n", (docstring or "").strip())[0]
    return re.sub(r"\s+", " ", first)


def _sentences(paragraph: str) -> list[str]:
    return [s for s in re.split(r"(?<=[.!?])\s+(?=[A-Z`])", paragraph) if s]


def prose_tasks() -> Iterator[Task]:
    """Describe a function, shorten a paragraph, list its sentences, describe a module."""
    for source, tree, _ in parsed_modules()[0]:
        about = _paragraph(ast.get_docstring(tree))
        public = [n.name for n in tree.body if isinstance(n, ast.ClassDef) and not n.name.startswith("_")][:6]
        if _fits(about, 20, PROSE_CHARACTERS) and public:
            module = module_of(source)
            what = f"`{module}` is a module. {about}\nIts classes are {_listing([f'`{n}`' for n in public])}."
            yield Task(source, module, "module", (f"What is the module `{module}` for?", what))
    for f in functions():
        about = _paragraph(ast.get_docstring(f.node))
        if not _fits(about, 20, PROSE_CHARACTERS):
            continue
        kind = f"a method of the class `{f.owner}`" if f.owner else "a function"
        words = [f"`{n}`" if d is None else f"`{n}` (by default `{d}`)" for n, d in f.arguments]
        takes = f"It takes {_listing(words)}." if words else "It takes no arguments."
        signature = _signature(f.arguments)
        if _fits(signature or "()", 1, 100):
            describe = f"`{f.node.name}` is {kind} in the module `{f.module}`. {takes}\n{about}"
            ask = f"What does `{f.name}({signature})` of `{f.module}` do?"
            more = ("Which arguments does it take?", takes) if len(about) % 7 == 0 else ()
            yield Task(f.source, f.name, "describe", (ask, describe, *more))
        sentences = _sentences(about)
        if len(sentences) >= 2:
            listed = "\n".join(f"- {s}" for s in sentences)
            yield Task(f.source, f.name, "list", (f"Make a list of these sentences:\n\n{about}", listed))
            yield Task(f.source, f.name, "shorten", (f"Shorten this text to one sentence:\n\n{about}", sentences[0]))
