"""compare with a base: intruders as peft reports them, energies, DoRA by what it makes of the weight, and other kinds."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.intruders import reduce_intruder_dimension
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loratools.adapter import Adapter
from loratools.deltas.base import Delta
from loratools.deltas.dora import DoRA
from loratools.deltas.full import Full, Replacement
from loratools.deltas.loha import LoHa
from loratools.deltas.scaled import Scaled
from loratools.errors import MatchError, NonFiniteError, OptionError
from loratools.formats import load
from loratools.ops import _heatmap
from loratools.ops.compare import compare
from loratools.tensors import to_ref
from tests.files import read_checkpoint, write_checkpoint
from tests.ops._lora import low
from tests.pictures import adapter, llama, weights

NAME = "h.0.up.weight"
BIG = "h.1.up.weight"


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(40, 16)
        self.up, self.gpt, self.down = nn.Linear(16, 36), Conv1D(16, 36), nn.Linear(16, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.gpt(self.up(self.table(x))))


@pytest.mark.parametrize(("top_k", "epsilon"), [(10, 0.5), (4, 0.9), (3, 0.3)])
@pytest.mark.parametrize("kind", [{}, {"use_rslora": True}])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set")
def test_the_intruders_are_pefts(tmp_path: Path, kind: dict[str, Any], top_k: int, epsilon: float) -> None:
    """peft's own analysis of its own model, in its defaults and others: Linear, a transposed weight, an embedding."""
    torch.manual_seed(0)
    net = Net()
    write_checkpoint(tmp_path / "base", net.state_dict())
    model = peft.get_peft_model(net, peft.LoraConfig(r=3, lora_alpha=6, target_modules=["table", "up", "gpt", "down"], **kind))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.6)
    model.save_pretrained(tmp_path / "adapter")
    said: list[str] = []
    reduce_intruder_dimension(model, top_k=top_k, threshold_epsilon=epsilon, logging_sink=said.append)
    theirs = {}
    for line in said:
        if match := re.fullmatch(r"base_model\.model\.(\w+): (?:No intruders|Intruders: (\d+))", line):
            theirs[f"{match[1]}.weight"] = int(match[2] or 0)
    words: dict[str, Any] = {"base": tmp_path / "base", "top_k": top_k, "epsilon": epsilon}
    found = compare(tmp_path / "adapter", tmp_path / "adapter", **words)["intruders"]
    ours = {side: {row["name"]: row["intruders"] for row in found["modules"] if row["adapter"] == side} for side in "ab"}
    assert ours["a"] == ours["b"] == theirs and len(theirs) == 4
    assert found["a"]["intruders"] == sum(theirs.values()) and found["a"]["with_intruders"] == sum(map(bool, theirs.values()))
    if epsilon > 0.3:
        assert 0 < sum(theirs.values()) < 4 * top_k, "the comparison must be able to fail"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tensors = {NAME: randn(20, 7, seed=1).float(), BIG: randn(9, 9, seed=2).float(), "h.0.up.bias": torch.ones(20)}
    return write_checkpoint(tmp_path / "base", {**tensors, "conv.weight": randn(8, 4, 3, 3, seed=3).float()})


def weight(base: Path, name: str) -> Tensor:
    return read_checkpoint(base)[name].double()


def test_every_change_is_analysed_and_summed_up(tmp_path: Path, base: Path) -> None:
    a = Adapter(deltas={NAME: low((20, 7), 3, 0), "conv.weight": low((8, 4, 3, 3), 2, 1, layer="conv")})
    b = Adapter(deltas={NAME: low((20, 7), 2, 5), BIG: Scaled(l=to_ref(torch.full((9,), 2.0)))})
    seen: list[tuple[int, int]] = []
    found = compare(a, b, base=base, progress=lambda done, total: seen.append((done, total)))["intruders"]
    assert (found["top_k"], found["epsilon"]) == (10, 0.5)
    rows = {(row["name"], row["adapter"]): row for row in found["modules"]}
    assert set(rows) == {(NAME, "a"), (NAME, "b"), ("conv.weight", "a"), (BIG, "b")}
    scaled = rows[BIG, "b"]  # W′ = 2W: the same directions, and all of the change in proportion to W's energy there
    assert scaled["intruders"] == 0 and scaled["cosines"] == pytest.approx([1] * 9)
    assert scaled["left_energy"] == pytest.approx(1) and scaled["left_chance"] == 1
    conv = rows["conv.weight", "a"]
    assert (conv["left_chance"], conv["right_chance"]) == (1.0, 8 / 36) and len(conv["cosines"]) == 8
    own = [rows[NAME, "a"], conv]
    total = sum(row["norm"] ** 2 for row in own)
    for key in ("left_energy", "right_energy", "left_chance", "right_chance"):
        assert found["a"][key] == pytest.approx(sum(row["norm"] ** 2 * row[key] for row in own) / total)
    assert found["a"]["modules"] == found["b"]["modules"] == 2
    sizes = [4 * 140, 4 * 288, 4 * 81]
    assert seen == [(sum(sizes[: index + 1]), sum(sizes)) for index in range(3)]


def dora(base: Path, seed: int, factor: float) -> DoRA:
    norms = weight(base, NAME).norm(dim=1, keepdim=True) * factor
    return DoRA(direction=low((20, 7), 3, seed), magnitude=to_ref(norms))


def test_dora_is_what_it_makes_of_the_weight(base: Path) -> None:
    one, other = dora(base, 0, 1.1), dora(base, 1, 0.8)
    W = weight(base, NAME)
    from tests.ops._lora import dense

    changes = []
    for delta, factor in ((one, 1.1), (other, 0.8)):
        V = W + dense(delta)
        changes.append(factor * W.norm(dim=1, keepdim=True) * V / V.norm(dim=1, keepdim=True) - W)
    X, Y = changes
    found = compare(Adapter(deltas={NAME: one}), Adapter(deltas={NAME: other}), base=base)
    (row,) = found["modules"]
    assert row["norm_a"] == pytest.approx(float(X.norm())) and row["distance"] == pytest.approx(float((X - Y).norm()))
    assert row["cosine"] == pytest.approx(float((X * Y).sum() / X.norm() / Y.norm()))
    assert (row["column_angles"], row["column_overlap"], row["rank_a"]) == ([], None, None)
    assert not any("DoRA" in note for note in found["notes"])
    mixed = compare(Adapter(deltas={NAME: one}), Adapter(deltas={NAME: low((20, 7), 3, 0)}), base=base)["modules"][0]
    assert (mixed["kind_a"], mixed["kind_b"]) == ("dora", "lora") and mixed["norm_b"] == pytest.approx(float(dense(one).norm()))
    alone = compare(Adapter(deltas={NAME: one}), Adapter(deltas={BIG: low((9, 9), 1, 0)}), base=base)
    assert alone["total"]["norm_a"] == pytest.approx(float(X.norm()))


def loha(seed: int, rank: int = 2) -> LoHa:
    parts = [randn(20, rank, seed=seed), randn(rank, 7, seed=seed + 1), randn(20, rank, seed=seed + 2), randn(rank, 7, seed=seed + 3)]
    return LoHa(**dict(zip(("w1_a", "w1_b", "w2_a", "w2_b"), map(to_ref, parts), strict=True)), scale=0.5)


def product(seed: int) -> Tensor:
    a, b, c, d = randn(20, 2, seed=seed), randn(2, 7, seed=seed + 1), randn(20, 2, seed=seed + 2), randn(2, 7, seed=seed + 3)
    return 0.5 * (a @ b) * (c @ d)


def test_a_product_of_another_kind_goes_through_its_factors() -> None:
    """LoHa is of rank r²: cosine, distance and angles beside a LoRA, without a base."""
    (row,) = compare(Adapter(deltas={NAME: loha(0)}), Adapter(deltas={NAME: low((20, 7), 2, 0)}))["modules"]
    from tests.ops._lora import dense

    X, Y = product(0), dense(low((20, 7), 2, 0))
    assert (row["rank_a"], row["rank_b"], len(row["column_angles"])) == (4, 2, 2)
    assert row["distance"] == pytest.approx(float((X - Y).norm())) and row["inner"] == pytest.approx(float((X * Y).sum()))


def test_a_difference_that_is_no_product_is_compared_densely() -> None:
    X = randn(20, 7, seed=4)
    (row,) = compare(Adapter(deltas={NAME: Full(diff=to_ref(X))}), Adapter(deltas={NAME: loha(0)}))["modules"]
    assert row["distance"] == pytest.approx(float((X - product(0)).norm())) and row["row_overlap"] is None


def test_what_has_no_measure_even_with_a_base(base: Path) -> None:
    bias = Scaled(l=to_ref(torch.full((20,), 2.0)))
    grown = Replacement(value=to_ref(torch.zeros(21, 7)))
    a: dict[str, Delta] = {"h.0.up.bias": bias, NAME: grown}
    found = compare(Adapter(deltas=a), Adapter(deltas={"h.0.up.bias": bias, NAME: low((20, 7), 2, 0)}), base=base)
    reasons = {row["name"]: row["reason"] for row in found["incomparable"]}
    assert reasons["h.0.up.bias"] == "no measure for an (IA)³ of a vector"
    assert reasons[NAME] == "makes a tensor of another shape: found [21, 7], expected [20, 7]"
    assert [(row["name"], row["adapter"]) for row in found["intruders"]["modules"]] == [(NAME, "b")]
    unknown = compare(Adapter(deltas=a), Adapter(deltas={"h.0.up.bias": bias}))
    assert {row["reason"] for row in unknown["incomparable"]} == {"no measure for an (IA)³"}


def test_a_peft_method_without_a_base_waits_for_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = peft.get_peft_model(Net(), peft.LoHaConfig(r=2, alpha=3, target_modules=["up"], init_weights=False))
    model.save_pretrained(tmp_path / "loha")
    write_checkpoint(tmp_path / "base", Net().state_dict())
    assert load(tmp_path / "loha")
    found = compare(tmp_path / "loha", tmp_path / "loha")
    (row,) = found["incomparable"]
    # no distance of 0 where nothing was compared
    assert {found["total"][key] for key in ("norm_a", "norm_b", "cosine", "distance")} == {None}
    assert found["notes"] == ["1 tensor has no measure and is in no total; --base may give one"]
    assert row["reason"] == "no measure for a LoHa: how its weight lies only --base tells"
    (row,) = compare(tmp_path / "loha", tmp_path / "loha", base=tmp_path / "base")["modules"]
    assert row["cosine"] == pytest.approx(1) and (row["rank_a"], row["column_overlap"]) == (4, pytest.approx(1))


def test_nothing_measured_is_nothing_to_draw(tmp_path: Path) -> None:
    scaled = Adapter(deltas={"h.0.up.bias": Scaled(l=to_ref(torch.ones(20)))})
    with pytest.raises(OptionError, match="--plot, and no module has a measure to draw; --base may give one"):
        compare(scaled, scaled, plot=tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


def test_what_one_side_alone_has_and_nobody_measured_is_told(tmp_path: Path) -> None:
    torch.manual_seed(0)
    for name, targets in (("one", ["up"]), ("both", ["up", "down"])):
        config = peft.LoHaConfig(r=2, alpha=3, target_modules=targets, init_weights=False)
        peft.get_peft_model(Net(), config).save_pretrained(tmp_path / name)
    assert compare(tmp_path / "one", tmp_path / "both")["notes"] == ["2 tensors have no measure and are in no total; --base may give one"]


@pytest.mark.parametrize(
    ("words", "message"),
    [({"top_k": 5}, "--top-k has no meaning without --base"), ({"epsilon": 0.5}, "--epsilon has no meaning without --base"),
     ({"top_k": 0, "base": "x"}, "--top-k: found 0"), ({"epsilon": 1.5, "base": "x"}, "--epsilon: found 1.5")],
)  # fmt: skip
def test_options_that_make_no_sense(words: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        compare("nowhere", "nowhere", **words)


def test_faults_name_the_tensor(tmp_path: Path, base: Path) -> None:
    with pytest.raises(MatchError, match="none of the adapter's 1 weights is in the base"):
        compare(Adapter(deltas={"q.weight": low((20, 7), 2, 0)}), Adapter(deltas={NAME: low((20, 7), 2, 0)}), base=base)
    bad = write_checkpoint(tmp_path / "bad", {NAME: torch.full((20, 7), torch.inf)})
    with pytest.raises(NonFiniteError, match=r"bad: h\.0\.up\.weight: the weight holds inf or nan"):
        compare(Adapter(deltas={NAME: low((20, 7), 2, 0)}), Adapter(deltas={NAME: low((20, 7), 2, 0)}), base=bad)


def test_layers_are_the_modules_of_their_number() -> None:
    shapes = {"h.2.up.weight": 0, "h.10.up.weight": 1, "h.10.down.weight": 2, "head.weight": 3}
    a = Adapter(deltas={name: low((20, 7), 3, seed) for name, seed in shapes.items()})
    b = Adapter(deltas={name: low((20, 7), 3, seed + 9) for name, seed in shapes.items() if name != "h.10.down.weight"})
    found = compare(a, b)
    assert [row["layer"] for row in found["layers"]] == ["h.2", "h.10"]
    assert [row["layer"] for row in found["modules"]] == ["h.2", "h.10", None]
    two, ten = found["layers"]
    row = found["modules"][0]
    assert all(two[key] == pytest.approx(row[key]) for key in ("cosine", "distance", "norm_a", "norm_b", "column_overlap", "row_overlap"))
    inside = [Adapter(deltas={name: delta for name, delta in one.items() if "h.10" in name}) for one in (a, b)]
    own = compare(*inside)
    assert {key: value for key, value in ten.items() if key != "layer"} == own["total"] and ten["modules"] == 1


def test_a_map_without_a_value_is_not_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[list[str]] = []
    monkeypatch.setattr(_heatmap, "draw", lambda target, panels, **_: drawn.append([panel.label for panel in panels]))
    shapes = llama(1, ("self_attn.q_proj",))
    base = weights(shapes)
    plain, dora = adapter(tmp_path / "plain", shapes, 2), adapter(tmp_path / "dora", shapes, 2, base)
    compare(plain, dora, base=write_checkpoint(tmp_path / "base", base), plot=tmp_path / "x.png")  # a DoRA's change has no small factors
    compare(plain, plain, plot=tmp_path / "x.png")
    assert drawn == [["cosine"], ["cosine", "mean cos² of angles", "mean cos² of angles"]]
