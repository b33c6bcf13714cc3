// The states of the page: what is drawn while there is nothing to show, or nothing new.

import { h, setText } from "./dom.js";
import { clock } from "./format.js";

const LABELS = {
  loading: "Connecting",
  live: "Live",
  paused: "Paused",
  gone: "No answer",
  unauthorised: "API key needed",
  missing: "Not available",
};

export class Notices {
  #place = document.getElementById("notice");
  #status = document.getElementById("status");
  #announce = document.getElementById("announce");
  #state = null;
  #retry;
  #enter;
  #detail = h("p");

  /**
   * @param {function(): void} retry ask at once.
   * @param {function(string): void} enter an API key was entered.
   */
  constructor(retry, enter) {
    this.#retry = retry;
    this.#enter = enter;
  }

  /**
   * @param {"loading"|"live"|"paused"|"gone"|"unauthorised"|"missing"} state
   * @param {{time?: ?number, message?: string, wait?: number, refused?: boolean}} about time: of
   *     the last answer; message: why there is none; wait: milliseconds until the next try;
   *     refused: a key was entered and is wrong.
   */
  show(state, { time = null, message = "", wait = Infinity, refused = false } = {}) {
    setText(this.#status, time === null ? LABELS[state] : `${LABELS[state]} · ${clock(time)}`);
    this.#status.dataset.state = state;
    if (state === "gone" || state === "missing") {
      const next = Number.isFinite(wait) ? ` Next try in ${Math.round(wait / 1000)} s.` : "";
      const old = time === null ? "" : ` The numbers below are from ${clock(time)}.`;
      setText(this.#detail, message + old + next);
    }
    const kind = state === "unauthorised" && refused ? "refused" : state;
    if (kind === this.#state) return;
    const before = this.#state;
    this.#state = kind;
    this.#place.replaceChildren(...this.#draw(kind));
    if (state === "unauthorised") this.#place.querySelector("input").focus();
    this.#say(kind, before);
  }

  // For screen readers: changes of the state, once each, not every number.
  #say(kind, before) {
    const texts = {
      live: ["gone", "missing"].includes(before) ? "The server answers again." : "Live.",
      paused: "Paused.",
      gone: "The server does not answer.",
      missing: "The server has no compression endpoints.",
      unauthorised: "The server asks for its API key.",
      refused: "The server refused this API key.",
    };
    setText(this.#announce, texts[kind] ?? "");
  }

  #draw(kind) {
    const box = (className, ...children) => [
      h("section", { class: `notice ${className}` }, ...children),
    ];
    const again = () =>
      h("button", { type: "button", text: "Try now", onclick: () => this.#retry() });
    switch (kind) {
      case "loading":
        return box(
          "quiet",
          h("h2", { text: "Waiting for the first answer" }),
          h("p", { text: "Asking the server for its numbers…" }),
        );
      case "gone":
        return box("warn", h("h2", { text: "The server does not answer" }), this.#detail, again());
      case "missing":
        return box(
          "warn",
          h("h2", { text: "This server has no compression endpoints" }),
          h("p", {
            text: "It answers, but does not know /v1/kvcompress/summary. Most likely the plugin is not loaded there: start the server with serve.py or vllm-kvcompress serve, and if VLLM_PLUGINS is set, name kvcompress in it.",
          }),
          this.#detail,
          again(),
        );
      case "unauthorised":
      case "refused":
        return box("quiet", ...this.#keyForm(kind === "refused"));
      default:
        return [];
    }
  }

  #keyForm(refused) {
    // No name and no autocompletion: the key is to stay in this page's memory.
    const input = h("input", {
      type: "password",
      id: "key",
      autocomplete: "off",
      required: true,
      "aria-describedby": "key-note",
      "aria-invalid": refused ? "true" : null,
    });
    const submit = (event) => {
      event.preventDefault();
      const key = input.value.trim();
      input.value = "";
      if (key) this.#enter(key);
    };
    return [
      h("h2", { text: "API key needed" }),
      ...(refused ? [h("p", { class: "error", text: "The server refused this key." })] : []),
      h(
        "form",
        { id: "key-form", onsubmit: submit },
        h("label", { for: "key", text: "API key of this server" }),
        input,
        h("button", { type: "submit", text: "Connect" }),
      ),
      h("p", {
        id: "key-note",
        class: "muted",
        text: "Kept in this page's memory only, and sent to this server only; a reload forgets it.",
      }),
    ];
  }
}
