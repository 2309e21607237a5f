/* The figures of an analysis of weights. One state (view, quantity, layer, direction) drives all of them. */
(() => {
  "use strict";
  const data = JSON.parse(document.getElementById("payload").textContent);
  const $ = (id) => document.getElementById(id);
  const NARROW = matchMedia("(max-width: 44rem)");
  const KINDS = ["pc", "role", "trait", "latent", "vector"];
  const SYMBOLS = ["star", "circle", "diamond", "square", "triangle-up"];
  const QUANTITIES = { z: "z", delta: "Change", base: "Base", tuned: "Tuned" };
  const TOP = 12;
  const ROWS = 40;
  const state = { view: 0, quantity: "z", layer: 0, direction: 0 };

  /* ---- small tools ---- */
  const element = (tag, props = {}, ...children) => {
    const node = Object.assign(document.createElement(tag), props);
    node.append(...children);
    return node;
  };
  const unpack = (text) => {
    const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    const view = new DataView(bytes.buffer);
    return Float32Array.from({ length: bytes.length / 4 }, (_, i) => view.getFloat32(4 * i, true));
  };
  const real = (value) => (typeof value === "string" ? { inf: Infinity, "-inf": -Infinity }[value] ?? NaN : value);
  const show = (raw) => {
    const value = real(raw);
    if (value === null || value === undefined) return "-";
    if (!Number.isFinite(value)) return Number.isNaN(value) ? "nan" : value > 0 ? "inf" : "-inf";
    if (value === 0) return "0";
    const size = Math.abs(value);
    return size >= 1e-3 && size < 1e5 ? String(Number(value.toPrecision(3))) : value.toExponential(2);
  };
  const escapeText = (text) => text.replace(/[&<>"]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[c]);
  const short = (text, limit = NARROW.matches ? 14 : 24) => (text.length > limit ? `${text.slice(0, limit - 2)}..` : text);
  const probe = document.body.appendChild(element("span", { hidden: true }));
  const colour = (name) => {
    probe.style.color = `var(--${name})`;
    return getComputedStyle(probe).color;
  };
  const width = data.layers.length;
  const grids = new Map();
  const grid = (view, quantity) => {
    const key = `${view}/${quantity}`;
    const text = data.views[view].grids[quantity];
    if (text === undefined) return null;
    if (!grids.has(key)) grids.set(key, unpack(text));
    return grids.get(key);
  };
  const at = (values, row, place) => values[row * width + place];
  const place = () => data.layers.indexOf(state.layer);
  const view = () => data.views[state.view];
  const current = () => grid(state.view, state.quantity);
  const shared = new Set(data.directions.map((one) => one.name).filter((text, i, all) => all.indexOf(text) !== i));
  const name = (row) => (shared.has(data.directions[row].name) ? `${data.directions[row].name} (${data.directions[row].kind})` : data.directions[row].name);
  const look = (kind) => ({ color: colour(`series-${Math.max(0, KINDS.indexOf(kind))}`), symbol: SYMBOLS[Math.max(0, KINDS.indexOf(kind))] });
  const unit = () => (state.quantity === "z" ? "z" : view().unit || QUANTITIES[state.quantity].toLowerCase());

  /* ---- plotting ---- */
  const axis = (title, more = {}) => ({
    gridcolor: colour("line"), linecolor: colour("strong"), zerolinecolor: colour("strong"), ticks: "outside", ticklen: 4, tickcolor: colour("strong"),
    automargin: true, fixedrange: true, exponentformat: "power", ...more,
    title: title ? { text: title, font: { size: 12, color: colour("soft") }, standoff: 8 } : undefined,
  });
  const layers = (more = {}) => axis("layer", { dtick: Math.max(1, Math.ceil(width / (NARROW.matches ? 8 : 16))), showgrid: false, zeroline: false, ...more });
  const draw = (id, traces, layout, height, click) => {
    const box = $(`${id}-plot`);
    if (!box) return;
    const font = { family: getComputedStyle(document.body).fontFamily, size: 12, color: colour("soft") };
    Plotly.react(box, traces, {
      height, font, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", dragmode: false, hovermode: "closest", showlegend: false,
      margin: { l: 8, r: 12, t: 10, b: 8 }, hoverlabel: { bgcolor: colour("ink"), bordercolor: colour("ink"), font: { ...font, color: colour("page") }, align: "left" },
      ...layout,
    }, { displayModeBar: false, responsive: true, doubleClick: false, showTips: false });
    box.removeAllListeners?.("plotly_click");
    if (click) box.on("plotly_click", (event) => click(event.points[0]));
  };
  const keys = (id, items) => $(`${id}-keys`)?.replaceChildren(...items.map(({ text, color }) => {
    const swatch = element("span");
    swatch.style.background = color;
    return element("span", { className: "key" }, swatch, text);
  }));
  const tables = {};
  const fill = (id, head, rows) => {
    tables[id] = { head, rows };
    if (document.querySelector(`[data-table="${id}"]`)?.open) build(id);
  };
  const build = (id) => {
    const box = document.querySelector(`[data-table="${id}"] .scroll`);
    if (!box || !tables[id]) return;
    const line = (tag, row) => element("tr", {}, ...row.map((text, i) => element(tag === "th" || !i ? "th" : "td", { textContent: text, scope: tag === "th" ? "col" : i ? "" : "row" })));
    box.replaceChildren(element("table", {}, element("thead", {}, line("th", tables[id].head)), element("tbody", {}, ...tables[id].rows().map((row) => line("td", row)))));
  };
  const mark = () => ({ type: "line", x0: state.layer, x1: state.layer, yref: "paper", y0: 0, y1: 1, line: { color: colour("ink"), width: 1, dash: "dot" } });

  /* ---- layer profile: mean of each kind, the controls' band, the chosen direction ---- */
  const profile = () => {
    const shown = state.quantity === "base" || state.quantity === "tuned" ? "delta" : state.quantity;
    const column = shown === "z" ? 4 : 2;
    const traces = [];
    if (shown === "delta") {
      const rows = view().controls;
      const edge = [...rows.map((r) => [r[0], real(r[1]) + real(r[2])]), ...rows.map((r) => [r[0], real(r[1]) - real(r[2])]).reverse()];
      traces.push({ type: "scatter", mode: "lines", x: edge.map((e) => e[0]), y: edge.map((e) => e[1]), fill: "toself", fillcolor: colour("line"), line: { width: 0 }, hoverinfo: "skip" });
    }
    const kinds = [...new Set(view().means.map((row) => row[1]))].filter((kind) => kind !== "all");
    for (const kind of kinds.length ? kinds : ["all"]) {
      const rows = view().means.filter((row) => row[1] === kind);
      traces.push({
        type: "scatter", mode: "lines+markers", x: rows.map((r) => r[0]), y: rows.map((r) => real(r[column])), line: { color: look(kind).color, width: 2 }, marker: { size: 5, symbol: look(kind).symbol },
        hovertemplate: `${kind}, layer %{x}<br>mean %{y:.3g}<extra></extra>`,
      });
    }
    const own = grid(state.view, shown);
    const line = data.layers.map((_, i) => (shown === "z" ? Math.abs(at(own, state.direction, i)) : at(own, state.direction, i)));
    traces.push({ type: "scatter", mode: "lines", x: data.layers, y: line, line: { color: colour("ink"), width: 1.5, dash: "dash" }, hovertemplate: `${escapeText(name(state.direction))}, layer %{x}<br>%{y:.3g}<extra></extra>` });
    draw("profile", traces, { xaxis: layers(), yaxis: axis(shown === "z" ? "mean |z|" : unit()), shapes: [mark()] }, 300, (point) => choose({ layer: point.x }));
    keys("profile", [
      ...(kinds.length ? kinds : ["all"]).map((kind) => ({ text: kind === "pc" ? "components" : kind === "all" ? "all" : `${kind}s`, color: look(kind).color })),
      { text: short(name(state.direction)), color: colour("ink") }, ...(shown === "delta" ? [{ text: "controls", color: colour("line") }] : []),
    ]);
    fill("profile", ["layer", "kind", "mean change", "std", "mean |z|", "directions"], () => view().means.map((r) => [r[0], r[1], show(r[2]), show(r[3]), show(r[4]), r[5]]));
  };

  /* ---- ranking at the chosen layer ---- */
  const finite = (value) => Number.isFinite(value);
  const ranked = (values, where) => data.directions.map((_, row) => row).filter((row) => !Number.isNaN(at(values, row, where))).sort((a, b) => Math.abs(at(values, b, where)) - Math.abs(at(values, a, where)));
  const ranking = () => {
    const values = current();
    const rows = ranked(values, place()).slice(0, TOP).reverse();
    const labels = rows.map((row) => `${short(escapeText(name(row)))} `);
    const trace = {
      type: "bar", orientation: "h", y: rows.map((_, i) => i), x: rows.map((row) => at(values, row, place())), customdata: rows,
      marker: { color: rows.map((row) => (row === state.direction ? colour("ink") : look(data.directions[row].kind).color)) },
      text: rows.map((row) => show(at(values, row, place()))), textposition: "none", hovertemplate: rows.map((row) => `${escapeText(name(row))}, ${data.directions[row].kind}<br>${unit()} %{x:.4g}<extra></extra>`),
    };
    draw("ranking", [trace], { xaxis: axis(unit()), yaxis: axis("", { tickvals: rows.map((_, i) => i), ticktext: labels, ticks: "", showgrid: false }), bargap: 0.25 }, 300, (point) => choose({ direction: point.customdata }));
    keys("ranking", []);
    fill("ranking", ["direction", "kind", unit()], () => ranked(values, place()).map((row) => [name(row), data.directions[row].kind, show(at(values, row, place()))]));
  };

  /* ---- heat map: directions by layers ---- */
  const heat = () => {
    const values = current();
    const largest = (row) => Math.max(...data.layers.map((_, i) => (finite(at(values, row, i)) ? Math.abs(at(values, row, i)) : 0)));
    const sizes = data.directions.map((_, row) => largest(row));
    const rows = data.directions.map((_, row) => row).sort((a, b) => sizes[b] - sizes[a]).slice(0, ROWS).reverse();
    const top = Math.max(...rows.map((row) => sizes[row]), 1e-30);
    const signed = rows.some((row) => data.layers.some((_, i) => at(values, row, i) < 0));
    const scale = signed ? [[0, colour("series-1")], [0.5, colour("panel")], [1, colour("series-0")]] : [[0, colour("ramp-0")], [0.25, colour("ramp-2")], [0.5, colour("ramp-4")], [0.75, colour("ramp-5")], [1, colour("ramp-7")]];
    const trace = {
      type: "heatmap", x: data.layers, y: rows.map((_, i) => i), z: rows.map((row) => data.layers.map((_, i) => (Number.isNaN(at(values, row, i)) ? null : Math.max(-top, Math.min(top, at(values, row, i)))))),
      customdata: rows.map((row) => data.layers.map(() => row)), zmin: signed ? -top : 0, zmax: top, colorscale: scale, showscale: false, xgap: width > 60 ? 0 : 1, ygap: 1, hoverongaps: false,
      text: rows.map((row) => data.layers.map((layer, i) => `${escapeText(name(row))}, layer ${layer}<br>${unit()} ${show(at(values, row, i))}`)), hovertemplate: "%{text}<extra></extra>",
    };
    const chosen = rows.indexOf(state.direction);
    const box = chosen < 0 ? [] : [{ type: "rect", xref: "paper", x0: 0, x1: 1, y0: chosen - 0.5, y1: chosen + 0.5, line: { color: colour("ink"), width: 1.5 } }];
    draw("heat", [trace], {
      xaxis: layers({ ticks: "" }), yaxis: axis("", { tickvals: rows.map((_, i) => i), ticktext: rows.map((row) => `${short(escapeText(name(row)))} `), ticks: "", showgrid: false, zeroline: false, tickfont: { size: 11 } }),
      shapes: [...box, { type: "rect", x0: state.layer - 0.5, x1: state.layer + 0.5, yref: "paper", y0: 0, y1: 1, line: { color: colour("ink"), width: 1.5 } }],
    }, rows.length * 15 + 70, (point) => choose({ layer: point.x, direction: point.customdata }));
    const bar = element("span", { className: "bar-fill" });
    bar.style.background = `linear-gradient(90deg, ${scale.map(([stop, shade]) => `${shade} ${100 * stop}%`).join(", ")})`;
    $("heat-scale").replaceChildren(signed ? show(-top) : "0", bar, `${show(top)} ${unit() === "z" ? "z" : unit()}`);
    fill("heat", ["direction", ...data.layers.map((layer) => `layer ${layer}`)], () => [...rows].reverse().map((row) => [name(row), ...data.layers.map((_, i) => show(at(values, row, i)))]));
  };

  /* ---- scatter of two measures, or of attention's two parts ---- */
  const partners = () => {
    const find = (test) => data.views.findIndex((one) => one.sign === 1 && test(one));
    if (data.analysis === "attention") return [find((one) => one.part === "qk" && one.measure === "affinity"), find((one) => one.part === "vo" && one.measure === "change")];
    return data.scatter.map((measure) => find((one) => one.part === view().part && one.measure === measure));
  };
  const scatter = () => {
    const [x, y] = partners();
    if (x < 0 || y < 0) return;
    const [across, up] = [grid(x, "delta"), grid(y, "delta")];
    const traces = data.kinds.map((kind) => {
      const rows = data.directions.map((_, row) => row).filter((row) => data.directions[row].kind === kind);
      return {
        type: "scatter", mode: "markers", x: rows.map((row) => at(across, row, place())), y: rows.map((row) => at(up, row, place())), customdata: rows,
        marker: { ...look(kind), size: rows.map((row) => (row === state.direction ? 14 : 8)), opacity: 0.8, line: { width: rows.map((row) => (row === state.direction ? 2 : 0)), color: colour("ink") } },
        text: rows.map((row) => escapeText(name(row))), hovertemplate: `%{text}, ${kind}<br>%{x:.4g}, %{y:.4g}<extra></extra>`,
      };
    });
    draw("scatter", traces, { xaxis: axis(data.views[x].label), yaxis: axis(data.views[y].label) }, 320, (point) => choose({ direction: point.customdata }));
    keys("scatter", data.kinds.map((kind) => ({ text: kind === "pc" ? "components" : `${kind}s`, color: look(kind).color })));
    fill("scatter", ["direction", "kind", data.views[x].label, data.views[y].label], () => data.directions.map((one, row) => [one.name, one.kind, show(at(across, row, place())), show(at(up, row, place()))]));
  };

  /* ---- roles against traits ---- */
  const groups = () => {
    if (!$("groups-figure")) return;
    const values = current();
    const of = (kind) => data.directions.map((one, row) => (one.kind === kind ? at(values, row, place()) : NaN)).filter(finite);
    const both = [...of("role"), ...of("trait")];
    const [low, high] = [Math.min(...both), Math.max(...both)];
    const bins = { start: low, end: high + (high - low || 1) * 1e-6, size: (high - low || 1) / Math.min(24, Math.max(6, Math.round(both.length / 4))) };
    const traces = ["role", "trait"].map((kind) => ({ type: "histogram", x: of(kind), autobinx: false, xbins: bins, marker: { color: look(kind).color, line: { width: 0 } }, opacity: 0.6, hovertemplate: `${kind}s: %{y} in %{x}<extra></extra>` }));
    draw("groups-figure", traces, { barmode: "overlay", xaxis: axis(unit()), yaxis: axis("directions") }, 320);
    const found = data.tests.find((one) => one[0] === view().part && one[1] === view().measure && one[2] === state.layer);
    keys("groups-figure", [{ text: "roles", color: look("role").color }, { text: "traits", color: look("trait").color }, ...(found ? [{ text: `change: t ${show(found[3])}, q ${show(found[4])}, g ${show(found[5])}`, color: "transparent" }] : [])]);
    fill("groups-figure", ["direction", "kind", unit()], () => data.directions.map((one, row) => [one.name, one.kind, show(at(values, row, place()))]).filter((row) => row[1] === "role" || row[1] === "trait"));
  };

  /* ---- heads ---- */
  const heads = () => {
    if (!$("heads")) return;
    const part = view().part === "vo" ? "vo" : "qk";
    const rows = data.heads.filter((one) => one[0] === part);
    const count = Math.max(...rows.map((one) => one[2])) + 1;
    const cells = new Map(rows.map((one) => [`${one[1]}/${one[2]}`, one]));
    const pick = (layer, head, what) => { const one = cells.get(`${layer}/${head}`); return one ? what(one) : null; };
    const list = Array.from({ length: count }, (_, head) => head);
    const trace = {
      type: "heatmap", x: data.layers, y: list, z: list.map((head) => data.layers.map((layer) => pick(layer, head, (one) => real(one[3])))), showscale: false, xgap: 1, ygap: 1, hoverongaps: false,
      colorscale: [0, 2, 4, 5, 7].map((step, i) => [i / 4, colour(`ramp-${step}`)]),
      text: list.map((head) => data.layers.map((layer) => pick(layer, head, (one) => `layer ${layer}, head ${head}<br>mean |z| ${show(one[3])}<br>most: ${escapeText(one[4])}, z ${show(one[5])}`))), hovertemplate: "%{text}<extra></extra>",
    };
    draw("heads", [trace], { xaxis: layers({ ticks: "" }), yaxis: axis("head", { dtick: Math.max(1, Math.ceil(count / 12)), showgrid: false, ticks: "", zeroline: false }) }, 320, (point) => choose({ layer: point.x }));
    keys("heads", [{ text: `part ${part}`, color: "transparent" }]);
    fill("heads", ["layer", "head", "mean |z|", "direction", "z"], () => rows.map((one) => [one[1], one[2], show(one[3]), one[4], show(one[5])]));
  };

  /* ---- controls ---- */
  const all = () => { profile(); ranking(); heat(); scatter(); groups(); heads(); };
  const quantities = () => {
    const known = Object.keys(QUANTITIES).filter((one) => view().grids[one] !== undefined);
    if (!known.includes(state.quantity)) state.quantity = known[0];
    $("quantity-choice").replaceChildren(...known.map((one) => {
      const input = element("input", { type: "radio", name: "quantity", value: one, checked: one === state.quantity });
      input.addEventListener("change", () => choose({ quantity: one }));
      return element("label", {}, input, QUANTITIES[one]);
    }));
  };
  const choose = (change) => {
    Object.assign(state, change);
    if ("view" in change) quantities();
    $("view-choice").value = String(state.view);
    $("layer-choice").value = String(state.layer);
    $("direction-choice").value = String(state.direction);
    for (const figure of document.querySelectorAll(".figure")) figure.title = "";
    all();
  };
  const start = () => {
    for (const box of document.querySelectorAll("[data-table]")) box.addEventListener("toggle", () => box.open && build(box.dataset.table));
    $("controls").addEventListener("submit", (event) => event.preventDefault());
    $("view-choice").append(...data.views.map((one, i) => element("option", { value: String(i), textContent: one.label, title: one.meaning })));
    $("layer-choice").append(...data.layers.map((layer) => element("option", { value: String(layer), textContent: String(layer) })));
    const alphabetical = data.directions.map((_, row) => row).sort((a, b) => data.directions[a].kind.localeCompare(data.directions[b].kind) || name(a).localeCompare(name(b), undefined, { numeric: true }));
    $("direction-choice").append(...alphabetical.map((row) => element("option", { value: String(row), textContent: `${data.directions[row].kind} ${data.directions[row].name}` })));
    $("view-choice").addEventListener("change", (event) => choose({ view: Number(event.target.value) }));
    $("layer-choice").addEventListener("change", (event) => choose({ layer: Number(event.target.value) }));
    $("direction-choice").addEventListener("change", (event) => choose({ direction: Number(event.target.value) }));
    const first = data.focus[0];
    const begin = first ? data.views.findIndex((one) => one.part === first.part && one.measure === first.measure) : 0;
    state.view = Math.max(0, begin);
    state.layer = first ? first.layer : data.layers[0];
    const scores = grid(state.view, "z");
    const order = ranked(scores, place());
    choose({ view: state.view, direction: order.length ? order[0] : 0 });
    document.addEventListener("themechange", all);
    NARROW.addEventListener("change", all);
    document.documentElement.dataset.ready = "true";
  };
  if (data.views.length && data.directions.length) start(); else document.documentElement.dataset.ready = "true";
})();
