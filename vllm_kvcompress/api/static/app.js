// Connects everything: which view is shown, what is asked for, what state the page is in.

import { getConfig, getRequest, getRequests, getSummary, hasKey, useKey } from "./api.js";
import { Detail } from "./detail.js";
import { h, setText } from "./dom.js";
import { Notices } from "./notices.js";
import { Overview } from "./overview.js";
import { Poller } from "./poller.js";
import { chosen, Samples } from "./samples.js";
import { Server } from "./server.js";
import { LIMIT, RequestTable } from "./table.js";
import { connectTheme } from "./theme.js";

const ROUTE = /^#\/requests\/(.+)$/;
const TITLE = document.title;
const byId = (id) => document.getElementById(id);

const samples = new Samples();
const overview = new Overview();
const server = new Server();
const poller = new Poller(ask, answered, failed);
const table = new RequestTable(() => poller.now());
const detail = new Detail(leaveRequest);
const notices = new Notices(() => poller.now(), enterKey);

let config = null;
let summary = null;
let error = null;
let engine = null;
let request = null;
let cameFromOverview = false;

async function ask(signal) {
  const which = request;
  const [gotSummary, gotConfig, requests, one] = await Promise.all([
    getSummary(signal),
    config ?? getConfig(signal),
    which === null ? getRequests({ state: table.filters.state, limit: LIMIT }, signal) : null,
    which === null ? null : getRequest(which, signal),
  ]);
  return { summary: gotSummary, config: gotConfig, requests, one };
}

function answered(answer) {
  // A server that was gone may have come back with other settings.
  if (config !== answer.config) {
    config = answer.config;
    server.configure(config);
    table.filters.offer(config.methods ?? []);
    setText(
      byId("server"),
      `${config.model} · vLLM ${config.vllm_version} · vllm-kvcompress ${config.version}`,
    );
  }
  summary = answer.summary;
  error = null;
  samples.add(summary);
  offerEngines();
  draw();
  if (request === null) table.update(answer.requests, engine, summary.engines.length);
  else detail.update(answer.one, summary.time, config);
  showState();
}

function failed(caught, wait) {
  error = { caught, wait, refused: caught.kind === "unauthorised" && hasKey() };
  config = null;
  if (!caught.kind) console.error(caught);
  showState();
}

/** What does not depend on the view's own answer. */
function draw() {
  overview.update(samples.series(engine));
  server.update(summary, engine);
}

function showState() {
  // An engine that is stuck shows by its time.
  const time = summary && Math.min(...summary.engines.map((each) => each.time));
  if (error) {
    const { caught, wait, refused } = error;
    notices.show(caught.kind ?? "gone", { time, message: caught.message, wait, refused });
  } else if (time === null) notices.show("loading");
  else notices.show(poller.paused ? "paused" : "live", { time });
  const main = byId("main");
  main.dataset.time = summary?.time ?? "";
  main.dataset.stale = String(Boolean(error && summary));
  byId("overview").hidden = summary === null || request !== null;
  byId("detail").hidden = summary === null || request === null;
}

function offerEngines() {
  const select = byId("engine");
  const engines = summary.engines.map((each) => String(each.engine));
  const offered = [...select.options].slice(1).map(({ value }) => value);
  byId("engine-label").hidden = engines.length < 2;
  if (engines.join() === offered.join()) return;
  select.replaceChildren(
    h("option", { value: "", text: `all ${engines.length}` }),
    ...engines.map((value) => h("option", { value, text: value })),
  );
  if (engine !== null && !chosen(summary, engine).length) engine = null;
  select.value = engine === null ? "" : String(engine);
}

function enterKey(key) {
  useKey(key);
  poller.now();
}

function leaveRequest() {
  // Back, so that the browser's own history stays as the user made it.
  if (cameFromOverview) history.back();
  else location.hash = "#/";
}

function follow() {
  const before = request;
  const match = ROUTE.exec(location.hash);
  try {
    request = match ? decodeURIComponent(match[1]) : null;
  } catch {
    request = match[1];
  }
  if (before === request) return;
  document.title = request === null ? TITLE : `${request} · ${TITLE}`;
  showState();
  if (request === null) {
    cameFromOverview = false;
    table.focus(before);
  } else {
    cameFromOverview = before === null && summary !== null;
    detail.open(request);
    scrollTo(0, 0);
  }
  poller.now();
}

byId("overview").append(overview.element, table.element, server.element);
byId("detail").append(detail.element);
connectTheme();
addEventListener("hashchange", follow);
byId("skip").addEventListener("click", (event) => {
  // Not by the address, which says what is shown.
  event.preventDefault();
  byId("main").focus();
});
byId("engine").addEventListener("change", ({ target }) => {
  engine = target.value === "" ? null : Number(target.value);
  draw();
  poller.now();
});
byId("pause").addEventListener("click", () => {
  poller.paused = !poller.paused;
  setText(byId("pause"), poller.paused ? "Resume" : "Pause");
  showState();
});
addEventListener("keydown", (event) => {
  if (event.key === "Escape" && request !== null && !event.defaultPrevented) leaveRequest();
});
showState();
follow();
poller.now();
