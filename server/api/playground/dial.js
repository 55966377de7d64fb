// The two dials, layers and precision: what the chosen point is made of, what it costs and what it is worth.

import { colour, facts, megabytes, millions, percent, plural, svgElement, swatch, element } from "./format.js";
import { Frontier } from "./frontier.js";

const $ = (id) => document.getElementById(id);
const worst = (kl) => (kl && Object.keys(kl).length ? Math.max(...Object.values(kl)) : null); // over kinds of text

export class Dial {
  // `changed`: called when other sizes are to answer.
  constructor(changed) {
    Object.assign(this, { changed, model: "", cards: [], stations: [], precisions: ["exact"], points: new Map(), chosen: new Map() });
    this.frontier = new Frontier($("frontier"), (point) => this.select(point));
    for (const id of ["size", "precision"]) $(id).addEventListener("input", () => this.show());
    $("add").addEventListener("click", () => this.toggle(this.current, true));
    new ResizeObserver(() => this.cards.length && this.show()).observe($("strip"));
  }

  get current() {
    return { layers: this.cards[$("size").value].layers, precision: this.precisions.at(-1 - $("precision").value) };
  }

  // Where a size lies between student and teacher, 0 to 1: its colour everywhere on this page.
  place(layers) {
    const low = this.cards[0].layers, high = this.cards.at(-1).layers;
    return high > low ? (layers - low) / (high - low) : 1;
  }

  // The widest precision is what a size means that names none.
  name({ layers, precision }) {
    return precision === this.precisions[0] ? `${layers}L` : `${layers}L-${precision}`;
  }

  id(point) { return `${this.model}:${this.name(point)}`; }

  // All that is known of a point: its size's card and what was measured of it.
  card({ layers, precision }) {
    const card = this.cards.find((found) => found.layers === layers) ?? {};
    const isWidest = precision === this.precisions[0];
    return { ...card, quality: isWidest ? card.quality : null, ...this.points.get(this.name({ layers, precision })) };
  }

  // `cards`: each size in its widest precision, ascending; `precisions`: the widest first.
  set(model, cards, { stations, points }, precisions) {
    Object.assign(this, { model, cards, stations, precisions });
    this.points = new Map(points.map((point) => [this.name(point), point]));
    for (const [id, count] of [["size", cards.length], ["precision", precisions.length]]) {
      $(id).max = count - 1;
      $(id).value = count - 1;
    }
    $("bits").hidden = precisions.length < 2;
    const [low, high] = [cards[0].layers, cards.at(-1).layers];
    const middle = precisions.length > 1 ? [high, precisions.at(-1)] : [cards[Math.floor(cards.length / 2)].layers, precisions[0]];
    this.chosen.clear();
    for (const [layers, precision] of [[low, precisions[0]], middle, [high, precisions[0]]]) this.chosen.set(this.name({ layers, precision }), { layers, precision });
    this.showFrontier();
    this.show();
    this.showChips();
  }

  select({ layers, precision }) {
    $("size").value = this.cards.findIndex((card) => card.layers === layers);
    $("precision").value = this.precisions.length - 1 - this.precisions.indexOf(precision);
    this.show();
  }

  toggle(point, isIn) {
    if (isIn) this.chosen.set(this.name(point), point);
    else this.chosen.delete(this.name(point));
    this.showChips();
    this.changed();
  }

  // How close a point is to the teacher, in words: [name, figure, how it is known].
  worth(card) {
    const top = card.quality?.top1_agreement, kl = worst(card.expected_kl) ?? card.quality?.kl;
    if (typeof top === "number") return ["Same as the teacher", percent(top), "of next tokens"];
    if (typeof kl === "number") return ["Distance to the teacher", kl.toFixed(3), card.kl_is_measured === false ? "estimated" : "measured"];
    return ["Distance to the teacher", "–", "not measured"];
  }

  show() {
    const point = this.current, card = this.card(point);
    const share = `${percent(card.fraction)} of the teacher`;
    const bits = point.precision === "exact" ? "weights as loaded" : `${point.precision.slice(1)} bits a weight`;
    $("point-name").replaceChildren(swatch(this.place(point.layers)), this.name(point), element("small", {}, `${plural(point.layers, "layer")}, ${bits}`));
    const step = card.expected_step_ms?.decode_1, kl = worst(card.expected_kl);
    const rows = [
      ["Parameters", millions(card.parameters), share], ["Weights", megabytes(card.bytes), ""],
      ["1,000 tokens", megabytes(1000 * card.kv_bytes_per_token), "of memory, for text"], this.worth(card),
    ];
    if (step) rows.push(["A token, alone", `${step.toPrecision(3)} ms`, "expected"]);
    if (typeof card.quality?.top1_agreement === "number" && kl !== null) rows.push(["Distance", kl.toFixed(3), card.kl_is_measured ? "measured" : "estimated"]);
    $("facts").replaceChildren(...facts(rows));
    $("size").setAttribute("aria-valuetext", `${plural(point.layers, "layer")}, ${share}`);
    $("precision").setAttribute("aria-valuetext", bits);
    $("size").style.accentColor = $("precision").style.accentColor = colour(this.place(point.layers));
    drawStrip($("strip"), this.stations, point.layers);
    const whole = this.stations.filter((station) => station.threshold <= point.layers).length;
    $("strip-text").textContent = whole === this.stations.length
      ? `All ${whole} blocks run all the teacher's layers.`
      : `${whole} of ${plural(this.stations.length, "block")} run all the teacher's layers, the others the student's one layer.`;
    this.frontier.mark(this.name(point), new Set(this.chosen.keys()));
  }

  // Time if the server expects one, else bytes; nothing if no point's distance is known.
  showFrontier() {
    const all = this.cards.flatMap((card) => this.precisions.map((precision, i) => {
      const point = { layers: card.layers, precision }, known = this.card(point);
      return { ...point, known, name: this.name(point), fraction: this.place(card.layers), weight: 1 - i / this.precisions.length, y: worst(known.expected_kl) ?? known.quality?.kl ?? null };
    })).filter((point) => point.y !== null && point.known.bytes);
    const isTimed = all.length > 0 && all.every((point) => point.known.expected_step_ms);
    $("frontier").parentElement.hidden = all.length < 2;
    if (all.length < 2) return;
    for (const point of all) {
      point.x = isTimed ? point.known.expected_step_ms.decode_1 : point.known.bytes / 1e6;
      point.isBest = isTimed ? point.known.best_in.includes("decode_1") : true;
    }
    this.frontier.set(all, isTimed ? "ms for a token, alone" : "weights, MB", "distance to the teacher");
    const number = all.filter((point) => point.isBest).length;
    $("frontier-text").textContent = this.precisions.length > 1
      ? `Each dot is a size: colour for layers, width for precision. The line joins the ${number} of ${all.length} that nothing beats.`
      : `Each dot is a size: further right costs more, further down is closer to the teacher.`;
  }

  showChips() {
    const order = [...this.chosen.values()].sort((a, b) => a.layers - b.layers || this.precisions.indexOf(b.precision) - this.precisions.indexOf(a.precision));
    this.chosen = new Map(order.map((point) => [this.name(point), point]));
    const chips = order.map((point) => {
      const remove = element("button", { type: "button", "aria-label": `Remove ${this.name(point)}` }, "×");
      remove.addEventListener("click", () => {
        this.toggle(point, false);
        $("add").focus();
      });
      return element("li", {}, swatch(this.place(point.layers)), this.name(point), remove);
    });
    $("chips").replaceChildren(...chips);
    this.frontier.mark(this.name(this.current), new Set(this.chosen.keys()));
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
