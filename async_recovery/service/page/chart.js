// A chart of samples over time: filled bands and lines in one SVG, drawn by hand.
//
// All charts of a job share one span of time and one cursor. A gap where the server was away is hatched, and no line is
// drawn across it.

import { attr, el, svg, text } from "./dom.js";
import { clock, NONE } from "./format.js";

const TOP = 8;
const BOTTOM = 20; // the labels of the time axis
const STEPS_S = [
  1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400, 172800, 604800,
];

const known = (value) => typeof value === "number" && Number.isFinite(value);
const px = (value) => value.toFixed(1);

/** Round numbers between the two, about so many. */
export function roundTicks(low, high, wanted) {
  const raw = (high - low) / wanted;
  if (!(raw > 0)) return [];
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((each) => each >= raw);
  const found = [];
  for (let at = Math.ceil(low / step); at * step <= high; at += 1) found.push(at * step);
  return found;
}

/** Round times of day between the two, about so many. */
export function timeTicks(from, to, wanted) {
  const step = STEPS_S.find((each) => each >= (to - from) / wanted) ?? STEPS_S.at(-1);
  const shift = new Date(to * 1000).getTimezoneOffset() * 60;
  const found = [];
  for (let at = Math.ceil((from - shift) / step) * step + shift; at <= to; at += step) found.push(at);
  return found.map((time) => ({ time, label: step >= 60 ? clock(time, time).slice(0, 5) : clock(time, time) }));
}

/** The path of one band: along its top, and back along its bottom; or of a line, where there is no bottom. */
function path(points) {
  const pieces = [];
  let run = [];
  const flush = () => {
    if (run.length) {
      const top = run.map((p) => `${px(p.x)},${px(p.y)}`).join("L");
      const dot = run.length === 1 && run[0].floor === null ? "h.1" : "";
      const back =
        run[0].floor === null
          ? ""
          : `L${run
              .reverse()
              .map((p) => `${px(p.x)},${px(p.floor)}`)
              .join("L")}Z`;
      pieces.push(`M${top}${dot}${back}`);
    }
    run = [];
  };
  for (const point of points) {
    if (point === null) flush();
    else run.push(point);
  }
  flush();
  return pieces.join("");
}

export class Chart {
  /**
   * @param place the element that it goes into
   * @param title text, and name for a screen reader
   * @param series [{name, label, value(sample, at) → number|null, floor?(sample) → number, kind: "line"|"band"}]
   * @param format of a value in the legend; `short` of one at the axis
   */
  constructor(place, { title, hint, series, format, short, height, onCursor, floorAtZero = true }) {
    Object.assign(this, { series, format, short, height, onCursor, floorAtZero });
    this.values = new Map();
    const legend = el("ul", { class: "legend" });
    for (const each of series.filter((one) => one.label)) {
      const value = el("b", {}, NONE);
      this.values.set(each.name, value);
      legend.append(
        el(
          "li",
          { class: `key ${each.name}` },
          el("i", { class: each.kind, "aria-hidden": "true" }),
          each.label,
          " ",
          value,
        ),
      );
    }
    this.svg = svg("svg", { class: "plot", role: "img", tabindex: "0", "aria-label": title, height });
    this.parts = {
      gaps: svg("g"),
      bands: svg("g"),
      grid: svg("g"),
      lines: svg("g"),
      extra: svg("g"),
      labels: svg("g"),
      cursor: svg("line", { class: "cursor" }),
    };
    this.svg.append(...Object.values(this.parts));
    this.paths = series.map((each) => {
      const node = svg("path", { class: `${each.kind} ${each.name}` });
      this.parts[each.kind === "band" ? "bands" : "lines"].append(node);
      return node;
    });
    this.title = title;
    this.figure = el(
      "figure",
      { class: "chart" },
      el(
        "figcaption",
        {},
        el("span", { class: "name" }, title),
        hint ? el("span", { class: "hint" }, hint) : null,
        legend,
      ),
      this.svg,
    );
    place.append(this.figure);
    this.#listen();
  }

  #listen() {
    const at = (event) =>
      this.scale &&
      this.scale.from +
        ((event.clientX - this.svg.getBoundingClientRect().left) / this.width) * (this.scale.to - this.scale.from);
    this.svg.addEventListener("pointermove", (event) => this.onCursor(at(event)));
    this.svg.addEventListener("pointerleave", () => this.onCursor(null));
    this.svg.addEventListener("blur", () => this.onCursor(null));
    this.svg.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1, PageUp: -20, PageDown: 20, Home: -Infinity, End: Infinity }[
        event.key
      ];
      if (event.key === "Escape") this.onCursor(null);
      if (step === undefined) return;
      event.preventDefault();
      this.onCursor(null, step);
    });
  }

  /**
   * @param view {samples, from, to, gaps: [{from, to}], moments: [{time, what}], cursor: sample|null, latest: sample}
   */
  draw(view) {
    this.width = Math.max(200, this.svg.clientWidth || this.figure.clientWidth);
    const shown = view.samples.map((sample, at) => this.series.map((each) => each.value(sample, at)));
    const [low, high] = this.#range(view.samples, shown);
    const { from, to } = view;
    const inner = this.height - TOP - BOTTOM;
    const x = (time) => ((time - from) / Math.max(1e-6, to - from)) * this.width;
    const y = (value) => TOP + inner * (1 - (Math.min(high, Math.max(low, value)) - low) / (high - low));
    this.scale = { from, to, x, y, low, high, floor: TOP + inner };
    attr(this.svg, "viewBox", `0 0 ${this.width} ${this.height}`);
    this.series.forEach((each, which) => attr(this.paths[which], "d", path(this.#points(view, shown, each, which))));
    this.#grid(view);
    this.#cursor(view, shown);
  }

  #range(samples, shown) {
    let high = -Infinity;
    let low = Infinity;
    samples.forEach((sample, at) => {
      for (const value of shown[at]) {
        if (!known(value)) continue;
        high = Math.max(high, value);
        low = Math.min(low, value);
      }
    });
    if (!known(high)) return [0, 1];
    if (this.floorAtZero || low < (high - low) * 0.2) low = 0;
    else low -= (high - low) * 0.06;
    return [low, high > low ? high + (high - low) * 0.1 : low + 1];
  }

  #points(view, shown, each, which) {
    const { x, y } = this.scale;
    const points = [];
    let gap = 0;
    view.samples.forEach((sample, at) => {
      while (gap < view.gaps.length && view.gaps[gap].to <= sample.time) {
        points.push(null);
        gap += 1;
      }
      const value = shown[at][which];
      if (!known(value)) return points.push(null);
      const floor = each.kind === "band" ? y(each.floor ? each.floor(sample) : this.scale.low) : null;
      return points.push({ x: x(sample.time), y: y(value), floor });
    });
    return points;
  }

  #grid(view) {
    const { x, y, low, high, floor } = this.scale;
    const grid = [];
    const labels = [];
    for (const value of roundTicks(low, high, this.height > 150 ? 4 : 3)) {
      if (y(value) < TOP + 4) continue;
      grid.push(svg("line", { class: "grid", x1: 0, x2: this.width, y1: px(y(value)), y2: px(y(value)) }));
      const above = y(value) > TOP + 14; // else there is no room there
      if (value > low)
        labels.push(svg("text", { class: "tick", x: 4, y: px(y(value) + (above ? -4 : 13)) }, this.short(value)));
    }
    for (const { time, label } of timeTicks(view.from, view.to, this.width / 90)) {
      const at = x(time);
      grid.push(svg("line", { class: "grid", x1: px(at), x2: px(at), y1: TOP, y2: floor }));
      if (at > 24 && at < this.width - 24)
        labels.push(svg("text", { class: "tick time", x: px(at), y: this.height - 5 }, label));
    }
    grid.push(svg("line", { class: "axis", x1: 0, x2: this.width, y1: floor, y2: floor }));
    const seen = view.gaps.filter((gap) => gap.to >= view.from && gap.from <= view.to);
    const gaps = seen.map((gap) => {
      const left = Math.max(0, x(gap.from));
      const wide = Math.max(2, Math.min(this.width, x(gap.to)) - left);
      return svg("rect", { class: "gap", x: px(left), width: px(wide), y: TOP, height: floor - TOP });
    });
    const moments = view.moments.map(({ time, what }) =>
      svg("line", { class: `moment ${what}`, x1: px(x(time)), x2: px(x(time)), y1: TOP, y2: floor }),
    );
    this.parts.grid.replaceChildren(...grid);
    this.parts.labels.replaceChildren(...labels);
    this.parts.gaps.replaceChildren(...gaps, ...moments);
  }

  #cursor(view, shown) {
    const sample = view.cursor ?? view.latest;
    const at = view.samples.indexOf(sample);
    const said = [];
    this.series.forEach((each, which) => {
      if (!this.values.has(each.name)) return;
      const value = this.format(at < 0 ? null : shown[at][which]);
      text(this.values.get(each.name), value);
      said.push(`${each.label} ${value}`);
    });
    this.words = said.join(", ");
    attr(this.svg, "aria-label", `${this.title}: ${this.words}`);
    attr(this.parts.cursor, "visibility", view.cursor ? null : "hidden");
    if (!view.cursor) return;
    for (const side of ["x1", "x2"]) attr(this.parts.cursor, side, px(this.scale.x(view.cursor.time)));
    attr(this.parts.cursor, "y1", TOP);
    attr(this.parts.cursor, "y2", this.scale.floor);
  }
}
