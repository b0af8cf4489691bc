// Several adapters, two at a time: the cosine of every two, and one pair module by module.

const PAIR_MEASURES = [
  ["cosine", "Cosine of the changes", true], ["column_overlap", "Overlap of what they write (columns)", false],
  ["row_overlap", "Overlap of what they read (rows)", false],
];
const PAIR_COLUMNS = [
  { key: "name", title: "Module", text: true, value: row => row.name, show: row => broken(shortName(row.name)) },
  ...[["cosine", "Cosine", share], ["relative_distance", "Distance/‖a‖", even], ["column_overlap", "Columns", share], ["row_overlap", "Rows", share],
    ["norm_a", "‖a‖", even], ["norm_b", "‖b‖", even], ["magnitude_distance", "Magnitudes", even]]
    .map(([key, title, said]) => ({ key, title, value: row => row[key], show: row => said(row[key]) })),
];

function compare() {
  if (!DATA.pairs.length) return;
  byId("compare").hidden = false;
  let pair = DATA.pairs[0], measure = PAIR_MEASURES[0];
  const map = heatmap("pair-heatmap", name => detail(name, inOrder(pair.modules).map(row => row.name), pair));
  const table = sortable("pair-table", "Modules that both change", PAIR_COLUMNS, row => detail(row.name, table.names(), pair));
  const told = h("div", { class: "told-pair" });
  const label = index => DATA.adapters[index].label;
  const choose = chooser("pair", "Pair", DATA.pairs.map((each, index) => [index, `${label(each.a)} and ${label(each.b)}`]), index => { pair = DATA.pairs[index]; show(); });
  const bar = h("div", { class: "bar" });
  byId("compare").append(DATA.adapters.length > 2 ? matrix() : "", bar, told, map.element, table.element);

  function matrix() {
    const of = (a, b) => a === b ? 1 : DATA.pairs.find(each => each.a === Math.min(a, b) && each.b === Math.max(a, b)).total.cosine;
    return h("div", { class: "scroll" }, h("table", { class: "matrix" }, h("caption", {}, "Cosine of all changes"),
      h("thead", {}, h("tr", {}, h("td"), DATA.adapters.map(one => h("th", { scope: "col" }, one.label)))),
      h("tbody", {}, DATA.adapters.map((one, a) => h("tr", {}, h("th", { scope: "row" }, one.label), DATA.adapters.map((_, b) => {
        const value = of(a, b), ground = mixed(PUOR, ((value ?? 0) + 1) / 2);
        return h("td", { style: known(value) ? `background: ${rgb(ground)}; color: ${inkOn(ground)}` : null }, share(value, 2));
      }))))));
  }

  function show() {
    const total = pair.total;
    const some = PAIR_MEASURES.filter(([key]) => pair.modules.some(row => known(row[key])));
    measure = some.includes(measure) ? measure : some[0] ?? PAIR_MEASURES[0];
    const colour = chooser("pair-measure", "Colour", some, key => { measure = PAIR_MEASURES.find(each => each[0] === key); paint(); });
    bar.replaceChildren(...[DATA.pairs.length > 1 ? choose : null, some.length ? colour : null].filter(Boolean));
    if (some.length) byId("pair-measure").value = measure[0];
    told.replaceChildren(h("p", { class: "quiet" }, `a is ${label(pair.a)}, b is ${label(pair.b)}.`), facts([
      ["Modules in both", count(total.modules)], ["Cosine", share(total.cosine)], ["Distance / ‖a‖", even(total.relative_distance)],
      known(total.column_overlap) && ["Overlap of columns", share(total.column_overlap)], known(total.row_overlap) && ["Overlap of rows", share(total.row_overlap)],
      [`Only in ${label(pair.a)}`, count(pair.only_a)], [`Only in ${label(pair.b)}`, count(pair.only_b)],
      pair.others.length && ["Biases and saved tensors", `${pair.others.filter(row => row.equal).length} of ${pair.others.length} equal`],
    ], "tiles"), warnings([...pair.notes, ...pair.incomparable.map(row => `${shortName(row.name)}: ${row.reason}`)]) ?? "");
    table.set(inOrder(pair.modules));
    paint();
  }

  function paint() {
    map.element.hidden = table.element.hidden = !pair.modules.length;
    const [key, text, signed] = measure;
    if (pair.modules.length) map.set({ label: text, values: new Map(pair.modules.map(row => [row.name, row[key]])), low: signed ? -1 : 0, high: 1, signed, show: value => share(value, 2) });
  }

  show();
}
