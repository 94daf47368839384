"""Validation of settings: types, ranges and rules; an error is one sentence that names the setting.

The schema of a verb is a pydantic model of `specbench.cli.settings`. Arguments of a class that the configuration names
(`_target_`) have theirs in the signature of that class, from which a model is made here. `--help` prints the
annotations of the models.
"""

from __future__ import annotations

import inspect
import math
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from pydantic.fields import FieldInfo

from specbench.cli import source_signatures
from specbench.cli.errors import nearest
from specbench.ranges import Among

STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, protected_namespaces=(), validate_by_name=True)
SECRET = ("api_key", "password", "token")
# Groups whose values are taken from other settings.
RAW = (("model",),)
PARTS = {bool: "true or false", str: "a text", type(None): "null", dict: "a mapping", Any: "any value"}


class Settings(BaseModel):
    """A group of settings: whole numbers are whole numbers, no text is read as a number, and nothing else is known."""

    model_config = STRICT


@dataclass(frozen=True)
class Told:
    """A description of the values of a setting, if its type alone is not sufficient."""

    text: str


@dataclass(frozen=True)
class Built:
    """Marks a mapping of arguments: of `of`, or of what its own `_target_` names, which must then be a `kind`.

    `given` are the arguments that the program passes itself, which therefore cannot be set. What is `tried` is built
    and thrown away, for rules that only its constructor knows.
    """

    of: str | None = None
    kind: str | None = None
    given: tuple[str, ...] = ()
    tried: bool = False


def check(
    model: type[BaseModel], settings: Mapping[str, Any], where: str = "", later: list[Callable[[], None]] | None = None
) -> None:
    """Raise ValueError for the first setting of `settings` that does not satisfy `model`; `where`: prefix of its
    name. What must be built to be judged is added to `later`, or built here at the end."""
    tries: list[Callable[[], None]] = [] if later is None else later
    try:
        model.model_validate(dict(settings))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        if first["type"] == "value_error" and first["loc"] in RAW:  # it may follow from another group's wrong value
            _check_inner(model, settings, where, tries)
        raise ValueError(_told(model, settings, error, where)) from None
    _check_inner(model, settings, where, tries)
    if later is None:  # what has to be imported and built comes after everything that can be read
        for attempt in tries:
            attempt()


def _check_inner(
    model: type[BaseModel], settings: Mapping[str, Any], where: str, tries: list[Callable[[], None]]
) -> None:
    for path, built, found in _arguments(model, settings):
        check_arguments(built, found, f"{where}{path}", tries)


def check_arguments(built: Built, found: Mapping[str, Any], where: str, tries: list[Callable[[], None]]) -> None:
    """The same for a mapping of arguments, and for those inside it that name classes themselves; what is to be built
    and thrown away is added to `tries`."""
    name = built.of or found.get("_target_")
    if not isinstance(name, str):
        raise ValueError(f"{where}._target_={show(name)}: takes the dotted name of a class")
    _signature(name, f"{where}._target_")
    if built.kind is not None and not _is_a(name, built.kind):
        raise ValueError(f"{where}._target_={name}: takes a {built.kind.rpartition('.')[2]}, which this is not")
    model = arguments_of(name, built.given, f"{where}._target_")
    own = {key: value for key, value in found.items() if key != "_target_" or built.of is not None}
    own = {key: value for key, value in own.items() if key not in ("_convert_", "_recursive_", "_partial_")}
    check(model, own, f"{where}.", tries)
    if built.tried:
        tries.append(partial(_try, name, own, where))
    for key, value in own.items():
        for inner, below in _named(value, f"{where}.{key}"):
            check_arguments(Built(), below, inner, tries)


def _try(name: str, own: Mapping[str, Any], where: str) -> None:
    try:
        located(name, where)(**own)
    except ValueError as error:
        raise ValueError(f"{where}={show(own)}: {error}") from None


def _named(value: Any, where: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The mappings that name a class, at `where` or below it in other mappings."""
    if isinstance(value, Mapping):
        if "_target_" in value:
            yield where, value
        else:
            for key, below in value.items():
                yield from _named(below, f"{where}.{key}")


def _arguments(model: type[BaseModel], settings: Mapping[str, Any]) -> Iterator[tuple[str, Built, Mapping[str, Any]]]:
    """Every mapping of arguments in `settings`, by its path."""
    for name, field in model.model_fields.items():
        key = field.alias or name
        value = settings.get(key)
        if not isinstance(value, Mapping):
            continue
        built = _built(field.annotation, field.metadata)
        if built is not None:
            yield key, built, value
            continue
        each = _each(field.annotation)
        if each is not None:
            yield from ((f"{key}.{item}", each, below) for item, below in value.items() if isinstance(below, Mapping))
            continue
        for inner in _models(field.annotation):
            several = inner not in _direct(field.annotation)
            for item, below in value.items() if several else [(None, value)]:
                if isinstance(below, Mapping):
                    for path, mark, found in _arguments(inner, below):
                        yield f"{key}.{path}" if item is None else f"{key}.{item}.{path}", mark, found


def _built(annotation: Any, metadata: Sequence[Any]) -> Built | None:
    return next((m for m in _flat(metadata) if isinstance(m, Built)), None) or _mark(annotation)


def _mark(annotation: Any) -> Built | None:
    """The mark inside `Annotated[...] | None`."""
    if get_origin(annotation) is Annotated:
        return next((m for m in get_args(annotation)[1:] if isinstance(m, Built)), None)
    if _is_union(annotation):
        return next((found for part in get_args(annotation) if (found := _mark(part))), None)
    return None


def _each(annotation: Any) -> Built | None:
    """The mark of the values of a mapping, `dict[str, Annotated[...]]`."""
    return _mark(get_args(annotation)[1]) if get_origin(annotation) is dict else None


def _direct(annotation: Any) -> list[type[BaseModel]]:
    """The models that a value itself may be."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) is Annotated:
        return _direct(get_args(annotation)[0])
    return [m for part in get_args(annotation) for m in _direct(part)] if _is_union(annotation) else []


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The models in an annotation, at whatever depth."""
    found = _direct(annotation)
    return found or [m for part in get_args(annotation) for m in _models(part)]


def _is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, types.UnionType)


@cache
def arguments_of(name: str, given: tuple[str, ...] = (), setting: str = "_target_") -> type[BaseModel]:
    """The model of the arguments of the class or function `name`, less those that are `given` to it.

    Errors: ValueError naming `setting` where there is no such class.
    """
    fields: dict[str, Any] = {}
    for parameter, scope in _signature(name, setting):
        if parameter.name in given or parameter.name in fields:
            continue
        default = ... if parameter.default is inspect.Parameter.empty else parameter.default
        # Defaults are for constructors: here they only say that an argument may be left out.
        kind = _plain(_evaluated(parameter.annotation, scope))
        kind = kind | None if default is None and kind is not Any else kind
        alias = (
            {"alias": parameter.name} if parameter.name.startswith("_") or hasattr(BaseModel, parameter.name) else {}
        )
        own = f"argument_{parameter.name.lstrip('_')}" if alias else parameter.name
        fields[own] = (kind, Field(default if default is ... else None, validate_default=False, **alias))
    return create_model(name.rpartition(".")[2], __config__=STRICT, **fields)


def _signature(name: str, setting: str) -> Iterable[tuple[inspect.Parameter, Mapping[str, Any]]]:
    """The parameters of `name`: from its source text where that says them, which takes no import, else from itself."""
    try:
        return [(parameter, {}) for parameter in source_signatures.parameters(name)]
    except source_signatures.Undecided:
        return _parameters(located(name, setting))


def located(name: str, setting: str) -> Any:
    """The class or function of a dotted name."""
    from hydra.utils import get_object

    try:
        return get_object(name)
    except Exception as error:
        raise ValueError(f"{setting}={name}: there is no such class ({type(error).__name__}: {error})") from error


def _is_a(name: str, kind: str) -> bool:
    """Whether `name` is the class `kind`, one derived from it, or one of its class methods."""
    try:
        if kind in source_signatures.lineage(name):
            return True
    except source_signatures.Undecided:
        pass
    found, wanted = located(name, "_target_"), located(kind, "_target_")
    found = getattr(found, "__self__", found)
    return isinstance(found, type) and issubclass(found, wanted)


def _parameters(called: Any) -> Iterator[tuple[inspect.Parameter, Mapping[str, Any]]]:
    """Named parameters with the module that their annotations are to be read in; constructors pass on what they do not
    name themselves."""
    if not isinstance(called, type):
        scope = getattr(inspect.unwrap(getattr(called, "__func__", called)), "__globals__", {})
        yield from ((p, scope) for p in inspect.signature(called).parameters.values())
        return
    for part in called.__mro__:
        constructor = vars(part).get("__init__")
        if constructor is None or part is object:
            continue
        scope = vars(inspect.getmodule(part))
        parameters = list(inspect.signature(constructor).parameters.values())[1:]
        yield from ((p, scope) for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            return


def _evaluated(annotation: Any, scope: Mapping[str, Any]) -> Any:
    """An annotation as an object; Any where its names are for type checkers alone."""
    if not isinstance(annotation, str):
        return Any if annotation is inspect.Parameter.empty else annotation
    try:
        return eval(annotation, dict(scope))  # the source text of an installed class, as typing.get_type_hints reads it
    except NameError:
        return Any


def _plain(annotation: Any) -> Any:
    """The annotation as a configuration can satisfy it: lists for sequences, and anything for objects."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if annotation is str:
        return Annotated[str, Field(min_length=1)]
    if annotation in (int, float, bool, type(None), None, Any):
        return annotation
    if origin is Literal:
        return annotation
    if origin is Annotated:
        base = inner[0] if inner[0] is str else _plain(inner[0])
        return Any if base is Any else Annotated[(base, *inner[1:])]
    if _is_union(annotation):
        kinds = [_plain(part) for part in inner if getattr(part, "__name__", "") not in ("Path", "ndarray", "device")]
        return Any if Any in kinds else Union[tuple(kinds)]  # noqa: UP007 - made of a list
    if origin in (list, tuple, Sequence, typing.Sequence) or annotation in (list, tuple):
        parts = [_plain(part) for part in inner if part is not Ellipsis]
        return list[parts[0]] if parts else list
    if origin in (dict, Mapping) or annotation in (dict, Mapping):
        return dict[str, _plain(inner[1])] if len(inner) == 2 and inner[0] is str else dict
    return Any


def _told(model: type[BaseModel], settings: Mapping[str, Any], error: ValidationError, where: str) -> str:
    """The sentence of a model's first error."""
    first = error.errors(include_url=False)[0]
    path, value = _path(settings, first["loc"])
    key = where + ".".join(path) if path else where.rstrip(".")
    if first["type"] == "missing":
        # Where the alternatives of a union disagree, the one named last says least.
        missing = str(first["loc"][-1])
        return f"{f'{key}.' if path else where}{missing} must be given"
    kind, known = annotation_at(model, path[:-1])[0], ()
    if first["type"] == "extra_forbidden":
        for inner in [*_direct(kind), *(m for m in _models(kind) if m not in _direct(kind))] or [model]:
            known = [field.alias or name for name, field in inner.model_fields.items()]
        there = f"{nearest(path[-1], known)} (there are {', '.join(known)})"
        return f"{key}={show(value, key)}: there is no such setting{there}"
    if first["type"] in ("value_error", "assertion_error"):
        said = str(first["ctx"]["error"])
        if not path:
            return said
        return f"{key}={show(value, key)}: {said}" if not isinstance(value, Mapping) else f"{key}: {said}"
    annotation, metadata = annotation_at(model, path)
    return f"{key}={show(value, key)}: takes {describe(annotation, metadata)}"


def _path(settings: Mapping[str, Any], loc: Sequence[int | str]) -> tuple[list[str], Any]:
    """Where an error lies, as keys, and the value there: lists are settings as a whole, and names of a union's parts
    are no keys."""
    path: list[str] = []
    value: Any = settings
    for part in loc:
        if isinstance(value, Mapping) and part in value:
            value = value[part]
            path.append(str(part))
        elif not isinstance(value, Mapping):
            break
    return path, value


def annotation_at(
    model: type[BaseModel], path: Sequence[str], settings: Mapping[str, Any] | None = None
) -> tuple[Any, Sequence[Any]]:
    """The annotation of the setting at `path` with its metadata; (Any, ()) where the schema ends before.

    `settings` say which class takes the arguments of a group; without them it is the one that all of its kind are.
    """
    annotation, metadata, value = model, (), settings or {}
    for part in path:
        inner, built = _direct(annotation), _built(annotation, metadata)
        if built is not None:
            name = built.of or value.get("_target_") or built.kind
            inner = [arguments_of(name, built.given)] if isinstance(name, str) else []
        if inner:
            found = [f for m in inner for name, f in m.model_fields.items() if part in (f.alias, name)]
            if not found:
                return Any, ()
            annotation, metadata = found[0].annotation, found[0].metadata
        else:
            below = [kind for kind in _alternatives(annotation) if get_origin(kind) is dict]
            annotation, metadata = (get_args(below[0])[1], ()) if below else (Any, ())
        value = value.get(part)
        value = value if isinstance(value, Mapping) else {}
        if "_target_" in value and annotation is Any:
            annotation, metadata = dict[str, Any], (Built(),)
    return annotation, metadata


def _alternatives(annotation: Any) -> list[Any]:
    if get_origin(annotation) is Annotated:
        return _alternatives(get_args(annotation)[0])
    return [a for part in get_args(annotation) for a in _alternatives(part)] if _is_union(annotation) else [annotation]


def takes_text(model: type[BaseModel], path: Sequence[str]) -> bool:
    """Whether the setting at `path` is a text, and numbers and booleans are not allowed."""
    kinds = set(_alternatives(annotation_at(model, path)[0]))
    return str in kinds and kinds <= {str, type(None)}


def describe(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """The values of a setting in words: `a whole number from 1 to 512, or null`."""
    metadata = _flat(metadata)
    if told := next((m.text for m in metadata if isinstance(m, (Told, Among))), None):
        return told
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return describe(inner[0], [*metadata, *inner[1:]])
    if _is_union(annotation):
        parts = list(inner)
        null = type(None) in parts
        if {int, float} <= set(parts):
            parts.remove(int)
        words = [describe(part, metadata) for part in parts if part is not type(None)]
        return ", or ".join([*dict.fromkeys(words), *(["null"] if null else [])])
    if annotation in (int, float):
        return _range("a whole number" if annotation is int else "a number", metadata)
    if origin is Literal:
        return "one of " + ", ".join(map(show, inner))
    if origin is list or annotation is list:
        return f"a list in brackets, as in [1,2], of {_several(describe(inner[0]))}" if inner else "a list in brackets"
    if origin is dict:
        return f"a mapping of names to {_several(describe(inner[1]))}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"a group of settings: {', '.join(f.alias or n for n, f in annotation.model_fields.items())}"
    return PARTS.get(annotation, "a value of its class")


def _several(text: str) -> str:
    """The plural of a description."""
    for one, many in (("a whole number", "whole numbers"), ("a number", "numbers"), ("a text", "texts")):
        if text.startswith(one):
            return many + text.removeprefix(one)
    return text


def _range(what: str, metadata: Sequence[Any]) -> str:
    """`a number above 0, at most 1`."""
    found = {name: getattr(m, name) for m in metadata for name in ("gt", "ge", "lt", "le") if hasattr(m, name)}
    if "ge" in found and "le" in found:
        return f"{what} from {show(found['ge'])} to {show(found['le'])}"
    words = {"gt": "above", "ge": "of at least", "lt": "below", "le": "at most"}
    said = ", ".join(f"{words[name]} {show(found[name])}" for name in words if name in found)
    return f"{what} {said}".strip()


def _flat(metadata: Sequence[Any]) -> list[Any]:
    """Constraints out of the fields that hold them."""
    return [inner for m in metadata for inner in (m.metadata if isinstance(m, FieldInfo) else [m])]


def show(value: Any, key: str = "") -> str:
    """A value as typed, in at most about eighty characters, without keys and passwords."""
    if key.rpartition(".")[2] in SECRET:
        return "..."
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float):
        return f"{value:g}" if math.isfinite(value) and float(f"{value:g}") == value else str(value)
    if isinstance(value, (list, tuple)):
        text = "[" + ",".join(map(show, value)) + "]"
    elif isinstance(value, Mapping):
        text = "{" + ", ".join(f"{k}: {show(v, str(k))}" for k, v in value.items()) + "}"
    elif isinstance(value, int):
        text = str(value) if abs(value) < 10**40 else "a number of more than 40 digits"
    else:
        text = str(value) or "''"
    return text if len(text) <= 80 else f"{text[:76]} ..."
