// What stands above everything: a card for each adapter, with its warnings; below all, its receipts and what check found.

const SHOWN = 6; // warnings told at once

function summary() {
  const of = DATA.adapters;
  byId("title").textContent = of.map(one => one.label).join(" and ");
  byId("subtitle").textContent = [many(DATA.names.length, "module"), DATA.base ? `base ${DATA.base}` : "without its base"].join(" · ");
  byId("summary").append(h("div", { class: of.length > 1 ? "cards several" : "cards" }, of.map(card)));
  receipts();
  findings();
  byId("foot").append(`loratools ${DATA.loratools}. This page is complete in itself: it loads nothing and sends nothing. Charts: Apache ECharts, Apache License 2.0.`);
}

function card(one, index) {
  const rows = one.modules;
  const norms = rows.map(row => row.norm).filter(known);
  const alone = DATA.adapters.length === 1;
  return h("article", { class: "card", style: alone ? null : `--line: ${lineColour(index)}` },
    alone ? null : h("h3", {}, one.label),
    facts([
      ["Format", one.format], ["Kind", Object.keys(one.kinds).join(", ")], ["Modules", count(one.modules_total)],
      ["Parameters", count(one.parameters)], one.base_parameters && ["Of the base", `${number(one.trainable_percent)} %`],
      Object.keys(one.ranks).length && ["Rank", span(Object.keys(one.ranks).map(Number))],
      rows.some(row => known(row.alpha)) && ["Alpha", span(rows.map(row => row.alpha))],
      rows.some(row => known(row.scaling)) && ["Scaling", span(rows.map(row => row.scaling))],
      ["Stored as", [...new Set(rows.map(row => row.dtype))].join(", ")], ["On disk", bytes(one.bytes)],
      norms.length && ["‖ΔW‖, all", even(Math.sqrt(norms.reduce((sum, norm) => sum + norm * norm, 0)))],
      known(median(rows.map(row => row.share))) && ["Median ‖ΔW‖ / ‖W‖", percent(median(rows.map(row => row.share)))],
      known(median(rows.map(row => row.effective_rank))) && ["Median effective rank", even(median(rows.map(row => row.effective_rank)))],
    ], "tiles"),
    facts([["File", one.path], ["Base named", one.base_model || "not stated"]]),
    warnings([...new Set(one.warnings)]));
}

function warnings(texts) {
  if (!texts.length) return null;
  const list = some => h("ul", {}, some.map(text => h("li", {}, text)));
  return h("div", { class: "warnings" }, h("p", {}, h("strong", {}, many(texts.length, "note"))), list(texts.slice(0, SHOWN)),
    texts.length > SHOWN ? h("details", {}, h("summary", {}, `${texts.length - SHOWN} more`), list(texts.slice(SHOWN))) : null);
}

function receipts() {
  const with_ = DATA.adapters.filter(one => one.receipts.length);
  byId("receipts").hidden = !with_.length;
  for (const one of with_) for (const made of [...one.receipts].reverse()) byId("receipts").append(h("details", { class: "fold", open: one.receipts.length === 1 },
    h("summary", {}, `${one.label}: ${made.operation}`),
    facts([
      ["loratools", made.loratools], known(made.applied) && ["Applied", `${count(made.applied)} of ${count(made.expected)}`],
      ["Left out", (made.left_out || []).length || null], ["Seconds", known(made.seconds) ? number(made.seconds) : null],
      ["Options", Object.entries(made.arguments || {}).filter(([, value]) => known(value) && value !== false && !(Array.isArray(value) && !value.length))
        .map(([name, value]) => `${name} ${typeof value === "object" ? JSON.stringify(value) : value}`).join(", ")],
    ]),
    (made.notes || []).length ? h("ul", {}, made.notes.map(note => h("li", {}, note))) : null,
    (made.inputs || []).length ? h("div", { class: "scroll" }, h("table", { class: "plain" },
      h("caption", {}, "What went in"), h("thead", {}, h("tr", {}, ["Role", "Path", "Bytes", "BLAKE3"].map(text => h("th", { scope: "col", class: text === "Bytes" ? "number" : null }, text)))),
      h("tbody", {}, made.inputs.map(row => h("tr", {}, [[row.role], [row.path, "mono"], [count(row.bytes), "number"], [row.blake3, "mono"]].map(([text, kind]) => h("td", { class: kind }, text ?? "–"))))))) : null));
}

function findings() {
  const some = DATA.adapters.filter(one => one.findings.length);
  byId("findings").hidden = !some.length;
  for (const one of some) {
    if (some.length > 1) byId("findings").append(h("h3", {}, one.label));
    byId("findings").append(h("div", { class: "targets" }, one.findings.map(target)));
  }
}

function target(row) {
  const clean = !row.failed && !row.findings.length;
  const state = row.failed ? "not looked at" : clean ? "nothing found" : many(row.findings.length, "finding");
  const head = [h("span", { class: clean ? "mark good" : "mark odd", "aria-hidden": "true" }, clean ? "✓" : "!"), h("strong", {}, row.title), h("span", { class: "quiet state" }, state)];
  if (clean) return h("div", { class: "target" }, h("div", { class: "line" }, head));
  return h("details", { class: "target" }, h("summary", { class: "line" }, head), row.failed ? h("p", {}, row.failed) : h("ul", {}, row.findings.map(found =>
    h("li", {}, h("strong", {}, found.kind), " ", h("code", {}, shortName(found.tensor)), ": ", found.reason,
      known(found.found) ? ` (found ${found.found})` : "", known(found.share) ? `; ${percent(found.share)} of the change` : "",
      found.fit ? h("div", { class: "quiet" }, `fit: ${found.fit}`) : null))));
}
