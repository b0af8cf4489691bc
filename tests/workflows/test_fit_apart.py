"""fit: what goes apart, what cannot be, and names, dtypes and biases."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import loratools
from loratools.adapter import Adapter
from loratools.deltas.full import Full
from loratools.deltas.lowrank import LowRank
from loratools.deltas.miss import MiSS
from loratools.errors import LoratoolsError, NotExpressible, OptionError
from loratools.formats import load, save
from loratools.tensors import to_ref
from tests.files import write_checkpoint
from tests.ops._bases import lora
from tests.ops._lora import SCHEMA, checked, dense, rows_of
from tests.strategies import randn
from tests.workflows._adapters import MADE, NAMES, SHAPES, Q, V, base, folder, low, made_for, of, of_images


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base(tmp_path_factory.mktemp("base") / "base")


def deltas(path: Path) -> dict[str, LowRank]:
    found = dict(load(path))
    assert all(isinstance(delta, LowRank) for delta in found.values())
    return found  # type: ignore[return-value]


# -- what goes apart


@pytest.mark.parametrize("word", ["saved", "rows", "bias", "norm"])
def test_what_goes_apart_and_what_stays_make_the_same_model(word: str, tmp_path: Path, weights: Path) -> None:
    save(MADE[word](), tmp_path / "a.safetensors", format="loratools")
    receipt = loratools.fit(tmp_path / "a.safetensors", tmp_path / "out", "vllm", base=weights)
    saved = tmp_path / "out.saved.safetensors"
    assert saved.is_file() and len(receipt["left_out"]) == 1
    assert receipt["left_out"][0]["reason"].endswith("It is in out.saved.safetensors.")
    assert "out.saved.safetensors" in receipt["notes"][0]
    loratools.merge(weights, [tmp_path / "a.safetensors"], tmp_path / "at once")
    loratools.merge(weights, [saved], tmp_path / "first")
    loratools.merge(tmp_path / "first", [tmp_path / "out"], tmp_path / "in turn")
    one, other = (load_file(tmp_path / where / "model.safetensors") for where in ("at once", "in turn"))
    assert one.keys() == other.keys()
    # alpha = r takes a factor of two into B: a power of two, so not even a bit moves
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_both_files_have_receipts(tmp_path: Path) -> None:
    save(made_for("kohya", "saved"), tmp_path / "a")
    receipt = loratools.fit(tmp_path / "a", tmp_path / "b.safetensors", "kohya")
    checked(receipt, tmp_path / "b.safetensors")
    own = json.loads((tmp_path / "b.saved.safetensors.loratools.json").read_text())
    import jsonschema

    jsonschema.Draft202012Validator(SCHEMA).validate(own)
    assert (own["operation"], own["applied"]) == ("fit", 1)
    assert loratools.verify(tmp_path / "b.safetensors")["ok"] and loratools.verify(tmp_path / "b.saved.safetensors")["ok"]


def test_lora_on_a_saved_tensor_stays(tmp_path: Path) -> None:
    from loratools.deltas.compose import Chain
    from loratools.deltas.full import Replacement

    chain = Chain(first=Replacement(value=to_ref(randn(8, 8, seed=9)), new=False), then=low())
    save(of(q=chain), tmp_path / "a.safetensors", format="loratools")
    receipt = loratools.fit(tmp_path / "a.safetensors", tmp_path / "out", "vllm")
    assert [row["name"] for row in receipt["left_out"]] == [Q]
    assert set(load(tmp_path / "out")) == set(SHAPES)


# -- what cannot be


def test_nothing_left_is_told(tmp_path: Path) -> None:
    from loratools.deltas.full import Replacement

    save(Adapter({"score.weight": Replacement(value=to_ref(randn(3, 8, seed=1)))}), tmp_path / "a.safetensors", format="loratools")
    with pytest.raises(NotExpressible, match="nothing of it is left that vLLM takes; merge it into the base, and serve that"):
        loratools.fit(tmp_path / "a.safetensors", tmp_path / "out", "vllm")


def test_all_that_cannot_be_is_told_at_once(tmp_path: Path) -> None:
    more = {f"model.conv{i}.weight": MADE["conv"]()[NAMES["conv"]] for i in (1, 2)}
    save(Adapter({**of(), **more}), tmp_path / "a")
    with pytest.raises(LoratoolsError) as caught:
        loratools.fit(tmp_path / "a", tmp_path / "out", "vllm")
    lines = str(caught.value).splitlines()
    assert len(lines) == 2 and all("LoRA on linear layers and embeddings only" in line for line in lines)
    assert "model.conv1.weight" in lines[0]


def test_a_tied_head_cannot_be_fitted_for_llama_cpp(tmp_path: Path, weights: Path) -> None:
    save(MADE["head"](), tmp_path / "a")
    with pytest.raises(NotExpressible, match="LoRA on the head finds no tensor"):
        loratools.fit(tmp_path / "a", tmp_path / "out", "llama.cpp", base=weights)


def test_wrong_options_are_told(tmp_path: Path) -> None:
    path = folder(tmp_path / "a")
    with pytest.raises(OptionError, match="--max-rank: found 0, expected a whole number of at least 1"):
        loratools.fit(path, tmp_path / "out", "vllm", max_rank=0)
    with pytest.raises(OptionError, match="unknown --for: found tgi"):
        loratools.fit(path, tmp_path / "out", "tgi")


def test_a_file_apart_that_exists_is_kept(tmp_path: Path) -> None:
    save(MADE["saved"](), tmp_path / "a")
    (tmp_path / "out.saved.safetensors").write_text("mine")
    with pytest.raises(LoratoolsError, match="exists already"):
        loratools.fit(tmp_path / "a", tmp_path / "out", "vllm")
    assert (tmp_path / "out.saved.safetensors").read_text() == "mine" and not (tmp_path / "out").exists()


# -- names, dtypes, biases


def test_names_stay_those_of_the_adapter_where_the_base_lacks_their_prefix(tmp_path: Path) -> None:
    """The files of a LlamaModel have no `model.`, the model that a runtime loads has."""
    names = {f"layers.{i}.self_attn.{word}_proj": (8, 8) for i in (0, 1) for word in "qv"}
    there = write_checkpoint(tmp_path / "base", {f"{name}.weight": randn(8, 8, seed=1) for name in names}, {"model_type": "llama"})
    mine = lora(tmp_path / "a", {f"model.{name}": shape for name, shape in names.items()}, use_rslora=True)
    loratools.fit(mine, tmp_path / "out", "sglang", base=there)
    one, other = (load_file(tmp_path / where / "adapter_model.safetensors") for where in ("a", "out"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one if "lora_A" in key)


def test_flat_names_need_a_base_for_a_format_with_dots_and_stay_without(tmp_path: Path) -> None:
    tensors = {"mid.attn.to_q.weight": randn(8, 8, seed=1)}
    unet = write_checkpoint(tmp_path / "unet", tensors, None)
    save(Adapter({"mid.attn.to_q.weight": low()}), tmp_path / "k.safetensors", format="kohya")
    loratools.fit(tmp_path / "k.safetensors", tmp_path / "same.safetensors", "comfyui")
    assert (tmp_path / "same.safetensors").read_bytes() == (tmp_path / "k.safetensors").read_bytes()
    with pytest.raises(LoratoolsError, match="--base"):
        loratools.fit(tmp_path / "k.safetensors", tmp_path / "peft", "peft")
    loratools.fit(tmp_path / "k.safetensors", tmp_path / "peft", "peft", base=unet)
    assert list(load(tmp_path / "peft")) == ["mid.attn.to_q.weight"]


def test_a_narrow_factor_without_room_is_widened(tmp_path: Path) -> None:
    """float16 ends at 65504: alpha = r would need 40000 · 4."""
    B = torch.full((8, 2), 40000.0, dtype=torch.float16)
    wide = replace(low(dtype=torch.float16), B=to_ref(B), alpha=8.0)
    save(Adapter({Q: wide, V: low(V, alpha=2.0, dtype=torch.float16)}), tmp_path / "a")
    receipt = loratools.fit(tmp_path / "a", tmp_path / "out", "sglang")
    found = deltas(tmp_path / "out")
    assert (found[Q].B.spec.dtype, found[V].B.spec.dtype) == ("F32", "F16")
    assert {row["error"] for row in receipt["tensors"]} == {0.0}
    assert torch.equal(dense(found[Q]), dense(wide))


def test_biases_of_peft_follow_the_scaling_of_their_modules(tmp_path: Path) -> None:
    rows = {name.replace("weight", "bias"): Full(diff=to_ref(randn(SHAPES[name][0], seed=5)), scale=2.0) for name in SHAPES}
    before = Adapter({**of(), **rows})
    save(before, tmp_path / "a")
    loratools.fit(tmp_path / "a", tmp_path / "out", "peft", max_rank=1)
    after = load(tmp_path / "out")
    for name in rows:
        assert torch.equal(dense(after[name]), dense(before[name]))
    save(of_images(Adapter({**of(), NAMES["bias"]: rows[NAMES["bias"]]})), tmp_path / "b.safetensors", format="loratools")
    loratools.fit(tmp_path / "b.safetensors", tmp_path / "comfy", "comfyui")
    (bias,) = (delta for name, delta in load(tmp_path / "comfy").items() if name.endswith(".bias"))
    assert torch.equal(dense(bias), dense(rows[NAMES["bias"]]))


@pytest.mark.parametrize("format", ["loratools", "kohya"])
def test_an_adapter_of_one_of_pefts_methods_stays_of_it(format: str, tmp_path: Path) -> None:
    """LoHa of every module is PEFT's LoHa; beside LoRA it becomes LoRA."""
    every = Adapter({name: replace(MADE["loha"]()[Q], alpha=1.0) for name in (Q, Q.replace("q_proj", "o_proj"))})  # type: ignore[type-var]
    save(every, tmp_path / "a.safetensors", format=format)
    base = write_checkpoint(tmp_path / "base", {name: randn(8, 8, seed=1) for name in every}, None)
    found = loratools.check(tmp_path / "a.safetensors", "peft")
    assert [row["rule"] for row in found["findings"]] == ["format"]
    receipt = loratools.fit(tmp_path / "a.safetensors", tmp_path / "out", "peft", base=base)
    assert {row["kind"] for row in receipt["tensors"]} == {"loha"} and {row["error"] for row in receipt["tensors"]} == {0.0}
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["peft_type"] == "LOHA"
    assert loratools.check(tmp_path / "out", "peft")["clean"]


@pytest.mark.parametrize("target", ["vllm", "mlx"])
def test_layers_get_the_model_that_a_runtime_has_them_under(target: str, tmp_path: Path) -> None:
    """peft's names of an adapter of LlamaModel, which is not LlamaForCausalLM, have no `model.`"""
    save(Adapter({name.removeprefix("model."): delta for name, delta in of().items()}), tmp_path / "a")
    assert {row["rule"] for row in loratools.check(tmp_path / "a", target)["findings"]} >= {"root"}
    receipt = loratools.fit(tmp_path / "a", tmp_path / "out", target)
    assert set(load(tmp_path / "out")) == set(SHAPES) == set(rows_of(receipt))
    for name, delta in load(tmp_path / "out").items():
        assert torch.equal(dense(delta), dense(of()[name]))


def test_sizes_that_only_a_base_tells_are_asked_for(tmp_path: Path) -> None:
    """MiSS folds the inputs: how many there are its block does not tell."""
    save(of(q=MiSS(block=to_ref(randn(2, 8, seed=1)))), tmp_path / "a.safetensors", format="loratools")
    (found,) = [row for row in loratools.check(tmp_path / "a.safetensors", "vllm")["findings"] if row["rule"] == "kind"]
    assert (found["share"], found["unmeasured"]) == (None, "how large it is depends on the base's weight: give --base")
    with pytest.raises(LoratoolsError, match="give --base"):
        loratools.fit(tmp_path / "a.safetensors", tmp_path / "out", "vllm")


def test_a_kind_without_a_small_product_gets_the_ranks_there_are(tmp_path: Path) -> None:
    """Of the LoKr of two whole matrices no product is small: it becomes the best LoRA of the adapter's greatest rank."""
    save(MADE["lokr"](), tmp_path / "a.safetensors", format="loratools")
    row = rows_of(loratools.fit(tmp_path / "a.safetensors", tmp_path / "out", "vllm"))[Q]
    S = torch.linalg.svdvals(torch.kron(randn(2, 2, seed=1).double(), randn(4, 4, seed=2).double()))
    assert row["rank"] == 2
    # two roundings of float32 beside it
    assert row["error"] == pytest.approx(float(S[2:].norm() / S.norm()), rel=1e-5) and row["optimal_error"] <= row["error"] * (1 + 1e-9)


def test_modules_that_are_joined_get_lora_of_zeros(tmp_path: Path, weights: Path) -> None:
    save(Adapter({Q: low(alpha=3.0)}), tmp_path / "a")
    with pytest.raises(NotExpressible, match="give --base: LoRA of zeros goes beside it then"):
        loratools.fit(tmp_path / "a", tmp_path / "out", "sglang")
    receipt = loratools.fit(tmp_path / "a", tmp_path / "out", "sglang", base=weights)
    made = deltas(tmp_path / "out")
    assert set(made) == {Q, V} and not dense(made[V]).any() and (made[V].rank, made[V].shape()) == (2, SHAPES[V])
    assert (receipt["expected"], receipt["applied"]) == (1, 1)
    assert receipt["notes"] == [f"a module has LoRA of zeros, which SGLang joins to LoRA beside it: {V}"]
    assert loratools.check(tmp_path / "out", "sglang", base=weights)["clean"]


def test_what_goes_apart_needs_names_with_dots(tmp_path: Path) -> None:
    save(made_for("kohya", "bias"), tmp_path / "a.safetensors", format="kohya")
    with pytest.raises(LoratoolsError, match="these have underscores where it has dots; give --base"):
        loratools.fit(tmp_path / "a.safetensors", tmp_path / "out", "kohya")


def test_textual_inversions_go_apart_whatever_the_names_are(tmp_path: Path) -> None:
    """They ride along in kohya's files, and there are no names to spell in a file of them alone."""
    tensors = {"lora_unet_q.lora_down.weight": randn(2, 6, seed=0), "lora_unet_q.lora_up.weight": randn(4, 2, seed=1)}
    save_file(tensors | {"bundle_emb.token.clip_l": randn(2, 6, seed=2)}, tmp_path / "k.safetensors")
    loratools.fit(tmp_path / "k.safetensors", tmp_path / "out.safetensors", "kohya")
    assert list(load(tmp_path / "out.saved.safetensors").passengers) == ["bundle_emb.token.clip_l"]
    assert list(load(tmp_path / "out.safetensors")) == ["lora_unet_q.weight"]
