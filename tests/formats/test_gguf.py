"""GGUF: what llama.cpp's names and rows become, one alpha, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from loratools import convert
from loratools.adapter import Adapter
from loratools.deltas.lowrank import LowRank
from loratools.errors import AmbiguousError, FormatError, NotExpressible, UnsupportedError
from loratools.formats import encode, load, save
from loratools.formats.gguf_rows import halved, interleaved
from loratools.gguffile import GGUFFile, write_gguf
from loratools.tensors import read_tensor, to_ref
from tests.files import write_checkpoint
from tests.strategies import randn

CONFIG = {"model_type": "llama", "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": False}
Q, V = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.v_proj.weight"


def low(rank: int = 2, alpha: float = 4.0) -> LowRank:
    return LowRank(A=to_ref(randn(rank, 8, seed=0)), B=to_ref(randn(8, rank, seed=1)), alpha=alpha, layer="linear")


def test_written_and_read_again(tmp_path: Path) -> None:
    save(Adapter({Q: low(), V: low()}, model=CONFIG), tmp_path / "a.gguf", format="gguf")
    stored = GGUFFile(tmp_path / "a.gguf")
    expected = read_tensor(low().B).reshape(2, 2, 2, 2).swapaxes(1, 2).reshape(8, 2)
    assert torch.equal(read_tensor(stored["blk.0.attn_q.weight.lora_b"]), expected)
    assert stored.fields["adapter.lora.alpha"] == 4.0 and stored.fields["general.architecture"] == "llama"
    found = load(tmp_path / "a.gguf")
    assert found.format == "gguf" and list(found) == [Q, V]
    for name in found:
        assert torch.equal(read_tensor(found[name].refs()["B"]), read_tensor(low().B)) and found[name].facts()["alpha"] == 4.0


def test_rows_there_and_back() -> None:
    B = to_ref(randn(12, 3, seed=2))
    assert bytes(halved(interleaved(B, 3), 3).read()) == bytes(B.read())


def test_heads_that_nothing_tells(tmp_path: Path) -> None:
    fields = {"general.architecture": "llama", "general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 4.0}
    tensors = {"blk.0.attn_q.weight.lora_a": to_ref(randn(2, 8, seed=0)), "blk.0.attn_q.weight.lora_b": to_ref(randn(8, 2, seed=1))}
    write_gguf(tmp_path / "a.gguf", fields, tensors)
    with pytest.raises(AmbiguousError, match="give --base"):
        load(tmp_path / "a.gguf")[Q].refs()["B"].read()
    write_gguf(tmp_path / "m.gguf", fields | {"general.type": "model"}, tensors)
    with pytest.raises(UnsupportedError, match="no adapter"):
        load(tmp_path / "m.gguf")
    (tmp_path / "t.gguf").write_bytes((tmp_path / "a.gguf").read_bytes()[:90])
    with pytest.raises(FormatError, match="not a GGUF file"):
        load(tmp_path / "t.gguf")


def test_one_alpha() -> None:
    same = encode(Adapter({Q: low(2, 4.0), V: low(4, 8.0)}, model=CONFIG), "gguf")
    assert same.fields["adapter.lora.alpha"] == 8.0 and same.tensors["blk.0.attn_q.weight.lora_a"].spec.shape == (4, 8)
    assert encode(Adapter({Q: low(2, 2.0), V: low(4, 4.0)}, model=CONFIG), "gguf").fields["adapter.lora.alpha"] == 0.0
    for alpha, message in ((3.0, "rescale --bake"), (0.0, "one alpha|0 stands")):
        with pytest.raises(NotExpressible, match=message):
            encode(Adapter({Q: low(), V: low(2, alpha)}, model=CONFIG), "gguf")
    with pytest.raises(NotExpressible, match=r"q_proj\.weight: .*give convert --base"):
        encode(Adapter({Q: low()}), "gguf")


def test_an_alpha_that_float32_rounds_is_told(tmp_path: Path) -> None:
    """rsLoRA's scaling alpha/√r is that of an alpha·√r, which GGUF holds in 32 bits."""
    stabilised = LowRank(A=low(2).A, B=low(2).B, alpha=4.0, rslora=True, layer="linear")
    made = encode(Adapter({Q: stabilised}, model=CONFIG), "gguf")
    (note,) = made.notes
    assert note.startswith(f"{Q}: GGUF holds alpha in float32: 5.65685424949238") and "a scaling off by a share of" in note
    assert abs(made.fields["adapter.lora.alpha"] / (4.0 * 2**0.5) - 1) < 2**-24
    assert encode(Adapter({Q: low()}, model=CONFIG), "gguf").notes == ()
    write_checkpoint(tmp_path / "base", {Q: randn(8, 8, seed=3), V: randn(8, 8, seed=4)}, CONFIG)
    save(Adapter({Q: stabilised}), tmp_path / "peft")
    receipt = convert(tmp_path / "peft", tmp_path / "a.gguf", format="gguf", base=tmp_path / "base")
    assert note in receipt["notes"]
EXPERT = "model.layers.0.block_sparse_moe.experts.{}.w1.weight"
MIXTRAL = {**CONFIG, "model_type": "mixtral", "num_local_experts": 2}
REFUSED: dict[str, tuple[dict[str, LowRank], dict[str, object], str]] = {
    "a model that is not known": ({Q: low()}, {"model_type": "bert"}, r"q_proj\.weight: a model_type .* found bert.*; --format peft"),
    "another tensor": ({"model.layers.0.x.weight": low()}, CONFIG, r"x\.weight: not a tensor of llama .*; fit --for"),
    "a convolution": (
        {Q: LowRank(A=to_ref(randn(2, 8, 1, 1, seed=0)), B=to_ref(randn(8, 2, seed=1)), alpha=4.0, layer="conv")}, CONFIG,
        r"q_proj\.weight: llama\.cpp has LoRA on matrices, and this is a convolution's; --format peft or loratools has it",
    ),
    "an expert that is not there": ({EXPERT.format(0): low()}, MIXTRAL, r"experts\.0\.w1\.weight: .*found none of expert 1; --format peft"),
    "experts that differ": (
        {EXPERT.format(0): low(), EXPERT.format(1): replace(low(), A=to_ref(randn(2, 8, seed=0, dtype=torch.float16)))}, MIXTRAL,
        r"experts\.0\.w1\.weight: experts whose factors differ do not stack.*; resize --rank R --dtype float32",
    ),
    "how many experts": (
        {EXPERT.format(0): low()}, {**CONFIG, "model_type": "mixtral"},
        r"w1\.weight: an expert's LoRA, and the base's .*; give convert --base",
    ),
    "two names of one": (
        {Q: low(), Q.replace("model.", "model.language_model.", 1): low()}, CONFIG,
        r"two names of one .*found blk\.0\.attn_q\.weight; convert --base",
    ),
    "heads that nothing tells": ({Q: low()}, {"model_type": "llama"}, r"q_proj\.weight: llama\.cpp interleaves .*; give convert --base"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_has_no_place_for(case: str) -> None:
    deltas, model, said = REFUSED[case]
    with pytest.raises(NotExpressible, match=said):
        encode(Adapter(dict(deltas), model=model), "gguf")
