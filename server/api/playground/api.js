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
  sessionStorage.setItem("boomerang-key", apiKey);
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
  if (response.status === 401) message += " (set the API key above)";
  throw new ApiError(message, response.status);
}

export async function getModels() {
  const response = await fetch("v1/models", { headers: headers() });
  if (!response.ok) await refuse(response);
  return (await response.json()).data;
}

// How the pair interlocks: [{start, stop, threshold}] by station. Empty where the server does not tell.
export async function getStations() {
  const response = await fetch("playground/pair.json");
  return response.ok ? (await response.json()).stations : [];
}

export async function getMetrics() {
  const response = await fetch("metrics", { headers: headers() });
  return response.ok ? response.text() : null;
}

export function requestOf({ mode, prompt, body }) {
  return mode === "chat"
    ? { path: "v1/chat/completions", body: { ...body, messages: [{ role: "user", content: prompt }] } }
    : { path: "v1/completions", body: { ...body, prompt } };
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
  throw new ApiError("the stream ended early: the replica went away");
}

export function curlOf({ path, body }) {
  const url = new URL(path, document.baseURI);
  const json = JSON.stringify({ ...body, stream: true }).replaceAll("'", "'\\''");
  const auth = apiKey ? ' \\\n  -H "Authorization: Bearer $BOOMERANG_API_KEY"' : "";
  return `curl -N ${url} \\\n  -H 'Content-Type: application/json'${auth} \\\n  -d '${json}'`;
}
