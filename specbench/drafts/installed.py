"""The draft methods that a file can name, and their settings; nothing is imported by name."""

from __future__ import annotations

import importlib
import json
import pkgutil
from collections.abc import Mapping, Sequence
from inspect import Parameter, signature
from typing import Any, get_type_hints

from pydantic import ConfigDict, PydanticSchemaGenerationError, TypeAdapter, ValidationError

from specbench.drafts import __name__ as PACKAGE
from specbench.drafts import __path__ as FOLDER
from specbench.drafts.draft import OBJECTS, Draft


def installed() -> dict[str, type[Draft]]:
    """Dotted name -> class, of every method in this package.

    Methods are not subclasses of one another, so a class with a subclass in another module is a base class and not a
    method.
    """
    found: list[type[Draft]] = []
    for module in pkgutil.iter_modules(FOLDER):
        held = vars(importlib.import_module(f"{PACKAGE}.{module.name}")).values()
        found += [kind for kind in held if isinstance(kind, type) and issubclass(kind, Draft)]
    extended = {base for kind in found for base in kind.__bases__ if base.__module__ != kind.__module__}
    return {full_name(kind): kind for kind in found if kind not in extended and kind is not Draft}


def full_name(kind: type[Draft]) -> str:
    """The name of a method in a draft's config.json."""
    return f"{kind.__module__}.{kind.__qualname__}"


def method_named(name: Any, others: Sequence[type[Draft]] = ()) -> type[Draft]:
    """The method of a dotted name, looked up among those of this package and `others`; nothing is imported by name.

    Errors: ValueError that lists the known methods.
    """
    known = installed() | {full_name(kind): kind for kind in others}
    name = name if isinstance(name, str) else str(name)
    if name not in known and name.startswith("specbench."):  # a folder with an earlier module path
        last = name.split(".")[-2:]
        name = next((full for full in installed() if full.split(".")[-2:] == last), name)
    if name not in known:
        raise ValueError(
            f"the method {name!r} is not one of {', '.join(sorted(known))}; a file cannot say what to import: name a "
            "method of your own on the command line, as methods=[PACKAGE.MODULE.CLASS]"
        )
    return known[name]


def takes(kind: type) -> dict[str, tuple[Any, bool]]:
    """Name -> (type, whether it must be given) of the constructor's settings, those of its bases included."""
    found: dict[str, tuple[Any, bool]] = {}
    for part in kind.__mro__:
        if "__init__" not in vars(part) or part.__module__.startswith("torch."):
            continue
        hints = get_type_hints(part.__init__)
        for name, parameter in list(signature(part.__init__).parameters.items())[1:]:
            if parameter.kind not in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD):
                found.setdefault(name, (hints.get(name, Any), parameter.default is Parameter.empty))
        if not any(p.kind is Parameter.VAR_KEYWORD for p in signature(part.__init__).parameters.values()):
            break  # it passes no arguments to its bases
    return found


def checked(kind: type, settings: Any, where: str, objects: Sequence[str] = OBJECTS) -> dict[str, Any]:
    """`settings` from a file, if the constructor of `kind` takes every one of them with its type.

    Errors: ValueError naming `where`, the key and what it takes.
    """
    if not isinstance(settings, Mapping):
        raise ValueError(f"{where} is {settings!r}, not an object of settings")
    known = {name: entry for name, entry in takes(kind).items() if name not in objects}
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise ValueError(f"{where}.{unknown[0]}: {kind.__name__} takes {', '.join(sorted(known))}")
    absent = sorted(name for name, (_, needed) in known.items() if needed and name not in settings)
    if absent:
        raise ValueError(f"{where} lacks {absent[0]!r}, which {kind.__name__} needs")
    return {name: _typed(value, known[name][0], f"{where}.{name}") for name, value in settings.items()}


def _typed(value: Any, hint: Any, where: str) -> Any:
    try:
        kind = TypeAdapter(hint, config=ConfigDict(allow_inf_nan=False))
    except PydanticSchemaGenerationError as error:
        raise ValueError(f"{where} is not a setting that a file can give") from error
    try:
        return kind.validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        raise ValueError(f"{where}={json.dumps(value)[:80]}: {error.errors()[0]['msg'].lower()}") from error
