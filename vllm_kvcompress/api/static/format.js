// Numbers as text, with units. What is not known (null) is a dash, never a zero.

export const UNKNOWN = "–";
const NBSP = "\u00a0";
const BYTES = ["B", "KiB", "MiB", "GiB", "TiB"];

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const three = new Intl.NumberFormat("en", { maximumSignificantDigits: 3 });
const time = new Intl.DateTimeFormat("en-GB", { timeStyle: "medium" });
const minute = new Intl.DateTimeFormat("en-GB", { timeStyle: "short" });
const date = new Intl.DateTimeFormat("en-GB", { dateStyle: "medium", timeStyle: "medium" });

const known = (format) => (value) =>
  value == null || !Number.isFinite(value) ? UNKNOWN : format(value);

/** At most three significant digits below 1,000, whole numbers above. */
const short = (value) => (Math.abs(value) < 999.5 ? three : whole).format(value);

/** Three significant digits below 1,000, whole numbers above. */
const exact = (value) => (Math.abs(value) < 999.5 ? value.toPrecision(3) : whole.format(value));

function inUnit(value, format) {
  let unit = 0;
  // Not 1,024: 1,023.7 would be rounded to "1,024 KiB".
  while (Math.abs(value) >= 1023.5 && unit < BYTES.length - 1) {
    value /= 1024;
    unit += 1;
  }
  return (unit ? format : whole.format)(value) + NBSP + BYTES[unit];
}

/** Bytes in the largest unit that leaves at least 1, with three digits: "1.50 GiB". */
export const bytes = known((value) => inUnit(value, exact));

/** The same for an axis: "1.5 GiB". */
export const axisBytes = known((value) => inUnit(value, short));

/** A count: "12,345". */
export const count = known((value) => whole.format(value));

/** A rate or other number: "12.3". */
export const number = known(short);

/** A share of 1: "63 %". */
export const percent = known((value) => {
  const hundred = 100 * value;
  return (
    (Math.abs(hundred) < 9.95 ? Math.round(hundred * 10) / 10 : Math.round(hundred)) + NBSP + "%"
  );
});

/** A ratio: "2.40 ×". */
export const times = known((value) => value.toFixed(value < 99.995 ? 2 : 0) + NBSP + "×");

/** A duration in seconds: "340 ms", "3.2 s", "2 min 5 s". */
export const seconds = known((value) => {
  if (value === 0) return "0" + NBSP + "s";
  if (value < 0.9995) return three.format(value * 1000) + NBSP + "ms";
  if (value < 59.95) return value.toFixed(1) + NBSP + "s";
  const total = Math.round(value);
  const [hours, minutes, rest] = [
    Math.floor(total / 3600),
    Math.floor(total / 60) % 60,
    total % 60,
  ];
  return hours ? `${hours}${NBSP}h ${minutes}${NBSP}min` : `${minutes}${NBSP}min ${rest}${NBSP}s`;
});

/** Time of day of Unix seconds: "14:03:20". */
export const clock = known((value) => time.format(value * 1000));

/** Time of day without seconds: "14:03". */
export const hourMinute = known((value) => minute.format(value * 1000));

/** Date and time of Unix seconds. */
export const dateTime = known((value) => date.format(value * 1000));

/** "1 page", "2 pages". */
export const plural = (value, one, many) =>
  `${count(value)} ${value === 1 ? one : (many ?? `${one}s`)}`;

/** Number of a band; layers that keep every token have -1 or none. */
export const band = known((value) => (value < 0 ? UNKNOWN : whole.format(value)));

/** A setting as JSON has it; null: "not set". */
export const setting = (value) =>
  value == null ? "not set" : typeof value === "object" ? JSON.stringify(value) : String(value);
