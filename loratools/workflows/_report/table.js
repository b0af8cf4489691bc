// A table whose rows are sorted by any column and filtered by words: buttons and a search field, so that keys do all of it.

/**
 * Columns: {key, title, hint, value(row), show(row), text: true for words, bar: true for a bar behind the number}.
 * `open(row)` is called for the row whose name is pressed. Returns {element, set(rows), names()}, the names in the order shown.
 */
function sortable(id, caption, columns, open) {
  let rows = [], sorted = { key: null, down: false }, words = [];
  const body = h("tbody");
  const told = h("p", { class: "quiet told", role: "status", "aria-live": "polite" });
  const search = h("input", { type: "search", id: `${id}-filter`, placeholder: "attn q_proj …", autocomplete: "off", spellcheck: "false",
    oninput: () => { words = search.value.toLowerCase().split(/\s+/).filter(Boolean); fill(); } });
  const heads = new Map();
  const head = h("thead");
  const table = h("table", { id, class: "sortable" }, h("caption", { class: "hidden" }, caption), head, body);

  function by(key) {
    const text = columns.find(column => column.key === key).text;
    sorted = sorted.key === key ? { key, down: !sorted.down } : { key, down: !text }; // the largest number is what one looks for
    fill();
  }

  function arranged() {
    const found = rows.filter(row => words.every(word => `${row.name} ${row.kind ?? ""} ${row.dtype ?? ""}`.toLowerCase().includes(word)));
    const column = columns.find(one => one.key === sorted.key);
    if (!column) return found;
    const order = (a, b) => typeof a === "string" ? a.localeCompare(b, "en", { numeric: true }) : a - b;
    return [...found].sort((one, other) => {
      const [a, b] = [column.value(one), column.value(other)];
      if (!known(a) || !known(b)) return known(b) - known(a); // what has no value is last either way
      return sorted.down ? order(b, a) : order(a, b);
    });
  }

  function fill() {
    const shown = columns.filter(column => column.text || rows.some(row => known(column.value(row))));
    const most = new Map(shown.filter(column => column.bar).map(column => [column.key, Math.max(...rows.map(row => Math.abs(column.value(row) ?? 0)))]));
    const focused = document.activeElement?.dataset?.sort;
    head.replaceChildren(h("tr", {}, shown.map(column => {
      const way = sorted.key !== column.key ? "none" : sorted.down ? "descending" : "ascending";
      const button = h("button", { type: "button", "data-sort": column.key, title: column.hint, onclick: () => by(column.key) },
        column.title, h("span", { class: "way", "aria-hidden": "true" }, way === "none" ? "" : way === "ascending" ? " ▲" : " ▼"));
      heads.set(column.key, button);
      return h("th", { scope: "col", "aria-sort": way, class: column.text ? null : "number" }, button);
    })));
    if (focused && head.contains(heads.get(focused))) heads.get(focused).focus();
    const found = arranged();
    body.replaceChildren(...found.map(row => h("tr", { "data-name": row.name }, shown.map((column, place) => {
      const said = column.show(row);
      if (!place) return h("th", { scope: "row" }, h("button", { type: "button", class: "open", onclick: () => open(row) }, said));
      const share = most.get(column.key) ? Math.abs(column.value(row) ?? 0) / most.get(column.key) : null;
      return h("td", { class: column.text ? null : "number", style: share === null ? null : `--share: ${(100 * share).toFixed(1)}%` }, said);
    }))));
    if (!found.length) body.append(h("tr", {}, h("td", { colspan: shown.length, class: "quiet" }, "No module has all of these words in its name, kind or dtype.")));
    told.textContent = found.length === rows.length ? many(rows.length, "module") : `${count(found.length)} of ${many(rows.length, "module")}`;
  }

  const element = h("div", { class: "tabled" },
    h("div", { class: "bar" }, h("label", { class: "field grow" }, h("span", {}, "Filter"), search), told),
    h("div", { class: "scroll tall", tabindex: "0", role: "region", "aria-label": caption }, table));
  return { element, set(next) { rows = next; fill(); }, names: () => arranged().map(row => row.name) };
}
