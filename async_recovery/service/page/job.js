// One job: its stream of events, what is drawn of it, and what can be done to it.

import { Stream, address, download, jobPath, request, token } from "./api.js";
import { $, attr, drawer, el, keyed, say, show, text, visible } from "./dom.js";
import { Failures, fillErrors, plain } from "./failures.js";
import { bytes, clock, count, duration, percent, rate, span, NONE } from "./format.js";
import { History, commits, nearest, speeds, within } from "./history.js";
import { SIGNS, fillState } from "./list.js";
import { Lines, Strip, others, parts, words } from "./picture.js";

const ENDED = new Set(["complete", "failed", "cancelled"]);
const LATE_COMMIT_S = 30;
const MOST_EVENTS = 100;
const ASKED = {
  cancel: ["Cancel this job?", "What is finished stays committed; the job can not go on afterwards.", "Cancel the job"],
  delete: ["Delete this job?", "Its output, failures and history go with it.", "Delete it"],
};
const WHAT = { retry: "failed items again", storage: "storage", changed: "changed" };

/** Which buttons a job's state allows. */
export function allowed(job, failed) {
  const can = {
    running: ["pause", "cancel"],
    paused: ["unpause", "cancel"],
    queued: ["cancel"],
    complete: ["delete"],
    failed: ["retry-failed", "delete"],
    cancelled: ["delete"],
  };
  const found = [...(can[job.state] ?? [])];
  if (job.state === "complete" && failed > 0) found.push("retry-failed");
  return found;
}

export class JobView {
  #id = null;
  #stream = null;
  #steers = false;
  #hasOutput = true; // false where the records go to no file, but to a database, say
  #drawn = "";
  #patched = {}; // what the fields were last filled with

  constructor({ report, refused, gone }) {
    Object.assign(this, { report, refused, gone, cursor: null, range: null, speeds: new Map() });
    this.draw = drawer(() => this.#draw());
    const onCursor = (time, step) => this.#point(time, step);
    this.speedOf = (sample) => this.speeds.get(sample) ?? null;
    this.strip = new Strip($("strip"));
    this.lines = new Lines($("lines"), onCursor);
    this.charts = others($("charts"), onCursor, this.speedOf);
    this.failures = new Failures(refused);
    new ResizeObserver(() => this.draw()).observe($("view-job"));
    $("range").addEventListener("change", (event) => {
      this.range = Number(event.target.value);
      this.draw();
    });
    for (const button of document.querySelectorAll("[data-action]")) {
      button.addEventListener("click", () => this.#act(button.dataset.action));
    }
    $("tune").addEventListener("input", () => this.#tunable());
    $("tune").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#tune();
    });
    $("download").addEventListener("click", (event) => this.#download(event));
  }

  allow(service) {
    this.#steers = !service.read_only;
    this.#hasOutput = service.has_output !== false;
    show($("back"), this.#steers);
    attr($("tune").elements.concurrency, "max", service.max_concurrency);
    this.draw();
  }

  /** Follow that job, and no other. */
  open(id) {
    if (this.#id === id) return;
    this.close();
    this.#id = id;
    this.job = null;
    this.errors = [];
    this.cursor = this.range = null; // as long as nobody has chosen: the last minutes of a job that runs, or all
    this.history = new History();
    this.speeds = new Map();
    this.#drawn = "";
    this.#patched = {};
    text($("job-error"), "");
    text($("download-text"), "");
    show($("job-body"), false);
    this.failures.open(id);
    this.#stream = new Stream(id, {
      onEvent: (name, data, boot) => this.#take(name, data, boot),
      onState: (state) => this.#id === id && this.report(state),
      onEnd: (status) => {
        this.close();
        if (status === 404) this.gone();
        else this.refused(status);
      },
    });
  }

  close() {
    this.#stream?.close();
    this.#stream = this.#id = null;
    this.failures.close();
  }

  #take(name, data, boot) {
    if (name === "job") this.#changed(data, boot);
    if (name === "sample") {
      this.history.add(data, boot);
      if (this.history.last?.time === data.time) this.errors = data.errors ?? [];
    }
    const ended = this.job?.state === "complete" ? this.job.summary?.failed : null; // the last sample may be older
    this.failures.want(ended ?? this.history.last?.failed ?? this.job?.summary?.failed ?? 0);
    this.draw();
  }

  #changed(job, boot) {
    if (job.id !== this.#id) return;
    if (this.job && this.job.state !== job.state) say(`The job is ${job.state}. ${job.reason ?? ""}`);
    this.job = job;
    this.#title(); // it is seen even while the tab is not
    if (job.sample) {
      this.history.add(job.sample, boot);
      if (this.history.last?.time === job.sample.time) this.errors = job.sample.errors ?? [];
    }
  }

  // ---- what can be done

  async #act(action) {
    const id = this.#id;
    if (ASKED[action] && !(await sure(...ASKED[action]))) return;
    if (action === "delete") {
      if ((await this.#ask("DELETE", jobPath(id))) !== undefined) location.hash = "#/";
      return;
    }
    await this.#ask("POST", `${jobPath(id)}/${action}`);
    this.draw(); // what has become of the job comes with the events: the answer may be older than the last of them
  }

  async #tune() {
    const wanted = this.#wanted();
    if ((await this.#ask("PATCH", jobPath(this.#id), wanted)) === undefined) return;
    this.#patched = {};
    say("Applied.");
    this.draw();
  }

  /** The answer; undefined, and the refusal is shown, if there is none. */
  async #ask(method, path, json) {
    if (this.busy) return undefined; // pressed twice
    text($("job-error"), "");
    this.busy = true; // not `disabled`, which would take the focus away
    attr($("controls"), "aria-busy", "true");
    try {
      return await request(method, path, { json });
    } catch (error) {
      if (error.status === 401) this.refused(401);
      else
        text(
          $("job-error"),
          error.status
            ? error.message
            : `${error.message} It is not known whether this was done; try again when it is back.`,
        );
      return undefined;
    } finally {
      this.busy = false;
      attr($("controls"), "aria-busy", null);
    }
  }

  async #download(event) {
    if (token.get() === null) return; // the browser does it, with an ordinary link
    event.preventDefault();
    try {
      const blob = await download(`${jobPath(this.#id)}/output`, (size) => text($("download-text"), bytes(size)));
      const link = el("a", { href: URL.createObjectURL(blob), download: `${this.#id}.jsonl` });
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
      text($("download-text"), `${bytes(blob.size)}, done`);
    } catch (error) {
      text($("download-text"), error.message);
    }
  }

  #point(time, step) {
    const samples = this.shown ?? [];
    if (step !== undefined && samples.length) {
      const at = samples.indexOf(this.cursor ?? samples.at(-1));
      this.cursor = samples[Math.max(0, Math.min(samples.length - 1, at + step))];
      this.speak = true;
    } else {
      this.cursor = time === null || !samples.length ? null : nearest(samples, time);
    }
    this.draw();
  }

  // ---- what is drawn

  #draw() {
    const { job, history } = this;
    if (!this.#id || !job) return;
    show($("job-body"), true);
    const latest = history.last;
    this.#measure();
    this.#head(latest);
    this.#controls(latest);
    this.#tiles(latest);
    this.#picture(latest);
    this.failures.draw();
    fillErrors(this.errors);
    this.#events();
  }

  #measure() {
    const { samples, restarts, version } = this.history;
    if (this.measured === this.history && this.version === version) return;
    [this.measured, this.version] = [this.history, version];
    const all = speeds(samples, restarts);
    this.speeds = new Map(samples.map((sample, at) => [sample, all[at]]));
  }

  #title() {
    const share = this.#share(this.history.last);
    const done = share === null ? "" : `${percent(share)} · `;
    document.title = visible(`${SIGNS[this.job.state] ?? ""} ${done}${this.job.worker} · ${this.job.state}`);
  }

  #head(latest) {
    const { job } = this;
    text($("job-worker"), job.worker);
    text($("job-input"), job.input?.name);
    const size = job.input?.bytes ? bytes(job.input.bytes) : null;
    text(
      $("job-meta"),
      [`job ${job.id}`, size, `created ${clock(job.created)}`, job.ended ? `ended ${clock(job.ended)}` : null]
        .filter(Boolean)
        .join(" · "),
    );
    fillState($("job-state"), job);
    const reason = job.reason ?? (job.state === "running" ? latest?.paused : null) ?? "";
    text($("job-reason"), plain(reason));
    attr($("job-reason"), "data-state", job.state);
    show($("job-reason"), reason !== "");
    const share = this.#share(latest);
    this.#title();
    attr($("progress-done"), "width", `${100 * (share ?? 0)}%`);
    attr($("progress"), "data-state", job.state);
    attr($("progress"), "aria-valuenow", share === null ? null : Math.floor(share * 100));
    attr($("progress"), "aria-valuetext", share === null ? "not known" : percent(share));
  }

  #share(latest) {
    if (this.job.state === "complete") return 1;
    return typeof latest?.share === "number" ? Math.min(1, Math.max(0, latest.share)) : null;
  }

  #controls(latest) {
    const { job } = this;
    show($("controls"), this.#steers);
    const can = allowed(job, job.summary?.failed ?? latest?.failed ?? 0);
    const focused = document.activeElement;
    for (const button of document.querySelectorAll("[data-action]")) show(button, can.includes(button.dataset.action));
    if (focused?.dataset?.action && focused.hidden) {
      ($("controls").querySelector("[data-action]:not([hidden])") ?? $("job-title")).focus();
    }
    show($("tune"), !ENDED.has(job.state));
    const fields = $("tune").elements;
    for (const name of ["concurrency", "rate"]) {
      const value = String(job.options?.[name] ?? "");
      if (this.#patched[name] === value) continue;
      const touched = name in this.#patched && fields[name].value !== this.#patched[name];
      this.#patched[name] = value;
      if (!touched) fields[name].value = value; // what a person types is not overwritten
    }
    this.#tunable();
    show($("download"), this.#hasOutput);
    if (token.get() === null) attr($("download"), "href", address(`${jobPath(job.id)}/output`));
    else attr($("download"), "href", "#");
    const until = ENDED.has(job.state) ? "" : "what is committed until now";
    text($("download-hint"), this.#hasOutput ? until : "The records go to no file: there is nothing to download.");
  }

  #wanted() {
    const fields = $("tune").elements;
    const found = {};
    if (fields.concurrency.value !== this.#patched.concurrency) found.concurrency = Number(fields.concurrency.value);
    if (fields.rate.value !== this.#patched.rate)
      found.rate = fields.rate.value === "" ? null : Number(fields.rate.value);
    return found;
  }

  #tunable() {
    const button = $("tune").querySelector("button");
    button.disabled = Object.keys(this.#wanted()).length === 0;
  }

  #tiles(latest) {
    const { job } = this;
    const done = job.state === "complete";
    const total = job.summary?.total_items ?? null;
    const finished = total ?? latest?.finished;
    const share = this.#share(latest);
    text($("tile-finished"), count(finished));
    const about = share > 0 && !done ? ` of about ${count(Number((finished / share).toPrecision(3)))}` : "";
    text($("tile-share"), share === null ? "" : `${percent(share)}${about}`);
    const running = job.state === "running";
    const ended = ENDED.has(job.state);
    const ran = job.started === null ? null : (job.ended ?? latest?.time ?? job.started) - job.started;
    text($("tile-left-name"), ended ? "Time taken" : "Time left");
    text($("tile-left"), ended ? duration(ran) : running ? duration(latest?.remaining_s) : NONE);
    text($("tile-ran"), ended || ran === null ? "" : `${duration(ran)} since its start`);
    text($("tile-speed"), running ? rate(latest?.items_per_s) : ended && ran > 0 ? rate(finished / ran) : NONE);
    const retries = latest?.retries ? `${count(latest.retries)} ${latest.retries === 1 ? "retry" : "retries"}` : null;
    text($("tile-retries"), [ended && ran > 0 ? "on the whole" : null, retries].filter(Boolean).join(" · "));
    text($("tile-commit"), running ? duration(latest?.since_commit_s) : NONE);
    const late = running && latest?.since_commit_s > LATE_COMMIT_S && latest.mark > latest.durable_mark;
    attr($("tile-commit"), "data-level", late ? "slow" : null);
    text($("tile-commit-s"), typeof latest?.commit_s === "number" ? `the last took ${span(latest.commit_s)}` : "");
    const failed = job.summary?.failed ?? latest?.failed;
    text($("tile-failed"), count(failed));
    attr($("tile-failed"), "data-level", failed > 0 ? "bad" : null);
    text(
      $("tile-failed-share"),
      failed > 0 && finished > 0 ? `${((100 * failed) / finished).toPrecision(2)}\u202f% of them` : "",
    );
  }

  #picture(latest) {
    for (const part of [$("picture"), $("charts")]) show(part, latest !== null);
    const said = words(this.job, latest, this.speedOf(latest));
    text($("held-lead"), said.lead);
    text($("held-rest"), said.rest);
    attr($("held"), "data-level", said.level);
    this.strip.draw(this.job, latest, said);
    const ended = ENDED.has(this.job.state);
    const now = parts(latest ?? {}, ended);
    for (const [name, value] of [
      ["below", now.mark],
      ["pending", now.mark - now.durable],
      ["ahead", now.ahead],
      ["flight", now.flight],
      ["room", ended ? null : now.room],
    ]) {
      text($(`part-${name}`), count(value));
    }
    if (latest) this.#overTime(latest);
  }

  #overTime(latest) {
    const { history } = this;
    if (this.cursor && !history.samples.includes(this.cursor)) this.cursor = nearest(history.samples, this.cursor.time);
    const reach = this.#reach(latest);
    const seen = [history.version, reach, $("view-job").clientWidth, this.cursor?.time, this.job.events?.length].join();
    if (seen === this.#drawn) return;
    this.#drawn = seen;
    const to = latest.time;
    const from = Math.min(to - 10, Math.max(history.samples[0].time, reach ? to - reach : -Infinity));
    const samples = within(history.samples, from, to);
    this.shown = samples;
    const events = (this.job.events ?? []).slice(-MOST_EVENTS);
    const moments = events.filter(
      ({ time, what }) => time >= from && time <= to && what !== "created" && what !== "started",
    );
    const view = {
      samples,
      from,
      to,
      moments,
      latest,
      cursor: this.cursor,
      gaps: gaps(history, events),
      commits: commits(samples),
      holds: history.holds,
    };
    this.lines.draw(view);
    for (const chart of this.charts) chart.draw(view);
    text(
      $("cursor-time"),
      this.cursor
        ? `At ${clock(this.cursor.time)}.`
        : `Until ${clock(latest.time)}. Ticks at the foot are commits; hatched, the server was away.`,
    );
    if (this.speak && this.cursor)
      say(`${clock(this.cursor.time)}: ${[this.lines, ...this.charts].map((chart) => chart.words).join(", ")}`);
    this.speak = false;
    const longest = [...history.holds].sort((one, other) => other.to - other.from - (one.to - one.from)).slice(0, 8);
    show($("holds"), longest.length > 0);
    keyed(
      $("holds-list"),
      longest,
      (hold) => hold.index,
      () => el("li"),
      (node, hold) => {
        const tries = hold.attempt > 1 ? `, attempt ${count(hold.attempt)}` : "";
        text(node, `item ${count(hold.index)}: ${duration(hold.to - hold.from)}${tries}, from ${clock(hold.from)}`);
      },
    );
  }

  /** Seconds that are shown, 0 for all. */
  #reach(latest) {
    const long = latest.time - this.history.samples[0].time > 660;
    const reach = this.range ?? (long && !ENDED.has(this.job.state) ? 600 : 0);
    for (const choice of $("range").elements) {
      if (choice.value === String(reach) && !choice.checked) choice.checked = true;
    }
    return reach;
  }

  #events() {
    const events = (this.job.events ?? []).slice(-MOST_EVENTS).reverse();
    keyed(
      $("events"),
      events,
      (event) => `${event.time} ${event.what}`,
      () => el("li", {}, el("time"), el("b"), el("span")),
      (node, event) => {
        attr(node, "data-what", event.what);
        text(node.children[0], clock(event.time));
        text(node.children[1], WHAT[event.what] ?? event.what);
        text(node.children[2], plain(event.text ?? ""));
      },
    );
    const options = Object.entries(this.job.options ?? {}).filter(([, value]) => value !== null);
    keyed(
      $("options"),
      options,
      ([name]) => name,
      () => el("div", {}, el("dt"), el("dd")),
      (node, [name, value]) => {
        text(node.children[0], name.replaceAll("_", " "));
        text(node.children[1], typeof value === "object" ? JSON.stringify(value) : value);
      },
    );
  }
}

/** When the server was away: as this page saw it, or as the job's events tell. */
export function gaps(history, events) {
  const found = [...history.restarts];
  for (const { time, what } of events) {
    if (what !== "resumed" || found.some((gap) => gap.from <= time && time <= gap.to + 2)) continue;
    const before = history.samples.findLast((sample) => sample.time <= time);
    if (before) found.push({ from: before.time, to: time });
  }
  return found.sort((one, other) => one.from - other.from);
}

/** Ask once; true if a person says yes. */
function sure(title, words, yes) {
  const dialog = $("confirm");
  text($("confirm-title"), title);
  text($("confirm-text"), words);
  text($("confirm-yes"), yes);
  return new Promise((resolve) => {
    const answer = (said) => () => {
      dialog.onclose = null;
      dialog.close();
      resolve(said);
    };
    $("confirm-yes").onclick = answer(true);
    $("confirm-no").onclick = answer(false);
    dialog.onclose = () => resolve(false); // by the Escape key
    dialog.showModal();
    $("confirm-no").focus();
  });
}
