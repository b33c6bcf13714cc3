// The foot of the page: counters since the server started, its settings and bands.

import { facts, h, setChildren, setText } from "./dom.js";
import { band as bandNumber, bytes, count, seconds, setting, UNKNOWN } from "./format.js";
import { addTotals, chosen, sum } from "./samples.js";

const byMethod = (counts) =>
  Object.entries(counts ?? {})
    .filter(([, value]) => value > 0)
    .map(([method, value]) => `${count(value)} ${method}`)
    .join(", ") || "none";

export class Server {
  #totals = facts("facts wide");
  #settings = facts("facts wide");
  #bands = h("tbody");
  #card = h(
    "section",
    { class: "card" },
    h("h3", { text: "Settings of the server" }),
    this.#settings.element,
  );
  #table = h(
    "div",
    { class: "scroller", role: "region", "aria-label": "Bands of layers", tabindex: "0" },
    h(
      "table",
      {},
      h("caption", { text: "Bands of layers" }),
      h(
        "thead",
        {},
        h(
          "tr",
          {},
          ...["Band", "Layers", "Tokens kept at most", "Share kept", "KV groups", "Page size"].map(
            (text) => h("th", { scope: "col", text }),
          ),
        ),
      ),
      this.#bands,
    ),
  );

  constructor() {
    this.element = h(
      "section",
      { "aria-labelledby": "since" },
      h("h2", { id: "since", text: "Server" }),
      h(
        "div",
        { class: "grid even" },
        h(
          "section",
          { class: "card" },
          h("h3", { text: "Since it started" }),
          this.#totals.element,
        ),
        this.#card,
      ),
      this.#table,
    );
    this.configure(null);
  }

  /** @param {?Object} config null: not known. */
  configure(config) {
    this.#card.hidden = this.#table.hidden = config === null;
    if (config === null) return;
    this.#settings.update(
      Object.entries(config.settings ?? {})
        .map(([name, value]) => [name, setting(value)])
        .concat([
          ["methods a request may choose", (config.methods ?? []).join(", ")],
          [
            "largest budget of a request",
            config.max_budget == null ? "no limit" : count(config.max_budget),
          ],
        ]),
    );
    setChildren(
      this.#bands,
      (config.bands ?? []).map((band) =>
        h(
          "tr",
          {},
          ...[
            bandNumber(band.band),
            layersText(band.layers ?? []),
            band.budget == null ? UNKNOWN : count(band.budget),
            band.keep_ratio == null ? UNKNOWN : String(band.keep_ratio),
            (band.groups ?? []).join(", "),
            bytes(band.bytes_per_block),
          ].map((text) => h("td", { text })),
        ),
      ),
    );
  }

  /** @param {Object} summary @param {?number} engine null: all. */
  update(summary, engine) {
    const engines = chosen(summary, engine);
    const totals = addTotals(engines);
    this.#totals.update([
      ["Requests", byMethod(totals.requests)],
      ["Prompt tokens", count(totals.prompt_tokens)],
      ["Output tokens", count(totals.output_tokens)],
      ["Compactions", byMethod(totals.compactions)],
      ["Time spent compacting", seconds(totals.compaction_seconds)],
      ["Tokens removed", count(totals.tokens_removed)],
      ["Tokens merged", count(totals.tokens_merged)],
      ["Pages freed", count(totals.blocks_freed)],
      ["Preemptions", count(totals.preemptions)],
      ["Pages of the pool", this.#pool(engines)],
    ]);
  }

  #pool(engines) {
    const part = (name) => count(sum(engines.map(({ pool }) => pool?.[name])));
    return `${part("used")} used, ${part("cached")} cached, ${part("free")} free, ${part("blocks")} in all`;
  }
}

/** Layers as ranges: "0–4, 7". */
function layersText(layers) {
  const ranges = [];
  for (const layer of [...layers].sort((a, b) => a - b)) {
    const last = ranges.at(-1);
    if (last && layer === last[1] + 1) last[1] = layer;
    else ranges.push([layer, layer]);
  }
  return ranges.map(([from, to]) => (from === to ? `${from}` : `${from}–${to}`)).join(", ");
}
