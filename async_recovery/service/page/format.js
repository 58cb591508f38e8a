// How numbers are written. Values in, text out. What is null, missing or not finite is written as a dash.

const THIN = "\u202f"; // narrow and unbreakable: 1 234 567, as a person reads it
export const NONE = "–";

const known = (value) => typeof value === "number" && Number.isFinite(value);

/** A whole number with thin separators. */
export function count(value) {
  if (!known(value)) return NONE;
  return Math.round(value)
    .toString()
    .replace(/\B(?=(\d{3})+$)/g, THIN);
}

/** A number of an axis: 1.5 k, 2 M. */
export function short(value) {
  if (!known(value)) return NONE;
  for (const [unit, name] of [
    [1e9, "G"],
    [1e6, "M"],
    [1e3, "k"],
  ]) {
    if (Math.abs(value) >= unit * 10 || (Math.abs(value) >= unit && value % (unit / 10) === 0)) {
      return `${Number((value / unit).toPrecision(4))}${THIN}${name}`;
    }
  }
  return Math.abs(value) >= 1000 ? count(value) : `${Number(value.toPrecision(3))}`;
}

/** A speed, in items a second; slow ones in items a minute. */
export function rate(value) {
  if (!known(value)) return NONE;
  if (value >= 10) return `${count(value)}${THIN}/s`;
  if (value >= 1 || value <= 0) return `${Math.max(0, value).toFixed(value > 0 ? 1 : 0)}${THIN}/s`;
  return `${(value * 60).toFixed(1)}${THIN}/min`;
}

/** A time span in its two largest units, rounded down: 42 s, 4 min 05 s, 1 h 02 min, 3 d 4 h. */
export function duration(seconds) {
  if (!known(seconds)) return NONE;
  const whole = Math.max(0, Math.floor(seconds));
  const two = (number) => String(number).padStart(2, "0");
  if (whole < 60) return `${whole}${THIN}s`;
  if (whole < 3600) return `${Math.floor(whole / 60)}${THIN}min ${two(whole % 60)}${THIN}s`;
  if (whole < 86400) return `${Math.floor(whole / 3600)}${THIN}h ${two(Math.floor(whole / 60) % 60)}${THIN}min`;
  return `${count(Math.floor(whole / 86400))}${THIN}d ${Math.floor(whole / 3600) % 24}${THIN}h`;
}

/** A time span that may be short: 12 ms, 3.2 s, then as `duration`. */
export function span(seconds) {
  if (!known(seconds)) return NONE;
  if (seconds >= 10) return duration(seconds);
  if (seconds >= 1) return `${(Math.floor(seconds * 10) / 10).toFixed(1)}${THIN}s`;
  const ms = Math.max(0, seconds) * 1000;
  return `${ms >= 10 || ms === 0 ? Math.round(ms) : Number(ms.toPrecision(2))}${THIN}ms`;
}

/** A share, rounded down, so that 100 % means all. */
export function percent(share) {
  if (!known(share)) return NONE;
  return `${(Math.floor(Math.min(1, Math.max(0, share)) * 1000) / 10).toFixed(1)}${THIN}%`;
}

/** A size in bytes. */
export function bytes(value) {
  if (!known(value)) return NONE;
  if (value < 1000) return `${count(value)}${THIN}bytes`;
  for (const [unit, name] of [
    [1e12, "TB"],
    [1e9, "GB"],
    [1e6, "MB"],
  ]) {
    if (value >= unit) return `${(value / unit).toFixed(value >= unit * 10 ? 0 : 1)}${THIN}${name}`;
  }
  return `${(value / 1e3).toFixed(value >= 1e4 ? 0 : 1)}${THIN}kB`;
}

/** A time of day of this reader, with the date where it is not today. */
export function clock(time, now = Date.now() / 1000) {
  if (!known(time)) return NONE;
  const moment = new Date(time * 1000);
  const day = moment.toDateString() === new Date(now * 1000).toDateString();
  const date = day ? "" : `${moment.toLocaleDateString(undefined, { month: "short", day: "numeric" })} `;
  return date + moment.toTimeString().slice(0, 8);
}
