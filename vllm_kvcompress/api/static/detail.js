// One request: memory, pages per band over time, tokens per band, settings, times.

import { Chart } from "./chart.js";
import { memoryBar, stateText, totalSeconds, uncompressedPeak } from "./columns.js";
import { facts, h, setChildren, setText } from "./dom.js";
import {
  axisBytes,
  band as bandNumber,
  bytes,
  count,
  dateTime,
  percent,
  plural,
  seconds,
  setting,
  times,
  UNKNOWN,
} from "./format.js";
import { History } from "./history.js";

/** Colours of bands, first to last layers: from blue to orange, told apart also without hue. */
const bandColour = (band, bands) => {
  const share = bands > 1 ? band / (bands - 1) : 0;
  return `color-mix(in oklch decreasing hue, var(--band-last) ${Math.round(share * 100)}%, var(--band-first))`;
};

export class Detail {
  #id = null;
  #history = null;
  #pages = null;
  #bands = "";
  #title = h("h2", { tabindex: "-1", id: "request-title" });
  #state = h("p", { class: "sub" });
  #memoryFacts = facts("facts inline");
  #timeFacts = facts();
  #settingFacts = facts();
  #bar = memoryBar();
  #memory = null;
  #charts = h("div", { class: "grid even" });
  #rows = h("tbody");
  #known = h("div");
  #missing = h("div", { class: "empty", hidden: true });

  /** @param {function(): void} back leave this view. */
  constructor(back) {
    const headers = [
      "Band",
      "Layers",
      "KV group",
      "Pages",
      "Tokens kept",
      "Removed",
      "Merged",
      "Kept",
    ];
    const table = h(
      "table",
      { id: "bands" },
      h("caption", { text: "Tokens and pages per band of layers" }),
      h(
        "thead",
        {},
        h("tr", {}, ...headers.map((text) => h("th", { scope: "col", class: "numeric", text }))),
      ),
      this.#rows,
    );
    this.#known.append(
      h(
        "section",
        { class: "card", "aria-label": "Memory" },
        this.#bar.element,
        this.#memoryFacts.element,
      ),
      this.#charts,
      h("div", { class: "scroller", role: "region", "aria-label": "Bands", tabindex: "0" }, table),
      h(
        "div",
        { class: "grid even" },
        h(
          "section",
          { class: "card" },
          h("h3", { text: "Times and tokens" }),
          this.#timeFacts.element,
        ),
        h(
          "section",
          { class: "card" },
          h("h3", { text: "Settings in force" }),
          this.#settingFacts.element,
        ),
      ),
    );
    this.element = h(
      "article",
      { "aria-labelledby": "request-title" },
      h("button", { type: "button", class: "back", onclick: back }, "← All requests"),
      this.#title,
      this.#state,
      this.#known,
      this.#missing,
    );
  }

  /** Show another request; its numbers come with `update`. */
  open(id) {
    this.#id = id;
    this.#history = new History();
    this.#bands = "";
    this.#pages?.discard();
    this.#memory?.discard();
    setText(this.#title, id);
    setText(this.#state, "Asking the server…");
    this.#known.hidden = this.#missing.hidden = true;
    this.#title.focus();
  }

  /**
   * @param {?Object} request null: the server does not know it.
   * @param {number} now the server's time.
   * @param {?Object} config of the server.
   */
  update(request, now, config) {
    this.#known.hidden = request === null;
    this.#missing.hidden = request !== null;
    if (request === null) {
      setText(this.#state, "Not found");
      if (!this.#missing.childElementCount) {
        this.#missing.append(
          h("p", {}, h("b", { text: "The server does not know this request." })),
          h("p", {
            text: "It keeps only the latest finished requests, and none from before it was started.",
          }),
        );
      }
      return;
    }
    setText(
      this.#state,
      `${stateText(request)}; method ${request.method}, engine ${request.engine}`,
    );
    this.#bar.update(request, Math.max(uncompressedPeak(request) ?? 0, request.bytes_peak ?? 0));
    this.#memoryFacts.update([
      ["KV now", bytes(request.bytes_held)],
      ["KV peak", bytes(request.bytes_peak)],
      ["Uncompressed now", bytes(request.bytes_uncompressed)],
      ["Uncompressed peak", bytes(uncompressedPeak(request))],
      ["Ratio now", times(request.ratio)],
      ["Compactions", count(request.compactions)],
    ]);
    this.#timeFacts.update([
      ["Arrived", dateTime(request.arrival)],
      ["Queue", seconds(request.queue_seconds)],
      ["Prefill", seconds(request.prefill_seconds)],
      ["Decode", seconds(request.decode_seconds)],
      ["Together", seconds(totalSeconds(request))],
      ["Prompt tokens", count(request.prompt_tokens)],
      ["of them from the prefix cache", count(request.cached_tokens)],
      ["Output tokens", count(request.output_tokens)],
      ["Preemptions", count(request.preemptions)],
    ]);
    this.#settingFacts.update([
      ["method", request.method],
      ...Object.entries(request.settings ?? {})
        .filter(([name]) => name !== "method")
        .map(([name, value]) => [name, setting(value)]),
    ]);
    this.#drawBands(request.bands ?? []);
    this.#drawCharts(request, now, config);
  }

  #drawBands(bands) {
    const rows = bands.map((each, i) => {
      const row =
        this.#rows.rows[i] ??
        h("tr", {}, ...Array.from({ length: 8 }, () => h("td", { class: "numeric" })));
      const seen = ["kept", "removed", "merged"].reduce(
        (all, what) => all + (each[`tokens_${what}`] ?? 0),
        0,
      );
      [
        bandNumber(each.band),
        ...[each.layers, each.group, each.blocks].map(count),
        ...[each.tokens_kept, each.tokens_removed, each.tokens_merged].map(count),
        seen > 0 ? percent((each.tokens_kept ?? 0) / seen) : UNKNOWN,
      ].forEach((text, cell) => setText(row.cells[cell], text));
      return row;
    });
    setChildren(this.#rows, rows);
  }

  #drawCharts(request, now, config) {
    const bands = [...new Set((request.bands ?? []).map(({ band }) => band))].sort(
      (a, b) => (a ?? Infinity) - (b ?? Infinity),
    );
    if (this.#bands !== bands.join()) this.#makeCharts(bands);
    this.#bands = bands.join();
    this.#history.add(request, now);
    const { time, held, uncompressed, pages, stock } = this.#history.series(
      bands,
      config?.block_size,
    );
    if (!time.length) return;
    const finished = request.state === "finished";
    const blocks = (request.bands ?? []).reduce((all, { blocks }) => all + (blocks ?? 0), 0);
    this.#pages.update(
      time,
      [...pages, stock],
      `${plural(blocks, "page")} ${finished ? "at its end" : "now"}`,
      `in ${plural(bands.length, "band")}; a page is ${count(config?.block_size)} tokens of one band's layers`,
    );
    this.#memory.update(
      time,
      [held, uncompressed],
      finished ? `${bytes(request.bytes_peak)} at most` : `${bytes(request.bytes_held)} now`,
      finished
        ? `stock would have held up to ${bytes(uncompressedPeak(request))}`
        : `stock would hold ${bytes(request.bytes_uncompressed)}`,
    );
  }

  #makeCharts(bands) {
    const options = { sync: "detail", height: 200, shortest: 4 };
    this.#pages?.discard();
    this.#memory?.discard();
    this.#pages = new Chart(
      "Pages per band",
      [
        ...bands.map((band, i) => ({
          label: band === null || band < 0 ? "Other layers" : `Band ${band}`,
          colour: bandColour(i, bands.length),
          format: count,
        })),
        { label: "Stock, each band", colour: "var(--muted)", dash: [4, 4], format: count },
      ],
      { ...options, format: (value) => (Number.isInteger(value) ? count(value) : "") },
    );
    this.#memory = new Chart(
      "Memory",
      [
        { label: "Held", colour: "var(--held)", fill: "var(--held)", format: bytes },
        { label: "Uncompressed", colour: "var(--stock)", format: bytes },
      ],
      { ...options, format: axisBytes, binary: true },
    );
    this.#charts.replaceChildren(this.#pages.element, this.#memory.element);
  }
}
