"""peft's additive methods beyond the matrix: what its files leave out, what peft itself cannot run; every byte comes back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AdaLoraConfig,
    BeftConfig,
    C3AConfig,
    FourierFTConfig,
    LNTuningConfig,
    LoKrConfig,
    MissConfig,
    PeftModel,
    ShiraConfig,
    SupertuningConfig,
    WaveFTConfig,
    get_peft_model,
)
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from loratools import convert, inspect, merge, unmerge
from loratools.errors import FormatError, LoratoolsError, MatchError, UnsupportedError
from loratools.formats.peft_placed import SEEDED
from tests.files import read_adapter, read_checkpoint, write_adapter, write_checkpoint
from tests.interop.cases_additive import ADALORA, CASES, normal
from tests.interop.methods import LINEAR, Case
from tests.interop.zoo import difference, merged_outputs, new_base, outputs


def changed(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> Path:
    return write_adapter(folder / "changed", tensors, config)


@pytest.mark.parametrize("name", CASES)
def test_every_byte_comes_back(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    case.wrapped(tmp_path, torch.bfloat16)
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", reversible=True, transposed=case.transposed)
    unmerge(tmp_path / "out", tmp_path / "back", adapters=[tmp_path / "adapter"])
    assert (tmp_path / "back/model.safetensors").read_bytes() == (tmp_path / "base/model.safetensors").read_bytes()


RANKS = {
    "adalora": 4, "adalora, pruned": {3, 1}, "lokr": {4, 8}, "lokr, effective convolutions": 4, "miss": 7, "miss, mini": 5, "delora": 4,
    "gralora": 8, "gralora, hybrid": 11,
}  # fmt: skip


@pytest.mark.parametrize("name", RANKS)
def test_products_become_loras(tmp_path: Path, name: str) -> None:
    """Without a rank asked for: as many as the product has, and nothing is lost but what float32 factors round."""
    case, expected = CASES[name], RANKS[name]
    case.wrapped(tmp_path)
    receipt = convert(tmp_path / "adapter", tmp_path / "lora", kind="lora", base=tmp_path / "base", transposed=case.transposed)
    assert {row["rank"] for row in receipt["tensors"]} == (expected if isinstance(expected, set) else {expected})
    for adapter in ("adapter", "lora"):
        merge(tmp_path / "base", tmp_path / adapter, tmp_path / f"of {adapter}", transposed=case.transposed)
    errors = difference(merged_outputs(tmp_path / "of lora"), merged_outputs(tmp_path / "of adapter"))
    assert max(errors.values()) <= 1e-6, errors


# -- AdaLoRA


def test_a_module_that_keeps_no_rank_is_not_changed(tmp_path: Path) -> None:
    """peft divides nothing by 10⁻⁵ there, and adds nothing."""
    masks = {"linear.lora_E": [False] * 4, "square.lora_E": [True] * 4}
    zeros = lambda name, tensor, noise: torch.zeros_like(tensor) if "linear.lora_E" in name else normal(name, tensor, noise)  # noqa: E731
    Case(AdaLoraConfig, LINEAR, ADALORA | {"rank_pattern": masks}, zeros).wrapped(tmp_path)
    assert read_adapter(tmp_path / "adapter")[0]["base_model.model.linear.lora_A"].shape == (0, 24)
    receipt = merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    model = PeftModel.from_pretrained(new_base(tmp_path / "unused", torch.float32), tmp_path / "adapter").eval()
    assert max(difference(merged_outputs(tmp_path / "out"), outputs(model)).values()) <= 1e-6
    base, merged = read_checkpoint(tmp_path / "base"), read_checkpoint(tmp_path / "out")
    assert torch.equal(base["linear.weight"], merged["linear.weight"]) and receipt["applied"] == receipt["expected"] == 2


def test_without_a_positive_alpha_a_pruned_file_means_two_things(tmp_path: Path) -> None:
    """Trained, peft multiplies by init_r; loaded from its own file, by the ranks left."""
    case = Case(AdaLoraConfig, ("linear",), ADALORA | {"lora_alpha": 0, "rank_pattern": {"linear.lora_E": [True, True, False, False]}})
    model = case.wrapped(tmp_path)
    with torch.no_grad():
        model.base_model.model.linear.lora_E["default"][2:] = 0
    again = PeftModel.from_pretrained(new_base(tmp_path / "unused", torch.float32), tmp_path / "adapter").eval()
    assert max(difference(outputs(again), outputs(model)).values()) > 1e-2
    with pytest.raises(UnsupportedError, match="in training peft took init_r, once loaded the rank left: found 0"):
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")


@pytest.mark.parametrize(
    "pattern, words",
    [
        ({"other.lora_E": [True] * 4}, r"names modules that the file lacks: found \['other'\]"),
        ({"linear.lora_E": [True] * 5}, "of linear has not a truth value for each rank: found 5, expected 4"),
        ({"linear.lora_E": 4}, "expected names of lora_E mapped to lists of truth values"),
        ({"linear.lora_E": [1, 1, 1, 1]}, "expected names of lora_E mapped to lists of truth values"),
    ],
)
def test_a_rank_pattern_that_is_none(tmp_path: Path, pattern: dict[str, Any], words: str) -> None:
    Case(AdaLoraConfig, LINEAR, ADALORA).wrapped(tmp_path)
    tensors, config = read_adapter(tmp_path / "adapter")
    with pytest.raises(LoratoolsError, match=words):
        merge(tmp_path / "base", changed(tmp_path, tensors, config | {"rank_pattern": pattern}), tmp_path / "out")


# -- places that a file holds, or does not


def test_places_that_windows_wrote_as_floats(tmp_path: Path) -> None:
    model = Case(ShiraConfig, LINEAR, {"r": 3, "random_seed": 1}).wrapped(tmp_path)
    tensors, config = read_adapter(tmp_path / "adapter")
    assert tensors["base_model.model.linear.shira_indices"].dtype == torch.int32
    floats = {key: tensor.float() if "indices" in key else tensor for key, tensor in tensors.items()}
    merge(tmp_path / "base", changed(tmp_path, floats, config), tmp_path / "out")
    assert max(difference(merged_outputs(tmp_path / "out"), outputs(model)).values()) <= 1e-6
    broken = {key: tensor + 0.5 if "indices" in key else tensor for key, tensor in floats.items()}
    with pytest.raises(FormatError, match="places that are no whole numbers"):
        merge(tmp_path / "base", changed(tmp_path, broken, config), tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_places_that_were_not_saved(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="recomputed"):
        Case(SupertuningConfig, LINEAR, {"sparsity": 0.8, "save_precomputed_indices": False}).wrapped(tmp_path)
    with pytest.raises(LoratoolsError, match="has no supertuning_indices beside it; save the adapter with save_precomputed_indices=True"):
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")


@pytest.mark.parametrize("name", ["fourierft", "waveft"])
def test_places_drawn_from_a_seed_are_told(tmp_path: Path, name: str) -> None:
    CASES[name].wrapped(tmp_path)
    receipt = merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", transposed=CASES[name].transposed)
    assert SEEDED in receipt["notes"] and SEEDED in inspect(tmp_path / "adapter")["warnings"]


def test_shares_of_coefficients_that_are_not_the_bases(tmp_path: Path) -> None:
    case = CASES["waveft, shares"]
    case.wrapped(tmp_path)
    tensors, config = read_adapter(tmp_path / "adapter")
    moved = {key: torch.cat([tensor, torch.ones(1)]) if "linear" in key else tensor[:-1] for key, tensor in tensors.items()}
    with pytest.raises(LoratoolsError, match=r"linear\.weight: not as many coefficients as the weight's share.*\n.*square\.weight: not as"):
        merge(tmp_path / "base", changed(tmp_path, moved, config), tmp_path / "out")


# -- how a weight lies that no shape tells


@pytest.mark.parametrize("config", [FourierFTConfig(n_frequency=30, scaling=50.0), WaveFTConfig(n_frequency=90, init_weights=False)])
def test_transposed_weights_by_the_models_type(tmp_path: Path, config: Any) -> None:
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=20, n_embd=16, n_layer=1, n_head=2))
    base.save_pretrained(tmp_path / "base")
    config.target_modules, config.fan_in_fan_out = ["c_attn", "c_proj"], True
    model = get_peft_model(base, config).eval()
    model.save_pretrained(tmp_path / "adapter")
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    ids = torch.arange(1, 13).reshape(2, 6)
    merged = GPT2LMHeadModel.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        found, expected = merged.double()(ids).logits, model.double()(ids).logits
    assert float((found - expected).norm() / expected.norm()) <= 1e-5
    (tmp_path / "base/config.json").write_text("{}")
    with pytest.raises(LoratoolsError, match=r"c_attn\.weight: a weight that takes its change both ways of a model that stores some"):
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "no")


# -- biases and whole modules


def test_a_bias_that_the_base_lacks(tmp_path: Path) -> None:
    """peft's forward adds it all the same, its merge refuses: a model that was built without a bias would not load one."""
    layers = nn.Sequential(nn.Linear(4, 6, bias=False), nn.Linear(6, 2))
    write_checkpoint(tmp_path / "base", layers.state_dict())
    with pytest.warns(UserWarning, match="no bias term"):
        model = get_peft_model(layers, BeftConfig(target_modules=["0", "1"], init_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(MatchError, match=r"0\.bias: the base has no such weight"):
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    with pytest.raises(ValueError, match="has no bias"):
        model.merge_and_unload()


@pytest.mark.parametrize("targets", [["norm", "linear"], r"norm|lin.*"])
@pytest.mark.parametrize("lacking", ["norm.ln_tuning_layers.weight", "linear.ln_tuning_layers.bias"])
def test_a_module_replaced_in_part_is_an_error(tmp_path: Path, targets: Any, lacking: str) -> None:
    Case(LNTuningConfig, ("norm", "linear"), {"target_modules": targets}, normal).wrapped(tmp_path)
    tensors, config = read_adapter(tmp_path / "adapter")
    less = {key: tensor for key, tensor in tensors.items() if not key.endswith(lacking)}
    assert len(less) == len(tensors) - 1
    name = lacking.replace(".ln_tuning_layers", "")
    with pytest.raises(MatchError, match=rf"{name}: the adapter's config covers this weight, its file holds nothing for it"):
        merge(tmp_path / "base", changed(tmp_path, less, config), tmp_path / "out")


def test_a_whole_block_is_replaced(tmp_path: Path) -> None:
    layers = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), nn.Linear(4, 2))
    write_checkpoint(tmp_path / "base", layers.state_dict())
    model = get_peft_model(layers, LNTuningConfig(target_modules=["0"], exclude_modules=r"0\.0"))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    model.save_pretrained(tmp_path / "adapter")
    receipt = merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert receipt["applied"] == receipt["expected"] == 4
    merged = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), nn.Linear(4, 2))
    merged.load_state_dict(read_checkpoint(tmp_path / "out"))
    x = torch.randn(3, 4)
    assert torch.allclose(merged(x), model(x), atol=1e-6)
    tensors, config = read_adapter(tmp_path / "adapter")
    assert "base_model.model.0.ln_tuning_layers.default.1.weight" in tensors
    twice = tensors | {"base_model.model.0.ln_tuning_layers.other.1.weight": torch.ones(4)}
    with pytest.raises(FormatError, match="the same tensor of a module twice"):
        merge(tmp_path / "base", changed(tmp_path, twice, config), tmp_path / "no")
    less = {key: tensor for key, tensor in tensors.items() if not key.endswith("0.weight")}
    with pytest.raises(MatchError, match=r"0\.0\.weight: the adapter's config covers this weight"):
        merge(tmp_path / "base", changed(tmp_path, less, config), tmp_path / "no")


def test_biases_under_a_methods_own_word(tmp_path: Path) -> None:
    """peft's help spells it MiSS_only."""
    for word in ("MiSS_only", "miss_only"):
        model = Case(MissConfig, LINEAR, {"r": 4, "bias": word}).wrapped(tmp_path / word)
        receipt = merge(tmp_path / word / "base", tmp_path / word / "adapter", tmp_path / word / "out")
        assert receipt["applied"] == 4 and max(difference(merged_outputs(tmp_path / word / "out"), outputs(model)).values()) <= 1e-6


# -- settings of which peft reads less than one would think


def test_patterns_of_the_older_rule_do_not_reach_the_root(tmp_path: Path) -> None:
    """`square` fits `mlp.square`, and `square` itself only letter by letter; `squ.*` fits the first alone."""
    inner = nn.ModuleDict({"square": nn.Linear(8, 8)})
    layers = nn.ModuleDict({"mlp": inner, "square": nn.Linear(8, 8)})
    layers.forward = lambda x: layers["square"](layers["mlp"]["square"](x))  # type: ignore[method-assign]
    write_checkpoint(tmp_path / "base", layers.state_dict())
    config = C3AConfig(target_modules=["square"], block_size=4, block_size_pattern={"squ.*": 2}, init_weights="gaussian")
    model = get_peft_model(layers, config)
    model.save_pretrained(tmp_path / "adapter")
    sizes = {key.split(".")[2]: tensor.shape[2] for key, tensor in read_adapter(tmp_path / "adapter")[0].items()}
    assert sizes == {"mlp": 2, "square": 4}
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    merged, x = read_checkpoint(tmp_path / "out"), torch.randn(3, 8)
    found = (x @ merged["mlp.square.weight"].T + merged["mlp.square.bias"]) @ merged["square.weight"].T + merged["square.bias"]
    assert torch.allclose(found, model(x), atol=1e-5)


def test_wavelets_that_peft_takes_and_cannot_use(tmp_path: Path) -> None:
    """Its configs know 74 by name; of 50 it has no filter, and coif5's is longer than it thinks."""
    for wavelet, error in (("db11", ValueError), ("coif5", RuntimeError)):
        folder = tmp_path / wavelet
        model = Case(WaveFTConfig, LINEAR, {"n_frequency": 9, "wavelet_family": wavelet}).wrapped(folder)
        with pytest.raises(error):
            outputs(model)
        with pytest.raises(LoratoolsError, match=rf"wavelet_family: found '{wavelet}', expected db1 or"):
            merge(folder / "base", folder / "adapter", folder / "out")


def test_lokr_of_a_conv1d_with_a_core_of_rank_1(tmp_path: Path) -> None:
    """peft cannot run its own: torch.kron wants a view of a layout that its sum does not have. The formula is the same as of any rank."""
    case = Case(LoKrConfig, ("conv1",), {"r": 1, "alpha": 3, "use_effective_conv2d": True})
    model = case.wrapped(tmp_path)
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        outputs(model)
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    tensors = {key.rpartition(".")[2]: tensor.double() for key, tensor in read_adapter(tmp_path / "adapter")[0].items()}
    w2 = torch.einsum("ijkl,ib,jd->bdkl", tensors["lokr_t2"], tensors["lokr_w2_a"], tensors["lokr_w2_b"])
    change = 3 * torch.einsum("ac,bdkl->abcdkl", tensors["lokr_w1"], w2).reshape(10, 6, 3)
    base, merged = read_checkpoint(tmp_path / "base")["conv1.weight"], read_checkpoint(tmp_path / "out")["conv1.weight"]
    assert torch.allclose(merged.double(), base.double() + change, rtol=1e-6, atol=1e-6)
