// The page: choose sizes, run them side by side, watch.

import { curlOf, getMetrics, getModels, getStations, hasKey, requestOf, setKey, stream } from "./api.js";
import { Live, noTotals, parseMetrics } from "./chart.js";
import { Dial } from "./dial.js";
import { colour, element, millions } from "./format.js";
import { Lane, agree, compare } from "./lane.js";

const $ = (id) => document.getElementById(id);
const state = { name: "", running: null, crowd: null, curls: [] };
const dial = new Dial();
const chart = (name) => ({ svg: $(`chart-${name}`), text: $(`${name}-text`) });
const live = new Live({ mix: chart("mix"), ttft: chart("ttft"), tpot: chart("tpot"), rate: chart("rate") });
const own = noTotals(); // counters of this page's requests

function say(text, isError = false) {
  $("status").textContent = text;
  $("status").classList.toggle("error", isError);
}

async function connect() {
  let cards, points, precisions;
  try {
    const models = await getModels();
    const whole = models.find((card) => !card.layers);
    precisions = whole?.precisions ?? ["exact"];
    points = models.filter((card) => card.layers);
    cards = points.filter((card) => (card.precision ?? "exact") === precisions[0]).sort((a, b) => a.layers - b.layers);
    state.name = whole?.id ?? models[0].id;
  } catch (error) {
    const isLoading = error.status === 503;
    say(isLoading ? "The model is loading…" : `Cannot list the models: ${error.message}`, !isLoading);
    if (isLoading) setTimeout(connect, 1000);
    if (error.status === 401 && !hasKey()) $("key-box").open = true;
    return;
  }
  const [first, last] = [cards[0], cards.at(-1)];
  $("model").textContent = `${state.name} · ${cards.length} sizes, ${millions(first.parameters)} to ${millions(last.parameters)} parameters`;
  dial.set(cards, await getStations().catch(() => []), points, precisions);
  for (const card of cards) live.fractions[card.layers] = dial.place(card.layers);
  $("legend").setAttribute("aria-label", `Colours from ${first.layers}L to ${last.layers}L`);
  $("legend").replaceChildren(`${first.layers}L`, ramp(), `${last.layers}L`);
  say("Ready.");
}

function ramp() {
  const node = element("span", { class: "colours" });
  node.style.background = `linear-gradient(90deg, ${[0, 0.25, 0.5, 0.75, 1].map(colour).join(", ")})`;
  return node;
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

function enter(layers, number) {
  if (layers) own.running[layers] = (own.running[layers] || 0) + number;
}

function count(tokens, first, last) {
  own.ttftSum += first / 1000;
  own.ttftCount += 1;
  own.tokens += tokens;
  if (tokens > 1) {
    own.tpotSum += (last - first) / 1000;
    own.tpotCount += tokens - 1;
  }
}

// Browsers open six connections to a server. One is kept for the metrics and one for the crowd; a seventh request would
// wait inside the browser, and that wait would look like the server's.
const MAX_CONNECTIONS = 4;

async function run() {
  if (state.running) return;
  const prompt = $("prompt").value;
  const wanted = [...dial.chosen].sort((a, b) => a - b).map((layers) => [layers, { model: `${state.name}:${layers}L`, ...dial.precision }]);
  if ($("auto").checked) wanted.push([null, { model: state.name, ...limits() }]);
  if (!prompt.trim() || !wanted.length) {
    say(prompt.trim() ? "Choose a size, or auto." : "Write a prompt.", true);
    return;
  }
  state.running = new AbortController();
  $("run").disabled = true;
  $("stop").disabled = false;
  say(`${wanted.length} answering…`);
  const lanes = [];
  for (const [layers] of wanted) lanes.push(new Lane(layers, dial, { enter, count, compare: () => compare(lanes) }));
  $("results").replaceChildren(...lanes.map((lane) => lane.node));
  const requests = wanted.map(([, body]) => requestOf({ mode: $("mode").value, prompt, body: { ...body, ...sampling() } }));
  showCurls(wanted, requests);
  const todo = lanes.map((lane, i) => () => lane.run(requests[i], state.running.signal));
  const worker = async () => { while (todo.length) await todo.shift()(); };
  await Promise.all(Array.from({ length: MAX_CONNECTIONS }, worker));
  compare(lanes);
  agree(lanes);
  state.running = null;
  $("run").disabled = false;
  $("stop").disabled = true;
  say(`Done: ${wanted.length} answers.`);
}

function showCurls(wanted, requests) {
  state.curls = requests.map(curlOf);
  $("curl-of").replaceChildren(...wanted.map(([layers], i) => element("option", { value: i }, layers ? `${layers}L` : "auto")));
  $("curl-of").parentElement.hidden = false;
  $("curl-of").value = String(wanted.length - 1);
  showCurl();
}

function showCurl() {
  $("curl").textContent = state.curls[$("curl-of").value] ?? "";
}

// --- the crowd: background load on auto, to see sizes give way. One connection carries a wave of prompts.

function toggleCrowd() {
  if (state.crowd) {
    state.crowd.abort();
    state.crowd = null;
  } else {
    state.crowd = new AbortController();
    crowd(Math.min(Math.max(Number($("crowd-size").value) || 1, 1), 128), state.crowd.signal);
  }
  $("crowd").setAttribute("aria-pressed", String(Boolean(state.crowd)));
  $("crowd").textContent = state.crowd ? "Stop crowd" : "Start crowd";
}

async function crowd(number, signal) {
  for (let wave = 0; !signal.aborted; wave += 1) {
    const prompt = Array.from({ length: number }, (_, i) => `${i + 1}. ${$("prompt").value || "Hello"}\n`);
    const body = { model: state.name, prompt, max_tokens: 64, temperature: 1, seed: wave, ...limits() };
    let first = null, last = 0, tokens = 0, layers = null;
    try {
      await stream({ path: "v1/completions", body }, signal, (event, at) => {
        if (layers === null && event.size) enter(layers = event.size.layers, number);
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
      enter(layers, -number);
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
        $("live-note").textContent = "This page's own requests in the last two minutes (/metrics is not reachable from here).";
      }
      live.limits = { ttft: Number($("slo-ttft").value), tpot: Number($("slo-tpot").value) };
      const totals = text === null ? structuredClone(own) : parseMetrics(text);
      live.push(performance.now(), totals);
      // A student that came while the page was open has brought sizes.
      if (state.name && !state.running && Object.keys(totals.running).some((size) => !(size in live.fractions))) connect();
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
$("form").addEventListener("submit", (event) => { event.preventDefault(); run(); });
$("form").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); run(); }
});
$("stop").addEventListener("click", () => state.running?.abort());
$("crowd").addEventListener("click", toggleCrowd);
$("curl-of").addEventListener("change", showCurl);
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
