/* The figures of a precision analysis. One state (configuration, prompt, metric, op) drives all of them. */
(() => {
  "use strict";
  const data = JSON.parse(document.getElementById("payload").textContent);
  const $ = (id) => document.getElementById(id);
  const state = { config: "", prompt: 0, metric: data.metrics[0]?.key, op: 0 };
  const NARROW = matchMedia("(max-width: 44rem)");
  const SYMBOLS = ["circle", "diamond", "square", "triangle-up", "cross", "star"];
  const DASHES = ["solid", "dash", "dot", "dashdot", "longdash", "longdashdot"];

  /* ---- small tools ---- */
  const element = (tag, props = {}, ...children) => {
    const node = Object.assign(document.createElement(tag), props);
    node.append(...children);
    return node;
  };
  const real = (value) => (typeof value === "string" ? { inf: Infinity, "-inf": -Infinity }[value] ?? NaN : value);
  const unpack = (text) => {
    const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    const view = new DataView(bytes.buffer);
    return Float32Array.from({ length: bytes.length / 4 }, (_, i) => view.getFloat32(4 * i, true));
  };
  const show = (raw) => {
    const value = real(raw);
    if (value === null || value === undefined) return "-";
    if (Number.isNaN(value)) return "nan";
    if (!Number.isFinite(value)) return value > 0 ? "inf" : "-inf";
    if (value === 0) return "0";
    const size = Math.abs(value);
    return size >= 1e-3 && size < 1e5 ? String(Number(value.toPrecision(3))) : value.toExponential(2);
  };
  const probe = document.body.appendChild(element("span", { hidden: true }));
  const colour = (name) => {
    probe.style.color = `var(--${name})`;
    return getComputedStyle(probe).color;
  };
  const prompt = () => data.prompts.find((one) => one.index === state.prompt);
  const part = (kind) => prompt()?.[kind][state.config];
  /* Colour, mark and dash of a configuration: a seventh takes the first colour with another mark and dash. */
  const look = (config) => {
    const k = Math.max(0, data.configs.indexOf(config));
    const shifted = (k + Math.floor(k / 6)) % 6;
    return { color: colour(`series-${k % 6}`), symbol: SYMBOLS[shifted], dash: DASHES[shifted] };
  };
  const first = () => part("tokens")?.first ?? null;

  /* ---- plotting ---- */
  const axis = (more = {}) => ({
    gridcolor: colour("line"), linecolor: colour("strong"), zeroline: false, ticks: "outside", ticklen: 4,
    tickcolor: colour("strong"), automargin: true, fixedrange: true, exponentformat: "power", ...more,
    title: more.title ? { text: more.title, font: { size: 12, color: colour("soft") }, standoff: 8 } : undefined,
  });
  const log = (values, more = {}) => {
    const positive = values.map(real).filter((v) => v > 0 && Number.isFinite(v));
    if (!positive.length) return axis({ type: "log", ...more });
    const ends = [Math.log10(Math.min(...positive)), Math.log10(Math.max(...positive))];
    const pad = Math.max(0.08 * (ends[1] - ends[0]), 0.3 - (ends[1] - ends[0]) / 4); /* a narrow range is not blown up */
    const [low, high] = [ends[0] - pad, ends[1] + pad];
    const steps = high - low > 2.5 ? [1] : high - low > 1.2 ? [1, 3] : [1, 2, 5];
    const ticks = [];
    for (let k = Math.floor(low); k <= high; k += 1) ticks.push(...steps.map((m) => m * 10 ** k));
    const inside = ticks.filter((v) => Math.log10(v) >= low && Math.log10(v) <= high);
    const thin = Math.ceil(inside.length / 7);
    const tickvals = inside.filter((_, i) => i % thin === 0);
    return axis({ type: "log", range: [low, high], tickvals, ticktext: tickvals.map(show), ...more });
  };
  /* The key of a figure is HTML, so that it wraps and can be read aloud. */
  const SHAPES = {
    circle: "M12 6m-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0", diamond: "M12 1l5 5l-5 5l-5 -5z", square: "M8 2h8v8h-8z", "triangle-up": "M12 1l5 9h-10z",
    cross: "M10 1h4v3h3v4h-3v3h-4v-3h-3v-4h3z", star: "M12 0l1.8 4h4l-3.2 2.6l1.2 4.4l-3.8 -2.5l-3.8 2.5l1.2 -4.4l-3.2 -2.6h4z", x: "M8 2l8 8m0 -8l-8 8",
  };
  const DASHARRAY = { solid: "", dash: "6 4", dot: "2 3", dashdot: "6 3 2 3", longdash: "9 3", longdashdot: "9 3 2 3" };
  const keys = (id, items) => {
    const make = (tag, attributes) => {
      const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
      for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
      return node;
    };
    $(`${id}-keys`).replaceChildren(...items.map(({ name, color, dash, symbol }) => {
      const svg = make("svg", { width: 24, height: 12, "aria-hidden": "true" });
      if (dash !== undefined) svg.append(make("path", { d: "M0 6h24", stroke: color, "stroke-width": 2, "stroke-dasharray": DASHARRAY[dash] }));
      if (symbol) svg.append(make("path", { d: SHAPES[symbol], ...(symbol === "x" ? { stroke: color, "stroke-width": 3 } : { fill: color }) }));
      return element("span", { className: "key" }, ...(svg.childElementCount ? [svg] : []), name);
    }));
  };
  const draw = (id, traces, layout, height) => {
    const box = $(`${id}-plot`);
    if (!traces.length) {
      Plotly.purge(box);
      $(`${id}-keys`).replaceChildren();
      box.replaceChildren(element("p", { className: "empty", textContent: "Nothing was recorded here." }));
      return;
    }
    box.querySelector(".empty")?.remove();
    const font = { family: getComputedStyle(document.body).fontFamily, size: 12, color: colour("soft") };
    Plotly.react(box, traces, {
      height, font, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", dragmode: false, hovermode: "closest",
      margin: { l: 8, r: 8, t: 26, b: 8 }, showlegend: false,
      hoverlabel: { bgcolor: colour("ink"), bordercolor: colour("ink"), font: { ...font, color: colour("page") }, align: "left" },
      ...layout,
    }, { displayModeBar: false, responsive: true, doubleClick: false, showTips: false });
  };
  const divergenceMark = () => {
    const at = first();
    if (at === null) return {};
    const line = { type: "line", x0: at, x1: at, yref: "paper", y0: 0, y1: 1, line: { color: colour("mark"), width: 1.5, dash: "dot" } };
    const right = at < 0.6 * (prompt().reference_tokens.length || 1);
    const label = {
      x: at, y: 1, yref: "paper", yanchor: "bottom", xanchor: right ? "left" : "right", showarrow: false, text: `first difference, token ${at}`,
      font: { size: 12, color: colour("mark") }, yshift: 1,
    };
    return { shapes: [line], annotations: [label] };
  };
  const steps = () => {
    const last = Math.max(0, (prompt()?.reference_tokens.length ?? 1) - 1);
    return { range: [-0.6, last + 0.6], nticks: NARROW.matches ? 6 : 14, showgrid: false };
  };

  /* ---- tables: the text form of each figure, built when opened ---- */
  const tables = {};
  const fill = (id, head, rows) => { tables[id] = { head, rows }; if (document.querySelector(`[data-table="${id}"]`)?.open) build(id); };
  const build = (id) => {
    const box = document.querySelector(`[data-table="${id}"] .scroll`);
    if (!box || !tables[id]) return;
    const { head, rows } = tables[id];
    const cells = (tag, row) => element("tr", {}, ...row.map((text, i) => {
      const cell = element(i && tag === "td" ? "td" : "th", { textContent: text });
      cell.scope = tag === "th" ? "col" : i ? "" : "row";
      if (tag === "td" && i) cell.removeAttribute("scope");
      return cell;
    }));
    box.replaceChildren(element("table", {}, element("thead", {}, cells("th", head)), element("tbody", {}, ...rows().map((row) => cells("td", row)))));
  };

  /* ---- drift by layer, all configurations ---- */
  const byLayer = () => {
    if (!$("bylayer")) return;
    const rows = data.by_layer;
    const traces = rows.map((row) => {
      const { color, symbol, dash } = look(row.config);
      return {
        type: "scatter", mode: "lines+markers", name: row.config, x: row.layers, y: row.mean.map(real), customdata: row.max.map(show),
        line: { color, width: 2, dash }, marker: { symbol, size: row.layers.length > 16 ? 5 : 8 },
        hovertemplate: `${escapeText(row.config)}, layer %{x}<br>mean %{y:.3g}, max %{customdata}<extra></extra>`,
      };
    });
    draw("bylayer", traces, {
      margin: { l: 8, r: 8, t: 12, b: 8 }, xaxis: axis({ title: "layer", dtick: layerTick(rows[0]?.layers), showgrid: false, range: [-0.4, Math.max(...rows.flatMap((row) => row.layers)) + 0.4] }),
      yaxis: log(rows.flatMap((row) => row.mean), { title: "mean rel_l2" }),
    }, 300);
    keys("bylayer", rows.map(({ config }) => ({ name: config, ...look(config) })));
    fill("bylayer", ["layer", ...rows.flatMap((row) => [`${row.config} mean`, "max", "not finite"])], () => (rows[0]?.layers ?? []).map((layer, i) => [
      layer, ...rows.flatMap((row) => [show(row.mean[i]), show(row.max[i]), row.nonfinite[i]]),
    ]));
  };
  const layerTick = (layers = []) => Math.max(1, Math.ceil(layers.length / (NARROW.matches ? 8 : 18)));
  const escapeText = (text) => text.replace(/[&<>"]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[c]);

  /* ---- tokens ---- */
  const printable = (text) => {
    const shown = text.replace(/\n/g, "\u21b5").replace(/\t/g, "\u21e5");
    const lead = shown.match(/^ +/)?.[0] ?? "";
    return element("span", {}, ...(lead ? [element("span", { className: "space", textContent: "\u00b7".repeat(lead.length) })] : []), shown.slice(lead.length) || (lead ? "" : "\u00a0"));
  };
  const tokens = () => {
    if (!$("tokens")) return;
    const now = prompt();
    const own = part("tokens");
    $("prompt-text").textContent = now.text;
    $("strip").replaceChildren();
    $("parting").replaceChildren();
    if (!own) {
      $("tokens-note").textContent = `${state.config} generated nothing for this prompt.`;
      return;
    }
    const reference = now.reference_tokens;
    const margins = new Map((part("logprobs")?.steps ?? []).map((step, i) => [step, part("logprobs").margin[i]]));
    $("tokens-note").textContent = `Upper line ${data.reference}, lower line ${state.config}; ${own.match} equal.${own.first === null ? "" : " Dimmed after the first difference: from there on the texts are different ones."}`;
    const count = Math.max(reference.length, own.tokens.length);
    for (let i = 0; i < count; i += 1) {
      const differs = reference[i] !== own.tokens[i] || i === own.first;
      const kind = [differs ? "differs" : "", i === own.first ? "first" : "", own.first !== null && i > own.first ? "after" : ""];
      const label = i === own.first ? `${i} first difference` : i % 5 === 0 ? String(i) : "";
      const item = element("li", { className: kind.join(" ").trim() }, element("span", { className: "at", textContent: label, ariaHidden: i !== own.first }));
      const chip = (side, list) => element("span", { className: `chip ${side}` }, i < list.length ? printable(list[i]) : element("em", { textContent: i === list.length ? "end" : " " }));
      item.append(chip("reference", reference));
      const mine = chip("candidate", own.tokens);
      if (!differs) mine.setAttribute("aria-hidden", "true");
      item.append(mine);
      item.title = `token ${i}` + (margins.has(i) ? `, reference margin ${show(margins.get(i))} nats` : "");
      $("strip").append(item);
    }
    const mark = $("strip").querySelector(".first");
    $("strip").scrollTop = mark ? Math.max(0, mark.offsetTop - 60) : 0;
    parting(own);
  };
  const parting = (own) => {
    const facts = [["Smallest margin so far", `${show(own.smallest_margin)} nats`], ["Length", own.length_delta ? `${Math.abs(own.length_delta)} tokens ${own.length_delta < 0 ? "shorter" : "longer"}` : "equal"]];
    if (own.first !== null) {
      facts.unshift(["First difference", `token ${own.first}`], ["Reference margin there", `${show(own.margin)} nats`], ["Drift before it (rel_l2)", show(own.drift_before)]);
    }
    const list = element("dl", {}, ...facts.map(([name, value]) => element("div", {}, element("dt", { textContent: name }), element("dd", { textContent: value }))));
    $("parting").append(element("p", { textContent: own.explanation }), list);
  };

  /* ---- heat map ---- */
  const ramp = () => Array.from({ length: 8 }, (_, i) => [i / 7, colour(`ramp-${i}`)]);
  const heat = () => {
    if (!$("drift")) return;
    const own = part("drift");
    const range = data.ranges[state.metric];
    if (!own) { draw("drift", []); legend(null); return; }
    const values = unpack(own.values[state.metric]);
    const missing = new Set(own.missing);
    const wide = own.steps.length;
    const grid = (pick) => own.layers.map((_, row) => own.steps.map((_, column) => pick(row * wide + column)));
    const gap = wide > 160 ? 0 : 1;
    const common = { type: "heatmap", x: own.steps, y: own.layers, showscale: false, xgap: gap, ygap: gap };
    const name = data.metrics.find((one) => one.key === state.metric).label;
    const where = "token %{x}, layer %{y}";
    const [low, high] = range ? range.map(Math.log10) : [-1, 0];
    const flat = (shade) => ({ zmin: 0, zmax: 1, colorscale: [[0, shade], [1, shade]] });
    const traces = [
      { ...common, z: grid((i) => (values[i] > 0 && Number.isFinite(values[i]) ? Math.log10(values[i]) : null)), customdata: grid((i) => show(values[i])), zmin: low, zmax: high > low ? high : low + 1, colorscale: ramp(), hoverongaps: false, hovertemplate: `${where}<br>${name} %{customdata}<extra></extra>` },
      { ...common, ...flat(colour("page")), z: grid((i) => (values[i] === 0 && !missing.has(i) ? 1 : null)), hoverongaps: false, hovertemplate: `${where}<br>${name} 0<extra></extra>` },
      { ...common, ...flat(colour("mark")), z: grid((i) => (!Number.isFinite(values[i]) && !missing.has(i) ? 1 : null)), customdata: grid((i) => show(values[i])), hoverongaps: false, hovertemplate: `${where}<br>${name} %{customdata}<extra></extra>` },
    ];
    const at = first();
    const mark = divergenceMark();
    const outline = at === null ? [] : [{ type: "rect", x0: at - 0.5, x1: at + 0.5, yref: "paper", y0: 0, y1: 1, line: { color: colour("mark"), width: 2 } }];
    draw("drift", traces, {
      plot_bgcolor: colour("panel"), shapes: outline, annotations: mark.annotations,
      xaxis: axis({ title: "generated token", ...steps(), ticks: "" }), yaxis: axis({ title: "layer", dtick: layerTick(own.layers), showgrid: false, ticks: "" }),
    }, Math.min(620, Math.max(240, own.layers.length * 22 + 90)));
    legend(range, values, missing);
    fill("drift", ["token", ...own.layers.map((layer) => `layer ${layer}`)], () => own.steps.map((step, column) => [
      step, ...own.layers.map((_, row) => (missing.has(row * wide + column) ? "-" : show(values[row * wide + column]))),
    ]));
  };
  const legend = (range, values = [], missing = new Set()) => {
    const box = $("ramp");
    box.replaceChildren();
    if (!range) return;
    const [low, high] = range.map(Math.log10);
    const scale = element("div", { className: "scale" }, element("div", { className: "fill" }));
    const decades = [];
    for (let k = Math.ceil(low); k <= Math.floor(high); k += 1) decades.push(k);
    const thin = Math.ceil(decades.length / 5);
    const ticks = decades.length > 1 ? decades.filter((_, i) => i % thin === 0) : [low, high];
    for (const k of ticks) {
      const left = `${high > low ? (100 * (k - low)) / (high - low) : 0}%`;
      const label = element("span", { textContent: show(10 ** k) });
      label.style.left = left;
      const tick = element("i");
      tick.style.left = left;
      scale.append(tick, label);
    }
    box.append(scale, element("span", { className: "swatch", textContent: "exactly equal" }));
    if (Array.from(values).some((v, i) => !Number.isFinite(v) && !missing.has(i))) box.append(element("span", { className: "swatch nonfinite", textContent: "inf or nan" }));
  };

  /* ---- cap ---- */
  const cap = () => {
    if (!$("cap")) return;
    const all = part("cap") ?? [];
    const own = all[Math.min(state.op, all.length - 1)];
    if (!own) { draw("cap", []); return; }
    const rates = data.clamp_rate.filter((row) => row.config === state.config || row.config === data.reference);
    const difference = own.delta.map((value, i) => (own.reference[i] === null ? null : real(value) - real(own.reference[i])));
    const hasReference = own.reference.some((value) => value !== null);
    const line = (more) => ({ type: "scatter", mode: "lines", x: own.steps, ...more });
    const ink = { color: colour("faint"), width: 2, dash: "dot" };
    const main = { color: colour("accent"), width: 2 };
    const traces = [
      ...(hasReference ? [line({ name: data.reference, y: own.reference.map(real), line: ink, hovertemplate: "token %{x}: %{y:.4g}<extra>reference</extra>" })] : []),
      line({ name: state.config, y: own.delta.map(real), mode: "lines+markers", line: main, marker: { size: own.clamped.map((c) => (c ? 5 : 0)), color: main.color, line: { width: 0 } }, hovertemplate: "token %{x}: %{y:.4g}<extra></extra>" }),
      ...(hasReference ? [line({ name: "difference", y: difference, yaxis: "y2", mode: "lines", fill: "tozeroy", fillcolor: colour("mark-wash"), line: { color: colour("mark"), width: 1.5 }, hovertemplate: "token %{x}: %{y:.3g}<extra>candidate - reference</extra>" })] : []),
      ...rates.map((row) => ({ type: "scatter", mode: "lines", x: row.steps, y: row.rate.map((v) => 100 * v), yaxis: "y3", line: { ...(row.config === state.config ? main : ink), shape: "hvh" }, name: row.config, hovertemplate: `token %{x}: %{y:.0f} %<extra>${escapeText(row.config)}</extra>` })),
    ];
    const small = (title, domain, more = {}) => axis({ title, domain, nticks: 4, ...more });
    draw("cap", traces, {
      ...divergenceMark(), margin: { l: 8, r: 8, t: 26, b: 8 }, xaxis: axis({ title: "generated token", ...steps(), anchor: "y3" }),
      yaxis: small("cap_delta", [0.54, 1]), yaxis2: small("difference", [0.27, 0.47]), yaxis3: small("clamped, %", [0, 0.2], { range: [-4, 104], tickvals: [0, 50, 100] }),
    }, 430);
    keys("cap", [...(hasReference ? [{ name: data.reference, ...ink }] : []), { name: `${state.config}, dots where clamped`, color: main.color, dash: "solid", symbol: "circle" }, ...(hasReference ? [{ name: "difference", color: colour("mark"), dash: "solid" }] : []), ...(own.clamped.some(Boolean) ? [] : [{ name: "nothing was clamped in this generation" }])]);
    fill("cap", ["token", "p before", "cap_delta", `${data.reference} cap_delta`, "difference", "clamped"], () => own.steps.map((step, i) => [
      step, show(own.before[i]), show(own.delta[i]), show(own.reference[i]), show(difference[i]), own.clamped[i] ? "yes" : "no",
    ]));
  };

  /* ---- log-probabilities ---- */
  const logprobs = () => {
    if (!$("logprobs")) return;
    const own = part("logprobs");
    if (!own) { draw("logprobs", []); return; }
    const positive = (values) => values.map((v) => (real(v) > 0 ? real(v) : null));
    const flips = own.steps.map((_, i) => i).filter((i) => own.top[i] !== own.reference_top[i]);
    const traces = [
      { type: "scatter", mode: "lines", name: "reference margin, top-1 minus top-2", x: own.steps, y: positive(own.margin), line: { color: colour("faint"), width: 2 }, hovertemplate: "token %{x}: margin %{y:.3g} nats<extra></extra>" },
      { type: "scatter", mode: "lines+markers", name: `${state.config}: largest top-k error`, x: own.steps, y: positive(own.max_delta), line: { color: colour("accent"), width: 2 }, marker: { size: 4 }, hovertemplate: "token %{x}: error %{y:.3g} nats<extra></extra>" },
      { type: "scatter", mode: "markers", name: "best token changed", x: flips.map((i) => own.steps[i]), y: flips.map((i) => positive([own.max_delta[i]])[0]), marker: { symbol: "x", size: 11, color: colour("mark") }, customdata: flips.map((i) => `${escapeText(own.reference_top[i])} became ${escapeText(own.top[i])}`), hovertemplate: "token %{x}: %{customdata}<extra></extra>" },
    ].filter((trace) => trace.x.length);
    draw("logprobs", traces, {
      ...divergenceMark(), xaxis: axis({ title: "generated token", ...steps() }), yaxis: log([...own.margin, ...own.max_delta], { title: "nats" }),
    }, 340);
    keys("logprobs", [
      { name: "reference margin, best minus second", color: colour("faint"), dash: "solid" }, { name: `${state.config}, largest top-k error`, color: colour("accent"), dash: "solid" },
      ...(flips.length ? [{ name: "best token changed", color: colour("mark"), symbol: "x" }] : []),
    ]);
    fill("logprobs", ["token", "reference best", "best here", "margin", "delta of best", "largest delta", "shared"], () => own.steps.map((step, i) => [
      step, own.reference_top[i], own.top[i], show(own.margin[i]), show(own.delta_top[i]), show(own.max_delta[i]), `${own.shared[i]} of ${own.num_top[i]}`,
    ]));
  };

  /* ---- all divergences ---- */
  const scatter = () => {
    if (!$("scatter")) return;
    const known = data.divergences.filter((one) => one.margin !== null && one.drift !== null);
    const configs = data.configs.filter((config) => known.some((one) => one.config === config));
    const traces = configs.map((config) => {
      const { color, symbol } = look(config);
      const rows = known.filter((one) => one.config === config);
      return {
        type: "scatter", mode: "markers", name: config, x: rows.map((one) => real(one.drift)), y: rows.map((one) => real(one.margin)),
        customdata: rows.map((one) => [one.prompt, one.step]), marker: { symbol, size: 11, color, opacity: 0.85 },
        hovertemplate: `${escapeText(config)}, prompt %{customdata[0]}, token %{customdata[1]}<br>drift %{x:.3g}, margin %{y:.3g} nats<extra></extra>`,
      };
    });
    draw("scatter", traces, {
      margin: { l: 8, r: 8, t: 12, b: 8 }, xaxis: log(known.map((one) => one.drift), { title: "drift before, rel_l2" }), yaxis: log(known.map((one) => one.margin), { title: "reference margin, nats" }),
    }, 320);
    keys("scatter", configs.map((config) => ({ name: config, ...look(config), dash: undefined })));
    fill("scatter", ["configuration", "prompt", "token", "drift", "margin"], () => data.divergences.map((one) => [one.config, one.prompt, one.step, show(one.drift), show(one.margin)]));
  };

  /* ---- controls ---- */
  const opChoice = () => {
    if (!$("op-choice")) return;
    const all = part("cap") ?? [];
    state.op = Math.min(state.op, Math.max(0, all.length - 1));
    $("op-choice").replaceChildren(...all.map((one, i) => element("option", { value: String(i), textContent: `${one.site}, ${one.op}`, selected: i === state.op })));
    $("op-label").hidden = all.length < 2;
  };
  const chosen = () => { opChoice(); tokens(); heat(); cap(); logprobs(); };
  const all = () => { byLayer(); scatter(); if ($("explore")) chosen(); };
  const choose = (config, index) => {
    if (!data.configs.includes(config) || !data.prompts.some((one) => one.index === index)) return false;
    state.config = config;
    state.prompt = index;
    $("prompt-choice").value = String(index);
    for (const input of document.querySelectorAll("#config-choice input")) input.checked = input.value === config;
    chosen();
    return true;
  };
  const controls = () => {
    $("controls").addEventListener("submit", (event) => event.preventDefault());
    $("config-choice").append(...data.configs.map((config) => {
      const input = element("input", { type: "radio", name: "config", value: config });
      input.addEventListener("change", () => choose(config, state.prompt));
      return element("label", {}, input, config);
    }));
    $("prompt-choice").append(...data.prompts.map((one) => {
      const flat = one.text.replace(/\s+/g, " ").trim();
      return element("option", { value: String(one.index), textContent: `${one.index}: ${flat.length > 80 ? `${flat.slice(0, 77)}...` : flat}` });
    }));
    $("prompt-choice").addEventListener("change", (event) => choose(state.config, Number(event.target.value)));
    $("metric-choice")?.append(...data.metrics.map((one) => element("option", { value: one.key, textContent: one.label })));
    $("metric-choice")?.addEventListener("change", (event) => { state.metric = event.target.value; heat(); });
    $("op-choice")?.addEventListener("change", (event) => { state.op = Number(event.target.value); cap(); });
    for (const button of document.querySelectorAll("button.show")) {
      const index = Number(button.dataset.prompt);
      button.hidden = !data.prompts.some((one) => one.index === index);
      button.addEventListener("click", () => {
        if (!choose(button.dataset.config, index)) return;
        $("explore").scrollIntoView({ block: "start" });
        document.querySelector("#config-choice input:checked").focus({ preventScroll: true });
      });
    }
  };
  const start = () => {
    for (const box of document.querySelectorAll("[data-table]")) box.addEventListener("toggle", () => box.open && build(box.dataset.table));
    if ($("explore")) {
      controls();
      const config = data.configs.includes(data.baseline) ? data.baseline : data.configs[0];
      const place = (one) => one.tokens[config]?.first ?? Infinity;
      const earliest = [...data.prompts].sort((a, b) => place(a) - place(b) || a.index - b.index)[0];
      state.config = config;
      choose(config, earliest.index);
    }
    byLayer();
    scatter();
    document.addEventListener("themechange", all);
    NARROW.addEventListener("change", all);
    document.documentElement.dataset.ready = "true";
  };
  start();
})();
