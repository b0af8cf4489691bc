"""Megatron-Bridge: its LoRA, canonical LoRA and DoRA around Megatron's own linear layers, which take the place of a transformers model's.

Megatron's network needs a GPU; its layers do not, nor do the adapters. Rows of the fused weights lie as Megatron-Bridge's own functions
put them, and its modules name the tensors. Transformer Engine, which it imports, is nowhere used and stands as an empty name.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import megatron.core
import torch
import transformers as t
import yaml
from megatron.core import ModelParallelConfig, parallel_state
from megatron.core.tensor_parallel import ColumnParallelLinear
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

for name in ("transformer_engine", "transformer_engine.pytorch", "transformer_engine.pytorch.module"):
    sys.modules.setdefault(name, MagicMock(__spec__=None))
for name in ("bridge", "bridge.models", "bridge.models.conversion", "bridge.peft"):  # whose __init__ imports every model there is
    sys.modules.setdefault(f"megatron.{name}", ModuleType(name)).__path__ = [
        str(Path(megatron.core.__file__).parent.parent.joinpath(*name.split(".")))
    ]

from megatron.bridge.models.conversion.param_mapping import merge_qkv_weights, split_qkv_biases  # noqa: E402
from megatron.bridge.peft.canonical_lora import CanonicalLoRA, LoRALinearSplitFC1UpGate, LoRALinearSplitQKV, ModuleDict  # noqa: E402
from megatron.bridge.peft.dora import DoRA  # noqa: E402
from megatron.bridge.peft.dora_layers import DoRALinear, ParallelLinearDoRAAdapter  # noqa: E402
from megatron.bridge.peft.lora import LoRA, LoRALinear  # noqa: E402
from megatron.bridge.peft.utils import ParallelLinearAdapter  # noqa: E402

from tests.interop.trained import STEP, TOKENS, steps  # noqa: E402

RANK, ALPHA = 4, 12
FUSED, CANONICAL = ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"], CanonicalLoRA().target_modules
CASES: dict[str, tuple[str, Any]] = {
    "llama-lora": ("llama", LoRA(FUSED, dim=RANK, alpha=ALPHA)),
    "llama-canonical": ("llama", CanonicalLoRA(CANONICAL, dim=RANK, alpha=ALPHA)),
    "llama-dora": ("llama", DoRA(FUSED, dim=RANK, alpha=ALPHA)),
    "qwen2-lora": ("qwen2", LoRA(FUSED, dim=RANK, alpha=ALPHA)),
    "qwen3-lora": ("qwen3", LoRA(["linear_qkv"], dim=RANK, alpha=ALPHA)),
}
PLACES = {"linear_qkv": "self_attention", "linear_proj": "self_attention", "linear_fc1": "mlp", "linear_fc2": "mlp"}


def parallel() -> Any:
    """One process on its own, as Megatron counts processes."""
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
    return ModelParallelConfig(use_cpu_initialization=True)


class Base(nn.Module):
    """Megatron's linear layer with a weight of the base; the bias is returned beside, as Megatron does."""

    def __init__(self, weight: Tensor, bias: Tensor | None, config: Any) -> None:
        super().__init__()
        self.config, self.bias = config, bias
        self.linear = ColumnParallelLinear(weight.shape[1], weight.shape[0], config=parallel(), init_method=nn.init.zeros_, bias=False)
        self.linear.weight.data.copy_(weight)
        self.linear.weight.requires_grad_(False)

    @property
    def weight(self) -> Tensor:
        found: Tensor = self.linear.weight
        return found

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.linear(x)[0], self.bias


class Slot(nn.Module):
    """Some rows of a fused layer's output, in the place of one of transformers' layers."""

    def __init__(self, whole: nn.Module, rows: Tensor) -> None:
        super().__init__()
        self.whole, self.rows = [whole], rows

    def forward(self, x: Tensor) -> Tensor:
        out, bias = self.whole[0](x)
        return (out if bias is None else out + bias)[..., self.rows]


def _adapter(base: Base, out: int, kind: type = ParallelLinearAdapter, *, dim: int, alpha: float, name: str) -> Any:
    """As `transform` of `peft/lora.py` makes it, for one process."""
    return kind(
        base.weight.shape[1], out, dim, base_linear_name=name, activation="identity", alpha=alpha, model_parallel_config=_config()
    )


def _config() -> Any:
    config = parallel()
    config.cpu_offloading = config.cpu_offloading_activations = False
    return config


def _wrapped(name: str, base: Base, peft: Any, sizes: list[int]) -> nn.Module:
    told = {"dim": peft.dim, "alpha": peft.alpha, "name": name}
    if isinstance(peft, CanonicalLoRA) and len(sizes) > 1:
        keys, kind = (("q", "k", "v"), LoRALinearSplitQKV) if len(sizes) == 3 else (("gate", "up"), LoRALinearSplitFC1UpGate)
        made = {f"adapter_{key}": _adapter(base, size, **told) for key, size in zip(keys, sizes, strict=True)}
        found: nn.Module = kind(base, ModuleDict(made))
    elif isinstance(peft, DoRA):
        found = DoRALinear(base, _adapter(base, sum(sizes), ParallelLinearDoRAAdapter, **told))
    else:
        found = LoRALinear(base, _adapter(base, sum(sizes), **told))
    return found


def build(base: Path, peft: Any) -> tuple[Any, dict[str, nn.Module]]:
    """A transformers model whose linear layers are Megatron's with adapters, and these by their names in Megatron."""
    torch.manual_seed(0)
    model = t.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager").requires_grad_(False)
    told = model.config
    size = getattr(told, "head_dim", None) or told.hidden_size // told.num_attention_heads
    config = SimpleNamespace(
        num_attention_heads=told.num_attention_heads, num_query_groups=told.num_key_value_heads, kv_channels=size,
        hidden_size=told.hidden_size,
    )  # fmt: skip
    targets = {"linear_qkv" if target in ("linear_q", "linear_k", "linear_v") else target for target in peft.target_modules}
    targets = {target.removesuffix("_up").removesuffix("_gate") for target in targets}
    made: dict[str, nn.Module] = {}
    for number, layer in enumerate(model.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        groups = {
            "linear_qkv": (attention, ["q_proj", "k_proj", "v_proj"]), "linear_proj": (attention, ["o_proj"]),
            "linear_fc1": (mlp, ["gate_proj", "up_proj"]), "linear_fc2": (mlp, ["down_proj"]),
        }  # fmt: skip
        for name in sorted(targets):
            owner, parts = groups[name]
            old = [getattr(owner, part) for part in parts]
            weights, biases = [one.weight.data for one in old], [one.bias for one in old]
            fused = len(parts) == 3
            weight = merge_qkv_weights(config, *weights) if fused else torch.cat(weights)
            bias = None
            if biases[0] is not None:
                bias = merge_qkv_weights(config, *(one.data for one in biases)) if fused else torch.cat([one.data for one in biases])
            rows = torch.arange(len(weight))
            slots = split_qkv_biases(config, rows) if fused else rows.split([len(one) for one in weights])
            whole = _wrapped(name, Base(weight, bias, config), peft, [len(one) for one in weights])
            made[f"decoder.layers.{number}.{PLACES[name]}.{name}"] = whole
            for part, slot in zip(parts, slots, strict=True):
                setattr(owner, part, Slot(whole, slot.flatten()))
    return model, made


def adapter_state(made: dict[str, nn.Module]) -> dict[str, Tensor]:
    """The tensors by the names that Megatron-Bridge's modules give them, without those of the base."""
    found: dict[str, Tensor] = {}
    for name, module in made.items():
        module.state_dict(destination=found, prefix=f"{name}.")
    return {key: value for key, value in found.items() if ".adapter." in key and isinstance(value, Tensor)}


def _parameters(made: dict[str, nn.Module]) -> Iterator[nn.Parameter]:
    for module in made.values():
        yield from (parameter for name, parameter in module.named_parameters() if name.startswith("adapter."))


def forward(model: Any) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(TOKENS).logits.double()


def train(case: str, base: Path, adapter: Path) -> Tensor:
    """Two steps; the state dict and `run_config.yaml` with the dataclass of its LoRA are saved; returns the logits."""
    peft = CASES[case][1]
    model, made = build(base, peft)
    optimizer = torch.optim.Adam(list(_parameters(made)), lr=STEP)
    for batch in steps():
        logits = model(batch).logits[:, :-1]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    adapter.mkdir(parents=True)
    save_file({key: value.detach().contiguous() for key, value in adapter_state(made).items()}, adapter / "adapter_model.safetensors")
    told = {field.name: getattr(peft, field.name) for field in fields(peft)}
    told = {key: value for key, value in told.items() if isinstance(value, str | int | float | list)}
    told["_target_"] = f"{type(peft).__module__}.{type(peft).__qualname__}"
    (adapter / "run_config.yaml").write_text(yaml.safe_dump({"peft": told}))
    (adapter / "config.json").write_text((base / "config.json").read_text())
    return forward(model)


def logits(base: Path, adapter: Path) -> Tensor:
    """The logits of a base with an adapter's folder: the LoRA that its `run_config.yaml` makes, with its state dict."""
    told = yaml.safe_load((adapter / "run_config.yaml").read_text())["peft"]
    kind = {"CanonicalLoRA": CanonicalLoRA, "LoRA": LoRA, "DoRA": DoRA}[told.pop("_target_").rpartition(".")[2]]
    model, made = build(base, kind(**{key: value for key, value in told.items() if key in ("dim", "alpha", "target_modules")}))
    tensors, wanted = load_file(adapter / "adapter_model.safetensors"), adapter_state(made)
    assert set(tensors) <= set(wanted), "a tensor that Megatron-Bridge's modules do not have"
    for key, value in wanted.items():  # load_state_dict(strict=False)
        if key in tensors:
            value.data.copy_(tensors[key])
    return forward(model)
