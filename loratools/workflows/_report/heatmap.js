// A map of one number for each module: layers across and the modules of a layer down, or the other way round where so many
// layers have no room beside each other. Pointer, touch and arrow keys say the same.

const WIDEST = 92; // of a cell: with few layers the map is small, not its cells large
const LETTER = 6.6; // pixels of a letter of a label

/**
 * Returns {element, set({label, values by name, low, high, signed, show})}; a name without an entry has no cell, one with null
 * is grey. `open(name)` is called for a cell that is pressed.
 */
function heatmap(id, open) {
  const { rows, columns, cells } = DATA.grid;
  const box = h("div", { id, class: "chart", tabindex: "0", role: "application" });
  const said = h("p", { class: "hidden", role: "status", "aria-live": "polite" });
  const legend = h("div");
  const element = h("div", { class: "mapped" }, legend, h("div", { class: "scroll" }, box), said);
  let chart = null, shown = null, at = -1, last = "", ends = [0, 0];

  /** How it is laid out: sizes in pixels, the names across and down, and whether it is `turned`, layers down the page. */
  function size() {
    const width = element.clientWidth || 600;
    const least = longest(columns) > 3 ? 16 : narrow() ? 14 : 9;
    const labels = Math.min(longest(rows) * LETTER + 14, narrow() ? 130 : 250);
    const turned = columns.length > rows.length && labels + 12 + least * columns.length > width;
    const made = turned ? turnedSize(width) : uprightSize(width, labels, least);
    box.style.width = `${made.labels + 12 + made.across * made.xs.length}px`;
    box.style.height = `${made.above + made.down * made.ys.length + made.below}px`;
    box.classList.toggle("turned", turned);
    return { turned, ...made };
  }

  function uprightSize(width, labels, least) {
    const tilted = longest(columns) > 3;
    const across = Math.min(WIDEST, Math.max((width - labels - 12) / columns.length, least));
    const down = Math.min(34, Math.max(18, Math.max(420, across * rows.length) / rows.length));
    return { xs: columns, ys: rows, labels, across, down, tilted, above: 8, below: tilted ? 26 + 6.2 * longest(columns) : 44 };
  }

  function turnedSize(width) {
    const xs = shortest(rows), labels = Math.min(longest(columns) * LETTER + 16, 130);
    const across = Math.min(WIDEST, Math.max((width - labels - 12) / xs.length, 14));
    const tilted = longest(xs) * LETTER + 6 > across;
    return { xs, ys: columns, labels, across, down: 15, tilted, above: (tilted ? longest(xs) * LETTER : 12) + 14, below: 8 };
  }

  function tip(name) {
    const value = shown.values.get(name);
    return h("div", { class: "tip" }, h("strong", {}, shortName(name)), h("div", {}, `${shown.label}: `, h("b", {}, known(value) ? shown.show(value) : "no value")), shown.more ? shown.more(name) : null);
  }

  function draw() {
    if (!shown) return;
    const { turned, xs, ys, labels, above, below, across, tilted } = size();
    const stops = shown.signed ? PUOR : CIVIDIS;
    const grow = shown.high - shown.low || 1;
    const places = DATA.names.map((name, index) => ({ name, index })).filter(({ name }) => shown.values.has(name));
    const data = places.map(({ name, index }) => {
      const place = turned ? cells[index] : [...cells[index]].reverse(), value = shown.values.get(name);
      if (!known(value)) return { name, value: [...place, 0], visualMap: false, itemStyle: { color: css("--none") }, label: { show: false } };
      const colour = mixed(stops, (value - shown.low) / grow);
      return { name, value: [...place, value], label: { color: inkOn(colour) } };
    });
    const room = across >= 6.4 * longest(data.map(item => shown.show(item.value[2]))) + 8; // for every number, or for none
    const text = { color: css("--quiet"), fontSize: 11, fontFamily: css("--mono") };
    const axis = { type: "category", axisTick: { show: false }, axisLine: { show: false } };
    const layer = { name: "layer", nameTextStyle: { color: css("--quiet"), fontFamily: css("--sans"), align: turned ? "right" : "center" } };
    chart ??= echarts.init(box, null, { renderer: "svg" });
    chart.resize();
    chart.setOption({
      animation: false,
      aria: { enabled: true, label: { description: `${shown.label} of ${places.length} modules by layer. Arrow keys move from cell to cell, Enter opens one.` } },
      grid: { left: labels, right: 12, top: above, bottom: below },
      tooltip: { confine: true, backgroundColor: css("--raised"), borderColor: css("--line-soft"), textStyle: { color: css("--ink"), fontSize: 13, fontFamily: css("--sans") }, formatter: item => tip(item.data.name) },
      xAxis: { ...axis, data: xs, position: turned ? "top" : "bottom", ...(turned ? {} : { ...layer, nameLocation: "middle", nameGap: below - 18 }),
        axisLabel: { ...text, rotate: tilted ? 90 : 0, interval: across < 16 && !tilted ? "auto" : 0 } },
      yAxis: { ...axis, data: ys, inverse: true, ...(turned ? { ...layer, nameLocation: "start", nameGap: 6 } : {}),
        axisLabel: { ...text, interval: 0, formatter: name => { const room = Math.floor((labels - 14) / LETTER); return name.length > room ? `…${name.slice(1 - room)}` : name; } } },
      visualMap: { show: false, type: "continuous", min: shown.low, max: shown.high, inRange: { color: stops }, dimension: 2 },
      series: [{ type: "heatmap", data, label: { show: room, fontSize: 11, fontFamily: css("--sans"), formatter: item => shown.show(item.data.value[2]) },
        itemStyle: { borderColor: css("--page"), borderWidth: across < 20 ? 1 : 2, borderRadius: 2 }, emphasis: { itemStyle: { borderColor: css("--ink"), borderWidth: 2 } } }],
    }, true);
    chart.off("click");
    chart.on("click", item => open(item.data.name));
    legend.replaceChildren(scale(stops, shown.show(shown.low), shown.show(shown.high)));
    last = `${element.clientWidth}`;
    ends = [xs.length, ys.length];
  }

  function go(event) {
    const data = chart?.getOption().series[0].data ?? [];
    const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (event.key === "Enter" && at >= 0) {
      event.preventDefault(); // else the same key presses the button that the dialog gives the focus to
      return open(data[at].name);
    }
    if (!step || !data.length) return undefined;
    event.preventDefault();
    const [x, y] = at < 0 ? [step[0] < 0 ? ends[0] : -1, step[1] < 0 ? ends[1] - 1 : 0] : data[at].value;
    const along = step[0] ? 0 : 1, here = [x, y];
    const ahead = data.map((item, index) => ({ index, value: item.value })).filter(({ value }) => (value[along] - here[along]) * (step[along] || 1) > 0 || (at < 0 && along === 1));
    ahead.sort((one, other) => (Math.abs(one.value[1 - along] - here[1 - along]) * 1000 + Math.abs(one.value[along] - here[along])) - (Math.abs(other.value[1 - along] - here[1 - along]) * 1000 + Math.abs(other.value[along] - here[along])));
    if (!ahead.length) return undefined;
    chart.dispatchAction({ type: "downplay", seriesIndex: 0 });
    at = ahead[0].index;
    chart.dispatchAction({ type: "highlight", seriesIndex: 0, dataIndex: at });
    chart.dispatchAction({ type: "showTip", seriesIndex: 0, dataIndex: at });
    said.textContent = tip(data[at].name).textContent;
    return undefined;
  }

  box.addEventListener("keydown", go);
  box.addEventListener("blur", () => { at = -1; chart?.dispatchAction({ type: "hideTip" }); chart?.dispatchAction({ type: "downplay", seriesIndex: 0 }); });
  new ResizeObserver(() => { if (last !== `${element.clientWidth}`) draw(); }).observe(element);
  return { element, set(next) { shown = next; at = -1; box.setAttribute("aria-label", `Map of ${next.label}`); redrawnOnce(draw); } };

  function longest(names) { return Math.max(0, ...names.map(name => name.length)); }

  /** Names by their last components, where these tell them apart. */
  function shortest(names) {
    const ends = names.map(name => name.split(".").at(-1));
    return new Set(ends).size === names.length ? ends : names;
  }

  function redrawnOnce(again) { if (drawn.includes(again)) again(); else redrawn(again); }
}
