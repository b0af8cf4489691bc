"""A merge recalled from its record: the base's tensors as they were, the same plan, and outputs that are not the record's refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from loratools.checkpoint import Checkpoint
from loratools.errors import FormatError, MatchError
from loratools.formats import load
from loratools.ops._recalled import Recalled, place_of
from loratools.ops.merge import merge
from loratools.planning import make_plan
from loratools.record import Record
from loratools.tensorfile import TensorFile
from tests.files import llama_tensors, write_checkpoint
from tests.spoil import Pair


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    made = Pair(tmp_path)
    merge(made.base, [f"{made.adapter}:0.5"], made.out, reversible=True, dtype="bfloat16")
    return made


def recalled(pair: Pair, *adapters: str | Path) -> Recalled:
    return Recalled(Checkpoint(pair.out), Record(pair.out / "unmerge.safetensors"), adapters)


def test_the_base_and_the_plan_come_back(pair: Pair) -> None:
    base, found = Checkpoint(pair.base), recalled(pair)
    assert found.specs == base.specs and list(found.specs) == list(base.specs) and found.specs != found.merged.specs
    assert found.headers == {file.path.name: TensorFile(file.path).header for file in base.files.values()}
    ((adapter, strength),) = found.loaded
    assert strength == 0.5 and adapter.path == load(pair.adapter).path
    made = make_plan(base, [(load(pair.adapter), 0.5)])
    assert {name: [(delta.kind, s) for delta, s in row] for name, row in found.plan.changes.items()} == {
        name: [(delta.kind, s) for delta, s in row] for name, row in made.changes.items()
    }


def test_an_adapter_that_was_given_wins_over_the_path(pair: Pair) -> None:
    moved = pair.adapter.rename(pair.folder / "moved")
    with pytest.raises(MatchError, match="is not where it was"):
        recalled(pair)
    ((adapter, _),) = recalled(pair, f"{moved}:0.5").loaded
    assert adapter.path is not None and adapter.path.parent == moved
    assert place_of(f"{moved}:0.5") == str(moved) and place_of(moved) == moved


def test_nothing_to_compute_needs_no_adapter(tmp_path: Path) -> None:
    pair = Pair(tmp_path)
    merge(pair.base, [f"{pair.adapter}:0"], pair.out, reversible=True)
    pair.adapter.rename(tmp_path / "moved")
    assert recalled(pair).loaded == []


def test_another_output_is_refused(pair: Pair) -> None:
    record = Record(pair.out / "unmerge.safetensors")
    tensors = llama_tensors()
    for number, (shards, said) in enumerate([(1, "its header is not the one that the merge wrote"), (2, "not the one|not the files")]):
        other = write_checkpoint(pair.folder / f"other{number}", tensors, {}, shards=shards)
        with pytest.raises(FormatError, match=said):
            Recalled(Checkpoint(other), record, [])
    single = Checkpoint(pair.out / "model.safetensors")
    with pytest.raises(FormatError, match="not the files that the merge wrote"):
        Recalled(single, record, [])
