"""Layers that train, and that check a merge: torch modules whose forward is the papers' own, never the merged weight."""

from loratools.layers._conv import LoRAConv1d, LoRAConv2d, LoRAConv3d
from loratools.layers._dora import DoRAConv2d, DoRAEmbedding, DoRALinear
from loratools.layers._embedding import LoRAEmbedding
from loratools.layers._linear import LoRALinear
from loratools.layers._merged import LoRAMergedLinear
from loratools.layers.base import LoRALayer, Settings
from loratools.layers.bridge import adapter_from, attach, layer_of, plain_layer, wear
from loratools.layers.inject import freeze, inject, layer_for, lora_state_dict, trainable

__all__ = [
    "DoRAConv2d", "DoRAEmbedding", "DoRALinear", "LoRAConv1d", "LoRAConv2d", "LoRAConv3d", "LoRAEmbedding", "LoRALayer",
    "LoRALinear", "LoRAMergedLinear", "Settings", "adapter_from", "attach", "freeze", "inject", "layer_for", "layer_of",
    "lora_state_dict", "plain_layer", "trainable", "wear",
]  # fmt: skip
