// The dial: one slider over all sizes, what the chosen size is made of, what it costs and what it is worth.

import { colour, element, mib, millions, percent, qualityOf, svgElement, swatch } from "./format.js";

const $ = (id) => document.getElementById(id);

export class Dial {
  constructor() {
    this.cards = [];
    this.stations = []; // {start, stop, threshold}, from the student's point of view
    this.chosen = new Set();
    this.points = new Map(); // "24 q6" -> card: those that auto may choose, and every size as loaded
    this.precisions = ["exact"]; // the widest first
    $("size").addEventListener("input", () => this.show());
    $("precision").addEventListener("change", () => this.show());
    $("add").addEventListener("click", () => this.toggle(this.current.layers, true));
    new ResizeObserver(() => this.cards.length && this.show()).observe($("strip"));
  }

  get current() { return this.cards[$("size").value]; }

  // What a request at a named size says of precision.
  get precision() {
    const chosen = $("precision").value;
    return chosen && chosen !== this.precisions[0] ? { precision: chosen } : {};
  }

  // Where a size lies between student and teacher, 0 to 1: its colour everywhere on this page.
  place(layers) {
    const low = this.cards[0].layers, high = this.cards.at(-1).layers;
    return high > low ? (layers - low) / (high - low) : 1;
  }

  card(layers) { return this.cards.find((card) => card.layers === layers); }

  set(cards, stations, points, precisions) {
    [this.cards, this.stations, this.precisions] = [cards, stations, precisions];
    this.points = new Map(points.map((card) => [`${card.layers} ${card.precision}`, card]));
    $("precision").replaceChildren(...precisions.map((name) => element("option", { value: name }, name)));
    $("bits").hidden = precisions.length < 2;
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
    if (!$("bits").hidden) facts.push(this.worth(card.layers, $("precision").value));
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
    this.drawGrid();
  }

  // What a point is expected to lose, on the kind of text on which it is worst.
  worth(layers, precision) {
    const point = this.points.get(`${layers} ${precision}`);
    const best = point?.best_in ?? [];
    const where = best.length ? `nothing beats it in ${best.join(", ")}` : "never the best: another point is as fast and nearer";
    const kl = Object.values(point?.expected_kl ?? {});
    return ["Expected KL", kl.length ? Math.max(...kl).toFixed(3) : "–", where];
  }

  // Every point of layers and bits. Pointer users choose here; slider and list do the same by keys.
  drawGrid() {
    if ($("bits").hidden) return;
    const side = 14, width = side * this.cards.length, height = side * this.precisions.length;
    $("grid").setAttribute("viewBox", `0 0 ${width} ${height}`);
    $("grid").setAttribute("width", width);
    const nodes = this.cards.flatMap((card, column) => this.precisions.map((precision, row) => {
      const isBest = this.points.get(`${card.layers} ${precision}`)?.best_in?.length > 0;
      const isCurrent = card === this.current && precision === $("precision").value;
      const paint = colour(this.place(card.layers));
      const node = svgElement("circle", {
        cx: (column + 0.5) * side, cy: (row + 0.5) * side, r: isCurrent ? 6 : 4,
        fill: isBest ? paint : "transparent", stroke: paint, "stroke-width": isCurrent ? 3 : 1,
      });
      const title = svgElement("title");
      title.textContent = `${card.layers}L ${precision}: ${this.worth(card.layers, precision)[2]}`;
      node.append(title);
      node.addEventListener("click", () => {
        $("size").value = column;
        $("precision").value = precision;
        this.show();
      });
      return node;
    }));
    $("grid").replaceChildren(...nodes);
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
