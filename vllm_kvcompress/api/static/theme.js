// Light, dark or as the system has it. Only this choice is remembered.

import { redrawCharts } from "./chart.js";

const STORED = "kvcompress-theme";

function apply(theme) {
  if (theme === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  redrawCharts();
}

/** Connect the choice in the header. */
export function connectTheme() {
  const select = document.getElementById("theme");
  let stored = null;
  try {
    stored = localStorage.getItem(STORED);
  } catch {
    // Storage may be forbidden; then the choice lasts until the page is left.
  }
  if (["light", "dark"].includes(stored)) select.value = stored;
  apply(select.value);
  select.addEventListener("change", () => {
    apply(select.value);
    try {
      localStorage.setItem(STORED, select.value);
    } catch {
      // As above.
    }
  });
}
