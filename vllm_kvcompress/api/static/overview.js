// The charts: memory against stock, saved share, requests, tokens, compactions.

import { Chart } from "./chart.js";
import { h } from "./dom.js";
import { axisBytes, bytes, count, number, percent, seconds, times, UNKNOWN } from "./format.js";

const SHOWN_SECONDS = 300;

export class Overview {
  #memory = new Chart(
    "Memory of the KV cache",
    [
      { label: "Held by requests", colour: "var(--held)", fill: "var(--held)", format: bytes },
      {
        label: "Cached, unused",
        colour: "var(--cached)",
        fill: "var(--cached)",
        format: bytes,
        over: 0,
      },
      { label: "Stock would hold", colour: "var(--stock)", format: bytes },
      { label: "Pool", colour: "var(--text)", dash: [6, 4], format: bytes },
    ],
    { format: axisBytes, binary: true, sync: "overview", height: 178 },
  );
  #saved = new Chart(
    "Saved share",
    [{ label: "Saved", colour: "var(--saved)", fill: "var(--saved-fill)", format: percent }],
    { format: percent, max: 1, sync: "overview", height: 178 },
  );
  #requests = new Chart(
    "Requests",
    [
      { label: "Running", colour: "var(--held)", format: count },
      { label: "Waiting", colour: "var(--stock)", format: count },
      { label: "Preempted", colour: "var(--warn)", dash: [3, 3], format: count },
    ],
    { format: (value) => (Number.isInteger(value) ? count(value) : ""), max: 4, sync: "overview" },
  );
  #tokens = new Chart(
    "Tokens per second",
    [
      { label: "Output", colour: "var(--held)", format: number },
      { label: "Prompt", colour: "var(--stock)", format: number },
    ],
    { format: number, max: 10, sync: "overview" },
  );
  #compactions = new Chart(
    "Compactions",
    [
      { label: "Per second", colour: "var(--held)", format: number },
      { label: "Time per second (right)", colour: "var(--stock)", format: seconds, axis: "right" },
    ],
    { format: number, right: seconds, max: 1, sync: "overview" },
  );

  constructor() {
    this.element = h(
      "section",
      { "aria-labelledby": "now" },
      h("h2", { id: "now", class: "hidden", text: "Now and the last minutes" }),
      h("div", { class: "grid two" }, this.#memory.element, this.#saved.element),
      h(
        "div",
        { class: "grid three" },
        this.#requests.element,
        this.#tokens.element,
        this.#compactions.element,
      ),
    );
  }

  /** @param {Object} series of `Samples.series`. */
  update(series) {
    const from = series.time.findIndex((time) => time >= series.time.at(-1) - SHOWN_SECONDS);
    const recent = Object.fromEntries(
      Object.entries(series).map(([name, values]) => [name, values.slice(from)]),
    );
    const last = Object.fromEntries(
      Object.entries(series).map(([name, values]) => [name, values.at(-1) ?? null]),
    );
    const { time } = recent;
    const ofPool = (value) => (value !== null && last.pool ? percent(value / last.pool) : UNKNOWN);

    this.#memory.update(
      time,
      [recent.held, recent.cached, recent.uncompressed, recent.pool],
      `${bytes(last.held)} of ${bytes(last.pool)} held by running requests`,
      `${ofPool(last.held)} of the pool; stock vLLM would hold ${bytes(last.uncompressed)}, ` +
        `${ofPool(last.uncompressed)} of it`,
    );
    this.#saved.update(
      time,
      [recent.saved],
      last.saved === null ? "Nothing held" : `${percent(last.saved)} saved`,
      last.saved === null
        ? "No request is running"
        : `${bytes(last.uncompressed - last.held)} less; stock would hold ` +
            `${times(last.uncompressed / last.held)} as much`,
    );
    this.#requests.update(
      time,
      [recent.running, recent.waiting, recent.preempted],
      `${count(last.running)} running`,
      `${count(last.waiting)} waiting, ${count(last.preempted)} of them after a preemption`,
    );
    this.#tokens.update(
      time,
      [recent.outputTokens, recent.promptTokens],
      `${number(last.outputTokens)} output tokens/s`,
      `${number(last.promptTokens)} prompt tokens/s; means of 5 seconds`,
    );
    const each =
      last.compactions > 0
        ? `${seconds(last.compactionSeconds / last.compactions)} each`
        : "none now";
    this.#compactions.update(
      time,
      [recent.compactions, recent.compactionSeconds],
      `${number(last.compactions)} per second`,
      `${each}; ${percent(last.compactionSeconds)} of the time`,
    );
  }
}
