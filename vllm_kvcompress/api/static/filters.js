// What the table shows of the requests: state (asked of the server), method and text of the id.

import { h, setText } from "./dom.js";
import { count } from "./format.js";

const STATES = ["running", "waiting", "finished"];

const option = (value, text) => h("option", { value, text });

export class Filters {
  #id = h("input", {
    type: "search",
    id: "filter-id",
    placeholder: "part of the id",
    spellcheck: "false",
    autocomplete: "off",
  });
  #state = h(
    "select",
    { id: "filter-state" },
    option("", "all"),
    ...STATES.map((state) => option(state, state)),
  );
  #method = h("select", { id: "filter-method" }, option("", "all"));
  #said = h("p", { class: "muted", id: "shown" });

  /**
   * @param {function(): void} changed some filter was changed.
   * @param {function(): void} stateChanged the server has to be asked anew.
   */
  constructor(changed, stateChanged) {
    this.element = h(
      "form",
      { class: "filters", role: "search", "aria-label": "Filter requests" },
      h("label", {}, "Id ", this.#id),
      h("label", {}, "State ", this.#state),
      h("label", {}, "Method ", this.#method),
      this.#said,
    );
    this.element.addEventListener("submit", (event) => event.preventDefault());
    this.#id.addEventListener("input", changed);
    this.#method.addEventListener("change", changed);
    this.#state.addEventListener("change", () => {
      changed();
      stateChanged();
    });
  }

  /** State to ask the server for; null: all. */
  get state() {
    return this.#state.value || null;
  }

  get active() {
    return Boolean(this.#id.value || this.#state.value || this.#method.value);
  }

  clear() {
    this.#id.value = this.#state.value = this.#method.value = "";
  }

  /** Add methods to choose from. */
  offer(methods) {
    const known = new Set([...this.#method.options].map((each) => each.value));
    for (const method of methods) {
      if (method && !known.has(method)) {
        known.add(method);
        this.#method.append(option(method, method));
      }
    }
  }

  /** The requests that pass. */
  apply(requests, engine) {
    const text = this.#id.value.trim().toLowerCase();
    return requests.filter(
      (request) =>
        (engine === null || request.engine === engine) &&
        (!this.#state.value || request.state === this.#state.value) &&
        (!this.#method.value || request.method === this.#method.value) &&
        (!text || request.id.toLowerCase().includes(text)),
    );
  }

  /** Say how much is shown of how much. */
  say(shown, fetched, total) {
    const newest = total > fetched ? `newest ${count(fetched)} of ${count(total)}` : "";
    if (shown === fetched) setText(this.#said, `${newest || count(shown)} shown`);
    else
      setText(this.#said, `${count(shown)} of ${newest ? `the ${newest}` : count(fetched)} shown`);
  }
}
