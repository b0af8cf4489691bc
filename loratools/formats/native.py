"""loratools' own format: one safetensors file that can say every kind of delta, so that nothing is ever lost for want of words.

The tensors lie under `NAME/FIELD`; metadata `loratools.adapter` is JSON that says of each name of the base which delta it is and
which tensor each field. spec/formats/native.md tells it exactly. A kind needs no line here: its fields are its dataclass's own.
"""

from __future__ import annotations

import importlib
import json
import math
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from functools import cache, partial
from inspect import isabstract
from typing import Any, get_type_hints

from loratools import deltas as kinds
from loratools.adapter import Adapter
from loratools.deltas.base import Delta
from loratools.deltas.seeded import Bank
from loratools.errors import FormatError, LoratoolsError, NotExpressible, UnsupportedError, raise_all
from loratools.formats._scalar import finite
from loratools.formats._typed import described, fits
from loratools.formats.base import Container, ReadOptions
from loratools.refs import Ref, Reshaped, Transposed
from loratools.tensorfile import identity

NAME = "loratools"
KEY = "loratools.adapter"  # metadata
VERSION = 1
_PARTS = {"version", "deltas", "passengers", "metadata"}


def detect(container: Container) -> bool:
    """Whether the file's metadata has the JSON of this format."""
    return KEY in container.metadata


@cache
def classes() -> dict[str, type[Delta | Bank]]:
    """Every kind of delta, and of bank they draw on, by the name of its class, which is the one spec/deltas.md gives it."""
    modules = [importlib.import_module(f"{kinds.__name__}.{module.name}") for module in pkgutil.iter_modules(kinds.__path__)]
    found = {name: value for module in modules for name, value in vars(module).items() if isinstance(value, type)}
    own = {name: kind for name, kind in found.items() if issubclass(kind, Delta | Bank) and not name.startswith("_")}
    return {name: kind for name, kind in own.items() if not isabstract(kind)}


# -- writing


def encode(adapter: Adapter) -> Container:
    """The adapter as this format's tensors and metadata; a tensor that several deltas share is written once.

    Raises NotExpressible for a field that is neither tensor, delta, text, number nor a list of such.
    """
    made = _Writing()
    table = {name: made.at(name, partial(made.delta, delta, f"{name}/")) for name, delta in adapter.items()}
    passengers = {name: made.tensor(ref, f"/{name}") for name, ref in adapter.passengers.items()}
    said = {"version": VERSION, "deltas": table, "passengers": passengers, "metadata": dict(adapter.metadata)}
    text = made.at(None, lambda: _json(said))
    raise_all(made.faults)
    return Container(made.tensors, {KEY: text or ""})


def _json(said: Mapping[str, Any]) -> str:
    try:
        return json.dumps(said, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        remedy = "leave out of its metadata what is no text, number or table of them"
        raise NotExpressible(f"not to be said in JSON: {error}", remedy=remedy) from None


@dataclass
class _Writing:
    """The tensors of a file under their keys, and what could not be said."""

    tensors: dict[str, Ref] = field(default_factory=dict)
    keys: dict[object, str] = field(default_factory=dict)
    faults: list[LoratoolsError] = field(default_factory=list)

    def at(self, name: str | None, say: Callable[[], Any]) -> Any:
        try:
            return say()
        except LoratoolsError as error:
            self.faults.append(error.at(tensor=name))
            return None

    def delta(self, delta: Delta | Bank, path: str) -> dict[str, Any]:
        name = type(delta).__name__
        if classes().get(name) is not type(delta):
            remedy = "convert it first: --kind lora, or --kind dense"
            raise NotExpressible("a kind of delta that is not loratools' own", found=name, remedy=remedy)
        return {"type": name, **{one.name: self.value(getattr(delta, one.name), path + one.name) for one in fields(delta)}}

    def value(self, value: Any, path: str) -> Any:
        if isinstance(value, Ref):
            return {"tensor": self.tensor(value, path)}
        if isinstance(value, Delta | Bank):
            return self.delta(value, f"{path}.")
        if isinstance(value, tuple):
            return [self.value(item, f"{path}.{index}") for index, item in enumerate(value)]
        if isinstance(value, Mapping) and all(isinstance(name, str) for name in value):
            return {"table": {name: self.value(item, f"{path}.{name}") for name, item in value.items()}}
        if value is None or isinstance(value, str | bool | int) or (isinstance(value, float) and math.isfinite(value)):
            return value
        fact = f"{path.rpartition('/')[2]} has a value that JSON has not"
        raise NotExpressible(fact, found=repr(value)[:60], remedy="put a finite number in its place")

    def tensor(self, ref: Ref, path: str) -> str:
        """The key a tensor is written under; the same view of the same stored tensor has one key."""
        same = _sameness(ref)
        if same not in self.keys:
            while path in self.tensors:  # names with a / in them
                path += "'"
            self.keys[same], self.tensors[path] = path, ref
        return self.keys[same]


def _sameness(ref: Ref) -> object:
    """What is equal for two views that hold the same bytes in the same order and shape, as far as that is known without reading."""
    inner = getattr(ref, "origin", None)
    if inner is None:
        return identity(ref), ref.spec
    if isinstance(ref, Reshaped | Transposed):
        return _sameness(inner), ref.spec, type(ref).__name__
    return id(ref)  # which rows it takes, and how it moves elements, only it knows


# -- reading


def decode(container: Container, options: ReadOptions | None = None) -> Adapter:
    """The adapter in a file of this format. Every tensor is part of a delta, a passenger, or named in an error."""
    try:
        said = _said(container.metadata[KEY]) if KEY in container.metadata else _fail(f"no metadata {KEY}", None)
        reading = _Reading(container.tensors)
        deltas = {name: delta for name, value in said["deltas"].items() if (delta := reading.at(name, value, Delta)) is not None}
        passengers = {name: ref for name, value in said["passengers"].items() if (ref := reading.passenger(name, value)) is not None}
        stray = [FormatError("the metadata does not say what it is", tensor=key) for key in container.tensors if key not in reading.used]
        raise_all([*reading.faults, *stray])
    except LoratoolsError as error:
        raise error.at(file=container.path) from None
    return Adapter(deltas, said["metadata"], passengers, container.path, NAME, container.files)


def _said(text: str) -> Any:
    try:
        said = json.loads(text, object_pairs_hook=_unique)
    except FormatError:
        raise
    except (ValueError, RecursionError):
        said = None
    if isinstance(said, dict) and said.get("version", VERSION) != VERSION:
        raise UnsupportedError(f"version of metadata {KEY}", found=said["version"], expected=VERSION, remedy="a newer loratools wrote it")
    if not isinstance(said, dict) or set(said) != _PARTS or not all(isinstance(said[part], dict) for part in _PARTS - {"version"}):
        _fail(f"metadata {KEY} is not what its format says", text[:60])
    if not all(isinstance(told, dict) for told in said["metadata"].values()):
        _fail(f"metadata {KEY}: what files said, by their format", str(said["metadata"])[:60], "an object for each format")
    return said


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        names = [name for name, _ in pairs]
        _fail(f"metadata {KEY} names something twice", next(name for name in names if names.count(name) > 1))
    return table


def _fail(fact: str, found: object, expected: object = None) -> Any:
    raise FormatError(fact, found=found, expected=expected)


@dataclass
class _Reading:
    """The tensors of a file, which of them were used, and every fault on the way."""

    tensors: Mapping[str, Ref]
    used: set[str] = field(default_factory=set)
    faults: list[LoratoolsError] = field(default_factory=list)

    def at(self, name: str, value: Any, kind: type) -> Any:
        try:
            found = self.value(value)
            return found if isinstance(found, kind) else _fail(f"not a {kind.__name__.lower()}", repr(value)[:60])
        except RecursionError:
            self.faults.append(FormatError("deltas within deltas without end", tensor=name))
        except LoratoolsError as error:
            self.faults.append(error.at(tensor=name))
        return None

    def passenger(self, name: str, key: Any) -> Ref | None:
        found: Ref | None = self.at(name, {"tensor": key}, Ref)
        return found

    def value(self, value: Any) -> Any:
        if isinstance(value, list):
            return tuple(self.value(item) for item in value)
        if isinstance(value, int | float) and not isinstance(value, bool) and not finite(value):
            _fail("a number that is not finite, or too large", str(value)[:40])
        if not isinstance(value, dict):
            return value
        if set(value) == {"tensor"}:
            key = value["tensor"]
            if not isinstance(key, str) or key not in self.tensors:
                _fail("a tensor that the file lacks", repr(key)[:60])
            self.used.add(key)
            return self.tensors[key]
        if set(value) == {"table"} and isinstance(value["table"], dict):
            return {name: self.value(item) for name, item in value["table"].items()}
        return self._delta(value)

    def _delta(self, said: Mapping[str, Any]) -> Delta | Bank:
        kind = classes().get(said["type"]) if isinstance(said.get("type"), str) else None
        if kind is None:
            raise UnsupportedError("a kind of delta that this version does not know", found=repr(said.get("type"))[:60])
        own, given = {one.name: one for one in fields(kind)}, {name: self.value(item) for name, item in said.items() if name != "type"}
        lacking = [name for name, one in own.items() if name not in given and one.default is MISSING and one.default_factory is MISSING]
        if lacking or given.keys() - own.keys():
            _fail(f"the fields of a {said['type']}", ", ".join(given), ", ".join(own))
        hints = get_type_hints(kind)
        for name, value in given.items():
            if not fits(value, hints[name]):
                _fail(f"{name} of a {said['type']}", repr(said[name])[:60], described(hints[name]))
        return kind(**given)
