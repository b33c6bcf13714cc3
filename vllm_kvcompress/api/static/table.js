// The table of requests.

import { COLUMNS, compare, requestHash, uncompressedPeak } from "./columns.js";
import { h, setAttribute, setChildren } from "./dom.js";
import { Filters } from "./filters.js";

/** Most requests that are asked for and shown. */
export const LIMIT = 200;

/** Clients may use an id again, also on another engine. */
const rowKey = ({ id, engine, arrival }) => `${id} ${engine} ${arrival}`;

export class RequestTable {
  #sort = { column: COLUMNS.find(({ key }) => key === "arrival"), descending: true };
  #rows = new Map();
  #heads = new Map();
  #body = h("tbody");
  #answer = null;
  #engine = null;
  #engines = 1;
  #empty = h("div", { class: "empty", hidden: true });
  #scroller;
  #heading = h("h2", { id: "requests", text: "Requests", tabindex: "-1" });

  /** @param {function(): void} askAgain the state filter was changed. */
  constructor(askAgain) {
    this.filters = new Filters(() => this.#draw(), askAgain);
    const heads = COLUMNS.map((column) => {
      const button = h("button", {
        type: "button",
        text: column.label,
        onclick: () => this.sortBy(column),
      });
      const cell = h("th", { scope: "col", class: column.numeric ? "numeric" : "" }, button);
      this.#heads.set(column, cell);
      return cell;
    });
    this.#scroller = h(
      "div",
      { class: "scroller", role: "region", "aria-label": "Table of requests", tabindex: "0" },
      h("table", { id: "table" }, h("thead", {}, h("tr", {}, ...heads)), this.#body),
    );
    this.element = h(
      "section",
      { "aria-labelledby": "requests" },
      h(
        "div",
        { class: "head" },
        this.#heading,
        h(
          "p",
          { class: "key muted" },
          ...["now", "peak", "uncompressed"].flatMap((name) => [
            h("i", { class: name }),
            ` ${name} `,
          ]),
        ),
      ),
      this.filters.element,
      this.#scroller,
      this.#empty,
    );
    // Convenience for the pointer; the keyboard has the link.
    this.#body.addEventListener("click", (event) => {
      if (event.target.closest("a") || String(getSelection())) return;
      const id = event.target.closest("tr")?.dataset.id;
      if (id !== undefined) location.hash = requestHash(id);
    });
    this.#markSort();
  }

  /** Sort by a column; again: the other way round. Numbers begin with the largest. */
  sortBy(column) {
    const same = this.#sort.column === column;
    this.#sort = { column, descending: same ? !this.#sort.descending : column.numeric };
    this.#markSort();
    this.#draw();
  }

  #markSort() {
    for (const [column, cell] of this.#heads) {
      const direction = this.#sort.descending ? "descending" : "ascending";
      setAttribute(cell, "aria-sort", column === this.#sort.column ? direction : null);
    }
  }

  /** @param {{requests: Array, total: number}} answer @param {?number} engine null: all. */
  update(answer, engine, engines) {
    this.#answer = answer;
    this.#engine = engine;
    this.#engines = engines;
    this.filters.offer(answer.requests.map(({ method }) => method));
    this.#draw();
  }

  /** Put the focus on a request's link, or on the heading if it is not shown any more. */
  focus(id) {
    const row = [...this.#body.rows].find(({ dataset }) => dataset.id === id);
    (row?.querySelector("a") ?? this.#heading).focus();
  }

  #draw() {
    if (!this.#answer) return;
    const { requests, total } = this.#answer;
    const shown = this.filters.apply(requests, this.#engine);
    shown.sort(compare(this.#sort.column, this.#sort.descending));
    const scale = Math.max(
      0,
      ...shown.map((request) => uncompressedPeak(request) ?? 0),
      ...shown.map((request) => request.bytes_peak ?? 0),
    );
    for (const [column, cell] of this.#heads) cell.hidden = this.#hides(column);
    const rows = shown.map((request) => this.#row(request, scale));
    const keys = new Set(requests.map(rowKey));
    for (const key of this.#rows.keys()) if (!keys.has(key)) this.#rows.delete(key);
    setChildren(this.#body, rows);
    this.filters.say(shown.length, requests.length, total ?? requests.length);
    this.#scroller.hidden = shown.length === 0;
    this.#drawEmpty(shown.length === 0);
  }

  #hides = (column) => Boolean(column.onlyWithEngines && this.#engines < 2);

  #row(request, scale) {
    let known = this.#rows.get(rowKey(request));
    if (!known) {
      const row = h("tr");
      row.dataset.id = request.id;
      const updates = COLUMNS.map((column) => {
        const cell = h(column.key === "id" ? "th" : "td", {
          class: `${column.key}${column.numeric ? " numeric" : ""}`,
          scope: column.key === "id" ? "row" : null,
        });
        row.append(cell);
        const update = column.make(cell);
        return (...args) => {
          cell.hidden = this.#hides(column);
          update(...args);
        };
      });
      known = { row, updates };
      this.#rows.set(rowKey(request), known);
    }
    for (const update of known.updates) update(request, scale);
    return known.row;
  }

  #drawEmpty(empty) {
    this.#empty.hidden = !empty;
    let kind = "";
    if (empty) kind = this.filters.active ? "filtered" : this.#engine === null ? "none" : "engine";
    if (this.#empty.dataset.kind === kind) return;
    this.#empty.dataset.kind = kind;
    const clear = () => {
      this.filters.clear();
      this.filters.element.querySelector("select").dispatchEvent(new Event("change"));
      this.#heading.focus();
    };
    const contents = {
      "": [],
      none: [
        h("p", {}, h("b", { text: "No requests yet." })),
        h("p", {
          text:
            "Send one to this server's OpenAI API, for example POST /v1/chat/completions; " +
            "it appears here within a second or two.",
        }),
      ],
      engine: [h("p", { text: "None of the newest requests ran on this engine." })],
      filtered: [
        h("p", { text: "No request matches the filter." }),
        h("button", { type: "button", text: "Clear the filter", onclick: clear }),
      ],
    };
    this.#empty.replaceChildren(...contents[kind]);
  }
}
