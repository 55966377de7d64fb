// Small live charts drawn as SVG from the server's own /metrics, or from this page's requests where the load balancer
// hides /metrics.

import { colour, svgElement } from "./format.js";

const SPAN = 120; // seconds shown

const COUNTERS = {
  "vllm:time_to_first_token_seconds_sum": "ttftSum", "vllm:time_to_first_token_seconds_count": "ttftCount",
  "vllm:inter_token_latency_seconds_sum": "tpotSum", "vllm:inter_token_latency_seconds_count": "tpotCount",
  "vllm:generation_tokens_total": "tokens",
};

export const noTotals = () => ({ running: {}, ttftSum: 0, ttftCount: 0, tpotSum: 0, tpotCount: 0, tokens: 0 });

export function parseMetrics(text) {
  const totals = noTotals();
  for (const line of text.split("\n")) {
    if (line.startsWith("#")) continue;
    const match = /^([a-zA-Z_:]+)(?:\{(.*)\})? (\S+)/.exec(line);
    if (!match) continue;
    const [, name, labels = "", raw] = match;
    if (name in COUNTERS) totals[COUNTERS[name]] += Number(raw);
    else if (name === "boomerang:requests_running") {
      const size = /size="(\d+)L?"/.exec(labels);
      if (size) totals.running[size[1]] = (totals.running[size[1]] || 0) + Number(raw);
    }
  }
  return totals;
}

export class Live {
  // `charts`: {mix, ttft, tpot, rate} of {svg, text}. `fractions`: where each size lies. `limits`: {ttft, tpot} in ms.
  constructor(charts) {
    Object.assign(this, { charts, points: [], last: null, fractions: {}, limits: {} });
  }

  // `totals`: how many run at each size now, and counters; a point has the counters' difference to the last.
  push(now, totals) {
    const before = this.last;
    this.last = { now, totals };
    if (!before || now <= before.now) return;
    const seconds = (now - before.now) / 1000;
    const grown = (what) => totals[what] - before.totals[what];
    const mean = (what) => (grown(`${what}Count`) > 0 ? (1000 * grown(`${what}Sum`)) / grown(`${what}Count`) : null);
    this.points.push({ now, running: totals.running, ttft: mean("ttft"), tpot: mean("tpot"), rate: grown("tokens") / seconds, seconds });
    this.points = this.points.filter((point) => point.now > now - SPAN * 1000);
    this.draw(now);
  }

  draw(now) {
    this.drawMix(now);
    this.drawLine(now, "ttft", (value) => `Last ${value.toFixed(0)} ms`);
    this.drawLine(now, "tpot", (value) => `Last ${value.toFixed(1)} ms`);
    this.drawLine(now, "rate", (value) => `Now ${value.toFixed(0)} tokens per second`);
  }

  drawMix(now) {
    const { svg, text } = this.charts.mix;
    const frame = new Frame(svg, now);
    const total = (point) => Object.values(point.running).reduce((a, b) => a + b, 0);
    frame.scale(Math.max(4, ...this.points.map(total)), 1);
    for (const point of this.points) {
      let base = 0;
      const width = Math.max(1, (point.seconds / SPAN) * frame.width + 0.3);
      for (const size of Object.keys(point.running).sort((a, b) => a - b)) {
        const top = base + point.running[size];
        if (top === base) continue;
        const bar = frame.add("rect", {
          x: frame.x(point.now) - width, width, y: frame.y(top), height: frame.y(base) - frame.y(top),
          fill: colour(this.fractions[size] ?? 1),
        });
        const title = svgElement("title");
        title.textContent = `${point.running[size]} at ${size}L`;
        bar.append(title);
        base = top;
      }
    }
    const latest = this.points.at(-1);
    const parts = Object.entries(latest?.running ?? {}).filter(([, n]) => n > 0).sort((a, b) => b[0] - a[0]);
    text.textContent = parts.length
      ? `Now running: ${parts.map(([size, n]) => `${n} at ${size}L`).join(", ")}.`
      : "Nothing is running.";
  }

  drawLine(now, what, say) {
    const { svg, text } = this.charts[what];
    const frame = new Frame(svg, now);
    const known = this.points.filter((point) => point[what] !== null);
    const limit = this.limits[what];
    const highest = Math.max(1, ...known.map((point) => point[what]));
    frame.scale(limit && limit < 3 * highest ? Math.max(highest, limit) : highest);
    if (limit && limit <= frame.highest) {
      frame.add("line", { x1: frame.left, x2: frame.left + frame.width, y1: frame.y(limit), y2: frame.y(limit), class: "limit" });
    }
    // A line where two values follow each other, a dot where one stands alone.
    let path = "", previous = null;
    for (const point of known) {
      const [x, y] = [frame.x(point.now).toFixed(1), frame.y(point[what]).toFixed(1)];
      path += previous && point.now - previous.now < 6000 ? `L${x} ${y}` : `M${x} ${y}h0.01`;
      previous = point;
    }
    if (path) frame.add("path", { d: path, class: what });
    const latest = known.at(-1);
    text.textContent = latest ? `${say(latest[what])}${limit ? `, limit ${limit} ms` : ""}.` : "No requests yet.";
  }
}

class Frame {
  constructor(svg, now) {
    this.svg = svg;
    this.now = now;
    const box = svg.getBoundingClientRect();
    this.left = 38;
    this.width = Math.max(50, box.width - this.left - 4);
    this.height = Math.max(50, box.height - 20);
    svg.replaceChildren();
    svg.setAttribute("viewBox", `0 0 ${box.width} ${box.height}`);
  }

  // `least`: no grid line between values closer than this.
  scale(highest, least = 0) {
    const rough = Math.max(highest / 4, least);
    const magnitude = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((m) => m * magnitude).find((s) => s >= rough * 0.999);
    this.highest = Math.ceil(highest / step) * step;
    for (let value = 0; value <= this.highest + step / 2; value += step) {
      const y = this.y(value);
      this.add("line", { x1: this.left, x2: this.left + this.width, y1: y, y2: y, class: "grid" });
      this.add("text", { x: this.left - 6, y: y + 4, "text-anchor": "end" }).textContent = value >= 10000 ? `${value / 1000}k` : String(+value.toFixed(2));
    }
    for (const ago of [120, 60, 0]) {
      const label = this.add("text", {
        x: this.x(this.now - ago * 1000), y: this.height + 16,
        "text-anchor": ago === 120 ? "start" : ago ? "middle" : "end",
      });
      label.textContent = ago ? `${ago} s ago` : "now";
    }
  }

  x(time) { return this.left + this.width * (1 - (this.now - time) / 1000 / SPAN); }

  y(value) { return 6 + (this.height - 6) * (1 - value / this.highest); }

  add(tag, attributes) {
    const node = svgElement(tag, attributes);
    this.svg.append(node);
    return node;
  }
}
