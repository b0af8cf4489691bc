"""What loratools writes as peft and as loralib, loaded by them strictly: every key theirs, none missing, and the same W′."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import loralib
import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.utils.save_and_load import load_peft_weights, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loratools.adapter import Adapter
from loratools.errors import LoratoolsError
from loratools.formats import encode
from loratools.formats.writing import write_container
from loratools.refs import Spec
from loratools.tensors import read_tensor, to_ref
from tests.formats.cells import cell
from tests.formats.matrix import IN, KINDS, LAYERS, MANY, OUT, ROWS, Draw, low
from tests.formats.places import options_of, row_of
from tests.formats.test_matrix import WRITTEN
from tests.strategies import randn

ROOT = "blocks.0."
# float64 from the file's numbers on, and sums of at most 40 products in orders of their own
EXACT = {"rtol": 1e-12, "atol": 1e-12}
# peft 0.21.2 computes OFT's and BOFT's rotations in float32, whatever the model is in
ROTATED = {"rtol": 2e-6, "atol": 2e-6}
MAKE = {
    "linear": lambda: nn.Linear(IN, OUT, bias=False), "bias": lambda: nn.Linear(IN, OUT), "convolution 1×1": lambda: nn.Conv2d(IN, OUT, 1),
    "convolution 3×3": lambda: nn.Conv2d(IN, OUT, 3), "embedding": lambda: nn.Embedding(MANY, IN),
    "Conv1D, stored (in, out)": lambda: Conv1D(OUT, IN), "norm": lambda: nn.RMSNorm(OUT),
}  # fmt: skip


class Model(nn.Module):
    """One layer under the name that the base has for it, in float64 with random weights."""

    def __init__(self, layer: str, made: nn.Module | None = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Module()])
        self.blocks[0].add_module(LAYERS[layer][0], made or MAKE[layer]())
        self.double()
        with torch.no_grad():
            for seed, parameter in enumerate(self.parameters()):
                parameter.copy_(randn(*parameter.shape, seed=90 + seed))


def name_of(layer: str) -> str:
    module, leaf, _, _ = LAYERS[layer]
    return f"{ROOT}{module}.{leaf}"


def from_format(kind: str, layer: str, source: str) -> Adapter:
    """One change of one layer as a format's file gives it, under the base's names. Raises what the format cannot say."""
    name, draw = name_of(layer), Draw()
    deltas = {name: KINDS[kind][0](draw, layer)}
    base = {name: Spec("F64", LAYERS[layer][2])}
    if layer == "bias":
        deltas[f"{ROOT}q_proj.weight"] = low(draw, "linear", alpha=2.0)  # a bias's difference stands beside a LoRA of its scaling
        base[f"{ROOT}q_proj.weight"] = Spec("F64", LAYERS["linear"][2])
    return row_of(source).decode(encode(Adapter(deltas), source), options_of(source)).resolve(base)


def changed(adapter: Adapter, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """W′ of each tensor that the adapter changes, by loratools in float64."""
    state = model.state_dict()
    for name, delta in adapter.items():
        W = state[name].double()
        spec = to_ref(W).spec
        rows, columns = delta.matrix(spec)
        part, flat = slice(0, rows), W.reshape(rows, columns)
        yield name, delta.bind(spec, lambda step, part=part, flat=flat: iter([(part, flat.clone())]))(part, flat.clone()).reshape(W.shape)


@pytest.mark.filterwarnings("error:.*(missing|unexpected|Found missing).*")
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning")
@pytest.mark.parametrize("source", WRITTEN)
@pytest.mark.parametrize(("kind", "layer"), [(kind, layer) for kind, layer in ROWS if layer in MAKE])
def test_peft_loads_it_whole(tmp_path: Path, kind: str, layer: str, source: str) -> None:
    try:
        adapter = from_format(kind, layer, source)
        written = encode(adapter, "peft")
    except LoratoolsError:
        assert source != "loratools" or cell(kind, layer, "peft") != "yes"  # its own format says everything
        return
    write_container(written, tmp_path / "adapter")
    expected = dict(changed(adapter, Model(layer)))
    model = PeftModel.from_pretrained(Model(layer), tmp_path / "adapter")
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    result = set_peft_model_state_dict(model, load_peft_weights(str(tmp_path / "adapter"), device="cpu"))
    own = {key for key in model.state_dict() if ".default" in key}
    assert own and not result.unexpected_keys and not own & set(result.missing_keys)
    held = get_peft_model_state_dict(model, save_embedding_layers=False)
    assert set(held) == set(stored)
    assert all(torch.equal(held[key].double(), stored[key].double()) for key in stored)
    found = model.merge_and_unload().state_dict()
    for name, W in expected.items():
        assert not torch.equal(W, Model(layer).state_dict()[name])
        torch.testing.assert_close(found[name], W, **ROTATED if "turned" in kind else EXACT)


@pytest.mark.parametrize("source", WRITTEN)
@pytest.mark.parametrize("layer", ["linear", "embedding"])
def test_loralib_loads_it_whole(layer: str, source: str) -> None:
    """All keys but the base's own, none more; merged on `eval` as loralib does it."""
    try:
        adapter = from_format("LoRA", layer, source)
        written = encode(adapter, "loralib")
    except LoratoolsError:
        assert source not in ("loratools", "loralib")
        return
    delta = adapter[name_of(layer)]
    settings = {"r": delta.facts()["rank"], "lora_alpha": delta.facts()["alpha"]}
    made = {
        "linear": lambda: loralib.Linear(IN, OUT, bias=False, **settings), "embedding": lambda: loralib.Embedding(MANY, IN, **settings),
    }[layer]()  # fmt: skip
    model = Model(layer, made).train()
    tensors = {key: read_tensor(ref) for key, ref in written.tensors.items()}
    expected = dict(changed(adapter, model))
    result = model.load_state_dict(tensors, strict=False)
    assert not result.unexpected_keys and all("lora_" not in key for key in result.missing_keys)
    assert {key for key in model.state_dict() if "lora_" in key} == set(tensors)
    model.eval()
    torch.testing.assert_close(model.state_dict()[name_of(layer)], expected[name_of(layer)], **EXACT)
