// The studio's page. It speaks OpenAI's images API to the server it came from, and reads recipes out of PNG files.

const $ = (id) => document.getElementById(id);
const fields = ["negative_prompt", "steps", "guidance_scale", "scheduler", "seed"];
const PREVIEWS = 24;
const LIST = /\s*[,;]\s*|\s+/;

let models = [];
let running = new Set(); // of the AbortControllers of what is being made
let shown = null; // the picture in the viewer
let pictures = []; // of the gallery, newest first

// --- the server

class ServerError extends Error {}

async function call(path, options = {}) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    waitForServer();
    throw new ServerError("The server does not answer.");
  }
  if (response.status === 401) {
    await unlock();
    return call(path, options);
  }
  if (!response.ok) {
    const body = await response.json().catch(() => null);
    throw new ServerError(body?.error?.message ?? `The server answered ${response.status}.`);
  }
  return response;
}

let unlocking = null;
function unlock() {
  unlocking ??= new Promise((resolve) => {
    const ask = async () => {
      const answer = await fetch("/login", { method: "POST", headers: { Authorization: `Bearer ${$("key").value}` } });
      $("key").value = "";
      if (!answer.ok) return $("lock").showModal();
      $("lock").removeEventListener("close", ask);
      unlocking = null;
      resolve();
    };
    $("lock").addEventListener("close", ask);
    $("lock").showModal();
  });
  return unlocking;
}

let waiting = false;
async function waitForServer() {
  if (waiting) return;
  waiting = true;
  say("The server does not answer. Waiting for it …");
  for (;;) {
    await new Promise((resolve) => setTimeout(resolve, 1000));
    try {
      if ((await fetch("/health/ready")).ok) break;
    } catch {
      // still away
    }
  }
  waiting = false;
  say("The server is back.");
  await start().catch(complain);
}

// Server-sent events of a response, one by one.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    text += value;
    for (let end; (end = text.indexOf("\n\n")) >= 0; text = text.slice(end + 2)) {
      const line = text.slice(0, end).split("\n").find((each) => each.startsWith("data: "));
      if (line) yield parse(line.slice(6));
    }
  }
}

// --- what is said

function say(text) {
  $("state").textContent = text;
}

function complain(error) {
  if (error.name === "AbortError") return;
  $("problem").textContent = error.message;
  $("problem").hidden = false;
}

// --- the form

function chosen() {
  return models.find((model) => model.id === $("model").value) ?? models[0];
}

function options(select, values, selected) {
  select.replaceChildren(...values.map(([value, text]) => new Option(text, value, false, value === selected)));
}

function fillModel() {
  const model = chosen();
  const own = model.defaults;
  options($("size"), model.sizes.map(([height, width]) => [`${width}x${height}`, `${width} × ${height}`]), `${own.width}x${own.height}`);
  options($("scheduler"), [["", `${own.scheduler} (the model's own)`], ...model.schedulers.map((name) => [name, name])], "");
  $("steps").placeholder = own.steps;
  $("guidance_scale").placeholder = own.guidance_scale;
  $("count").max = model.limits.images;
  for (const name of ["negative_prompt", "guidance_scale"]) $(name).disabled = !model.guided;
}

// Every request that the form asks for: prompts by lines, and a grid where steps or guidance are lists.
function asked() {
  const list = (name) => ($(name).disabled || !$(name).value.trim() ? [null] : $(name).value.trim().split(LIST).map(Number));
  const prompts = $("prompt").value.split("\n").map((line) => line.trim()).filter(Boolean);
  const made = [];
  for (const prompt of prompts)
    for (const steps of list("steps"))
      for (const guidance_scale of list("guidance_scale")) {
        if (Number.isNaN(steps) || Number.isNaN(guidance_scale)) throw new ServerError("Steps and guidance are numbers.");
        const body = { model: $("model").value, prompt, n: Number($("count").value) || 1, steps, guidance_scale };
        if ($("size").value) body.size = $("size").value;
        body.scheduler = $("scheduler").value || null;
        if (!$("negative_prompt").disabled) body.negative_prompt = $("negative_prompt").value.trim() || null;
        const seed = $("seed").value.trim();
        if (seed) {
          if (!/^\d+$/.test(seed)) throw new ServerError("A seed is a whole number.");
          body.seed = seed; // may be larger than a number of JavaScript can hold
        }
        made.push(body);
      }
  const grid = made.length > prompts.length;
  if (grid && !$("seed").value.trim()) {
    const seed = String(Math.floor(Math.random() * 2 ** 32)); // a grid compares, so all of it has one seed
    for (const body of made) body.seed = seed;
  }
  return made;
}

// The inverse: seeds that a number of JavaScript cannot hold are texts. (Within a text the quotes would be escaped.)
function parse(text) {
  return JSON.parse(text.replace(/("seed":\s*)(\d{16,})/g, '$1"$2"'));
}

// JSON in which a seed of up to 64 bits is a number.
function json(body) {
  const { seed, ...rest } = body;
  const text = JSON.stringify(rest);
  return seed === undefined ? text : `${text.slice(0, -1)},"seed":${seed}}`;
}

function reuse(recipe) {
  const request = recipe.request;
  const model = models.find((each) => each.revision === recipe.revision);
  if (model) $("model").value = model.id;
  fillModel();
  $("prompt").value = recipe.prompt;
  $("negative_prompt").value = request.negative_prompt ?? "";
  $("steps").value = request.denoising_steps;
  $("guidance_scale").value = $("guidance_scale").disabled ? "" : request.guidance_scale;
  $("scheduler").value = request.scheduler ?? "";
  $("size").value = `${request.width}x${request.height}`;
  $("seed").value = recipe.seed;
  $("count").value = 1;
  $("more").open = true;
  if (!model) throw new ServerError(`It was made with ${request.model ?? "a model folder"}, which is not served here.`);
}

// --- making

async function make(event) {
  event?.preventDefault();
  $("problem").hidden = true;
  let bodies;
  try {
    bodies = asked();
  } catch (error) {
    return complain(error);
  }
  $("tray").replaceChildren();
  const work = bodies.map((body) => one(body, bodies.length > 1).catch(complain));
  await Promise.all(work);
}

async function one(body, labelled) {
  const controller = new AbortController();
  running.add(controller);
  showRunning();
  const model = models.find((each) => each.id === body.model);
  const steps = body.steps ?? model.defaults.steps;
  const sheets = Array.from({ length: body.n }, () => sheet(body.size));
  const label = labelled ? [body.prompt, body.steps && `${body.steps} steps`, body.guidance_scale != null && `guidance ${body.guidance_scale}`].filter(Boolean).join(", ") : body.prompt;
  for (const each of sheets) {
    each.classList.add("rising");
    each.querySelector("figcaption").textContent = label;
    $("tray").append(each);
  }
  const began = performance.now();
  let left = body.n;
  try {
    const response = await call("/v1/images/generations", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: json({ ...body, stream: true, partial_images: Math.min(PREVIEWS, steps - 1) }),
      signal: controller.signal,
    });
    for await (const event of events(response)) {
      const figure = sheets[event.image_index];
      const image = figure.querySelector("img");
      if (event.type === "error") {
        left -= 1;
        fail(figure, event.error.message);
        continue;
      }
      image.src = `data:image/png;base64,${event.b64_json}`;
      image.alt = body.prompt;
      if (event.type === "image_generation.partial_image") {
        figure.querySelector("progress").value = event.steps_made / steps;
        continue;
      }
      left -= 1;
      figure.classList.replace("rising", "done");
      const seconds = ((performance.now() - began) / 1000).toFixed(2);
      figure.querySelector("figcaption").textContent = `${labelled ? `${label} · ` : ""}seed ${event.seed} · ${seconds} s`;
      figure.querySelector("figcaption").title = Object.entries(event.milliseconds).map(([stage, ms]) => `${stage} ${ms} ms`).join(", ");
      figure.querySelector("button").onclick = () => open(event.file);
    }
    if (left) throw new ServerError("The server ended before the picture was made.");
  } catch (error) {
    for (const each of sheets) if (each.classList.contains("rising")) fail(each, error.name === "AbortError" ? "stopped" : error.message);
    if (error instanceof TypeError) waitForServer(); // the connection broke
    else if (error.name !== "AbortError") throw error;
  } finally {
    running.delete(controller);
    showRunning();
    await refresh().catch(complain);
  }
}

function sheet(size) {
  const figure = $("sheet").content.firstElementChild.cloneNode(true);
  if (size) figure.style.setProperty("--shape", size.replace("x", " / "));
  return figure;
}

function fail(figure, reason) {
  figure.classList.remove("rising");
  figure.classList.add("failed");
  figure.querySelector("figcaption").textContent = reason;
}

function showRunning() {
  $("stop").hidden = !running.size;
  if (!waiting) say(running.size ? "Making …" : "");
}

function stop() {
  for (const controller of running) controller.abort();
}

// --- the gallery

async function refresh() {
  const { pictures: newest } = parse(await (await call("/pictures")).text());
  const oldest = newest.at(-1)?.time ?? 0;
  pictures = [...newest, ...pictures.filter((picture) => picture.time < oldest)];
  drawGallery(newest.length >= 60);
}

async function older() {
  const before = pictures.at(-1)?.time;
  const { pictures: more } = parse(await (await call(`/pictures?before=${before}`)).text());
  pictures.push(...more);
  drawGallery(more.length >= 60);
}

function drawGallery(more) {
  $("gallery").replaceChildren(...pictures.map((picture) => {
    const { width, height } = picture.recipe.request;
    const figure = sheet(`${width}x${height}`);
    figure.querySelector("progress").remove();
    const image = figure.querySelector("img");
    image.loading = "lazy";
    image.src = `/pictures/${encodeURIComponent(picture.file)}`;
    image.alt = picture.recipe.prompt;
    figure.querySelector("figcaption").textContent = picture.recipe.prompt;
    figure.querySelector("button").onclick = () => open(picture.file);
    return figure;
  }));
  $("older").hidden = !more;
}

async function open(file) {
  if (!pictures.some((picture) => picture.file === file)) await refresh();
  shown = pictures.find((picture) => picture.file === file);
  if (!shown) return complain(new ServerError("This picture is not there any more."));
  const { recipe } = shown;
  const request = recipe.request;
  $("viewer-image").src = `/pictures/${encodeURIComponent(file)}`;
  $("viewer-image").alt = recipe.prompt;
  $("viewer-title").textContent = recipe.prompt;
  const facts = {
    Model: request.model ?? "a folder", Seed: recipe.seed, Size: `${request.width} × ${request.height}`, Steps: request.denoising_steps,
    Guidance: request.guidance_scale, Scheduler: request.scheduler ?? recipe.scheduler, "Negative prompt": request.negative_prompt, Runtime: recipe.runtime,
    Precision: request.precision,
  };
  $("viewer-recipe").replaceChildren(...Object.entries(facts).filter(([, value]) => value != null && value !== "").flatMap(([name, value]) => {
    const [term, said] = [document.createElement("dt"), document.createElement("dd")];
    term.textContent = name;
    said.textContent = value;
    return [term, said];
  }));
  $("viewer-file").href = `/pictures/${encodeURIComponent(file)}`;
  $("viewer-file").download = file;
  if (!$("viewer").open) $("viewer").showModal();
}

const actions = {
  reuse: () => reuse(shown.recipe),
  remake: () => { reuse(shown.recipe); make(); },
  vary: () => { reuse(shown.recipe); $("seed").value = ""; make(); },
  copy: async () => { await navigator.clipboard.writeText(JSON.stringify(shown.recipe, null, 1)); say("The recipe is in the clipboard."); return true; },
  delete: async () => {
    if (!confirm("Delete this picture's file?")) return true;
    await call(`/pictures/${encodeURIComponent(shown.file)}`, { method: "DELETE" });
    pictures = pictures.filter((picture) => picture !== shown);
    await refresh();
  },
};

async function act(event) {
  const action = actions[event.target.dataset.action];
  if (!action) return;
  $("problem").hidden = true;
  try {
    if (!(await action())) $("viewer").close();
  } catch (error) {
    $("viewer").close();
    complain(error);
  }
}

function turn(step) {
  const next = pictures[pictures.indexOf(shown) + step];
  if (next) open(next.file);
}

// --- a picture that is dropped on the page

// The recipe in a PNG's text chunk "darkroom" (https://www.w3.org/TR/png/#11iTXt), null where there is none.
async function recipeOf(file) {
  const bytes = new DataView(await file.arrayBuffer());
  const text = new TextDecoder();
  if (bytes.byteLength < 8 || bytes.getUint32(0) !== 0x89504e47) return null;
  for (let at = 8; at + 12 <= bytes.byteLength; ) {
    const length = bytes.getUint32(at);
    const kind = text.decode(new Uint8Array(bytes.buffer, at + 4, 4));
    if (kind === "iTXt" && at + 8 + length <= bytes.byteLength) {
      const data = new Uint8Array(bytes.buffer, at + 8, length);
      const name = data.indexOf(0);
      if (text.decode(data.subarray(0, name)) === "darkroom" && data[name + 1] === 0) {
        const language = data.indexOf(0, name + 3);
        return parse(text.decode(data.subarray(data.indexOf(0, language + 1) + 1)));
      }
    }
    at += 12 + length;
  }
  return null;
}

async function dropped(event) {
  event.preventDefault();
  document.body.classList.remove("dropping");
  $("problem").hidden = true;
  const [file] = event.dataTransfer.files;
  if (!file) return;
  try {
    const recipe = await recipeOf(file).catch(() => null);
    if (!recipe?.request) throw new ServerError(`${file.name} carries no recipe of Darkroom's.`);
    reuse(recipe);
    say(`The settings of ${file.name}.`);
  } catch (error) {
    complain(error);
  }
}

// --- the beginning

async function start() {
  models = (await (await call("/v1/models")).json()).data;
  const before = $("model").value;
  options($("model"), models.map((model) => [model.id, model.id]), before || models[0].id);
  fillModel();
  await refresh();
}

$("form").addEventListener("submit", make);
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("form").requestSubmit();
  }
});
$("model").addEventListener("change", fillModel);
$("stop").addEventListener("click", stop);
$("older").addEventListener("click", () => older().catch(complain));
$("viewer").addEventListener("click", act);
document.addEventListener("keydown", (event) => {
  if ($("viewer").open && event.key === "ArrowRight") turn(1);
  else if ($("viewer").open && event.key === "ArrowLeft") turn(-1);
  else if (event.key === "Escape" && !document.querySelector("dialog[open]")) stop();
});
document.addEventListener("dragover", (event) => {
  if (![...event.dataTransfer.types].includes("Files")) return;
  event.preventDefault();
  document.body.classList.add("dropping");
});
document.addEventListener("dragleave", (event) => event.relatedTarget ?? document.body.classList.remove("dropping"));
document.addEventListener("drop", dropped);
start().catch(complain);
