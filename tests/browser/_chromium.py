"""The browser that the tests look with, and what they ask of a page in it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")


def missing() -> str | None:
    """Why there is no browser to test with, or None if there is one."""
    try:
        import playwright.sync_api  # noqa: F401
    except ImportError:
        return "playwright is not installed"
    if executable() is None:
        return "no Chromium: install it (CONTRIBUTING.md tells how), or name it in CHROMIUM"
    return None


def executable() -> str | None:
    """The browser that CHROMIUM names, else the first on PATH."""
    return os.environ.get("CHROMIUM") or next((found for found in map(shutil.which, NAMES) if found), None)


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser without a window, closed at the end."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=executable(), args=["--no-sandbox"])
        yield browser
        browser.close()


class Look:
    """A report in a tab of its own, and all that it said or asked for while it was looked at."""

    def __init__(self, browser: Any, path: Path, *, width: int = 1440, height: int = 900, scheme: str = "light", **more: Any) -> None:
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme, reduced_motion="reduce", **more)
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.said.append(dialog.message), dialog.dismiss()))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(path.as_uri())
        self.page.wait_for_selector("#heatmap svg text", state="attached")

    def names(self, table: str = "module-table") -> list[str]:
        """The names in a table, from above."""
        return list(self.page.locator(f"#{table} tbody .open").all_text_contents())

    def column(self, key: str, table: str = "module-table") -> list[str]:
        """The cells of a column, from above."""
        keys = self.page.locator(f"#{table} thead button").evaluate_all("all => all.map(one => one.dataset.sort)")
        return list(self.page.locator(f"#{table} tbody tr > :nth-child({keys.index(key) + 1})").all_text_contents())

    def cell(self, row: str, column: str) -> tuple[float, float]:
        """Where the middle of a cell of the map is on the screen, scrolled into view: right of its row's name, above its column's."""
        self.page.locator("#heatmap").scroll_into_view_if_needed()
        name, number = (self.page.locator("#heatmap svg text").get_by_text(text, exact=True).bounding_box() for text in (row, column))
        return number["x"] + number["width"] / 2, name["y"] + name["height"] / 2

    def faint(self) -> list[str]:
        """Texts that are seen and have less contrast with what is behind them than WCAG 2.2 asks for (1.4.3, AA)."""
        return list(self.page.evaluate(CONTRAST))


# Relative luminance and ratio are WCAG's. Disabled controls need no contrast. Behind a number with a bar is the bar, or not: the
# worse counts. Behind a text of a chart is the last shape drawn before it that it stands on, else what is behind the chart.
CONTRAST = r"""() => {
  const parse = text => { const part = text.match(/[\d.]+/g).map(Number); return part.length < 4 ? [...part, 1] : part; };
  const over = (top, below) => [0, 1, 2].map(at => top[at] * top[3] + below[at] * (1 - top[3])).concat(1);
  const light = colour => [0.2126, 0.7152, 0.0722].reduce((sum, weight, at) => {
    const part = colour[at] / 255;
    return sum + weight * (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
  }, 0);
  const ratio = (one, other) => { const [a, b] = [light(one), light(other)].sort((x, y) => y - x); return (a + 0.05) / (b + 0.05); };
  const open = document.querySelector("dialog[open]");
  const root = open ?? document.body;

  function behind(element) {
    const layers = [];
    for (let at = element; at; at = at.parentElement) {
      const style = getComputedStyle(at);
      const colours = [style.backgroundColor, ...(style.backgroundImage.match(/rgba?\([^)]*\)/g) ?? [])].map(parse);
      layers.push(colours.filter(colour => colour[3]));
      if (layers.at(-1).some(colour => colour[3] === 1)) break;
    }
    let found = [[255, 255, 255, 1]];
    for (const layer of layers.reverse()) if (layer.length) found = layer.flatMap(colour => found.map(below => over(colour, below)));
    return found;
  }

  function behindInk(text) {
    const here = text.getBoundingClientRect(), x = here.left + here.width / 2, y = here.top + here.height / 2;
    let found = null;
    for (const shape of text.ownerSVGElement.querySelectorAll("path, rect, text")) {
      if (shape === text) break;
      const fill = shape.tagName === "text" ? "none" : getComputedStyle(shape).fill;
      const box = shape.getBoundingClientRect();
      const within = box.left <= x && x <= box.right && box.top <= y && y <= box.bottom;
      if (fill !== "none" && within && parse(fill)[3] === 1) found = parse(fill);
    }
    return found ? [found] : behind(text.ownerSVGElement);
  }

  const faint = [];
  const check = (element, words, ink, grounds, style) => {
    const size = parseFloat(style.fontSize), large = size >= 24 || size >= 18.66 && style.fontWeight >= 700;
    const worst = Math.min(...grounds.map(ground => ratio(over(parse(ink), ground), ground)));
    if (worst < (large ? 3 : 4.5)) faint.push(`${element.tagName}.${element.getAttribute("class")} "${words}": ${worst.toFixed(2)}`);
  };
  for (const element of root.querySelectorAll("*")) {
    if (!element.checkVisibility({ visibilityProperty: true }) || element.closest(":disabled, .hidden, .skip")) continue;
    const style = getComputedStyle(element);
    const words = [...element.childNodes].filter(node => node.nodeType === 3).map(node => node.data).join(" ").trim();
    if (element.placeholder) check(element, element.placeholder, getComputedStyle(element, "::placeholder").color, behind(element), style);
    if (!words || ["SCRIPT", "STYLE", "OPTION"].includes(element.tagName)) continue;
    const drawn = element instanceof SVGTextContentElement;
    check(element, words, drawn ? style.fill : style.color, drawn ? behindInk(element) : behind(element), style);
  }
  return faint;
}"""
