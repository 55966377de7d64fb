// Two small live charts drawn as SVG from the server's own /metrics, or from this page's requests where the load
// balancer hides /metrics.

const SPAN = 120; // seconds shown
const NS = "http://www.w3.org/2000/svg";

// From amber (student) through green and teal to violet (teacher): lightness falls steadily, so the order survives
// colour blindness and greyscale.
const STOPS = [[255, 183, 51], [120, 190, 80], [33, 145, 140], [49, 104, 176], [88, 60, 160]];

export function colour(fraction) {
  const x = Math.min(Math.max(fraction, 0), 1) * (STOPS.length - 1);
  const i = Math.min(Math.floor(x), STOPS.length - 2);
  const mix = STOPS[i].map((a, c) => Math.round(a + (STOPS[i + 1][c] - a) * (x - i)));
  return `rgb(${mix.join(",")})`;
}

export function parseMetrics(text) {
  const totals = { running: {}, ttftSum: 0, ttftCount: 0, tpotSum: 0, tpotCount: 0 };
  for (const line of text.split("\n")) {
    if (line.startsWith("#")) continue;
    const match = /^([a-zA-Z_:]+)(?:\{(.*)\})? (\S+)/.exec(line);
    if (!match) continue;
    const [, name, labels = "", raw] = match;
    const value = Number(raw);
    if (name === "boomerang:requests_running") {
      const size = /size="(\d+)L?"/.exec(labels);
      if (size) totals.running[size[1]] = (totals.running[size[1]] || 0) + value;
    } else if (name === "vllm:time_to_first_token_seconds_sum") totals.ttftSum += value;
    else if (name === "vllm:time_to_first_token_seconds_count") totals.ttftCount += value;
    else if (name === "vllm:inter_token_latency_seconds_sum") totals.tpotSum += value;
    else if (name === "vllm:inter_token_latency_seconds_count") totals.tpotCount += value;
  }
  return totals;
}

export class Live {
  constructor(mix, latency, mixText, latencyText) {
    Object.assign(this, { mix, latency, mixText, latencyText, points: [], last: null, fractions: {} });
  }

  // `totals`: how many run at each size now, and latency counters; a point has the counters' difference to the last.
  push(now, totals) {
    const before = this.last;
    this.last = { now, totals };
    if (!before || now <= before.now) return;
    const seconds = (now - before.now) / 1000;
    const mean = (what) => {
      const count = totals[`${what}Count`] - before.totals[`${what}Count`];
      return count > 0 ? (1000 * (totals[`${what}Sum`] - before.totals[`${what}Sum`])) / count : null;
    };
    this.points.push({ now, running: totals.running, ttft: mean("ttft"), tpot: mean("tpot"), seconds });
    this.points = this.points.filter((point) => point.now > now - SPAN * 1000);
    this.draw(now);
  }

  draw(now) {
    this.drawMix(now);
    this.drawLatency(now);
  }

  drawMix(now) {
    const frame = new Frame(this.mix, now);
    const total = (point) => Object.values(point.running).reduce((a, b) => a + b, 0);
    frame.scale(Math.max(4, ...this.points.map(total)));
    for (const point of this.points) {
      let base = 0;
      const width = Math.max(1, (point.seconds / SPAN) * frame.width - 0.5);
      for (const size of Object.keys(point.running).sort((a, b) => a - b)) {
        const top = base + point.running[size];
        frame.add("rect", {
          x: frame.x(point.now) - width, width, y: frame.y(top), height: frame.y(base) - frame.y(top),
          fill: colour(this.fractions[size] ?? 1),
        });
        base = top;
      }
    }
    const latest = this.points.at(-1);
    const parts = Object.entries(latest?.running ?? {}).filter(([, n]) => n > 0).sort((a, b) => b[0] - a[0]);
    this.mixText.textContent = parts.length
      ? `Now running: ${parts.map(([size, n]) => `${n} at ${size}L`).join(", ")}.`
      : "Nothing is running.";
  }

  drawLatency(now) {
    const frame = new Frame(this.latency, now);
    const values = this.points.flatMap((point) => [point.ttft, point.tpot]).filter((value) => value !== null);
    frame.scale(Math.max(10, ...values));
    for (const what of ["ttft", "tpot"]) {
      const known = this.points.filter((point) => point[what] !== null);
      const path = known.map((point, i) => `${i ? "L" : "M"}${frame.x(point.now)} ${frame.y(point[what])}`).join("");
      if (path) frame.add("path", { d: path, class: what });
    }
    const latest = (what) => this.points.findLast((point) => point[what] !== null)?.[what];
    const [ttft, tpot] = [latest("ttft"), latest("tpot")];
    this.latencyText.textContent = ttft === undefined
      ? "No requests yet."
      : `Solid: first token, last ${ttft.toFixed(0)} ms. Dashed: per token, last ${tpot?.toFixed(1) ?? "–"} ms.`;
  }
}

class Frame {
  constructor(svg, now) {
    this.svg = svg;
    this.now = now;
    const box = svg.getBoundingClientRect();
    this.left = 42;
    this.width = Math.max(50, box.width - this.left - 4);
    this.height = Math.max(50, box.height - 22);
    svg.replaceChildren();
    svg.setAttribute("viewBox", `0 0 ${box.width} ${box.height}`);
  }

  scale(highest) {
    const magnitude = 10 ** Math.floor(Math.log10(highest));
    const step = [0.25, 0.5, 1, 2.5].map((m) => m * magnitude).find((s) => highest / s <= 5) ?? 2.5 * magnitude;
    this.highest = Math.ceil(highest / step) * step;
    for (let value = 0; value <= this.highest + step / 2; value += step) {
      const y = this.y(value);
      this.add("line", { x1: this.left, x2: this.left + this.width, y1: y, y2: y, class: "grid" });
      this.add("text", { x: this.left - 6, y: y + 4, "text-anchor": "end" }).textContent = String(+value.toFixed(2));
    }
    for (const ago of [120, 60, 0]) {
      const label = this.add("text", {
        x: this.x(this.now - ago * 1000), y: this.height + 18,
        "text-anchor": ago === 120 ? "start" : ago ? "middle" : "end",
      });
      label.textContent = ago ? `${ago} s ago` : "now";
    }
  }

  x(time) { return this.left + this.width * (1 - (this.now - time) / 1000 / SPAN); }

  y(value) { return 6 + (this.height - 6) * (1 - value / this.highest); }

  add(tag, attributes) {
    const node = document.createElementNS(NS, tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    this.svg.append(node);
    return node;
  }
}
