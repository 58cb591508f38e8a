// Mark against finished: the picture that only this tool can draw.
//
// A strip shows the window as it is now: what is below the mark, the item that holds it, what is finished ahead,
// what is in flight, and the room that is left. Below it, the same over time. Both rest on two identities, so that
// nothing in them is an estimate: mark + ahead = finished, and finished + in flight = frontier (handed out).

import { Chart } from "./chart.js";
import { attr, svg, text } from "./dom.js";
import { clock, count, duration, rate, short, span } from "./format.js";

const HEIGHT = 92;
const BAR_Y = 34;
const BAR_HEIGHT = 34;
export const STILL_S = 5; // the mark stands still for so long: it is said aloud
const ENDED = new Set(["complete", "failed", "cancelled"]);

const number = (value) => (typeof value === "number" && Number.isFinite(value) ? value : 0);

/** What the strip shows, in items: plain values from a sample; nothing is in flight of a job that has ended. */
export function parts(sample, ended = false) {
  const mark = number(sample.mark);
  const durable = Math.min(mark, number(sample.durable_mark));
  const ahead = number(sample.ahead);
  const flight = ended ? 0 : number(sample.in_flight);
  const frontier = Math.max(number(sample.frontier), mark, mark + ahead + flight);
  const end = Math.max(durable + number(sample.window), frontier);
  return { durable, mark, ahead, flight, frontier, end, room: end - frontier };
}

const calm = (lead, rest = "") => ({ lead, rest, level: "calm" });

/** How it stands, in words: {lead, rest, level}; the level is calm, slow, or full. `speed` is in items a second. */
export function words(job, sample, speed) {
  if (!sample) return calm("Nothing has begun yet.");
  const { mark, ahead, room, flight } = parts(sample);
  if (job.state === "complete") return calm(`All ${count(sample.finished)} items are finished and durable.`);
  const beyond = `${count(ahead)} ${ahead === 1 ? "item is" : "items are"} finished ahead of it`;
  if (ENDED.has(job.state)) return calm(`It ended with the mark at ${count(mark)}.`, `${beyond}.`);
  if (job.state === "paused") return calm(`Paused with the mark at ${count(mark)}.`, `${beyond}.`);
  const held = sample.held_by ?? null;
  if (held === null) return calm(`The mark is at ${count(mark)}.`, sample.paused ? "" : "Nothing is in flight.");
  const attempt = `attempt ${count(number(sample.held_attempt) || 1)}`;
  if (!(sample.held_s >= STILL_S)) {
    return calm("The mark moves.", `Item ${count(held)} is at it for ${span(sample.held_s)}, ${attempt}.`);
  }
  const lead = `Item ${count(held)} holds the mark for ${duration(sample.held_s)}, ${attempt}.`;
  if (room <= 0)
    return { lead, rest: `${beyond}. The window is full: nothing new begins until it ends.`, level: "full" };
  const left = speed > 0 ? `, ${duration(room / speed)} at this speed` : "";
  return { lead, rest: `${beyond}; ${count(flight)} in flight; room for ${count(room)} more${left}.`, level: "slow" };
}

/** The strip of the window, now. */
export class Strip {
  constructor(place) {
    const make = (name, attributes) => this.svg.appendChild(svg(name, attributes));
    this.svg = svg("svg", { class: "strip", height: HEIGHT, role: "img" });
    this.svg.append(
      svg(
        "defs",
        {},
        svg(
          "pattern",
          { id: "ahead-fill", width: 7, height: 7, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" },
          svg("rect", { class: "hatch-back", width: 7, height: 7 }),
          svg("rect", { class: "hatch-line", width: 3, height: 7 }),
        ),
        svg(
          "pattern",
          { id: "gap-fill", width: 6, height: 6, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" },
          svg("rect", { class: "gap-line", width: 1.5, height: 6 }),
        ),
        svg(
          "linearGradient",
          { id: "below-fill", gradientUnits: "userSpaceOnUse", x1: 0, x2: 110 },
          svg("stop", { class: "below-far", offset: 0 }),
          svg("stop", { class: "below-near", offset: 1 }),
        ),
        svg("clipPath", { id: "bar-clip" }, (this.clip = svg("rect", { y: BAR_Y, height: BAR_HEIGHT, rx: 5 }))),
      ),
    );
    this.room = make("rect", { class: "room", y: BAR_Y, height: BAR_HEIGHT, rx: 5 });
    this.bar = make("g", { "clip-path": "url(#bar-clip)" });
    for (const name of ["below", "pending", "ahead", "flight"]) {
      this[name] = this.bar.appendChild(svg("rect", { class: `part ${name}`, y: BAR_Y, height: BAR_HEIGHT }));
    }
    this.held = make("rect", { class: "held", y: BAR_Y - 4, height: BAR_HEIGHT + 8, rx: 2 });
    this.pin = make("path", { class: "pin" });
    this.flag = make("text", { class: "flag", y: 14 });
    this.edge = make("line", { class: "edge", y1: BAR_Y - 5, y2: BAR_Y + BAR_HEIGHT + 5 });
    this.labels = ["low", "middle", "high"].map((name) => make("text", { class: `tick ${name}`, y: HEIGHT - 6 }));
    place.append(this.svg);
  }

  draw(job, sample, said) {
    const width = Math.max(200, this.svg.clientWidth);
    attr(this.svg, "viewBox", `0 0 ${width} ${HEIGHT}`);
    attr(this.svg, "aria-label", `The window. ${said.lead} ${said.rest}`);
    const done = ENDED.has(job?.state);
    const now = parts(sample ?? {}, done);
    const some = done && !now.ahead ? width : Math.round(Math.min(150, width * 0.16));
    const base = now.mark > 0 ? some : 0; // nothing is below a mark at 0, of a job that has ended, too
    const per = (width - base) / Math.max(1, now.end - now.durable);
    const wide = (items, least) => (items > 0 ? Math.max(least, items * per) : 0);
    const sizes = {
      below: base,
      pending: wide(now.mark - now.durable, 0),
      ahead: wide(now.ahead, 3),
      flight: wide(now.flight, 4),
    };
    let x = 0;
    for (const [name, size] of Object.entries(sizes)) {
      attr(this[name], "x", x.toFixed(1));
      attr(this[name], "width", Math.max(0, Math.min(size, width - x)).toFixed(1));
      x = Math.min(width, x + size);
    }
    attr(this.clip, "width", width);
    attr(this.room, "width", width);
    this.#pin(sample, said, base + sizes.pending, width, !done && job?.state !== "paused");
    this.#labels(now, base, base + sizes.pending, x, width, done);
  }

  #pin(sample, said, x, width, runs) {
    const held = runs && sample && (sample.held_by ?? null) !== null;
    const loud = said.level !== "calm";
    attr(this.svg, "data-level", said.level);
    for (const node of [this.held, this.pin, this.flag]) attr(node, "visibility", held ? null : "hidden");
    if (!held) return;
    const size = loud ? 6 : 3;
    attr(this.held, "x", (x - size / 2).toFixed(1));
    attr(this.held, "width", size);
    attr(this.pin, "d", `M${x.toFixed(1)} ${BAR_Y - 4}V18`);
    text(
      this.flag,
      loud
        ? `item ${count(sample.held_by)} · ${duration(sample.held_s)} · attempt ${count(sample.held_attempt ?? 1)}`
        : "mark",
    );
    const long = this.flag.textContent.length * 7.4; // so wide at most
    attr(this.flag, "x", Math.max(0, Math.min(x - 3, width - long)).toFixed(1));
  }

  #labels(now, base, mark, front, width, done) {
    const [low, middle, high] = this.labels;
    const narrow = width < 560;
    const atMark = narrow ? count(now.mark) : `mark ${count(now.mark)}`;
    text(low, base === width ? `all ${count(now.mark)}` : atMark);
    attr(low, "x", base === width ? 0 : Math.max(0, Math.min(mark, width * 0.6)).toFixed(1));
    text(high, done ? "" : narrow ? count(now.end) : `end of the window ${count(now.end)}`);
    attr(high, "x", width);
    const room = front - mark > 150 && width - front > 260 && !done;
    text(middle, room ? `frontier ${count(now.frontier)}` : "");
    attr(middle, "x", front.toFixed(1));
    attr(this.edge, "visibility", done ? "hidden" : null);
    for (const side of ["x1", "x2"]) attr(this.edge, side, front.toFixed(1));
  }
}

/** The same over time. */
export class Lines extends Chart {
  constructor(place, onCursor) {
    const durable = (sample) => Math.min(number(sample.durable_mark), number(sample.mark));
    super(place, {
      title: "Mark against finished",
      hint: "items, over time",
      height: 264,
      format: count,
      short,
      onCursor,
      floorAtZero: false,
      series: [
        { name: "below", kind: "band", value: durable },
        { name: "pending", kind: "band", value: (sample) => sample.mark, floor: durable },
        { name: "ahead", kind: "band", value: (sample) => sample.mark + sample.ahead, floor: (sample) => sample.mark },
        {
          name: "flight",
          kind: "band",
          value: (sample) => Math.max(sample.frontier, sample.finished),
          floor: (sample) => sample.mark + sample.ahead,
        },
        { name: "frontier-line", label: "frontier", kind: "line", value: (sample) => sample.frontier },
        { name: "finished-line", label: "finished", kind: "line", value: (sample) => sample.finished },
        { name: "mark-line", label: "mark", kind: "line", value: (sample) => sample.mark },
        { name: "durable-line", label: "durable mark", kind: "line", value: (sample) => sample.durable_mark },
      ],
    });
  }

  /** @param view as of Chart, with holds: [{index, from, to, attempt}] and commits: [time] */
  draw(view) {
    super.draw(view);
    const { x, y, low, floor } = this.scale;
    const rug = view.commits
      .filter((time) => time >= view.from && time <= view.to)
      .map((time) => `M${x(time).toFixed(1)} ${floor}v-6`);
    const extra = [svg("path", { class: "rug", d: rug.join("") }, svg("title", {}, "commits"))];
    let named = -Infinity;
    for (const { time, what } of view.moments) {
      const at = x(time);
      if (at < named + 60) continue;
      named = at;
      const end = at > this.width - 70;
      extra.push(
        svg(
          "text",
          { class: "moment-label", x: (end ? at - 4 : at + 4).toFixed(1), y: 18, "text-anchor": end ? "end" : "start" },
          String(what),
        ),
      );
    }
    let used = -Infinity;
    const longest = [...view.holds].sort((one, other) => other.to - other.from - (one.to - one.from)).slice(0, 6);
    for (const hold of longest.sort((one, other) => one.from - other.from)) {
      if (hold.to < view.from || hold.from > view.to || hold.index < low) continue;
      const [left, right] = [Math.max(0, x(hold.from)), Math.min(this.width, x(hold.to))];
      if (right - left < 3) continue;
      const top = y(hold.index);
      extra.push(
        svg("line", {
          class: "hold",
          x1: left.toFixed(1),
          x2: right.toFixed(1),
          y1: top.toFixed(1),
          y2: top.toFixed(1),
        }),
      );
      const label = `item ${count(hold.index)} · ${duration(hold.to - hold.from)}`;
      const long = label.length * 7;
      const start = Math.min(Math.max(2, left), this.width - long - 2);
      const below = Math.min(floor - 10, top + 15);
      if (start < used) continue;
      used = start + long + 8;
      extra.push(
        svg(
          "text",
          { class: "hold-label", x: start.toFixed(1), y: below.toFixed(1) },
          label,
          svg("title", {}, `from ${clock(hold.from)}, attempt ${hold.attempt}`),
        ),
      );
    }
    this.parts.extra.replaceChildren(...extra);
  }
}

/** The smaller charts beside it. */
export function others(place, onCursor, speedOf) {
  const latency = (name) => (sample) => sample.latency?.[name] ?? null;
  const below = (sample) => Math.max(0, number(sample.mark) - number(sample.durable_mark));
  const used = (sample) => parts(sample).frontier - parts(sample).durable;
  const shared = { height: 132, onCursor };
  return [
    new Chart(place, {
      ...shared,
      title: "Throughput",
      format: rate,
      short,
      series: [
        { name: "speed-fill", kind: "band", value: speedOf },
        { name: "speed", label: "items a second", kind: "line", value: speedOf },
      ],
    }),
    new Chart(place, {
      ...shared,
      title: "Latency of an attempt",
      format: span,
      short: span,
      series: [
        { name: "p99", label: "p99", kind: "line", value: latency("p99") },
        { name: "p95", label: "p95", kind: "line", value: latency("p95") },
        { name: "p50", label: "p50", kind: "line", value: latency("p50") },
      ],
    }),
    new Chart(place, {
      ...shared,
      title: "Window",
      format: count,
      short,
      hint: "above the durable mark",
      series: [
        { name: "pending", kind: "band", value: below },
        { name: "ahead", kind: "band", value: (sample) => below(sample) + number(sample.ahead), floor: below },
        { name: "flight", kind: "band", value: used, floor: (sample) => below(sample) + number(sample.ahead) },
        { name: "limit", label: "size", kind: "line", value: (sample) => sample.window },
        { name: "used", label: "used", kind: "line", value: used },
      ],
    }),
    new Chart(place, {
      ...shared,
      title: "In flight",
      format: count,
      short,
      series: [
        { name: "limit", label: "concurrency", kind: "line", value: (sample) => sample.concurrency },
        { name: "flying", label: "in flight", kind: "line", value: (sample) => sample.in_flight },
        { name: "waiting", label: "wait to try again", kind: "line", value: (sample) => sample.waiting },
      ],
    }),
  ];
}
