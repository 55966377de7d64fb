// One answer: its text as it streams, its figures beside those of the other lanes.

import { ApiError, stream } from "./api.js";
import { drawStrip } from "./dial.js";
import { element, mib, millions, ms, percent, qualityOf, svgElement, swatch } from "./format.js";

const FIELDS = ["TTFT", "Speed", "Memory", "Quality", "Tokens", "Total"];

export class Lane {
  // `layers`: null for auto. `hooks`: enter(layers, +1 | -1) and count(tokens, first, last) for the page's own counters.
  constructor(layers, dial, hooks) {
    Object.assign(this, { layers, dial, hooks, isAuto: layers === null, answer: "", values: {} });
    this.title = element("h3", {}, layers ? `${layers}L` : "auto");
    if (layers) this.title.prepend(swatch(dial.place(layers)));
    this.strip = svgElement("svg", { class: "strip small", "aria-hidden": "true" });
    this.text = element("p", { class: "text", tabindex: "0", "aria-label": layers ? `Answer of ${layers} layers` : "Answer of auto" });
    this.fields = Object.fromEntries(FIELDS.map((name) => [name, element("dd", {}, "–")]));
    const list = element("dl", {}, ...FIELDS.map((name) => element("div", {}, element("dt", {}, name), this.fields[name])));
    this.reason = element("p", { class: "reason" });
    this.agreement = element("p", { class: "agreement" });
    this.node = element("article", { class: "card streaming", "aria-busy": "true" }, this.title, this.strip, this.text, this.agreement, list, this.reason);
  }

  // What was served, once the server says so: for auto this is news, for others a confirmation.
  served(size) {
    this.layers = size.layers;
    const card = this.dial.card(size.layers) ?? {};
    const served = size.name ?? `${size.layers}L`;
    const name = this.isAuto ? `auto → ${served}` : served;
    this.title.replaceChildren(
      swatch(this.dial.place(size.layers)), name, element("span", { class: "spacer" }), element("small", {}, `${millions(size.parameters)} parameters`),
    );
    drawStrip(this.strip, this.dial.stations, size.layers);
    const [quality, meaning, second] = qualityOf(card);
    this.put("Quality", quality, second || meaning, card.quality?.top1_agreement);
    this.fields.Quality.title = meaning;
    this.reason.textContent = `${percent(size.fraction)} of the teacher, reason: ${size.reason}`;
    return card;
  }

  // A figure with a bar under it: `amount` against the largest of all lanes.
  put(name, value, more = "", amount = undefined) {
    const bar = element("span", { class: "bar", "aria-hidden": "true" });
    this.fields[name].replaceChildren(value, ...(more ? [element("small", {}, more)] : []), ...(amount === undefined ? [] : [bar]));
    if (amount !== undefined) this.values[name] = amount;
  }

  async run(request, signal) {
    let first = null, last = 0, tokens = 0, card = null, prompt = 0, pieces = 0;
    try {
      await stream(request, signal, (event, at) => {
        if (event.size && !card) {
          card = this.served(event.size);
          this.hooks.enter(this.layers, 1);
        }
        const choice = event.choices?.[0];
        const piece = choice?.delta?.content ?? choice?.text ?? "";
        if (piece) {
          first ??= at;
          pieces += 1;
          last = at;
          this.answer += piece;
          this.text.append(piece);
        }
        if (event.usage) ({ completion_tokens: tokens, prompt_tokens: prompt } = event.usage);
        const shown = tokens || pieces;
        if (first !== null) {
          this.put("TTFT", ms(first), "", first);
          // An answer that came in one piece has no time between tokens: then all of them over all of its time.
          const rate = 1000 * (last > first ? (shown - 1) / (last - first) : shown / Math.max(last, 1));
          if (shown > 1) this.put("Speed", `${rate.toFixed(1)} tok/s`, "", rate);
          this.put("Tokens", String(shown));
          this.put("Total", ms(at));
        }
        if (card?.bytes) {
          const kv = card.kv_bytes_per_token * (prompt + shown);
          this.put("Memory", mib(card.bytes + kv), `KV ${mib(kv)}`, card.bytes + kv);
        }
        this.hooks.compare();
      });
      if (first !== null) this.hooks.count(tokens || pieces, first, last);
    } catch (error) {
      const isStop = error.name === "AbortError";
      this.reason.textContent = isStop ? "stopped" : error.message;
      this.reason.classList.toggle("error", !isStop);
      if (!isStop && !(error instanceof ApiError)) console.error(error);
    } finally {
      if (card) this.hooks.enter(this.layers, -1);
      this.node.classList.remove("streaming");
      this.node.setAttribute("aria-busy", "false");
    }
  }
}

// Bars against the best lane.
export function compare(lanes) {
  for (const name of FIELDS) {
    const most = Math.max(...lanes.map((lane) => lane.values[name] ?? 0));
    for (const lane of lanes) {
      const bar = lane.fields[name].querySelector(".bar");
      if (bar && most > 0) bar.style.setProperty("--share", lane.values[name] / most);
    }
  }
}

// How far each answer runs word for word with that of the largest size.
export function agree(lanes) {
  const done = lanes.filter((lane) => lane.answer);
  const reference = done.reduce((best, lane) => (best && best.layers >= lane.layers ? best : lane), null);
  const words = (lane) => lane.answer.trim().split(/\s+/);
  for (const lane of done) {
    if (lane === reference || done.length < 2) continue;
    const [own, other] = [words(lane), words(reference)];
    let same = 0;
    while (same < own.length && own[same] === other[same]) same += 1;
    lane.agreement.textContent = same === own.length && same === other.length
      ? `Word for word the answer of ${reference.layers}L.`
      : `The first ${same} of ${own.length} words as ${reference.layers}L.`;
  }
}
