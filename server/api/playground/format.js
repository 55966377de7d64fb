// How numbers and sizes are written and coloured, everywhere on the page.

export const millions = (n) => (n >= 1e9 ? `${(n / 1e9).toFixed(2)}B` : `${(n / 1e6).toFixed(n < 1e7 ? 1 : 0)}M`);
export const mib = (n) => (n >= 2 ** 30 ? `${(n / 2 ** 30).toFixed(2)} GiB` : `${(n / 2 ** 20).toFixed(n < 2 ** 23 ? 1 : 0)} MiB`);
export const ms = (n) => (n >= 1000 ? `${(n / 1000).toFixed(n >= 10000 ? 1 : 2)} s` : `${n.toFixed(0)} ms`);
export const percent = (x) => `${(100 * x).toFixed(x >= 0.995 || x < 0.1 ? 0 : 1)} %`;

// From amber (student) through green and teal to violet (teacher): lightness falls steadily, so the order survives
// colour blindness and greyscale.
const STOPS = [[255, 183, 51], [120, 190, 80], [33, 145, 140], [49, 104, 176], [104, 74, 190]];

export function colour(fraction) {
  const x = Math.min(Math.max(fraction, 0), 1) * (STOPS.length - 1);
  const i = Math.min(Math.floor(x), STOPS.length - 2);
  const mix = STOPS[i].map((a, c) => Math.round(a + (STOPS[i + 1][c] - a) * (x - i)));
  return `rgb(${mix.join(",")})`;
}

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

// What was measured of a size, as far as it was: [main figure, its meaning, a second figure].
export function qualityOf(card) {
  const quality = card?.quality ?? {};
  const kl = typeof quality.kl === "number" ? `KL ${quality.kl.toFixed(2)}` : "";
  const top1 = quality.top1_agreement ?? quality.top1;
  if (typeof top1 === "number") return [percent(top1), "next token as the teacher's", kl];
  const perplexity = quality.perplexity ?? quality.ppl;
  if (typeof perplexity === "number") return [perplexity.toFixed(2), "perplexity", kl];
  return kl ? [kl, "to the teacher", ""] : ["–", "not measured", ""];
}
