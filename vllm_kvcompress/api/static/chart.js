// A chart with its title, headline and legend. The legend holds the current values as text: it is
// the chart's alternative for who cannot see it. Under the pointer it shows the values there.

import { clock, hourMinute } from "./format.js";
import { h, setText } from "./dom.js";

const DEFAULT_HEIGHT = 124;
const FONT = "12px system-ui, sans-serif";

const probe = h("span", { hidden: true });

/** The colour that a CSS expression like `var(--held)` means in the current theme. */
function colour(expression) {
  if (!probe.isConnected) document.body.append(probe);
  probe.style.color = expression;
  return getComputedStyle(probe).color;
}

const charts = new Set();

/** Draw all charts again, in the colours of the theme in force. */
export function redrawCharts() {
  for (const chart of charts) chart.redraw();
}
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redrawCharts);

export class Chart {
  #plot = null;
  #series;
  #options;
  #rows = null;
  #values = [];
  #shown;
  #headline = h("p", { class: "headline" });
  #sub = h("p", { class: "sub" });
  #when = h("span", { class: "when muted" });
  #box = h("div", { class: "plot" });

  /**
   * @param {string} title
   * @param {Array<{label: string, colour: string, format: function, fill?: string, dash?: number[],
   *     over?: number, axis?: string}>} series over: stacked on top of that series.
   * @param {{format: function, right?: function, binary?: boolean, max?: number,
   *     sync?: string, height?: number, shortest?: number}} options format, right: of the axes; binary:
   *     axis in powers of two; max: smallest upper end of the left axis; shortest: least
   *     seconds that the time axis shows; sync: charts that share
   *     their pointer.
   */
  constructor(title, series, options) {
    this.#series = series;
    this.#options = options;
    const legend = h("ul", { class: "legend" });
    this.#values = series.map((each) => {
      const value = h("b");
      const swatch = h("i", {
        class: each.dash ? "dashed" : each.fill === each.colour ? "filled" : "",
      });
      swatch.style.setProperty("--c", each.colour);
      legend.append(h("li", {}, swatch, `${each.label} `, value));
      return value;
    });
    this.#box.setAttribute("aria-hidden", "true");
    this.#box.style.minHeight = `${options.height ?? DEFAULT_HEIGHT}px`;
    this.element = h(
      "figure",
      { class: "card chart", "aria-label": title },
      h("div", { class: "head" }, h("h3", { text: title }), this.#when),
      this.#headline,
      this.#sub,
      this.#box,
      legend,
    );
    new ResizeObserver(() => this.#fit()).observe(this.#box);
    charts.add(this);
  }

  /** The chart is not needed any more. */
  discard() {
    charts.delete(this);
    this.#plot?.destroy();
  }

  /**
   * @param {number[]} time Unix seconds.
   * @param {Array<Array<?number>>} rows values of each series.
   * @param {string} headline
   * @param {string} sub one line under it.
   */
  update(time, rows, headline, sub) {
    setText(this.#headline, headline);
    setText(this.#sub, sub);
    this.#rows = [time, ...rows];
    const data = [time, ...rows];
    this.#series.forEach(({ over }, i) => {
      if (over === undefined) return;
      const below = rows[over];
      data[i + 1] = rows[i].map((value, j) => (value == null ? null : value + (below[j] ?? 0)));
    });
    if (this.#plot) this.#plot.setData(data);
    else if (globalThis.uPlot) {
      this.#plot = new globalThis.uPlot(this.#plotOptions(), data, this.#box);
      this.#fit();
    }
    this.#legend();
  }

  redraw() {
    this.#plot?.redraw();
  }

  #fit() {
    const width = Math.floor(this.#box.clientWidth);
    if (width > 0 && this.#plot && this.#plot.width !== width) {
      this.#plot.setSize({ width, height: this.#options.height ?? DEFAULT_HEIGHT });
    }
  }

  // Values under the pointer, else the last ones.
  #legend() {
    const time = this.#rows[0];
    const index = this.#shown ?? time.length - 1;
    setText(this.#when, this.#shown == null ? "" : clock(time[index]));
    this.#series.forEach(({ format }, i) => {
      setText(this.#values[i], format(this.#rows[i + 1][index] ?? null));
    });
  }

  #plotOptions() {
    const { format, right, binary, max = 0, shortest = 60, sync } = this.#options;
    const line = (u) => colour("var(--grid)");
    const axis = (more) => ({
      stroke: () => colour("var(--muted)"),
      grid: { stroke: line, width: 1 },
      ticks: { show: false },
      font: FONT,
      gap: 6,
      ...more,
    });
    const range = (least) => (u, low, high) => [
      Math.min(0, low ?? 0),
      Math.max(least, (high ?? 0) * 1.08) || 1,
    ];
    const axes = [
      axis({
        space: 76,
        size: 24,
        values: (u, splits, i, space, step) =>
          splits.map((split) => (step < 60 ? clock(split) : hourMinute(split))),
      }),
      axis({
        size: 66,
        space: 34,
        values: (u, splits) => splits.map(format),
        ...(binary && { incrs: Array.from({ length: 50 }, (_, power) => 2 ** power) }),
      }),
    ];
    const scales = {
      x: { range: (u, low, high) => [Math.min(low, high - shortest), high] },
      y: { range: range(max) },
    };
    if (right) {
      scales.right = { range: range(0) };
      axes.push(
        axis({
          scale: "right",
          side: 1,
          size: 58,
          space: 34,
          grid: { show: false },
          values: (u, splits) => splits.map(right),
        }),
      );
    }
    return {
      width: Math.max(200, Math.floor(this.#box.clientWidth)),
      height: this.#options.height ?? DEFAULT_HEIGHT,
      padding: [8, right ? 0 : 24, 0, 0],
      legend: { show: false },
      cursor: {
        y: false,
        drag: { x: false, y: false },
        points: { size: 6 },
        ...(sync && { sync: { key: sync } }),
      },
      scales,
      axes,
      series: [
        {},
        ...this.#series.map((each) => ({
          scale: each.axis ?? "y",
          stroke: () => colour(each.colour),
          fill: each.fill && (() => colour(each.fill)),
          dash: each.dash,
          width: 1.5,
          points: { show: false },
        })),
      ],
      // A stacked series fills only down to the one that it stands on.
      bands: this.#series.flatMap(({ over }, i) =>
        over === undefined ? [] : [{ series: [i + 1, over + 1] }],
      ),
      hooks: {
        setCursor: [
          (u) => {
            this.#shown = u.cursor.left >= 0 ? u.cursor.idx : null;
            this.#legend();
          },
        ],
      },
    };
  }
}
