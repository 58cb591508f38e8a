// What failed: items for good, grouped by the server, and attempts that are tried again.

import { jobPath, request } from "./api.js";
import { $, attr, drawer, el, keyed, show, text } from "./dom.js";
import { count } from "./format.js";

const APART_MS = 2_000;
const LONGEST = 4_000; // characters of a text that are put into the document
const MOST_GROUPS = 50;

/** Any value of an item, as text of at most `longest` characters. */
export function plain(value, longest = LONGEST) {
  const said = typeof value === "string" ? value : JSON.stringify(value ?? null);
  return said.length > longest ? `${said.slice(0, longest)}…` : said;
}

/** The recorded failures of one job, asked for when their number has changed. */
export class Failures {
  #id = null;
  #known = 0; // failures that the groups tell of
  #wanted = 0;
  #asking = false;
  #answered = false; // until then nothing is said of those that are not among the groups
  #reading = false; // the server has not yet read all that is committed
  #groups = [];

  constructor(refused) {
    this.refused = refused;
    this.again = drawer(() => this.draw());
  }

  open(id) {
    this.#id = id;
    this.#known = this.#wanted = 0;
    this.#answered = this.#reading = false;
    this.#groups = [];
    this.draw();
  }

  close() {
    this.#id = null;
  }

  /** So many have failed by now. */
  want(failed) {
    this.#wanted = failed ?? 0;
    if (this.#wanted !== this.#known && !this.#asking) void this.#ask(this.#id);
  }

  async #ask(id) {
    this.#asking = true;
    try {
      while (id !== null && id === this.#id && this.#wanted !== this.#known) {
        const answer = await request("GET", `${jobPath(id)}/failures?limit=0`).catch((error) => error);
        if (id !== this.#id) break;
        if (answer?.status === 401) {
          this.refused(401);
          break;
        }
        if (answer?.status !== 0) this.#answered = true; // a refusal is an answer: there is no output, say
        if (Array.isArray(answer?.groups)) {
          this.#reading = answer.counted_bytes < answer.committed_bytes;
          this.#groups = answer.groups.slice(0, MOST_GROUPS);
          // Those ahead of the mark, or not committed yet, are not among them: they are asked for until they are.
          this.#known = answer.groups.reduce((sum, group) => sum + group.count, 0);
        }
        this.again();
        await new Promise((resolve) => setTimeout(resolve, APART_MS));
      }
    } finally {
      this.#asking = false;
    }
    if (this.#id !== null && this.#id !== id) this.want(this.#wanted);
  }

  draw() {
    const more = Math.max(0, this.#wanted - this.#known);
    show($("failures-none"), this.#groups.length === 0 && more === 0);
    show($("failures-more"), more > 0 && this.#answered);
    text($("failures-more"), unlisted(more, this.#reading));
    keyed($("failures"), this.#groups, (group) => `${group.type}: ${group.message}`, makeGroup, fillGroup);
  }
}

/** What is said of so many failures that no group tells of. */
function unlisted(more, reading) {
  if (reading) return `${count(more)} more: the output is still being read.`;
  const are = more === 1 ? "is" : "are";
  return `${count(more)} more ${are} not in the committed output yet: those ahead of the mark, for one.`;
}

function makeGroup() {
  const summary = el("summary", {}, el("b", { class: "number" }), " ", el("span", { class: "cut" }));
  return el(
    "details",
    { class: "group", "data-testid": "failure-group" },
    summary,
    el("ul", { class: "samples plain", tabindex: "0", "aria-label": "Samples" }),
  );
}

function fillGroup(node, group) {
  const [number, , name] = node.firstElementChild.childNodes;
  text(number, count(group.count));
  text(name, plain(`${group.type}: ${group.message}`));
  keyed(node.lastElementChild, group.samples ?? [], (sample) => sample.index, makeSample, fillSample);
}

function makeSample() {
  return el("li", {}, el("b", { class: "number" }), el("code", {}), el("span", { class: "soft" }));
}

function fillSample(node, sample) {
  text(node.children[0], `item ${count(sample.index)}`);
  text(node.children[1], plain(sample.item));
  text(node.children[2], plain(sample.message ?? ""));
}

/** The errors of attempts, as the newest sample tells. */
export function fillErrors(errors) {
  text(
    $("errors-hint"),
    errors.length ? "Since the server started; those tried again are among them." : "None since the server started.",
  );
  keyed(
    $("errors"),
    errors.slice(0, MOST_GROUPS),
    (each) => each.error,
    () =>
      el(
        "div",
        { class: "attempt" },
        el("b", { class: "number" }),
        el("span", { class: "cut" }),
        el("code", { class: "cut" }),
      ),
    (node, each) => {
      text(node.children[0], count(each.count));
      text(node.children[1], plain(each.error));
      text(node.children[2], plain(each.item ?? ""));
      attr(node.children[2], "title", plain(each.item ?? ""));
    },
  );
}
