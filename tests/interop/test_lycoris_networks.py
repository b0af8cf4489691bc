"""lycoris-lora's own networks over whole diffusion models, live: what they save is merged, written again and loaded by them.

Outputs of the model under LyCORIS' forward are the oracle. `tests/interop/test_lycoris.py` does the same for single layers of each shape.
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from loratools import convert, merge
from loratools.errors import UnsupportedError
from loratools.formats import load
from tests.files import write_pipeline
from tests.interop.test_diffusion_models import close, flux, outputs, sd3

diffusers = pytest.importorskip("diffusers")
lycoris = pytest.importorskip("lycoris.wrapper")


def unet() -> nn.Module:
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=8, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()  # fmt: skip


BLOCKS = [
    "FluxTransformerBlock", "FluxSingleTransformerBlock", "JointTransformerBlock", "Transformer2DModel", "ResnetBlock2D", "Downsample2D",
    "Upsample2D",
]  # fmt: skip
SMALL = {"lora_dim": 1, "alpha": 2}  # of these sizes a LoKr of a higher rank has whole factors
CASES: dict[str, dict[str, Any]] = {
    "lora": {}, "locon, tucker": {"network_module": "locon", "use_tucker": True}, "lora, scalar": {"use_scalar": True},
    "lora, rs": {"rs_lora": True}, "lora, bypass": {"bypass_mode": True}, "lora, dropouts": {"rank_dropout": 0.5, "dropout": 0.5},
    "dora": {"weight_decompose": True, "wd_on_out": True}, "dora, inputs": {"weight_decompose": True, "wd_on_out": False},
    "dora, tucker, scalar": {"weight_decompose": True, "use_tucker": True, "use_scalar": True}, "lora, norms": {"train_norm": True},
    "loha": {"network_module": "loha"}, "loha, tucker": {"network_module": "loha", "use_tucker": True},
    "loha, scalar, rs": {"network_module": "loha", "use_scalar": True, "rs_lora": True},
    "loha, dora": {"network_module": "loha", "weight_decompose": True},
    "loha, dora, inputs, tucker": {"network_module": "loha", "weight_decompose": True, "wd_on_out": False, "use_tucker": True},
    "lokr": {"network_module": "lokr", **SMALL}, "lokr, whole": {"network_module": "lokr", "full_matrix": True},
    "lokr, both": {"network_module": "lokr", "decompose_both": True, **SMALL},
    "lokr, tucker": {"network_module": "lokr", "use_tucker": True, **SMALL},
    "lokr, unbalanced": {"network_module": "lokr", "unbalanced_factorization": True, **SMALL},
    "lokr, factor": {"network_module": "lokr", "factor": 4, **SMALL},
    "lokr, scalar, rs": {"network_module": "lokr", "use_scalar": True, "rs_lora": True, **SMALL},
    "lokr, dora": {"network_module": "lokr", "weight_decompose": True, **SMALL},
    "lokr, dora, inputs, both": {"network_module": "lokr", "weight_decompose": True, "wd_on_out": False, "decompose_both": True, **SMALL},
    "full": {"network_module": "full"}, "full, norms": {"network_module": "full", "train_norm": True},
    "ia3": {"network_module": "ia3"}, "ia3, inputs": {"network_module": "ia3", "train_on_input": True},
    "glora": {"network_module": "glora"}, "glora, scalar": {"network_module": "glora", "use_scalar": True},
    "oft": {"network_module": "diag-oft"}, "oft, bounded, scaled": {"network_module": "diag-oft", "constraint": 0.01, "rescaled": True},
    "boft": {"network_module": "boft"}, "boft, bounded, scaled": {"network_module": "boft", "constraint": 0.02, "rescaled": True},
    "dylora": {"network_module": "dylora", "block_size": 1},
}  # fmt: skip
FEW = ("dora, inputs", "loha", "lokr, both", "ia3, inputs", "glora", "oft", "boft")
# what LyCORIS 4.1.3's loader does not make again: it takes magnitudes for those of outputs, guesses how a weight was cut into factors,
# hands (IA)³ a tensor too many, and of a LoKr with a core it looks for a factor that there is not
NOT_LOADED = ("inputs", "unbalanced", "factor", "ia3", "lokr, tucker")
WIDE = {"boft": ["norm1", "norm1_context", "norm"]}  # modulations of 6 times the width, which BOFT cannot cut


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def network(model: nn.Module, case: str) -> nn.Module:
    """The network over the model's blocks, with random values in it."""
    exclude = [rf".*\.{name}(\..*)?$" for name in WIDE.get(CASES[case].get("network_module", "").partition(",")[0], ())]
    lycoris.LycorisNetwork.apply_preset({"target_module": BLOCKS, "target_name": ["conv_in"], "exclude_name": exclude})
    settings = {"lora_dim": 4, "conv_lora_dim": 4, "alpha": 3, "conv_alpha": 3, **CASES[case]}
    settings |= {"conv_lora_dim": settings["lora_dim"], "conv_alpha": settings["alpha"]}
    made = lycoris.LycorisNetwork(model, multiplier=1.0, warn_on_unmatched=False, **settings)
    made.apply_to()
    torch.manual_seed(1)
    with torch.no_grad():
        for key, parameter in made.named_parameters():
            if key.endswith(("dora_scale", "rescale")):
                parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.05 if key.endswith("oft_blocks") else 0.1)
    return made.eval()


PAIRS = [(unet, case) for case in CASES] + [(make, case) for make in (sd3, flux) for case in FEW]


@pytest.mark.parametrize(("make", "case"), PAIRS, ids=[f"{make.__name__}, {case}" for make, case in PAIRS])
def test_saved_merged_and_loaded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Any, case: str) -> None:
    monkeypatch.setattr(random, "randint", lambda low, high: high)  # DyLoRA's forward: of all its rank
    model, plain, part = make(), make(), "unet" if make is unet else "transformer"
    base = write_pipeline(tmp_path / "base", {part: (plain.state_dict(), {"_class_name": type(plain).__name__})})
    made = network(model, case)
    assert len(made.loras) > 12
    expected, before = outputs(model), outputs(plain)
    made.save_weights(str(tmp_path / "a.safetensors"), None, {})
    receipt = merge(base, tmp_path / "a.safetensors", tmp_path / "out")
    assert receipt["applied"] == receipt["expected"]
    merged = make()
    merged.load_state_dict(load_file(next((tmp_path / "out" / part).glob("*.safetensors"))))
    close(outputs(merged), expected, before)
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", format="kohya")
    if not any(word in case for word in NOT_LOADED):
        close(loaded(make(), tmp_path / "b.safetensors"), expected, before)


def test_glora_under_rslora_is_read_as_lycoris_loads_it(tmp_path: Path) -> None:
    """Its forward in training has alpha/√r, which the file does not hold; LyCORIS' loader has alpha/r."""
    CASES["glora, rs"] = {"network_module": "glora", "rs_lora": True}
    try:
        made = network(unet(), "glora, rs")
    finally:
        del CASES["glora, rs"]
    made.save_weights(str(tmp_path / "a.safetensors"), None, {"ss_network_args": json.dumps({"algo": "glora", "rs_lora": "True"})})
    plain = unet()
    base = write_pipeline(tmp_path / "base", {"unet": (plain.state_dict(), {"_class_name": "UNet2DConditionModel"})})
    receipt = merge(base, tmp_path / "a.safetensors", tmp_path / "out")
    assert any(note.startswith("GLoRA trained with rs_lora: read under alpha / r") for note in receipt["notes"])
    merged = unet()
    merged.load_state_dict(load_file(next((tmp_path / "out" / "unet").glob("*.safetensors"))))
    close(outputs(merged), loaded(unet(), tmp_path / "a.safetensors"), outputs(plain))


@pytest.mark.parametrize("algo", ["lora", "loha", "lokr", "diag-oft"])
def test_sdxl_with_two_text_encoders_by_the_network_for_kohya(tmp_path: Path, algo: str) -> None:
    """Its prefixes are lora_unet, lora_te1 and lora_te2; text encoders have their names of transformers 5 in memory."""
    kohya = pytest.importorskip("lycoris.kohya")
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPTextConfig(
        vocab_size=10, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=6,
        projection_dim=16, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip

    def parts() -> dict[str, nn.Module]:
        torch.manual_seed(0)
        return {
            "unet": unet(), "text_encoder": transformers.CLIPTextModel(config).eval(),
            "text_encoder_2": transformers.CLIPTextModelWithProjection(config).eval(),
        }  # fmt: skip

    def said(found: dict[str, nn.Module]) -> list[Tensor]:
        words = torch.tensor([[0, 3, 5, 1]])
        with torch.no_grad():
            return [outputs(found["unet"]), *(found[part](words).last_hidden_state for part in ("text_encoder", "text_encoder_2"))]

    models, plain = parts(), parts()
    folders = {part: (model.state_dict(), {"_class_name": type(model).__name__}) for part, model in plain.items()}
    base = write_pipeline(tmp_path / "base", folders)
    both = [models["text_encoder"], models["text_encoder_2"]]
    made = kohya.create_network(1.0, 4, 3, None, both, models["unet"], algo=algo, factor=2, preset="attn-mlp")
    made.apply_to(both, models["unet"], True, True)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05 if algo == "diag-oft" else 0.1)
    made.eval().save_weights(str(tmp_path / "a.safetensors"), None, {})
    prefixes = {key.partition("_text_model" if "text_model" in key else "_encoder")[0] for key in load_file(tmp_path / "a.safetensors")}
    assert {"lora_te1", "lora_te2"} <= prefixes
    expected, before = said(models), said(plain)
    receipt = merge(base, tmp_path / "a.safetensors", tmp_path / "out")
    assert receipt["applied"] == receipt["expected"] > 24
    merged = parts()
    for part, model in merged.items():
        model.load_state_dict(load_file(next((tmp_path / "out" / part).glob("*.safetensors"))))
    for one, other, without in zip(said(merged), expected, before, strict=True):
        close(one, other, without)


def loaded(model: nn.Module, file: Path) -> Tensor:
    """The outputs of a model under LyCORIS' network of a file."""
    made, _ = lycoris.create_lycoris_from_weights(1.0, str(file), model)
    made.apply_to()
    return outputs(model)


def test_a_network_that_depends_on_the_timestep_is_refused(tmp_path: Path) -> None:
    module = lycoris.TLoraModule("lora_unet_conv_in", nn.Linear(12, 16), 1.0, lora_dim=2, alpha=1)
    saved = {f"lora_unet_conv_in.{key}": value.detach().clone() for key, value in module.custom_state_dict().items()}
    save_file(saved, tmp_path / "a.safetensors")
    with pytest.raises(UnsupportedError, match=r"conv_in\.lambda_layer: T-LoRA, whose rank depends on the timestep: no one change"):
        load(tmp_path / "a.safetensors")
