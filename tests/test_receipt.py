"""receipt: real receipts fit their schema, and what they say is what the files are."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from blake3 import blake3

from loratools import __version__
from loratools.checkpoint import Checkpoint
from loratools.errors import FormatError
from loratools.formats import load
from loratools.ops.extract import extract
from loratools.ops.merge import merge
from loratools.receipt import Receipt, history_of, receipt_path
from loratools.tensorfile import TensorFile
from tests.conftest import llama_config, llama_tensors
from tests.files import write_checkpoint
from tests.spoil import Pair

SCHEMA = json.loads((Path(__file__).parents[1] / "spec" / "receipt.schema.json").read_text())
CHECK = jsonschema.Draft202012Validator(SCHEMA)


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    CHECK.validate(found)
    return found


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return Pair(tmp_path)


def test_the_schema_is_one_and_describes_every_field() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)

    def fields(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
        for key, value in node.get("properties", {}).items():
            yield f"{path}.{key}", value
            yield from fields(value, f"{path}.{key}")

    named = [pair for root in (SCHEMA, *SCHEMA["$defs"].values()) for pair in fields(root)] + list(SCHEMA["$defs"].items())
    for path, value in named:
        refers = SCHEMA["$defs"][value["$ref"].rpartition("/")[2]] if "$ref" in value else value
        assert value.get("description") or refers.get("description"), path


@pytest.mark.parametrize("shards", [1, 2])
def test_a_merge_of_a_folder(pair: Pair, shards: int) -> None:
    if shards > 1:
        pair.sharded()
    (pair.base / "tokenizer.json").write_text("{}")
    (pair.base / "pytorch_model.bin").write_bytes(b"old")
    returned = merge(pair.base, [pair.adapter, f"{pair.adapter}:-0.5"], pair.out, sha256=True, dtype="bfloat16", full_report=True)
    receipt = read(pair.out / "loratools.json")
    assert receipt == returned
    assert (receipt["loratools"], receipt["operation"]) == (__version__, "merge")
    assert receipt["arguments"]["adapters"] == [str(pair.adapter), f"{pair.adapter}:-0.5"]
    assert receipt["applied"] == receipt["expected"] == 8
    assert [row["name"] for row in receipt["left_out"]] == ["pytorch_model.bin"]
    assert {row["sampled"] for row in receipt["tensors"]} == {1.0}
    names = {path.name for path in pair.out.iterdir()} - {"loratools.json"}
    assert {row["path"] for row in receipt["outputs"]} == names
    for row in receipt["outputs"]:
        data = (pair.out / row["path"]).read_bytes()
        assert (row["bytes"], row["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
        if row["header_sha256"] is None:
            assert row["blake3"] == blake3(data).hexdigest()
        else:
            assert row["header_sha256"] == TensorFile(pair.out / row["path"]).header_sha256
    assert receipt["digests"] == {name: blake3(bytes(ref.read())).hexdigest() for name, ref in sorted(Checkpoint(pair.out).items())}


def test_an_input_is_told_by_its_content_not_its_header(pair: Pair) -> None:
    first = merge(pair.base, pair.adapter, pair.folder / "one")["inputs"]
    pair.factor(lora_A__weight=torch.ones(2, 8))
    pair.weight("model.norm.weight", torch.full((8,), 2.0))
    second = merge(pair.base, pair.adapter, pair.folder / "two")["inputs"]
    assert [row["role"] for row in first] == ["base", "adapter", "adapter"]
    assert [row["header_sha256"] for row in first] == [row["header_sha256"] for row in second]
    assert [one["blake3"] == two["blake3"] for one, two in zip(first, second, strict=True)] == [False, False, True]


def test_a_checkpoints_digest_does_not_depend_on_its_shards(pair: Pair) -> None:
    whole = merge(pair.base, pair.adapter, pair.folder / "one")
    pair.sharded()
    parts = merge(pair.base, pair.adapter, pair.folder / "two")
    assert whole["inputs"][0]["blake3"] == parts["inputs"][0]["blake3"]
    assert whole["digests"] == parts["digests"]


def test_a_merge_of_one_file_has_its_receipt_beside_it(pair: Pair) -> None:
    out = pair.folder / "merged.safetensors"
    returned = merge(pair.weights, pair.adapter, out, sha256=True)
    receipt = read(pair.folder / "merged.safetensors.loratools.json")
    assert receipt == returned
    assert [row["path"] for row in receipt["outputs"]] == ["merged.safetensors"]
    assert receipt["outputs"][0]["sha256"] == hashlib.sha256(out.read_bytes()).hexdigest()
    again = merge(out, pair.adapter, pair.folder / "again.safetensors")
    assert [entry["arguments"]["out"] for entry in again["history"]] == [str(out)]


def test_what_one_file_cannot_say_of_its_config_is_a_note(pair: Pair) -> None:
    pair.tied()
    pair.config(modules_to_save=["lm_head"])
    pair.tensors({"base_model.model.lm_head.weight": torch.ones(17, 8)})
    receipt = merge(pair.weights, pair.adapter, pair.folder / "merged.safetensors", untie=True)
    assert any(note.endswith('needs {"tie_word_embeddings": false}') for note in receipt["notes"])


def test_history_is_kept_oldest_first_and_flat(pair: Pair) -> None:
    merge(pair.base, pair.adapter, pair.folder / "one")
    merge(pair.folder / "one", pair.adapter, pair.folder / "two")
    third = merge(pair.folder / "two", pair.adapter, pair.folder / "three")
    assert [Path(entry["arguments"]["out"]).name for entry in third["history"]] == ["one", "two"]
    assert all("history" not in entry for entry in third["history"])
    CHECK.validate(third)
    assert not (pair.folder / "three" / "one").exists()


def test_an_adapter_from_memory(pair: Pair) -> None:
    receipt = merge(pair.base, load(pair.adapter), pair.out)
    CHECK.validate(receipt)
    assert receipt["arguments"]["adapters"] == ["<adapter of 4 deltas>"]


@pytest.mark.parametrize("rest", ["save", "drop"])
def test_an_extraction(tmp_path: Path, rest: str) -> None:
    tensors = llama_tensors()
    base = write_checkpoint(tmp_path / "base", tensors, llama_config())
    generator = torch.Generator().manual_seed(2)
    changed = {name: value + torch.randn(value.shape, generator=generator) / 10 for name, value in tensors.items()}
    changed["model.norm.weight"] = tensors["model.norm.weight"]
    tuned = write_checkpoint(tmp_path / "tuned", changed, llama_config(), shards=2)
    returned = extract(base, tuned, tmp_path / "out", rank=2, rest=rest, sha256=True)
    receipt = read(tmp_path / "out" / "loratools.json")
    assert receipt == returned
    assert [row["role"] for row in receipt["inputs"]] == ["base", "tuned"]
    assert receipt["expected"] == len(tensors) - 1
    assert receipt["applied"] + len(receipt["left_out"]) == receipt["expected"]
    assert len(receipt["left_out"]) == (2 if rest == "drop" else 0)
    rows = receipt["tensors"] + receipt["left_out"]
    assert sum(row["share"] for row in rows) == pytest.approx(1)  # shares of one sum of squares, each rounded once
    assert "model.norm.weight" not in {row["name"] for row in rows}


def test_what_has_no_number_is_null() -> None:
    receipt = Receipt("merge", {}, tensors=[{"name": "x", "relative_norm": float("nan"), "survived": -float("inf")}])
    assert receipt.as_json()["tensors"] == [{"name": "x", "relative_norm": None, "survived": None}]


def test_rows_digests_and_files_come_by_name(tmp_path: Path) -> None:
    rows, files = [{"name": "b"}, {"name": "a"}], [{"path": "b"}, {"path": "a"}]
    receipt = Receipt("merge", {}, digests={"b": "1", "a": "2"}, tensors=rows, outputs=files)
    receipt.write(tmp_path / "x.json")
    found = json.loads((tmp_path / "x.json").read_text())
    assert list(found["digests"]) == ["a", "b"]
    assert [row["name"] for row in found["tensors"]] == [row["path"] for row in found["outputs"]] == ["a", "b"]
    assert receipt.as_json()["seconds"] == found["seconds"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"operation": "merge", "history": 5}', '{"operation": "merge", "history": [1]}', "\xff"])
def test_what_is_no_receipt_is_refused(tmp_path: Path, text: str) -> None:
    base = write_checkpoint(tmp_path / "base", llama_tensors())
    (base / "loratools.json").write_text(text, encoding="latin-1")
    with pytest.raises(FormatError, match=r"loratools\.json: not"):
        history_of(Checkpoint(base))


def test_where_a_receipt_lies() -> None:
    assert receipt_path(Path("a/out"), folder=True) == Path("a/out/loratools.json")
    assert receipt_path(Path("a/x.safetensors"), folder=False) == Path("a/x.safetensors.loratools.json")
