"""verify: is an output still what its receipt says, and is it what base and adapters give?

Three questions, each asked of every tensor: do the bytes have the digests of the receipt; does merging again give the same
bits, and if not, how many units in the last place apart; and do torch layers with the papers' own forward, which share no
arithmetic with the merge, change their outputs as the merged weights do (`loratools.forward`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from blake3 import blake3

from loratools import threads as pool
from loratools.adapter import Adapter
from loratools.checkpoint import Checkpoint
from loratools.digests import combined_digest
from loratools.errors import FormatError, UsageError
from loratools.formats import load
from loratools.formats.base import read_options
from loratools.formats.opening import ARRAYS, is_adapter, of_adapter, open_container
from loratools.gguffile import is_gguf
from loratools.needed import of_model
from loratools.pipeline import open_checkpoint
from loratools.plan import Plan, changes_of
from loratools.planning import make_plan, split_renames, split_strength
from loratools.receipt import receipt_path
from loratools.refs import Ref, Spec
from loratools.rewrite import Change
from loratools.sidefiles import file_entry
from loratools.source import local
from loratools.source.handles import name_of, read_whole
from loratools.tensors import dtype_code, read_tensor
from loratools.ulps import distance
from loratools.weightfiles import PIPELINE

TOLERATED = 1  # ulp: twice the bound of one rounding; what loratools wrote itself is 0 apart


def verify(
    path: str | Path,
    *,
    base: str | Path | None = None,
    adapters: str | Path | Sequence[str | Path] = (),
    forward: bool = False,
    device: str = "cpu",
    seed: int = 0,
    threads: int | None = None,
) -> dict[str, Any]:
    """Check an output against its receipt, and with `base` and `adapters` against the merge itself.

    Gives `{"path", "ok", "digests", "replayed", "max_ulp", "differing", "forward", "faults"}`: how many tensors each check
    saw, the largest deviation, and one line for each fault. Raises what opening the files raises, and OptionError when there
    is nothing to check against.
    """
    listed = [adapters] if isinstance(adapters, str | Path) else list(adapters)
    if bool(listed) != (base is not None):
        raise UsageError("--base and --adapter belong together")
    given, path = path, local(path, _needed)
    receipt = read_receipt(path)
    if receipt is None and base is None:
        raise FormatError("no receipt beside it", file=str(given), remedy="give --base and --adapter to replay the merge")
    count = threads or pool.default_threads()
    report: dict[str, Any] = {"path": str(given), "digests": 0, "replayed": 0, "max_ulp": None, "differing": 0, "forward": [], "faults": []}
    with pool.single_threaded_blas():
        if receipt is not None:
            _check_digests(path, receipt, report, count)
        if base is not None:
            said = (receipt or {}).get("arguments", {})
            merged, original = open_checkpoint(path), open_checkpoint(base)
            if said.get("dequantize"):
                original = original.dequantized(dtype_code(said["dtype"]) if said.get("dtype") else None)
            plan = _plan_again(original, listed, said)
            _replay(merged, original, plan, report, count)
            if forward:
                _forward(merged, original, plan, report, device, seed)
    report["ok"] = not report["faults"]
    return report


def read_receipt(path: Path) -> dict[str, Any] | None:
    """The receipt that lies with an output, or None."""
    place = receipt_path(path, folder=path.is_dir())
    if not place.is_file():
        return None
    try:
        receipt = json.loads(read_whole(place))
        if isinstance(receipt["digests"], dict) and isinstance(receipt["outputs"], list):
            return dict(receipt)
    except (ValueError, KeyError, TypeError):
        pass
    raise FormatError("not a receipt", file=place)


# -- digests


def _check_digests(path: Path, receipt: Mapping[str, Any], report: dict[str, Any], count: int) -> None:
    nameless = (path / ARRAYS[0]).is_file()  # whose files alone can be compared
    tensors, said = ({}, {}) if nameless else (_tensors(path), receipt["digests"])
    faults: list[str] = report["faults"]
    shown = name_of(path)
    faults += [f"{shown}: {name}: the receipt has it, the output lacks it" for name in sorted(said.keys() - tensors.keys())]
    faults += [f"{shown}: {name}: the receipt does not know it" for name in sorted(tensors.keys() - said.keys())]
    found: dict[str, str] = {}
    common = sorted(said.keys() & tensors.keys())
    pool.run_all([partial(_digest, name, tensors[name], found) for name in common], count)
    faults += [
        f"{shown}: {name}: not the bytes that were written: found {found[name][:16]}…, expected {str(said[name])[:16]}…"
        for name in common
        if found[name] != said[name]
    ]
    report["digests"] = len(common)
    _check_files(path, receipt, found, report)


def _tensors(path: Path) -> Mapping[str, Ref]:
    if is_adapter(path) if path.is_dir() else is_gguf(path):
        return open_container(path).tensors
    return open_checkpoint(path)


def _digest(name: str, ref: Ref, found: dict[str, str]) -> None:
    digest = blake3()
    for block in ref.blocks():
        digest.update(block)
    found[name] = digest.hexdigest()


def _check_files(path: Path, receipt: Mapping[str, Any], digests: Mapping[str, str], report: dict[str, Any]) -> None:
    """Every file of the output is there, as it was, and no other weights lie beside it."""
    from loratools.tensorfile import TensorFile

    folder = path if path.is_dir() else path.parent
    faults: list[str] = report["faults"]
    for entry in receipt["outputs"]:
        file = folder / entry["path"]
        if not file.is_file():
            faults.append(f"{name_of(file)}: the receipt has it, the output lacks it")
        elif entry["header_sha256"] is None:
            if file_entry(file, entry["path"])["blake3"] != entry["blake3"]:
                faults.append(f"{name_of(file)}: not the bytes that were written")
        else:
            opened = TensorFile(file)
            above = "".join(f"{part}." for part in Path(entry["path"]).parent.parts)  # the model's name, in a pipeline
            inside = {name: digests[above + name] for name in opened if above + name in digests}
            own = combined_digest(inside) if len(inside) == len(opened) else None
            if opened.header_sha256 != entry["header_sha256"]:
                faults.append(f"{name_of(file)}: its header is not the one that was written")
            elif entry["blake3"] not in (own, file_entry(file, entry["path"])["blake3"]):
                faults.append(f"{name_of(file)}: not the tensors that were written to it")
    if path.is_dir():
        known = {entry["path"] for entry in receipt["outputs"]}
        found = _weights_in(path)
        faults += [f"{name_of(file)}: weights that the receipt does not know" for file in found if str(file.relative_to(path)) not in known]


def _weights_in(folder: Path) -> list[Path]:
    places = ("*.safetensors", "*/*.safetensors") if (folder / PIPELINE).is_file() else ("*.safetensors",)
    return sorted(file for place in places for file in folder.glob(place))


def _needed(path: Path) -> list[Path]:
    """What is downloaded of a repository: the adapter or the model, all that the receipt names, and weights that it may not know."""
    folder = path if path.is_dir() else path.parent
    adapter = path.is_dir() and is_adapter(path)
    files = [*(of_adapter(path) if adapter else of_model(path)), *(_weights_in(path) if path.is_dir() else ())]
    listed = (read_receipt(path) or {}).get("outputs", ())
    return list(dict.fromkeys([*files, *(file for entry in listed if (file := folder / entry["path"]).is_file())]))


# -- replay


def _plan_again(original: Checkpoint, adapters: Sequence[str | Path], said: Mapping[str, Any]) -> Plan:
    """The merge's plan, under the options that its receipt recorded."""
    return make_plan(
        original,
        loaded_adapters(adapters, said),
        untie=bool(said.get("untie")),
        renames=split_renames(said.get("rename") or ()),
        allow_unmatched=bool(said.get("allow_unmatched")),
        transposed=tuple(said.get("transposed") or ()),
        embeddings=tuple(said.get("embedding") or ()),
    )


def _replay(merged: Checkpoint, original: Checkpoint, plan: Plan, report: dict[str, Any], count: int) -> None:
    """Every tensor again from base and plan, in the dtype the output has, compared bit by bit."""
    path = name_of(merged.path)
    floats = {spec.dtype for spec in merged.specs.values() if spec.floating}
    before = {spec.dtype for spec in original.specs.values() if spec.floating}
    changes, added = changes_of(original, plan, {}, dtype=next(iter(floats)) if len(floats) == 1 and floats != before else None)
    expected: dict[str, Change | Ref] = {name: changes.get(name, ref) for name, ref in original.items()}
    expected |= added
    faults: list[str] = report["faults"]
    faults += [f"{path}: {name}: the merge has it, the output lacks it" for name in expected if name not in merged]
    faults += [f"{path}: {name}: neither the base nor the adapter has it" for name in merged if name not in expected]
    rows: dict[str, tuple[int, int]] = {}
    jobs = [partial(_compare, name, item, merged[name], rows, faults, path) for name, item in expected.items() if name in merged]
    pool.run_all(jobs, count)
    report["replayed"] = len(rows)
    report["max_ulp"] = max((worst for worst, _ in rows.values()), default=0)
    report["differing"] = sum(differing for _, differing in rows.values())


def _forward(merged: Checkpoint, original: Checkpoint, plan: Plan, report: dict[str, Any], device: str, seed: int) -> None:
    """The layers against the merged weights, one weight at a time; what has no layer is said."""
    from loratools.layers.agreement import LIMIT, disagreement, has_layer

    for name, applications in sorted(plan.changes.items()):
        source = original.get(plan.sources.get(name, name))
        row: dict[str, Any] = {"name": name, "ratio": None}
        report["forward"].append(row)
        if source is None or name not in merged or not applications or not all(has_layer(delta) for delta, _ in applications):
            row["skipped"] = "no layer for " + ("+".join(delta.kind for delta, _ in applications) or "a copy")
            continue
        W, after = read_tensor(source, device=device), read_tensor(merged[name], device=device)
        row["ratio"], worst = disagreement(W, after, applications, seed=seed)
        if row["ratio"] > LIMIT:
            found, bound = f"{math.sqrt(row['ratio']):.3g} times the rounding bound", f"at most {math.sqrt(LIMIT):.2f}"
            report["faults"].append(
                f"{name_of(merged.path)}: {name}: output {worst} does not change as the layer's: found {found}, expected {bound}"
            )


def loaded_adapters(adapters: Sequence[str | Path], said: Mapping[str, Any]) -> list[tuple[Adapter, float]]:
    options = read_options(said)
    return [(load(str(path), options=options), strength) for path, strength in map(split_strength, adapters)]


def _compare(name: str, expected: Change | Ref, found: Ref, rows: dict[str, tuple[int, int]], faults: list[str], path: str) -> None:
    """One tensor against what it should be, block by block; what is no floating-point number has to be equal."""
    spec: Spec = expected.spec
    if spec != found.spec:
        faults.append(f"{path}: {name}: found {found.spec}, expected {spec}")
        return
    blocks = expected.blocks(lambda _: None) if isinstance(expected, Change) else expected.blocks()
    worst = differing = 0
    offset, stored = 0, found.as_bytes()
    for block in blocks:
        other = stored.rows(offset, offset + memoryview(block).nbytes)
        offset += memoryview(block).nbytes
        if bytes(block) == bytes(other):
            continue
        apart = distance(block, other, spec.dtype) if spec.floating else None
        worst = max(worst, int(apart.max()) if apart is not None else 2)
        differing += int((apart > 0).sum()) if apart is not None else 1
    rows[name] = (worst, differing)
    if worst > TOLERATED:
        unit = f"up to {worst} units in the last place" if spec.floating else "its bytes"
        faults.append(f"{path}: {name}: not what base and adapter give: differs by {unit} in {differing} of {spec.numel} weights")
