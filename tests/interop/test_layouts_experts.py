"""Fused experts against files that store them one by one, and adapters of single experts against files that store them fused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from loratools import inspect, merge, unmerge, verify
from loratools.errors import LoratoolsError
from tests.files import read_adapter, read_checkpoint, write_adapter
from tests.interop.moe import EXPERTS, MODELS, distance, loaded, logits, save, worst_expert, wrap
from tests.interop.test_peft_experts import CLOSE, QUERIES, parameters

GATED = ["gate_proj", "up_proj", "down_proj"]
SINGLE = {"mixtral": ["w1", "w2", "w3"], "qwen2_moe": GATED, "qwen3_moe": GATED}
ONE_BY_ONE = ["mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "nemotron_h"]


# -- a fused adapter on single matrices


@pytest.mark.parametrize("kind", ONE_BY_ONE)
@pytest.mark.parametrize("sizes", [{}, {"square": True}], ids=["", "square"])
def test_a_fused_adapter_on_single_matrices(tmp_path: Path, kind: str, sizes: dict[str, Any]) -> None:
    model = MODELS[kind]
    base = model.new(**({model.width: 16} if sizes else {}))
    save(base, tmp_path / "base")
    patterns = {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"down_proj": 5}}
    wrapped = wrap(base, tmp_path / "adapter", target_parameters=parameters(kind), target_modules=[QUERIES.get(kind, "q_proj")], **patterns)
    expected = logits(wrapped)
    receipt = merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    before, after = read_checkpoint(tmp_path / "base"), read_checkpoint(tmp_path / "out")
    singles = [name for name in before if ".experts." in name and "shared" not in name]
    rows = {row["name"]: row["kind"] for row in receipt["tensors"]}
    assert set(singles) <= set(rows) and set(rows.values()) == {"lora"}
    assert receipt["expected"] == receipt["applied"] == len(rows)
    assert all(distance(after[name], before[name]) > 0.1 for name in rows)
    (note,) = receipt["notes"]
    fused = len(singles) // (EXPERTS * (2 if kind == "nemotron_h" else 3)) * 2
    assert f"; {fused} fused tensors are {len(singles)} matrices there" in note
    found = loaded(tmp_path / "out", model)
    assert distance(logits(found), expected) <= CLOSE
    assert worst_expert(found.state_dict(), wrapped.merge_and_unload().state_dict()) <= CLOSE


def test_files_of_peft_018_too(tmp_path: Path) -> None:
    """A read the first axis then: the factors exchanged are the same change on the transposed matrices."""
    base = MODELS["mixtral"].new()
    save(base, tmp_path / "base")
    wrap(base, tmp_path / "adapter", target_parameters=parameters("mixtral"))
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    tensors, config = read_adapter(tmp_path / "adapter")
    old: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if "lora_A" not in key:
            continue
        A, B = tensor.reshape(EXPERTS, 3, -1), tensors[key.replace("lora_A", "lora_B")].reshape(-1, 3, EXPERTS)
        old[key] = B.permute(2, 1, 0).reshape(EXPERTS * 3, -1)
        old[key.replace("lora_A", "lora_B")] = A.permute(2, 1, 0).reshape(-1, 3 * EXPERTS)
    write_adapter(tmp_path / "old", old, config | {"peft_version": "0.18.1"})
    merge(tmp_path / "base", tmp_path / "old", tmp_path / "again")
    found, expected = read_checkpoint(tmp_path / "again"), read_checkpoint(tmp_path / "out")
    assert max(distance(found[name], expected[name]) for name in expected) <= 1e-7  # the same products, summed in another order


def test_it_is_told_replayed_and_undone(tmp_path: Path) -> None:
    base = MODELS["qwen3_moe"].new(dtype=torch.bfloat16)
    save(base, tmp_path / "base")
    wrap(base, tmp_path / "adapter", target_parameters=parameters("qwen3_moe"), target_modules=["q_proj"])
    joined = inspect(tmp_path / "adapter", base=tmp_path / "base")
    assert joined["kinds"] == {"lora": 26} and joined["ranks"] == {"3": 26} and "names aligned" in joined["warnings"][0]
    assert joined["parameters"] == sum(tensor.numel() for tensor in read_adapter(tmp_path / "adapter")[0].values())
    merge(tmp_path / "base", f"{tmp_path / 'adapter'}:-0.7", tmp_path / "out", reversible=True)
    report = verify(tmp_path / "out", base=tmp_path / "base", adapters=f"{tmp_path / 'adapter'}:-0.7", forward=True)
    assert report["ok"] and report["max_ulp"] == 0 and all("skipped" not in row for row in report["forward"]), report
    unmerge(tmp_path / "out", tmp_path / "back")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (tmp_path / "base" / "model.safetensors").read_bytes()


def test_the_bytes_are_those_of_any_number_of_threads_and_shards(tmp_path: Path) -> None:
    base = MODELS["mixtral"].new(dtype=torch.bfloat16)
    save(base, tmp_path / "one")
    base.save_pretrained(tmp_path / "many", max_shard_size="8KB")  # type: ignore[operator]
    wrap(base, tmp_path / "adapter", target_parameters=parameters("mixtral"))
    found = []
    for folder, threads in (("one", 1), ("one", 3), ("many", 2)):
        merge(tmp_path / folder, tmp_path / "adapter", tmp_path / "out", threads=threads, overwrite=True)
        files = sorted((tmp_path / "out").glob("*.safetensors"))
        found.append({name: tensor for file in files for name, tensor in load_file(file).items()})
        assert (len(files) > 1) == (folder == "many")
    assert all(torch.equal(found[0][name], other[name]) for other in found[1:] for name in found[0])


def test_a_saved_stack_is_taken_apart(tmp_path: Path) -> None:
    """modules_to_save of the whole experts' module: its parameters replace the single matrices."""
    base = MODELS["mixtral"].new()
    save(base, tmp_path / "base")
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj"], modules_to_save=["experts"], init_lora_weights=False)
    wrapped = get_peft_model(MODELS["mixtral"].new(), config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "modules_to_save" in name:
                parameter.mul_(1.5)
    wrapped.save_pretrained(tmp_path / "adapter")
    receipt = merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert receipt["expected"] == receipt["applied"] == 26
    found = loaded(tmp_path / "out", MODELS["mixtral"])
    assert worst_expert(found.state_dict(), wrapped.merge_and_unload().state_dict()) <= CLOSE


# -- single matrices on a fused base


class Tree(nn.Module):
    """Linear layers under the names that a file has, as transformers 4 held every expert by itself."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            *path, last = name.removesuffix(".weight").split(".")
            place: nn.Module = self
            for part in path:
                if not hasattr(place, part):
                    place.add_module(part, nn.Module())
                place = getattr(place, part)
            layer = nn.Linear(tensor.shape[1], tensor.shape[0], bias=False)
            layer.weight.data.copy_(tensor)
            place.add_module(last, layer)


def single(kind: str, folder: Path, **config: Any) -> tuple[PeftModel, nn.Module]:
    """The model of a folder `base` that stores every expert, and an adapter on each, as peft on transformers 4 would have saved it."""
    model = MODELS[kind].new()
    save(model, folder / "base")
    weights = read_checkpoint(folder / "base")
    matrices = {name: tensor for name, tensor in weights.items() if tensor.ndim == 2 and "embed_tokens" not in name}
    settings = {"r": 3, "lora_alpha": 6, "target_modules": [*SINGLE[kind], "q_proj"], "init_lora_weights": False} | config
    wrapped = get_peft_model(Tree(matrices), LoraConfig(**settings))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_magnitude" in name:
                parameter.mul_(1 + 0.3 * torch.randn(parameter.shape, generator=generator))
            elif "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    wrapped.save_pretrained(folder / "adapter")
    return wrapped, model


def expected_of(wrapped: PeftModel, folder: Path) -> dict[str, Tensor]:
    """The file with peft's merged matrices in it."""
    return read_checkpoint(folder / "base") | dict(wrapped.merge_and_unload().state_dict())


@pytest.mark.parametrize("kind", SINGLE)
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_single_matrices_on_a_fused_base(tmp_path: Path, kind: str, dora: bool) -> None:
    wrapped, model = single(kind, tmp_path, use_dora=dora)
    save(model, tmp_path / "fused", on_disk=False)
    expected = expected_of(wrapped, tmp_path)
    plain = merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "plain")
    assert plain["notes"] == [] and worst_expert(read_checkpoint(tmp_path / "plain"), expected) <= CLOSE
    receipt = merge(tmp_path / "fused", tmp_path / "adapter", tmp_path / "out")
    assert receipt["expected"] == receipt["applied"] == len(receipt["tensors"])
    stacks = [row for row in receipt["tensors"] if ".experts." in row["name"]]
    assert len(stacks) == 4 and {row["kind"] for row in stacks} == {"parts" if dora else "lora"}
    assert f"; {2 * 3 * EXPERTS} matrices lie in 4 fused tensors there" in receipt["notes"][0]
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "config.json").write_bytes((tmp_path / "base" / "config.json").read_bytes())
    save_file(expected, tmp_path / "merged" / "model.safetensors", metadata={"format": "pt"})
    one, other = loaded(tmp_path / "out", MODELS[kind]), loaded(tmp_path / "merged", MODELS[kind])
    assert worst_expert(one.state_dict(), other.state_dict()) <= CLOSE
    assert distance(logits(one), logits(other)) <= CLOSE


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_peft_itself_makes_the_same_of_it(tmp_path: Path, kind: str) -> None:
    """peft turns such an adapter into one of fused experts when it loads it; its forward, and what it then saves, are the same change.

    Not for qwen2_moe itself, whose experts it drops, nor with shared experts among the targets, which it drops too.
    """
    experts = [f"experts.{index}.{leaf}" for index in range(EXPERTS) for leaf in SINGLE[kind]]
    _, model = single(kind, tmp_path, target_modules=["q_proj", *experts])
    save(model, tmp_path / "fused", on_disk=False)
    wrapped = PeftModel.from_pretrained(loaded(tmp_path / "fused", MODELS[kind]), tmp_path / "adapter").eval()
    expected = logits(wrapped)
    wrapped.save_pretrained(tmp_path / "turned")
    for base in ("fused", "base"):
        for adapter in ("adapter", "turned"):
            merge(tmp_path / base, tmp_path / adapter, tmp_path / f"{base}-{adapter}")
            assert distance(logits(loaded(tmp_path / f"{base}-{adapter}", MODELS[kind])), expected) <= CLOSE


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_single_matrices_are_replayed_and_undone(tmp_path: Path, dora: bool) -> None:
    _, model = single("mixtral", tmp_path, use_dora=dora)
    save(model.to(torch.bfloat16), tmp_path / "fused", on_disk=False)
    receipt = merge(tmp_path / "fused", tmp_path / "adapter", tmp_path / "out", reversible=True)
    assert receipt["unmerge"]["whole"] == []
    report = verify(tmp_path / "out", base=tmp_path / "fused", adapters=tmp_path / "adapter")
    assert report["ok"] and report["max_ulp"] == 0
    unmerge(tmp_path / "out", tmp_path / "back")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (tmp_path / "fused" / "model.safetensors").read_bytes()


# -- changes of a file


def test_every_change_is_an_error_on_the_other_layout(tmp_path: Path) -> None:
    wrapped, model = single("mixtral", tmp_path)
    del wrapped
    save(model, tmp_path / "fused", on_disk=False)
    wrap(MODELS["mixtral"].new(), tmp_path / "stacks", target_parameters=parameters("mixtral"), target_modules=["q_proj"])
    silent = []
    for base, adapter in (("base", "stacks"), ("fused", "adapter")):
        tensors, config = read_adapter(tmp_path / adapter)
        modules = sorted({key.partition(".lora_")[0] for key in tensors})[:: 1 if adapter == "stacks" else 5]
        for module in modules:
            pair = {key: tensor for key, tensor in tensors.items() if key.startswith(f"{module}.lora_")}
            rest = {key: tensor for key, tensor in tensors.items() if key not in pair}
            changes = {
                "missing": rest,
                "A missing": rest | {key: tensor for key, tensor in pair.items() if "lora_B" in key},
                "renamed": rest | {key.replace("experts", "expert").replace("self_attn", "attn"): tensor for key, tensor in pair.items()},
                "of layer 7": rest | {key.replace("layers.0", "layers.7").replace("layers.1", "layers.7"): t for key, t in pair.items()},
                "narrower": rest | {key: t[:, :-1] if "lora_A" in key else t for key, t in pair.items()},
                "shorter": rest | {key: t[:-1] if "lora_B" in key else t for key, t in pair.items()},
            }
            if ".experts." in module:
                changes["of expert 9"] = rest | {key.replace(".experts.", ".experts.9"): t for key, t in pair.items()}
            for word, changed in changes.items():
                write_adapter(tmp_path / "edited", changed, config)
                try:
                    merge(tmp_path / base, tmp_path / "edited", tmp_path / "out", overwrite=True)
                except LoratoolsError as error:
                    assert "edited" in str(error), (word, module, error)
                else:
                    silent.append((word, module))
    assert silent == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("lacks a matrix", r"gate_up_proj: the base lacks a matrix of this stack: found none of expert 2 like \S*experts\.0\.w3\.weight"),
        ("has one of another size", r"the base's matrices make no stack: found \S*2\.w3\.weight F32 \[13, 16\], expected F32 \[12, 16\]"),
        ("has both", "several of the base's tensors go by this name in memory: found model.layers.1.mlp.experts.gate_up_proj, "),
    ],
)
def test_a_base_whose_experts_make_no_stack(tmp_path: Path, change: str, message: str) -> None:
    save(MODELS["mixtral"].new(), tmp_path / "base")
    wrap(MODELS["mixtral"].new(), tmp_path / "adapter", target_parameters=parameters("mixtral"))
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    other = {"lacks a matrix": {}, "has one of another size": {name: torch.ones(13, 16)}, "has both": {name: tensors[name]}}[change]
    twice = {"model.layers.1.mlp.experts.gate_up_proj": torch.ones(4, 24, 16)} if change == "has both" else {}
    save_file({key: tensor for key, tensor in tensors.items() if key != name} | other | twice, file, metadata={"format": "pt"})
    with pytest.raises(LoratoolsError, match=message):
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_kind_that_cannot_be_taken_apart_is_refused(tmp_path: Path) -> None:
    from loratools.adapter import Adapter
    from loratools.deltas.scaled import Scaled
    from loratools.errors import UnsupportedError
    from loratools.families import Family
    from loratools.refs import Spec
    from loratools.tensors import to_ref

    base = {f"mlp.experts.{index}.{name}.weight": Spec("F32", (3, 4)) for index in range(2) for name in ("gate_proj", "up_proj")}
    scaled = Adapter({"mlp.experts.gate_up_proj": Scaled(l=to_ref(torch.ones(2)))})
    with pytest.raises(UnsupportedError, match=r"gate_up_proj: an \(IA\)³ delta on a stack that the base stores matrix by matrix"):
        scaled.resolve(base, Family({"model_type": "qwen3_moe"}))


def test_multi_token_prediction_layers_are_no_targets(tmp_path: Path) -> None:
    """Files of DeepSeek-V3 hold a layer more than transformers loads, so no adapter has one for it."""
    model = MODELS["deepseek_v3"].new(num_nextn_predict_layers=1)
    save(model, tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    more = {key.replace("layers.1.", "layers.2."): tensor.clone() for key, tensor in tensors.items() if "layers.1." in key}
    save_file(tensors | more, file, metadata={"format": "pt"})
    wrap(MODELS["deepseek_v3"].new(), tmp_path / "adapter", target_parameters=parameters("deepseek_v3"), target_modules=["q_b_proj"])
    receipt = merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert receipt["expected"] == receipt["applied"] == 14 and not any("layers.2" in row["name"] for row in receipt["tensors"])
