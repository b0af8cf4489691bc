// One module by itself: what each adapter does to it, and the singular values of its changes.

const charts = new WeakMap(); // of each box, which is made anew with the dialog
let lineUp = [], current = null, picked = null, logarithmic = true;

/** Open the dialog for a module; `names` are those that "next" and "previous" lead to, `pair` two adapters compared. */
function detail(name, names = DATA.names, pair = null) {
  lineUp = names.includes(name) ? names : DATA.names;
  current = name;
  picked = pair;
  const dialog = byId("detail");
  fillDetail();
  if (!dialog.open) dialog.showModal();
  drawSpectra();
}

function fillDetail() {
  const holders = DATA.adapters.map((one, index) => ({ one, index, row: one.modules.find(row => row.name === current) })).filter(each => each.row);
  const at = lineUp.indexOf(current);
  const to = (step, text) => h("button", { type: "button", disabled: !lineUp[at + step], onclick: () => detail(lineUp[at + step], lineUp, picked) }, text);
  const met = picked?.modules.find(row => row.name === current);
  byId("detail").replaceChildren(
    h("div", { class: "dialog-head" }, h("h2", { id: "detail-title" }, broken(shortName(current))),
      h("div", { class: "buttons" }, to(-1, "Previous"), to(1, "Next"), h("button", { type: "button", class: "close", onclick: () => byId("detail").close() }, "Close"))),
    holders.some(({ row }) => row.sigma) ? h("label", { class: "check" }, h("input", { type: "checkbox", checked: logarithmic, onchange: event => { logarithmic = event.target.checked; drawSpectra(); } }), "Logarithmic scale") : null,
    h("div", { id: "spectra", class: "chart" }),
    h("div", { class: "cards several" }, holders.map(({ one, index, row }) => h("article", { class: "card", style: `--line: ${lineColour(index)}` }, h("h3", {}, one.label), facts([
      ["Kind", row.kind], ["Shape", shape(row.shape)], ["Rank", row.rank], ["Alpha", known(row.alpha) ? number(row.alpha) : null], ["Scaling", known(row.scaling) ? number(row.scaling) : null],
      ["‖ΔW‖", number(row.norm)], ["‖ΔW‖ / ‖W‖", known(row.share) ? percent(row.share) : null], ["Effective rank", known(row.effective_rank) ? number(row.effective_rank) : null],
      ["Largest singular value", row.sigma ? number(row.sigma[0]) : null], ["Parameters", count(row.parameters)], ["Stored as", row.dtype],
      ["Magnitudes", row.magnitude ? `${number(row.magnitude.min)} to ${number(row.magnitude.max)}` : null],
      ["Magnitudes moved", row.magnitudes?.drift ? `${percent(row.magnitudes.drift.min)} to ${percent(row.magnitudes.drift.max)}` : null],
      ["Error of extraction", known(row.error) ? percent(row.error) : null], ["Least error at that rank", known(row.optimal_error) ? percent(row.optimal_error) : null],
      ["Not measured", row.why],
    ]), row.sigma ? h("details", {}, h("summary", {}, row.sigmas > row.sigma.length ? `The first ${row.sigma.length} of ${row.sigmas} singular values` : many(row.sigmas, "singular value")),
      h("p", { class: "numbers" }, row.sigma.map(value => number(value, 4)).join("  "))) : h("p", { class: "quiet" }, row.unseen ? `No singular values: ${row.unseen}.` : "No singular values."),
    row.direction && row.sigma ? h("p", { class: "quiet" }, "The singular values are those of its direction ΔV.") : null))),
    met ? facts([["Cosine", share(met.cosine)], ["Distance / ‖a‖", even(met.relative_distance)], ["Overlap of columns", known(met.column_overlap) ? share(met.column_overlap) : null], ["Overlap of rows", known(met.row_overlap) ? share(met.row_overlap) : null],
      ["Angles of columns (°)", met.column_angles.join("  ") || null], ["Angles of rows (°)", met.row_angles.join("  ") || null]]) : null);
}

function drawSpectra() {
  const box = byId("spectra");
  if (!box || !byId("detail").open) return;
  const lines = DATA.adapters.map((one, index) => ({ label: one.label, index, sigma: one.modules.find(row => row.name === current)?.sigma })).filter(line => line.sigma && line.sigma.length);
  box.hidden = !lines.length;
  if (!lines.length) return;
  const most = Math.max(...lines.map(line => line.sigma.length));
  const floor = Math.max(...lines.map(line => line.sigma[0])) * 1e-12; // what lies below is the rounding of zero, which a logarithm would show large
  const quiet = { color: css("--quiet"), fontSize: 12, fontFamily: css("--sans") };
  if (!charts.has(box)) charts.set(box, echarts.init(box, null, { renderer: "svg" }));
  const chart = charts.get(box);
  chart.setOption({
    animation: false,
    aria: { enabled: true, label: { description: `Singular values of the change of ${shortName(current)}, largest first. The numbers are below.` } },
    grid: { left: 52, right: 12, top: 14, bottom: 44 },
    tooltip: { trigger: "axis", confine: true, backgroundColor: css("--raised"), borderColor: css("--line-soft"), textStyle: { color: css("--ink"), fontFamily: css("--sans") },
      formatter: items => h("div", { class: "tip" }, h("strong", {}, `σ ${items[0].axisValue}`), items.map(item => h("div", {}, `${item.seriesName}: `, h("b", {}, number(item.data, 4))))) },
    xAxis: { type: "category", data: Array.from({ length: most }, (_, index) => String(index + 1)), name: "index", nameLocation: "middle", nameGap: 28, nameTextStyle: quiet, axisLabel: quiet, axisLine: { lineStyle: { color: css("--line-soft") } } },
    yAxis: { type: logarithmic ? "log" : "value", axisLabel: { ...quiet, formatter: value => number(value, 2) }, splitLine: { lineStyle: { color: css("--line-soft") } } },
    series: lines.map(({ label, index, sigma }) => ({ type: "line", name: label, data: sigma.map(value => logarithmic && value <= floor ? null : value), color: lineColour(index), symbol: MARKS[index % 8], symbolSize: 7, lineStyle: { width: 2 } })),
  }, true);
  chart.resize();
}
