// All that the page asks of the server. Paths are relative to where the page was loaded from; the token goes into a
// header, never into a URL.

const BASE = new URL("../", import.meta.url); // this file is served from assets/ below the page
const TOKEN = "async-recovery-token";
const SILENCE_MS = 40_000; // a stream sends a heartbeat every 15 s: one so silent is dead
const ANSWER_MS = 30_000;
const FIRST_WAIT_MS = 250;
const LONGEST_WAIT_MS = 2_000;
const LONGEST_EVENT = 8_000_000; // characters

/** The server refused, or did not answer (status 0). The message is for people. */
export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export const token = {
  get: () => sessionStorage.getItem(TOKEN),
  set: (value) => sessionStorage.setItem(TOKEN, value),
  clear: () => sessionStorage.removeItem(TOKEN),
};

export const address = (path) => new URL(path, BASE).href;
export const jobPath = (id) => `jobs/${encodeURIComponent(id)}`;

function headers(more = {}) {
  const secret = token.get();
  return secret ? { ...more, Authorization: `Bearer ${secret}` } : more;
}

function refusal(status, text) {
  let said = null;
  try {
    const problem = JSON.parse(text);
    said = problem.detail ?? problem.title;
  } catch {
    said = null; // not ours: a proxy's page, say
  }
  return new ApiError(status, typeof said === "string" && said ? said : `The server answered ${status}.`);
}

/** The decoded answer; an ApiError if there is none, or it is a refusal. */
export async function request(method, path, { json, more, signal } = {}) {
  const body = json === undefined ? undefined : JSON.stringify(json);
  const sent = body === undefined ? headers(more) : headers({ ...more, "Content-Type": "application/json" });
  const limit = AbortSignal.timeout(ANSWER_MS);
  let response;
  try {
    const either = signal ? AbortSignal.any([signal, limit]) : limit;
    response = await fetch(address(path), { method, body, headers: sent, cache: "no-store", signal: either });
    const text = await response.text();
    if (!response.ok) throw refusal(response.status, text);
    return text ? JSON.parse(text) : null;
  } catch (error) {
    if (error instanceof ApiError || signal?.aborted) throw error;
    throw new ApiError(0, "The server does not answer.");
  }
}

/** Send a file, as it is read; `progress` gets the share sent. Returns {done: promise of {id}, stop()}. */
export function upload(file, progress) {
  const call = new XMLHttpRequest(); // fetch tells nothing of how much is sent
  const done = new Promise((resolve, reject) => {
    call.upload.onprogress = (event) => progress(event.total ? event.loaded / event.total : 1);
    call.onerror = () => reject(new ApiError(0, "The server does not answer: the file was not sent."));
    call.onabort = () => reject(new ApiError(0, "Stopped: the file was not sent."));
    call.onload = () => {
      if (call.status !== 201 && call.status !== 200) return reject(refusal(call.status, call.responseText));
      return resolve(JSON.parse(call.responseText));
    };
  });
  call.open("POST", address(`uploads?name=${encodeURIComponent(file.name)}`));
  for (const [name, value] of Object.entries(headers({ "Content-Type": "application/octet-stream" }))) {
    call.setRequestHeader(name, value);
  }
  call.send(file);
  return { done, stop: () => call.abort() };
}

/** The bytes of a path, with the token: for what a plain link can not fetch. */
export async function download(path, progress) {
  const response = await fetch(address(path), { headers: headers(), cache: "no-store" });
  if (!response.ok) throw refusal(response.status, await response.text());
  const parts = [];
  let size = 0;
  for (const reader = response.body.getReader(); ;) {
    const { done, value } = await reader.read();
    if (done) return new Blob(parts);
    parts.push(value);
    size += value.length;
    if (parts.length >= 256) parts.splice(0, parts.length, new Blob(parts)); // the browser may put a blob on disk
    progress(size);
  }
}

/** Text as it comes, in pieces cut anywhere → the events that have become whole: {id, event, data}. */
export class EventParser {
  #rest = "";
  #event = "";
  #data = [];
  #id = null;
  #size = 0;

  feed(text) {
    const found = [];
    this.#rest += text;
    const end = this.#rest.endsWith("\r") ? -1 : this.#rest.length; // half of a line end, perhaps
    const lines = (end < 0 ? this.#rest.slice(0, -1) : this.#rest).split(/\r\n|\n|\r/);
    this.#rest = lines.pop() + (end < 0 ? "\r" : "");
    for (const line of lines) this.#line(line, found);
    if (this.#rest.length + this.#size > LONGEST_EVENT) throw new Error("an event of the stream is too long");
    return found;
  }

  #line(line, found) {
    if (line === "") {
      if (this.#data.length) found.push({ id: this.#id, event: this.#event || "message", data: this.#data.join("\n") });
      this.#event = "";
      this.#data = [];
      this.#size = 0;
      return;
    }
    const colon = line.indexOf(":");
    const name = colon < 0 ? line : line.slice(0, colon);
    const value = colon < 0 ? "" : line.slice(colon + (line[colon + 1] === " " ? 2 : 1));
    this.#size += line.length;
    if (name === "data") this.#data.push(value);
    if (name === "event") this.#event = value;
    if (name === "id" && !value.includes("\0")) this.#id = value;
  }
}

/**
 * One job's events, for as long as it is open: it connects again by itself, and goes on where it was.
 * Calls onEvent(name, data, boot), onState("live" | "away"), and at its end onEnd(401 | 404).
 */
export class Stream {
  #stopped = new AbortController();
  #last = null; // the id of the last event

  constructor(id, { onEvent, onState, onEnd }) {
    this.path = `${jobPath(id)}/events`;
    this.onEvent = onEvent;
    this.onState = onState;
    this.onEnd = onEnd;
    this.#follow();
  }

  close() {
    this.#stopped.abort();
  }

  async #follow() {
    let wait = FIRST_WAIT_MS;
    while (!this.#stopped.signal.aborted) {
      try {
        await this.#connect(() => {
          wait = FIRST_WAIT_MS;
        });
      } catch (error) {
        if (this.#stopped.signal.aborted) return;
        if (error.status === 401 || error.status === 404) return this.onEnd(error.status);
      }
      if (this.#stopped.signal.aborted) return;
      this.onState("away");
      await new Promise((resolve) => setTimeout(resolve, wait * (0.75 + Math.random() / 4)));
      wait = Math.min(LONGEST_WAIT_MS, wait * 2);
    }
  }

  async #connect(connected) {
    const dead = new AbortController();
    let timer = setTimeout(() => dead.abort(), SILENCE_MS);
    try {
      const more = this.#last === null ? {} : { "Last-Event-ID": this.#last };
      const response = await fetch(address(this.path), {
        headers: headers({ ...more, Accept: "text/event-stream" }),
        cache: "no-store",
        signal: AbortSignal.any([this.#stopped.signal, dead.signal]),
      });
      if (!response.ok) throw new ApiError(response.status, `The server answered ${response.status}.`);
      const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
      const parser = new EventParser();
      this.onState("live"); // a job that rests may say nothing for long
      for (let first = true; ; first = false) {
        const { done, value } = await reader.read();
        if (done || this.#stopped.signal.aborted) return;
        clearTimeout(timer);
        timer = setTimeout(() => dead.abort(), SILENCE_MS);
        if (first) connected();
        for (const event of parser.feed(value)) this.#take(event);
      }
    } finally {
      clearTimeout(timer);
      dead.abort(); // whatever went wrong, this connection is closed before there is another
    }
  }

  #take({ id, event, data }) {
    const boot = id === null ? null : id.slice(0, id.lastIndexOf("-"));
    this.onEvent(event, JSON.parse(data), boot);
    if (id !== null) this.#last = id;
  }
}
