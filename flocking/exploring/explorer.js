// A recording in a browser: a text's tokens against the neurons of a layer, and what is kept.
//
// One module for notebooks, where anywidget calls `render`, and for saved pages, which call
// `fromPage`. Texts are only ever set as text. Python sends energies by window, and relative
// activations by token where there are some; what is computed here is the arithmetic of
// flocking.statistic, select, captured_energy and jaccard, in double precision.

// ---- Measures ------------------------------------------------------------------------------

// Energy of a range of windows, one number for each neuron.
function energyOf(layer, first, last) {
  const sum = new Float64Array(layer.d);
  for (let w = first; w < last; w++) {
    for (let j = 0, at = w * layer.d; j < layer.d; j++, at++) sum[j] += layer.energy[at];
  }
  return sum;
}

// Neurons from the largest value on, ties from the lowest index on; each expert's by themselves.
function ranked(values, experts) {
  const width = values.length / experts;
  const order = Uint32Array.from(values, (_, j) => j);
  for (let e = 0; e < experts; e++) {
    order.subarray(e * width, (e + 1) * width).sort((a, b) => values[b] - values[a] || a - b);
  }
  return order;
}

// How many neurons of an expert are kept, as flocking.select counts them.
function keptCount(density, width) {
  return Math.floor(density * width + 1e-9);
}

// The kept neurons, 1 for each; none where the statistic is not a number.
function keep(order, values, density, experts) {
  const mask = new Uint8Array(values.length);
  if (values.some(Number.isNaN)) return mask;
  const width = values.length / experts, count = keptCount(density, width);
  for (let e = 0; e < experts; e++) {
    for (let n = 0; n < count; n++) mask[order[e * width + n]] = 1;
  }
  return mask;
}

// Share of the energy that is kept: of the numbers from `at` on, or of their squares.
function captured(mask, energy, at = 0, squared = false) {
  let kept = 0, all = 0;
  for (let j = 0; j < mask.length; j++) {
    const value = squared ? energy[at + j] * energy[at + j] : energy[at + j];
    all += value;
    if (mask[j]) kept += value;
  }
  return all > 0 ? kept / all : NaN;
}

// The mask without experts whose values are all zero: no token was routed to them, and they would
// keep their first neurons.
function reached(mask, values, experts) {
  const width = values.length / experts, left = mask.slice();
  for (let e = 0; e < experts; e++) {
    const [from, to] = [e * width, (e + 1) * width];
    if (!values.subarray(from, to).some((value) => value > 0)) left.fill(0, from, to);
  }
  return left;
}

function jaccard(a, b) {
  let both = 0, either = 0;
  for (let j = 0; j < a.length; j++) {
    both += a[j] & b[j];
    either += a[j] | b[j];
  }
  return either ? both / either : NaN;
}

// ---- Bytes ---------------------------------------------------------------------------------

let halves = null; // the value of each float16

function fromHalf() {
  if (halves) return halves;
  halves = new Float32Array(65536);
  for (let bits = 0; bits < 65536; bits++) {
    const sign = bits & 0x8000 ? -1 : 1, exponent = (bits >> 10) & 31, fraction = bits & 1023;
    if (exponent === 31) halves[bits] = fraction ? NaN : sign * Infinity;
    else if (exponent) halves[bits] = sign * 2 ** (exponent - 15) * (1 + fraction / 1024);
    else halves[bits] = sign * 2 ** -14 * (fraction / 1024);
  }
  return halves;
}

function bytesOf(buffer) {
  const view = buffer.buffer ? buffer : new DataView(buffer);
  // (A copy, since numbers must begin at a multiple of their size.)
  return view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength);
}

function layerOf(content, buffers, d) {
  const [energy, rows, specific] = buffers.map(bytesOf);
  const layer = { d, energy: new Float32Array(energy), rows: null, brightest: content.brightest };
  layer.specific = specific.byteLength ? new Float32Array(specific) : null;
  if (!rows.byteLength) return layer;
  layer.brightestRow = content.brightest_row;
  if (content.top) {
    const scale = Float32Array.from({ length: 256 }, (_, n) => content.top * (n / 255) ** 2);
    layer.rows = Float32Array.from(new Uint8Array(rows), (step) => scale[step]);
  } else {
    const value = fromHalf();
    layer.rows = Float32Array.from(new Uint16Array(rows), (bits) => value[bits]);
  }
  return layer;
}

// ---- Words ---------------------------------------------------------------------------------

const SEEN = { " ": "\u00b7", "\n": "\u21b5", "\t": "\u21e5", "\r": "\u240d" };
const seen = (text) => text.replace(/[ \n\t\r]/g, (one) => SEEN[one]);
// Where lines may end, and where they end.
const broken = (text) =>
  seen(text).replace(/\u00b7/g, "\u200b\u00b7").replace(/\u21b5/g, "\u21b5\n");
const cut = (text, most) => text.length > most ? `${text.slice(0, most - 1)}\u2026` : text;
const whole = (number) => number.toLocaleString("en-US");
const short = (number) => Number.isFinite(number) ? String(+number.toPrecision(4)) : "none";

function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in made && !name.startsWith("aria")) made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

function labelled(words, input, output = null) {
  const label = element("label", {}, element("span", {}, words), input);
  if (output) label.append(output);
  return label;
}

function drawn(tag, attributes, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

// ---- The explorer --------------------------------------------------------------------------

const READING = "Reading ...";
const WAITING = "Still reading. In a notebook that was opened again, run the cell first.";
const NOTHING = "This text has no token in the windows of this recording.";
const STRIP = 12, MARGIN = 76, HEIGHT = 420; // CSS pixels: what is kept, row names, the picture

class Explorer {
  constructor(about, ask, place) {
    this.about = about;
    this.ask = ask;
    this.answers = new Map();
    this.row = 0;
    this.neuron = 0;
    this.turn = 0;
    this.wanted = "tokens";
    this.build(place);
    this.load();
  }

  // -- what is on the page

  build(place) {
    const { about } = this;
    const range = (max, value, change) => {
      const input = element("input", { type: "range", min: 0, max, step: 1, value });
      input.addEventListener("input", change);
      return input;
    };
    const choice = (options, change) => {
      const made = element("select");
      for (const [value, words] of options) made.append(element("option", { value }, words));
      made.addEventListener("change", change);
      return made;
    };
    const said = () => element("output");
    const narrowest = Math.min(...about.layers.map(({ d_ff, experts }) => d_ff / experts));
    const least = Math.min(1, Math.ceil(100 / narrowest - 1e-9) / 100);

    this.text = choice(about.sequences.map((name, n) => [n, name]), () => this.load());
    const first = Math.max(0, about.layers.findIndex(({ rows }) => rows));
    this.layer = range(about.layers.length - 1, first, () => this.load());
    this.layerSaid = said();
    this.from = range(1, 0, () => this.choose("from"));
    this.fromSaid = said();
    this.to = range(1, 1, () => this.choose("to"));
    this.toSaid = said();
    this.density = range(1, 0.5, () => this.select());
    Object.assign(this.density, { min: least, step: 0.01, value: 0.5 });
    this.densitySaid = said();
    this.order = choice(
      [["position", "position"], ["energy", "energy in the prompt"], ["specific", "specificity"]],
      () => this.arrange(),
    );
    if (about.specific) this.order.lastChild.disabled = true;
    this.shown = choice([["tokens", "tokens"], ["windows", "windows"]], () => this.rowsChanged());
    const counts = [[0, "all"], [1024, "1,024"], [256, "256"], [64, "64"]];
    this.across = choice(counts, () => this.view());
    this.down = choice([[0, "all"], [96, "96"], [24, "24"]], () => this.view());
    this.first = range(0, 0, () => this.scroll());
    this.dim = element("input", { type: "checkbox" });
    this.dim.addEventListener("change", () => this.draw());

    this.canvas = element("canvas", {
      tabIndex: 0,
      role: "application",
      "aria-label": "Picture of relative activations: arrow keys go from neuron to neuron and from "
        + "row to row, Page Up and Page Down ten rows, Home and End to the ends of the row.",
    });
    this.canvas.addEventListener("keydown", (event) => this.key(event));
    this.canvas.addEventListener("pointermove", (event) => this.point(event));
    this.canvas.addEventListener("pointerdown", (event) => this.point(event));
    this.readout = element("output", { className: "readout", "aria-live": "off" });
    this.status = element("p", { className: "status", role: "status" });
    this.scale = element("p", { className: "scale" });
    this.numbers = element("dl");
    this.chart = drawn("svg", { viewBox: "0 0 320 170", role: "img" });
    this.chartSaid = element("p", { className: "legend" });
    this.words = element("p", { className: "tokens" });
    this.words.addEventListener("pointerover", (event) => this.pointWord(event));
    this.words.addEventListener("click", (event) => this.pointWord(event));
    this.notes = element("ul", { className: "notes" });
    for (const note of [...about.notes, ...(about.specific ? [about.specific] : [])]) {
      this.notes.append(element("li", {}, note));
    }
    this.root = element("div", { className: "flocking-explorer" },
      element("h2", {}, about.model || "Recording"),
      element("div", { className: "controls" },
        labelled("Text", this.text),
        labelled("Layer", this.layer, this.layerSaid),
        labelled("Prompt from", this.from, this.fromSaid),
        labelled("Prompt up to", this.to, this.toSaid),
        labelled("Density", this.density, this.densitySaid),
        labelled("Sort neurons by", this.order),
        labelled("Rows", this.shown),
        labelled("Rows in view", this.down),
        labelled("Neurons in view", this.across),
        labelled("First neuron", this.first),
        element("label", { className: "check" }, this.dim, "Dim what is not kept"),
      ),
      this.status,
      element("div", { className: "panels" },
        element("div", { className: "picture" }, this.canvas, this.readout, this.scale),
        element("div", { className: "aside" },
          this.numbers, element("div", {}, this.chart, this.chartSaid)),
      ),
      this.notes,
      element("h3", {}, "Text"),
      element("p", { className: "legend" }, "Underlined: the prompt. The stronger the bar below a "
        + "later token, the more of its energy the kept neurons miss; half and more is strongest."),
      this.words,
    );
    for (const [name, value] of Object.entries(about.colours)) {
      if (name !== "map") this.root.style.setProperty(`--${name}`, value);
    }
    place.append(this.root);
    this.resized = new ResizeObserver(() => this.view());
    this.resized.observe(this.canvas);
    this.theme = matchMedia("(prefers-color-scheme: dark)");
    // (JupyterLab hides everything while it changes its theme, and loads the colours later.)
    this.redraw = () => [0, 300, 1500].forEach((wait) => setTimeout(() => this.draw(), wait));
    this.theme.addEventListener("change", this.redraw);
    this.switched = new MutationObserver(this.redraw); // of JupyterLab's own theme
    this.switched.observe(document.body, { attributeFilter: ["data-jp-theme-light"] });
  }

  remove() {
    this.resized.disconnect();
    this.switched.disconnect();
    this.theme.removeEventListener("change", this.redraw);
    this.root.remove();
  }

  // -- data

  async get(key) {
    if (this.answers.has(key)) {
      const found = this.answers.get(key);
      this.answers.delete(key);
      this.answers.set(key, found); // the last ones that were used stay
      return found;
    }
    const answer = await this.ask(key);
    this.answers.set(key, answer);
    while (this.answers.size > 8) this.answers.delete(this.answers.keys().next().value);
    return answer;
  }

  async load() {
    const turn = ++this.turn, { about } = this;
    const text = +this.text.value, layer = +this.layer.value;
    const { label, d_ff, experts } = about.layers[layer];
    this.layerSaid.textContent = label;
    this.layer.setAttribute("aria-valuetext", `layer ${label}`);
    this.say(READING);
    setTimeout(() => {
      if (this.status.textContent === READING) this.say(WAITING);
    }, 8000);
    try {
      const words = await this.get(`text/${text}`);
      const sent = await this.get(`layer/${text}/${layer}`);
      if (turn !== this.turn) return;
      if (!words.content.windows.length) {
        this.clear();
        this.say(NOTHING);
        return;
      }
      if (!sent.layer) sent.layer = layerOf(sent.content, sent.buffers, d_ff);
      sent.buffers = null;
      const other = this.words.dataset.text !== String(text);
      this.data = sent.layer;
      this.experts = experts;
      this.told = words.content;
      if (other) this.newText(text);
      this.root.dataset.ready = `${text}/${layer}`;
    } catch (problem) {
      if (turn === this.turn) this.say(problem.message);
      return;
    }
    this.rowsChanged(true);
    this.choose("to");
  }

  // Nothing is shown any longer.
  clear() {
    this.data = this.image = null;
    this.words.replaceChildren();
    this.words.dataset.text = "";
    for (const part of [this.numbers, this.chart, this.chartSaid, this.readout, this.scale]) {
      part.replaceChildren();
    }
    this.fromSaid.textContent = this.toSaid.textContent = "";
    delete this.root.dataset.ready;
    this.canvas.width = this.canvas.height = 0;
  }

  say(words) {
    this.status.textContent = words;
    this.root.setAttribute("aria-busy", words === READING || words === WAITING);
  }

  newText(text) {
    const { tokens, windows, phases } = this.told;
    const spans = document.createDocumentFragment(); // (a text may have more than a call takes)
    tokens.forEach((word, n) => {
      const span = element("span", {}, word === "" ? "\u25a1" : broken(word));
      span.dataset.token = n;
      spans.append(span);
    });
    this.words.replaceChildren(spans);
    this.words.dataset.text = text;
    this.ends = [0];
    for (const count of windows) this.ends.push(this.ends.at(-1) + count);
    const last = windows.length;
    this.from.max = last - 1;
    Object.assign(this.to, { min: 1, max: last });
    const generated = phases.indexOf("generation");
    this.from.value = 0;
    this.to.value = generated > 0 ? generated : Math.max(1, Math.ceil(last / 2));
    this.row = 0;
  }

  // -- the prompt and the density

  choose(moved) {
    if (!this.data) return;
    let from = +this.from.value, to = +this.to.value;
    if (from >= to && moved === "from") this.to.value = to = from + 1;
    if (from >= to) this.from.value = from = to - 1;
    const [start, stop, end] = [this.ends[from], this.ends[to], this.ends.at(-1)];
    this.fromSaid.textContent = `token ${whole(this.position(start))}`;
    this.toSaid.textContent = `token ${whole(this.position(stop - 1))}`;
    this.from.setAttribute("aria-valuetext", this.fromSaid.textContent);
    this.to.setAttribute("aria-valuetext", this.toSaid.textContent);
    const { data, experts } = this, windows = this.told.windows.length;
    this.range = { from, to, start, stop, end };
    this.statistic = energyOf(data, from, to).map(Math.sqrt);
    this.ranks = ranked(this.statistic, experts);
    this.later = to < windows ? energyOf(data, to, windows) : null;
    this.laterRanks = this.later && ranked(this.later, experts);
    this.cumulate();
    this.arrange(false);
    this.select();
  }

  // Sums over each later window's largest energies: what the best of any size would keep.
  cumulate() {
    const { data, experts } = this, width = data.d / experts;
    if (!data.best) data.best = new Map();
    for (let w = this.range.to; w < this.told.windows.length; w++) {
      if (data.best.has(w)) continue;
      const sums = new Float64Array(data.d);
      for (let e = 0; e < experts; e++) {
        const at = w * data.d + e * width;
        const part = Float64Array.from(data.energy.subarray(at, at + width)).sort().reverse();
        part.forEach((value, n) => { part[n] = value + (n ? part[n - 1] : 0); });
        sums.set(part, e * width);
      }
      data.best.set(w, sums);
    }
  }

  select() {
    if (!this.data) return;
    const density = +this.density.value, { experts, later } = this;
    this.kept = keep(this.ranks, this.statistic, density, experts);
    this.densitySaid.textContent = density.toFixed(2);
    const own = later && keep(this.laterRanks, later, density, experts);
    const count = this.kept.reduce((sum, one) => sum + one, 0);
    const { start, stop, end } = this.range;
    const span = (a, b) => `${whole(this.position(a))} to ${whole(this.position(b - 1))}`;
    const share = later ? captured(this.kept, later) : NaN;
    const rows = [
      ["prompt", "Prompt: tokens", span(start, stop)],
      ["kept", "Neurons kept", count, `${whole(count)} of ${whole(this.kept.length)}`],
    ];
    if (later) {
      const both = (mask) => reached(reached(mask, this.statistic, experts), later, experts);
      rows.push(
        ["later", "Later tokens", span(stop, end)],
        ["captured", "Captured energy of later tokens", share],
        ["missed", "Missed", 1 - share],
        ["best", "Captured by the best in hindsight", captured(own, later)],
        ["density", "Captured by chance", density],
        ["jaccard", "Jaccard overlap with what later tokens select", jaccard(both(this.kept), both(own))],
        ["chance", "Overlap by chance", density / (2 - density)],
      );
    }
    this.numbers.replaceChildren();
    for (const [name, words, value, text] of rows) {
      const shown = text || (typeof value === "number" ? short(value) : value);
      const cell = element("dd", {}, shown);
      cell.dataset.number = name;
      cell.dataset.value = value;
      this.numbers.append(element("dt", {}, words), cell);
    }
    if (!later) this.numbers.append(element("dt", {}, "No later tokens: choose a shorter prompt."));
    this.plot(density);
    this.judge();
    this.draw();
    this.read();
  }

  // Captured energy by window after the prompt.
  plot(density) {
    const { data, experts, kept, chart } = this, { to } = this.range, { windows } = this.told;
    const x = (token) => 34 + 278 * token / this.ends.at(-1), y = (share) => 140 - 130 * share;
    const width = data.d / experts, count = keptCount(density, width);
    const ours = [], best = [];
    this.byWindow = [];
    for (let w = to; w < windows.length; w++) {
      const place = x((this.ends[w] + this.ends[w + 1]) / 2), sums = data.best.get(w);
      let top = 0, all = 0;
      for (let e = 0; e < experts; e++) {
        if (count) top += sums[e * width + count - 1];
        all += sums[(e + 1) * width - 1];
      }
      const share = captured(kept, data.energy.subarray(w * data.d, (w + 1) * data.d));
      this.byWindow[w] = share;
      ours.push([place, y(share)]);
      best.push([place, y(top / all)]);
    }
    const line = (points, name) => drawn("polyline", { class: name, points: points.join(" ") });
    const label = (text, at, up, anchor) =>
      drawn("text", { x: at, y: up, "text-anchor": anchor }, text);
    chart.replaceChildren(
      drawn("rect", {
        class: "prompt", x: x(this.range.start), y: 10,
        width: x(this.range.stop) - x(this.range.start), height: 130,
      }),
      drawn("path", { class: "axis", d: `M34 10V140H312` }),
      drawn("path", { class: "chance", d: `M34 ${y(density)}H312` }),
      line(best, "best"), line(ours, "ours"),
      ...ours.map(([cx, cy]) => drawn("circle", { class: "ours", cx, cy, r: 2.2 })),
      label("1", 29, 14, "end"), label("0", 29, 143, "end"),
      label(whole(this.position(0)), 34, 154, "start"),
      label(whole(this.position(this.ends.at(-1) - 1)), 312, 154, "end"),
      label("token", 173, 166, "middle"),
    );
    const shares = this.byWindow.map(short).filter(Boolean);
    chart.setAttribute("aria-label", shares.length
      ? `Captured energy of the ${shares.length} windows after the prompt: ${shares.join(", ")}`
      : "No window after the prompt");
    this.chartSaid.replaceChildren(
      "Captured energy of each later window: ",
      element("b", { className: "ours" }, "\u2014\u25cf\u2014"), " kept from the prompt, ",
      element("b", { className: "best" }, "\u2013\u00a0\u2013"), " best in hindsight, ",
      element("b", {}, "\u00b7\u00b7\u00b7"), " chance. Grey: the prompt.",
    );
  }

  // What the kept neurons miss of each row, and the bars below its tokens.
  judge() {
    const { data, kept } = this, { start, stop } = this.range;
    const rows = this.rows(), values = this.values();
    this.missed = rows.map((_, n) => 1 - captured(kept, values, n * data.d, this.byToken));
    const spans = this.words.children;
    rows.forEach(({ first, last }, n) => {
      for (let token = first; token < last; token++) {
        const prompt = token >= start && token < stop, later = token >= stop;
        spans[token].className = prompt ? "in-prompt" : later ? "later" : "before";
        const share = later && Number.isFinite(this.missed[n]) ? this.missed[n] : 0;
        spans[token].style.setProperty("--missed", share.toFixed(3));
      }
    });
  }

  // -- rows and columns

  rowsChanged(quiet = false) {
    if (!this.data) return;
    const there = this.data.rows !== null;
    this.shown.options[0].disabled = !there;
    this.shown.disabled = !there;
    if (!quiet) this.wanted = this.shown.value; // (of layers without tokens, none is asked)
    this.shown.value = there ? this.wanted : "windows";
    const token = this.rowsNow ? this.rowsNow[this.row]?.first ?? 0 : 0;
    this.byToken = this.shown.value === "tokens";
    this.rowsNow = null;
    this.row = Math.max(0, this.rows().findIndex(({ last }) => token < last));
    this.neuron = Math.min(this.neuron, this.data.d - 1);
    if (!quiet) {
      this.judge();
      this.view();
      this.read();
    }
  }

  // Tokens of each row, by their numbers in the text that is shown.
  rows() {
    if (this.rowsNow) return this.rowsNow;
    let first = 0;
    const counts = this.byToken ? this.told.rows : this.told.windows;
    this.rowsNow = counts.map((count) => ({ first, last: (first += count) }));
    return this.rowsNow;
  }

  // Values of each row: relative activations by token, or energies by window.
  values() {
    return this.byToken ? this.data.rows : this.data.energy;
  }

  // Relative activation of a row and neuron, the root mean square where it has several tokens.
  relative(row, neuron) {
    const value = this.values()[row * this.data.d + neuron];
    if (this.byToken) return value;
    const { first, last } = this.rows()[row];
    return Math.sqrt(value / (last - first));
  }

  position(token) {
    return this.told.places[token];
  }

  arrange(draw = true) {
    if (!this.data) return;
    const { data, about } = this, by = this.order.value;
    const values = { energy: this.statistic, specific: data.specific }[by];
    const told = [];
    const name = this.layerSaid.textContent;
    if (!data.rows) told.push(`Layer ${name} has no rows of tokens: rows are windows.`);
    if (by === "specific" && !values) {
      told.push(about.specific || "This text has no specificity: it is too short.");
    }
    this.say(told.join(" "));
    this.columns = values ? ranked(values, 1) : Uint32Array.from({ length: data.d }, (_, j) => j);
    this.places = new Uint32Array(data.d);
    this.columns.forEach((neuron, place) => { this.places[neuron] = place; });
    if (draw) {
      this.view();
      this.read();
    } else this.frame();
  }

  view() {
    if (!this.data || !this.columns) return;
    this.frame();
    this.draw();
  }

  scroll() {
    if (!this.data) return;
    this.left = +this.first.value;
    const place = this.places[this.neuron], last = this.left + this.width - 1;
    this.neuron = this.columns[Math.min(Math.max(place, this.left), last)];
    this.paint();
    this.draw();
    this.read();
  }

  // What part of rows and columns is in view, so that the current ones are.
  frame() {
    const { d } = this.data, rows = this.rows().length, place = this.places[this.neuron];
    this.width = Math.min(d, +this.across.value || d);
    this.height = Math.min(rows, +this.down.value || rows);
    const within = (start, size, all, at) => {
      let kept = Math.min(Math.max(start || 0, 0), all - size);
      if (at < kept || at >= kept + size) kept = at - Math.floor(size / 2);
      return Math.min(Math.max(kept, 0), all - size);
    };
    this.left = within(this.left, this.width, d, place);
    this.top = within(this.top, this.height, rows, this.row);
    this.first.max = d - this.width;
    this.first.value = this.left;
    this.first.disabled = this.width === d;
    this.first.setAttribute("aria-valuetext", `neuron ${whole(this.left)} of this order`);
    this.paint();
  }

  // -- drawing

  // The picture itself, a pixel for each cell or for several; colours stand for their mean.
  paint() {
    const { data, columns, left, top, width, height } = this;
    const box = this.canvas.clientWidth - MARGIN, dots = window.devicePixelRatio || 1;
    if (box <= 0) return;
    const wide = Math.min(width, Math.round(box * dots));
    const tall = Math.min(height, Math.round(HEIGHT * dots));
    const sums = new Float32Array(wide * tall), counts = new Uint32Array(wide * tall);
    for (let r = 0; r < height; r++) {
      const line = Math.floor(r * tall / height) * wide, row = top + r;
      const values = this.values(), at = row * data.d, { first, last } = this.rows()[row];
      for (let c = 0; c < width; c++) {
        const value = values[at + columns[left + c]], cell = line + Math.floor(c * wide / width);
        sums[cell] += this.byToken ? value : Math.sqrt(value / (last - first));
        counts[cell]++;
      }
    }
    const most = this.byToken ? data.brightestRow : data.brightest;
    const image = new ImageData(wide, tall), { map } = this.about.colours;
    if (!this.shades) {
      this.shades = Uint8Array.from({ length: 768 }, (_, n) => parseInt(map.substr(2 * n, 2), 16));
    }
    sums.forEach((sum, cell) => {
      const shade = Math.min(255, Math.floor(256 * (sum / counts[cell] || 0) / most));
      for (let n = 0; n < 3; n++) image.data[4 * cell + n] = this.shades[3 * shade + n];
      image.data[4 * cell + 3] = 255;
    });
    this.image = document.createElement("canvas");
    Object.assign(this.image, { width: wide, height: tall });
    this.image.getContext("2d").putImageData(image, 0, 0);
    const each = (cells, pixels, words) => cells > pixels
      ? `A pixel is the mean of up to ${Math.ceil(cells / pixels)} ${words}.` : "";
    const bar = element("span", { className: "bar" });
    const stops = [0, 64, 128, 192, 255].map((n) => `#${map.substr(6 * n, 6)}`);
    bar.style.background = `linear-gradient(90deg, ${stops.join(", ")})`;
    this.scale.replaceChildren(
      "0 ", bar, ` ${short(most)} or more: relative activation |z| / \u2016z\u2016`,
      this.byToken && this.told.rows.length === this.told.tokens.length ? "" : ", root mean square",
      `. ${each(width, wide, "neurons")} ${each(height, tall, "rows")}`,
    );
  }

  draw() {
    const { canvas, kept } = this, dots = window.devicePixelRatio || 1;
    const wide = canvas.clientWidth, tall = STRIP + 4 + HEIGHT + 18;
    if (!this.image || !kept || wide <= MARGIN) return;
    canvas.width = Math.round(wide * dots);
    canvas.height = Math.round(tall * dots);
    const paper = canvas.getContext("2d"), style = getComputedStyle(this.root);
    const colour = (name) => style.getPropertyValue(name).trim();
    const box = wide - MARGIN, top = STRIP + 4;
    const across = box / this.width, down = HEIGHT / this.height;
    paper.scale(dots, dots);
    paper.imageSmoothingEnabled = false;
    paper.drawImage(this.image, MARGIN, top, box, HEIGHT);
    for (let start = 0, n = 1; n <= this.width; n++) { // runs of kept and of other neurons
      const is = kept[this.columns[this.left + start]];
      if (n < this.width && kept[this.columns[this.left + n]] === is) continue;
      paper.fillStyle = is ? colour("--kept") : colour("--pale");
      paper.fillRect(MARGIN + start * across, 0, (n - start) * across, STRIP);
      if (!is && this.dim.checked) {
        paper.fillStyle = colour("--veil");
        paper.fillRect(MARGIN + start * across, top, (n - start) * across, HEIGHT);
      }
      start = n;
    }
    paper.fillStyle = colour("--ink");
    paper.font = `11px ${style.fontFamily}`;
    paper.textBaseline = "middle";
    paper.fillText("kept", 2, STRIP / 2 + 1);
    this.name(paper, down, top);
    paper.textAlign = "center";
    paper.fillText(this.order.value === "position" ? "neuron" : "neurons, sorted",
      MARGIN + box / 2, top + HEIGHT + 10);
    paper.textAlign = "left";
    paper.fillText(whole(this.left), MARGIN, top + HEIGHT + 10);
    paper.textAlign = "right";
    paper.fillText(whole(this.left + this.width - 1), wide - 1, top + HEIGHT + 10);
    this.mark(paper, across, down, top, box, colour);
  }

  // Names of rows where there is room, else positions; a bar beside the prompt.
  name(paper, down, top) {
    const rows = this.rows(), { start, stop } = this.range;
    const texts = this.byToken && down >= 11;
    const step = Math.ceil(16 / down);
    for (let r = 0; r < this.height; r++) {
      const { first, last } = rows[this.top + r], y = top + (r + 0.5) * down;
      if (first >= start && first < stop) {
        paper.fillRect(MARGIN - 5, top + r * down, 3, Math.max(down, 0.5));
      }
      if (r % step) continue;
      const words = texts && last - first === 1 ? cut(seen(this.told.tokens[first]), 10) : "";
      const number = this.position(first);
      paper.fillText(words || whole(number), 2, Math.max(y, top + 6), MARGIN - 9);
    }
  }

  // The current row and neuron.
  mark(paper, across, down, top, box, colour) {
    const c = this.places[this.neuron] - this.left, r = this.row - this.top;
    paper.strokeStyle = colour("--cursor");
    paper.lineWidth = 1.5;
    const wide = Math.max(across, 3), tall = Math.max(down, 3);
    const x = MARGIN + (c + 0.5) * across, y = top + (r + 0.5) * down;
    paper.beginPath();
    paper.moveTo(x, 0);
    paper.lineTo(x, y - tall / 2);
    paper.moveTo(MARGIN, y);
    paper.lineTo(x - wide / 2, y);
    paper.stroke();
    paper.strokeRect(x - wide / 2 - 1, y - tall / 2 - 1, wide + 2, tall + 2);
  }

  // -- pointing

  point(event) {
    if (!this.image) return;
    const box = this.canvas.getBoundingClientRect();
    const inside = (at, size, all) => Math.min(Math.max(Math.floor(at / size * all), 0), all - 1);
    const x = event.clientX - box.left - MARGIN, y = event.clientY - box.top - STRIP - 4;
    if (x < 0 || y < -STRIP - 4 || y > HEIGHT) return;
    this.neuron = this.columns[this.left + inside(x, box.width - MARGIN, this.width)];
    if (y >= 0) this.row = this.top + inside(y, HEIGHT, this.height);
    this.readout.setAttribute("aria-live", "off");
    this.moved(false);
  }

  pointWord(event) {
    const token = event.target.dataset.token;
    if (token === undefined || !this.data) return;
    this.row = this.rows().findIndex(({ last }) => +token < last);
    this.readout.setAttribute("aria-live", "off");
    this.moved(true);
  }

  key(event) {
    if (!this.data) return;
    const { d } = this.data, rows = this.rows().length, place = this.places[this.neuron];
    const steps = {
      ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1],
      PageUp: [0, -10], PageDown: [0, 10], Home: [-d, 0], End: [d, 0],
    };
    if (!(event.key in steps) || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    event.stopPropagation(); // a notebook has keys, too
    const [right, down] = steps[event.key];
    this.neuron = this.columns[Math.min(Math.max(place + right, 0), d - 1)];
    this.row = Math.min(Math.max(this.row + down, 0), rows - 1);
    this.readout.setAttribute("aria-live", "polite");
    this.moved(true);
  }

  moved(follow) {
    const [left, top] = [this.left, this.top];
    if (follow) {
      const place = this.places[this.neuron];
      if (place < left || place >= left + this.width || this.row < top
        || this.row >= top + this.height) this.frame();
    }
    this.draw();
    this.read();
  }

  // The numbers of the current row and neuron, and its tokens in the text.
  read() {
    const { first, last } = this.rows()[this.row], { neuron } = this;
    const number = this.relative(this.row, neuron), kept = this.kept[neuron] === 1;
    const words = this.told.tokens.slice(first, last).join("");
    const place = this.position(first), end = this.position(last - 1);
    const share = 1 - this.missed[this.row];
    const rank = this.columnsByStatistic(neuron);
    const parts = [
      last - first === 1 ? `token ${whole(place)}` : `tokens ${whole(place)} to ${whole(end)}`,
      ...(words ? [`\u201c${cut(seen(words), 40)}\u201d`] : []),
      `neuron ${whole(neuron)}`,
      `relative activation ${short(number)}`,
      kept ? "kept" : "not kept",
      `statistic ${short(this.statistic[neuron])} (rank ${whole(rank)})`,
      ...(this.data.specific ? [`specificity ${short(this.data.specific[neuron])}`] : []),
      `captured energy of this row ${short(share)}`,
    ];
    this.readout.textContent = parts.join(" \u00b7 ");
    Object.assign(this.readout.dataset, {
      row: this.row, token: place, neuron, relative: number, kept: +kept,
      statistic: this.statistic[neuron], captured: share,
    });
    for (const span of this.words.querySelectorAll(".here")) span.classList.remove("here");
    for (let token = first; token < last; token++) this.words.children[token].classList.add("here");
    const span = this.words.children[first], panel = this.words;
    if (span && !panel.matches(":hover")) {
      const at = span.offsetTop;
      if (at < panel.scrollTop || at > panel.scrollTop + panel.clientHeight - 24) {
        panel.scrollTop = at - panel.clientHeight / 2;
      }
    }
  }

  // The place of a neuron by the statistic, from 1 on; in a mixture, within its expert.
  columnsByStatistic(neuron) {
    if (this.rankedFrom !== this.ranks) {
      this.rankedFrom = this.ranks;
      this.rankOf = new Uint32Array(this.ranks.length);
      const width = this.ranks.length / this.experts;
      this.ranks.forEach((one, place) => { this.rankOf[one] = place % width + 1; });
    }
    return this.rankOf[neuron];
  }
}

// ---- In a notebook, and in a page ----------------------------------------------------------

function render({ model, el }) {
  const waiting = new Map();
  const answer = (message, buffers) => {
    const asked = waiting.get(message.key);
    if (!asked) return; // another view of the same widget asked for it
    waiting.delete(message.key);
    if (message.error) asked.fail(new Error(message.error));
    else asked.done({ content: JSON.parse(message.content), buffers });
  };
  model.on("msg:custom", answer);
  const ask = (key) => {
    if (!waiting.has(key)) {
      const asked = {};
      asked.promise = new Promise((done, fail) => Object.assign(asked, { done, fail }));
      waiting.set(key, asked);
      model.send({ key });
    }
    return waiting.get(key).promise;
  };
  const explorer = new Explorer(JSON.parse(model.get("about")), ask, el);
  return () => {
    model.off("msg:custom", answer);
    explorer.remove();
  };
}

function fromPage() {
  const text = (key) => document.querySelector(`script[data-key="${key}"]`)?.textContent;
  const ask = async (key) => {
    const buffers = [];
    for (let n = 0, found; (found = text(`${key}/${n}`)) !== undefined; n++) {
      if (key.startsWith("layer")) {
        buffers.push(Uint8Array.from(atob(found), (one) => one.charCodeAt(0)).buffer);
      } else break;
    }
    return { content: JSON.parse(text(key)), buffers };
  };
  new Explorer(JSON.parse(text("about")), ask, document.getElementById("flocking"));
}

export default { render };
