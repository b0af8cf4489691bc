"""Where a tensor stands: its layer by the first number in its name, its module by what follows."""

from __future__ import annotations

import pytest

from loratools.ops._layers import Place, place_of


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.12.mlp.experts.3.w1.weight", Place("model.layers", 12, "mlp.experts.3.w1")),
        ("down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q.weight",
         Place("down_blocks", 0, "attentions.1.transformer_blocks.0.attn1.to_q")),
        ("h.0.up.bias", Place("h", 0, "up.bias")),
        ("lm_head.weight", Place("", None, "lm_head")),
        ("model.embed_tokens.weight", Place("", None, "model.embed_tokens")),
        ("seq.0.weight", Place("", None, "seq.0")),  # a number that nothing follows is a module, not a layer
        ("0.q.weight", Place("", None, "0.q")),
        ("lora_te_text_model_encoder_layers_3_mlp_fc1", Place("lora_te_text_model_encoder_layers", 3, "mlp_fc1")),
        ("conv_1", Place("", None, "conv_1")),
    ],
)  # fmt: skip
def test_places(name: str, place: Place) -> None:
    assert place_of(name) == place
    assert place.layer == (None if place.number is None else f"{place.stack}.{place.number}")
