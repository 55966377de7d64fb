// Talks to the server this page came from. URLs are relative, so that a path prefix of a proxy is kept.

export class ApiError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

let apiKey = sessionStorage.getItem("boomerang-key") || "";

export function setKey(key) {
  apiKey = key.trim();
  if (apiKey) sessionStorage.setItem("boomerang-key", apiKey);
  else sessionStorage.removeItem("boomerang-key");
}

export const hasKey = () => apiKey !== "";

function headers(extra = {}) {
  return apiKey ? { ...extra, Authorization: `Bearer ${apiKey}` } : extra;
}

async function refuse(response) {
  let message = `HTTP ${response.status}`;
  try {
    message = (await response.json()).error.message || message;
  } catch { /* not our JSON: the status says it */ }
  throw new ApiError(message, response.status);
}

async function getJSON(path) {
  const response = await fetch(path, { headers: headers() });
  if (!response.ok) await refuse(response);
  return response.json();
}

export const getModels = async () => (await getJSON("v1/models")).data;
export const getModel = (name) => getJSON(`v1/models/${name}`);
// How the pair interlocks, [{start, stop, threshold}] by station, and every point of layers and precision.
export const getPair = () => getJSON("playground/pair.json");

export async function getMetrics() {
  const response = await fetch("metrics", { headers: headers() });
  return response.ok ? response.text() : null;
}

export async function wake() {
  const response = await fetch("wake", { method: "POST", headers: headers() });
  if (!response.ok) await refuse(response);
}

// Streams one answer. Calls onEvent for each JSON event with the time (ms) since the request was sent.
export async function stream({ path, body }, signal, onEvent) {
  const started = performance.now();
  const response = await fetch(path, {
    method: "POST",
    headers: headers({ "Content-Type": "application/json" }),
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  if (!response.ok) await refuse(response);
  const decoder = new TextDecoder();
  let buffer = "";
  const reader = response.body.getReader();
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    buffer += decoder.decode(value, { stream: true });
    const lines = buffer.split("\n");
    buffer = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ")) continue;
      if (line === "data: [DONE]") return;
      const event = JSON.parse(line.slice(6));
      if (event.error) throw new ApiError(event.error.message || "the server reported an error");
      onEvent(event, performance.now() - started);
    }
  }
  throw new ApiError("The answer broke off: the server went away.");
}
