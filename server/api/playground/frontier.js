// Every point of layers and precision: what a token takes against how far the point is from the teacher.

import { colour, css } from "./format.js";

export const FONT = '12px system-ui, "DejaVu Sans", sans-serif';
// One axis of any chart of this page: colours are asked for at each drawing, since the theme may have changed.
export const axis = (options = {}) => ({
  stroke: () => css("--muted"), grid: { stroke: () => css("--grid"), width: 1 }, ticks: { show: false }, font: FONT, labelFont: FONT, ...options,
});
// A chart is as large as its box, whenever that changes.
export function fit(plot, node) {
  new ResizeObserver(() => node.clientWidth && plot.setSize({ width: node.clientWidth, height: node.clientHeight })).observe(node);
}

export class Frontier {
  // `pick(point)`: the pointer chose one. Keyboards have the sliders.
  constructor(node, pick) {
    Object.assign(this, { node, pick, points: [], current: null, chosen: new Set(), plot: null });
  }

  // `points`: [{name, x, y, fraction, weight, isBest}]; `weight`, 0 to 1, is how many bits of all.
  set(points, xLabel, yLabel) {
    this.points = points.sort((a, b) => a.x - b.x);
    this.plot?.destroy();
    const most = (what) => Math.max(...points.map((point) => point[what]));
    const options = {
      width: Math.max(this.node.clientWidth, 200), height: 150, legend: { show: false },
      cursor: { x: false, y: false, points: { show: false }, drag: { x: false, y: false, setScale: false } },
      scales: { x: { time: false, range: () => [0, 1.06 * most("x")] }, y: { range: () => [-0.04 * most("y"), 1.08 * most("y") || 1] } },
      axes: [axis({ label: xLabel, size: 26, labelSize: 18, space: 40 }), axis({ label: yLabel, size: 40, labelSize: 18, space: 26 })],
      series: [{}, { stroke: () => css("--muted"), width: 1.2, spanGaps: true, points: { show: false } }],
      hooks: { draw: [() => this.draw()] },
    };
    this.plot = new uPlot(options, [this.points.map((p) => p.x), this.points.map((p) => (p.isBest ? p.y : null))], this.node);
    this.plot.over.addEventListener("click", (event) => this.click(event));
    fit(this.plot, this.node);
  }

  mark(current, chosen) {
    Object.assign(this, { current, chosen });
    this.plot?.redraw(false);
  }

  place(point, isCanvas) {
    return [this.plot.valToPos(point.x, "x", isCanvas), this.plot.valToPos(point.y, "y", isCanvas)];
  }

  draw() {
    const { ctx } = this.plot, scale = devicePixelRatio;
    // The chosen one last, over its neighbours.
    for (const point of [...this.points].sort((a, b) => (a.name === this.current) - (b.name === this.current))) {
      const isCurrent = point.name === this.current;
      ctx.beginPath();
      ctx.arc(...this.place(point, true), scale * (2.5 + 2.5 * point.weight + (isCurrent ? 2.5 : this.chosen.has(point.name) ? 1.5 : 0)), 0, 2 * Math.PI);
      ctx.globalAlpha = point.isBest || isCurrent ? 1 : 0.45;
      ctx.fillStyle = colour(point.fraction);
      ctx.fill();
      if (isCurrent || this.chosen.has(point.name)) {
        ctx.globalAlpha = 1;
        ctx.lineWidth = scale * (isCurrent ? 2.5 : 1.2);
        ctx.strokeStyle = css("--text");
        ctx.stroke();
      }
    }
    ctx.globalAlpha = 1;
  }

  click({ offsetX, offsetY }) {
    const distance = (point) => Math.hypot(...this.place(point, false).map((at, i) => at - [offsetX, offsetY][i]));
    const nearest = this.points.reduce((best, point) => (distance(point) < distance(best) ? point : best));
    if (distance(nearest) < 30) this.pick(nearest);
  }
}
