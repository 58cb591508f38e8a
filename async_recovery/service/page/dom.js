// The document: only what has changed is touched, and every text is text, never markup.
//
// Signs that turn the direction of a text are written out: with them, an item could make a line read as another one.

const SVG = "http://www.w3.org/2000/svg";
const TURNS = /[\u202a-\u202e\u2066-\u2069\u200e\u200f\u061c]/g;
const READ_ALOUD = new Set(["title", "aria-label", "aria-valuetext"]); // attributes that a person sees or hears

export const $ = (id) => document.getElementById(id);

/** A text with the signs that turn its direction written out: \u202e. */
export function visible(value) {
  return String(value ?? "").replace(TURNS, (sign) => `\\u${sign.charCodeAt(0).toString(16).padStart(4, "0")}`);
}

/** An element with attributes and children (elements, or texts). */
export function el(name, attributes = {}, ...children) {
  return filled(document.createElement(name), attributes, children);
}

/** The same for SVG. */
export function svg(name, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, name), attributes, children);
}

function filled(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) attr(node, name, value);
  const shown = children.filter((child) => child !== null);
  node.append(...shown.map((child) => (child instanceof Node ? child : visible(child))));
  return node;
}

/** Set a text, if it differs. */
export function text(node, value) {
  const wanted = visible(value);
  if (node.textContent !== wanted) node.textContent = wanted;
}

/** Set an attribute, if it differs; null takes it away. */
export function attr(node, name, value) {
  if (value === null || value === undefined || value === false) {
    if (node.hasAttribute(name)) node.removeAttribute(name);
    return;
  }
  const said = READ_ALOUD.has(name) ? visible(value) : String(value);
  const wanted = value === true ? "" : said;
  if (node.getAttribute(name) !== wanted) node.setAttribute(name, wanted);
}

export function show(node, seen) {
  if (node.hidden === seen) node.hidden = !seen;
}

/** Make the children of `parent` follow `items`: one node per key, kept, moved, made or taken away. */
export function keyed(parent, items, key, make, update) {
  const wanted = new Map(items.map((item) => [String(key(item)), item]));
  const old = new Map();
  for (const node of [...parent.children]) {
    if (wanted.has(node.dataset.key)) old.set(node.dataset.key, node);
    else node.remove();
  }
  let at = parent.firstElementChild;
  for (const [name, item] of wanted) {
    const node = old.get(name) ?? make(item);
    node.dataset.key = name;
    if (node === at) at = at.nextElementSibling;
    else parent.insertBefore(node, at);
    update(node, item);
  }
}

/** Say something to a screen reader, once. */
export function say(words) {
  text($("say"), words);
}

/** A function that asks for `draw` once in the next frame, however often it is called; none while the tab is hidden. */
export function drawer(draw) {
  let asked = 0;
  let dirty = false;
  const ask = () => {
    dirty = true;
    if (asked || document.hidden) return;
    asked = requestAnimationFrame(() => {
      asked = 0;
      dirty = false;
      draw();
    });
  };
  document.addEventListener("visibilitychange", () => {
    if (document.hidden && asked) {
      cancelAnimationFrame(asked);
      asked = 0;
    }
    if (!document.hidden && dirty) ask();
  });
  return ask;
}
