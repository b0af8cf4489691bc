"""LoRA on fused experts and other bare parameters, as peft saves it, on bases that store them fused: its forward, and each expert's matrix.

Tolerances are of float32: both sides round once, peft's sum of ranks in float32 too.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from loratools import inspect, merge, unmerge, verify
from loratools.errors import AmbiguousError, LoratoolsError, MatchError
from tests.files import read_adapter, read_checkpoint, write_adapter
from tests.interop.moe import EXPERTS, MODELS, Model, distance, loaded, logits, save, worst_expert, wrap

CLOSE = 1e-5  # of ‖output‖ and of ‖weight‖, in float32
QUERIES = {"deepseek_v3": "q_b_proj"}


def parameters(kind: str) -> list[str]:
    return MODELS[kind].targets(*(("up_proj", "down_proj") if kind == "nemotron_h" else ()))


def made(folder: Path, kind: str, sizes: dict[str, Any] | None = None, **config: Any) -> tuple[Any, Model]:
    """A fused base and an adapter on it in a folder, and the model under that adapter."""
    model = MODELS[kind]
    base = model.new(**sizes or {})
    save(base, folder / "base", on_disk=False)
    return wrap(base, folder / "adapter", **config), model


def check(folder: Path, wrapped: Any, model: Model) -> dict[str, Any]:
    """Merge the two and compare with peft's forward and its merged weights."""
    expected = logits(wrapped)
    receipt = merge(folder / "base", folder / "adapter", folder / "out")
    assert receipt["applied"] == receipt["expected"] == len(receipt["tensors"])
    found = loaded(folder / "out", model)
    assert distance(logits(found), expected) <= CLOSE
    assert worst_expert(found.state_dict(), wrapped.merge_and_unload().state_dict()) <= CLOSE
    return receipt


@pytest.mark.parametrize("kind", MODELS)
def test_two_parameters_beside_attention(tmp_path: Path, kind: str) -> None:
    wrapped, model = made(tmp_path, kind, target_parameters=parameters(kind), target_modules=[QUERIES.get(kind, "q_proj")])
    before = read_checkpoint(tmp_path / "base")
    receipt = check(tmp_path, wrapped, model)
    assert {row["kind"] for row in receipt["tensors"]} == {"experts", "lora"} and receipt["notes"] == []
    after = read_checkpoint(tmp_path / "out")
    for row in receipt["tensors"]:
        if row["kind"] == "experts":  # none was left out
            assert all(distance(new, old) > 0.1 for new, old in zip(after[row["name"]], before[row["name"]], strict=True))


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "llama4"])
@pytest.mark.parametrize("name", ["gate_up_proj", "down_proj"])
def test_a_single_parameter(tmp_path: Path, kind: str, name: str) -> None:
    wrapped, model = made(tmp_path, kind, target_parameters=MODELS[kind].targets(name))
    assert {key.count("base_layer") for key in read_adapter(tmp_path / "adapter")[0]} == {0}
    check(tmp_path, wrapped, model)


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "nemotron_h"])
@pytest.mark.parametrize("names", [None, ("down_proj",)], ids=["both", "down"])
def test_square_experts(tmp_path: Path, kind: str, names: tuple[str, ...] | None) -> None:
    """Width and hidden size alike: down_proj is a stack of squares, up_proj of nemotron_h too."""
    targets = MODELS[kind].targets(*names) if names else parameters(kind)
    wrapped, model = made(tmp_path, kind, {MODELS[kind].width: 16}, target_parameters=targets)
    check(tmp_path, wrapped, model)


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_rank_and_alpha_patterns_name_parameters(tmp_path: Path, kind: str) -> None:
    patterns = {"rank_pattern": {"down_proj": 2, r"layers\.1\..*gate_up_proj": 5}, "alpha_pattern": {r".*\.gate_up_proj": 4, "q_proj": 1}}
    wrapped, model = made(tmp_path, kind, target_parameters=parameters(kind), target_modules=["q_proj"], **patterns)
    receipt = check(tmp_path, wrapped, model)
    assert receipt["notes"] == []
    found = {row["name"]: (row["rank"], row["alpha"]) for row in inspect(tmp_path / "adapter", base=tmp_path / "base")["modules"]}
    assert found[f"model.layers.1.{model.experts}.gate_up_proj"] == (5, 4)
    assert found[f"model.layers.0.{model.experts}.gate_up_proj"] == (3, 4)
    assert found[f"model.layers.0.{model.experts}.down_proj"] == (2, 6)


def test_rslora_takes_the_root_of_an_experts_own_rank(tmp_path: Path) -> None:
    wrapped, model = made(tmp_path, "mixtral", target_parameters=parameters("mixtral"), use_rslora=True)
    check(tmp_path, wrapped, model)


def test_matrices_with_a_name_of_their_own(tmp_path: Path) -> None:
    """gpt_oss' biases of all experts are matrices; four wrappers are nested, and the router has one more."""
    names = ["gate_up_proj", "down_proj_bias", "down_proj", "gate_up_proj_bias"]
    targets = [*MODELS["gpt_oss"].targets(*names), "router.weight"]
    wrapped, model = made(tmp_path, "gpt_oss", target_parameters=targets)
    keys = read_adapter(tmp_path / "adapter")[0]
    assert max(key.count("base_layer") for key in keys) == 3
    receipt = check(tmp_path, wrapped, model)
    assert receipt["expected"] == 2 * len(targets)


@pytest.mark.parametrize("kind", ["mixtral", "llama4"])
def test_one_expert(tmp_path: Path, kind: str) -> None:
    count = {"num_local_experts": 1, "num_experts_per_tok": 1}
    wrapped, model = made(tmp_path, kind, count, target_parameters=parameters(kind))
    check(tmp_path, wrapped, model)


def test_targets_without_a_path(tmp_path: Path) -> None:
    """As peft itself writes them when it turns an adapter of transformers 4 into one of transformers 5."""
    wrapped, model = made(tmp_path, "mixtral", target_parameters=["gate_up_proj", "down_proj"], target_modules=["q_proj"])
    assert check(tmp_path, wrapped, model)["expected"] == 6


def test_all_linear_layers_beside_them(tmp_path: Path) -> None:
    wrapped, model = made(tmp_path, "mixtral", target_parameters=["gate_up_proj", "down_proj"], target_modules="all-linear")
    config = read_adapter(tmp_path / "adapter")[1]
    write_adapter(tmp_path / "adapter", read_adapter(tmp_path / "adapter")[0], config | {"target_modules": "all-linear"})
    assert check(tmp_path, wrapped, model)["expected"] == 2 * 7  # queries, keys, values, outputs, router, gate_up, down


# -- other versions and writers, for which the algebra is written out


def reread(folder: Path, tensors: dict[str, Tensor] | None = None, **config: Any) -> dict[str, Tensor]:
    """The change that merge makes with the adapter edited."""
    old, settings = read_adapter(folder / "adapter")
    write_adapter(folder / "edited", old if tensors is None else tensors, settings | config)
    before = read_checkpoint(folder / "base")
    merge(folder / "base", folder / "edited", folder / "out", overwrite=True)
    after = read_checkpoint(folder / "out")
    return {name: after[name].double() - before[name].double() for name in before if not torch.equal(after[name], before[name])}


def down(folder: Path, *, turned: bool, grouped: bool = False) -> Tensor:
    """ΔW of layer 0's down_proj, by the einsum of the version; its wrapper is the outermost."""
    tensors = read_adapter(folder / "adapter")[0]
    A, B = (next(t.double() for key, t in tensors.items() if f"layers.0.mlp.experts.lora_{x}" in key) for x in "AB")
    rank = A.shape[0] // EXPERTS
    b = B.reshape(len(B), EXPERTS, rank).permute(1, 0, 2) if grouped else B.reshape(len(B), rank, EXPERTS).permute(2, 0, 1)
    return torch.einsum("eor,eri->eio" if turned else "eor,eri->eoi", b, A.reshape(EXPERTS, rank, -1)) * (6 / rank)


@pytest.mark.parametrize(("version", "turned"), [("0.18.0", True), ("0.19.0", True), ("0.19.1", False), ("0.21.2", False)])
def test_the_version_decides_where_all_are_squares(tmp_path: Path, version: str, turned: bool) -> None:
    made(tmp_path, "mixtral", {"intermediate_size": 16}, target_parameters=MODELS["mixtral"].targets("down_proj"))
    name = "model.layers.0.mlp.experts.down_proj"
    found = reread(tmp_path, peft_version=version)[name]
    assert distance(found, down(tmp_path, turned=turned)) <= CLOSE
    assert distance(found, down(tmp_path, turned=not turned)) > 0.5


def test_without_a_version_squares_are_refused(tmp_path: Path) -> None:
    made(tmp_path, "mixtral", {"intermediate_size": 16}, target_parameters=MODELS["mixtral"].targets("down_proj"))
    with pytest.raises(LoratoolsError, match=r"down_proj: a stack of squares.*found \[4, 16, 16\], no peft_version"):
        reread(tmp_path, peft_version=None)
    (tmp_path / "base" / "config.json").unlink()
    with pytest.raises(LoratoolsError, match=r"a stack of squares.*peft_version 0\.21\.2; .*and the base's config\.json"):
        reread(tmp_path)


def test_experts_packed_one_after_another_only_where_the_config_says_so(tmp_path: Path) -> None:
    made(tmp_path, "mixtral", target_parameters=parameters("mixtral"))
    name = "model.layers.0.mlp.experts.down_proj"
    for layout, grouped in (("grouped_by_expert", True), ("rank_major", False), (None, False)):
        assert distance(reread(tmp_path, lora_B_layout=layout)[name], down(tmp_path, turned=False, grouped=grouped)) <= CLOSE
    with pytest.raises(LoratoolsError, match=r"lora_B_layout: found 'expert_major', expected rank_major or grouped_by_expert"):
        reread(tmp_path, lora_B_layout="expert_major")


def test_unsloths_files_have_to_say_how_they_are_packed(tmp_path: Path) -> None:
    made(tmp_path, "mixtral", target_parameters=parameters("mixtral"))
    theirs = {"auto_mapping": {"base_model_class": "MixtralForCausalLM", "unsloth_fixed": True}}
    with pytest.raises(AmbiguousError, match=r"Unsloth wrote it.*add lora_B_layout to \S+: rank_major or grouped_by_expert"):
        reread(tmp_path, **theirs)
    assert len(reread(tmp_path, **theirs, lora_B_layout="grouped_by_expert")) == 4


# -- receipts, replay, undoing


def test_it_is_replayed_and_undone_bit_for_bit(tmp_path: Path) -> None:
    for kind in ("mixtral", "gpt_oss"):
        folder = tmp_path / kind
        model = MODELS[kind]
        base = model.new(dtype=torch.bfloat16)
        save(base, folder / "base", on_disk=False)
        wrap(base, folder / "adapter", target_parameters=parameters(kind), target_modules=["q_proj"])
        merge(folder / "base", f"{folder / 'adapter'}:0.5", folder / "out", reversible=True)
        report = verify(folder / "out", base=folder / "base", adapters=f"{folder / 'adapter'}:0.5")
        assert report["ok"] and report["max_ulp"] == 0, report
        unmerge(folder / "out", folder / "back")
        assert (folder / "back" / "model.safetensors").read_bytes() == (folder / "base" / "model.safetensors").read_bytes()


def test_two_adapters_add_up(tmp_path: Path) -> None:
    wrapped, _ = made(tmp_path, "mixtral", target_parameters=parameters("mixtral"))
    del wrapped
    wrap(MODELS["mixtral"].new(), tmp_path / "other", seed=5, r=2, target_parameters=MODELS["mixtral"].targets("down_proj"))
    before, changes = read_checkpoint(tmp_path / "base"), []
    for adapters in ([tmp_path / "adapter"], [tmp_path / "other"], [f"{tmp_path / 'adapter'}:0.5", f"{tmp_path / 'other'}:-2"]):
        receipt = merge(tmp_path / "base", adapters, tmp_path / "out", overwrite=True)
        after = read_checkpoint(tmp_path / "out")
        changes.append({name: after[name].double() - before[name].double() for name in before})
    assert receipt["expected"] == receipt["applied"] == 6
    for name in before:
        expected = 0.5 * changes[0][name] - 2 * changes[1][name]
        assert torch.allclose(changes[2][name], expected, atol=2e-6)  # three roundings to float32 of values below 8


def test_inspect_without_a_base_says_what_the_file_tells(tmp_path: Path) -> None:
    made(tmp_path, "mixtral", target_parameters=parameters("mixtral"), target_modules=["q_proj"])
    found = inspect(tmp_path / "adapter")
    assert found["kinds"] == {"parameter": 4, "lora": 2} and found["warnings"] == []
    joined = inspect(tmp_path / "adapter", base=tmp_path / "base", values=True)
    assert joined["kinds"] == {"experts": 4, "lora": 2} and joined["warnings"] == []
    row = next(row for row in joined["modules"] if row["name"].endswith("0.mlp.experts.gate_up_proj"))
    assert (row["shape"], row["rank"], row["alpha"], row["scaling"]) == ([EXPERTS, 24, 16], 3, 6, 2)
    assert found["parameters"] == joined["parameters"] == sum(t.numel() for t in read_adapter(tmp_path / "adapter")[0].values())


# -- every change of a file is an error


def swapped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inner and the outer wrapper of layer 0 in each other's place."""
    inner, outer = "layers.0.mlp.experts.base_layer.lora", "layers.0.mlp.experts.lora"
    return {
        key.replace(inner, outer) if inner in key else key.replace(outer, inner) if outer in key else key: tensor
        for key, tensor in tensors.items()
    }


def mutations(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    found = {"swapped": swapped(tensors)}
    for key in tensors:
        others = {name: tensor for name, tensor in tensors.items() if name != key}
        found[f"without {key}"] = others
        found[f"{key} renamed"] = others | {key.replace("experts", "expert").replace("q_proj", "q_pro"): tensors[key]}
        found[f"{key} of another layer"] = others | {key.replace("layers.0", "layers.7").replace("layers.1", "layers.7"): tensors[key]}
        found[f"{key} nested deeper"] = others | {key.replace(".lora_", ".base_layer.base_layer.lora_"): tensors[key]}
        found[f"{key} and a bias"] = tensors | {key.replace(".weight", ".bias"): tensors[key]}
        found[f"{key} transposed"] = others | {key: tensors[key].T}
        found[f"{key} with a row more"] = others | {key: torch.cat([tensors[key], tensors[key][:1]])}
        found[f"{key} with a column less"] = others | {key: tensors[key][:, 1:]}
        found[f"{key} of three axes"] = others | {key: tensors[key].unsqueeze(0)}
        found[f"{key} of an expert less"] = others | {key: tensors[key][:-3] if "lora_A" in key else tensors[key][:, :-3]}
    for module in {key.partition(".lora_")[0] for key in tensors}:
        pair = {key: tensor for key, tensor in tensors.items() if key.startswith(f"{module}.lora_")}
        rest = {key: tensor for key, tensor in tensors.items() if key not in pair}
        found[f"without the pair of {module}"] = rest
        found[f"{module} of an expert less"] = rest | {key: t[:-3] if "lora_A" in key else t[:, :-3] for key, t in pair.items()}
        found[f"{module} of another rank"] = rest | {
            key: torch.cat([t, t[:EXPERTS]]) if "lora_A" in key else torch.cat([t, t[:, :EXPERTS]], dim=1) for key, t in pair.items()
        }
        if "experts" in module:  # of a square, they are another good pair
            found[f"A and B of {module} swapped"] = rest | dict(zip(pair, [t.T for t in reversed(pair.values())], strict=True))
    return found


def test_every_change_of_a_file_is_an_error(tmp_path: Path) -> None:
    sizes = {"intermediate_size": 20}  # no number of rows is one of columns
    made(tmp_path, "mixtral", sizes, target_parameters=parameters("mixtral"), target_modules=["q_proj"])
    tensors, config = read_adapter(tmp_path / "adapter")
    silent = []
    for word, changed in mutations(tensors).items():
        write_adapter(tmp_path / "edited", changed, config)
        try:
            merge(tmp_path / "base", tmp_path / "edited", tmp_path / word.replace("/", ""))
        except LoratoolsError as error:
            assert "edited" in str(error), (word, error)
        else:
            silent.append(word)
    assert silent == [], silent


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_parameters": ["mlp.experts.down_proj"]}, r"2 adapters on the parameters of one module: expected at most 1"),
        ({"target_parameters": None, "target_modules": ["q_proj"]}, "the same tensor twice under two spellings"),
        ({"use_dora": True}, "target_parameters and use_dora exclude each other"),
        ({"lora_bias": True}, "target_parameters and lora_bias exclude each other"),
        ({"fan_in_fan_out": True}, "target_parameters and fan_in_fan_out exclude each other"),
        ({"layer_replication": [[0, 1]]}, "layer_replication: repeats layers"),
        ({"target_parameters": "mlp.experts.*"}, r"target_parameters: found 'mlp\.experts\.\*', expected a list of names"),
        ({"target_parameters": 3}, r"target_parameters: found 3, expected a list of names"),
        ({"peft_version": 21}, r"peft_version: found 21, expected a version"),
        ({"r": 4}, r"the rank (of each of 4 experts )?is not the config's: found 3, expected 4"),
    ],
)
def test_a_config_that_does_not_fit_is_an_error(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    made(tmp_path, "mixtral", target_parameters=parameters("mixtral"), target_modules=["q_proj"])
    with pytest.raises(LoratoolsError, match=message):
        reread(tmp_path, **change)


def test_another_number_of_experts_is_an_error(tmp_path: Path) -> None:
    made(tmp_path, "mixtral", target_parameters=parameters("mixtral"))
    save(MODELS["mixtral"].new(num_local_experts=3), tmp_path / "fewer", on_disk=False)
    with pytest.raises(LoratoolsError, match=r"the rank of each of 3 experts is not the config's: found 4, expected 3"):
        merge(tmp_path / "fewer", tmp_path / "adapter", tmp_path / "out")
    save(MODELS["mixtral"].new(num_local_experts=5), tmp_path / "more", on_disk=False)
    with pytest.raises(LoratoolsError, match=r"A has not as many rows for each expert: found A \[12, 16\].*expected A \[5·rank, in\]"):
        merge(tmp_path / "more", tmp_path / "adapter", tmp_path / "out")


def test_parameters_that_the_file_lacks_are_missed(tmp_path: Path) -> None:
    """Both are targeted and the base has both; a file of one alone is incomplete, in every layer or in one."""
    made(tmp_path, "mixtral", target_parameters=MODELS["mixtral"].targets("down_proj"))
    tensors, _ = read_adapter(tmp_path / "adapter")
    with pytest.raises(LoratoolsError) as caught:
        reread(tmp_path, target_parameters=parameters("mixtral"))
    assert str(caught.value).count("gate_up_proj: the adapter's config covers this weight") == 2
    with pytest.raises(MatchError, match=r"layers\.1\.mlp\.experts\.down_proj: the adapter's config covers this weight"):
        reread(tmp_path, {key: tensor for key, tensor in tensors.items() if "layers.0" in key})


def test_what_is_named_and_not_there_is_noted(tmp_path: Path) -> None:
    made(tmp_path, "mixtral", target_parameters=MODELS["mixtral"].targets("down_proj"))
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    config |= {"target_parameters": ["mlp.experts.down_proj", "mlp.other.weight"], "rank_pattern": {"nothing": 4}}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    assert inspect(tmp_path / "adapter")["warnings"] == [
        "adapter_config.json: rank_pattern names nothing, and the file has nothing there",
        "adapter_config.json: target_parameters names mlp.other.weight, and the file has nothing there",
    ]
