// What is known of one request over time: the server's bounded history and what was seen since.

const MOST_POINTS = 2000;

export class History {
  #points = new Map();
  #groups = new Map();

  /**
   * @param {Object} request with `history`.
   * @param {number} now the server's time, for the state the request itself tells.
   */
  add(request, now) {
    for (const { band, group } of request.bands ?? []) this.#groups.set(group, band);
    // The server thins its history out: points it has dropped since are kept here.
    for (const point of request.history ?? []) this.#set(point);
    const latest = Math.max(0, ...[...this.#points.values()].map(({ time }) => time));
    if (request.state === "running" && now > latest) {
      const blocks = [];
      for (const each of request.bands ?? []) blocks[each.group] = each.blocks;
      this.#set({
        time: now,
        // While the prompt is computed, only the server's history knows how far it is.
        tokens: request.output_tokens > 0 ? request.prompt_tokens + request.output_tokens : null,
        bytes_held: request.bytes_held,
        bytes_uncompressed: request.bytes_uncompressed,
        blocks,
      });
    }
    if (this.#points.size > MOST_POINTS) this.#thin();
  }

  // By time and pages: a compaction is two points of one time, before it and after.
  #set(point) {
    this.#points.set(`${point.time} ${point.blocks}`, point);
  }

  #sorted() {
    return [...this.#points].sort(([, a], [, b]) => a.time - b.time);
  }

  // Every other point of the older half.
  #thin() {
    const sorted = this.#sorted();
    for (let i = 1; i < sorted.length / 2; i += 2) this.#points.delete(sorted[i][0]);
  }

  /**
   * @param {number[]} bands in the order wanted.
   * @param {?number} blockSize tokens per page.
   * @returns {{time: number[], held: Array, uncompressed: Array, pages: Array<Array>, stock: Array}}
   *     pages: per band; stock: pages that each KV group would have uncompressed.
   */
  series(bands, blockSize) {
    const points = this.#sorted().map(([, point]) => point);
    const groups = bands.map((wanted) =>
      [...this.#groups].filter(([, band]) => band === wanted).map(([group]) => group),
    );
    return {
      time: points.map(({ time }) => time),
      held: points.map((point) => point.bytes_held ?? null),
      uncompressed: points.map((point) => point.bytes_uncompressed ?? null),
      pages: groups.map((members) =>
        points.map(({ blocks }) => {
          const known = members.map((group) => blocks?.[group]).filter((value) => value != null);
          return known.length ? known.reduce((a, b) => a + b, 0) : null;
        }),
      ),
      stock: points.map(({ tokens }, i) =>
        blockSize && tokens != null && points[i].bytes_uncompressed
          ? Math.ceil(tokens / blockSize) * (groups[0]?.length || 1)
          : null,
      ),
    };
  }
}
