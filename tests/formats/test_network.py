"""What kohya's metadata says of the network: true of the tensors beside it, and as it was where it was true."""

from __future__ import annotations

import json
from typing import Any

import pytest

from loratools.formats._network import network
from loratools.formats._scalar import number
from loratools.refs import InMemory, Ref, Spec


def low(name: str, rank: int, alpha: float, *kernel: int) -> dict[str, Ref]:
    zeros = InMemory(Spec("F32", (rank, 4, *kernel)), b"")
    return {f"{name}.lora_down.weight": zeros, f"{name}.lora_up.weight": zeros, f"{name}.alpha": number(alpha)}


def args(**told: str) -> dict[str, str]:
    return {"ss_network_args": json.dumps(told)}


ONE, WIDE = low("lora_unet_x", 8, 4.0), low("lora_unet_y", 2, 1.0, 3, 3)
LORA = {"ss_network_module": "networks.lora", "ss_network_dim": "8", "ss_network_alpha": "4"}
LYCORIS = {"ss_network_module": "lycoris.kohya"}
LOHA: dict[str, Ref] = {f"lora_unet_x.{slot}": InMemory(Spec("F32", (5, 5)), b"") for slot in ("hada_w1_a", "hada_w1_b")}
IA3: dict[str, Ref] = {"lora_unet_x.weight": InMemory(Spec("F32", (5,)), b""), "lora_unet_x.on_input": number(1.0)}
OFT: dict[str, Ref] = {"lora_unet_x.oft_blocks": InMemory(Spec("F32", (3, 2, 2)), b""), "lora_unet_x.alpha": number(0.5)}
OWN = {key.replace("lora_unet", "oft_unet"): ref for key, ref in OFT.items()}
CASES: dict[str, tuple[dict[str, Any], dict[str, str], dict[str, str]]] = {
    "nothing said": (ONE, {}, LORA),
    "true, in other words": (ONE, LORA | {"ss_network_alpha": "4.0", "ss_x": "y"}, LORA | {"ss_network_alpha": "4.0", "ss_x": "y"}),
    "stale": (ONE, {"ss_network_dim": "64", "ss_network_alpha": "Dynamic", "modelspec.title": "t"}, LORA | {"modelspec.title": "t"}),
    "mixed ranks": (ONE | low("lora_te_x", 4, 4.0), LORA, LORA | {"ss_network_dim": "Dynamic"}),
    "mixed alphas": (ONE | low("lora_te_x", 8, 2.5), LORA, LORA | {"ss_network_alpha": "Dynamic"}),
    "kernels apart": (ONE | WIDE, args(conv_dim="2", conv_alpha="1.0"), LORA | args(conv_dim="2", conv_alpha="1.0")),
    "kernels said wrong": (ONE | WIDE, args(conv_dim="9", x="1"), LORA | args(x="1", conv_dim="2", conv_alpha="1")),
    "kernels no more": (ONE, args(conv_dim="9"), LORA),
    "kernels alone": (WIDE, {}, LORA | {"ss_network_dim": "2", "ss_network_alpha": "1"}),
    "another network of LoRA": (ONE, {"ss_network_module": "networks.lora_flux"}, LORA | {"ss_network_module": "networks.lora_flux"}),
    "arguments of another form": (ONE, {"ss_network_args": "[1]"}, LORA | {"ss_network_args": "[1]"}),
    "arguments that are no JSON": (ONE, {"ss_network_args": "x=1"}, LORA | {"ss_network_args": "x=1"}),
    "LyCORIS' LoRA": (ONE, LYCORIS | args(algo="locon"), LORA | LYCORIS | args(algo="locon")),
    "another algorithm": (LOHA, LORA | args(algo="locon"), LYCORIS | {"ss_network_dim": "5"} | args(algo="loha")),
    "several algorithms": (
        LOHA | low("lora_unet_y", 5, 1.0), args(algo="loha"), LYCORIS | {"ss_network_dim": "5", "ss_network_alpha": "1"},
    ),
    "no ranks": (IA3, LORA, LYCORIS | args(algo="ia3")),
    "rotations": (OFT, LORA, LYCORIS | args(algo="diag-oft")),
    "sd-scripts' rotations": (OWN, {}, {"ss_network_module": "networks.oft", "ss_network_dim": "3", "ss_network_alpha": "0.5"}),
    "sd-scripts' rotations for Flux": (
        OWN, {"ss_network_module": "networks.oft_flux"},
        {"ss_network_module": "networks.oft_flux", "ss_network_dim": "3", "ss_network_alpha": "0.5"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_is_said_is_true(name: str) -> None:
    tensors, stated, expected = CASES[name]
    assert network(tensors, stated) == expected
