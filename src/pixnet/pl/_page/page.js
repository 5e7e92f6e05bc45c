"use strict";
(() => {
const $ = (id) => document.getElementById(id);
const meta = JSON.parse($("meta").textContent);
const { genes, programs, evidence, n, cols } = meta;
const WINDOW = 200; // rows of the list that are in the page at once
const upper = genes.map((g) => g.toUpperCase());
const positions = new Map(genes.map((g, i) => [g, i]));
let data = null; // bytes of the page, unpacked
let shown = null; // { kind, title, values, low, high, unit, error }
let tab = "genes";

// ---- numbers -------------------------------------------------------------------------------------------------------

async function unpack(name, rows, length) {
  const element = $("blob-" + name);
  if (!element) return null;
  const bytes = Uint8Array.from(atob(element.textContent), (c) => c.charCodeAt(0));
  element.remove();
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  const codes = new Uint8Array(await new Response(stream).arrayBuffer());
  for (let row = 0; row < rows; row++) { // neighbours were written as differences
    for (let i = row * length + 1, end = (row + 1) * length; i < end; i++) codes[i] += codes[i - 1];
  }
  return codes;
}

const decode = (code, top) => top * (code / 255) ** 2;
const halfStep = (code, top) => top * (code + 0.25) / 255 ** 2; // half the way to the next code, at most

// A weighted sum of channels in each square, of what each code stands for: a table for each channel, looked up and added.
function mix(weights, of, start = 0) {
  const out = new Float32Array(n).fill(start), table = new Float32Array(256);
  for (const [channel, weight] of weights) {
    if (!(weight > 0)) continue;
    for (let code = 0; code < 256; code++) table[code] = weight * of(code, meta.tops[channel]);
    for (let i = 0, j = channel * n; i < n; i++, j++) out[i] += table[data.map[j]];
  }
  return out;
}

function weightsOf(gene) {
  const g = positions.get(gene), K = meta.tops.length;
  if (!data.high) return [[g, 1]];
  const step = meta.loading_tops[g] / 65535;
  return meta.tops.map((_, k) => [k, step * (256 * data.high[g * K + k] + data.low[g * K + k])]);
}

const valuesOf = (gene) => mix(weightsOf(gene), decode);

// How far rounding may have moved each value: that of the map, and that of the loadings.
const errorsOf = (gene) => mix(weightsOf(gene), halfStep, data.high ? 1e4 * meta.loading_tops[positions.get(gene)] / 131070 : 0);

// The largest of the errors where the value is one that the colours tell apart.
function stated(values, errors, high) {
  let most = 0;
  for (let i = 0; i < n; i++) if (values[i] <= high && errors[i] > most) most = errors[i];
  return most;
}

function limits(values) {
  const step = Math.max(1, Math.floor(values.length / 20000));
  const some = values.filter((v, i) => i % step === 0 && Number.isFinite(v)).sort();
  const at = (q) => some[Math.min(some.length - 1, Math.round(q * (some.length - 1)))] ?? 0;
  const low = at(0.01), high = at(0.995);
  return high > low ? [low, high] : [low, low + 1];
}

// A number with three digits, or as many as another of that size has.
const brief = (v, size = v) => {
  if (!Number.isFinite(v)) return "–";
  if (!size) return "0";
  const digits = Math.max(0, 2 - Math.floor(Math.log10(Math.abs(size))));
  return digits > 6 ? v.toExponential(1) : v.toLocaleString("en", { maximumFractionDigits: digits });
};

// ---- picture -------------------------------------------------------------------------------------------------------

const canvas = $("map"), context = canvas.getContext("2d");

function draw() {
  if (!shown) return;
  const image = context.createImageData(canvas.width, canvas.height);
  const pixels = new Uint32Array(image.data.buffer), bytes = image.data;
  const strength = $("opacity") ? $("opacity").value / 100 : 1;
  const hide = $("hide") && $("hide").checked && shown.kind !== "novelty";
  const span = shown.high - shown.low, colours = meta.colours, floor = strength ** 3;
  for (let i = 0; i < n; i++) {
    const value = shown.values[i];
    if (!Number.isFinite(value)) continue;
    if (hide && data.novelty[i] > 198 && data.novelty[i] !== 255) continue;
    const t = Math.min(1, Math.max(0, (value - shown.low) / span)), c = 3 * Math.round(255 * t), p = 4 * data.places[i];
    bytes[p] = colours[c]; bytes[p + 1] = colours[c + 1]; bytes[p + 2] = colours[c + 2];
    bytes[p + 3] = 255 * strength * (floor + (1 - floor) * t); // low values let the tissue through
  }
  context.putImageData(image, 0, 0);
}

function legend() {
  $("shown").textContent = shown.title + " · " + shown.unit;
  const ticks = $("ticks").children;
  [shown.low, (shown.low + shown.high) / 2, shown.high].forEach((v, i) => { ticks[i].textContent = brief(v, shown.high); });
  $("error").textContent = shown.error ? "right to ± " + brief(shown.error) + " (rounded to 8 bits)" : "\u00a0";
}

function put(next) {
  shown = next;
  draw();
  legend();
}

function show(kind, key, weights, errors) {
  const values = mix(weights, decode), [low, high] = limits(values);
  const mine = { kind, key, title: key, values, low, high, unit: "CP10k" };
  put(mine);
  setTimeout(() => { // the picture first
    if (shown !== mine) return;
    mine.errors = errors();
    mine.error = stated(values, mine.errors, high);
    legend();
  });
}

function showGene(gene) {
  show("gene", gene, weightsOf(gene), () => errorsOf(gene));
  card(gene);
  mark();
  try { history.replaceState(null, "", "#" + encodeURIComponent(gene)); } catch (e) { /* a page inside another */ }
}

function showProgram(program) {
  const weights = [[program.channel, 1]];
  show("program", program.name, weights, () => mix(weights, halfStep));
  const box = $("card");
  box.replaceChildren(text("h2", program.name, "program"), text("p", "A group of transcripts that occur together. It has most, relative to other programs, of " + program.genes + "."));
  mark();
}

function showNovelty() {
  const values = Float32Array.from(data.novelty, (v) => (v === 255 ? NaN : v / 2));
  put({ kind: "novelty", key: "novelty", title: "Novelty", values, low: 0, high: 100, unit: "percentile of training tissue" });
  $("card").replaceChildren();
}

// ---- evidence ------------------------------------------------------------------------------------------------------

function text(tag, words, name) {
  const element = document.createElement(tag);
  element.textContent = words;
  if (name) element.className = name;
  return element;
}

function verdict(i) {
  const r = evidence.pearson?.[i], low = evidence.low?.[i];
  if (r == null) return "No held-out evidence for this gene: its map is a hypothesis.";
  if (low != null ? low <= 0 : r <= 0) return "Not shown to be predictable: treat its map as a guess.";
  return "";
}

function card(gene) {
  const i = positions.get(gene), of = (name) => evidence[name]?.[i];
  const lines = [text("h2", gene)];
  if (of("pearson") != null) {
    let words = "On held-out tissue, prediction and measurement correlate with r = " + of("pearson").toFixed(2);
    if (of("low") != null && of("high") != null) words += " (95 % interval " + of("low").toFixed(2) + " to " + of("high").toFixed(2) + ")";
    if (of("ceiling") != null) words += "; counting noise allows " + of("ceiling").toFixed(2) + " at most";
    lines.push(text("p", words + "."));
    if (of("ratio") != null) lines.push(text("p", "Measured sums there are " + of("ratio").toFixed(2) + " times the predicted ones."));
  }
  if (verdict(i)) lines.push(text("p", verdict(i)));
  $("card").replaceChildren(...lines);
}

// ---- list ----------------------------------------------------------------------------------------------------------

function matches() {
  const asked = $("gene").value.trim().toUpperCase();
  if (tab === "programs") {
    return programs.filter((p) => (p.name + " " + p.genes).toUpperCase().includes(asked));
  }
  if (!asked) return genes;
  const first = [], then = [];
  for (let i = 0; i < genes.length; i++) {
    const at = upper[i].indexOf(asked);
    if (at === 0) (upper[i].length === asked.length ? first.unshift(genes[i]) : first.push(genes[i]));
    else if (at > 0) then.push(genes[i]);
  }
  return first.concat(then);
}

function list() {
  const found = matches(), rows = [];
  for (const one of found.slice(0, WINDOW)) {
    const row = document.createElement("li");
    row.setAttribute("role", "option");
    row.dataset.key = tab === "programs" ? one.name : one;
    if (tab === "programs") row.append(text("span", one.name + "  " + one.genes, "name program"));
    else {
      const r = evidence.pearson?.[positions.get(one)];
      row.append(text("span", one, "name"));
      if (r != null) {
        const bar = text("span", "", "r"), fill = document.createElement("i");
        fill.style.width = 100 * Math.max(0, r) + "%";
        bar.append(fill);
        row.append(bar, text("span", r.toFixed(2), "quiet"));
      } else if (evidence.pearson) row.append(text("span", "no evidence", "quiet"));
    }
    row.addEventListener("click", () => { tab === "programs" ? showProgram(one) : showGene(one); });
    rows.push(row);
  }
  if (found.length > WINDOW) rows.push(text("li", (found.length - WINDOW).toLocaleString("en") + " more: type to find them", "more"));
  if (!found.length) rows.push(text("li", "Nothing here is called that.", "more"));
  $("list").replaceChildren(...rows);
  mark();
}

function mark() {
  for (const row of $("list").children) {
    row.setAttribute("aria-selected", String(shown != null && shown.kind !== "novelty" && row.dataset.key === shown.key));
  }
}

function typed() {
  list();
  if (tab !== "genes") return;
  const asked = $("gene").value.trim().toUpperCase(), found = matches()[0];
  if (asked && found && found.toUpperCase() === asked && shown?.key !== found) showGene(found);
}

function open(name) {
  tab = name;
  for (const one of ["genes", "programs", "novelty"]) $("tab-" + one)?.setAttribute("aria-selected", String(one === name));
  $("find").hidden = name === "novelty";
  $("novelty-text").hidden = name !== "novelty";
  $("gene").value = "";
  $("gene").placeholder = name === "programs" ? "Find a program by its genes" : "Type one of " + genes.length.toLocaleString("en") + " genes";
  $("order").textContent = name === "programs" ? "The most variable first, named by their top genes."
    : evidence.pearson ? "The most trusted first: r on held-out tissue." : "In the order of the map: no gene has held-out evidence.";
  list();
  if (name === "novelty") showNovelty();
  else if (name === "programs") showProgram(programs[0]);
  else if (shown?.kind !== "gene") showGene(genes[0]);
}

function move(by) {
  const rows = [...$("list").children].filter((row) => row.dataset.key);
  if (!rows.length) return;
  const at = rows.findIndex((row) => row.getAttribute("aria-selected") === "true");
  const row = rows[at < 0 ? 0 : Math.min(rows.length - 1, Math.max(0, at + by))];
  row.click();
  row.scrollIntoView({ block: "nearest" });
}

// ---- pan and zoom --------------------------------------------------------------------------------------------------

const viewer = $("viewer"), stage = $("stage");
const [x0, y0, x1, y1] = meta.box;
let zoom = 1, left = 0, top_ = 0, least = 1; // screen pixels for each unit; screen position of the box's corner

function place() {
  stage.style.transform = `translate(${left}px, ${top_}px) scale(${zoom}) translate(${-x0}px, ${-y0}px)`;
  canvas.classList.toggle("pixels", zoom * meta.side > 3);
  const wanted = 110 / zoom, power = 10 ** Math.floor(Math.log10(wanted));
  const length = power * [5, 2, 1].find((m) => m * power <= wanted);
  $("scale").style.width = length * zoom + "px";
  $("scale-text").textContent = meta.unit === "µm" && length >= 1000 ? length / 1000 + " mm" : length + " " + meta.unit;
}

function fit() {
  const { clientWidth: w, clientHeight: h } = viewer;
  zoom = least = Math.min(w / (x1 - x0), h / (y1 - y0));
  left = (w - (x1 - x0) * zoom) / 2;
  top_ = (h - (y1 - y0) * zoom) / 2;
  place();
}

function zoomAt(factor, x, y) {
  const next = Math.min(Math.max(zoom * factor, least / 2), 60 / meta.side);
  left = x - (x - left) * next / zoom;
  top_ = y - (y - top_) * next / zoom;
  zoom = next;
  place();
}

const middle = () => [viewer.clientWidth / 2, viewer.clientHeight / 2];
const down = new Map();
const local = (event) => { const r = viewer.getBoundingClientRect(); return [event.clientX - r.left, event.clientY - r.top]; };

viewer.addEventListener("pointerdown", (event) => { viewer.setPointerCapture(event.pointerId); down.set(event.pointerId, local(event)); });
for (const name of ["pointerup", "pointercancel"]) viewer.addEventListener(name, (event) => down.delete(event.pointerId));
viewer.addEventListener("pointermove", (event) => {
  const [x, y] = local(event), before = down.get(event.pointerId);
  if (before && down.size === 1) {
    left += x - before[0]; top_ += y - before[1];
    place();
  } else if (before && down.size === 2) {
    const other = [...down].find(([id]) => id !== event.pointerId)[1];
    const ratio = Math.hypot(x - other[0], y - other[1]) / Math.max(1, Math.hypot(before[0] - other[0], before[1] - other[1]));
    left += (x - before[0]) / 2; top_ += (y - before[1]) / 2;
    zoomAt(ratio, (x + other[0]) / 2, (y + other[1]) / 2);
  }
  if (before) down.set(event.pointerId, [x, y]);
  point(x, y);
});
viewer.addEventListener("pointerleave", () => { $("pointer").hidden = true; });
viewer.addEventListener("wheel", (event) => {
  event.preventDefault();
  zoomAt(Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : 0.0015)), ...local(event));
}, { passive: false });
viewer.addEventListener("dblclick", (event) => zoomAt(2, ...local(event)));
viewer.addEventListener("keydown", (event) => {
  const act = { "+": () => zoomAt(1.5, ...middle()), "=": () => zoomAt(1.5, ...middle()), "-": () => zoomAt(1 / 1.5, ...middle()), 0: fit,
    ArrowLeft: () => { left += 60; place(); }, ArrowRight: () => { left -= 60; place(); },
    ArrowUp: () => { top_ += 60; place(); }, ArrowDown: () => { top_ -= 60; place(); } }[event.key];
  if (act) { event.preventDefault(); act(); }
});

function squareAt(x, y) {
  const u = (x - left) / zoom + x0, v = (y - top_) / zoom + y0;
  const [a, b, c, d, e, f] = meta.map_matrix, det = a * d - b * c;
  const col = Math.floor((d * (u - e) - c * (v - f)) / det), row = Math.floor((a * (v - f) - b * (u - e)) / det);
  return [u, v, col >= 0 && row >= 0 && col < cols && row < meta.rows ? data.index[row * cols + col] : -1];
}

function point(x, y) {
  if (!shown) return;
  const [u, v, i] = squareAt(x, y), box = $("pointer");
  const words = [`x ${Math.round(u)}, y ${Math.round(v)} ${meta.unit}`];
  if (i >= 0) {
    words.push(`${shown.title} ${brief(shown.values[i])}` + (shown.errors ? ` ± ${brief(shown.errors[i])} CP10k` : ""));
    words.push(`all transcripts ${brief(decode(data.total[i], meta.total_top))} × the training average`);
    if (data.novelty && shown.kind !== "novelty" && data.novelty[i] !== 255) words.push(`novelty ${Math.round(data.novelty[i] / 2)}`);
  } else words.push("no prediction here");
  box.textContent = words.join(" · ");
  box.hidden = false;
}

// ---- start ---------------------------------------------------------------------------------------------------------

function wire() {
  $("gene").addEventListener("input", typed);
  $("gene").addEventListener("keydown", (event) => {
    if (event.key === "ArrowDown" || event.key === "ArrowUp") { event.preventDefault(); move(event.key === "ArrowDown" ? 1 : -1); }
    if (event.key === "Enter") $("list").querySelector("[data-key]")?.click();
  });
  for (const name of ["genes", "programs", "novelty"]) $("tab-" + name)?.addEventListener("click", () => open(name));
  for (const id of ["opacity", "hide"]) $(id)?.addEventListener("input", draw);
  $("in").addEventListener("click", () => zoomAt(1.5, ...middle()));
  $("out").addEventListener("click", () => zoomAt(1 / 1.5, ...middle()));
  $("fit").addEventListener("click", fit);
  new ResizeObserver(fit).observe(viewer);
}

async function start() {
  canvas.style.transform = `matrix(${meta.map_matrix})`;
  if ($("picture")) $("picture").style.transform = `matrix(${meta.picture_matrix})`;
  fit();
  const K = meta.tops.length;
  const [map, high, low, total, novelty, packed] = await Promise.all([
    unpack("map", K, n), unpack("high", genes.length, K), unpack("low", genes.length, K), unpack("total", 1, n), unpack("novelty", 1, n),
    unpack("known", 1, Math.ceil(meta.rows * cols / 8)),
  ]);
  const places = new Uint32Array(n), index = new Int32Array(meta.rows * cols).fill(-1);
  for (let p = 0, i = 0; p < meta.rows * cols; p++) {
    if (packed[p >> 3] & (128 >> (p & 7))) { places[i] = p; index[p] = i++; }
  }
  data = { map, high, low, total, novelty, places, index };
  const bar = $("bar").getContext("2d"), strip = bar.createImageData(256, 1);
  for (let i = 0; i < 256; i++) strip.data.set([...meta.colours.slice(3 * i, 3 * i + 3), 255], 4 * i);
  bar.putImageData(strip, 0, 0);
  $("rounding").textContent = "Values are rounded to 8 bits, in finer steps where they are low. Below the colours stands how far this moves a value "
    + "within their range at most; beside the pointer, how far it may have moved the value there.";
  wire();
  open("genes");
  const named = decodeURIComponent(location.hash.slice(1));
  showGene(positions.has(named) ? named : genes[0]);
}

window.pixnet = { ready: start(), values: valuesOf, errors: errorsOf, shown: () => shown, places: () => data.places };
})();
