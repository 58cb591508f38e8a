// The samples of one job over time, as far as this page has seen them.
//
// * Ordered by time, none twice, and never more than MOST: the older they are, the wider apart.
// * A restart of the server changes nothing that is here: what came before stays, and the gap is remembered.
// * What held the mark for long is remembered apart, so that thinning does not lose it.

export const MOST = 600;
const FRESH = 90; // the newest are never thinned
const HOLD_S = 5; // an item that holds the mark for less is not worth a word
const MOST_HOLDS = 12;
const MOST_RESTARTS = 50;

const known = (value) => typeof value === "number" && Number.isFinite(value);

export class History {
  samples = [];
  restarts = []; // {from, to}: the last sample before, the first one after
  holds = []; // {index, from, to, attempt}, in the order of time
  version = 0; // grows with each change
  #boot = null;
  #before = null; // the time of the last sample of the boot before, until one of this boot comes

  get last() {
    return this.samples.at(-1) ?? null;
  }

  /** One more sample, of the start of the server called `boot`; those known already change nothing. */
  add(sample, boot) {
    if (!sample || !known(sample.time)) return;
    if (boot !== this.#boot) {
      if (this.#boot !== null && this.#before === null) this.#before = this.last?.time ?? null;
      this.#boot = boot;
    }
    const samples = this.samples;
    let at = samples.length;
    while (at > 0 && samples[at - 1].time > sample.time) at -= 1;
    if (at > 0 && samples[at - 1].time === sample.time) return;
    if (this.#before !== null && sample.time > this.#before) {
      this.restarts.push({ from: this.#before, to: sample.time });
      this.restarts.splice(0, this.restarts.length - MOST_RESTARTS);
      this.#before = null;
    }
    const { errors, ...kept } = sample; // only the newest errors are shown: they are not kept with each sample
    samples.splice(at, 0, kept);
    this.#hold(sample);
    if (samples.length > MOST) this.#thin();
    this.version += 1;
  }

  #hold(sample) {
    if (!known(sample.held_by) || !(sample.held_s >= HOLD_S)) return;
    const from = sample.time - sample.held_s;
    const hold = this.holds.find((other) => other.index === sample.held_by);
    if (hold) {
      hold.from = Math.min(hold.from, from);
      hold.to = Math.max(hold.to, sample.time);
      hold.attempt = Math.max(hold.attempt, sample.held_attempt ?? 1);
      return;
    }
    this.holds.push({ index: sample.held_by, from, to: sample.time, attempt: sample.held_attempt ?? 1 });
    this.holds.sort((one, other) => one.from - other.from);
    if (this.holds.length <= MOST_HOLDS) return;
    const shortest = Math.min(...this.holds.map((each) => each.to - each.from));
    this.holds.splice(
      this.holds.findIndex((each) => each.to - each.from === shortest),
      1,
    );
  }

  /** One sample less: the one that leaves the smallest gap for its age. */
  #thin() {
    const samples = this.samples;
    const end = samples.at(-1).time;
    const reach = (end - samples[0].time) / 2;
    let least = Infinity;
    let which = 1;
    for (let at = 1; at < samples.length - FRESH; at += 1) {
      const cost = (samples[at + 1].time - samples[at - 1].time) / (end - samples[at].time + reach);
      if (cost < least) [least, which] = [cost, at];
    }
    const [gone] = samples.splice(which, 1);
    const next = samples[which];
    const worst = gone.latency?.p99;
    if (next.latency && worst > next.latency.p99) next.latency = { ...next.latency, p99: worst }; // a peak outlives it
  }
}

/** The samples from `from` to `to`, and one on each side, so that lines reach the edges. */
export function within(samples, from, to) {
  let first = samples.findIndex((sample) => sample.time >= from);
  if (first < 0) first = samples.length;
  let end = samples.findIndex((sample) => sample.time > to);
  if (end < 0) end = samples.length;
  return samples.slice(Math.max(0, first - 1), end + 1);
}

/** Items a second at each of the samples: the mean since the one 5 s before it or more, so thinning changes no sum. */
export function speeds(samples, restarts) {
  let from = 0;
  let start = 0; // of this life of the server
  let restart = 0;
  return samples.map((sample, at) => {
    while (restart < restarts.length && restarts[restart].to <= sample.time) {
      start = at;
      restart += 1;
    }
    from = Math.max(from, start);
    while (from + 1 < at && samples[from + 1].time <= sample.time - 5) from += 1;
    const before = samples[from];
    if (before.time >= sample.time) return known(sample.items_per_s) ? sample.items_per_s : null;
    return Math.max(0, (sample.finished - before.finished) / (sample.time - before.time));
  });
}

/** The times between which something was committed, as far as the samples tell. */
export function commits(samples) {
  const found = [];
  for (let at = 1; at < samples.length; at += 1) {
    if (samples[at].commits > samples[at - 1].commits) found.push(samples[at].time);
  }
  return found;
}

/** The sample nearest to that time, or null. */
export function nearest(samples, time) {
  let best = null;
  for (const sample of samples) {
    if (best === null || Math.abs(sample.time - time) <= Math.abs(best.time - time)) best = sample;
  }
  return best;
}
