// Asks once a second, never twice at a time; not while the tab is hidden or the user has paused;
// ever more rarely while there is no answer.

const PERIOD_MS = 1000;
const LONGEST_WAIT_MS = 16000;

export class Poller {
  #ask;
  #onAnswer;
  #onError;
  #timer = null;
  #controller = null;
  #failures = 0;
  #paused = false;
  #stopped = false;

  /**
   * @param {function(AbortSignal): Promise} ask one round of requests.
   * @param {function(*): void} onAnswer gets what `ask` returned.
   * @param {function(Error, number): void} onError gets the error and the milliseconds until the
   *     next try; infinite if the error says that only the user can help.
   */
  constructor(ask, onAnswer, onError) {
    this.#ask = ask;
    this.#onAnswer = onAnswer;
    this.#onError = onError;
    document.addEventListener("visibilitychange", () => {
      if (document.hidden) this.#halt();
      else if (!this.#paused && !this.#stopped) this.now();
    });
  }

  get paused() {
    return this.#paused;
  }

  set paused(value) {
    this.#paused = value;
    if (value) this.#halt();
    else this.now();
  }

  /** Ask now, in place of a round that is under way. Does one round also while paused. */
  now() {
    this.#halt();
    this.#stopped = false;
    if (!document.hidden) this.#round();
  }

  #halt() {
    clearTimeout(this.#timer);
    this.#controller?.abort();
    this.#controller = null;
  }

  async #round() {
    const controller = (this.#controller = new AbortController());
    const started = performance.now();
    let answer;
    let error = null;
    try {
      answer = await this.#ask(controller.signal);
    } catch (caught) {
      error = caught;
    }
    // Whoever aborted has begun the next round, or does not want one.
    if (controller.signal.aborted) return;
    this.#failures = error ? this.#failures + 1 : 0;
    let wait = PERIOD_MS;
    if (error) {
      this.#stopped = error.kind === "unauthorised";
      wait = Math.min(PERIOD_MS * 2 ** (this.#failures - 1), LONGEST_WAIT_MS);
    }
    if (!this.#paused && !this.#stopped) {
      const spent = error ? 0 : performance.now() - started;
      this.#timer = setTimeout(() => this.#round(), Math.max(0, wait - spent));
    }
    if (error) this.#onError(error, this.#paused || this.#stopped ? Infinity : wait);
    else this.#onAnswer(answer);
  }
}
