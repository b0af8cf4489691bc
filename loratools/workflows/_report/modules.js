// The map and the table of one adapter's modules, and which adapter that is where there are several.

const MEASURES = [
  ["share", "‖ΔW‖ / ‖W‖", row => row.share, percent], ["norm", "‖ΔW‖", row => row.norm, even],
  ["effective_rank", "Effective rank", row => row.effective_rank, even], ["sigma", "Largest singular value", row => row.sigma?.[0], even],
  ["rank", "Rank", row => row.rank, number], ["scaling", "Scaling", row => row.scaling, number],
];

const COLUMNS = [
  { key: "name", title: "Module", text: true, value: row => row.name, show: row => broken(shortName(row.name)) },
  { key: "kind", title: "Kind", text: true, value: row => row.kind, show: row => row.kind },
  { key: "shape", title: "Shape", hint: "Sorted by elements", value: row => row.shape.length ? row.shape.reduce((all, one) => all * one, 1) : null, show: row => shape(row.shape) },
  { key: "rank", title: "Rank", value: row => row.rank, show: row => number(row.rank) },
  { key: "effective_rank", title: "Eff. rank", hint: "exp of the entropy of σ²: how many equal singular values would spread as widely", bar: true, value: row => row.effective_rank, show: row => even(row.effective_rank) },
  { key: "norm", title: "‖ΔW‖", bar: true, value: row => row.norm, show: row => even(row.norm) },
  { key: "share", title: "‖ΔW‖/‖W‖", bar: true, value: row => row.share, show: row => percent(row.share) },
  { key: "sigma", title: "σ max", value: row => row.sigma?.[0], show: row => even(row.sigma?.[0]) },
  { key: "drift", title: "Drift", hint: "DoRA: median of m / ‖W‖ − 1", value: row => row.magnitudes?.drift?.median, show: row => percent(row.magnitudes?.drift?.median) },
  { key: "alpha", title: "Alpha", value: row => row.alpha, show: row => number(row.alpha) },
  { key: "scaling", title: "Scaling", value: row => row.scaling, show: row => number(row.scaling) },
  { key: "dtype", title: "Dtype", text: true, value: row => row.dtype, show: row => row.dtype },
  { key: "parameters", title: "Parameters", value: row => row.parameters, show: row => count(row.parameters) },
];

function modules() {
  let one = DATA.adapters[0], measure = null;
  const map = heatmap("heatmap", name => detail(name));
  const table = sortable("module-table", "Modules, a row each", COLUMNS, row => detail(row.name, table.names()));
  const bar = h("div", { class: "bar" });
  byId("map").append(bar, map.element);
  byId("modules").append(table.element);

  function show() {
    const some = MEASURES.filter(([, , pick]) => one.modules.some(row => known(pick(row))));
    measure = some.find(([key]) => key === measure?.[0]) ?? some[0];
    bar.replaceChildren(...[
      DATA.adapters.length > 1 ? chooser("adapter", "Adapter", DATA.adapters.map((each, index) => [index, each.label]), index => { one = DATA.adapters[index]; show(); }) : null,
      some.length ? chooser("measure", "Colour", some.map(([key, label]) => [key, label]), key => { measure = MEASURES.find(each => each[0] === key); paint(); }) : null,
    ].filter(Boolean));
    if (byId("adapter")) byId("adapter").value = DATA.adapters.indexOf(one);
    if (measure) byId("measure").value = measure[0];
    table.set(inOrder(one.modules));
    if (measure) paint();
  }

  function paint() {
    const [, label, pick, shown] = measure;
    const values = new Map(one.modules.map(row => [row.name, pick(row) ?? null]));
    const some = [...values.values()].filter(known);
    map.set({ label, values, low: Math.min(0, ...some), high: Math.max(...some), signed: false, show: shown });
  }

  show();
}
