// The page of the service: which part is seen, whether the server is there, and who may look.
//
// Everything shown came from items, errors and names that others wrote: it is put into the document as text only.

import { ApiError, request, token } from "./api.js";
import { $, attr, say, show, text } from "./dom.js";
import { duration } from "./format.js";
import { JobView } from "./job.js";
import { List } from "./list.js";
import { Submit } from "./submit.js";

const VIEWS = ["token", "list", "job", "gone"];
let service = null;
let awaySince = null;
let awayTimer = null;

function see(view) {
  for (const each of VIEWS) show($(`view-${each}`), each === view);
}

/** The server is there, or is not: said at the top, and the numbers are marked as old meanwhile. */
function report(state) {
  const was = $("connection").dataset.state;
  attr($("connection"), "data-state", state);
  text($("connection"), { live: "live", away: "server away", connecting: "connecting" }[state]);
  document.body.classList.toggle("stale", state === "away");
  show($("away"), state === "away");
  if (state === "away") {
    awaySince ??= Date.now();
    awayTimer ??= setInterval(tellAway, 1000);
    tellAway();
    return;
  }
  clearInterval(awayTimer);
  awayTimer = awaySince = null;
  if (was === "away") {
    say("The server is back.");
    void learn();
  }
}

function tellAway() {
  if (document.hidden) return;
  const since = duration((Date.now() - awaySince) / 1000);
  text(
    $("away-text"),
    `For ${since}; what is shown is from before. This page tries again by itself and goes on when it is back.`,
  );
}

function refused(status) {
  if (status !== 401) return;
  job.close();
  list.close();
  const wrong = token.get() !== null;
  token.clear();
  text($("token-error"), wrong ? "The server does not take this token." : "");
  attr($("connection"), "data-state", "locked");
  text($("connection"), "locked");
  show($("away"), false);
  document.body.classList.remove("stale");
  see("token");
  $("token-form").elements.token.focus();
}

/** What the server offers; true if it answered. */
async function learn() {
  try {
    service = await request("GET", "service");
  } catch (error) {
    if (error instanceof ApiError && error.status === 401) refused(401);
    else report(error.status ? "live" : "away");
    return false;
  }
  text($("version"), service.version ? `${service.version}${service.read_only ? " · read-only" : ""}` : "");
  submit.offer(service);
  job.allow(service);
  return true;
}

const readOnly = () => service?.read_only === true;
const list = new List({ report, refused, readOnly });
const job = new JobView({ report, refused, gone: () => see("gone") });
const submit = new Submit({ refused });

function idOf(part) {
  try {
    return decodeURIComponent(part);
  } catch {
    return part; // not written by us: the server will not know it
  }
}

function route() {
  if (service === null) return;
  const found = /^#\/jobs\/([^/]+)$/.exec(location.hash);
  if (found) {
    list.close();
    see("job");
    job.open(idOf(found[1]));
    return;
  }
  job.close();
  see("list");
  list.open();
}

async function start() {
  for (let wait = 250; !(await learn()); wait = Math.min(2000, wait * 2)) {
    if (!$("view-token").hidden) return;
    await new Promise((resolve) => setTimeout(resolve, wait));
  }
  report("live");
  route();
}

$("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const said = $("token-form").elements.token.value.trim();
  if (!/^[\x21-\x7e]+$/.test(said))
    return text($("token-error"), "A token has letters, digits and signs of ASCII only.");
  token.set(said);
  $("token-form").reset();
  see(null);
  return void start();
});
$("skip").addEventListener("click", (event) => {
  event.preventDefault();
  $("main").focus();
});
addEventListener("hashchange", route);
void start();
