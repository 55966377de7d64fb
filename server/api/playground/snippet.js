// The request as code that runs as it is shown: Python with OpenAI's client, or curl.

// What OpenAI's client takes by name; the rest goes through its extra_body.
const NAMED = new Set(["model", "messages", "prompt", "max_tokens", "temperature", "seed"]);

// JSON's strings and numbers are Python's, too.
function python(value, indent = "") {
  const inner = `${indent}    `;
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (typeof value !== "object") return JSON.stringify(value);
  const isList = Array.isArray(value);
  const items = isList ? value.map((item) => python(item, inner)) : Object.entries(value).map(([key, item]) => `${JSON.stringify(key)}: ${python(item, inner)}`);
  const [open, close] = isList ? "[]" : "{}";
  const line = `${open}${items.join(", ")}${close}`;
  if (line.length + indent.length < 100 && !line.includes("\n")) return line;
  return `${open}\n${items.map((item) => `${inner}${item},\n`).join("")}${indent}${close}`;
}

function pythonOf({ path, body }, hasKey) {
  const named = Object.entries(body).filter(([name]) => NAMED.has(name));
  const extra = Object.fromEntries(Object.entries(body).filter(([name]) => !NAMED.has(name)));
  const fields = named.map(([name, value]) => `    ${name}=${python(value, "    ")},\n`);
  if (Object.keys(extra).length) fields.push(`    extra_body=${python(extra, "    ")},\n`);
  const isChat = path.endsWith("chat/completions");
  const key = hasKey ? 'os.environ["BOOMERANG_API_KEY"]' : '"none"';
  return `${hasKey ? "import os\n\n" : ""}from openai import OpenAI

client = OpenAI(base_url=${JSON.stringify(new URL("v1", document.baseURI).href)}, api_key=${key})
stream = client.${isChat ? "chat.completions" : "completions"}.create(
${fields.join("")}    stream=True,
)
for chunk in stream:
    print(chunk.choices[0].${isChat ? 'delta.content or ""' : "text"}, end="", flush=True)
print()`;
}

function curlOf({ path, body }, hasKey) {
  const json = JSON.stringify({ ...body, stream: true }).replaceAll("'", "'\\''");
  const auth = hasKey ? ' \\\n  -H "Authorization: Bearer $BOOMERANG_API_KEY"' : "";
  return `curl -N ${new URL(path, document.baseURI)} \\\n  -H 'Content-Type: application/json'${auth} \\\n  -d '${json}'`;
}

export const codeOf = (language, request, hasKey) => (language === "curl" ? curlOf : pythonOf)(request, hasKey);
