// Requests to the server that this page came from, and to no other. Addresses are relative, so that the page also works
// below a path of a proxy.

export class ServerError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

export const getKey = () => sessionStorage.getItem("paligemma-key");
export const setKey = (key) => sessionStorage.setItem("paligemma-key", key);

async function request(path, options = {}) {
  const headers = { ...options.headers };
  if (getKey()) headers.Authorization = `Bearer ${getKey()}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server does not answer. Is it still running?");
  }
  if (response.ok) return response;
  const text = await response.text();
  let message = `${response.status} ${response.statusText}`.trim(); // of a proxy, which does not speak JSON
  try {
    message = JSON.parse(text).error.message;
  } catch {
    // keep the status line
  }
  const wait = response.headers.get("Retry-After");
  if (wait) message += ` (try again in ${wait} s)`;
  throw new ServerError(message, response.status);
}

const post = (path, body, signal) =>
  request(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal });

export async function model() {
  return (await (await request("v1/models")).json()).data[0];
}

export const example = async () => (await request("static/example.png")).blob();

export async function explore(image, prompt) {
  const { url } = await (await post("v1/explore", { image, prompt })).json();
  return new URL(url.replace(/^\//, ""), document.baseURI).href;
}

// The answer as it is written: yields the JSON of each server-sent event. Aborting the signal closes the connection,
// and that is what tells the server to stop.
export async function* answer(model, image, prompt, signal) {
  const content = [{ type: "image_url", image_url: { url: image } }, { type: "text", text: prompt }];
  const body = { model, messages: [{ role: "user", content }], stream: true, stream_options: { include_usage: true } };
  const response = await post("v1/chat/completions", body, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let waiting = ""; ; ) {
    const { value, done } = await reader.read();
    if (done) throw new ServerError("The answer broke off: the server closed the connection.");
    const lines = (waiting + value).split(/\r?\n/);
    waiting = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue; // comments keep the connection open
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new ServerError(event.error.message, 500);
      yield event;
    }
  }
}
