/* What every page does: theme, sortable tables, copy buttons. Runs from the head; nothing here is needed to read. */
(() => {
  "use strict";
  const root = document.documentElement;
  root.dataset.script = "true";
  const stored = () => {
    try { return localStorage.getItem("trimtab-theme"); } catch { return null; }
  };
  const remember = (theme) => {
    try { localStorage.setItem("trimtab-theme", theme); } catch { /* storage may be off; the choice then lasts for this visit */ }
  };
  const system = matchMedia("(prefers-color-scheme: dark)");
  const current = () => root.dataset.theme || (system.matches ? "dark" : "light");
  const saved = stored();
  if (saved === "light" || saved === "dark") root.dataset.theme = saved;

  const announce = () => {
    const button = document.getElementById("theme");
    const next = current() === "dark" ? "light" : "dark";
    button.textContent = next === "dark" ? "Dark" : "Light";
    button.setAttribute("aria-label", `Use the ${next} theme`);
    document.dispatchEvent(new Event("themechange"));
  };

  const themeButton = () => {
    const button = document.getElementById("theme");
    button.hidden = false;
    button.addEventListener("click", () => {
      root.dataset.theme = current() === "dark" ? "light" : "dark";
      remember(root.dataset.theme);
      announce();
    });
    system.addEventListener("change", announce);
    announce();
  };

  /* Printing uses the light colours; figures redraw on `themechange`. */
  const printing = () => {
    let before;
    addEventListener("beforeprint", () => {
      before = root.dataset.theme;
      root.dataset.theme = "light";
      announce();
    });
    addEventListener("afterprint", () => {
      if (before) root.dataset.theme = before; else delete root.dataset.theme;
      announce();
    });
  };

  const key = (row, column, kind) => {
    const cell = row.cells[column];
    const text = (cell.dataset.value ?? cell.firstChild?.textContent ?? "").trim();
    if (kind !== "number") return text.toLowerCase();
    const value = { inf: Infinity, "-inf": -Infinity }[text] ?? parseFloat(text.replace(/[,<]/g, ""));
    return Number.isNaN(value) ? null : value;
  };

  const sortBy = (table, head, column) => {
    const descending = head.getAttribute("aria-sort") === "ascending";
    for (const other of table.querySelectorAll("th[aria-sort]")) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", descending ? "descending" : "ascending");
    const body = table.tBodies[0];
    const keyed = [...body.rows].map((row) => [key(row, column, head.dataset.sort), row]);
    keyed.sort(([a], [b]) => {
      if (a === null || b === null) return (a === null) - (b === null);
      return (a < b ? -1 : a > b ? 1 : 0) * (descending ? -1 : 1);
    });
    body.append(...keyed.map(([, row]) => row));
  };

  const sortable = () => {
    for (const table of document.querySelectorAll("table.sortable")) {
      for (const head of table.querySelectorAll("th[data-sort]")) {
        const button = document.createElement("button");
        button.type = "button";
        button.className = "sort";
        button.textContent = head.textContent;
        button.addEventListener("click", () => sortBy(table, head, head.cellIndex));
        head.replaceChildren(button);
      }
    }
  };

  const select = (element) => {
    const range = document.createRange();
    range.selectNodeContents(element);
    getSelection().removeAllRanges();
    getSelection().addRange(range);
  };

  const copying = () => {
    for (const button of document.querySelectorAll("button.copy")) {
      button.hidden = false;
      button.addEventListener("click", async () => {
        const code = button.parentElement.querySelector("code");
        try {
          await navigator.clipboard.writeText(code.textContent);
          button.textContent = "Copied";
        } catch {
          select(code); /* no clipboard from a file: the text is selected for the reader's own copy */
          button.textContent = "Selected";
        }
        setTimeout(() => { button.textContent = "Copy"; }, 2000);
      });
    }
  };

  addEventListener("DOMContentLoaded", () => { themeButton(); printing(); sortable(); copying(); });
})();
