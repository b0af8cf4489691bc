"""SAM-LoRA's and LoRA-ViT's files, against the forwards of their classes written out in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from loratools import convert, merge
from loratools.adapter import Adapter
from loratools.deltas.full import Full, Replacement
from loratools.deltas.lowrank import LowRank
from loratools.errors import AmbiguousError, LoratoolsError, MatchError, NotExpressible, ShapeError
from loratools.formats import encode, load
from loratools.formats.base import ReadOptions
from loratools.refs import Spec
from loratools.tensors import to_ref
from tests.files import peft_config, raw, read_checkpoint, write_adapter, write_checkpoint
from tests.strategies import randn

DIM, RANK, BLOCKS = 6, 2, 3


def tensors(**more: Tensor) -> dict[str, Tensor]:
    found = {}
    for index in range(2 * BLOCKS):
        found |= {f"w_a_{index:03}": randn(RANK, DIM, seed=index), f"w_b_{index:03}": randn(DIM, RANK, seed=index + 50)}
    return found | more


def change(block: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Of queries and values."""
    table = {name: tensor.double() for name, tensor in tensors().items()}
    query, value = (scale * table[f"w_b_{2 * block + side:03}"] @ table[f"w_a_{2 * block + side:03}"] for side in (0, 1))
    return query, value


def base(root: str = "blocks", blocks: int = BLOCKS) -> dict[str, Tensor]:
    return {f"{root}.{block}.attn.qkv.weight": randn(3 * DIM, DIM, seed=block) for block in range(blocks)}


def written(folder: Path, table: dict[str, Tensor]) -> Path:
    save_file(table, folder / "lora.safetensors")
    return folder / "lora.safetensors"


@pytest.mark.parametrize("root", ["image_encoder.blocks", "blocks", "vision_encoder.layers"])
def test_queries_and_values_of_fused_weights(tmp_path: Path, root: str) -> None:
    write_checkpoint(tmp_path / "base", base(root))
    merge(tmp_path / "base", written(tmp_path, tensors()), tmp_path / "out")
    for block, (name, W) in enumerate(base(root).items()):
        query, value = change(block)
        expected = (W.double() + torch.cat([query, torch.zeros(DIM, DIM), value])).float()
        assert torch.equal(read_checkpoint(tmp_path / "out")[name], expected), name


def test_queries_and_values_that_lie_apart(tmp_path: Path) -> None:
    """The ViT that LoRA-ViT wraps has proj_q, proj_k and proj_v; its head is called fc."""
    names = [f"transformer.blocks.{block}.attn.proj_{side}.weight" for block in range(BLOCKS) for side in "qkv"]
    weights = {name: randn(DIM, DIM, seed=seed) for seed, name in enumerate(names)} | {"fc.weight": randn(5, DIM, seed=99)}
    write_checkpoint(tmp_path / "base", weights)
    head = randn(5, DIM, seed=7)
    path = written(tmp_path, tensors(fc_6in_5out=head))
    with pytest.raises(AmbiguousError, match=r"alpha is not in the file: it is an argument of LoRA-ViT's class.*--alpha-in A"):
        load(path)
    merge(tmp_path / "base", path, tmp_path / "out", alpha_in=5.0)  # 5 // 2 is 2
    out = read_checkpoint(tmp_path / "out")
    assert raw(out["fc.weight"]) == raw(head)
    for block in range(BLOCKS):
        for side, delta in zip("qv", change(block, 2.0), strict=True):
            name = f"transformer.blocks.{block}.attn.proj_{side}.weight"
            assert torch.equal(out[name], (weights[name].double() + delta).float()), name
        assert raw(out[f"transformer.blocks.{block}.attn.proj_k.weight"]) == raw(weights[f"transformer.blocks.{block}.attn.proj_k.weight"])


SCALES = [(5.0, None, 2.0), (1.0, None, 0.0), (1.0, "alpha/r", 0.5), (5.0, "alpha", 5.0), (None, None, 1.0)]


@pytest.mark.parametrize(("alpha", "scale", "scaling"), SCALES)
def test_scales(tmp_path: Path, alpha: float | None, scale: str | None, scaling: float) -> None:
    """LoRA-ViT divides whole numbers: an alpha below the rank makes it do nothing, which is said."""
    adapter = load(written(tmp_path, tensors()), options=ReadOptions(alpha=alpha, scale=scale))
    assert {delta.facts()["scaling"] for delta in adapter.values()} == {scaling}
    assert any("alpha 1 // rank 2 is 0" in note for note in adapter.notes) == (scaling == 0)


def test_bases_that_do_not_tell_which(tmp_path: Path) -> None:
    adapter = load(written(tmp_path, tensors()))
    known: Any = {name: Spec("F32", (3 * DIM, DIM)) for name in base("image_encoder.blocks", 4)}
    said = r"another number of blocks .*found 3, expected 4 of image_encoder\.blocks; name each: --rename block:0=image_encoder"
    with pytest.raises(AmbiguousError, match=said):
        adapter.resolve(known)
    renames = [(f"block:{block}", f"image_encoder.blocks.{block + 1}.attn.qkv") for block in range(BLOCKS)]
    assert list(adapter.resolve(known, renames=renames)) == list(known)[1:]
    with pytest.raises(AmbiguousError, match=r"several transformers: found a\.blocks, b\.blocks"):
        adapter.resolve({name: Spec("F32", (3 * DIM, DIM)) for root in "ab" for name in base(f"{root}.blocks")})
    with pytest.raises(MatchError, match="the base has no blocks with attention"):
        adapter.resolve({"x.weight": Spec("F32", (2, 2))})


def test_the_decoder_that_was_trained_whole(tmp_path: Path) -> None:
    table = tensors() | {"mask_decoder.iou.weight": torch.ones(2, 2)}
    adapter = load(written(tmp_path, table))
    assert len(adapter) == BLOCKS + 1 and adapter["mask_decoder.iou.weight"].kind == "replacement"
    assert set(encode(adapter, "samlora").tensors) == set(table)


def test_round_trip_keeps_bytes(tmp_path: Path) -> None:
    table = tensors(fc_6in_5out=randn(5, DIM, seed=3))
    write_checkpoint(tmp_path / "base", base() | {"head.weight": randn(5, DIM, seed=4)})
    convert(written(tmp_path, table), tmp_path / "peft", format="loratools", base=tmp_path / "base", alpha_in=2.0)
    again = encode(load(tmp_path / "peft"), "samlora").tensors
    assert {key: bytes(ref.read()) for key, ref in again.items()} == {key: raw(tensor) for key, tensor in table.items()}


def test_queries_and_values_that_lie_apart_are_written_too(tmp_path: Path) -> None:
    """Under a base of LoRA-ViT's own vision transformer they are two weights of each block."""
    known: Any = {f"transformer.blocks.{b}.attn.proj_{side}.weight": Spec("F32", (DIM, DIM)) for b in range(BLOCKS) for side in "qkv"}
    adapter = load(written(tmp_path, tensors())).resolve(known)
    assert len(adapter) == 2 * BLOCKS
    again = encode(adapter, "samlora").tensors
    assert {key: bytes(ref.read()) for key, ref in again.items()} == {key: raw(tensor) for key, tensor in tensors().items()}


def low(rank: int = RANK, rows: int = DIM, **more: Any) -> LowRank:
    return LowRank(A=to_ref(torch.ones(rank, DIM)), B=to_ref(torch.ones(rows, rank)), alpha=more.pop("alpha", float(rank)), **more)


NAME = "transformer.blocks.{}.attn.proj_{}.weight"
QKV = "blocks.0.attn.qkv.weight"
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no values": (
        {NAME.format(0, "q"): low()}, r"blocks\.0\.attn\.proj_q\.weight: queries and values of all .*found no values of block 0; .*peft",
    ),
    "a gap": (
        {NAME.format(block, side): low() for block in (0, 2) for side in "qv"},
        r"blocks\.0\.attn\.proj_v\.weight: queries and values of all .*found no queries of block 1",
    ),
    "two ranks": (
        {NAME.format(block, side): low(1 + block) for block in (0, 1) for side in "qv"},
        r"blocks\.1\.attn\.proj_q\.weight: one rank holds for all .*resize --rank makes it one",
    ),
    "two transformers": (
        {f"{root}.{NAME.format(0, side)}": low() for root in "ab" for side in "qv"},
        r"b\.transformer\.blocks\.0\.attn\.proj_q\.weight: blocks of a second transformer; write those of each to a file of its own",
    ),
    "a head alone": ({"head.weight": Replacement(value=to_ref(torch.ones(2, DIM)))}, r"head\.weight: .*none is changed; --format lora"),
    "keys": ({NAME.format(0, "k"): low()}, r"proj_k\.weight: these files change the queries and values"),
    "a scaling": ({NAME.format(0, "q"): low(alpha=5.0)}, r"proj_q\.weight: these files have no alpha.*found 2\.5; rescale --bake"),
    "an embedding": ({NAME.format(0, "q"): low(layer="embedding")}, r"proj_q\.weight: no matrix stored \(out, in\)"),
    "other rows": ({QKV: low(rows=2 * DIM)}, r"qkv\.weight: no fused query, key and value: found \[12, 6\]"),
    "another kind": ({QKV: Full(diff=to_ref(torch.ones(18, 6)))}, r"qkv\.weight: these files cannot say .*--kind lora"),
    "another tensor": ({"x.weight": Replacement(value=to_ref(torch.ones(2)))}, r"x\.weight: these files have a head's weight and SAM's"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_these_files_cannot_say(case: str) -> None:
    deltas, said = REFUSED[case]
    with pytest.raises(NotExpressible, match=said):
        encode(Adapter(deltas), "samlora")


def test_a_change_of_the_whole_fused_weight(tmp_path: Path) -> None:
    """Where the rows of the keys are zero, queries and values share A; else these files cannot say it."""
    B = randn(3 * DIM, RANK, seed=1)
    root = "base_model.model.blocks.0.attn.qkv"
    pair = {f"{root}.lora_A.weight": randn(RANK, DIM, seed=0), f"{root}.lora_B.weight": B}
    write_adapter(tmp_path / "keys", pair, peft_config(target_modules=["qkv"], r=RANK, lora_alpha=RANK))
    with pytest.raises(NotExpressible, match="it changes the keys too"):
        encode(load(tmp_path / "keys"), "samlora")
    B[DIM : 2 * DIM] = 0
    write_adapter(tmp_path / "plain", pair, peft_config(target_modules=["qkv"], r=RANK, lora_alpha=RANK))
    found = encode(load(tmp_path / "plain"), "samlora").tensors
    assert bytes(found["w_b_001"].read()) == raw(B[2 * DIM :].contiguous())
    assert bytes(found["w_a_000"].read()) == bytes(found["w_a_001"].read())


@pytest.mark.parametrize(
    ("more", "error", "said"),
    [
        ({"w_b_003": ...}, LoratoolsError, "w_a_003: has no w_b_003 beside it, of its block's values"),
        ({"w_a_002": torch.ones(3, DIM), "w_b_002": torch.ones(DIM, 3)}, ShapeError, "w_a_003: a block's values are changed at another"),
        ({"fc_6in_5out": torch.ones(5, DIM), "fc_6in_4out": torch.ones(4, DIM)}, LoratoolsError, "a second head"),
        ({"fc_6in_5out": torch.ones(4, DIM)}, ShapeError, "not the shape that its name tells: found [4, 6], expected [5, 6]"),
        ({"norm.weight": torch.ones(4)}, LoratoolsError, "norm.weight: not a key of this format"),
    ],
)
def test_files_that_are_wrong(tmp_path: Path, more: dict[str, Any], error: type[LoratoolsError], said: str) -> None:
    table = {key: tensor for key, tensor in (tensors() | more).items() if tensor is not ...}
    with pytest.raises(error) as caught:
        load(written(tmp_path, table), options=ReadOptions(alpha=2.0))
    assert said in str(caught.value)


def test_only_halves_are_refused(tmp_path: Path) -> None:
    """Two early files of LoRA-ViT hold the w_a alone."""
    with pytest.raises(LoratoolsError, match="w_a_000: has no w_b_000 beside it"):
        load(written(tmp_path, {name: tensor for name, tensor in tensors().items() if "_a_" in name}))
