// The page: choose sizes, run them side by side, watch.

import { ApiError, curlOf, getMetrics, getModels, hasKey, requestOf, setKey, stream } from "./api.js";
import { Live, colour, parseMetrics } from "./chart.js";

const $ = (id) => document.getElementById(id);
const state = { name: "", cards: [], chosen: new Set(), running: null, crowd: null };
const live = new Live($("chart-mix"), $("chart-latency"), $("mix-text"), $("latency-text"));
const own = { running: {}, ttftSum: 0, ttftCount: 0, tpotSum: 0, tpotCount: 0 }; // counters of this page's requests

// --- formatting

const millions = (n) => (n >= 1e9 ? `${(n / 1e9).toFixed(2)}B` : `${(n / 1e6).toFixed(n < 1e7 ? 1 : 0)}M`);
const mib = (n) => (n >= 2 ** 30 ? `${(n / 2 ** 30).toFixed(2)} GiB` : `${(n / 2 ** 20).toFixed(n < 2 ** 23 ? 1 : 0)} MiB`);
const ms = (n) => (n >= 10000 ? `${(n / 1000).toFixed(1)} s` : `${n.toFixed(0)} ms`);

const QUALITY = [
  ["top1_agreement", (v) => `${(100 * v).toFixed(1)} % like teacher`], ["top1", (v) => `${(100 * v).toFixed(1)} % like teacher`],
  ["kl", (v) => `KL ${v.toFixed(3)}`], ["perplexity", (v) => `perplexity ${v.toFixed(2)}`], ["ppl", (v) => `perplexity ${v.toFixed(2)}`],
];

function qualityOf(card) {
  if (!card?.quality) return "not measured";
  const known = QUALITY.filter(([key]) => typeof card.quality[key] === "number");
  return known.length ? known.slice(0, 2).map(([key, show]) => show(card.quality[key])).join(", ") : "not measured";
}

// Where a size lies between student and teacher: the colour everywhere on this page.
function place(layers) {
  const low = state.cards[0].layers, high = state.cards.at(-1).layers;
  return high > low ? (layers - low) / (high - low) : 1;
}

function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

function swatch(layers) {
  const node = element("span", { class: "swatch", "aria-hidden": "true" });
  node.style.background = colour(place(layers)); // set through the DOM: allowed by the content security policy
  return node;
}

function say(text, isError = false) {
  $("status").textContent = text;
  $("status").classList.toggle("error", isError);
}

// --- choosing sizes

function showSize() {
  const card = state.cards[$("size").value];
  if (!card) return;
  const share = `${Math.round(100 * card.fraction)} % of the teacher's layers`;
  $("size-facts").textContent =
    `${card.layers} layers (${share}) · ${millions(card.parameters)} parameters · weights ${mib(card.bytes)} · ` +
    `KV ${(card.kv_bytes_per_token / 1024).toFixed(1)} KiB per token · quality: ${qualityOf(card)}`;
  $("size").setAttribute("aria-valuetext", `${card.layers} layers, ${share}`);
}

function showChips() {
  const chips = [...state.chosen].sort((a, b) => a - b).map((layers) => {
    const remove = element("button", { type: "button", "aria-label": `Remove ${layers} layers` }, "×");
    remove.addEventListener("click", () => {
      state.chosen.delete(layers);
      showChips();
      $("add").focus();
    });
    return element("li", {}, swatch(layers), `${layers}L`, remove);
  });
  $("chips").replaceChildren(...chips);
}

async function connect() {
  try {
    const models = await getModels();
    state.cards = models.filter((card) => card.layers).sort((a, b) => a.layers - b.layers);
    state.name = models.find((card) => !card.layers)?.id ?? models[0].id;
  } catch (error) {
    say(`Cannot list the models: ${error.message}`, true);
    if (!hasKey()) $("key-box").open = true;
    return;
  }
  const [first, last] = [state.cards[0], state.cards.at(-1)];
  $("model").textContent = `${state.name} · ${state.cards.length} sizes, ${millions(first.parameters)} to ${millions(last.parameters)}`;
  $("size").max = state.cards.length - 1;
  $("size").value = state.cards.length - 1;
  $("size-ticks").replaceChildren(...state.cards.map((_, i) => element("option", { value: i })));
  state.chosen = new Set([first.layers, state.cards[Math.floor(state.cards.length / 2)].layers, last.layers]);
  for (const card of state.cards) live.fractions[card.layers] = place(card.layers);
  $("legend").replaceChildren(...state.cards.map((card) => element("li", {}, swatch(card.layers), `${card.layers}L`)));
  showSize();
  showChips();
  say("Ready.");
}

// --- running

function limits() {
  const slo = {};
  for (const name of ["ttft", "tpot", "e2e"]) {
    const value = Number($(`slo-${name}`).value);
    if (value > 0) slo[`${name}_ms`] = value;
  }
  return Object.keys(slo).length ? { slo } : {};
}

function sampling() {
  const seed = $("seed").value;
  return {
    max_tokens: Number($("max-tokens").value) || 96,
    temperature: Number($("temperature").value) || 0,
    ...(seed === "" ? {} : { seed: Number(seed) }),
  };
}

function lane(layers) {
  const names = ["TTFT", "Speed", "Tokens", "Memory", "Quality", "Total"];
  const fields = Object.fromEntries(names.map((name) => [name, element("dd", {}, "–")]));
  const title = element("h3", {}, layers ? `${layers}L` : "auto");
  if (layers) title.prepend(swatch(layers));
  const text = element("p", { class: "text", tabindex: "0", "aria-label": layers ? `Answer of ${layers} layers` : "Answer of auto" });
  const list = element("dl", {}, ...names.map((name) => element("div", {}, element("dt", {}, name), fields[name])));
  const reason = element("p", { class: "reason" });
  const node = element("article", { class: "streaming", "aria-busy": "true" }, title, text, list, reason);
  return { node, title, text, fields, reason };
}

function showServed(view, size, isAuto) {
  const card = state.cards.find((candidate) => candidate.layers === size.layers);
  view.title.replaceChildren(
    swatch(size.layers), isAuto ? `auto → ${size.layers}L` : `${size.layers}L`, element("span", { class: "spacer" }),
    element("small", {}, `${millions(size.parameters)} parameters`),
  );
  view.fields.Quality.textContent = qualityOf(card);
  view.reason.textContent = `size ${Math.round(100 * size.fraction)} %, reason: ${size.reason}`;
  return card;
}

async function answer(request, view, isAuto, signal) {
  let first = null, last = 0, tokens = 0, card = null, layers = null, prompt = 0, pieces = 0;
  try {
    await stream(request, signal, (event, at) => {
      if (event.size && !card) {
        card = showServed(view, event.size, isAuto) ?? {};
        layers = event.size.layers;
        enter(layers, 1);
      }
      const choice = event.choices?.[0];
      const piece = choice?.delta?.content ?? choice?.text ?? "";
      if (piece) {
        if (first === null) first = at;
        pieces += 1;
        last = at;
        view.text.append(piece);
      }
      if (event.usage) ({ completion_tokens: tokens, prompt_tokens: prompt } = event.usage);
      const shown = tokens || pieces;
      if (first !== null) {
        view.fields.TTFT.textContent = ms(first);
        // An answer that came in one piece has no time between tokens: then all of them over all of its time.
        const rate = last > first ? (shown - 1) / (last - first) : shown / Math.max(last, 1);
        if (shown > 1) view.fields.Speed.textContent = `${(1000 * rate).toFixed(1)} tok/s`;
        view.fields.Tokens.textContent = String(shown);
        view.fields.Total.textContent = ms(at);
      }
      if (card?.bytes) view.fields.Memory.textContent = `${mib(card.bytes)} + KV ${mib(card.kv_bytes_per_token * (prompt + shown))}`;
    });
    if (first !== null) count(tokens || pieces, first, last);
  } catch (error) {
    const isStop = error.name === "AbortError";
    view.reason.textContent = isStop ? "stopped" : error.message;
    view.reason.classList.toggle("error", !isStop);
    if (!isStop && !(error instanceof ApiError)) console.error(error);
  } finally {
    enter(layers, -1);
    view.node.classList.remove("streaming");
    view.node.setAttribute("aria-busy", "false");
  }
}

function enter(layers, number) {
  if (layers) own.running[layers] = (own.running[layers] || 0) + number;
}

function count(tokens, first, last) {
  own.ttftSum += first / 1000;
  own.ttftCount += 1;
  if (tokens > 1) {
    own.tpotSum += (last - first) / 1000;
    own.tpotCount += tokens - 1;
  }
}

async function run() {
  if (state.running || !state.cards.length) return;
  const prompt = $("prompt").value;
  const wanted = [...state.chosen].sort((a, b) => a - b).map((layers) => [layers, { model: `${state.name}:${layers}L` }]);
  if ($("auto").checked) wanted.push([null, { model: state.name, ...limits() }]);
  if (!prompt.trim() || !wanted.length) {
    say(prompt.trim() ? "Choose a size, or auto." : "Write a prompt.", true);
    return;
  }
  state.running = new AbortController();
  $("run").disabled = true;
  $("stop").disabled = false;
  say(`${wanted.length} answering…`);
  const views = wanted.map(([layers]) => lane(layers));
  $("results").replaceChildren(...views.map((view) => view.node));
  const requests = wanted.map(([, body]) => requestOf({ mode: $("mode").value, prompt, body: { ...body, ...sampling() } }));
  $("curl").textContent = requests.map(curlOf).join("\n\n");
  await Promise.all(requests.map((request, i) => answer(request, views[i], wanted[i][0] === null, state.running.signal)));
  state.running = null;
  $("run").disabled = false;
  $("stop").disabled = true;
  say(`Done: ${wanted.length} answers.`);
}

// --- the crowd: background load on auto, to see sizes give way

function toggleCrowd() {
  if (state.crowd) {
    state.crowd.abort();
    state.crowd = null;
  } else {
    state.crowd = new AbortController();
    const number = Math.min(Math.max(Number($("crowd-size").value) || 1, 1), 128);
    for (let i = 0; i < number; i += 1) member(i, state.crowd.signal);
  }
  $("crowd").setAttribute("aria-pressed", String(Boolean(state.crowd)));
  $("crowd").textContent = state.crowd ? "Stop crowd" : "Start crowd";
}

async function member(index, signal) {
  for (let turn = 0; !signal.aborted; turn += 1) {
    const body = { model: state.name, max_tokens: 64, temperature: 1, seed: 1000 * index + turn, ...limits() };
    let first = null, last = 0, tokens = 0, layers = null;
    try {
      await stream(requestOf({ mode: "chat", prompt: $("prompt").value || "Hello", body }), signal, (event, at) => {
        if (layers === null && event.size) enter(layers = event.size.layers, 1);
        first ??= at;
        last = at;
        tokens = event.usage?.completion_tokens ?? tokens;
      });
      if (first !== null) count(tokens, first, last);
    } catch (error) {
      if (signal.aborted) return;
      say(`Crowd: ${error.message}`, true);
      await new Promise((resolve) => { setTimeout(resolve, 1000); }); // shed: come back a little later
    } finally {
      enter(layers, -1);
    }
  }
}

// --- the charts

let metricsVisible = true;

async function poll() {
  if (!document.hidden) {
    try {
      const text = metricsVisible ? await getMetrics() : null;
      if (text === null && metricsVisible) {
        metricsVisible = false;
        $("live-note").textContent = "Last two minutes of this page's own requests (/metrics is not reachable from here).";
      }
      live.push(performance.now(), text === null ? structuredClone(own) : parseMetrics(text));
    } catch { /* the server is away: the chart stands still */ }
  }
  setTimeout(poll, 1000);
}

// --- wiring

$("theme").value = localStorage.getItem("boomerang-theme") || "auto";
function setTheme() {
  const theme = $("theme").value;
  localStorage.setItem("boomerang-theme", theme);
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
}
$("theme").addEventListener("change", setTheme);
$("key-form").addEventListener("submit", (event) => { event.preventDefault(); $("key").blur(); });
$("key").addEventListener("change", () => { setKey($("key").value); connect(); });
$("size").addEventListener("input", showSize);
$("add").addEventListener("click", () => { state.chosen.add(state.cards[$("size").value].layers); showChips(); });
$("form").addEventListener("submit", (event) => { event.preventDefault(); run(); });
$("form").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); run(); }
});
$("stop").addEventListener("click", () => state.running?.abort());
$("crowd").addEventListener("click", toggleCrowd);
$("copy").addEventListener("click", async () => {
  try {
    await navigator.clipboard.writeText($("curl").textContent);
    say("Copied.");
  } catch {
    getSelection().selectAllChildren($("curl")); // no clipboard without TLS: select it instead
    say("Selected: copy with Ctrl C.");
  }
});
setTheme();
connect();
poll();
