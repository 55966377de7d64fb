// One answer: its text as it streams, its figures beside those of the other lanes.

import { ApiError, stream } from "./api.js";
import { drawStrip } from "./dial.js";
import { element, facts, megabytes, millions, ms, percent, reasonOf, svgElement, swatch } from "./format.js";
import { rendered } from "./markdown.js";

const FIELDS = ["First word", "Speed", "Memory", "Closeness", "Length", "Time"];
const ENDS = { length: "Cut off: longest answer reached.", repetition: "Ended: it had begun to repeat itself.", content_filter: "Ended by a filter." };

export class Lane {
  // `point`: null for auto. `hooks`: enter(layers, +1 | -1) and count(tokens, first, last) for the page's own counters.
  constructor(point, dial, hooks, isChat) {
    const name = point ? dial.name(point) : "auto";
    Object.assign(this, { point, dial, hooks, isChat, name, layers: point?.layers ?? null, answer: "", thinking: "", values: {}, state: "waiting" });
    this.title = element("h3", {}, ...(point ? [swatch(dial.place(point.layers))] : []), name);
    this.strip = svgElement("svg", { class: "strip small", "aria-hidden": "true" });
    this.text = element("div", { class: isChat ? "" : "plain" }, element("p", { class: "muted" }, "waits its turn…"));
    this.note = element("p", { class: "note" });
    this.box = element("div", { class: "text", tabindex: "0", role: "group", "aria-label": `Answer of ${name}` }, this.text, this.note);
    this.thoughts = element("details", { hidden: "" }, element("summary", {}, "Thoughts"), element("p", { class: "thoughts" }));
    const list = element("dl", {}, ...facts(FIELDS.map((field) => [field, "–"])));
    this.fields = Object.fromEntries(FIELDS.map((field, i) => [field, list.children[i].lastChild]));
    this.radio = element("input", { type: "radio", name: "keep", "aria-label": `Go on with the answer of ${name}` });
    this.keep = element("label", { class: "check keep", hidden: "" }, this.radio, "go on with this one");
    this.node = element("article", { class: "card", "aria-label": name }, this.title, this.strip, this.thoughts, this.box, this.keep, list);
  }

  get isDone() { return this.state === "done" || (this.state === "stopped" && this.answer !== ""); }

  // What was served, once the server says so: for auto this is news, for others a confirmation.
  served(size) {
    this.layers = size.layers;
    this.servedAs = size.name;
    this.rank = [size.layers, -this.dial.precisions.indexOf(size.precision)];
    const card = this.dial.card(size);
    this.title.replaceChildren(
      swatch(this.dial.place(size.layers)), this.point ? size.name : `auto → ${size.name}`, element("span", { class: "spacer" }), element("small", {}, `${millions(size.parameters)} parameters`),
    );
    drawStrip(this.strip, this.dial.stations, size.layers);
    const [name, figure, how] = this.dial.worth(card);
    this.put("Closeness", figure, name === "Same as the teacher" ? "same as the teacher" : `distance, ${how}`, card.quality?.top1_agreement);
    this.reason = this.point ? "" : `${percent(size.fraction)} of the teacher: ${reasonOf(size.reason)}.`;
    this.note.textContent = this.reason;
    return card;
  }

  // A figure with a bar under it: `amount` against the largest of all lanes.
  put(name, value, more = "", amount = undefined) {
    const bar = element("span", { class: "bar", "aria-hidden": "true" });
    this.fields[name].replaceChildren(value, ...(more ? [element("small", {}, more)] : []), ...(amount === undefined ? [] : [bar]));
    if (amount !== undefined) this.values[name] = amount;
  }

  // At most once a frame: a long answer is parsed anew each time.
  show() {
    if (this.frame) return;
    this.frame = requestAnimationFrame(() => {
      this.frame = null;
      if (this.isChat) this.text.replaceChildren(rendered(this.answer));
      else this.text.textContent = this.answer;
      if (this.thinking) {
        this.thoughts.hidden = false;
        this.thoughts.lastChild.textContent = this.thinking;
      }
    });
  }

  // `numBeside`: how many others are answered at the same time.
  async run(request, signal, numBeside) {
    if (signal.aborted) return this.end("stopped");
    let first = null, last = 0, tokens = 0, card = null, prompt = 0, pieces = 0, arrivals = 0, end = null;
    this.state = "streaming";
    this.node.classList.add("streaming");
    this.node.setAttribute("aria-busy", "true");
    this.text.replaceChildren();
    try {
      await stream(request, signal, (event, at) => {
        if (event.size && !card) {
          card = this.served(event.size);
          this.hooks.enter(this.layers, 1);
        }
        const choice = event.choices?.[0];
        const thought = choice?.delta?.reasoning_content ?? "";
        const piece = choice?.delta?.content ?? choice?.text ?? "";
        end = choice?.finish_reason ?? end;
        if (piece || thought) {
          first ??= at;
          pieces += 1;
          if (at - last > 0.5) arrivals += 1;
          last = at;
          this.answer += piece;
          this.thinking += thought;
          this.show();
        }
        if (event.usage) ({ completion_tokens: tokens, prompt_tokens: prompt } = event.usage);
        const shown = tokens || pieces;
        if (first !== null) {
          this.put("First word", ms(first), "", first);
          // An answer that came in few bursts has no time between tokens: then all of them over all of the time.
          const rate = 1000 * (4 * arrivals > pieces ? (shown - 1) / (last - first) : shown / Math.max(last, 1));
          if (shown > 1 && last > 0) this.put("Speed", `${rate.toFixed(rate < 100 ? 1 : 0)} tokens/s`, numBeside ? `beside ${numBeside} more` : "", rate);
          this.put("Length", `${shown} tokens`);
          this.put("Time", ms(at));
        }
        if (card?.bytes) {
          const kv = card.kv_bytes_per_token * (prompt + shown);
          this.put("Memory", megabytes(card.bytes + kv), `${megabytes(kv)} of it for the text`, card.bytes + kv);
        }
        this.hooks.compare();
      });
      if (first !== null) this.hooks.count(tokens || pieces, first, last);
      this.end("done", ENDS[end] ?? "");
    } catch (error) {
      if (error.name === "AbortError") this.end("stopped");
      else this.fail(error);
    } finally {
      if (card) this.hooks.enter(this.layers, -1);
    }
  }

  end(state, text = state === "stopped" ? "Stopped." : "") {
    this.state = state;
    this.node.classList.remove("streaming");
    this.node.setAttribute("aria-busy", "false");
    this.note.textContent = [this.reason, text].filter(Boolean).join(" ");
    if (!this.answer && state !== "failed") this.text.replaceChildren(element("p", { class: "muted" }, state === "stopped" ? "Stopped before it began." : "An empty answer."));
  }

  // Where the answer should be: under what came of it.
  fail(error) {
    if (!(error instanceof ApiError)) console.error(error);
    this.error = error instanceof ApiError ? error : new ApiError("The server cannot be reached.");
    this.end("failed");
    cancelAnimationFrame(this.frame);
    this.frame = null;
    this.text.replaceChildren(...(this.answer ? [this.isChat ? rendered(this.answer) : this.answer] : []), element("p", { class: "error" }, this.error.message));
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

// How far each answer runs word for word with that of the point closest to the teacher, which the conversation goes on with unless told otherwise.
export function agree(lanes) {
  const done = lanes.filter((lane) => lane.isDone);
  const isCloser = (a, b) => a.rank[0] > b.rank[0] || (a.rank[0] === b.rank[0] && a.rank[1] > b.rank[1]);
  const reference = done.reduce((best, lane) => (best && !isCloser(lane, best) ? best : lane), null);
  const words = (lane) => lane.answer.trim().split(/\s+/);
  for (const lane of done) {
    lane.radio.checked = lane === reference;
    lane.keep.hidden = !lane.isChat || done.length < 2;
    if (lane === reference || done.length < 2) continue;
    const [own, other] = [words(lane), words(reference)];
    let same = 0;
    while (same < own.length && own[same] === other[same]) same += 1;
    const text = same === own.length && same === other.length
      ? `Word for word the answer of ${reference.name}.`
      : `Its first ${same} of ${own.length} words are those of ${reference.name}.`;
    lane.note.textContent = `${lane.note.textContent} ${text}`.trim();
  }
}
