// Live charts from the server's own /metrics, or from this page's requests where the load balancer hides /metrics.

import { colour, css } from "./format.js";
import { axis, fit } from "./frontier.js";

const SPAN = 120; // seconds shown
const STALE_AFTER = 5; // seconds without news

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

const total = (point) => Object.values(point.running).reduce((a, b) => a + b, 0);

export class Live {
  // `charts`: {mix, ttft, tpot, rate} of {node, text}. `fractions`: where each size lies. `limits`: {ttft, tpot} in ms.
  constructor(charts) {
    Object.assign(this, { charts, points: [], last: null, fractions: {}, limits: {} });
    for (const [what, chart] of Object.entries(charts)) chart.plot = this.make(what, chart.node);
  }

  make(what, node) {
    const line = {
      stroke: () => css(`--${what}`), width: 2, spanGaps: true, points: { size: 4, fill: () => css(`--${what}`) }, show: what !== "mix",
    };
    const options = {
      width: Math.max(node.clientWidth, 200), height: 150, legend: { show: false }, cursor: { show: false },
      scales: { x: { time: false, range: () => [-SPAN, 0] }, y: { range: () => [0, this.highest(what)] } },
      axes: [
        axis({ size: 24, splits: () => [-SPAN, -SPAN / 2, 0], values: () => ["2 min ago", "1 min ago", "now"] }),
        axis({ size: 44, space: 28, incrs: what === "mix" ? [1, 2, 5, 10, 20, 50, 100] : undefined }),
      ],
      series: [{}, line, { stroke: () => css("--warn"), dash: [5, 5], width: 1.2, points: { show: false } }],
      hooks: { draw: what === "mix" ? [(plot) => this.drawMix(plot)] : [] },
    };
    const plot = new uPlot(options, [[], [], []], node);
    fit(plot, node);
    return plot;
  }

  highest(what) {
    if (what === "mix") return Math.max(4, ...this.points.map(total)) + 0.2;
    const most = Math.max(1, ...this.points.map((point) => point[what] ?? 0));
    const limit = this.limits[what];
    return 1.08 * (limit && limit < 3 * most ? Math.max(most, limit) : most);
  }

  // `totals`: how many run at each size now, and counters; a point has the counters' difference to the last.
  push(now, totals) {
    const before = this.last;
    this.last = { now, totals };
    if (!before || now <= before.now) return;
    const seconds = (now - before.now) / 1000;
    const grown = (what) => Math.max(totals[what] - before.totals[what], 0); // from 0 again after a restart
    const mean = (what) => (grown(`${what}Count`) > 0 ? (1000 * grown(`${what}Sum`)) / grown(`${what}Count`) : null);
    this.points.push({ now, running: totals.running, ttft: mean("ttft"), tpot: mean("tpot"), rate: grown("tokens") / seconds, seconds });
    this.draw(now);
  }

  // Time goes on where news does not.
  draw(now) {
    this.now = now;
    this.points = this.points.filter((point) => point.now > now - SPAN * 1000);
    const times = this.points.map((point) => (point.now - now) / 1000);
    const say = { ttft: (v) => `Last: ${v.toFixed(0)} ms`, tpot: (v) => `Last: ${v.toFixed(1)} ms`, rate: (v) => `Now: ${v.toFixed(0)}` };
    for (const [what, { plot, text }] of Object.entries(this.charts)) {
      const limit = this.limits[what] > 0 ? this.limits[what] : null;
      plot.setData([times, this.points.map((point) => (what === "mix" ? total(point) : point[what])), times.map(() => limit)]);
      if (what === "mix") continue;
      const latest = this.points.findLast((point) => point[what] !== null);
      text.textContent = latest ? `${say[what](latest[what])}${limit ? `, limit ${limit} ms` : ""}.` : "No requests yet.";
    }
    const running = Object.entries(this.points.at(-1)?.running ?? {}).filter(([, n]) => n > 0).sort((a, b) => b[0] - a[0]);
    this.charts.mix.text.textContent = running.length ? `Now: ${running.map(([size, n]) => `${n} at ${size}L`).join(", ")}.` : "Nothing is running.";
  }

  // Seconds since the last figures, or since they were first asked for, once that is long enough to say; else 0.
  age(now) {
    this.asked ??= now;
    const seconds = (now - (this.last?.now ?? this.asked)) / 1000;
    return seconds > STALE_AFTER ? Math.round(seconds) : 0;
  }

  drawMix(plot) {
    const at = (value, scale) => plot.valToPos(value, scale, true);
    for (const point of this.points) {
      const right = at((point.now - this.now) / 1000, "x"), left = Math.max(at((point.now - this.now) / 1000 - point.seconds, "x"), plot.bbox.left);
      let base = 0;
      for (const size of Object.keys(point.running).sort((a, b) => a - b)) {
        const top = base + point.running[size];
        plot.ctx.fillStyle = colour(this.fractions[size] ?? 1);
        plot.ctx.fillRect(left, at(top, "y"), right - left + 0.5, at(base, "y") - at(top, "y"));
        base = top;
      }
    }
  }
}
