// How numbers and sizes are written and coloured, everywhere on the page.

export const millions = (n) => (n >= 1e9 ? `${(n / 1e9).toFixed(2)} B` : `${(n / 1e6).toFixed(n < 1e7 ? 1 : 0)} M`);
export const megabytes = (n) => (n >= 1e9 ? `${(n / 1e9).toFixed(2)} GB` : `${(n / 1e6).toFixed(n < 1e7 ? 1 : 0)} MB`);
export const ms = (n) => (n >= 1000 ? `${(n / 1000).toFixed(n >= 10000 ? 1 : 2)} s` : `${n.toFixed(0)} ms`);
export const percent = (x) => `${(100 * x).toFixed(x >= 0.995 || x < 0.1 ? 0 : 1)} %`;
export const plural = (n, word) => `${n} ${word}${n === 1 ? "" : "s"}`;

// From amber (student) through green and teal to violet (teacher): lightness falls steadily, so the order survives
// colour blindness and greyscale.
const STOPS = [[255, 183, 51], [120, 190, 80], [33, 145, 140], [49, 104, 176], [104, 74, 190]];

export function colour(fraction) {
  const x = Math.min(Math.max(fraction, 0), 1) * (STOPS.length - 1);
  const i = Math.min(Math.floor(x), STOPS.length - 2);
  const mix = STOPS[i].map((a, c) => Math.round(a + (STOPS[i + 1][c] - a) * (x - i)));
  return `rgb(${mix.join(",")})`;
}

export const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

export function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

export function svgElement(tag, attributes = {}) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
}

export function swatch(fraction) {
  const node = element("span", { class: "swatch", "aria-hidden": "true" });
  node.style.background = colour(fraction); // set through the DOM: allowed by the content security policy
  return node;
}

export const facts = (rows) => rows.map(([name, value, more]) =>
  element("div", {}, element("dt", {}, name), element("dd", {}, value, ...(more ? [element("small", {}, more)] : []))));

// Why a size was given, as the server names it, in a sentence.
const REASONS = {
  requested: "as asked for", default: "the server's usual size", auto: "the best there is: nothing stood against it",
  slo_ttft: "a larger one would be late with the first word", slo_tpot: "a larger one would be too slow for each token",
  slo_e2e: "a larger one would not finish in time", kv_pressure: "memory for texts is short", load: "others are being served",
  floor: "the smallest allowed: even this may miss a limit", memory_budget: "the largest within the memory limit",
  kv_capacity: "a larger one has no room for this text", tenant_ceiling: "the largest that this key may use",
};
export const reasonOf = (reason) => REASONS[reason] ?? reason;
