"""Every method of peft's that edits weights, as a matrix of cases: a config, the layers it is put on, and how its tensors are made random.

A row of a table in `cases_*.py`; `test_peft_matrix.py` merges what peft saves and compares with peft's own forward,
`test_peft_matrix_mutations.py` changes each tensor and each setting of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model

from tests.interop.zoo import TRANSPOSED, new_base


@dataclass(frozen=True)
class Case:
    """`config` is one of peft's config classes with its settings; `layers` those of the zoo it is put on.

    `random` fills one trainable tensor with values that change its weight by about its own size; by default 0.3 times normal
    numbers. `flips` are other values of settings, each with which peft loads the same tensors as another adapter; `refused` are
    values that must be an error; `harmless` are changes of a tensor, by a key's ending, that leave another good adapter, each for a
    reason told beside it. `tolerance` is of ‖output‖, in float32. `transposed` names the weights of which nothing in a file tells that
    they are stored so.
    """

    config: Callable[..., Any]
    layers: tuple[str, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    random: Callable[[str, torch.Tensor, torch.Generator], torch.Tensor] | None = None
    flips: dict[str, Any] = field(default_factory=dict)
    refused: dict[str, Any] = field(default_factory=dict)
    harmless: tuple[tuple[str, str], ...] = ()
    tolerance: float = 1e-5
    transposed: tuple[str, ...] = TRANSPOSED

    def wrapped(self, folder: Path, dtype: torch.dtype = torch.float32, **more: Any) -> PeftModel:
        """The zoo under this adapter, its tensors random; base and adapter are saved below the folder."""
        zoo = new_base(folder / "base", dtype)
        model = get_peft_model(zoo, self.config(**{"target_modules": list(self.layers), **self.settings, **more}))
        generator = torch.Generator().manual_seed(1)
        fill = self.random or (lambda name, tensor, noise: 0.3 * torch.randn(tensor.shape, generator=noise))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(fill(name, parameter.data, generator).to(parameter.dtype))
        model.eval().save_pretrained(folder / "adapter")
        return model


def near_one(name: str, tensor: torch.Tensor, noise: torch.Generator) -> torch.Tensor:
    """Factors of a weight, or numbers that stand about 1."""
    return 1 + 0.3 * torch.randn(tensor.shape, generator=noise)


LINEAR = ("linear", "square")
CONV1D = ("gpt", "gpt_square")  # transformers' transposed layers
CONVS = ("conv1", "conv2", "point2")


def all_cases() -> dict[str, Case]:
    from tests.interop import cases_additive, cases_banked, cases_lora, cases_multiplicative

    return {**cases_additive.CASES, **cases_banked.CASES, **cases_lora.CASES, **cases_multiplicative.CASES}

