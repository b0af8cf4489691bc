"""Sizes as people write them, and budgets that hold for the file as it is written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loratools.adapter import Adapter
from loratools.deltas.base import Delta
from loratools.deltas.full import Replacement
from loratools.deltas.lowrank import LowRank
from loratools.errors import OptionError
from loratools.formats import encode
from loratools.formats.base import Container
from loratools.formats.writing import write_container
from loratools.header import build_header, canonical
from loratools.ops._size import DENSE, Budget, Candidate, file_bytes, parse_size
from loratools.refs import Spec
from loratools.tensors import to_ref


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("40MB", 40_000_000), ("1.5GiB", 3 << 29), ("300kB", 300_000), ("300 KB", 300_000), ("2kib", 2048), ("12345", 12345),
        (12345, 12345), ("7B", 7), (" 1MiB ", 1 << 20),
    ],
)  # fmt: skip
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MB", "-1MB", "1TB", "1e6", "1.5.2kB", "NaN", True, -5])
def test_what_is_no_size(text: str | int) -> None:
    with pytest.raises(OptionError, match="--size"):
        parse_size(text)


def test_only_the_size_of_safetensors_is_counted() -> None:
    with pytest.raises(OptionError, match="--size is counted for safetensors alone"):
        file_bytes(Container({}, writer=lambda container, path: {}))


def test_digests_that_are_put_in_last_are_counted(tmp_path: Path) -> None:
    adapter = Adapter({"lora_unet_x.weight": LowRank(A=to_ref(torch.ones(2, 3)), B=to_ref(torch.ones(4, 2)), alpha=2.0)}, flat=True)
    container = encode(adapter, "kohya")
    write_container(container, tmp_path / "x.safetensors")
    assert file_bytes(container) == (tmp_path / "x.safetensors").stat().st_size


def plain(deltas: Mapping[str, Delta]) -> Container:
    return encode(Adapter(deltas=dict(deltas)))


def file_size(container: Container) -> int:
    """The bytes of the file that holds these tensors."""
    header, _, end = build_header(canonical({name: ref.spec for name, ref in container.tensors.items()}), container.metadata)
    return 8 + len(header) + end


@given(
    shapes=st.lists(st.tuples(st.integers(2, 40), st.integers(2, 40)), min_size=1, max_size=4),
    size=st.integers(400, 20_000),
    code=st.sampled_from(["F32", "BF16"]),
    biases=st.booleans(),
)
def test_a_plan_never_exceeds_its_budget(shapes: list[tuple[int, int]], size: int, code: str, biases: bool) -> None:
    saved = {f"m{index}.bias": Replacement(value=to_ref(torch.zeros(rows))) for index, (rows, _) in enumerate(shapes)} if biases else {}
    candidates = {
        f"m{index}.weight": Candidate(spec=Spec("F32", shape), layer="linear", sigma2=[1.0] * min(shape), total=float(min(shape)))
        for index, shape in enumerate(shapes)
    }
    try:
        budget = Budget(size, code, saved, plain, whole=True)
        ranks = budget.allocate(candidates)
    except OptionError:
        return  # what the least is, and that it suffices, is test_extract's
    assert set(ranks) == set(candidates)
    assert all(rank == DENSE or 0 <= rank <= min(candidates[name].spec.shape) for name, rank in ranks.items())
    planned = {name: delta for name, rank in ranks.items() if rank for name, delta in budget._planned(name, candidates[name], rank).items()}
    if saved or planned:
        assert file_size(plain(saved | planned)) <= size
