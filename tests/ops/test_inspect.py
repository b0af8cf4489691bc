"""inspect: what it counts, what it warns of, and what it reads to know it."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

import loratools
from loratools.errors import AmbiguousError, FormatError, LoratoolsError, MatchError, OptionError, ShapeError, UnsupportedError
from loratools.tensorfile import InFile
from tests.cli._adapters import environment, llama_adapter
from tests.conftest import llama_config, llama_tensors
from tests.files import lora, peft_config, write_adapter, write_checkpoint

inspect = loratools.inspect
ROOT = "base_model.model."


def number(*more: str) -> dict[str, Any]:
    return {"type": ["number", *more]}


ADAPTER = {
    "path": {"type": "string"},
    "format": {"const": "peft"},
    "kinds": {"type": "object", "additionalProperties": {"type": "integer", "minimum": 1}},
    "base_model": {"type": ["string", "null"]},
    "modules": {"type": "array"},
    "modules_total": {"type": "integer"},
    "parameters": {"type": "integer"},
    "base_parameters": {"type": ["integer", "null"]},
    "trainable_percent": number("null"),
    "bytes": {"type": "integer"},
    "ranks": {"type": "object", "additionalProperties": {"type": "integer", "minimum": 1}},
    "values_checked": {"type": "boolean"},
    "warnings": {"type": "array", "items": {"type": "string"}},
}
MODULE = {
    "name": {"type": "string"},
    "kind": {"type": "string"},
    "shape": {"type": "array", "items": {"type": "integer"}},
    "rank": {"type": ["integer", "null"]},
    "alpha": number("null"),
    "scaling": number("null"),
    "parameters": {"type": "integer"},
    "dtype": {"type": "string"},
}
SPECTRUM = {"norm": number("null"), "effective_rank": number("null"), "sigma": {"type": ["array", "null"]}, "magnitude": {"type": "object"}}


def exactly(properties: dict[str, Any], *optional: str) -> dict[str, Any]:
    required = [name for name in properties if name not in optional]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


# -- the report


@pytest.mark.parametrize("values", [False, True])
def test_the_report_has_exactly_the_promised_fields(tmp_path: Path, base: Path, values: bool) -> None:
    adapter = llama_adapter(tmp_path / "adapter")
    for report in (inspect(adapter, values=values), inspect(adapter, base=base, values=values)):
        jsonschema.validate(json.loads(json.dumps(report, allow_nan=False)), exactly(ADAPTER))
        for row in report["modules"]:
            jsonschema.validate(row, exactly(MODULE))
        assert report["values_checked"] is values


def test_what_an_adapter_holds(tmp_path: Path) -> None:
    adapter = llama_adapter(tmp_path / "adapter", base_model_name_or_path="org/tiny")
    report = inspect(adapter)
    assert (report["path"], report["base_model"], report["kinds"], report["ranks"]) == (str(adapter), "org/tiny", {"lora": 4}, {"2": 4})
    assert report["parameters"] == 2 * (2 * 8 + 8 * 2) + 2 * (2 * 8 + 4 * 2) and report["modules_total"] == 4
    assert report["bytes"] == (adapter / "adapter_model.safetensors").stat().st_size
    assert report["warnings"] == [] and report["base_parameters"] is None and report["trainable_percent"] is None
    assert report["modules"][0] == {
        "name": "model.layers.0.self_attn.q_proj.weight", "kind": "lora", "shape": [8, 8], "rank": 2, "alpha": 4.0, "scaling": 2.0,
        "parameters": 32, "dtype": "F32",
    }  # fmt: skip


def test_the_literal_of_the_papers_arithmetic(tmp_path: Path) -> None:
    tensors = lora("fc", torch.zeros(8, 10000), torch.zeros(5000, 8))
    adapter = write_adapter(tmp_path / "adapter", tensors, peft_config(r=8, lora_alpha=8, target_modules=["fc"]))
    base = write_checkpoint(tmp_path / "base", {"fc.weight": torch.zeros(5000, 10000, dtype=torch.bfloat16)})
    report = inspect(adapter, base=base)
    assert report["parameters"] == 120_000 and report["base_parameters"] == 50_000_000
    assert report["trainable_percent"] == 100 * 120_000 / 50_120_000
    assert report["modules"][0]["shape"] == [5000, 10000]


def test_ranks_and_scalings_by_pattern_and_by_rslora(tmp_path: Path) -> None:
    tensors = lora("a.q", torch.ones(4, 8), torch.ones(8, 4)) | lora("a.k", torch.ones(2, 8), torch.ones(8, 2))
    config = peft_config(r=2, lora_alpha=6, rank_pattern={"q": 4}, alpha_pattern={"k": 1}, use_rslora=True, target_modules=["q", "k"])
    report = inspect(write_adapter(tmp_path / "adapter", tensors, config))
    found = {row["name"]: (row["rank"], row["alpha"], row["scaling"]) for row in report["modules"]}
    assert found == {"a.q.weight": (4, 6.0, 3.0), "a.k.weight": (2, 1.0, 1 / math.sqrt(2))}
    assert report["ranks"] == {"2": 1, "4": 1}


def test_every_kind_of_delta_has_its_row(tmp_path: Path) -> None:
    tensors = lora("conv", torch.ones(2, 3, 5, 5), torch.ones(7, 2, 1, 1), lora_B__bias=torch.ones(7))
    tensors |= {f"{ROOT}emb.lora_embedding_A": torch.ones(2, 11), f"{ROOT}emb.lora_embedding_B": torch.ones(6, 2)}
    tensors |= lora("lin", torch.ones(2, 4, dtype=torch.bfloat16), torch.ones(4, 2), lora_B__bias=torch.ones(4))
    tensors |= {f"{ROOT}head.weight": torch.ones(9, 4, dtype=torch.float16)}
    config = peft_config(target_modules=["conv", "emb", "lin"], modules_to_save=["head"], lora_bias=True)
    report = inspect(write_adapter(tmp_path / "adapter", tensors, config))
    rows = {row["name"]: (row["kind"], row["shape"], row["rank"], row["parameters"], row["dtype"]) for row in report["modules"]}
    assert rows == {
        "conv.weight": ("lora", [7, 3, 5, 5], 2, 2 * 75 + 14, "F32"),
        "conv.bias": ("full", [7], None, 7, "F32"),
        "emb.weight": ("lora", [11, 6], 2, 22 + 12, "F32"),
        "lin.weight": ("lora", [4, 4], 2, 16, "BF16+F32"),
        "lin.bias": ("full", [4], None, 4, "F32"),
        "head.weight": ("replacement", [9, 4], None, 36, "F16"),
    }
    assert report["kinds"] == {"lora": 3, "full": 2, "replacement": 1}


def test_share_of_the_base_is_what_peft_prints(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from torch import nn

    model = nn.Sequential(nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 10))
    base = write_checkpoint(tmp_path / "base", model.state_dict())
    tuned = get_peft_model(model, LoraConfig(r=3, target_modules=["0"], modules_to_save=["2"]))
    tuned.save_pretrained(tmp_path / "adapter")
    trainable, everything = tuned.get_nb_trainable_parameters()
    report = inspect(tmp_path / "adapter", base=base)
    assert report["parameters"] == trainable
    assert report["trainable_percent"] == 100 * trainable / everything


# -- what it reads


@pytest.mark.parametrize("base", [False, True])
def test_headers_alone_without_torch_or_the_hub(tmp_path: Path, base: bool) -> None:
    adapter = llama_adapter(tmp_path / "adapter")
    checkpoint = write_checkpoint(tmp_path / "base", llama_tensors(), llama_config(), shards=2)
    arguments = ["inspect", str(adapter)] + (["--base", str(checkpoint)] if base else [])
    code = (
        f"import sys\nfrom loratools.cli import run\nassert run({arguments!r}) == 0\nassert run(['inspect', {str(checkpoint)!r}]) == 0\n"
        "heavy = {'torch', 'numpy', 'rich', 'huggingface_hub'} & set(sys.modules)\nassert not heavy, heavy"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment())
    assert found.returncode == 0, found.stderr


def test_no_data_is_read_unless_asked_for(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = llama_adapter(tmp_path / "adapter")

    def refuse(self: InFile, buffer: memoryview, start: int) -> None:
        raise AssertionError(f"{self.path} was read")

    monkeypatch.setattr(InFile, "_fill", refuse)
    inspect(adapter)
    inspect(adapter, base=base)
    inspect(base)
    with pytest.raises(AssertionError):
        inspect(adapter, values=True)


# -- warnings of a base and of its values


def test_warns_of_a_tied_tensor_changed_alone(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", llama_tensors(head=False), llama_config(tie_word_embeddings=True))
    tensors = lora("lm_head", torch.ones(2, 8), torch.ones(17, 2))
    adapter = write_adapter(tmp_path / "adapter", tensors, peft_config(target_modules=["lm_head"]))
    (warning,) = inspect(adapter, base=base)["warnings"]
    assert warning == "lm_head.weight is changed alone, and tied to model.embed_tokens.weight in the base: merge needs --untie"
    with pytest.raises(UnsupportedError, match="--untie"):
        loratools.merge(base, adapter, tmp_path / "out")


def test_warns_of_a_quantised_base(tmp_path: Path) -> None:
    config = llama_config(quantization_config={"quant_method": "gptq"})
    base = write_checkpoint(tmp_path / "base", llama_tensors(), config)
    adapter = llama_adapter(tmp_path / "adapter")
    assert any("gptq" in text for text in inspect(adapter, base=base)["warnings"])
    assert any("gptq" in text for text in inspect(base)["warnings"])


def test_a_checkpoints_values(tmp_path: Path) -> None:
    tensors = llama_tensors() | {"steps": torch.tensor(3)}
    tensors["model.norm.weight"][0] = math.inf
    base = write_checkpoint(tmp_path / "base", tensors, llama_config())
    assert inspect(base)["warnings"] == []
    assert inspect(base, values=True)["warnings"] == ["model.norm.weight: 1 non-finite value"]


# -- spectra


@pytest.mark.parametrize("layer", ["linear", "conv", "embedding"])
def test_spectra_are_those_of_the_whole_difference(tmp_path: Path, layer: str) -> None:
    generator = torch.Generator().manual_seed(0)
    A, B = torch.randn(3, 10, generator=generator), torch.randn(8, 3, generator=generator)
    if layer == "conv":
        A, tensors = A.view(3, 5, 2), lora("m", A.view(3, 5, 2), B.view(8, 3, 1))
    elif layer == "embedding":
        tensors = {f"{ROOT}m.lora_embedding_A": A, f"{ROOT}m.lora_embedding_B": B}
    else:
        tensors = lora("m", A, B)
    report = inspect(write_adapter(tmp_path / "adapter", tensors, peft_config(r=3, lora_alpha=6, target_modules=["m"])), spectra=True)
    (row,) = report["modules"]
    jsonschema.validate(row, exactly(MODULE | SPECTRUM, "magnitude"))
    sigma = torch.linalg.svdvals(2 * B.double() @ A.double().flatten(1))[:3]
    share = sigma**2 / (sigma**2).sum()
    # both are float64 SVDs of matrices of norm 20: 1e-12 leaves 2 digits for the order of their sums
    assert torch.allclose(torch.tensor(row["sigma"], dtype=torch.float64), sigma, rtol=1e-12)
    assert row["norm"] == pytest.approx(float(sigma.norm()), rel=1e-12)
    assert row["effective_rank"] == pytest.approx(float(torch.exp(-(share * share.log()).sum())), rel=1e-12)
    assert report["values_checked"] is True


def test_spectra_of_dora_are_its_directions_with_the_range_of_its_magnitudes(tmp_path: Path) -> None:
    tensors = lora("m", torch.ones(1, 4), torch.ones(3, 1), lora_magnitude_vector=torch.tensor([0.5, 2.0, 1.0]))
    config = peft_config(r=1, lora_alpha=1, use_dora=True, target_modules=["m"])
    (row,) = inspect(write_adapter(tmp_path / "adapter", tensors, config), spectra=True)["modules"]
    jsonschema.validate(row, exactly(MODULE | SPECTRUM))
    assert row["kind"] == "dora" and row["magnitude"] == {"min": 0.5, "max": 2.0}
    assert row["norm"] == pytest.approx(math.sqrt(12), rel=1e-12)  # ones, 3 × 4
    assert row["parameters"] == 4 + 3 + 3


# -- with a base


def test_names_are_joined_with_the_bases(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", {f"wrapped.{name}": tensor for name, tensor in llama_tensors().items()})
    report = inspect(llama_adapter(tmp_path / "adapter"), base=base)
    assert report["modules"][0]["name"] == "wrapped.model.layers.0.self_attn.q_proj.weight"
    assert report["warnings"] == ["names aligned for the whole adapter: prefix 'wrapped.' added"]


def test_a_transposed_weight_has_the_shape_it_is_stored_in(tmp_path: Path) -> None:
    adapter = write_adapter(
        tmp_path / "adapter", lora("h.0.c_fc", torch.ones(2, 8), torch.ones(32, 2)), peft_config(target_modules=["c_fc"])
    )
    base = write_checkpoint(tmp_path / "base", {"h.0.c_fc.weight": torch.ones(8, 32)}, {"model_type": "gpt2"})
    assert inspect(adapter)["modules"][0]["shape"] == [32, 8]
    assert inspect(adapter, base=base)["modules"][0]["shape"] == [8, 32]
    assert inspect(adapter, transposed=["*c_fc"])["modules"][0]["shape"] == [8, 32]


@pytest.mark.parametrize(("hidden", "layers", "error", "name"), [(8, 3, MatchError, "layers.2."), (16, 2, ShapeError, "layers.0.")])
def test_a_base_that_does_not_fit_is_an_error(
    tmp_path: Path, base: Path, hidden: int, layers: int, error: type[Exception], name: str
) -> None:
    adapter = llama_adapter(tmp_path / "adapter", hidden=hidden, layers=layers)
    with pytest.raises(LoratoolsError) as raised:
        inspect(adapter, base=base)
    parts = getattr(raised.value, "errors", (raised.value,))
    assert all(isinstance(part, error) for part in parts)
    assert name in str(raised.value) and str(adapter) in str(raised.value)


# -- checkpoints, and telling one from the other


@pytest.mark.parametrize("shards", [1, 3])
def test_what_a_checkpoint_holds(tmp_path: Path, shards: int) -> None:
    tensors = llama_tensors() | {"steps": torch.tensor(3), "half": torch.ones(5, dtype=torch.float16)}
    base = write_checkpoint(tmp_path / "base", tensors, llama_config(), shards=shards)
    assert inspect(base) == {
        "path": str(base), "format": "checkpoint", "tensors": len(tensors), "parameters": sum(map(torch.numel, tensors.values())),
        "bytes": sum(file.stat().st_size for file in base.glob("*.safetensors")), "dtypes": {"F32": len(tensors) - 2, "I64": 1, "F16": 1},
        "shards": shards, "quantization": None, "components": None, "warnings": [],
    }  # fmt: skip


def test_a_checkpoint_by_any_of_its_names(tmp_path: Path, base: Path) -> None:
    sharded = write_checkpoint(tmp_path / "sharded", llama_tensors(), llama_config(), shards=2)
    by_index = inspect(sharded / "model.safetensors.index.json")
    assert by_index["shards"] == 2 and by_index["tensors"] == inspect(sharded)["tensors"] == inspect(base / "model.safetensors")["tensors"]
    (base / "model.safetensors").rename(base / "other.safetensors")
    assert inspect(base / "other.safetensors")["format"] == "checkpoint"


def test_a_model_that_lies_with_an_adapter_is_a_checkpoint_by_its_name(tmp_path: Path) -> None:
    folder = llama_adapter(tmp_path / "both")
    write_checkpoint(folder, llama_tensors(), llama_config())
    assert inspect(folder)["format"] == "peft"
    assert inspect(folder / "adapter_model.safetensors")["format"] == "peft"
    assert inspect(folder / "model.safetensors")["format"] == "checkpoint"


def test_an_adapter_that_was_never_merged_in_is_warned_of(tmp_path: Path) -> None:
    tensors = llama_tensors() | {"model.layers.0.self_attn.q_proj.lora_A.default.weight": torch.ones(2, 8)}
    base = write_checkpoint(tmp_path / "base", tensors)
    (warning,) = inspect(base)["warnings"]
    assert "model.layers.0.self_attn.q_proj.lora_A.default.weight: not merged yet?" in warning


@pytest.mark.parametrize("option", [{"base": "base"}, {"spectra": True}, {"alpha_in": 4.0}])
def test_options_of_adapters_are_refused_for_a_checkpoint(base: Path, option: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=r"--(base|spectra|alpha-in) is for adapters"):
        inspect(base, **option)


def test_a_pickle(tmp_path: Path) -> None:
    folder = llama_adapter(tmp_path / "adapter")
    expected = inspect(folder, values=True)["modules"]
    from safetensors.torch import load_file

    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    assert inspect(folder, values=True)["modules"] == expected
    assert inspect(folder)["bytes"] == (folder / "adapter_model.bin").stat().st_size


def test_what_is_an_adapter_but_none_that_is_read_is_not_taken_for_a_checkpoint(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file(
        {"blocks.0.lora_left": torch.ones(2, 4), "blocks.0.lora_right": torch.ones(4, 2)},
        tmp_path / "unknown.safetensors",
    )
    with pytest.raises((UnsupportedError, FormatError), match=r"blocks\.0\.lora_left"):
        inspect(tmp_path / "unknown.safetensors")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "adapter_config.json").write_text("{}")
    with pytest.raises(FormatError, match="no adapter in it"):
        inspect(tmp_path / "empty")


def test_an_adapter_whose_decoding_fails_is_an_error_that_names_it(tmp_path: Path) -> None:
    adapter = llama_adapter(tmp_path / "adapter", lora_alpha=None)
    with pytest.raises(AmbiguousError, match="--alpha-in") as raised:
        inspect(adapter)
    assert str(adapter) in str(raised.value)
    assert inspect(adapter, alpha_in=6)["modules"][0]["scaling"] == 3


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no such file or folder"):
        inspect(tmp_path / "none", base=tmp_path / "none too")


# -- a DoRA's magnitudes beside the base


def drifted(folder: Path, axis: int = 1, size: int = 48, drift: float = 0.02) -> tuple[Path, Path, torch.Tensor]:
    """A square weight, a peft DoRA whose magnitudes are the norms of its rows (or columns) moved evenly up to `drift`, and W."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(size, size, generator=generator) * (1 + torch.rand(size, 1, generator=generator) * 3)
    W = W * (1 + torch.rand(1, size, generator=generator) * 3)
    moved = torch.linspace(-drift, drift, size)
    tensors = lora("m", 0.01 * torch.ones(1, size), torch.ones(size, 1), lora_magnitude_vector=W.norm(dim=axis) * (1 + moved))
    config = peft_config(r=1, lora_alpha=1, use_dora=True, target_modules=["m"])
    return write_adapter(folder / "dora", tensors, config), write_checkpoint(folder / "base", {"m.weight": W}), W


def test_how_far_magnitudes_moved(tmp_path: Path) -> None:
    adapter, base, W = drifted(tmp_path)
    report = inspect(adapter, base=base)
    (row,) = report["modules"]
    assert report["warnings"] == [] and "magnitudes" not in inspect(adapter)["modules"][0]
    told = row["magnitudes"]
    assert told["axis"] == "out"
    assert told["drift"] == {name: pytest.approx(value, abs=1e-3) for name, value in (("min", -0.02), ("median", 0), ("max", 0.02))}
    best, other = told["fits"]
    V = W.double() + 0.01
    m = W.norm(dim=1).double() * (1 + torch.linspace(-0.02, 0.02, 48))
    for fit, side in ((best, 1), (other, 0)):
        assert fit["axis"] == ("out" if side else "in")
        for norm, key in ((W.double().norm(dim=side), "base"), (V.norm(dim=side), "changed")):
            assert fit[key] == pytest.approx(float((m / norm - 1).square().mean().sqrt()), rel=1e-5)  # m is stored in float32


def test_warns_of_magnitudes_that_fit_the_other_axis(tmp_path: Path) -> None:
    adapter, base, _ = drifted(tmp_path, axis=0)
    (warning,) = inspect(adapter, base=base)["warnings"]
    assert warning.startswith("m.weight: its magnitudes are read as one for each row, off ‖W‖ by ")
    assert "read as one for each column they are off by 0.01" in warning


def test_magnitudes_of_turned_layers_and_saved_tensors(tmp_path: Path) -> None:
    """`out` is the layer's own, however its weight lies; on a saved embedding the norms are that tensor's."""
    tensors = {f"{ROOT}m.lora_embedding_A": torch.zeros(1, 9), f"{ROOT}m.lora_embedding_B": torch.zeros(4, 1)}
    W = torch.rand(9, 4) + 1
    tensors |= {f"{ROOT}m.lora_magnitude_vector": 1.5 * W.norm(dim=0), f"{ROOT}m.base_layer.weight": W}
    adapter = write_adapter(tmp_path / "a", tensors, peft_config(r=1, use_dora=True, target_modules=["m"]))
    base = write_checkpoint(tmp_path / "base", {"m.weight": torch.ones(9, 4)})
    (row,) = inspect(adapter, base=base)["modules"]
    assert row["magnitudes"]["axis"] == "out" and row["magnitudes"]["drift"]["median"] == pytest.approx(0.5, abs=1e-6)


def test_a_bare_vector_of_magnitudes(tmp_path: Path) -> None:
    from loratools.adapter import Adapter
    from loratools.deltas.flat import FlatDoRA
    from loratools.deltas.lowrank import LowRank
    from loratools.formats import save
    from loratools.tensors import to_ref

    _, base, W = drifted(tmp_path)
    low = LowRank(A=to_ref(torch.zeros(1, 48)), B=to_ref(torch.zeros(48, 1)), alpha=1.0, layer="linear")
    for name, m, axis in (("rows", W.norm(dim=1), "out"), ("columns", W.norm(dim=0), "in"), ("neither", torch.ones(48), None)):
        path = tmp_path / f"{name}.safetensors"
        save(Adapter({"m.weight": FlatDoRA(direction=low, magnitude=to_ref(m))}), path, format="loratools")
        report = inspect(path, base=base)
        told = report["modules"][0]["magnitudes"]
        assert told["axis"] == axis and (told["drift"] is None) == (axis is None)
        assert [("without an axis" in text) for text in report["warnings"]] == ([] if axis else [True])
