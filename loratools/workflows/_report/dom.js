// Elements, numbers and the page's data. Text goes in as text alone: nothing here or elsewhere sets innerHTML.

const DATA = JSON.parse(document.getElementById("data").textContent);

/** An element: attributes by name, `on…` as listeners; children are elements or text, null is left out. */
function h(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.flat().filter(child => child !== null && child !== undefined && child !== false).map(child => child instanceof Node ? child : String(child)));
  return made;
}

const byId = id => document.getElementById(id);
const known = value => value !== null && value !== undefined;
const narrow = () => window.matchMedia("(max-width: 600px)").matches;
const shortName = name => name.replace(/\.weight$/, "");

/** A number with the digits that matter; a dash for none. */
function number(value, digits = 3) {
  if (!known(value)) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e6 || size < 1e-4) return value.toExponential(digits - 1).replace("e+", "e");
  return size >= 10 ** digits ? String(Math.round(value)) : String(Number(value.toPrecision(digits)));
}

/** The same with all of its digits, so that a column of them is even: 3.60 beside 3.75. */
function even(value, digits = 3) {
  if (!known(value) || value === 0) return number(value);
  const size = Math.abs(value);
  return size >= 10 ** digits || size < 1e-3 ? number(value, digits) : value.toPrecision(digits);
}

/** A cosine or an overlap: so many places after the point, and no sign of a zero. */
const share = (value, places = 3) => known(value) ? value.toFixed(places).replace(/^-(0\.0*)$/, "$1") : "–";
const count = value => known(value) ? value.toLocaleString("en") : "–";
const many = (value, one) => `${count(value)} ${one}${value === 1 ? "" : "s"}`;
const percent = value => known(value) ? `${even(100 * value)} %` : "–";
const shape = value => value && value.length ? value.join(" × ") : "–";

function bytes(value) {
  const power = Math.min(4, Math.max(0, Math.floor(Math.log10(Math.max(value, 1)) / 3)));
  return `${number(value / 1000 ** power)} ${["B", "kB", "MB", "GB", "TB"][power]}`;
}

/** "3" for equal numbers, else "2 to 8". */
function span(values, show = number) {
  const some = values.filter(known);
  if (!some.length) return "–";
  const [least, most] = [Math.min(...some), Math.max(...some)];
  return least === most ? show(least) : `${show(least)} to ${show(most)}`;
}

function median(values) {
  const some = values.filter(known).sort((a, b) => a - b);
  return some.length ? (some[(some.length - 1) >> 1] + some[some.length >> 1]) / 2 : null;
}

/** A name that may break after each of its dots. */
const broken = name => name.split(/(?<=\.)/).flatMap((part, index) => index ? [h("wbr"), part] : [part]);

/** Values in the order in which the page lists modules. */
function inOrder(rows) {
  const place = new Map(DATA.names.map((name, index) => [name, index]));
  return [...rows].sort((a, b) => place.get(a.name) - place.get(b.name));
}

/** A select with its label; `change` is told the chosen value. */
function chooser(id, label, options, change) {
  const select = h("select", { id, onchange: () => change(select.value) }, options.map(([value, text]) => h("option", { value }, text)));
  return h("label", { class: "field" }, h("span", {}, label), select);
}

/** Terms and what is said of them. */
function facts(pairs, kind = "facts") {
  return h("dl", { class: kind }, pairs.filter(pair => pair && known(pair[1])).map(([term, said]) => h("div", {}, h("dt", {}, term), h("dd", {}, said))));
}
