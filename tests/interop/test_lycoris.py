"""lycoris-lora, live: a module's own forward, and the state dict it saves in kohya's spelling merged into the layer it stands on.

Its forward is the oracle: `get_diff_weight` and `merge_to` of LoHa and LoKr multiply by alpha/rank twice (spec/formats/kohya.md).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lycoris.modules import get_module, make_module
from lycoris.modules.boft import ButterflyOFTModule
from lycoris.modules.diag_oft import DiagOFTModule
from lycoris.modules.full import FullModule
from lycoris.modules.glora import GLoRAModule
from lycoris.modules.ia3 import IA3Module
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from loratools import convert, merge
from loratools.adapter import Adapter
from loratools.deltas.butterfly import Butterfly
from loratools.formats import encode, load
from loratools.formats.base import Container
from loratools.formats.kohya import decode
from loratools.tensors import read_tensor, to_ref
from tests.files import read_checkpoint, write_checkpoint
from tests.formats.matrix import IN, KINDS, OUT, Draw
from tests.formats.places import adapter_of

# float32: sums of at most 100 products in orders of their own
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
LAYERS = {
    "linear": (lambda: nn.Linear(12, 16), (3, 12)),
    "conv": (lambda: nn.Conv2d(12, 16, (3, 2), stride=(1, 2), padding=1), (2, 12, 5, 6)),
    "point": (lambda: nn.Conv2d(12, 16, 1), (2, 12, 5, 6)),
    "square": (lambda: nn.Linear(16, 16), (3, 16)),
}
SMALL = {"lora_dim": 2, "alpha": 3}
UNBALANCED = {"lora_dim": 3, "factor": 8, "decompose_both": True, "unbalanced_factorization": True}
CASES: dict[str, tuple[type[nn.Module], dict[str, Any], str, set[str]]] = {
    "locon": (LoConModule, SMALL, "lora", {"lora_up.weight", "lora_down.weight", "alpha"}),
    "locon, rs": (LoConModule, SMALL | {"rs_lora": True}, "lora", {"alpha"}),
    "locon tucker": (LoConModule, SMALL | {"use_tucker": True}, "tucker", {"lora_mid.weight"}),
    "loha": (LohaModule, SMALL, "loha", {"hada_w1_a"}),
    "loha tucker": (LohaModule, SMALL | {"use_tucker": True}, "loha", {"hada_t1", "hada_t2"}),
    "lokr": (LokrModule, SMALL | {"lora_dim": 1}, "lokr", {"lokr_w1", "lokr_w2_a", "lokr_w2_b"}),
    "lokr whole": (LokrModule, SMALL | {"full_matrix": True}, "lokr", {"lokr_w1", "lokr_w2", "alpha"}),
    "lokr both": (LokrModule, SMALL | {"lora_dim": 1, "factor": 4, "decompose_both": True}, "lokr", {"lokr_w1_a", "lokr_w1_b"}),
    "lokr, one factor": (LokrModule, SMALL | UNBALANCED, "lokr", {"lokr_w1_a", "lokr_w2"}),
    "glora": (GLoRAModule, SMALL, "glora", {"a1.weight", "a2.weight", "b1.weight", "b2.weight", "alpha"}),
    "lokr tucker": (LokrModule, SMALL | {"lora_dim": 1, "use_tucker": True}, "lokr", {"lokr_t2"}),
    "full": (FullModule, {}, "full", {"diff", "diff_b"}),
    "ia3": (IA3Module, {}, "ia3", {"weight", "on_input"}),
    "ia3, inputs": (IA3Module, {"train_on_input": True}, "ia3", {"weight", "on_input"}),
    "oft": (DiagOFTModule, {"lora_dim": 4}, "oft", {"oft_blocks"}),
    "oft, bounded": (DiagOFTModule, {"lora_dim": 4, "constraint": 0.01, "rescaled": True}, "oft", {"alpha", "rescale"}),
    "boft": (ButterflyOFTModule, {"lora_dim": 4}, "boft", {"oft_blocks"}),
    "boft, bounded": (ButterflyOFTModule, {"lora_dim": 4, "constraint": 0.02, "rescaled": True}, "boft", {"rescale"}),
    "dora, outputs": (LoConModule, SMALL | {"weight_decompose": True, "wd_on_out": True}, "dora", {"dora_scale"}),
    "dora, inputs": (LoConModule, SMALL | {"weight_decompose": True, "wd_on_out": False}, "dora", {"dora_scale"}),
    "doha": (LohaModule, SMALL | {"weight_decompose": True, "wd_on_out": False}, "dora", {"dora_scale", "hada_w1_a"}),
    "dokr": (LokrModule, SMALL | {"weight_decompose": True, "wd_on_out": True}, "dora", {"dora_scale", "lokr_w1"}),
}
CORED = ("locon tucker", "loha tucker", "lokr tucker")  # a core stands for a kernel larger than 1


def trained(name: str, layer: nn.Module, x: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """What the module saves with random values in it, and its own outputs."""
    made, settings, _, _ = CASES[name]
    module = made("layer", layer, 1.0, **settings)
    module.apply_to()
    with torch.no_grad():
        for key, parameter in module.named_parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1 if "blocks" in key or made is FullModule else 0.3)
        saved = module.custom_state_dict() or module.state_dict()
        return {key: tensor.detach().clone().contiguous() for key, tensor in saved.items()}, layer(x)


LAID = dict.fromkeys(CORED, ("conv",)) | {"lokr, one factor": ("linear", "conv")}  # of 16 by 16 neither would be whole
PAIRS = [(name, layer) for name in CASES for layer in LAID.get(name, LAYERS)]


@pytest.mark.parametrize(("name", "kind"), PAIRS, ids=[f"{name} {kind}" for name, kind in PAIRS])
def test_merged_is_its_forward(tmp_path: Path, name: str, kind: str) -> None:
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    layer, x = make(), torch.randn(shape)
    before = {f"layer.{key}": tensor.clone() for key, tensor in layer.state_dict().items()}
    base = write_checkpoint(tmp_path / "base", before)
    saved, expected = trained(name, layer, x)
    _, _, delta, keys = CASES[name]
    assert keys <= set(saved)
    save_file({f"lora_unet_layer.{key}": tensor for key, tensor in saved.items()}, tmp_path / "a.safetensors")
    assert load(tmp_path / "a.safetensors")["lora_unet_layer.weight"].kind == delta
    receipt = merge(base, tmp_path / "a.safetensors", tmp_path / "out")
    assert receipt["applied"] == receipt["expected"]
    fresh = make()
    plain = fresh(x)
    fresh.load_state_dict({key.removeprefix("layer."): tensor for key, tensor in read_checkpoint(tmp_path / "out").items()})
    torch.testing.assert_close(fresh(x), expected, **TOLERANCE)
    assert not torch.allclose(plain, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", ["loha", "lokr"])
def test_its_own_difference_is_scaled_twice(name: str) -> None:
    torch.manual_seed(0)
    made, settings, _, _ = CASES[name]
    module = made("layer", nn.Linear(12, 16), 1.0, **settings)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
        once = module.get_weight(None)
        torch.testing.assert_close(module.get_diff_weight()[0], module.scale * once, **TOLERANCE)
        x = torch.randn(3, 12)
        torch.testing.assert_close(module(x) - module.org_forward(x), x @ once.T, rtol=1e-4, atol=1e-4)
    assert module.scale != 1


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("name", CASES)
def test_written_again_it_is_what_lycoris_saved(tmp_path: Path, name: str, kind: str) -> None:
    """The same keys, shapes and numbers, so that LyCORIS makes the same modules of them; an alpha's dtype may be wider."""
    if kind not in LAID.get(name, LAYERS):
        return
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    saved, _ = trained(name, make(), torch.randn(shape))
    save_file({f"lora_unet_layer.{key}": tensor for key, tensor in saved.items()}, tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", format="kohya")
    found = {key.removeprefix("lora_unet_layer."): tensor for key, tensor in load_file(tmp_path / "b.safetensors").items()}
    assert set(found) == set(saved)
    for key, tensor in saved.items():
        assert found[key].shape == tensor.shape and torch.equal(found[key].double(), tensor.double()), key


# -- files that loratools wrote of its own, loaded by LyCORIS

OURS = {
    "linear": (lambda: nn.Linear(IN, OUT), (3, IN)), "convolution 1×1": (lambda: nn.Conv2d(IN, OUT, 1), (2, IN, 4, 5)),
    "convolution 3×3": (lambda: nn.Conv2d(IN, OUT, 3), (2, IN, 4, 5)), "norm": (lambda: nn.LayerNorm(OUT), (3, OUT)),
}  # fmt: skip
LIVE = (
    "LoRA", "DoRA, a magnitude for each output", "LoHa", "LoKr", "LoKr of whole factors", "Tucker", "GLoRA of LyCORIS",
    "outputs turned (LyCORIS' OFT)", "outputs turned, bounded and scaled",
    "(IA)³ of inputs", "(IA)³ told from 1", "difference",
)  # fmt: skip


def made_of(tensors: dict[str, Tensor], layer: nn.Module) -> nn.Module:
    """LyCORIS' module of a file's tensors, by its own loader, and then strictly once more."""
    word = next(iter(tensors)).partition(".")[0]
    kind, found = get_module(tensors, word)
    slots = {key.removeprefix(f"{word}."): tensor for key, tensor in tensors.items()}
    if kind is IA3Module:  # whose loader leaves `on_input` aside, 4.1.3
        return loaded(kind(word, layer, 1.0, train_on_input=bool(slots["on_input"])), slots)
    module = make_module(kind, found, word, layer)
    return module if kind is FullModule else loaded(module, slots)  # it adds the weight to `diff` when it is put on the layer


def loaded(module: nn.Module, slots: dict[str, Tensor]) -> nn.Module:
    """A module with a file's tensors: none it does not know, none it lacks but those that a file may leave out."""
    result = module.load_state_dict(slots, strict=False)
    assert not result.unexpected_keys and set(result.missing_keys) <= {"scalar", "b_norm"}, result
    return module


@pytest.mark.parametrize(("kind", "layer"), [(kind, layer) for kind in LIVE for layer in KINDS[kind][1] if layer in OURS])
def test_lycoris_loads_what_is_written(kind: str, layer: str) -> None:
    torch.manual_seed(0)
    written = encode(adapter_of(kind, layer, "kohya"), "kohya")
    make, shape = OURS[layer]
    check_live(written, make, shape)


@pytest.mark.parametrize("kind", ["linear", "conv", "point"])
def test_lycoris_loads_a_butterfly_that_is_written(kind: str) -> None:
    """Of 16 outputs, for LyCORIS' BOFT has a power of two of blocks: eight of 2, four factors of them."""
    torch.manual_seed(0)
    delta = Butterfly(numbers=Draw()(4, 8, 2, 2, scale=0.3), side="out", halves=False, together=True, floor=1e-8)
    make, shape = LAYERS[kind]
    check_live(encode(Adapter({"lora_unet_mid_block_0_x.weight": delta}, flat=True), "kohya"), make, shape)


def check_live(written: Container, make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    """A layer under LyCORIS' module of a file computes what it does with the weight that loratools makes of the file."""
    plain, x = make(), torch.randn(shape)
    W = plain.weight.detach().double()
    (delta,) = decode(written).values()
    spec = to_ref(W).spec
    rows, columns = delta.matrix(spec)
    bound = delta.bind(spec, lambda step: iter([(slice(0, rows), W.reshape(rows, columns).clone())]))
    changed = make()
    changed.load_state_dict(plain.state_dict())
    with torch.no_grad():
        changed.weight.copy_(bound(slice(0, rows), W.reshape(rows, columns).clone()).reshape(W.shape))
        before = plain(x)
        module = made_of({key: read_tensor(ref) for key, ref in written.tensors.items()}, plain)
        module.apply_to()
        torch.testing.assert_close(plain(x), changed(x), **TOLERANCE)
        assert not torch.allclose(before, changed(x), rtol=1e-2, atol=1e-2)
