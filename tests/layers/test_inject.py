"""inject, freeze, trainable, lora_state_dict: every glob fits something, every faulty place is named, nothing half done."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model

from loratools.errors import Faults, MatchError, OptionError, UnsupportedError
from loratools.layers import (
    DoRAConv2d,
    DoRAEmbedding,
    DoRALinear,
    LoRAEmbedding,
    LoRALayer,
    LoRALinear,
    LoRAMergedLinear,
    freeze,
    inject,
    lora_state_dict,
    trainable,
)
from tests.files import raw


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.v_proj, self.norm = nn.Linear(8, 8), nn.Linear(8, 4), nn.LayerNorm(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.v_proj(self.q_proj(x)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Embedding(9, 8), nn.ModuleList([Block(), Block()])
        self.conv, self.head = nn.Conv2d(1, 2, 3), nn.Linear(4, 3)

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks[1].v_proj(self.embed(indices)))


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        ("q_proj", ["blocks.0.q_proj", "blocks.1.q_proj"]),
        (["blocks.1.?_proj"], ["blocks.1.q_proj", "blocks.1.v_proj"]),
        (["head", "embed"], ["embed", "head"]),
        ("*", ["embed", "blocks.0.q_proj", "blocks.0.v_proj", "blocks.1.q_proj", "blocks.1.v_proj", "conv", "head"]),
        (lambda name, module: isinstance(module, nn.Linear) and "0" in name, ["blocks.0.q_proj", "blocks.0.v_proj"]),
    ],
)
def test_targets(targets: object, names: list[str]) -> None:
    model = Model()
    assert inject(model, targets, rank=2, alpha=4) == tuple(names)
    assert [name for name, module in model.named_modules() if isinstance(module, LoRALayer)] == names


def test_dora_and_axis_and_make() -> None:
    model = Model()
    inject(model, ["embed", "q_proj", "conv"], rank=2, alpha=4, dora=True)
    assert [type(model.embed), type(model.blocks[0].q_proj), type(model.conv)] == [DoRAEmbedding, DoRALinear, DoRAConv2d]
    inject(model, "v_proj", rank=2, alpha=4, dora=True, axis="in")
    assert model.blocks[1].v_proj.magnitude.shape == (8,)
    inject(model, "head", make=lambda base: LoRAMergedLinear(base, enable_lora=[True, False, False], rank=1, alpha=1), rank=1, alpha=1)
    assert isinstance(model.head, LoRAMergedLinear)


@pytest.mark.parametrize(
    ("targets", "error", "said"),
    [
        ("qq_proj", MatchError, "qq_proj"),
        (["q_proj", "norms"], MatchError, "norms"),
        ("norm", UnsupportedError, "LayerNorm"),
        ([], OptionError, "no targets"),
        (lambda name, module: False, MatchError, "chooses no module"),
        (lambda name, module: True, Faults, "LayerNorm"),
    ],
)
def test_faults_are_named_and_the_model_is_untouched(targets: object, error: type[Exception], said: str) -> None:
    model = Model()
    before = {name: (type(module), id(module)) for name, module in model.named_modules()}
    with pytest.raises(error, match=said):
        inject(model, targets, rank=1, alpha=1)
    assert {name: (type(module), id(module)) for name, module in model.named_modules()} == before
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_not_twice() -> None:
    model = Model()
    inject(model, "head", rank=1, alpha=1)
    with pytest.raises(UnsupportedError, match="already"):
        inject(model, "head", rank=1, alpha=1)


def test_places_where_the_forward_would_not_be_called() -> None:
    """The parents read the weight themselves: a layer there would train on nothing, in silence."""
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    with pytest.raises(UnsupportedError, match=r"self_attn\.out_proj.*MultiheadAttention"):
        inject(encoder, "out_proj", rank=1, alpha=1)
    nested = nn.Sequential(encoder)
    with pytest.raises(UnsupportedError, match="fast path"):
        inject(nested, "linear1", rank=1, alpha=1)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        inject(nested, "linear1", rank=1, alpha=1)
        x = torch.randn(2, 3, 8)
        before = nested.eval()(x)
        with torch.no_grad():
            encoder.linear1.lora_B.normal_()
            assert not torch.equal(nested(x), before)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_a_shared_module_is_replaced_everywhere_and_a_tied_weight_is_not_merged() -> None:
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": shared, "b": shared, "c": nn.Linear(4, 4)})
    inject(model, "a", rank=1, alpha=1)
    assert model["a"] is model["b"]
    model["a"].merge()
    tied = nn.ModuleDict({"embed": nn.Embedding(5, 4), "head": nn.Linear(4, 5, bias=False)})
    tied["head"].weight = tied["embed"].weight
    inject(tied, "embed", rank=1, alpha=1)
    assert tied["embed"].weight is tied["head"].weight
    with pytest.raises(UnsupportedError, match=r"head\.weight"):
        tied["embed"].merge()


def test_freeze_and_trainable() -> None:
    model = Model()
    inject(model, "q_proj", rank=1, alpha=1)
    factors = [f"blocks.{block}.q_proj.lora_{factor}" for block in (0, 1) for factor in "AB"]
    biases = [name for name, _ in model.named_parameters() if name.endswith("bias")]
    for options, more in (
        ({}, []),
        ({"bias": "lora_only"}, ["blocks.0.q_proj.bias", "blocks.1.q_proj.bias"]),
        ({"bias": "all"}, biases),
        ({"train": ["head"]}, ["head.weight", "head.bias"]),
        ({"train": ["*.0.norm", "embed.weight"]}, ["blocks.0.norm.weight", "blocks.0.norm.bias", "embed.weight"]),
    ):
        freeze(model, **options)
        assert set(trainable(model)) == {*factors, *more}
    with pytest.raises(MatchError, match="classifier"):
        freeze(model, train=["classifier"])
    with pytest.raises(OptionError, match="bias"):
        freeze(model, bias="some")


def test_lora_state_dict() -> None:
    torch.manual_seed(0)
    model = Model()
    inject(model, "q_proj", rank=1, alpha=1, dora=True)
    own = [f"blocks.{block}.q_proj.{leaf}" for block in (0, 1) for leaf in ("lora_A", "lora_B", "magnitude")]
    biases = {name for name in model.state_dict() if name.endswith("bias")}
    assert set(lora_state_dict(model)) == set(own)
    assert set(lora_state_dict(model, "lora_only")) == {*own, "blocks.0.q_proj.bias", "blocks.1.q_proj.bias"}
    assert set(lora_state_dict(model, "all")) == {*own, *biases}
    other = Model()
    inject(other, "q_proj", rank=1, alpha=1, dora=True)
    missing, unexpected = other.load_state_dict(lora_state_dict(model), strict=False)
    assert not unexpected and not set(missing) & set(own)
    assert raw(other.blocks[0].q_proj.lora_A) == raw(model.blocks[0].q_proj.lora_A)


def test_the_base_checkpoint_still_loads() -> None:
    torch.manual_seed(0)
    trained, model = Model(), Model()
    inject(model, ["q_proj", "embed", "conv"], rank=2, alpha=2)
    missing, unexpected = model.load_state_dict(trained.state_dict(), strict=False)
    assert not unexpected and all(".lora_" in f".{name}" for name in missing)
    indices = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(model(indices), trained(indices))  # float32 rounding


@pytest.mark.parametrize("dora", [False, True])
def test_in_transformers(dora: bool) -> None:
    """The outputs of real architectures are unchanged before training and change after; Conv1D is told by itself."""
    torch.manual_seed(0)
    ids = torch.tensor([[1, 2, 3, 4]])
    sizes = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 11}
    bert = BertModel(BertConfig(**sizes)).eval()
    gpt2 = GPT2Model(GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=11)).eval()
    cases = ((bert, ["query", "value", "word_embeddings"], LoRAEmbedding), (gpt2, ["c_attn", "wte", "mlp.c_fc"], LoRALinear))
    for model, targets, kind in cases:
        before = model(ids).last_hidden_state
        inject(model, targets, rank=2, alpha=4, dora=dora)
        assert any(isinstance(module, kind) for module in model.modules())
        torch.testing.assert_close(model(ids).last_hidden_state, before, rtol=1e-5, atol=1e-5)  # float32 through two layers
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, LoRALayer):
                    module.lora_A.normal_()
                    module.lora_B.normal_()
        assert not torch.allclose(model(ids).last_hidden_state, before, atol=1e-2)
