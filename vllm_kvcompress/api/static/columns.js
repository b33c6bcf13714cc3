// The columns of the table of requests: what each shows and is sorted by.

import { h, setAttribute, setText } from "./dom.js";
import { bytes, clock, count, number, seconds, UNKNOWN } from "./format.js";
import { sum } from "./samples.js";

const FINISHED = { abort: "aborted", error: "error", length: "length", stop: "stop" };

/** State with the reason of the end: "finished, stop". */
export function stateText(request) {
  const { state, finish_reason: reason, preemptions } = request;
  if (state === "finished" && reason) return `finished, ${FINISHED[reason] ?? reason}`;
  return state === "waiting" && preemptions ? "waiting, preempted" : state;
}

/** Address of a request's page. */
export const requestHash = (id) => `#/requests/${encodeURIComponent(id)}`;

/** Most that stock vLLM would have held for it so far. */
export const uncompressedPeak = (request) =>
  request.bytes_uncompressed_peak ?? request.bytes_uncompressed ?? null;

/** Queue, prefill and decode time together. */
export const totalSeconds = (request) =>
  sum([request.queue_seconds, request.prefill_seconds, request.decode_seconds]);

/**
 * Three bars on one scale: now, peak and uncompressed. The numbers stand in columns of their own.
 *
 * @returns {{element: HTMLElement, update: function(Object, number): void}} update gets the
 *     request and the bytes that the full width means.
 */
export function memoryBar() {
  const parts = ["uncompressed", "peak", "now"].map((name) => h("i", { class: name }));
  const element = h("div", { class: "bar", "aria-hidden": "true" }, ...parts);
  return {
    element,
    update(request, scale) {
      const values = [uncompressedPeak(request), request.bytes_peak, request.bytes_held];
      values.forEach((value, i) => {
        parts[i].style.width = `${scale > 0 ? Math.min(100, (100 * (value ?? 0)) / scale) : 0}%`;
      });
    },
  };
}

const column = (key, label, value, show, more = {}) => ({
  key,
  label,
  value,
  numeric: true,
  make(cell) {
    return (request) => setText(cell, show(value(request)));
  },
  ...more,
});

/** The columns in order. `value` is what a column is sorted by; null sorts last, either way. */
export const COLUMNS = [
  column("id", "Request", (request) => request.id, String, {
    numeric: false,
    make(cell) {
      const link = h("a");
      cell.append(link);
      return (request) => {
        setText(link, request.id);
        setAttribute(link, "href", requestHash(request.id));
        setAttribute(link, "title", request.id);
      };
    },
  }),
  column("state", "State", stateText, String, {
    numeric: false,
    make(cell) {
      return (request) => {
        setText(cell, stateText(request));
        setAttribute(cell, "data-state", request.state);
      };
    },
  }),
  column("method", "Method", (request) => request.method, String, { numeric: false }),
  column("engine", "Engine", (request) => request.engine, count, { onlyWithEngines: true }),
  column("now", "KV now", (request) => request.bytes_held, bytes, {
    make(cell) {
      const bar = memoryBar();
      const text = h("span");
      cell.append(h("div", { class: "memory" }, bar.element, text));
      return (request, scale) => {
        bar.update(request, scale);
        setText(text, bytes(request.bytes_held));
      };
    },
  }),
  column("peak", "KV peak", (request) => request.bytes_peak, bytes),
  column("uncompressed", "Peak if uncom­pressed", uncompressedPeak, bytes),
  column(
    "ratio",
    "Ratio",
    (request) => request.ratio,
    (ratio) => (ratio == null ? UNKNOWN : ratio.toFixed(2)),
  ),
  column("compactions", "Compac­tions", (request) => request.compactions, number),
  column("arrival", "Arrived", (request) => request.arrival, clock),
  column("prompt", "Prompt tokens", (request) => request.prompt_tokens, count),
  column("output", "Output tokens", (request) => request.output_tokens, count),
  column("seconds", "Time", totalSeconds, seconds),
];

/** Compare two requests by a column; equal ones newest first, then by id. */
export function compare(column, descending) {
  return (a, b) => {
    const [x, y] = [column.value(a) ?? null, column.value(b) ?? null];
    if ((x === null) !== (y === null)) return x === null ? 1 : -1;
    if (x !== null && x !== y) {
      return (x < y ? -1 : 1) * (descending ? -1 : 1);
    }
    return b.arrival - a.arrival || (a.id < b.id ? -1 : Number(a.id > b.id));
  };
}
