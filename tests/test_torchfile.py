"""torchfile: every tensor of a pickle under its name and bytes, mapped where torch can map, and nothing in it run."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from loratools.errors import Faults, FormatError
from loratools.refs import BITS
from loratools.tensors import code_of, torch_dtype
from loratools.torchfile import Strided, TorchFile
from tests.files import raw
from tests.spoil import Evil
from tests.strategies import randn

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own, about what is old
LEGACY = {"_use_new_zipfile_serialization": False}


def saved(path: Path, table: Any, **how: Any) -> TorchFile:
    torch.save(table, path, **how)
    return TorchFile(path)


def every_dtype() -> dict[str, Tensor]:
    codes = [code for code in BITS if code not in ("F4", "F6_E2M3", "F6_E3M2")]  # which torch lacks
    return {code: torch.arange(1, 7).to(torch.uint8).repeat(BITS[code] // 8).view(torch_dtype(code)).view(2, 3) for code in codes}


@pytest.mark.parametrize("how", [{}, LEGACY], ids=["mapped", "legacy"])
def test_every_dtype_and_shape_by_name_in_order(tmp_path: Path, how: dict[str, Any]) -> None:
    tensors = every_dtype() | {"scalar": torch.tensor(2**60 + 1), "empty": torch.empty(0, 4), 'é "q"': torch.ones(2, 3, 4, 5)}
    tensors["parameter"] = torch.nn.Parameter(torch.ones(3))
    tensors["flag"] = torch.tensor([True, False])
    if how:  # dtypes that are younger than the format
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(("F8", "U16", "U32", "U64"))}
    found = saved(tmp_path / "x.bin", tensors, **how)
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        assert (found[name].spec.dtype, found[name].spec.shape) == (code_of(tensor.dtype), tuple(tensor.shape))
        assert bytes(found[name].read()) == b"".join(bytes(block) for block in found[name].blocks(7)) == raw(tensor)
    assert found.mapped == (not how) and found.aliases == () and found.beside == ()
    assert (found.size, found.metadata, found.header_sha256) == ((tmp_path / "x.bin").stat().st_size, {"format": "pt"}, None)


def test_a_mapped_file_is_not_read_to_be_opened(tmp_path: Path) -> None:
    """64 MB of anonymous memory would show; a mapping does not count as such."""
    torch.save({str(number): torch.ones(1 << 20) for number in range(16)}, tmp_path / "x.bin")

    def anonymous() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

    before = anonymous()
    found = TorchFile(tmp_path / "x.bin")
    assert len(found) == 16 and found.mapped
    assert anonymous() - before < 16 << 10  # kB


VIEWS: dict[str, Tensor] = {
    "transposed": randn(6, 5, seed=0).T,
    "a column": randn(6, 5, seed=1)[:, 2],
    "every other row": randn(8, 3, seed=2)[::2],
    "channels last": randn(4, 3, 2, 5, seed=3).contiguous(memory_format=torch.channels_last),
    "expanded": randn(1, 4, seed=4).expand(3, 4),
    "part of a row": randn(4, 6, seed=5)[:, 1:4].bfloat16(),
    "a slice of a larger one": randn(9, 2, seed=6)[3:7],
    "conjugated": torch.complex(randn(3, 2, seed=7), randn(3, 2, seed=8)).conj(),
}


@pytest.mark.parametrize("name", VIEWS)
def test_views_are_laid_out_anew(tmp_path: Path, name: str) -> None:
    tensor = VIEWS[name]
    ref = saved(tmp_path / "x.pt", {"a": tensor, "b": torch.ones(2)})["a"]
    data, step = raw(tensor.resolve_conj()), ref.spec.row_bytes()
    assert ref.spec.shape == tuple(tensor.shape)
    assert bytes(ref.read()) == b"".join(bytes(block) for block in ref.blocks(9)) == data
    assert bytes(ref.rows(1, 3)) == data[step : 3 * step]
    for shape in ((tensor.shape[0], tensor[0].numel()), (tensor.numel(), 1)):
        other = ref.reshape(*shape)
        assert other.spec.shape == shape and bytes(other.read()) == data
        assert bytes(other.rows(1, 2)) == data[other.spec.row_bytes() : 2 * other.spec.row_bytes()]
    assert bytes(ref.as_bytes().rows(3, 9)) == data[3:9]


def test_only_what_has_to_be_is_laid_out_anew(tmp_path: Path) -> None:
    found = saved(tmp_path / "x.pt", {"t": torch.ones(3, 2).T, "slice": torch.ones(4, 4)[1:3], "plain": torch.ones(2, 2)})
    assert [isinstance(ref, Strided) for ref in found.values()] == [True, False, False]


@pytest.mark.parametrize("how", [{}, LEGACY], ids=["mapped", "legacy"])
def test_names_of_one_tensor_are_told(tmp_path: Path, how: dict[str, Any]) -> None:
    W, buffer = torch.ones(4, 4), torch.zeros(8)
    table = {"a": W, "b": W, "turned": W.T, "half": W[:2], "x": buffer[:4], "y": buffer[4:], "c": W.view(4, 4), "e": W[:0], "f": W[:0]}
    assert saved(tmp_path / "x.bin", table, **how).aliases == (("a", "b", "c"),)


@pytest.mark.parametrize("key", ["state_dict", "model", "module"])
def test_a_dictionary_below_one_key_and_what_lies_beside_it(tmp_path: Path, key: str) -> None:
    found = saved(tmp_path / "x.ckpt", {"epoch": 3, key: {"a": torch.ones(2)}, "optimizer": {"state": torch.ones(9)}})
    assert list(found) == ["a"] and found.beside == ("epoch", "optimizer")
    assert list(saved(tmp_path / "y.ckpt", {"model": torch.ones(2)})) == ["model"]  # a tensor of that name


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"a": Evil()}, r"more than tensors; nothing in it was run: found posix\.mkdir"),
        ({"a": torch.nn.Linear(2, 2)}, r"more than tensors; nothing in it was run: found torch\.nn"),
        ([torch.ones(2)], "not a dictionary of tensors: found list"),
        ({}, "not a dictionary of tensors: found an empty one"),
        ({"state_dict": {}}, "not a dictionary of tensors: found an empty one"),
        ({"a": torch.ones(2), "epoch": 3}, "epoch: not a tensor under a name: found int"),
        ({7: torch.ones(2)}, "7: not a tensor under a name: found Tensor"),
        ({"a": torch.ones(2, dtype=torch.complex128)}, "a: a tensor that safetensors cannot hold: found complex128"),
        ({"a": torch.ones(2, 2, device="meta")}, "a: a tensor without its data, .*: found device meta"),
        ({"a": torch.ones(2, 2).to_sparse()}, "a: a tensor that safetensors cannot hold: found sparse_coo"),
    ],
)
@pytest.mark.parametrize("how", [{}, LEGACY], ids=["mapped", "legacy"])
def test_what_is_refused(tmp_path: Path, table: Any, said: str, how: dict[str, Any]) -> None:
    with pytest.raises(FormatError, match=rf"x\.bin: .*{said}"):
        saved(tmp_path / "x.bin", table, **how)


def test_tensors_of_other_layouts_are_refused(tmp_path: Path) -> None:
    table = {
        "quantised": torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8),
        "nested": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    }
    for name, found in (("quantised", "qint8"), ("nested", "nested")):
        with pytest.raises(FormatError, match=f"{name}: a tensor that safetensors cannot hold: found {found}"):
            saved(tmp_path / "x.bin", {name: table[name]})


def test_all_faults_of_a_file_are_told(tmp_path: Path) -> None:
    with pytest.raises(Faults) as caught:
        saved(tmp_path / "x.bin", {"epoch": 1, "a": torch.ones(2), "step": 2})
    assert [error.tensor for error in caught.value.errors] == ["epoch", "step"]


def test_what_is_no_file_of_torch(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(99)}, tmp_path / "whole.bin")
    (tmp_path / "cut.bin").write_bytes((tmp_path / "whole.bin").read_bytes()[:300])
    (tmp_path / "hello.bin").write_bytes(b"hello")
    (tmp_path / "empty.bin").write_bytes(b"")
    (tmp_path / "number.bin").write_bytes(pickle.dumps(7, protocol=2))
    (tmp_path / "folder.bin").mkdir()
    os.mkfifo(tmp_path / "pipe.bin")
    for name in ("cut", "hello", "empty", "number", "folder", "pipe", "gone"):
        with pytest.raises(FormatError, match=rf"{name}\.bin: not a torch file, or"):
            TorchFile(tmp_path / f"{name}.bin")
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "script.pt"))
    with pytest.raises(FormatError, match="a TorchScript program"):
        TorchFile(tmp_path / "script.pt")
