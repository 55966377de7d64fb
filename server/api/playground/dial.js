// The dial: one slider over all sizes, what the chosen size is made of, what it costs and what it is worth.

import { colour, element, mib, millions, percent, qualityOf, svgElement, swatch } from "./format.js";

const $ = (id) => document.getElementById(id);

export class Dial {
  constructor() {
    this.cards = [];
    this.stations = []; // {start, stop, threshold}, from the student's point of view
    this.chosen = new Set();
    $("size").addEventListener("input", () => this.show());
    $("add").addEventListener("click", () => this.toggle(this.current.layers, true));
    new ResizeObserver(() => this.cards.length && this.show()).observe($("strip"));
  }

  get current() { return this.cards[$("size").value]; }

  // Where a size lies between student and teacher, 0 to 1: its colour everywhere on this page.
  place(layers) {
    const low = this.cards[0].layers, high = this.cards.at(-1).layers;
    return high > low ? (layers - low) / (high - low) : 1;
  }

  card(layers) { return this.cards.find((card) => card.layers === layers); }

  set(cards, stations) {
    [this.cards, this.stations] = [cards, stations];
    $("size").max = cards.length - 1;
    $("size").value = cards.length - 1;
    this.chosen = new Set([cards[0], cards[Math.floor(cards.length / 2)], cards.at(-1)].map((card) => card.layers));
    this.show();
    this.showChips();
  }

  toggle(layers, isIn) {
    if (isIn) this.chosen.add(layers);
    else this.chosen.delete(layers);
    this.showChips();
    this.drawCurve();
  }

  show() {
    const card = this.current;
    const share = `${percent(card.fraction)} of the teacher`;
    const [quality, meaning, second] = qualityOf(card);
    $("size-name").replaceChildren(swatch(this.place(card.layers)), `${card.layers} layers`, element("small", {}, share));
    const facts = [
      ["Parameters", millions(card.parameters), ""], ["Weights", mib(card.bytes), ""],
      ["KV per token", `${(card.kv_bytes_per_token / 1024).toFixed(1)} KiB`, ""], ["Quality", quality, `${meaning}${second && `, ${second}`}`],
    ];
    $("size-facts").replaceChildren(...facts.map(([name, value, more]) =>
      element("div", {}, element("dt", {}, name), element("dd", {}, value, ...(more ? [element("small", {}, more)] : [])))));
    $("size").setAttribute("aria-valuetext", `${card.layers} layers, ${share}`);
    $("size").style.accentColor = colour(this.place(card.layers));
    drawStrip($("strip"), this.stations, card.layers);
    const whole = this.stations.filter((station) => station.threshold <= card.layers).length;
    $("strip-text").textContent = this.stations.length
      ? `${whole} of ${this.stations.length} stations run their block of teacher layers, ${this.stations.length - whole} the student's one layer for it.`
      : "";
    this.drawCurve();
  }

  showChips() {
    const chips = [...this.chosen].sort((a, b) => a - b).map((layers) => {
      const remove = element("button", { type: "button", "aria-label": `Remove ${layers} layers` }, "×");
      remove.addEventListener("click", () => {
        this.toggle(layers, false);
        $("add").focus();
      });
      return element("li", {}, swatch(this.place(layers)), `${layers}L`, remove);
    });
    $("chips").replaceChildren(...chips);
  }

  // Measured agreement with the teacher over layers. Pointer users choose sizes on it; the slider does the same by keys.
  drawCurve() {
    const known = this.cards.filter((card) => typeof card.quality?.top1_agreement === "number");
    const svg = $("curve");
    svg.parentElement.hidden = known.length < 2;
    if (svg.parentElement.hidden) return;
    const box = svg.getBoundingClientRect();
    const [width, height] = [Math.max(120, box.width), Math.max(60, box.height)];
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    const x = (layers) => 8 + (width - 16) * this.place(layers);
    const y = (value) => height - 8 - (height - 16) * value;
    const line = known.map((card, i) => `${i ? "L" : "M"}${x(card.layers)} ${y(card.quality.top1_agreement)}`).join("");
    svg.replaceChildren(svgElement("path", { d: `M8 ${y(0)}H${width - 8}M8 ${y(1)}H${width - 8}`, class: "grid" }), svgElement("path", { d: line, class: "line" }));
    for (const card of known) {
      const isCurrent = card === this.current;
      const dot = svgElement("circle", {
        cx: x(card.layers), cy: y(card.quality.top1_agreement), r: isCurrent ? 6.5 : this.chosen.has(card.layers) ? 5 : 3,
        fill: colour(this.place(card.layers)), class: isCurrent ? "dot current" : "dot",
      });
      const title = svgElement("title");
      title.textContent = `${card.layers}L: ${qualityOf(card).join(" ")}`;
      dot.append(title);
      dot.addEventListener("click", () => {
        $("size").value = this.cards.indexOf(card);
        this.show();
      });
      svg.append(dot);
    }
    $("curve-text").textContent = `Next token as the teacher's: ${percent(known[0].quality.top1_agreement)} at ${known[0].layers}L to ${percent(known.at(-1).quality.top1_agreement)} at ${known.at(-1).layers}L`;
  }
}

// One cell per layer that runs: a block of teacher layers, or the one student layer that stands for the block.
export function drawStrip(svg, stations, layers) {
  const total = stations.at(-1)?.stop ?? 0;
  svg.replaceChildren();
  if (!total) return;
  const box = svg.getBoundingClientRect();
  const [width, height, gap] = [Math.max(60, box.width), Math.max(6, box.height), box.height > 12 ? 2 : 1];
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  const cell = width / total;
  for (const { start, stop, threshold } of stations) {
    const isTeacher = threshold <= layers;
    for (let layer = start; layer < (isTeacher ? stop : start + 1); layer += 1) {
      const span = isTeacher ? 1 : stop - start;
      const rect = svgElement("rect", {
        x: layer * cell + gap / 2, y: isTeacher ? 0 : height * 0.22, width: span * cell - gap, height: height * (isTeacher ? 1 : 0.56),
        rx: Math.min(3, height / 4), fill: colour(isTeacher ? 1 : 0),
      });
      const title = svgElement("title");
      title.textContent = isTeacher ? `teacher layer ${layer}` : `student layer for teacher layers ${start} to ${stop - 1}`;
      rect.append(title);
      svg.append(rect);
    }
  }
}
