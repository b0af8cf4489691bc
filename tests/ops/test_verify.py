"""verify finds every planted fault, by digest, by replay and by the layers, and never doubts a correct output."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratools
from loratools.deltas.dora import DoRA
from loratools.deltas.lowrank import LowRank
from loratools.errors import FormatError, OptionError
from loratools.layers.agreement import LIMIT, disagreement
from loratools.refs import Spec
from loratools.statistics import Statistics
from loratools.stream import Applied, apply_blocks
from loratools.tensors import as_tensor, to_ref
from tests.files import write_adapter, write_checkpoint

SHAPES = {"q": (24, 24), "k": (24, 24), "up": (40, 24)}


def _pair(folder: Path, dtype: torch.dtype, *, dora: bool = False) -> tuple[Path, Path]:
    generator = torch.Generator().manual_seed(0)
    weights = {f"{name}.weight": (torch.randn(shape, generator=generator) * 0.05).to(dtype) for name, shape in SHAPES.items()}
    weights["norm.weight"] = torch.ones(24, dtype=dtype)
    tensors = {}
    for name, (out, into) in SHAPES.items():
        root = f"base_model.model.{name}"
        tensors[f"{root}.lora_A.weight"] = torch.randn(4, into, generator=generator) * 0.2
        tensors[f"{root}.lora_B.weight"] = torch.randn(out, 4, generator=generator) * 0.05
        if dora:
            norms = weights[f"{name}.weight"].float().norm(dim=1)
            tensors[f"{root}.lora_magnitude_vector"] = norms * (1 + 0.1 * torch.randn(out, generator=generator))
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": list(SHAPES), "use_dora": dora}
    return write_checkpoint(folder / "base", weights, {"model_type": "llama"}), write_adapter(folder / "adapter", tensors, config)


def _parts(base: Path, adapter: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return load_file(base / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")


def _merged(W: Tensor, A: Tensor, B: Tensor, scale: float, m: Tensor | None = None, *, by: str = "sum", axis: int = 1) -> Tensor:
    """The merge in float64, with the faults one can make in it."""
    delta = scale * B.double() @ A.double()
    V = W.double() + (-delta if by == "minus" else delta)
    if m is None:
        return V.to(W.dtype)
    norm = (W.double() if by == "base norm" else V).norm(dim=axis, keepdim=True)
    return (m.double().unsqueeze(axis) * V / norm).to(W.dtype)


# each takes (weights, factors, dora) and gives what a faulty tool would have written for some tensors
FAULTS: dict[str, tuple[bool, Callable[[dict[str, Tensor], dict[str, Tensor]], dict[str, Tensor]]]] = {}


def fault(name: str, *, dora: bool = False) -> Callable[..., object]:
    def keep(function: Callable[..., dict[str, Tensor]]) -> Callable[..., dict[str, Tensor]]:
        FAULTS[name] = dora, function
        return function

    return keep


def _factors(factors: dict[str, Tensor], name: str) -> tuple[Tensor, Tensor, Tensor | None]:
    root = f"base_model.model.{name}"
    return factors[f"{root}.lora_A.weight"], factors[f"{root}.lora_B.weight"], factors.get(f"{root}.lora_magnitude_vector")


def _each(weights: dict[str, Tensor], factors: dict[str, Tensor], make: Callable[..., Tensor]) -> dict[str, Tensor]:
    return {f"{name}.weight": make(weights[f"{name}.weight"], *_factors(factors, name)) for name in SHAPES}


@fault("one module not merged")
def _(weights: dict[str, Tensor], factors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"k.weight": weights["k.weight"]}


@fault("nothing merged")
def _(weights: dict[str, Tensor], factors: dict[str, Tensor]) -> dict[str, Tensor]:
    return _each(weights, factors, lambda W, A, B, m: W)


@fault("scale without alpha")
def _(weights: dict[str, Tensor], factors: dict[str, Tensor]) -> dict[str, Tensor]:
    return _each(weights, factors, lambda W, A, B, m: _merged(W, A, B, 1.0))


@fault("rslora's scale")
def _(weights: dict[str, Tensor], factors: dict[str, Tensor]) -> dict[str, Tensor]:
    return _each(weights, factors, lambda W, A, B, m: _merged(W, A, B, 4.0))


@fault("scale off by a tenth")
def _(weights: dict[str, Tensor], factors: dict[str, Tensor]) -> dict[str, Tensor]:
    return _each(weights, factors, lambda W, A, B, m: _merged(W, A, B, 2.2))


@fault("subtracted")
def _(weights: dict[str, Tensor], factors: dict[str, Tensor]) -> dict[str, Tensor]:
    return _each(weights, factors, lambda W, A, B, m: _merged(W, A, B, 2.0, by="minus"))


@fault("square delta transposed")
def _(weights: dict[str, Tensor], factors: dict[str, Tensor]) -> dict[str, Tensor]:
    A, B, _ = _factors(factors, "q")
    return {"q.weight": _merged(weights["q.weight"], B.T, A.T, 2.0)}


@fault("two modules swapped")
def _(weights: dict[str, Tensor], factors: dict[str, Tensor]) -> dict[str, Tensor]:
    (A, B, _), (C, D, _) = _factors(factors, "q"), _factors(factors, "k")
    return {"q.weight": _merged(weights["q.weight"], C, D, 2.0), "k.weight": _merged(weights["k.weight"], A, B, 2.0)}


@fault("merged twice")
def _(weights: dict[str, Tensor], factors: dict[str, Tensor]) -> dict[str, Tensor]:
    return _each(weights, factors, lambda W, A, B, m: _merged(_merged(W, A, B, 2.0), A, B, 2.0))


@fault("one row of B lost")
def _(weights: dict[str, Tensor], factors: dict[str, Tensor]) -> dict[str, Tensor]:
    A, B, _ = _factors(factors, "up")
    short = B.clone()
    short[7] = 0
    return {"up.weight": _merged(weights["up.weight"], A, short, 2.0)}


@fault("one rank component lost")
def _(weights: dict[str, Tensor], factors: dict[str, Tensor]) -> dict[str, Tensor]:
    A, B, _ = _factors(factors, "up")
    return {"up.weight": _merged(weights["up.weight"], A[:3], B[:, :3], 2.0)}


@fault("magnitude dropped", dora=True)
def _(weights: dict[str, Tensor], factors: dict[str, Tensor]) -> dict[str, Tensor]:
    return _each(weights, factors, lambda W, A, B, m: _merged(W, A, B, 2.0))


@fault("norm along the wrong axis", dora=True)
def _(weights: dict[str, Tensor], factors: dict[str, Tensor]) -> dict[str, Tensor]:
    A, B, m = _factors(factors, "q")
    return {"q.weight": _merged(weights["q.weight"], A, B, 2.0, m, axis=0)}


@fault("norm of the base alone", dora=True)
def _(weights: dict[str, Tensor], factors: dict[str, Tensor]) -> dict[str, Tensor]:
    return _each(weights, factors, lambda W, A, B, m: _merged(W, A, B, 2.0, m, by="base norm"))


@fault("magnitude moved by a row", dora=True)
def _(weights: dict[str, Tensor], factors: dict[str, Tensor]) -> dict[str, Tensor]:
    return _each(weights, factors, lambda W, A, B, m: _merged(W, A, B, 2.0, m.roll(1)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_found(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    dora, spoil = FAULTS[name]
    base, adapter = _pair(tmp_path, dtype, dora=dora)
    out = tmp_path / "out"
    loratools.merge(base, adapter, out)
    assert loratools.verify(out, base=base, adapters=adapter, forward=True)["ok"]
    spoilt = spoil(*_parts(base, adapter))
    tensors = load_file(out / "model.safetensors") | {key: value.contiguous() for key, value in spoilt.items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    assert not loratools.verify(out)["ok"]  # the digests
    (out / "loratools.json").unlink()
    replayed = loratools.verify(out, base=base, adapters=adapter)
    assert not replayed["ok"] and any(key in line for key in spoilt for line in replayed["faults"])
    forward = loratools.verify(out, base=base, adapters=adapter, forward=True)["forward"]
    assert max(row["ratio"] for row in forward if row["name"] in spoilt) > LIMIT


@given(
    out=st.integers(1, 40), into=st.integers(1, 40), rank=st.integers(1, 6), seed=st.integers(0, 10_000),
    size=st.sampled_from([1e-5, 1e-2, 1.0, 30.0]), dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    kind=st.sampled_from(["linear", "transposed", "embedding", "conv"]), dora=st.sampled_from([None, "out", "in"]),
)  # fmt: skip
@settings(max_examples=200)
def test_a_correct_output_never_fails(
    out: int, into: int, rank: int, seed: int, size: float, dtype: torch.dtype, kind: str, dora: str | None
) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (out, into, 2, 3) if kind == "conv" else (out, into)
    W = (torch.randn(shape, generator=generator) * 0.1).to(dtype)
    low = LowRank(
        A=to_ref(torch.randn(rank, *shape[1:], generator=generator)), B=to_ref(torch.randn(out, rank, generator=generator) * size * 0.1),
        alpha=rank, layer=kind,
    )  # fmt: skip
    delta: LowRank | DoRA = low
    if dora is not None and min(out, into) > 1:
        along = "out" if kind == "conv" else dora
        magnitude = torch.rand((out, *(1,) * (len(shape) - 1)) if along == "out" else (1, into), generator=generator) + 0.5
        delta = DoRA(direction=low, magnitude=to_ref(magnitude))
    spec = to_ref(W).spec
    applied = Applied(to_ref(W), spec, ((delta, 1.0),))
    data = b"".join(bytes(block) for block in apply_blocks(applied, Statistics(kinds=()), lambda _: None))
    merged = as_tensor(bytearray(data), Spec(spec.dtype, spec.shape))
    ratio, _ = disagreement(W, merged, [(delta, 1.0)], seed=seed)
    assert ratio < LIMIT


def test_what_no_layer_can_say_is_told(tmp_path: Path) -> None:
    base, _ = _pair(tmp_path, torch.float32)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": [], "modules_to_save": ["norm"]}
    adapter = write_adapter(tmp_path / "saved", {"base_model.model.norm.weight": torch.full((24,), 2.0)}, config)
    loratools.merge(base, adapter, tmp_path / "out")
    report = loratools.verify(tmp_path / "out", base=base, adapters=adapter, forward=True)
    assert report["ok"] and report["forward"] == [{"name": "norm.weight", "ratio": None, "skipped": "no layer for replacement"}]


def test_strengths_and_dtype_are_replayed(tmp_path: Path) -> None:
    base, adapter = _pair(tmp_path, torch.bfloat16)
    loratools.merge(base, f"{adapter}:0.5", tmp_path / "out", dtype="float32")
    report = loratools.verify(tmp_path / "out", base=base, adapters=f"{adapter}:0.5", forward=True)
    assert report["ok"] and report["max_ulp"] == 0 and report["replayed"] == 4
    assert not loratools.verify(tmp_path / "out", base=base, adapters=str(adapter))["ok"]


def _flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_files_are_checked(tmp_path: Path) -> None:
    base, adapter = _pair(tmp_path, torch.float32)
    (base / "tokenizer.json").write_text("{}")
    out = tmp_path / "out"
    for spoil, said in (
        (lambda: _flip(out / "model.safetensors", -1), "not the bytes that were written"),
        (lambda: (out / "tokenizer.json").write_text("[]"), "tokenizer.json: not the bytes"),
        (lambda: (out / "config.json").unlink(), "config.json: the receipt has it, the output lacks it"),
        (lambda: save_file({"x": torch.ones(1)}, out / "extra.safetensors"), "extra.safetensors: weights that the receipt does not know"),
        (lambda: save_file(load_file(out / "model.safetensors"), out / "model.safetensors"), "its header is not the one that was written"),
    ):
        loratools.merge(base, adapter, out, overwrite=True)
        spoil()
        report = loratools.verify(out)
        assert not report["ok"] and any(said in line for line in report["faults"]), (said, report["faults"])


def test_an_extracted_adapter_is_checked_too(tmp_path: Path) -> None:
    base, adapter = _pair(tmp_path, torch.float32)
    loratools.merge(base, adapter, tmp_path / "tuned")
    loratools.extract(base, tmp_path / "tuned", tmp_path / "again", rank=4)
    assert loratools.verify(tmp_path / "again")["ok"]
    _flip(tmp_path / "again" / "adapter_model.safetensors", -1)
    assert not loratools.verify(tmp_path / "again")["ok"]


@pytest.mark.parametrize(
    ("format", "out", "file"),
    [
        ("gguf", "a.gguf", "."), ("trtllm", "a", "model.lora_weights.npy"), ("litgpt", "a", "lit_model.pth.lora"),
        ("torchtune", "a", "adapter_model.pt"), ("nemo", "a", "adapter_model.safetensors"), ("kohya", "a.safetensors", "."),
    ],
)  # fmt: skip
def test_outputs_of_every_container_are_checked(tmp_path: Path, format: str, out: str, file: str) -> None:
    """GGUF, a trainer's pickle, arrays without names: what `convert` wrote verifies, and a byte that turned is found."""
    name = "model.layers.0.self_attn.o_proj"
    config = {"model_type": "llama", "num_attention_heads": 2, "hidden_size": 24, "architectures": ["LlamaForCausalLM"]}
    base = write_checkpoint(tmp_path / "base", {f"{name}.weight": torch.ones(24, 24)}, config)
    tensors = {f"base_model.model.{name}.lora_A.weight": torch.rand(4, 24), f"base_model.model.{name}.lora_B.weight": torch.rand(24, 4)}
    adapter = write_adapter(tmp_path / "adapter", tensors, {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["o_proj"]})
    made = tmp_path / out
    loratools.convert(adapter, made, format=format, base=base)
    assert loratools.verify(made)["ok"]
    place = made / file
    data = bytearray(place.read_bytes())
    data[data.index(bytes(tensors[f"base_model.model.{name}.lora_A.weight"].numpy().tobytes()[:8]))] ^= 1
    place.write_bytes(data)
    assert not loratools.verify(made)["ok"]


def test_wrong_use(tmp_path: Path) -> None:
    base, adapter = _pair(tmp_path, torch.float32)
    with pytest.raises(FormatError, match="no receipt beside it"):
        loratools.verify(base)
    with pytest.raises(OptionError, match="belong together"):
        loratools.verify(base, adapters=adapter)
    (base / "loratools.json").write_text(json.dumps({"operation": "merge"}))
    with pytest.raises(FormatError, match="not a receipt"):
        loratools.verify(base)
