"""What of a path goes to the Hub, and what is left: the adapter's own files or those of a merged model, and their receipt.

Files are named by what reads them, not found by looking around: whatever else a folder holds stays where it is, and is told.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loratools.adapter import Adapter
from loratools.checkpoint import Checkpoint
from loratools.errors import FormatError, LoratoolsError, NonFiniteError, UnsupportedError, UsageError, raise_all
from loratools.formats import load
from loratools.formats.base import CONFIG, WEIGHTS, read_options
from loratools.formats.reading import Reading
from loratools.jsonfile import read_json
from loratools.needed import of_model
from loratools.ops._oddities import scan
from loratools.ops.inspect import inspect
from loratools.ops.verify import verify
from loratools.pipeline import open_checkpoint
from loratools.receipt import receipt_path
from loratools.sidefiles import RECORD, file_entry
from loratools.weightfiles import PIPELINE, is_index
from loratools.workflows import _provenance
from loratools.workflows._markdown import printable
from loratools.workflows._provenance import is_model
from loratools.workflows._recorded import is_written, places
from loratools.workflows._weights import weights

CARD = "README.md"
# beside a model's weights, by their last component: its configs, its tokenizer, its licence
_SIDES = re.compile(
    r"(config|generation_config|preprocessor_config|processor_config|video_preprocessor_config|image_processor|scheduler_config|model_index"
    r"|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|chat_template|tekken|modules|config_sentence_transformers"
    r"|sentence_bert_config)\.json|merges\.txt|vocab\.txt|chat_template\.jinja|(tokenizer|spiece|sentencepiece\.bpe|source|target)\.(model|spm)"
    r"|(LICENSE|LICENCE|NOTICE|USE_POLICY)(\.(txt|md))?"
)
_BASE_KEYS = {"peft": "base_model_name_or_path", "mlx": "model"}  # where a format's config names its base


@dataclass(kw_only=True)
class Outgoing:
    """Files by their name in the repository, on disk or as bytes where they are not the local ones; `card` is the local card's text."""

    report: Mapping[str, Any]
    files: dict[str, Path | bytes]
    bases: list[str]
    relation: str
    file: str = ""
    adapter: Adapter | None = None
    config: dict[str, Any] | None = None
    receipt: dict[str, Any] | None = None
    card: str | None = None
    stated: str | None = None  # the base as the local config has it
    base_card: str | None = None  # a merge's README.md, where it is the base's own
    recorded: str | None = None  # the receipt's name
    left: list[dict[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def outgoing(path: Path, base_model: str | None, reading: Reading) -> Outgoing:
    """All that goes up but the card, known to be sound. Raises what reading raises, and FormatError, NonFiniteError, UnsupportedError."""
    if base_model is not None and not is_model(base_model):
        raise UsageError("--base-model", found=base_model, expected="a model's id on the Hub, such as user/name")
    if not path.exists():
        raise FormatError("no such file or folder", file=path)
    names = [*WEIGHTS, CONFIG, "model.lora_weights.npy"]
    made = _adapter if path.is_file() or any((path / name).is_file() for name in names) or not _is_model(path) else _merged
    found = made(path, base_model, reading)
    found.card = _text(path / CARD) if path.is_dir() else None
    found.left = list(_left(path, {*found.files, CARD})) if path.is_dir() else []
    if found.card is not None and found.relation == "merge" and is_written(found.receipt, path / CARD):
        found.card, found.base_card = None, found.card
        found.notes.append(f"{CARD} is the base's own: what it says of the licence is taken, its prose is not")
    if strange := sorted(places(found.receipt or {})):
        found.notes.append(f"{found.recorded} tells paths of this machine, and is public: {', '.join(strange[:3])}")
    return found


def _is_model(path: Path) -> bool:
    return (path / PIPELINE).is_file() or (path / "config.json").is_file()


# -- an adapter


def _adapter(path: Path, base_model: str | None, reading: Reading) -> Outgoing:
    adapter = load(path, options=read_options(reading))
    _sound(adapter)
    weights_file = adapter.files[0]
    files: dict[str, Path | bytes] = {file.name: file for file in adapter.files}
    config = read_json(weights_file.parent / CONFIG) if CONFIG in files else None
    receipt, name = _receipt(weights_file)
    report = inspect(weights_file, values=True, **reading)
    report["warnings"] = [text for text in report["warnings"] if not text.startswith("its base is named by a path")]  # not as it goes up
    made = Outgoing(
        report=report, files=files, bases=[], relation="adapter", file=weights_file.name, adapter=adapter, config=config, receipt=receipt,
        recorded=name,
    )  # fmt: skip
    key = _BASE_KEYS.get(adapter.format or "")
    stated = (config or {}).get(key) if key else None
    made.stated = stated if isinstance(stated, str) else None
    made.bases = [_base(weights_file, stated, key, base_model, receipt)]
    if config is not None and key is not None and config.get(key) != made.bases[0]:
        made.config = {**config, key: made.bases[0]}
        files[CONFIG] = (json.dumps(made.config, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
        made.notes.append(f"{CONFIG} goes up with {key} = {made.bases[0]}; the local file stays as it is")
    if weights_file.suffix not in (".safetensors", ".gguf"):
        made.notes.append(f"{weights_file.name} is no safetensors, and many refuse to load it: loratools convert writes it anew")
    if receipt is None or name is None:
        made.notes.append("no receipt lies with it, so the card does not tell how it was made")
    else:
        files[name] = weights_file.parent / name
    return made


def _base(file: Path, stated: object, key: str | None, given: str | None, receipt: Mapping[str, Any] | None) -> str:
    """The base's id: as it was named, as the config has it, or where the receipt says that it was read."""
    if given is not None:
        return given
    if isinstance(stated, str) and is_model(stated) and not Path(stated).exists():
        return stated
    if receipt is not None and (read := _provenance.base_of(receipt)) is not None:
        return read
    remedy = "--base-model ID names it by its id on the Hub"
    if isinstance(stated, str) and stated:
        fact = f"{key} is a path of this machine" if Path(stated).exists() or not is_model(stated) else f"{key} is no id"
        raise FormatError(fact, file=file.parent / CONFIG, found=stated, remedy=remedy)
    raise FormatError("does not tell which model it is for", file=file, remedy=remedy)


def _sound(adapter: Adapter) -> None:
    """Raise for values that are inf or nan, and for an adapter that changes nothing."""
    faults: list[LoratoolsError] = []
    for name, delta in adapter.items():
        for place, ref in delta.refs().items():
            if wrong := scan(ref)[0]:
                remedy = "loratools inspect --values shows all; train it anew, or from an earlier checkpoint"
                faults.append(NonFiniteError(f"{place} has {wrong} non-finite values", file=adapter.path, tensor=name, remedy=remedy))
    raise_all(faults)
    norms = weights(adapter, None)
    if norms and all(norm == 0 for norm in norms.values()):
        raise FormatError("changes nothing: every ΔW is zero", file=adapter.path, remedy="was it trained? its B, or its alpha, is zero")


def _receipt(weights_file: Path) -> tuple[dict[str, Any] | None, str | None]:
    """The receipt that lies with an adapter and tells of these weights, with its name. Raises FormatError where they were changed since."""
    for place in (receipt_path(weights_file, folder=False), receipt_path(weights_file.parent, folder=True)):
        if not place.is_file():
            continue
        found = read_json(place)
        rows = found.get("outputs")
        row = next((row for row in rows if row.get("path") == weights_file.name), None) if isinstance(rows, list) else None
        if row is None:
            continue
        if file_entry(weights_file, weights_file.name)["blake3"] != row.get("blake3"):
            remedy = f"move {place.name} away, if they were changed on purpose"
            raise FormatError("not the bytes that its receipt tells of", file=weights_file, remedy=remedy)
        return found, place.name
    return None, None


# -- a merged model


def _merged(path: Path, base_model: str | None, reading: Reading) -> Outgoing:
    place = receipt_path(path, folder=True)
    receipt = read_json(place) if place.is_file() else None
    if receipt is None or receipt.get("operation") != "merge":
        found = "no receipt" if receipt is None else f"a receipt of {receipt.get('operation')}"
        raise UnsupportedError("neither an adapter nor a merge of loratools'", file=path, found=found, remedy="push what merge wrote")
    checkpoint = open_checkpoint(path)
    _whole(checkpoint, verify(path))
    base = base_model or _provenance.base_of(receipt)
    if base is None:
        remedy = "--base-model ID names it by its id on the Hub"
        raise FormatError("its base is a path of a machine", file=place, found=_provenance.local_base(receipt), remedy=remedy)
    tensors = {file.path for file in checkpoint.files.values()}
    chosen = [file for file in of_model(path) if file in tensors or is_index(file.name) or _is_side(file.relative_to(path))]
    files: dict[str, Path | bytes] = {file.relative_to(path).as_posix(): file for file in (*chosen, place)}
    config = read_json(path / "config.json") if (path / "config.json").is_file() else None
    bases = [base, *(name for name in _adapters(receipt) if name != base)]
    return Outgoing(
        report=inspect(path), files=files, bases=bases, relation="merge", config=config, receipt=receipt, recorded=place.name
    )


def _adapters(receipt: Mapping[str, Any]) -> list[str]:
    """The repositories that the merged adapters were read from, as far as they were."""
    rows = [row for row in receipt.get("inputs", ()) if row.get("role") == "adapter"]
    return list(dict.fromkeys(found[0] for row in rows if (found := _provenance.repository(row.get("path")))))


def _is_side(name: Path) -> bool:
    return len(name.parts) <= 2 and _SIDES.fullmatch(name.name) is not None


def _whole(checkpoint: Checkpoint, report: Mapping[str, Any]) -> None:
    """Raise for a model that is not what its receipt says, or holds inf or nan."""
    card = f"{checkpoint.folder / CARD}:"  # which is its user's to change
    faults: list[LoratoolsError] = [FormatError(fault) for fault in report["faults"] if not fault.startswith(card)]
    for name, ref in checkpoint.items():
        if ref.spec.floating and (wrong := scan(ref)[0]):
            faults.append(NonFiniteError(f"has {wrong} non-finite values", file=checkpoint.path, tensor=name))
    raise_all(faults)


# -- what is left


def _left(folder: Path, taken: Iterable[str]) -> Iterable[dict[str, str]]:
    """What lies in the folder and stays, folders of which nothing is taken as one row."""
    names = set(taken)

    def within(place: Path, above: str) -> Iterable[dict[str, str]]:
        for path in sorted(place.iterdir()):
            name = above + path.name
            inside = path.is_dir() and any(other.startswith(f"{name}/") for other in names)
            if inside:
                yield from within(path, f"{name}/")
            elif name not in names:
                reason = "undoes the merge, and holds parts of the base" if path.name == RECORD else "no part of what is published"
                yield {"path": printable(f"{name}/" if path.is_dir() else name), "reason": reason}

    return within(folder, "")


def _text(path: Path) -> str | None:
    if not path.is_file():
        return None
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError:
        raise FormatError("a card that is no UTF-8", file=path, remedy="save it as UTF-8") from None
