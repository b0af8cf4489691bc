"""The page of a report in a browser: what it shows, by mouse and by keys, light and dark, wide and narrow, without any network.

Run as a script it takes the pictures of spec/report.md anew: python tests/browser/test_report.py
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # as a script

from loratools.ops.resize import resize
from loratools.workflows.report import report
from tests.browser import _adapters as made
from tests.browser._chromium import Look, chromium, missing
from tests.files import peft_config, read_checkpoint, write_adapter

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

PICTURES = Path(__file__).parents[2] / "spec" / "pictures"
COLOURS = 192  # of a picture: with fewer the colours of the map are not its own
WIDTHS, SCHEMES = (390, 820, 1440), ("light", "dark")
Q0, K0, V0, Q1 = (f"model.layers.{place}_proj" for place in ("0.self_attn.q", "0.self_attn.k", "0.self_attn.v", "1.self_attn.q"))
EVIL = "<script>alert(1)</script>"


def pages(room: Path, layers: int = 2) -> dict[str, Path]:
    """Reports by what they are of."""
    base = made.model(room / "tiny-llama", layers)
    style, poetry = made.adapter(room / "style", layers), made.adapter(room / "long", layers, seed=2, near=1)
    resize(poetry, room / "poetry", rank=6)
    weight = torch.ones(2, 4), torch.ones(3, 2)
    tensors = {f"base_model.model.{EVIL}.lora_{letter}.weight": factor for letter, factor in zip("AB", weight, strict=True)}
    given: dict[str, list[Path]] = {
        "one": [style], "both": [style, room / "poetry"], "three": [style, room / "poetry", poetry],
        "dora": [style, made.dora(room / "dora", layers, read_checkpoint(base))],
        "two": [made.adapter(room / "two", 1, modules=2)], "many": [made.adapter(room / "many", 100, rank=8, modules=4)],
        "evil": [write_adapter(room / "evil", tensors, peft_config(target_modules=[EVIL]))],
    }  # fmt: skip
    for name, adapters in given.items():
        report(adapters, room / f"{name}.html", base=base if name in ("both", "dora") else None)
    return {name: room / f"{name}.html" for name in given}


@pytest.fixture(scope="module")
def of(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return pages(tmp_path_factory.mktemp("reports"))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture
def look(browser: Any, of: dict[str, Path]) -> Iterator[Callable[..., Look]]:
    """Opens a report; at the end nothing was said to the console, and nothing was asked for but the file."""
    looks: list[Look] = []

    def opened(name: str, **more: Any) -> Look:
        looks.append(Look(browser, of[name], **more))
        return looks[-1]

    yield opened
    for one in looks:
        said, asked = one.said, one.asked
        one.page.close()
        assert (said, len(asked)) == ([], 1), (said, asked)


@pytest.mark.parametrize("name", ["one", "both", "three", "dora", "two", "many", "evil"])
def test_it_renders(look: Callable[..., Look], name: str) -> None:
    found = look(name)
    assert found.page.locator("#summary article").count() == {"both": 2, "dora": 2, "three": 3}.get(name, 1)
    assert found.page.locator("#heatmap svg path").count() >= 1
    assert found.page.locator("#compare").is_visible() == (name in ("both", "dora", "three"))
    assert found.page.locator("#findings .target").count() >= 8
    assert found.page.locator("#receipts").is_visible() == (name in ("both", "three"))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["both", "many"])
def test_it_is_never_wider_than_the_screen(look: Callable[..., Look], name: str, width: int) -> None:
    page = look(name, width=width).page
    page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert page.evaluate("[document.documentElement.scrollWidth, document.body.scrollWidth]") <= [width, width]
    page.locator("#module-table .open").first.click()
    box = page.locator("#detail").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= width
    assert page.evaluate("(box => box.scrollWidth - box.clientWidth)(document.getElementById('detail'))") <= 0


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["three", "dora"])
def test_every_text_has_contrast(look: Callable[..., Look], name: str, scheme: str) -> None:
    found = look(name, scheme=scheme)
    ground = found.page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (max(ground) < 64) if scheme == "dark" else (min(ground) > 230)
    found.page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert found.faint() == []
    found.page.locator("#module-table .open").first.click()
    found.page.evaluate("document.querySelectorAll('dialog details').forEach(one => one.open = true)")
    assert found.faint() == []


def test_the_measure_of_contrast_knows_faint_text(look: Callable[..., Look]) -> None:
    found = look("two")
    found.page.evaluate("document.documentElement.style.setProperty('--quiet', '#9a9a9a')")
    assert any(line.startswith("DT") and ": 2.8" in line for line in found.faint())  # #9a9a9a on white is 2.81


def test_light_turns_dark_while_it_is_open(look: Callable[..., Look]) -> None:
    page = look("both").page
    label = page.locator("#heatmap svg text").first
    before = label.evaluate("one => getComputedStyle(one).fill")
    page.emulate_media(color_scheme="dark")
    page.wait_for_function("before => getComputedStyle(document.querySelector('#heatmap svg text')).fill !== before", arg=before)


def test_columns_are_sorted_by_click_and_by_keys(look: Callable[..., Look]) -> None:
    found = look("one")
    as_it_came = found.names()
    head = found.page.locator("#module-table thead button[data-sort=norm]")
    head.click()
    norms = [float(text) for text in found.column("norm")]
    assert norms == sorted(norms, reverse=True) and len(norms) == 14
    assert head.locator("xpath=..").get_attribute("aria-sort") == "descending"
    assert head.evaluate("one => one === document.activeElement")
    head.press("Enter")
    assert [float(text) for text in found.column("norm")] == norms[::-1]
    found.page.locator("#module-table thead button[data-sort=name]").focus()
    found.page.keyboard.press("Space")
    assert found.names() == sorted(as_it_came)


def test_words_filter_the_rows(look: Callable[..., Look]) -> None:
    found = look("one")
    field = found.page.get_by_label("Filter").first
    field.fill("attn Q_PROJ")
    assert found.names() == [Q0, Q1] and found.page.get_by_text("2 of 14 modules").is_visible()
    field.fill("nothing of the kind")
    assert found.names() == [] and found.page.get_by_text("No module has all of these words").is_visible()
    field.fill("")
    assert len(found.names()) == 14


def test_a_pointer_shows_values_and_a_press_the_spectra(look: Callable[..., Look]) -> None:
    found = look("both")
    at = found.cell("self_attn.q_proj", "1")
    share = dict(zip(found.names(), found.column("share"), strict=True))[Q1]
    found.page.mouse.move(*at)
    found.page.wait_for_selector("#heatmap .tip")
    assert found.page.locator("#heatmap .tip").inner_text().splitlines() == [Q1, f"‖ΔW‖ / ‖W‖: {share}"]
    found.page.mouse.click(*at)
    assert found.page.locator("#detail-title").inner_text() == Q1
    assert found.page.locator("#detail article").count() == 2
    for colour, rank in (("#0072b2", 8), ("#c04a00", 6)):
        marks = found.page.locator(f"#spectra svg path[fill='#fff'][stroke='{colour}'], #spectra svg path[fill='{colour}']")
        heights = [mark["y"] for mark in marks.evaluate_all("all => all.map(one => one.getBoundingClientRect().toJSON())")]
        assert len(heights) == rank and heights == sorted(heights)  # lower on the screen is smaller
    assert found.page.locator("#detail details summary").all_text_contents() == ["8 singular values", "6 singular values"]


def test_the_map_is_walked_with_arrow_keys(look: Callable[..., Look]) -> None:
    found = look("one")
    page, names = found.page, found.names()
    page.locator("#heatmap").focus()
    told = page.locator("#map [role=status]")
    said = []
    for key in ("ArrowRight", "ArrowRight", "ArrowDown", "ArrowLeft", "ArrowUp"):
        page.keyboard.press(key)
        said.append(told.inner_text())
    places = [(next(name for name in names if text.startswith(name))) for text in said]
    rows = page.evaluate("JSON.parse(document.getElementById('data').textContent).grid.rows")
    assert places == [f"model.layers.{layer}.{rows[row]}" for layer, row in ((0, 0), (1, 0), (1, 1), (0, 1), (0, 0))]
    assert all("‖ΔW‖" in text for text in said)
    page.keyboard.press("Enter")
    assert page.locator("#detail-title").inner_text() == places[-1]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_on_a_phone_many_layers_run_down_the_page(look: Callable[..., Look], scheme: str) -> None:
    found = look("many", width=390, scheme=scheme)
    page = found.page
    assert page.evaluate("(box => box.scrollWidth - box.clientWidth)(document.querySelector('#map .scroll'))") == 0
    labels = page.locator("#heatmap svg text")
    tops = [labels.get_by_text(str(layer), exact=True).bounding_box() for layer in (0, 50, 99)]
    assert tops[0]["y"] < tops[1]["y"] < tops[2]["y"] and len({round(box["x"] + box["width"]) for box in tops}) == 1
    assert [labels.get_by_text(name, exact=True).count() for name in ("q_proj", "k_proj", "self_attn.q_proj")] == [1, 1, 0]
    page.locator("#heatmap").focus()
    said = []
    for key in ("ArrowDown", "ArrowDown", "ArrowRight", "ArrowUp"):
        page.keyboard.press(key)
        said.append(page.locator("#map [role=status]").inner_text())
    rows = page.evaluate("JSON.parse(document.getElementById('data').textContent).grid.rows")
    for text, (layer, row) in zip(said, ((0, 0), (1, 0), (1, 1), (0, 1)), strict=True):
        assert text.startswith(f"model.layers.{layer}.{rows[row]}"), said
    page.keyboard.press("Enter")
    assert page.locator("#detail-title").inner_text() == f"model.layers.0.{rows[1]}"


def test_a_turned_map_turns_back_on_a_wide_screen(look: Callable[..., Look]) -> None:
    page = look("many", width=390).page
    assert page.locator("#heatmap.turned").count() == 1
    page.set_viewport_size({"width": 1440, "height": 900})
    page.wait_for_selector("#heatmap:not(.turned)")
    assert page.evaluate("(box => box.scrollWidth - box.clientWidth)(document.querySelector('#map .scroll'))") == 0


def test_the_dialog_goes_on_back_and_away(look: Callable[..., Look]) -> None:
    page = look("one").page
    page.get_by_label("Filter").first.fill("layers.0 attn")
    page.get_by_role("button", name=K0).press("Enter")
    title = page.locator("#detail-title")
    dialog = page.locator("#detail")
    assert title.inner_text() == K0 and dialog.get_by_role("button", name="Previous").is_disabled()
    seen = []
    while dialog.get_by_role("button", name="Next").is_enabled():
        dialog.get_by_role("button", name="Next").press("Enter")
        seen.append(title.inner_text())
    assert seen == [K0.replace("k_proj", f"{letter}_proj") for letter in "oqv"]  # those the filter left
    dialog.get_by_role("button", name="Previous").click()
    assert title.inner_text() == Q0 and V0 in seen
    assert dialog.locator("#spectra svg path").count() > 1
    axis = dialog.locator("#spectra svg text")
    assert "0" not in axis.all_text_contents()  # a logarithm has none
    dialog.get_by_label("Logarithmic scale").uncheck()
    assert "0" in axis.all_text_contents()
    page.keyboard.press("Escape")
    assert not dialog.is_visible()
    assert page.get_by_role("button", name=K0).evaluate("one => one === document.activeElement")


def test_a_module_named_script_is_text(look: Callable[..., Look]) -> None:
    found = look("evil")
    assert found.names() == [EVIL]
    found.page.locator("#module-table .open").click()
    assert found.page.locator("#detail-title").inner_text() == EVIL
    assert found.page.locator("script").count() == 3


def test_every_two_of_several_are_compared(look: Callable[..., Look]) -> None:
    page = look("three").page
    assert page.locator("#compare .matrix tbody td").all_text_contents()[::4] == ["1.00"] * 3
    assert page.locator("#compare").get_by_text("a is style, b is poetry.").is_visible()
    page.get_by_label("Pair").select_option(label="poetry and long")
    assert page.locator("#compare").get_by_text("a is poetry, b is long.").is_visible()
    cosines = [float(text) for text in page.locator("#pair-table tbody tr > :nth-child(2)").all_text_contents()]
    assert len(cosines) == 14 and min(cosines) > 0.9  # poetry is the other, truncated
    page.get_by_label("Colour").nth(1).select_option(label="Overlap of what they read (rows)")
    page.locator("#pair-table .open").first.click()
    assert page.locator("#detail dt", has_text="Angles of rows").is_visible()


def test_receipts_are_told(look: Callable[..., Look]) -> None:
    section = look("both").page.locator("#receipts")
    assert section.locator("summary").inner_text() == "poetry: resize"
    assert section.locator("tbody tr").count() == 2 and "14 of 14" in section.inner_text()


def test_a_dora_is_told_of_its_base(look: Callable[..., Look]) -> None:
    found = look("dora")
    found.page.get_by_label("Adapter").select_option(label="dora")
    assert set(found.column("kind")) == {"dora"}
    assert all(text.endswith(" %") for text in found.column("share") + found.column("drift"))
    assert found.page.get_by_label("Colour").nth(1).locator("option").all_text_contents() == ["Cosine of the changes"]
    found.page.locator("#module-table .open").first.click()
    assert found.page.locator("#detail").get_by_text("The singular values are those of its direction ΔV.").is_visible()


def test_two_modules_have_small_cells(look: Callable[..., Look]) -> None:
    assert look("two").page.locator("#heatmap").bounding_box()["width"] < 400


def test_four_hundred_modules_are_soon_there(look: Callable[..., Look], of: dict[str, Path]) -> None:
    assert of["many"].stat().st_size <= 2_000_000
    start = time.monotonic()
    found = look("many")
    assert len(found.names()) == 400
    assert time.monotonic() - start < 5  # about one second on two cores; the rest is for machines that do other things too


def take_pictures(room: Path) -> None:
    """The page at three widths, light and dark, and the map of 400 modules on a phone, in as few colours as keep their look."""
    made = pages(room, layers=16)
    text = made["both"].read_text(encoding="utf-8").replace(f"{room}/", "")  # where it was made is nothing to show
    shown = room / "shown.html"
    shown.write_text(text, encoding="utf-8")
    PICTURES.mkdir(exist_ok=True)
    with chromium() as browser:
        for width in WIDTHS:
            for scheme in SCHEMES:
                page = Look(browser, shown, width=width, scheme=scheme).page
                keep(page.screenshot(full_page=True), f"report-{width}-{scheme}.png")
                page.close()
        keep(Look(browser, made["many"], width=390).page.locator("#map").screenshot(), "report-390-many.png")


def keep(taken: bytes, name: str) -> None:
    import io

    from PIL import Image

    picture = Image.open(io.BytesIO(taken)).convert("RGB")
    picture.quantize(COLOURS, dither=Image.Dither.NONE).save(PICTURES / name, optimize=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        take_pictures(Path(folder))
