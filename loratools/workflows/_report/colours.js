// Colours that people who see few can tell apart: cividis (Nuñez, Anderton, Renslow 2018) and, where a number has a sign,
// ColorBrewer's PuOr; lines in those of Okabe and Ito (2008), each with a mark of its own besides.

const CIVIDIS = ["#00224e", "#123570", "#3b496c", "#575d6d", "#707173", "#8a8678", "#a59c74", "#c3b369", "#e1cc55", "#fee838"];
const PUOR = ["#542788", "#8073ac", "#b2abd2", "#d8daeb", "#f7f7f7", "#fee0b6", "#fdb863", "#e08214", "#b35806"];
const LINES = {
  light: ["#0072b2", "#c04a00", "#00795a", "#a34a7f", "#8a6d00", "#2c7fb0", "#4d4d4d", "#7a3db8"],
  dark: ["#56b4e9", "#e69f00", "#2fc39a", "#e59bc5", "#f0e442", "#8fc7ff", "#c9c9c9", "#c8a2ff"],
};
const MARKS = ["circle", "triangle", "rect", "diamond", "pin", "arrow", "roundRect", "circle"];
const DARK = window.matchMedia("(prefers-color-scheme: dark)");

const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const lineColour = index => LINES[DARK.matches ? "dark" : "light"][index % 8];

/** The colour of a share of a scale, between its stops. */
function mixed(stops, share) {
  const at = Math.min(Math.max(share, 0), 1) * (stops.length - 1);
  const low = Math.min(Math.floor(at), stops.length - 2);
  const part = (hex, place) => parseInt(hex.slice(1 + 2 * place, 3 + 2 * place), 16);
  return [0, 1, 2].map(place => Math.round(part(stops[low], place) + (at - low) * (part(stops[low + 1], place) - part(stops[low], place))));
}

const rgb = colour => `rgb(${colour.join(", ")})`;

/** Black or white, whichever is read more easily on a colour (WCAG's relative luminance). */
function inkOn(colour) {
  const [red, green, blue] = colour.map(value => value / 255).map(value => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
  return 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.179 ? "#000" : "#fff";
}

/** A legend: the stops as a bar, least and most beside it. */
function scale(stops, least, most) {
  return h("div", { class: "scale" }, h("span", {}, least),
    h("span", { class: "ramp", style: `background: linear-gradient(to right, ${stops.join(", ")})`, "aria-hidden": "true" }), h("span", {}, most));
}

/** Draw now, and again whenever the page turns dark or light; charts take their size from their element. */
const drawn = [];
function redrawn(draw) {
  drawn.push(draw);
  draw();
}
DARK.addEventListener("change", () => drawn.forEach(draw => draw()));
