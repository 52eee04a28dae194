"use strict";
// The chat page. All content becomes text nodes; nothing is parsed as HTML.

const $ = (id) => document.getElementById(id);
const FIELDS = ["system", "temperature", "top_p", "max_tokens", "seed", "key"];
const KNOWN_SOURCES = [
  "early-exit", "exit-adapter", "n-gram", "prediction", "datastore", "grammar", "model",
];

let messages = []; // {role, content, runs, report}
let running = null; // AbortController of the answer being written
let plainSpeed = null;

// --- what survives a reload ---------------------------------------------------------------------

function save() {
  const fields = Object.fromEntries(FIELDS.map((id) => [id, $(id).value]));
  const state = { messages, fields, predict: $("predict").checked, mode: mode() };
  try {
    sessionStorage.setItem("layerskip", JSON.stringify(state));
  } catch { /* full, or not allowed: the page works without it */ }
}

function restore() {
  let state = null;
  try {
    state = JSON.parse(sessionStorage.getItem("layerskip"));
  } catch { /* as above */ }
  if (!state) return;
  messages = state.messages;
  for (const id of FIELDS) $(id).value = state.fields[id] ?? "";
  $("predict").checked = state.predict;
  for (const radio of document.getElementsByName("mode")) radio.checked = radio.value === state.mode;
  for (const message of messages) show(message);
  const last = messages.findLast((message) => message.report);
  if (last) showReport(last);
}

// --- the server ---------------------------------------------------------------------------------

function headers() {
  const key = $("key").value;
  const json = { "Content-Type": "application/json" };
  return key ? { ...json, Authorization: `Bearer ${key}` } : json;
}

async function errorOf(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answers with status ${response.status}`;
  }
}

async function connect() {
  let text = "no server";
  try {
    const health = await fetch("health");
    if (health.ok) {
      const response = await fetch("v1/models", { headers: headers() });
      if (response.ok) {
        const model = (await response.json()).data[0];
        const { weights, dtype } = model.layerskip;
        const format = weights === "stored" ? "quantized" : weights;
        $("model").textContent = [model.id, format, dtype].filter((part) => part !== "16bit").join(" · ");
        document.title = `${model.id} · layerskip`;
        setPlainSpeed(model.layerskip.plain_tokens_per_s);
        return;
      }
      text = await errorOf(response);
      if (response.status === 401) {
        $("model").textContent = "needs an API key";
        $("settings").open = true;
        $("key").focus();
        return;
      }
    } else {
      text = `${(await health.json()).status} …`;
    }
  } catch { /* no server: try again */ }
  $("model").textContent = text;
  setTimeout(connect, 1000);
}

function requestBody(question) {
  const system = $("system").value.trim();
  const turns = messages.map(({ role, content }) => ({ role, content }));
  const body = {
    messages: system ? [{ role: "system", content: system }, ...turns] : turns,
    stream: true,
    temperature: Number($("temperature").value),
    top_p: Number($("top_p").value) || 1,
    max_tokens: Number($("max_tokens").value) || 512,
    layerskip: { mode: mode(), sources: true },
  };
  if ($("seed").value !== "") body.seed = Number($("seed").value);
  if ($("predict").checked && mode() !== "plain") {
    body.prediction = { type: "content", content: question };
  }
  return body;
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    buffer += value;
    const parts = buffer.split("\n\n");
    buffer = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

// --- an answer ----------------------------------------------------------------------------------

async function ask(question) {
  const conversation = messages; // "New chat" begins another one
  conversation.push({ role: "user", content: question });
  show(conversation.at(-1));
  const body = requestBody(question);
  const answer = { role: "assistant", content: "", runs: [], mode: mode() };
  const item = show(answer);
  running = new AbortController();
  setRunning(true);
  let tokens = 0, started = 0;
  try {
    const response = await fetch("v1/chat/completions", {
      method: "POST", headers: headers(), body: JSON.stringify(body), signal: running.signal,
    });
    if (!response.ok) throw new Error(await errorOf(response));
    for await (const chunk of events(response)) {
      if (chunk.error) throw new Error(chunk.error.message);
      for (const run of chunk.layerskip?.sources ?? []) {
        if (!started) started = performance.now();
        else tokens += run.tokens;
        append(answer, item, run);
      }
      const seconds = (performance.now() - started) / 1000;
      if (tokens > 4) setMeter("live", tokens / seconds);
      if (chunk.layerskip?.rounds !== undefined) answer.report = chunk.layerskip;
    }
    if (answer.report) showReport(answer, item);
    $("status").textContent = "The answer is complete.";
  } catch (error) {
    if (error.name === "AbortError") note(item, "stopped");
    else note(item, error.message, "error");
  }
  item.classList.remove("writing");
  if (answer.content) conversation.push(answer);
  else conversation.pop(); // the question can be asked again
  running = null;
  setRunning(false);
  save();
}

function append(answer, item, { text, source }) {
  const atEnd = isAtEnd();
  answer.content += text;
  const last = answer.runs.at(-1);
  if (last && last.source === source) {
    last.text += text;
    item.querySelector(".text").lastChild.textContent += text;
  } else {
    answer.runs.push({ text, source });
    item.querySelector(".text").append(span({ text, source }));
  }
  if (atEnd) scrollToEnd();
}

// --- drawing ------------------------------------------------------------------------------------

function element(name, className, text = "") {
  const one = document.createElement(name);
  one.className = className;
  one.textContent = text;
  return one;
}

function span({ text, source }) {
  const one = element("span", KNOWN_SOURCES.includes(source) ? `source-${source}` : "source-other", text);
  if (source !== "model") one.title = `drafted: ${source}`;
  return one;
}

function show(message) {
  $("welcome").hidden = true;
  const item = element("li", message.role);
  item.append(element("h3", "visually-hidden", message.role === "user" ? "You" : "Answer"));
  const text = element("p", "text", message.runs ? "" : message.content);
  text.append(...(message.runs ?? []).map(span));
  item.append(text);
  if (message.role === "assistant") {
    item.append(element("p", "facts"));
    if (message.report) showFacts(message, item);
    else if (!message.content) item.classList.add("writing");
  }
  $("messages").append(item);
  scrollToEnd();
  return item;
}

function note(item, text, className = "") {
  const atEnd = isAtEnd();
  const facts = item.querySelector(".facts");
  facts.textContent = text;
  if (className) {
    facts.classList.add(className);
    facts.setAttribute("role", "alert");
  }
  if (atEnd) scrollToEnd();
}

function showReport(answer, item = null) {
  const report = answer.report;
  if (report.tokens_per_s) setMeter("live", report.tokens_per_s);
  if (answer.mode === "plain" && report.tokens_per_s) setPlainSpeed(report.tokens_per_s);
  const percent = Math.round(100 * report.acceptance_rate);
  $("acceptance").textContent = report.drafted
    ? `${report.accepted} of ${report.drafted} drafted tokens accepted (${percent}%), `
      + `${report.mean_accepted_length.toFixed(1)} tokens a pass.`
    : "Nothing was drafted.";
  if (item) showFacts(answer, item);
}

function showFacts({ report, mode }, item) {
  const parts = [mode, `first token ${Math.round(1000 * report.ttft_s)} ms`];
  if (report.tokens_per_s) parts.push(`${Math.round(report.tokens_per_s)} tokens/s`);
  if (report.drafted) parts.push(`${Math.round(100 * report.acceptance_rate)}% accepted`);
  note(item, parts.join(" · "));
}

const speeds = { live: null, plain: null };

function setMeter(id, speed) {
  speeds[id] = speed;
  $(id).querySelector("b").textContent = speed ? Math.round(speed) : "–";
  const largest = Math.max(speeds.live ?? 0, speeds.plain ?? 0, 1);
  for (const name of ["live", "plain"]) {
    $(name).style.setProperty("--share", `${(100 * (speeds[name] ?? 0)) / largest}%`);
  }
  const ratio = speeds.live && speeds.plain ? ` (${(speeds.live / speeds.plain).toFixed(1)}x)` : "";
  $("live").querySelector("dt").textContent = `this answer${ratio}`;
}

function setPlainSpeed(speed) {
  plainSpeed = speed;
  setMeter("plain", plainSpeed);
}

const mode = () => document.querySelector("input[name=mode]:checked").value;

function isAtEnd() {
  const box = $("conversation");
  return box.scrollHeight - box.scrollTop - box.clientHeight < 60;
}

function scrollToEnd() {
  $("conversation").scrollTop = $("conversation").scrollHeight;
}

function setRunning(isRunning) {
  $("send").hidden = isRunning;
  $("stop").hidden = !isRunning;
  $("status").textContent = isRunning ? "Answering." : $("status").textContent;
  $("question").focus();
}

function grow() {
  const box = $("question");
  box.style.height = "auto";
  box.style.height = `${Math.min(box.scrollHeight + 2, 200)}px`;
}

// --- what the user does -------------------------------------------------------------------------

function send(text) {
  if (running || !text.trim()) return;
  $("question").value = "";
  grow();
  ask(text.trim());
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send($("question").value);
});
$("question").addEventListener("input", grow);
$("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send($("question").value);
  }
});
$("stop").addEventListener("click", () => running?.abort());
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
});
$("examples").addEventListener("click", (event) => {
  if (event.target.matches("button")) send(event.target.textContent);
});
$("new").addEventListener("click", () => {
  running?.abort();
  messages = [];
  $("messages").replaceChildren();
  $("welcome").hidden = false;
  save();
  $("question").focus();
});
$("settings").addEventListener("change", save);
$("mode").addEventListener("change", save);
$("key").addEventListener("change", connect);

$("settings").open = matchMedia("(min-width: 60rem)").matches;
restore();
connect();
