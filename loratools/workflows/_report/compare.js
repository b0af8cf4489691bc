// Several adapters, two at a time: the cosine of every two, and one pair module by module.

const PAIR_MEASURES = [
  ["cosine", "Cosine of the changes", true], ["column_overlap", "Overlap of what they write (columns)", false],
  ["row_overlap", "Overlap of what they read (rows)", false],
];
const PAIR_COLUMNS = [
  { key: "name", title: "Module", text: true, value: row => row.name, show: row => shortName(row.name) },
  ...[["cosine", "Cosine"], ["relative_distance", "Distance/‖a‖"], ["column_overlap", "Columns"], ["row_overlap", "Rows"], ["norm_a", "‖a‖"], ["norm_b", "‖b‖"], ["magnitude_distance", "Magnitudes"]]
    .map(([key, title]) => ({ key, title, value: row => row[key], show: row => number(row[key]) })),
];

function compare() {
  if (!DATA.pairs.length) return;
  byId("compare").hidden = false;
  let pair = DATA.pairs[0], measure = PAIR_MEASURES[0];
  const map = heatmap("pair-heatmap", name => detail(name, pair.modules.map(row => row.name), pair));
  const table = sortable("pair-table", "Modules that both change", PAIR_COLUMNS, row => detail(row.name, pair.modules.map(each => each.name), pair));
  const told = h("div");
  const label = index => DATA.adapters[index].label;
  const choose = chooser("pair", "Pair", DATA.pairs.map((each, index) => [index, `${label(each.a)} and ${label(each.b)}`]), index => { pair = DATA.pairs[index]; show(); });
  const colour = chooser("pair-measure", "Colour", PAIR_MEASURES, key => { measure = PAIR_MEASURES.find(each => each[0] === key); paint(); });
  byId("compare").append(DATA.adapters.length > 2 ? matrix() : "", h("div", { class: "bar" }, choose, colour), told, map.element, table.element);

  function matrix() {
    const of = (a, b) => a === b ? 1 : DATA.pairs.find(each => each.a === Math.min(a, b) && each.b === Math.max(a, b)).total.cosine;
    return h("div", { class: "scroll" }, h("table", { class: "matrix" }, h("caption", {}, "Cosine of all changes"),
      h("thead", {}, h("tr", {}, h("td"), DATA.adapters.map(one => h("th", { scope: "col" }, one.label)))),
      h("tbody", {}, DATA.adapters.map((one, a) => h("tr", {}, h("th", { scope: "row" }, one.label), DATA.adapters.map((_, b) => {
        const value = of(a, b), ground = mixed(PUOR, ((value ?? 0) + 1) / 2);
        return h("td", { style: known(value) ? `background: ${rgb(ground)}; color: ${inkOn(ground)}` : null }, number(value));
      }))))));
  }

  function show() {
    const total = pair.total;
    told.replaceChildren(facts([
      ["Modules in both", count(total.modules)], ["Cosine", number(total.cosine)], ["Distance / ‖a‖", number(total.relative_distance)],
      ["Overlap of columns", number(total.column_overlap)], ["Overlap of rows", number(total.row_overlap)],
      [`Only in ${label(pair.a)}`, count(pair.only_a)], [`Only in ${label(pair.b)}`, count(pair.only_b)],
      pair.others.length && ["Biases and saved tensors", `${pair.others.filter(row => row.equal).length} of ${pair.others.length} equal`],
    ], "tiles"), warnings([...pair.notes, ...pair.incomparable.map(row => `${shortName(row.name)}: ${row.reason}`)]) ?? "");
    table.set(pair.modules);
    paint();
  }

  function paint() {
    map.element.hidden = !pair.modules.length;
    const [key, text, signed] = measure;
    if (pair.modules.length) map.set({ label: text, values: new Map(pair.modules.map(row => [row.name, row[key]])), low: signed ? -1 : 0, high: 1, signed, show: value => number(value, 2) });
  }

  show();
}
