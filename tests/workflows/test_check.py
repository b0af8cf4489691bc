"""check: every rule of every target beside an adapter that breaks it and one that does not; shares, notes, and what a base tells."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

import loratools
from loratools.adapter import Adapter
from loratools.deltas.experts import Experts
from loratools.deltas.full import Replacement
from loratools.deltas.lowrank import LowRank
from loratools.errors import FormatError, OptionError
from loratools.formats import save
from loratools.ops._base import Base
from loratools.tensors import read_tensor, to_ref
from loratools.workflows._checking import Finding, findings, strikes
from loratools.workflows._rules import hits, scale
from loratools.workflows._subject import Subject
from loratools.workflows._weights import weights
from loratools.workflows.targets import Rule, names, target_of
from tests.ops._lora import dense
from tests.strategies import randn
from tests.workflows._adapters import BLOCK, IMAGES, MADE, NAMES, SHAPES, UP, Q, V, base, folder, low, made_for, of, of_images, ref

SCHEMA = json.loads((Path(__file__).parents[2] / "spec" / "check.schema.json").read_text())
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "bias": "none", "init_lora_weights": True}
# but the rule that asks the base's model_type, which has a test of its own
RULES = [(name, rule) for name in names() for rule in target_of(name).rules if rule.id != "fused_experts"]
LAYER = "model.layers.0."
Made = Callable[[str], Subject]


def subject(name: str, made: Adapter, **more: Any) -> Subject:
    return Subject(made, target_of(name).reads, **more)


def made(word: str, format: str | None = None, **more: Any) -> Made:
    """An adapter of MADE of a model that the target runs, as if from a file of that format."""
    return lambda name: subject(name, replace(made_for(name, word), format=format), **more)


def read(word: str, **config: Any) -> Made:
    """As if from a peft folder whose config says more."""
    return made(word, "peft", config=CONFIG | config)


def keyed(*keys: str, format: str = "peft") -> Made:
    """As if from a file with these keys."""
    return made("plain", format, config=CONFIG if format == "peft" else None, keys=keys)


def named(*tensors: str, format: str | None = None, layer: str = "linear") -> Made:
    """LoRA on tensors of these names."""
    return lambda name: subject(name, Adapter({tensor: replace(low(), layer=layer) for tensor in tensors}, format=format))


def of_another(name: str) -> Subject:
    """Of a model that the target does not run."""
    return subject(name, of() if name in IMAGES else of_images(of()))


def whole(*tensors: str) -> Made:
    return lambda name: subject(name, Adapter({**of(), **{tensor: Replacement(value=ref(8, 8)) for tensor in tensors}}))


def experts(*words: str) -> Made:
    """LoRA of fused experts, flat as peft has it."""
    stack = Experts(A=ref(4, 8), B=ref(8, 4), alpha=2.0, experts=2)
    return lambda name: subject(name, Adapter({f"{LAYER}mlp.experts.{word}": stack for word in words}))


# what breaks each rule, by its name, or by its target's and its own where targets differ
BREAKING: dict[str, Made] = {
    "format": made("plain", "loratools"),
    "network": of_another,
    "tower": named(Q, "model.visual.blocks.0.attn.qkv.weight"),
    "architecture": named("transformer.h.0.attn.c_attn.weight"),
    "root": named("layers.0.self_attn.q_proj.weight"),
    "gpt2": named("transformer.h.0.attn.c_attn.weight", layer="transposed"),
    "neox": named("gpt_neox.layers.0.attention.dense.weight"),
    "modules": named("model.decoder.layers.0.fc1.weight"),
    "joined": named(Q),
    "dora": made("dora"),
    "comfyui dora": made("dora"),
    "dora_scale": made("dora", "kohya"),
    "axis": made("dora in"),
    "mixed": made("dora"),
    "initial": made("pissa"),
    "init_lora_weights": read("plain", init_lora_weights="PiSSA_niter_4"),
    "variant": read("plain", use_qalora=True),
    "kind": made("loha"),
    "comfyui kind": made("scaled"),
    "rotation": made("rotated"),
    "metadata": made("plain", "diffusers"),
    "magnitude": made("dora", "diffusers"),
    "lora_bias": made("bias", "diffusers"),
    "modules_to_save": read("saved", modules_to_save=["score"]),
    "patterns": read("patterns", rank_pattern={"q_proj": 4}),
    "saved": made("saved"),
    "saved_layer": whole(Q),
    "vocabulary_saved": whole("model.embed_tokens.weight"),
    "vocabulary_keys": keyed("base_model.model.lm_head.weight"),
    "copy": keyed("base_model.model.model.embed_tokens.base_layer.weight"),
    "rows": made("rows"),
    "bias": made("bias"),
    "bias_setting": read("plain", bias="all"),
    "norm": made("norm"),
    "vector": made("norm"),
    "convolution": made("conv"),
    "embedding": made("embedding"),
    "sglang embedding": named("transformer.wpe.weight", layer="embedding"),
    "vocabulary": made("embedding"),
    "head": made("head"),
    "position": named("model.decoder.embed_positions.weight", layer="embedding"),
    "required": read("plain", r=None),
    "target_modules": read("plain", target_modules=r".*\.(q|v)_proj"),
    "names": keyed("base_model.model.q_proj.lora_A.mine.weight"),
    "wrappers": keyed("base_model.model._orig_mod.q_proj.lora_A.weight"),
    "prefix": keyed("model.layers.0.self_attn.q_proj.lora_A.weight"),
    "kohya prefix": named("lycoris_mid_block_attentions_0_proj_in.weight", format="kohya"),
    "diffusers prefix": named("lora_te3_encoder_block_0_layer_0_SelfAttention_q.weight", format="kohya"),
    "spelling": named("lora_unet_single_transformer_blocks_0_attn_to_q.weight", format="kohya"),
    "places": named("lora_unet_conv_in.weight", format="kohya"),
    "clip": named("lora_te_encoder_layers_0_self_attn_q_proj.weight", format="kohya"),
    "layout": named("diffusion_model.down_blocks.0.attentions.0.proj_in.weight", format="comfyui"),
    "diffusers layout": named("transformer.double_blocks.0.img_attn.qkv.weight", format="diffusers"),
    "attention": keyed(f"{BLOCK}attn1.to_q.lora_A.weight", format="diffusers"),
    "text_encoder": named("lora_te_text_model_encoder_layers_0_layer_norm1.weight", format="kohya"),
    "original": named("diffusion_model.double_blocks.0.img_attn.qkv.weight", format="comfyui"),
    "ltx": keyed("diffusion_model.transformer_blocks.0.attn1.to_q.alpha", format="comfyui"),
    "parts": keyed("transformer_blocks.0.attn.to_q.lora_A.weight", format="diffusers"),
    "diffusers alpha": keyed(f"{BLOCK}attn1.to_q.alpha", format="diffusers"),
    "alpha": read("plain", lora_alpha=None),
    "zero": lambda name: subject(name, Adapter({Q: low(alpha=0.0)})),
    "scale": made("patterns"),
    "sglang scale": read("rslora", use_rslora=True),
    "llama.cpp scale": read("rslora", use_rslora=True),
    "rank": made("patterns"),
    "vllm rank": made("high rank"),
    "rank_pattern": read("patterns", rank_pattern={"q_proj": 4}),
    "default_rank": made("high rank"),
    "experts": experts("gate_up_proj", "down_proj"),
    "vllm experts": experts("gate_up_proj"),
    "perhaps_fused": experts("gate_up_proj", "down_proj"),
    "passengers": made("passengers"),
    "tied": made("head", heads=frozenset({NAMES["head"]})),
    "tied_embedding": made("embedding", tied=frozenset({NAMES["embedding"]})),
}  # fmt: skip
KEEPING: dict[str, Made] = {
    "format": lambda name: subject(name, replace(of(), format=target_of(name).reads[0])),
    "architecture": named("transformer.h.0.mlp.w1.weight"),
    "vllm root": lambda name: Subject(
        Adapter({"layers.0.self_attn.q_proj.weight": low()}), ("peft",), config=CONFIG | {"task_type": "FEATURE_EXTRACTION"}
    ),
    "gpt2": named("transformer.h.0.attn.c_attn.weight"),
    "joined": named(Q, V),
    "comfyui dora": made("dora in"),
    "dora_scale": made("dora", "diffusers"),
    "magnitude": made("dora", "kohya"),
    "lora_bias": made("bias", "kohya"),
    "comfyui kind": made("loha"),
    "comfyui saved": lambda name: subject(name, Adapter({"diffusion_model.out.0.weight": Replacement(value=ref(8, 8))})),
    "axis": made("dora on all"),
    "mixed": made("dora on all"),
    "init_lora_weights": read("plain", init_lora_weights="Gaussian"),
    "bias_setting": read("plain", lora_bias=False),
    "saved": whole("model.embed_tokens.weight"),
    "sglang saved": whole(Q),
    "diffusers saved": made("plain"),
    "kohya saved": made("plain"),
    "mlx saved": made("plain"),
    "llama.cpp saved": made("plain"),
    "saved_layer": made("saved"),
    "vocabulary_saved": made("saved"),
    "copy": keyed("base_model.model.model.embed_tokens.lora_embedding_A"),
    "patterns": read("plain", rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 4}),
    "metadata": made("patterns", "kohya"),
    "norm": made("bias"),
    "llama.cpp bias": made("norm"),
    "sglang embedding": made("embedding"),
    "head": made("embedding"),
    "required": read("plain"),
    "target_modules": read("plain", target_modules="all-linear"),
    "vocabulary_keys": keyed("base_model.model.model.embed_tokens.lora_embedding_A"),
    "names": keyed("base_model.model.q_proj.lora_A.weight"),
    "peft names": keyed("base_model.model.q_proj.lora_A.default.weight", "base_model.model.e.lora_embedding_A.default"),
    "wrappers": keyed("base_model.model.q_proj.lora_A.weight"),
    "prefix": keyed("base_model.model.q_proj.lora_A.weight"),
    "kohya prefix": named("lora_te3_encoder_block_0_layer_0_SelfAttention_q.weight", format="kohya"),
    "diffusers prefix": named("lora_transformer_transformer_blocks_0_attn_to_q.weight", format="kohya"),
    "spelling": named("lora_unet_transformer_blocks_0_attn_to_q.weight", format="kohya"),  # Qwen-Image's own name
    "places": named("lora_unet_mid_block_proj_in.weight", "lora_te2_text_model_encoder_layers_0_mlp_fc1.weight", format="kohya"),
    "clip": named("lora_te_text_model_encoder_layers_0_self_attn_q_proj.weight", "lora_te3_encoder_block_0_layer_0_SelfAttention_q.weight"),
    "layout": named("diffusion_model.input_blocks.1.1.proj_in.weight", format="comfyui"),
    "attention": keyed(f"{BLOCK}attn1.processor.to_q_lora.down.weight", f"{BLOCK}ff.net.0.proj.lora_A.weight", format="diffusers"),
    "text_encoder": named("lora_te_text_model_encoder_layers_0_self_attn_q_proj.weight", format="kohya"),
    "original": named(
        "diffusion_model.blocks.0.self_attn.q.weight", "diffusion_model.layers.0.attention.to_q.weight",
        "diffusion_model.transformer_blocks.0.attn.to_q.weight", format="comfyui",
    ),
    "ltx": keyed("diffusion_model.transformer_blocks.0.attn.to_q.alpha", format="comfyui"),  # Qwen-Image's, which are read
    "parts": keyed("transformer.transformer_blocks.0.attn.to_q.lora_A.weight", format="diffusers"),
    "diffusers alpha": keyed("transformer.transformer_blocks.0.attn.to_q.alpha", format="diffusers"),
    "vllm scale": read("rslora", use_rslora=True),
    "vllm experts": experts("gate_up_proj", "down_proj"),
    "tied": made("head"),
    "tied_embedding": made("embedding"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "rule"), RULES, ids=lambda value: value if isinstance(value, str) else value.id)
def test_a_rule_finds_what_breaks_it_and_nothing_else(name: str, rule: Rule) -> None:
    breaking = BREAKING.get(f"{name} {rule.id}", BREAKING.get(rule.id))
    assert breaking is not None, "a rule needs an adapter that breaks it"
    keeping = KEEPING.get(f"{name} {rule.id}", KEEPING.get(rule.id, made("plain")))
    found, others = (strikes(make(name), target_of(name)) for make in (breaking, keeping))
    assert rule.id in {one.rule.id for one in found}
    assert rule.id not in {one.rule.id for one in others}


@pytest.mark.parametrize("name", names())
def test_a_plain_adapter_in_memory_is_clean(name: str) -> None:
    assert findings(made_for(name, "plain"), name) == []


# the worst that each target does to an adapter in memory: c clean, r refuse, i ignore, m mis-scale
VERDICTS = """
                comfyui diffusers kohya llama.cpp mlx peft sglang vllm
plain             c       c         c     c         c   c    c      c
rslora            c       c         c     m         c   c    m      c
patterns          c       c         c     m         r   c    r      m
bfloat16          c       c         c     m         m   c    m      m
dora              m       r         i     r         r   r    r      r
dora_on_all       m       c         i     r         c   c    r      r
dora_in           c       r         i     r         r   r    r      r
loha              c       r         i     r         r   r    r      r
lokr              c       r         i     r         r   r    r      r
pissa             i       r         i     m         m   r    m      r
rotated           m       r         i     r         r   r    r      r
scaled            i       r         i     r         r   r    r      r
full              c       r         i     r         r   r    r      r
saved             i       r         i     r         r   c    i      r
rows              i       r         i     r         r   c    i      r
bias              c       r         i     r         r   r    r      r
norm              c       r         i     i         r   r    r      r
embedding         i       r         i     m         m   c    m      m
conv              c       c         c     r         r   c    r      r
head              c       c         c     m         m   c    m      m
high_rank         c       c         c     m         r   c    r      r
passengers        i       i         i     r         r   i    i      r
"""
_, HEADER, *LINES = VERDICTS.splitlines()


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.split()[0])
def test_what_becomes_of_each_kind_in_each_target(line: str) -> None:
    word, *verdicts = line.split()
    for name, verdict in zip(HEADER.split(), verdicts, strict=True):
        found = findings(made_for(name, word.replace("_", " ")), name)
        losses = {one.kind for one in found}
        worst = next((loss for loss in ("refuse", "ignore", "mis-scale") if loss in losses), "clean")
        assert worst[0] == verdict, (name, word, [(one.rule, one.tensor) for one in found])


def test_every_kind_has_a_verdict() -> None:
    assert {line.split()[0].replace("_", " ") for line in LINES} == set(MADE)


@pytest.mark.parametrize("name", ["peft", "vllm", "sglang"])
def test_a_plain_folder_is_clean(name: str, tmp_path: Path) -> None:
    found = loratools.check(folder(tmp_path / "a"), name)
    jsonschema.Draft202012Validator(SCHEMA).validate(found)
    assert (found["clean"], found["findings"], found["tensors"], found["format"]) == (True, [], 3, "peft")


def test_shares_are_parts_of_the_squared_norm(tmp_path: Path) -> None:
    path = folder(tmp_path / "a", alpha_pattern={"v_proj": 16})
    (found,) = findings(path, "vllm")
    loaded = loratools.load(path)
    squares = {name: float(dense(delta).square().sum()) for name, delta in loaded.items()}
    assert found.tensor == V
    assert (found.kind, found.found, found.fit) == ("mis-scale", "scaled by 2 instead of 8", "bake")
    assert found.share == pytest.approx(squares[V] / sum(squares.values()), rel=1e-12)
    assert found.source.file == "vllm/lora/peft_helper.py"


def test_what_only_a_base_tells_has_no_share_without_one(tmp_path: Path) -> None:
    save(MADE["saved"](), tmp_path / "a")
    found = loratools.check(tmp_path / "a", "vllm")
    jsonschema.Draft202012Validator(SCHEMA).validate(found)
    assert {row["rule"]: row["share"] for row in found["findings"]} == {"modules_to_save": None, "saved": None}
    assert found["findings"][0]["unmeasured"] == "how large it is depends on the base's weight: give --base"
    assert found["unmeasured"] == ["score.weight"]


def test_with_the_base_everything_has_its_share(tmp_path: Path) -> None:
    adapter = MADE["saved"]()
    save(adapter, tmp_path / "a")
    found = loratools.check(tmp_path / "a", "vllm", base=base(tmp_path / "base"))
    squares = {name: float(dense(delta).square().sum()) for name, delta in adapter.items() if name in SHAPES}
    score = adapter["score.weight"]
    assert isinstance(score, Replacement)
    moved = float((read_tensor(score.value, torch.float64) - randn(3, 8, seed=14).to(torch.float64)).square().sum())
    share = moved / (moved + math.fsum(squares.values()))
    assert [row["share"] for row in found["findings"]] == [pytest.approx(share, rel=1e-12)] * 2
    assert found["unmeasured"] == []


def test_a_dora_is_weighed_beside_its_weight(tmp_path: Path) -> None:
    save(MADE["dora on all"](), tmp_path / "a")
    found = findings(tmp_path / "a", "vllm", base=base(tmp_path / "base"))
    assert {one.tensor for one in found} == {Q, V, UP}
    assert sum(one.share or 0.0 for one in found) == pytest.approx(1)


def test_a_tied_head_is_seen_with_its_base_only(tmp_path: Path) -> None:
    save(MADE["head"](), tmp_path / "a")
    assert "tied" not in {one.rule for one in findings(tmp_path / "a", "llama.cpp")}
    found = [one for one in findings(tmp_path / "a", "llama.cpp", base=base(tmp_path / "base")) if one.rule == "tied"]
    assert [(one.tensor, one.kind, one.fit) for one in found] == [("lm_head.weight", "refuse", "none")]


def test_a_whole_adapter_is_all_of_it(tmp_path: Path) -> None:
    (found,) = findings(folder(tmp_path / "a"), "mlx")
    assert (found.rule, found.tensor, found.share, found.fit) == ("format", "the whole adapter", 1.0, "write")


def test_a_note_is_no_finding(tmp_path: Path) -> None:
    wide = of(q=low(rank=32, alpha=64.0), v=low(V, rank=32, alpha=64.0))
    save(replace(wide, deltas={name: wide[name] for name in (Q, V)}), tmp_path / "a")
    found = loratools.check(tmp_path / "a", "vllm")
    assert found["clean"]
    assert found["notes"] == [
        "start vLLM with a --max-lora-rank of 32, 64, 128, 256, 320 or 512 that holds this rank; its default is 16 "
        f"({Q}: rank 32, above 16)"
    ]


def test_a_finding_is_what_the_document_says(tmp_path: Path) -> None:
    path = folder(tmp_path / "a", use_rslora=True)
    rows = loratools.check(path, "sglang")["findings"]
    assert [Finding(**{**row, "source": one.source}) for row, one in zip(rows, findings(path, "sglang"), strict=True)] == findings(
        path, "sglang"
    )


def test_a_target_or_a_predicate_that_is_none_is_told(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="unknown --for: found tgi"):
        loratools.check(of(), "tgi")
    with pytest.raises(FormatError, match="no such predicate: found colour, expected format or kind"):
        hits("colour", {}, Subject(of(), ("peft",)))
    with pytest.raises(FormatError, match=r"settings of the predicate rank: .*unexpected keyword argument 'below'"):
        hits("rank", {"below": 4}, Subject(of(), ("peft",)))


@pytest.mark.parametrize(
    ("when", "settings", "word", "places"),
    [
        ("name", {"at": r"\.v_proj\.weight$"}, "plain", [V]),
        ("name", {"off": "mlp", "sort": "language"}, "plain", [Q, V]),
        ("dtype", {"takes": ["F32"]}, "bfloat16", [Q, V, UP]),
        ("dtype", {"takes": ["F32"]}, "plain", []),
        ("kind", {"kinds": ["full"], "at": r"\.bias$"}, "bias", [NAMES["bias"]]),
        ("kind", {"kinds": ["full"], "at": r"\.bias$"}, "norm", []),
        ("scale", {"per": "one"}, "plain", [Q, V, UP]),
        ("scale", {"per": "tensor"}, "patterns", [V, UP]),
    ],
)  # fmt: skip
def test_predicates_that_targets_may_use(when: str, settings: dict[str, Any], word: str, places: list[str]) -> None:
    assert [hit.place for hit in hits(when, settings, Subject(MADE[word](), ("peft",)))] == places


def test_why_a_change_beside_its_base_has_no_size(tmp_path: Path) -> None:
    adapter = Adapter({"head.weight": Replacement(value=ref(3, 8)), "score.weight": Replacement(value=ref(5, 8))})
    found = weights(adapter, Base(base(tmp_path / "base"), {"embedding": (), "transposed": ()}))
    assert found == {
        "head.weight": "the base has no such tensor to compare it with", "score.weight": "it is of another shape than the base's",
    }  # fmt: skip


@pytest.mark.parametrize(("alpha", "found"), [(0, 0), (4, 1)])
def test_an_alpha_of_0_is_no_missing_one(alpha: float, found: int) -> None:
    """The config's alpha against a LoRA whose scaling is 0: where both are, nothing is mis-scaled; a missing one is peft's 8."""
    idle = LowRank(A=to_ref(torch.ones(2, 3)), B=to_ref(torch.ones(4, 2)), alpha=0.0)
    given = Subject(Adapter({"q.weight": idle}), ("peft",), config=CONFIG | {"lora_alpha": alpha})
    assert len(list(scale(given))) == found
