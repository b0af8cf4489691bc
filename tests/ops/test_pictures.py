"""What inspect and extract draw: changes beside the weights and errors by float64 algebra, and what is refused before work."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from loratools.errors import MissingExtra, OptionError, UsageError
from loratools.ops import _page
from loratools.ops._page import Page
from loratools.ops.extract import extract
from loratools.ops.inspect import inspect
from tests.files import peft_config, read_adapter, write_adapter, write_checkpoint
from tests.pictures import adapter, llama, tuned, weights

SHAPES = llama(2, ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj"))
BASE = weights(SHAPES)


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> list[Page]:
    """The pages that would be drawn, instead of files."""
    found: list[Page] = []
    keep: Callable[[Path, Page], None] = lambda target, page: found.append(page)  # noqa: E731
    monkeypatch.setattr(_page, "draw", keep)
    return found


def dense(folder: Path, name: str) -> torch.Tensor:
    """W′ − W of a module by the papers' formulas, in float64."""
    tensors, config = read_adapter(folder)
    root = f"base_model.model.{name}"
    BA = tensors[f"{root}.lora_B.weight"].double() @ tensors[f"{root}.lora_A.weight"].double() * config["lora_alpha"] / config["r"]
    m = tensors.get(f"{root}.lora_magnitude_vector")
    W = BASE[f"{name}.weight"].double()
    return BA if m is None else (W + BA) * (m.double() / (W + BA).norm(dim=1)).unsqueeze(1) - W


@pytest.mark.parametrize("dora", [False, True])
def test_with_a_base_the_change_stands_beside_the_weight(tmp_path: Path, pages: list[Page], dora: bool) -> None:
    folder = adapter(tmp_path / "adapter", SHAPES, 4, BASE if dora else None)
    inspect(folder, base=write_checkpoint(tmp_path / "base", BASE), plot=tmp_path / "x.png")
    (page,) = pages
    change, rank = page.heats
    assert (change.label, rank.title) == ("‖ΔW‖ / ‖W‖", "Effective rank of the change") and page.told.endswith("rank 4")
    for name in SHAPES:
        W = BASE[f"{name}.weight"].double()
        assert change.values[f"{name}.weight"] == pytest.approx(float(dense(folder, name).norm() / W.norm()), rel=1e-10)
    assert set(page.drift) == ({f"{name}.weight" for name in SHAPES} if dora else set())
    if dora:
        name = next(iter(SHAPES))
        m = read_adapter(folder)[0][f"base_model.model.{name}.lora_magnitude_vector"].double()
        expected = m / BASE[f"{name}.weight"].double().norm(dim=1) - 1
        assert page.drift[f"{name}.weight"] == pytest.approx(expected.tolist(), abs=1e-12)
    assert page.curve is not None and page.curve.here[1] == 0


def test_without_a_base_it_is_the_change_itself(tmp_path: Path, pages: list[Page]) -> None:
    folder = adapter(tmp_path / "adapter", SHAPES, 4)
    report = inspect(folder, plot=tmp_path / "x.png")
    (page,) = pages
    rows = {row["name"]: row for row in report["modules"]}
    assert report == inspect(folder, spectra=True) and page.heats[0].label == "‖ΔW‖" and not page.drift
    for name in page.names:
        assert page.heats[0].values[name] == pytest.approx(float(dense(folder, name.removesuffix(".weight")).norm()), rel=1e-12)
        assert (page.heats[1].values[name], page.spectra[name]) == (rows[name]["effective_rank"], rows[name]["sigma"])


def test_values_too_far_apart_get_a_logarithmic_scale(tmp_path: Path, pages: list[Page]) -> None:
    tensors = {f"base_model.model.{name}.lora_A.weight": torch.ones(1, 4) * scale for name, scale in (("a", 1), ("b", 100), ("c", 0))}
    tensors |= {f"base_model.model.{name}.lora_B.weight": torch.ones(4, 1) for name in "abc"}
    inspect(write_adapter(tmp_path / "adapter", tensors, peft_config(r=1, target_modules=["a", "b", "c"])), plot=tmp_path / "x.png")
    heat = pages[0].heats[0]
    assert heat.log and (heat.low, heat.high) == pytest.approx((16, 1600)) and heat.values["c.weight"] == 0 and len(pages[0].spectra) == 2


def test_an_extractions_curve_is_that_of_other_ranks(tmp_path: Path, pages: list[Page]) -> None:
    base, other = write_checkpoint(tmp_path / "base", BASE), write_checkpoint(tmp_path / "tuned", tuned(BASE))
    receipt = extract(base, other, tmp_path / "out", rank=3, plot=tmp_path / "x.png")
    (page,) = pages
    rows = {row["name"]: row for row in receipt["tensors"]}
    for name in page.names:
        assert page.heats[0].values[name] == rows[name]["relative_norm"] and page.heats[1].values[name] == rows[name]["error"]
        singular = torch.linalg.svdvals(tuned(BASE)[name].double() - BASE[name].double())[: len(page.spectra[name])]
        assert page.spectra[name] == pytest.approx(singular.tolist(), rel=1e-3)  # what `spectrum` promises of their squares is 1e-4
    assert page.curve is not None and {len(sigma) for sigma in page.spectra.values()} == {8}
    size, error = page.curve.here
    assert size == (tmp_path / "out" / "adapter_model.safetensors").stat().st_size
    assert error == pytest.approx(math.sqrt(math.fsum(row["share"] * row["error"] ** 2 for row in rows.values())))
    for size, error, rank in page.curve.equal[::3]:
        more = extract(base, other, tmp_path / f"{rank}", rank=rank)
        assert (tmp_path / f"{rank}" / "adapter_model.safetensors").stat().st_size == size
        found = math.sqrt(math.fsum(row["share"] * row["error"] ** 2 for row in more["tensors"]))
        assert found == pytest.approx(error, rel=2e-3)  # the spectra are estimates, see above
    extract(base, other, tmp_path / "again", rank=3)
    files = [(tmp_path / folder / "adapter_model.safetensors").read_bytes() for folder in ("out", "again")]
    assert files[0] == files[1]


@pytest.mark.parametrize("words", [{"size": "20kB"}, {"energy": 0.9}, {"rank": 2, "exclude": ["*k_proj*"], "rest": "drop"}])
def test_every_way_to_choose_ranks_has_its_picture(tmp_path: Path, pages: list[Page], words: dict[str, object]) -> None:
    base, other = write_checkpoint(tmp_path / "base", BASE), write_checkpoint(tmp_path / "tuned", tuned(BASE))
    receipt = extract(base, other, tmp_path / "out", plot=tmp_path / "x.png", **words)  # type: ignore[arg-type]
    left = {row["name"] for row in receipt["left_out"]}
    (page,) = pages
    assert page.curve is not None and {name for name in page.names if page.heats[1].values[name] == 1.0} == left
    total = math.fsum([row["share"] * row["error"] ** 2 for row in receipt["tensors"]] + [row["share"] for row in receipt["left_out"]])
    assert page.curve.here[1] == pytest.approx(math.sqrt(total))


def test_files_are_drawn(tmp_path: Path) -> None:
    base, other = write_checkpoint(tmp_path / "base", BASE), write_checkpoint(tmp_path / "tuned", tuned(BASE))
    extract(base, other, tmp_path / "out", rank=3, plot=tmp_path / "x.svg")
    inspect(tmp_path / "out", plot=tmp_path / "y.png")
    assert b"Error of what was extracted" in (tmp_path / "x.svg").read_bytes()
    assert (tmp_path / "y.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "out" / "loratools.json").read_text())["arguments"]["plot"] == str(tmp_path / "x.svg")


def test_what_is_refused_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, other = write_checkpoint(tmp_path / "base", BASE), write_checkpoint(tmp_path / "tuned", tuned(BASE))
    with pytest.raises(UsageError, match=r"--plot: found x\.gif, expected a name that ends in"):
        inspect("no such adapter", plot=tmp_path / "x.gif")
    with pytest.raises(OptionError, match="--plot is for adapters, and this is a checkpoint"):
        inspect(base, plot=tmp_path / "x.png")
    with pytest.raises(UsageError, match="expected a file that is not the output or in it"):
        extract(base, other, tmp_path / "out", rank=1, plot=tmp_path / "out" / "x.png")
    saved = peft_config(target_modules=["b"], modules_to_save=["a"])
    nothing = write_adapter(tmp_path / "adapter", {"base_model.model.a.weight": torch.ones(3, 3)}, saved)
    with pytest.raises(OptionError, match="--plot, and no module has a measure to draw; --base may give one"):
        inspect(nothing, plot=tmp_path / "x.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for call in (lambda: inspect(nothing, plot=tmp_path / "x.png"), lambda: extract(base, other, tmp_path / "o", rank=1, plot="x.png")):
        with pytest.raises(MissingExtra, match=r"pip install \"loratools\[plot\]\""):
            call()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "tuned"]
