"""combine of adapters that live peft saved by different methods, as one LoRA: merged, it is the sum of what each peft model does."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn

from loratools.errors import Faults, UnsupportedError
from loratools.formats import load
from loratools.ops.combine import combine
from loratools.ops.merge import merge
from tests.files import read_checkpoint, write_checkpoint


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(10, 14)
        self.conv = nn.Conv2d(3, 5, (3, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x)


CONFIGS = {
    "lora": peft.LoraConfig(r=2, lora_alpha=3, target_modules=["up", "conv"], init_lora_weights=False),
    "dora": peft.LoraConfig(r=2, lora_alpha=3, target_modules=["up", "conv"], init_lora_weights=False, use_dora=True),
    "loha": peft.LoHaConfig(r=2, alpha=3, target_modules=["up", "conv"], init_weights=False),
    "ia3": peft.IA3Config(target_modules=["up", "conv"], feedforward_modules=[], init_ia3_weights=False),
    "vera": peft.VeraConfig(r=3, target_modules=["up"], init_weights=False),
}
WEIGHTS = {"lora": 0.7, "dora": -0.3, "loha": 0.5, "ia3": 0.4, "vera": -1.0}


def net(dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(0)
    return Net().to(dtype)


def saved(folder: Path, kind: str) -> dict[str, Tensor]:
    """The adapter saved by peft, and the weights that peft's own merge makes of the network, in float64."""
    model = peft.get_peft_model(net(), CONFIGS[kind])
    torch.manual_seed(sum(map(ord, kind)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape))
    model.save_pretrained(folder / kind)
    return {name: value.double() for name, value in model.double().merge_and_unload().state_dict().items()}


@pytest.mark.parametrize("kinds", [("lora", "loha"), ("dora", "loha", "ia3"), ("lora", "vera"), tuple(CONFIGS)], ids="+".join)
def test_the_sum_of_what_peft_makes_of_the_weights(tmp_path: Path, kinds: tuple[str, ...]) -> None:
    base = net().state_dict()
    write_checkpoint(tmp_path / "base", base)
    wanted = {name: value.double() for name, value in base.items()}
    for kind in kinds:
        for name, value in saved(tmp_path, kind).items():
            wanted[name] = wanted[name] + WEIGHTS[kind] * (value - base[name].double())
    given = [f"{tmp_path / kind}:{WEIGHTS[kind]}" for kind in kinds]
    exact = set(kinds) <= {"lora", "loha", "vera"}
    words = {} if exact else {"rank": 100}
    receipt = combine(given, tmp_path / "out", base=tmp_path / "base", **words)
    assert receipt["applied"] == receipt["expected"] and {delta.kind for delta in load(tmp_path / "out").values()} <= {"lora", "full"}
    if exact:  # through the factors, whatever the kind: of rank r₁ + r₂², not of the weight's
        expected = {"lora": 2, "loha": 4, "vera": 3}
        assert {row["rank"] for row in receipt["tensors"] if row["name"] == "up.weight"} == {sum(expected[kind] for kind in kinds)}
    merge(tmp_path / "base", tmp_path / "out", tmp_path / "merged", dtype="float64")
    merged = read_checkpoint(tmp_path / "merged")
    for name, value in wanted.items():
        # float32 factors, and peft's DoRA norms in float32
        assert torch.allclose(merged[name], value, atol=2e-6 * float(value.abs().max())), name


def test_without_a_base_a_method_that_needs_one_says_so(tmp_path: Path) -> None:
    for kind in ("lora", "loha", "ia3"):
        saved(tmp_path, kind)
    message = r"up\.weight: how the weight of a LoHa delta lies, and its shape, only the base tells; give --base"
    with pytest.raises(Faults, match=message):
        combine([tmp_path / "lora", tmp_path / "loha"], tmp_path / "out")
    with pytest.raises(Faults) as caught:
        combine([(str(tmp_path / "ia3"), 0.5)], tmp_path / "out")
    assert {type(error) for error in caught.value.errors} == {UnsupportedError} and not (tmp_path / "out").exists()
