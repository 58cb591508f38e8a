// The list of jobs: asked for every 2 s while it is seen, one request at a time.

import { jobPath, request } from "./api.js";
import { $, attr, drawer, el, keyed, show, svg, text } from "./dom.js";
import { plain } from "./failures.js";
import { clock, count, duration, percent, rate, NONE } from "./format.js";
import { STILL_S } from "./picture.js";

const POLL_MS = 2_000;
const PAGE = 50;
const LONGEST_NOTE = 60; // characters of why a job pauses: what else the row says keeps its room
export const SIGNS = { queued: "○", running: "●", paused: "‖", complete: "✓", failed: "✕", cancelled: "⊘" };

export class List {
  #timer = null;
  #asking = null;
  #before = []; // the `after` of each page before this one
  #after = null;
  #answer = null;

  /** @param report called with "live" or "away" after each request; @param refused with the status of a refusal */
  constructor({ report, refused, readOnly }) {
    Object.assign(this, { report, refused, readOnly });
    this.draw = drawer(() => this.#draw());
    $("older").addEventListener("click", () => this.#turn(() => this.#before.push(this.#after), this.#answer?.next));
    $("newer").addEventListener("click", () => this.#turn(() => undefined, this.#before.pop() ?? null));
    $("list-state").addEventListener("change", () => this.#turn(() => (this.#before = []), null));
    document.addEventListener("visibilitychange", () => !document.hidden && this.#open && this.#ask());
  }

  #open = false;

  open() {
    this.#open = true;
    this.#ask();
  }

  close() {
    this.#open = false;
    clearTimeout(this.#timer);
    this.#asking?.abort();
    this.#asking = null;
  }

  #turn(change, after) {
    change();
    this.#after = after ?? null;
    this.#asking?.abort();
    this.#asking = null;
    this.#ask();
  }

  async #ask() {
    clearTimeout(this.#timer);
    if (this.#asking || !this.#open || document.hidden) return;
    const asking = (this.#asking = new AbortController());
    const query = new URLSearchParams({ limit: PAGE });
    if (this.#after) query.set("after", this.#after);
    if ($("list-state").value) query.set("state", $("list-state").value);
    try {
      this.#answer = await request("GET", `jobs?${query}`, { signal: asking.signal });
      this.report("live");
      text($("list-error"), "");
      this.draw();
    } catch (error) {
      if (asking.signal.aborted) return;
      if (error.status === 401) return this.refused(401);
      if (error.status) text($("list-error"), error.message);
      this.report(error.status ? "live" : "away");
    } finally {
      if (this.#asking === asking) this.#asking = null;
    }
    if (this.#open) this.#timer = setTimeout(() => this.#ask(), POLL_MS);
  }

  #draw() {
    const { jobs, next } = this.#answer;
    if (this.readOnly() && jobs.length) return location.replace(`#/${jobPath(jobs[0].id)}`);
    keyed($("jobs"), jobs, (job) => job.id, makeRow, fillRow);
    show($("list-empty"), jobs.length === 0);
    text($("list-empty"), $("list-state").value ? "No job is in that state." : "No jobs yet. Start one above.");
    if (jobs.length === 0 && !$("list-state").value && !this.asked) $("new-job").open = true;
    this.asked = true;
    show($("older"), Boolean(next));
    show($("newer"), this.#before.length > 0 || this.#after !== null);
    const running = jobs.filter((job) => job.state === "running").length;
    document.title = running ? `${running} running · async-recovery` : "async-recovery";
    return undefined;
  }
}

function makeRow() {
  const done = svg("rect", { class: "row-done", height: 6 });
  const cells = {
    state: el("span", { class: "state" }),
    name: el("span", { class: "row-name" }, el("b"), " ", el("span", { class: "soft" })),
    bar: svg("svg", { class: "row-bar", width: "100%", height: 6, "aria-hidden": "true" }, done),
    numbers: el("span", { class: "row-numbers" }),
    note: el("span", { class: "row-note" }),
  };
  const row = el("li", { "data-testid": "job-row" }, el("a", {}, ...Object.values(cells)));
  row.cells = { ...cells, done };
  return row;
}

function fillRow(row, job) {
  const { cells } = row;
  const link = row.firstElementChild;
  attr(link, "href", `#/${jobPath(job.id)}`);
  attr(row, "data-id", job.id);
  attr(row, "data-state", job.state);
  fillState(cells.state, job);
  text(cells.name.children[0], job.worker);
  text(cells.name.children[1], job.input?.name);
  const sample = job.sample;
  const share = job.state === "complete" ? 1 : sample?.share;
  attr(cells.done, "width", `${100 * Math.min(1, Math.max(0, share ?? 0))}%`);
  const finished = job.summary?.total_items ?? sample?.finished;
  const running = job.state === "running";
  const numbers = [
    typeof finished === "number" ? `${count(finished)} finished` : null,
    job.state === "complete" ? null : percent(share),
  ];
  if (running) numbers.push(rate(sample?.items_per_s), left(sample));
  text(cells.numbers, numbers.filter((each) => each && each !== NONE).join(" · "));
  const failed = job.summary?.failed ?? sample?.failed;
  const pause = (running && sample?.paused) || null; // an outage, say: then no item is to blame that the mark stands
  const held = running && !pause && sample?.held_s >= STILL_S && (sample.held_by ?? null) !== null;
  const slow = held || pause || job.state === "paused";
  attr(cells.note, "data-level", job.state === "failed" ? "bad" : slow ? "slow" : null);
  const notes = [job.reason ? job.reason : null];
  if (pause) notes.push(plain(pause, LONGEST_NOTE));
  if (held) notes.push(`item ${count(sample.held_by)} holds the mark for ${duration(sample.held_s)}`);
  if (failed) notes.push(`${count(failed)} failed`);
  notes.push(job.ended ? `ended ${clock(job.ended)}` : `created ${clock(job.created)}`);
  text(cells.note, notes.filter(Boolean).join(" · "));
}

const left = (sample) => (typeof sample?.remaining_s === "number" ? `${duration(sample.remaining_s)} left` : null);

/** The state with its sign; the same in the list and on the page of a job. */
export function fillState(node, job) {
  attr(node, "data-state", job.state);
  if (!node.children.length) node.append(el("i", { "aria-hidden": "true" }), el("span"));
  text(node.children[0], SIGNS[job.state] ?? "?");
  text(node.children[1], job.retrying && job.state === "running" ? "running, failed items again" : job.state);
}
