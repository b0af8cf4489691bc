"""fit: every target takes what comes out, whatever goes in; ΔW is what it was or the stated error away; what cannot be is told."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import loratools
from loratools.adapter import Adapter
from loratools.deltas.full import Full
from loratools.deltas.lowrank import LowRank
from loratools.errors import LoratoolsError, NotExpressible, OptionError
from loratools.formats import FORMATS, load, save
from loratools.ops._base import Base
from loratools.tensors import read_tensor, to_ref
from loratools.workflows._fitting import one_scaling
from loratools.workflows.targets import names, target_of
from tests.files import write_checkpoint
from tests.ops._bases import lora
from tests.ops._lora import SCHEMA, checked, dense, rows_of
from tests.strategies import randn
from tests.workflows._adapters import IMAGES, MADE, NAMES, SHAPES, Q, V, base, folder, low, made_for, of, of_images

WRITTEN = {row.name for row in FORMATS if row.encode}
TARGETS = [
    pytest.param(
        name, marks=[] if target_of(name).format in WRITTEN else pytest.mark.skip(f"the format {target_of(name).format} is not written yet")
    )
    for name in names()
]
# what a target takes in no way, and a word of the reason
CANNOT = {
    ("comfyui", "embedding"): "no LoRA on embeddings", ("diffusers", "embedding"): "linear layers and convolutions only",
    ("kohya", "embedding"): "linear layers and convolutions only", ("vllm", "conv"): "linear layers and embeddings only",
    ("sglang", "conv"): "linear layers and embeddings only", ("mlx", "conv"): "linear layers, embeddings and stacks",
    ("llama.cpp", "conv"): "to matrices only", ("llama.cpp", "head"): "with a tied head", ("llama.cpp", "embedding"): "with a tied head",
    ("mlx", "head"): "tied head", ("mlx", "embedding"): "tied head",
}  # fmt: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base(tmp_path_factory.mktemp("base") / "base", images=True)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base(tmp_path_factory.mktemp("base") / "base")


def place(folder: Path, name: str) -> Path:
    """Where the output of a target goes."""
    return folder / ("out.gguf" if target_of(name).format == "gguf" else "out")


def flat(name: str) -> str:
    """A name as every format has it, of one with what targets put before it."""
    return name.removeprefix("unet.").removeprefix("text_encoder.").removeprefix("lora_unet_").removeprefix("lora_te_").replace(".", "_")


@pytest.mark.parametrize("word", MADE)
@pytest.mark.parametrize("name", TARGETS)
def test_check_finds_nothing_in_what_fit_wrote(name: str, word: str, tmp_path: Path, weights: Path, images: Path) -> None:
    save(made_for(name, word), tmp_path / "a.safetensors", format="loratools")
    out = place(tmp_path, name)
    try:
        receipt = loratools.fit(tmp_path / "a.safetensors", out, name, base=images if name in IMAGES else weights)
    except LoratoolsError as error:
        assert (name, word) in CANNOT, error
        assert isinstance(error, NotExpressible) and CANNOT[name, word] in str(error)
        assert not out.exists()
        return
    assert (name, word) not in CANNOT
    checked(receipt, out)
    found = loratools.check(out, name)
    assert found["clean"], found["findings"]
    assert receipt["applied"] + sum(row["name"] not in rows_of(receipt) for row in receipt["left_out"]) >= receipt["expected"]


@pytest.mark.parametrize("word", ["plain", "rslora", "patterns", "bfloat16", "bias", "saved", "conv"])
@pytest.mark.parametrize("name", TARGETS)
def test_every_change_is_what_it_was(name: str, word: str, tmp_path: Path, weights: Path) -> None:
    if (name, word) in CANNOT:
        return
    before = made_for(name, word)
    save(before, tmp_path / "a.safetensors", format="loratools")
    out, needed = place(tmp_path, name), target_of(name).format == "gguf"  # whose names only a base tells
    receipt = loratools.fit(tmp_path / "a.safetensors", out, name, base=weights if needed else None)
    read = Base(weights, {"embedding": (), "transposed": ()}).resolve(load(out)) if needed else load(out)
    after = {flat(key): delta for key, delta in read.items()}
    for key, delta in before.items():
        made = after.get(flat(key))
        if not isinstance(delta, LowRank) or made is None:
            assert any(row["name"] == key for row in receipt["left_out"]) or made is not None
            continue
        error = float((dense(made) - dense(delta)).norm() / dense(delta).norm())
        stated = rows_of(receipt)[next(row for row in rows_of(receipt) if flat(row) == flat(key))]["error"]
        assert error == pytest.approx(stated, abs=1e-12)  # float64's own rounding of the dense product
        # one rounding of B to float32, whose elements are off by 2⁻²⁴ of themselves at most; bfloat16 keeps its bits but for Q's 3/8
        assert error <= (2.0**-24 if word != "bfloat16" else 2.0**-8)


# -- what is done


def deltas(path: Path) -> dict[str, LowRank]:
    found = dict(load(path))
    assert all(isinstance(delta, LowRank) for delta in found.values())
    return found  # type: ignore[return-value]


def test_where_nothing_has_to_change_the_bytes_are_the_same(tmp_path: Path) -> None:
    folder(tmp_path / "a")
    receipt = loratools.fit(tmp_path / "a", tmp_path / "out", "vllm")
    one, other = (load_file(tmp_path / where / "adapter_model.safetensors") for where in ("a", "out"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    one, other = (json.loads((tmp_path / where / "adapter_config.json").read_text()) for where in ("a", "out"))
    assert one == other
    assert {row["error"] for row in receipt["tensors"]} == {0.0}


def test_a_flag_and_patterns_are_gone_and_alpha_is_the_rank(tmp_path: Path) -> None:
    save(MADE["patterns"](), tmp_path / "a")
    receipt = loratools.fit(tmp_path / "a", tmp_path / "out", "sglang")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (4, 4, False)
    assert not config["rank_pattern"] and not config["alpha_pattern"]
    assert {row["scaling"] for row in receipt["tensors"]} == {1.0}
    assert {row["rank"] for row in receipt["tensors"]} == {4}


def test_peft_computes_the_same_change_from_what_was_fitted(tmp_path: Path) -> None:
    """The oracle is peft's own `get_delta_weight` of both folders."""
    from peft import PeftModel
    from torch import nn

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.v_proj = (nn.Linear(8, SHAPES[name][0], bias=False) for name in (Q, V))

    def model() -> nn.Module:
        net = nn.Module()
        net.model = nn.Module()
        net.model.layers = nn.ModuleList([nn.Module()])
        net.model.layers[0].self_attn = Attention()
        net.model.layers[0].mlp = nn.Module()
        net.model.layers[0].mlp.up_proj = nn.Linear(8, 12, bias=False)
        return net

    folder(tmp_path / "a", use_rslora=True, alpha_pattern={"v_proj": 16})
    loratools.fit(tmp_path / "a", tmp_path / "out", "sglang")
    changes = []
    for path in (tmp_path / "a", tmp_path / "out"):
        adapted = PeftModel.from_pretrained(model(), path)
        layers = [layer for _, layer in adapted.named_modules() if hasattr(layer, "get_delta_weight")]
        changes.append([layer.get_delta_weight("default") for layer in layers])
    assert len(changes[0]) == 3
    for one, other in zip(*changes, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-6)  # float32 products of two spellings of one B


def test_narrow_factors_keep_their_bits(tmp_path: Path) -> None:
    """bfloat16 of one scaling that is no power of two: alpha says it, and B is not touched."""
    adapter = of().map(lambda name, delta: low(name, alpha=3.0, rslora=True, dtype=torch.bfloat16))
    save(adapter, tmp_path / "a")
    receipt = loratools.fit(tmp_path / "a", tmp_path / "out", "sglang")
    found = deltas(tmp_path / "out")
    for name, delta in adapter.items():
        assert isinstance(delta, LowRank)
        assert bytes(found[name].B.read()) == bytes(delta.B.read())
        assert found[name].scaling == pytest.approx(3 / math.sqrt(2), rel=1e-15) and not found[name].rslora
    assert {row["error"] for row in receipt["tensors"]} == {0.0}


@pytest.mark.parametrize(
    ("dtype", "alphas", "expected"),
    [
        (torch.float32, (3.0, 16.0), 1.0),
        (torch.bfloat16, (4.0, 16.0), 1.0),  # powers of two: exact
        (torch.bfloat16, (3.0, 3.0, 16.0), 1.5),
        (torch.bfloat16, (3.0, 6.0, 5.0), 1.5),  # 3 is twice 1.5, and exact too
    ],
)
def test_the_scaling_that_costs_least(dtype: torch.dtype, alphas: tuple[float, ...], expected: float) -> None:
    assert one_scaling([low(alpha=alpha, dtype=dtype) for alpha in alphas]) == expected


def test_ranks_are_cut_by_the_best_there_is(tmp_path: Path) -> None:
    save(of(q=low(rank=4, alpha=4.0)), tmp_path / "a")
    receipt = loratools.fit(tmp_path / "a", tmp_path / "out", "vllm", max_rank=1)
    for name, row in rows_of(receipt).items():
        before = dense(MADE["plain"]()[name] if name != Q else low(rank=4, alpha=4.0))
        S = torch.linalg.svdvals(before)
        best = float(S[1:].norm() / S.norm())
        assert row["rank"] == 1
        assert row["optimal_error"] == pytest.approx(best, rel=1e-12)
        assert row["error"] == pytest.approx(float((dense(deltas(tmp_path / "out")[name]) - before).norm() / before.norm()), rel=1e-9)
        assert row["error"] <= best * (1 + 1e-6)  # two roundings to float32 on top of the truncation


def test_a_rank_above_the_targets_own_is_cut_unasked(tmp_path: Path) -> None:
    save(MADE["high rank"](), tmp_path / "a")
    receipt = loratools.fit(tmp_path / "a", tmp_path / "out", "vllm")
    assert {row["rank"] for row in receipt["tensors"]} == {512}
    assert max(row["error"] for row in receipt["tensors"]) < 1e-6  # an 8 x 8 weight has rank 8


def test_a_dora_is_the_best_lora_of_its_change(tmp_path: Path, weights: Path) -> None:
    save(MADE["dora on all"](), tmp_path / "a")
    receipt = loratools.fit(tmp_path / "a", tmp_path / "out", "vllm", base=weights, max_rank=3)
    W = {name: tensor.to(torch.float64) for name, tensor in load_file(weights / "model.safetensors").items()}
    for name, row in rows_of(receipt).items():
        moved = W[name] + dense(low(name))
        m = read_tensor(to_ref(randn(SHAPES[name][0], 1, seed=3)), torch.float64)
        change = m * moved / moved.norm(dim=1, keepdim=True) - W[name]
        S = torch.linalg.svdvals(change)
        error = float((dense(deltas(tmp_path / "out")[name]) - change).norm() / change.norm())
        assert error == pytest.approx(row["error"], rel=1e-6)
        assert error <= float(S[3:].norm() / S.norm()) * (1 + 1e-5) + 1e-7
        assert (row["kind_before"], row["kind"]) == ("dora", "lora")


def test_a_dora_without_its_base_says_to_give_it(tmp_path: Path) -> None:
    save(MADE["dora on all"](), tmp_path / "a")
    with pytest.raises(LoratoolsError, match="give --base"):
        loratools.fit(tmp_path / "a", tmp_path / "out", "vllm")
    assert not (tmp_path / "out").exists()


def test_a_loha_is_exact(tmp_path: Path) -> None:
    save(MADE["loha"](), tmp_path / "a.safetensors", format="loratools")
    receipt = loratools.fit(tmp_path / "a.safetensors", tmp_path / "out", "vllm")
    assert rows_of(receipt)[Q]["error"] < 1e-6
    assert rows_of(receipt)[Q]["rank"] == 4  # of the product of two ranks of 2


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
    if target_of("llama.cpp").format not in WRITTEN:
        with pytest.raises(NotExpressible, match=r"llama.cpp loads the format gguf, which this version does not write"):
            loratools.fit(folder(tmp_path / "a"), tmp_path / "out", "llama.cpp")
        return
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


def test_textual_inversions_go_apart_whatever_the_names_are(tmp_path: Path) -> None:
    """They ride along in kohya's files, and there are no names to spell in a file of them alone."""
    tensors = {"lora_unet_q.lora_down.weight": randn(2, 6, seed=0), "lora_unet_q.lora_up.weight": randn(4, 2, seed=1)}
    save_file(tensors | {"bundle_emb.token.clip_l": randn(2, 6, seed=2)}, tmp_path / "k.safetensors")
    loratools.fit(tmp_path / "k.safetensors", tmp_path / "out.safetensors", "kohya")
    assert list(load(tmp_path / "out.saved.safetensors").passengers) == ["bundle_emb.token.clip_l"]
    assert list(load(tmp_path / "out.safetensors")) == ["lora_unet_q.weight"]


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
