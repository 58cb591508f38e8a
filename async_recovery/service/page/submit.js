// A new job: the file is sent first, then the job that reads it.

import { jobPath, request, upload } from "./api.js";
import { $, attr, el, say, show, text } from "./dom.js";
import { bytes, percent } from "./format.js";

/** What the form says, as the body of POST /jobs without its input; empty fields are left to the server. */
export function jobOf(fields) {
  const options = { on_error: fields["on-error"] };
  if (fields["on-error"] === "max") {
    const most = fields["max-failures"].replace(/\s/g, "");
    options.on_error = { max_failures: most.endsWith("%") ? most : Number(most) };
  }
  for (const [name, option] of [
    ["concurrency", "concurrency"],
    ["rate", "rate"],
    ["timeout", "timeout"],
  ]) {
    if (fields[name] !== "") options[option] = Number(fields[name]);
  }
  if (fields.retries !== "") options.retry = Number(fields.retries) + 1; // which counts attempts
  return { worker: fields.worker, options };
}

/** One name for one wish: pressed again after a failure, the same; after a change, another. */
class Wish {
  #of = null;
  #key = null;

  key(wish) {
    const said = JSON.stringify(wish);
    if (said !== this.#of) {
      this.#of = said;
      this.#key = [...crypto.getRandomValues(new Uint8Array(16))]
        .map((byte) => byte.toString(16).padStart(2, "0"))
        .join("");
    }
    return this.#key;
  }

  done() {
    this.#of = null;
  }
}

export class Submit {
  #wish = new Wish();
  #sent = null; // {file, id}: it need not be sent again if only the job was refused
  #limit = null;

  constructor({ refused }) {
    this.form = $("submit");
    this.refused = refused;
    const fields = this.form.elements;
    fields["on-error"].addEventListener("change", () => this.#most());
    fields.file.addEventListener("change", () => fields.file.files.length && (fields.path.value = ""));
    fields.path.addEventListener("input", () => fields.path.value && (fields.file.value = ""));
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#go();
    });
  }

  /** @param service the answer of GET /service */
  offer(service) {
    const select = this.form.elements.worker;
    const names = service.workers ?? [];
    if (JSON.stringify([...select.options].map((option) => option.value)) !== JSON.stringify(names)) {
      const chosen = select.value;
      select.replaceChildren(...names.map((name) => el("option", { value: name }, name)));
      if (names.includes(chosen)) select.value = chosen;
    }
    attr(this.form.elements.concurrency, "max", service.max_concurrency);
    this.#limit = service.max_upload_bytes ?? null;
    show($("new-job"), !service.read_only);
  }

  #most() {
    const up = this.form.elements["on-error"].value === "max";
    show($("field-max"), up);
    this.form.elements["max-failures"].required = up;
  }

  async #go() {
    const fields = this.form.elements;
    const file = fields.file.files[0] ?? null;
    const path = fields.path.value.trim();
    text($("submit-error"), "");
    if (!file && !path) return this.#refuse("Choose a file, or name a path below the data folder.", fields.file);
    if (file && this.#limit !== null && file.size > this.#limit) {
      return this.#refuse(
        `The file has ${bytes(file.size)}; this server takes at most ${bytes(this.#limit)}.`,
        fields.file,
      );
    }
    $("submit-go").disabled = true;
    try {
      const said = Object.fromEntries(new FormData(this.form));
      const job = jobOf(said);
      const input = file ? { upload: await this.#send(file) } : { path };
      if (said.format) input.format = said.format;
      const wish = { ...job, input };
      const made = await request("POST", "jobs", { json: wish, more: { "Idempotency-Key": this.#wish.key(wish) } });
      this.#wish.done();
      this.#sent = null;
      fields.file.value = fields.path.value = "";
      $("new-job").open = false;
      say("The job is there.");
      location.hash = `#/${jobPath(made.id)}`;
    } catch (error) {
      if (error.status === 401) return this.refused(401);
      this.#refuse(error.message, $("submit-go"));
    } finally {
      $("submit-go").disabled = false;
      show($("upload"), false);
    }
    return undefined;
  }

  #refuse(message, field) {
    text($("submit-error"), message);
    field.focus();
  }

  async #send(file) {
    if (this.#sent?.file === file) return this.#sent.id;
    show($("upload"), true);
    const sending = upload(file, (share) => {
      $("upload-bar").value = share;
      text($("upload-text"), `${percent(share)} of ${bytes(file.size)}`);
    });
    $("upload-stop").onclick = sending.stop;
    const { id } = await sending.done;
    this.#sent = { file, id };
    return id;
  }
}
