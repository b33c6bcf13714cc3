// What was seen: the summaries of the last minutes, totals over engines, rates from counters.

const KEEP_SECONDS = 600;
const RATE_SECONDS = 5;
const GAP_SECONDS = 5;

const GAUGES = {
  held: (engine) => engine.bytes_held,
  uncompressed: (engine) => engine.bytes_uncompressed,
  cached: (engine) => engine.pool?.cached_bytes,
  pool: (engine) => engine.pool?.bytes,
  running: (engine) => engine.requests?.running,
  waiting: (engine) => engine.requests?.waiting,
  preempted: (engine) => engine.requests?.preempted,
};

const COUNTERS = {
  promptTokens: (totals) => totals.prompt_tokens,
  outputTokens: (totals) => totals.output_tokens,
  // By method; before the first one there is none, which is known.
  compactions: (totals) => totals.compactions && sum([0, ...Object.values(totals.compactions)]),
  compactionSeconds: (totals) => totals.compaction_seconds,
};

/** Sum of what is known; null if nothing is. */
export function sum(values) {
  const known = values.filter((value) => value != null);
  return known.length ? known.reduce((a, b) => a + b, 0) : null;
}

const mapped = (readers, source) =>
  Object.fromEntries(Object.entries(readers).map(([name, read]) => [name, read(source) ?? null]));

/** What stock vLLM would hold, as a share: how much of it is saved. Null if nothing is held. */
export function savedShare(held, uncompressed) {
  return uncompressed > 0 && held != null ? 1 - held / uncompressed : null;
}

/**
 * The counters of the chosen engines added up, maps by method included.
 *
 * @param {Array} engines of a summary.
 * @returns {Object} shaped like one engine's `totals`.
 */
export function addTotals(engines) {
  const added = {};
  for (const { totals } of engines) {
    for (const [name, value] of Object.entries(totals ?? {})) {
      if (value === null || typeof value !== "object") {
        if (value != null) added[name] = (added[name] ?? 0) + value;
        continue;
      }
      added[name] ??= {};
      for (const [method, number] of Object.entries(value)) {
        added[name][method] = (added[name][method] ?? 0) + number;
      }
    }
  }
  return added;
}

/** The engines of a summary that the choice means; null: all of them. */
export const chosen = (summary, engine) =>
  summary.engines.filter((each) => engine === null || each.engine === engine);

export class Samples {
  // Each: {time, engines: Map(engine -> {time, gauges, counters, rates})}, oldest first.
  #ring = [];

  /** Add a summary, unless its engines say nothing new. */
  add(summary) {
    const last = this.#ring.at(-1);
    const fresh = summary.engines.some(
      (engine) => engine.time !== last?.engines.get(engine.engine)?.time,
    );
    if (last && (!fresh || summary.time <= last.time)) {
      // A restarted server may have an older clock; its past is not this one's.
      if (summary.time < last.time - GAP_SECONDS) this.#ring = [];
      else return;
    }
    const engines = new Map();
    for (const engine of summary.engines) {
      const counters = mapped(COUNTERS, engine.totals ?? {});
      engines.set(engine.engine, {
        time: engine.time,
        gauges: mapped(GAUGES, engine),
        counters,
        rates: this.#rates(engine, counters),
      });
    }
    this.#ring.push({ time: summary.time, engines });
    while (this.#ring[0].time < summary.time - KEEP_SECONDS) this.#ring.shift();
  }

  // Means of the last RATE_SECONDS: compactions are too rare to be counted by the second.
  #rates(engine, counters) {
    const rates = {};
    for (const [name, value] of Object.entries(counters)) {
      rates[name] = null;
      let reference = null;
      for (let i = this.#ring.length - 1; i >= 0; i--) {
        const before = this.#ring[i].engines.get(engine.engine);
        // Counters never fall, except when the server starts anew.
        if (!before || before.counters[name] === null || before.counters[name] > value) break;
        if (engine.time - before.time > RATE_SECONDS + 0.5 && reference) break;
        reference = before;
      }
      if (value !== null && reference && engine.time > reference.time) {
        rates[name] = (value - reference.counters[name]) / (engine.time - reference.time);
      }
    }
    return rates;
  }

  /**
   * Series of the chosen engine, or of all of them added up.
   *
   * @param {?number} engine null: all.
   * @returns {{time: number[], held: Array, ...}} one array per gauge and rate, with nulls for
   *     what is not known, and a row of nulls where nothing was asked for a while.
   */
  series(engine) {
    const names = [...Object.keys(GAUGES), ...Object.keys(COUNTERS)];
    const series = { time: [], saved: [] };
    for (const name of names) series[name] = [];
    let before = null;
    for (const sample of this.#ring) {
      if (before !== null && sample.time - before > GAP_SECONDS) {
        series.time.push((before + sample.time) / 2);
        series.saved.push(null);
        for (const name of names) series[name].push(null);
      }
      before = sample.time;
      const engines = [...sample.engines]
        .filter(([index]) => engine === null || index === engine)
        .map(([, each]) => each);
      series.time.push(sample.time);
      for (const name of Object.keys(GAUGES)) {
        series[name].push(sum(engines.map((each) => each.gauges[name])));
      }
      for (const name of Object.keys(COUNTERS)) {
        series[name].push(sum(engines.map((each) => each.rates[name])));
      }
      series.saved.push(savedShare(series.held.at(-1), series.uncompressed.at(-1)));
    }
    return series;
  }
}
