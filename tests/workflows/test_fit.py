"""fit: every target takes what comes out, whatever goes in; ΔW is what it was or the stated error away; what cannot be is told."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import loratools
from loratools.adapter import Adapter
from loratools.deltas.lowrank import LowRank
from loratools.errors import LoratoolsError, NotExpressible
from loratools.formats import FORMATS, load, save
from loratools.ops._base import Base
from loratools.tensors import read_tensor, to_ref
from loratools.workflows._fitting import one_scaling
from loratools.workflows.targets import names, target_of
from tests.ops._lora import checked, dense, rows_of
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


def test_another_model_is_one_line_that_says_where_it_runs(tmp_path: Path) -> None:
    save(Adapter({**of(), **{f"model.conv{i}.weight": MADE["conv"]()[NAMES["conv"]] for i in (1, 2)}}), tmp_path / "a")
    with pytest.raises(NotExpressible, match=r"modules of a language model, .*: --for peft, vllm, sglang, llama.cpp or mlx") as caught:
        loratools.fit(tmp_path / "a", tmp_path / "out", "kohya")
    assert "\n" not in str(caught.value)
    save(of_images(of()), tmp_path / "b.safetensors", format="kohya")
    with pytest.raises(NotExpressible, match=r"modules of a diffusion pipeline, .*: --for diffusers, comfyui or kohya"):
        loratools.fit(tmp_path / "b.safetensors", tmp_path / "out", "vllm")
