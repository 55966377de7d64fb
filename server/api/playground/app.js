// The page: choose sizes, ask them one after another or all at once, watch the server.

import { getMetrics, getModel, getModels, getPair, hasKey, setKey, stream, wake } from "./api.js";
import { Conversation } from "./conversation.js";
import { Dial } from "./dial.js";
import { colour, element, millions, plural } from "./format.js";
import { Lane, agree, compare } from "./lane.js";
import { Live, noTotals, parseMetrics } from "./live.js";
import { codeOf } from "./snippet.js";

const $ = (id) => document.getElementById(id);
const state = { name: "", running: null, crowd: null, asked: null, watching: null };
const dial = new Dial(() => formChanged());
const conversation = new Conversation($("transcript"));
const chart = (name) => ({ node: $(`chart-${name}`), text: $(`${name}-text`) });
const live = new Live({ mix: chart("mix"), ttft: chart("ttft"), tpot: chart("tpot"), rate: chart("rate") });
const own = noTotals(); // counters of this page's requests

function say(text) {
  $("status").textContent = text;
  $("alert").textContent = "";
}

// Announced at once, as an error.
function complain(text) {
  $("status").textContent = "";
  $("alert").textContent = text;
}

// --- connecting: locked, loading, open

function lock(isLocked, problem = "") {
  $("locked").hidden = !isLocked;
  $("open").hidden = isLocked;
  $("forget-key").hidden = isLocked || !hasKey();
  $("key-problem").textContent = problem;
  $("key").setAttribute("aria-invalid", String(problem !== ""));
  if (isLocked) {
    $("model").textContent = "locked";
    $("key").focus();
  }
}

async function connect() {
  let models, pair;
  try {
    [models, pair] = await Promise.all([getModels(), getPair()]);
  } catch (error) {
    if (error.status === 401) return lock(true, hasKey() ? "This key is not known here." : "");
    lock(false);
    $("run").disabled = true;
    if (error.status === 503) say("The model is loading…");
    else complain(`The server does not answer: ${error.message}`);
    setTimeout(connect, error.status === 503 ? 1000 : 3000);
    return;
  }
  lock(false);
  const whole = models.find((card) => !card.layers) ?? models[0];
  const precisions = whole.precisions ?? ["exact"];
  const cards = models.filter((card) => card.layers && (card.precision ?? "exact") === precisions[0]).sort((a, b) => a.layers - b.layers);
  const [first, last] = [cards[0], cards.at(-1)];
  state.name = whole.id;
  $("model").textContent = `${state.name}: ${plural(cards.length, "size")}, ${millions(first.parameters)} to ${millions(last.parameters)} parameters`;
  dial.set(state.name, cards, pair, precisions);
  for (const card of cards) live.fractions[card.layers] = dial.place(card.layers);
  $("legend").setAttribute("aria-label", `Colours from ${first.layers}L to ${last.layers}L`);
  $("legend").replaceChildren(`${first.layers}L`, ramp(), `${last.layers}L`);
  $("run").disabled = false;
  say("Ready.");
  formChanged();
  if (whole.sleep) watchSleep(whole.sleep);
}

function ramp() {
  const node = element("span", { class: "colours" });
  node.style.background = `linear-gradient(90deg, ${[0, 0.25, 0.5, 0.75, 1].map(colour).join(", ")})`;
  return node;
}

// Larger sizes may have given back their memory: they answer too, once they are awake.
function watchSleep(sleep) {
  const isAsleep = sleep.state === "asleep";
  $("sleep").hidden = sleep.state === "awake" || sleep.state === "falling_asleep";
  $("wake").hidden = !isAsleep;
  const seconds = sleep.seconds_to_wake ? ` (${sleep.seconds_to_wake.toFixed(1)} s last time)` : "";
  $("sleep-text").textContent = isAsleep
    ? `Sizes above ${sleep.largest} are asleep to save memory. ${sleep.largest} answers at once; a larger one wakes up first${seconds}.`
    : "Larger sizes are waking up…";
  clearTimeout(state.watching);
  state.watching = setTimeout(async () => watchSleep((await getModel(state.name).catch(() => null))?.sleep ?? sleep), isAsleep ? 4000 : 1000);
}

// --- what is asked

function limits() {
  const slo = {};
  for (const name of ["ttft", "tpot", "e2e"]) {
    const value = Number($(`slo-${name}`).value);
    if (value > 0) slo[`${name}_ms`] = value;
  }
  return Object.keys(slo).length ? { slo } : {};
}

// Empty fields are left to the server, which knows what the model's makers advise.
function settings() {
  const given = { max_tokens: $("max-tokens"), temperature: $("temperature"), seed: $("seed") };
  return Object.fromEntries(Object.entries(given).filter(([, field]) => field.value !== "").map(([name, field]) => [name, Number(field.value)]));
}

// Each point that is to answer, auto last, with its request. `prompt` empty: the latest question again.
function requests(prompt) {
  const isChat = $("mode").value === "chat";
  const asked = isChat ? { messages: conversation.messages($("system").value.trim(), prompt.trim()) } : { prompt };
  const path = isChat ? "v1/chat/completions" : "v1/completions";
  const points = [...dial.chosen.values(), ...($("auto").checked ? [null] : [])];
  return points.map((point) => ({ point, path, body: { model: point ? dial.id(point) : state.name, ...asked, ...settings(), ...(point ? {} : limits()) } }));
}

// What would make the answers that are shown other ones, but for the question.
const circumstances = () => JSON.stringify([$("mode").value, $("system").value, settings(), limits()]);

function formChanged() {
  const isChat = $("mode").value === "chat";
  document.querySelector("label[for=prompt]").textContent = isChat ? "Your message" : "Text to continue";
  $("system").disabled = !isChat;
  $("again").hidden = !isChat || !conversation.latest;
  $("new").hidden = !isChat || !conversation.latest;
  const isStale = state.asked !== null && (state.asked.circumstances !== circumstances() || (!isChat && state.asked.prompt !== $("prompt").value));
  $("stale").hidden = !isStale;
  $("results").classList.toggle("stale", isStale);
  showCode();
}

function showCode() {
  if (!state.name) return;
  const all = requests($("prompt").value || (conversation.latest ? "" : "Hello"));
  const names = all.map(({ point }) => (point ? dial.name(point) : "auto"));
  const before = $("code-of").value;
  $("code-of").replaceChildren(...names.map((name) => element("option", { value: name }, name)));
  $("code-of").value = names.includes(before) ? before : names.at(-1) ?? "";
  const request = all[names.indexOf($("code-of").value)];
  $("code").textContent = request ? codeOf($("code-as").value, request, hasKey()) : "Choose a size, or auto.";
}

// --- running

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

async function run(isAgain) {
  if (state.running || $("run").disabled) return;
  const isChat = $("mode").value === "chat", prompt = isAgain ? "" : $("prompt").value;
  const todo = requests(prompt);
  if (!isAgain && !prompt.trim()) return complain("Write a message first.");
  if (!todo.length) return complain("Choose a size, or auto.");
  const lanes = todo.map(({ point }) => new Lane(point, dial, { enter, count, compare: () => compare(lanes) }, isChat));
  if (isAgain) conversation.askAgain(lanes);
  else if (isChat) {
    conversation.ask(prompt.trim(), lanes);
    $("prompt").value = "";
  }
  const running = new AbortController();
  Object.assign(state, { running, asked: { circumstances: circumstances(), prompt } });
  for (const id of ["run", "again", "new"]) $(id).disabled = true;
  $("stop").disabled = false;
  $("results").replaceChildren(...lanes.map((lane) => lane.node));
  formChanged();
  const width = $("race").checked ? Math.min(MAX_CONNECTIONS, todo.length) : 1;
  const waiting = lanes.map((lane, i) => [lane, todo[i]]);
  const worker = async () => {
    while (waiting.length) {
      const [lane, request] = waiting.shift();
      say(width > 1 ? `${plural(lanes.length, "size")} answering at once…` : `${lane.name} answers, ${lanes.indexOf(lane) + 1} of ${lanes.length}…`);
      await lane.run(request, running.signal, width - 1);
    }
  };
  await Promise.all(Array.from({ length: width }, worker));
  compare(lanes);
  agree(lanes);
  state.running = null;
  for (const id of ["run", "again", "new"]) $(id).disabled = false;
  $("stop").disabled = true;
  report(lanes, prompt, isChat);
  formChanged();
}

function report(lanes, prompt, isChat) {
  const [failed, stopped] = ["failed", "stopped"].map((what) => lanes.filter((lane) => lane.state === what));
  const number = lanes.length - failed.length - stopped.length;
  if (failed.length) {
    const some = failed.length < lanes.length ? `${failed.map((lane) => lane.name).join(", ")} failed` : "No answer";
    complain(`${some}: ${failed[0].error.message}`);
  } else say(`${stopped.length ? "Stopped" : "Done"}: ${plural(number, "answer")}.`);
  // Nothing came of it: the message is there again, to be changed.
  if (isChat && prompt && !lanes.some((lane) => lane.isDone) && !$("prompt").value) {
    $("prompt").value = prompt;
    conversation.latest = null;
    conversation.show();
  }
  if (failed.some((lane) => lane.error.status === 401)) connect();
}

function startAnew() {
  conversation.clear();
  state.asked = null;
  $("results").replaceChildren(element("p", { class: "empty" }, "A new conversation."));
  say("A new conversation.");
  formChanged();
  $("prompt").focus();
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
      complain(`Crowd: ${error.message}`);
      await new Promise((resolve) => { setTimeout(resolve, 1000); }); // shed: come back a little later
    } finally {
      enter(layers, -number);
    }
  }
}

// --- the charts

const NOTES = { server: "The last two minutes.", own: "This page's own requests in the last two minutes: the server's figures are not open to it." };
let source = "server";

async function poll() {
  if (!document.hidden && state.name) {
    const now = () => performance.now();
    live.limits = { ttft: Number($("slo-ttft").value), tpot: Number($("slo-tpot").value) };
    try {
      const text = source === "server" ? await getMetrics() : null;
      if (text === null) source = "own";
      const totals = text === null ? structuredClone(own) : parseMetrics(text);
      live.push(now(), totals);
      // A student that came while the page was open has brought sizes.
      if (!state.running && Object.keys(totals.running).some((size) => !(size in live.fractions))) connect();
    } catch {
      live.draw(now());
    }
    const age = live.age(now());
    $("live-note").textContent = age ? `Out of date: nothing heard from the server for ${age} s.` : NOTES[source];
    $("live-note").classList.toggle("stale-note", age > 0);
    $("charts").classList.toggle("stale", age > 0);
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
  if (dial.cards.length) dial.show();
}
$("theme").addEventListener("change", setTheme);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", setTheme);
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  setKey($("key").value);
  connect();
});
$("forget-key").addEventListener("click", () => {
  setKey("");
  $("key").value = "";
  connect();
});
$("wake").addEventListener("click", async () => {
  $("wake").hidden = true;
  $("sleep-text").textContent = "Larger sizes are waking up…";
  await wake().catch((error) => complain(error.message));
});
$("form").addEventListener("submit", (event) => { event.preventDefault(); run(false); });
$("form").addEventListener("input", formChanged);
$("form").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); run(false); }
});
$("again").addEventListener("click", () => run(true));
$("new").addEventListener("click", startAnew);
$("stop").addEventListener("click", () => state.running?.abort());
$("results").addEventListener("change", formChanged);
$("crowd").addEventListener("click", toggleCrowd);
for (const id of ["code-of", "code-as"]) $(id).addEventListener("change", showCode);
$("copy").addEventListener("click", async () => {
  try {
    await navigator.clipboard.writeText($("code").textContent);
    say("Copied.");
  } catch {
    getSelection().selectAllChildren($("code")); // no clipboard without TLS: select it instead
    say("Selected: copy with Ctrl C.");
  }
});
setTheme();
connect();
poll();
