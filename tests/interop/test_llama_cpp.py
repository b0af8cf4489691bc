"""llama.cpp: what its converter writes is what loratools merges, and what loratools writes is what it loads and computes with.

llama.cpp's own logits lie beside the adapters in tests/data/trained/llama_cpp; where llama-cpp-python is installed it runs anew.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from loratools import convert, rescale
from tests.interop.test_mlx import expert_adapter
from tests.interop.trained import assert_same, cases, hugging_face, logits_of, make_base, merged_logits, peft_adapter, recorded

LIVE = "install llama-cpp-python, which builds llama.cpp: pip install llama-cpp-python"
DENSE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PEFT: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"targets": [*DENSE, "lm_head"]}),
    "rslora": ("llama", {"targets": DENSE, "use_rslora": True}),
    "embedding": ("llama", {"targets": ["embed_tokens", "k_proj"]}),
    "qwen2": ("qwen2", {"targets": DENSE}),
    "qwen3": ("qwen3", {"targets": DENSE}),
    "phi3": ("phi3", {"targets": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]}),
    "ranks": ("llama", {"targets": DENSE, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3}}),
}


def live() -> Any:
    """llama.cpp run by llama-cpp-python."""
    pytest.importorskip("llama_cpp", reason=LIVE)
    from tests.interop.trainers import with_llama_cpp

    return with_llama_cpp


@pytest.mark.parametrize("case", cases("llama_cpp"))
def test_what_its_converter_wrote(tmp_path: Path, case: str) -> None:
    base, adapter, logits = recorded("llama_cpp", case)
    assert_same(merged_logits(base, adapter / "adapter.gguf", tmp_path / "out"), logits, logits_of(hugging_face(base)))


@pytest.mark.parametrize("case", cases("llama_cpp"))
def test_the_same_logits_now(case: str) -> None:
    cpp = live()
    base, adapter, logits = recorded("llama_cpp", case)
    assert_same(cpp.logits(base, adapter / "adapter.gguf"), logits, cpp.logits(base))


@pytest.mark.parametrize("case", PEFT)
def test_it_loads_what_peft_saved(tmp_path: Path, case: str) -> None:
    cpp = live()
    kind, more = PEFT[case]
    make_base(kind, tmp_path / "base")
    logits = peft_adapter(tmp_path / "base", tmp_path / "peft", **more)
    convert(tmp_path / "peft", tmp_path / "a.gguf", format="gguf", base=tmp_path / "base")
    assert_same(cpp.logits(tmp_path / "base", tmp_path / "a.gguf"), logits, cpp.logits(tmp_path / "base"))


def test_a_scaling_of_one(tmp_path: Path) -> None:
    """Written as an alpha of 0, which llama.cpp takes for a scaling of 1; ranks differ, so that no one alpha would do."""
    cpp = live()
    make_base("llama", tmp_path / "base")
    logits = peft_adapter(tmp_path / "base", tmp_path / "peft", targets=DENSE, rank_pattern={"q_proj": 2})
    rescale(tmp_path / "peft", tmp_path / "baked", bake=True)
    convert(tmp_path / "baked", tmp_path / "a.gguf", format="gguf", base=tmp_path / "base")
    assert_same(cpp.logits(tmp_path / "base", tmp_path / "a.gguf"), logits, cpp.logits(tmp_path / "base"))


def test_it_loads_weights_that_are_stored_transposed(tmp_path: Path) -> None:
    """Its GELU is a table of float16, whose steps near 1 are 1e-3; ten layers' worth of them are not reached."""
    cpp = live()
    make_base("gpt2", tmp_path / "base")
    logits = peft_adapter(tmp_path / "base", tmp_path / "peft", targets=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)
    convert(tmp_path / "peft", tmp_path / "a.gguf", format="gguf", base=tmp_path / "base")
    assert_same(cpp.logits(tmp_path / "base", tmp_path / "a.gguf"), logits, cpp.logits(tmp_path / "base"), atol=1e-3)


def test_it_loads_experts_as_a_stack(tmp_path: Path) -> None:
    cpp = live()
    make_base("mixtral", tmp_path / "base")
    convert(expert_adapter(tmp_path / "peft"), tmp_path / "a.gguf", format="gguf", base=tmp_path / "base")
    expected = merged_logits(tmp_path / "base", tmp_path / "peft", tmp_path / "out")
    assert_same(cpp.logits(tmp_path / "base", tmp_path / "a.gguf"), expected, cpp.logits(tmp_path / "base"))


def test_a_strength_is_its_scale(tmp_path: Path) -> None:
    cpp = live()
    base, adapter, _ = recorded("llama_cpp", "llama-lora")
    rescale(adapter / "adapter.gguf", tmp_path / "half.gguf", by=0.5)
    half = cpp.logits(base, adapter / "adapter.gguf", scale=0.5)
    torch.testing.assert_close(cpp.logits(base, tmp_path / "half.gguf"), half, rtol=0, atol=1e-5)
