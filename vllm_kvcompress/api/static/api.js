// The JSON endpoints. See docs/dashboard.md for the errors that the page tells apart.

const BASE = new URL("../v1/kvcompress/", import.meta.url);
const TIMEOUT_MS = 5000;

// In memory only: not in storage, not in the address. A reload forgets it.
let key = null;

/** Use this API key from now on. */
export function useKey(value) {
  key = value;
}

/** Whether an API key was entered. */
export const hasKey = () => key !== null;

/** Why there is no answer. */
export class ApiError extends Error {
  /**
   * @param {"gone"|"unauthorised"|"missing"} kind gone: no usable answer; missing: HTTP 404.
   * @param {string} message one sentence for the user.
   */
  constructor(kind, message) {
    super(message);
    this.kind = kind;
  }
}

/** What the server itself says about an error, as vLLM and FastAPI write it; "" if nothing. */
async function reason(response) {
  try {
    const body = await response.json();
    const said = body.error?.message ?? body.detail;
    return typeof said === "string" ? said.slice(0, 300) : "";
  } catch {
    return "";
  }
}

async function get(path, signal) {
  const limit = AbortSignal.timeout(TIMEOUT_MS);
  let response;
  try {
    response = await fetch(new URL(path, BASE), {
      headers: key === null ? {} : { Authorization: `Bearer ${key}` },
      signal: AbortSignal.any([signal, limit]),
      cache: "no-store",
    });
    if (response.ok) return await response.json();
  } catch (error) {
    if (limit.aborted && !signal.aborted) {
      throw new ApiError("gone", `No answer within ${TIMEOUT_MS / 1000} seconds.`);
    }
    if (response?.ok) throw new ApiError("gone", "The answer was cut off or is not JSON.");
    throw new ApiError("gone", "The connection failed.");
  }
  if (response.status === 401 || response.status === 403) {
    throw new ApiError("unauthorised", "The server asks for its API key.");
  }
  const kind = response.status === 404 ? "missing" : "gone";
  const said = await reason(response);
  throw new ApiError(
    kind,
    `The server answered with HTTP status ${response.status}${said ? `: ${said}` : "."}`,
  );
}

/** Settings, model and pool of the server. */
export const getConfig = (signal) => get("config", signal);

/** Pool, requests and counters of every engine. */
export const getSummary = (signal) => get("summary", signal);

/**
 * The newest requests.
 *
 * @param {{state: ?string, limit: number}} which no state: all of them.
 */
export function getRequests({ state, limit }, signal) {
  const query = new URLSearchParams({ limit: String(limit) });
  if (state) query.set("state", state);
  return get(`requests?${query}`, signal);
}

/** One request with its history; null if the server does not know it (any more). */
export async function getRequest(id, signal) {
  try {
    return await get(`requests/${encodeURIComponent(id)}`, signal);
  } catch (error) {
    if (error.kind === "missing") return null;
    throw error;
  }
}
