"use strict";
// Draws a report from the data in the page. What models wrote becomes text nodes, and nothing else.
(() => {
  // --- elements ---------------------------------------------------------------------------------

  const { el, svg, button, rich } = texts;
  const byId = (id) => document.getElementById(id);
  let ids = 0;
  const newId = (prefix) => `${prefix}-${(ids += 1)}`;
  const announce = (text) => { byId("status").textContent = text; };

  // --- data -------------------------------------------------------------------------------------

  async function unpack(id) {
    const text = byId(id).textContent;
    const bytes = Uint8Array.fromBase64 ? Uint8Array.fromBase64(text) : fromBase64(text);
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return JSON.parse(await new Response(stream).text());
  }

  function fromBase64(text) {
    const characters = atob(text);
    const bytes = new Uint8Array(characters.length);
    for (let i = 0; i < bytes.length; i += 1) bytes[i] = characters.charCodeAt(i);
    return bytes;
  }

  // The rows of one kind, in blocks that are unpacked when a row of theirs is asked for.
  class Rows {
    constructor(kind, starts, textsOf) {
      this.kind = kind;
      this.starts = starts;
      this.textsOf = textsOf;
      this.blocks = new Map();
      this.haystacks = null;
    }
    block(number) {
      if (!this.blocks.has(number)) this.blocks.set(number, unpack(`${this.kind}-${number}`));
      return this.blocks.get(number);
    }
    async row(index) {
      let number = this.starts.length - 1;
      while (this.starts[number] > index) number -= 1;
      return (await this.block(number))[index - this.starts[number]];
    }
    // Every row's text in lower case, for the search in texts.
    async texts() {
      if (!this.haystacks) {
        const found = [];
        for (let number = 0; number < this.starts.length; number += 1) {
          for (const row of await this.block(number)) found.push(this.textsOf(row).join("\n").toLowerCase());
        }
        this.haystacks = found;
      }
      return this.haystacks;
    }
  }

  // --- numbers ----------------------------------------------------------------------------------

  function number(value) {
    if (value === null || value === undefined) return "–";
    const size = Math.abs(value);
    if (size !== 0 && (size < 1e-3 || size >= 1e15)) return value.toExponential(2);
    if (size >= 1e9) return `${trim(value / 1e9)} G`;
    if (size >= 1e6) return `${trim(value / 1e6)} M`;
    if (Number.isInteger(value)) return value.toLocaleString("en");
    return trim(value);
  }
  const trim = (value) => {
    const digits = Math.abs(value) >= 10 ? 1 : 3;
    return value.toFixed(digits);
  };
  const formats = {
    number,
    raw: String,
    text: (value) => String(value),
    percent: (value) => `${(100 * value).toFixed(1)}%`,
    points: (value) => signed(100 * value, 1),
    gain: (value) => signed(value, 3),
    p: (value) => (value < 0.001 ? powerOfTen(value) : value.toFixed(3)),
  };
  const share = (value) => value.toFixed(2);
  const signed = (value, digits) => `${value > 0 ? "+" : ""}${value.toFixed(digits).replace("-", "−")}`;
  function powerOfTen(value) {
    const [digits, power] = value.toExponential(1).split("e-");
    return value === 0 ? "0" : `${digits} × 10⁻${[...power].map((d) => "⁰¹²³⁴⁵⁶⁷⁸⁹"[d]).join("")}`;
  }
  function duration(seconds) {
    if (seconds === null) return "–";
    const [h, m, s] = [Math.floor(seconds / 3600), Math.floor(seconds / 60) % 60, Math.round(seconds % 60)];
    if (h) return `${h} h ${m} min`;
    return m ? `${m} min ${s} s` : `${seconds < 10 ? seconds.toFixed(1) : s} s`;
  }

  // --- texts and mathematics --------------------------------------------------------------------

  const SHOWN_CHARACTERS = 10000;
  let asSource = false;

  // Returns a block with a text that a model wrote: its mathematics rendered, or its source.
  function textBlock(text, attributes = {}) {
    const node = el("div", { class: "said", ...attributes });
    const shown = text.slice(0, SHOWN_CHARACTERS);
    node.append(asSource ? shown : rich(shown));
    if (text.length > shown.length) {
      const more = button(`Show all ${number(text.length)} characters`, () => {
        node.replaceChildren(text);
      });
      node.append("… ", more);
    }
    return node;
  }
  // --- tables -----------------------------------------------------------------------------------

  function table(spec, caption = spec.title) {
    const head = spec.columns.map(([name, format]) =>
      name ? el("th", { scope: "col", class: format }, name) : el("td", { class: format }));
    const body = spec.rows.map((row) =>
      el("tr", {}, row.map((cell, i) => {
        const format = spec.columns[i][1];
        if (i === 0) return el("th", { scope: "row", class: format }, String(cell));
        return el("td", { class: format }, cellContent(cell, format));
      })));
    return el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": caption },
      el("table", {}, el("caption", { class: "unseen" }, caption),
        el("thead", {}, el("tr", {}, head)), el("tbody", {}, body)));
  }
  function cellContent(cell, format) {
    if (cell === null || cell === undefined) return el("span", { class: "muted" }, "–");
    if (!Array.isArray(cell)) return formats[format](cell);
    const [value, low, high] = cell;
    const inside = format === "percent" && low >= 0 && high <= 1;
    return [
      formats[format](value),
      el("span", { class: "interval" }, ` [${formats[format](low)}, ${formats[format](high)}]`.replaceAll("%", "")),
      inside && intervalBar(value, low, high),
    ];
  }
  function intervalBar(value, low, high) {
    const at = (x) => 1 + 62 * x;
    return svg("svg", { class: "mark", width: 64, height: 10, "aria-hidden": "true" },
      svg("line", { class: "axis", x1: 1, x2: 63, y1: 5, y2: 5 }),
      svg("line", { class: "reach", x1: at(low), x2: at(high), y1: 5, y2: 5 }),
      svg("circle", { cx: at(value), cy: 5, r: 3 }));
  }

  // --- charts -----------------------------------------------------------------------------------

  const WIDTH = innerWidth < 500 ? 330 : 460;
  const HEIGHT = 220;
  const AREA = { left: 52, right: 12, top: 12, bottom: 34 };

  function ticks(low, high, count = 4) {
    const rough = (high - low) / count || 1;
    const unit = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 2.5, 5, 10].map((m) => m * unit).find((s) => s >= rough);
    const found = [];
    for (let i = Math.floor(low / step + 1e-6); i <= Math.ceil(high / step - 1e-6); i += 1) found.push(Number((i * step).toPrecision(12)));
    return found;
  }
  function tickText(value, format) {
    if (format === "percent") return `${Number((100 * value).toPrecision(4))}%`;
    const size = Math.abs(value);
    if (size >= 1e6) return `${Number((value / 1e6).toPrecision(3))}M`;
    return size !== 0 && size < 1e-3 ? Number(value.toPrecision(3)).toExponential() : String(Number(value.toPrecision(4)));
  }
  const scaled = (low, high, from, to) => (value) => from + ((value - low) / (high - low || 1)) * (to - from);

  // A line that never changes says no more than its value.
  const isConstant = (spec) => spec.kind === "line" && spec.series.every((s) => s.x.length > 1 && s.y.every((y) => y === s.y[0]));
  function constants(charts) {
    if (!charts.length) return null;
    const found = charts.flatMap((spec) => spec.series.map((s) => `${s.name} ${formats[spec.format](s.y[0])}`));
    return el("p", { class: "constant" }, el("strong", {}, "The same at every step: "), found.join(", "));
  }
  function chart(spec) {
    const isBars = spec.kind === "bars";
    const values = spec.series.flatMap((s) => [...s.y, ...(s.low ?? []), ...(s.high ?? [])]);
    const yTicks = ticks(isBars ? 0 : Math.min(...values), Math.max(...values));
    const labels = isBars ? [...new Set(spec.series.flatMap((s) => s.x))] : null;
    const xs = isBars ? [0, labels.length] : spec.series.flatMap((s) => s.x);
    let [xLow, xHigh] = [xs.reduce((a, b) => Math.min(a, b)), xs.reduce((a, b) => Math.max(a, b))];
    if (spec.kind === "points") [xLow, xHigh] = [0, xHigh * 1.05];
    if (xLow === xHigh) [xLow, xHigh] = [xLow - 1, xHigh + 1];
    const x = scaled(xLow, xHigh, AREA.left, WIDTH - AREA.right);
    const y = scaled(yTicks[0], yTicks.at(-1), HEIGHT - AREA.bottom, AREA.top);
    const drawing = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, "aria-hidden": "true" });
    for (const tick of yTicks) {
      drawing.append(
        svg("line", { class: "grid", x1: AREA.left, x2: WIDTH - AREA.right, y1: y(tick), y2: y(tick) }),
        svg("text", { x: AREA.left - 6, y: y(tick) + 4, "text-anchor": "end" }, tickText(tick, spec.format)));
    }
    const xLabels = isBars
      ? labels.map((label, i) => [x(i + 0.5), label.replace(" and later", "+").split(" to ")[0]])
      : ticks(xLow, xHigh).filter((t) => t >= xLow && t <= xHigh).map((t) => [x(t), tickText(t, "number")]);
    const every = isBars ? Math.ceil(xLabels.length / 14) : 1;
    xLabels.forEach(([at, label], i) => {
      if (i % every === 0) drawing.append(svg("text", { x: at, y: HEIGHT - AREA.bottom + 15, "text-anchor": "middle" }, label));
    });
    drawing.append(svg("text", { class: "axis-name", x: WIDTH - AREA.right, y: HEIGHT - 4, "text-anchor": "end" }, spec.x));
    spec.series.forEach((s, i) => drawing.append(...({ bars, line, points })[spec.kind](s, i, spec, x, y, labels)));
    return figure(spec, drawing, x, labels);
  }
  function line(series, i, spec, x, y) {
    const path = series.x.map((value, k) => `${k ? "L" : "M"}${x(value).toFixed(1)} ${y(series.y[k]).toFixed(1)}`).join("");
    const nodes = [svg("path", { class: `series s${i % 6}`, d: path })];
    if (series.x.length === 1) nodes.push(svg("circle", { class: `dot s${i % 6}`, cx: x(series.x[0]), cy: y(series.y[0]), r: 3 }));
    return nodes;
  }
  function bars(series, i, spec, x, y, labels) {
    const width = ((x(1) - x(0)) * 0.8) / spec.series.length;
    return series.x.map((label, k) => {
      const left = x(labels.indexOf(label) + 0.1) + i * width;
      const top = y(series.y[k]);
      return svg("rect", { class: `bar s${i % 6}`, x: left, y: top, width: Math.max(1, width - 1), height: Math.max(0, y(0) - top) });
    });
  }
  function points(series, i, spec, x, y) {
    return series.x.flatMap((value, k) => [
      svg("line", { class: "reach", x1: x(value), x2: x(value), y1: y(series.low[k]), y2: y(series.high[k]) }),
      svg("circle", { class: "number-dot", cx: x(value), cy: y(series.y[k]), r: 8 }),
      svg("text", { class: "number-text", x: x(value), y: y(series.y[k]) + 4, "text-anchor": "middle" }, String(k + 1)),
    ]);
  }
  function legend(spec) {
    if (spec.kind === "points") {
      return el("ol", { class: "legend" }, spec.series[0].names.map((name) => el("li", {}, name)));
    }
    const sample = (i) => svg("svg", { width: 26, height: 10, "aria-hidden": "true" },
      spec.kind === "bars"
        ? svg("rect", { class: `bar s${i % 6}`, x: 6, y: 0, width: 14, height: 10 })
        : svg("line", { class: `series s${i % 6}`, x1: 0, x2: 26, y1: 5, y2: 5 }));
    return el("ul", { class: "legend" }, spec.series.map((s, i) => el("li", {}, sample(i), s.name)));
  }
  function chartTable(spec) {
    const format = spec.format;
    if (spec.kind === "points") {
      const s = spec.series[0];
      const rows = s.names.map((name, k) => [name, s.x[k], [s.y[k], s.low[k], s.high[k]]]);
      return { title: spec.title, columns: [["", "text"], [spec.x, "number"], [spec.y, format]], rows };
    }
    const keys = [...new Set(spec.series.flatMap((s) => s.x))];
    if (spec.kind === "line") keys.sort((a, b) => a - b);
    const every = Math.ceil(keys.length / 20);
    const kept = keys.filter((_, i) => i % every === 0 || i === keys.length - 1);
    const columns = [[spec.x, "text"], ...spec.series.map((s) => [s.name, format])];
    const rows = kept.map((key) => [
      typeof key === "number" ? number(Math.round(key)) : key,
      ...spec.series.map((s) => s.y[s.x.indexOf(key)] ?? null),
    ]);
    return { title: spec.title, columns, rows };
  }
  // A figure whose points the arrow keys walk along; a table stands beside each.
  function figure(spec, drawing, x, labels) {
    const longest = spec.series.reduce((a, b) => (b.x.length > a.x.length ? b : a));
    const last = longest.x.length - 1;
    const say = (k) => {
      const key = longest.x[k];
      const at = typeof key === "number" ? `${spec.x} ${number(spec.kind === "line" ? Math.round(key) : key)}` : `${spec.x} ${key}`;
      const found = spec.series.map((s) => [s.name, s.y[s.x.indexOf(key)]]).filter(([, v]) => v !== undefined);
      const name = spec.kind === "points" ? `${longest.names[k]}: ` : "";
      return `${name}${at}: ${found.map(([n, v]) => `${n} ${formats[spec.format](v)}`).join(", ")}`;
    };
    const cursor = svg("line", { class: "cursor", y1: AREA.top, y2: HEIGHT - AREA.bottom, visibility: "hidden" });
    drawing.append(cursor);
    const readout = el("p", { class: "readout", "aria-hidden": "true" }, say(last));
    const plot = el("div", {
      class: "plot", tabindex: "0", role: "slider", "aria-label": `${spec.title}: move along the points`,
      "aria-valuemin": 0, "aria-valuemax": last, "aria-valuenow": last, "aria-valuetext": say(last),
    }, drawing);
    const move = (k) => {
      const at = Math.max(0, Math.min(last, k));
      const key = longest.x[at];
      const position = labels ? x(labels.indexOf(key) + 0.5) : x(key);
      cursor.setAttribute("x1", position);
      cursor.setAttribute("x2", position);
      cursor.setAttribute("visibility", "visible");
      plot.setAttribute("aria-valuenow", at);
      plot.setAttribute("aria-valuetext", say(at));
      readout.textContent = say(at);
    };
    plot.addEventListener("keydown", (event) => {
      const now = Number(plot.getAttribute("aria-valuenow"));
      const leap = Math.max(1, Math.round(last / 10));
      const to = { ArrowRight: now + 1, ArrowUp: now + 1, ArrowLeft: now - 1, ArrowDown: now - 1, PageUp: now + leap, PageDown: now - leap, Home: 0, End: last }[event.key];
      if (to === undefined) return;
      event.preventDefault();
      move(to);
    });
    plot.addEventListener("pointermove", (event) => {
      const box = drawing.getBoundingClientRect();
      const at = ((event.clientX - box.left) / box.width) * WIDTH;
      let best = 0;
      longest.x.forEach((key, k) => {
        const place = (i) => (labels ? x(labels.indexOf(longest.x[i]) + 0.5) : x(longest.x[i]));
        if (Math.abs(place(k) - at) < Math.abs(place(best) - at)) best = k;
      });
      move(best);
    });
    const details = el("details", { class: "beside" }, el("summary", {}, "Table"));
    onOpen(details, () => details.append(table(chartTable(spec), `${spec.title}, as a table`)));
    return el("figure", { class: "chart" }, el("figcaption", {}, spec.title), plot, readout, legend(spec), details);
  }
  function onOpen(details, build) {
    details.addEventListener("toggle", () => {
      if (details.open && !details.dataset.built) {
        details.dataset.built = "yes";
        build();
      }
    });
  }

  // --- overview ---------------------------------------------------------------------------------

  function overviewView({ overview }) {
    const total = overview.runs.reduce((sum, run) => sum + (run.seconds ?? 0), 0);
    const open = overview.runs.filter((run) => !run.is_finished).length;
    const facts = [
      `${overview.runs.length} ${overview.runs.length === 1 ? "run" : "runs"}`,
      total ? duration(total) : null,
      open ? `${open} not finished` : "all finished",
    ].filter(Boolean).join(" · ");
    return el("div", { class: "page" },
      el("h1", {}, overview.title),
      el("p", { class: "lead" }, facts),
      notices(overview.notices),
      overview.tables.map((spec) => el("section", {}, el("h2", {}, spec.title), table(spec), spec.note && el("p", { class: "note" }, spec.note))),
      el("section", {}, el("h2", {}, "What ran"), runsTable(overview.runs)),
      overview.runs.map((run) => runDetails(run, overview.runs.length === 1 || run.stage === "train-judge")));
  }
  function notices(found) {
    if (!found.length) return null;
    return el("section", { class: "notices" }, el("h2", {}, "What this report does not show"),
      el("ul", {}, found.map((notice) => el("li", {}, notice))));
  }
  function runsTable(runs) {
    const head = ["run", "stage", "state", "took", "steps", "wrote"].map((name) => el("th", { scope: "col" }, name));
    const rows = runs.map((run) => {
      const open = button(run.name, () => {
        const details = byId(`run-${runs.indexOf(run)}`);
        details.open = true;
        details.scrollIntoView();
        details.querySelector("summary").focus();
      }, { class: "link" });
      return el("tr", {},
        el("th", { scope: "row", class: "text" }, open),
        el("td", { class: "text" }, run.stage),
        el("td", { class: "text" }, state(run)),
        el("td", { class: "number" }, duration(run.seconds)),
        el("td", { class: "number" }, run.steps === null ? "–" : number(run.steps)),
        el("td", { class: "text" }, run.wrote.map(([kind, count]) => `${number(count)} ${kind}`).join(", ") || "–"));
    });
    return el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "What ran" },
      el("table", {}, el("thead", {}, el("tr", {}, head)), el("tbody", {}, rows)));
  }
  const state = (run) => (run.is_finished ? "finished" : el("strong", { class: "warn" }, "not finished"));
  function runDetails(run, isOpen) {
    const number_ = view.data.overview.runs.indexOf(run);
    const details = el("details", { class: "run", id: `run-${number_}` },
      el("summary", {}, el("span", { class: "run-name" }, run.name), el("span", { class: "muted" },
        ` ${run.stage} · ${duration(run.seconds)}`), run.is_finished ? null : el("strong", { class: "warn" }, " not finished")));
    onOpen(details, () => {
      const pairs = (found, show) => el("dl", { class: "facts" }, found.map(([name, value]) =>
        el("div", {}, el("dt", {}, name), el("dd", {}, show(value)))));
      const settings = el("details", { class: "beside" }, el("summary", {}, "All settings"));
      onOpen(settings, () => settings.append(el("pre", { tabindex: "0" }, run.settings)));
      details.append(
        pairs([["directory", run.path], ...run.reads], String),
        ...run.tables.map((spec) => el("section", {}, el("h3", {}, spec.title), table(spec, `${run.name}: ${spec.title}`), el("p", { class: "note" }, spec.note))),
        el("div", { class: "charts" }, run.charts.filter((spec) => !isConstant(spec)).map(chart)),
        constants(run.charts.filter(isConstant)) ?? "",
        run.numbers.length ? el("section", {}, el("h3", {}, "Numbers of its summary"), pairs(run.numbers, number)) : "",
        settings);
    });
    if (isOpen) details.open = true;
    return details;
  }

  // --- a list of many rows ----------------------------------------------------------------------

  const ROW = 60;

  // A list box that holds only the rows in sight.
  class VirtualList {
    constructor(label, rowContent, onSelect) {
      this.rows = [];
      this.selected = -1;
      this.rowContent = rowContent;
      this.onSelect = onSelect;
      this.prefix = newId("row");
      this.spacer = el("div", { class: "spacer", role: "presentation" });
      this.node = el("div", { class: "list", role: "listbox", tabindex: "0", "aria-label": label }, this.spacer);
      this.node.addEventListener("scroll", () => this.draw(), { passive: true });
      this.node.addEventListener("keydown", (event) => this.key(event));
      this.node.addEventListener("click", (event) => {
        const row = event.target.closest("[role=option]");
        if (row) this.select(Number(row.dataset.at), true);
      });
      new ResizeObserver(() => this.draw()).observe(this.node);
    }
    show(rows) {
      this.rows = rows;
      this.spacer.style.height = `${rows.length * ROW}px`;
      this.node.scrollTop = 0;
      this.drawn = null;
      this.draw();
    }
    draw() {
      const first = Math.max(0, Math.floor(this.node.scrollTop / ROW) - 6);
      const last = Math.min(this.rows.length, Math.ceil((this.node.scrollTop + this.node.clientHeight) / ROW) + 6);
      const drawn = `${first} ${last} ${this.selected}`;
      if (drawn === this.drawn) return;
      this.drawn = drawn;
      const nodes = [];
      for (let at = first; at < last; at += 1) {
        const row = el("div", {
          class: "row", role: "option", id: `${this.prefix}-${at}`, "data-at": at, "aria-setsize": this.rows.length,
          "aria-posinset": at + 1, "aria-selected": String(at === this.selected),
        }, this.rowContent(this.rows[at]));
        row.style.top = `${at * ROW}px`;
        nodes.push(row);
      }
      this.spacer.replaceChildren(...nodes);
      if (this.selected >= first && this.selected < last) this.node.setAttribute("aria-activedescendant", `${this.prefix}-${this.selected}`);
      else this.node.removeAttribute("aria-activedescendant");
    }
    key(event) {
      const page = Math.max(1, Math.floor(this.node.clientHeight / ROW) - 1);
      const to = { ArrowDown: this.selected + 1, ArrowUp: this.selected - 1, PageDown: this.selected + page, PageUp: this.selected - page, Home: 0, End: this.rows.length - 1 }[event.key];
      if (event.key === "Enter") this.select(Math.max(0, this.selected), true);
      if (to === undefined || !this.rows.length) return;
      event.preventDefault();
      this.select(Math.max(0, Math.min(this.rows.length - 1, to)), false);
    }
    select(at, wantsDetail) {
      this.selected = at;
      const top = at * ROW;
      if (top < this.node.scrollTop) this.node.scrollTop = top;
      if (top + ROW > this.node.scrollTop + this.node.clientHeight) this.node.scrollTop = top + ROW - this.node.clientHeight;
      this.drawn = null;
      this.draw();
      if (this.rows.length) this.onSelect(this.rows[at], wantsDetail);
    }
  }

  // Filters, a list and the row that is chosen in it, as solutions and sessions have them.
  // `filters` is the form, `keep` returns the rows that it leaves, `detail` draws one row.
  function browser({ what, rows, form, keep, rowContent, detail, chosen, onChosen }) {
    const pane = el("div", { class: "detail", tabindex: "-1" });
    const count = el("p", { class: "count", role: "status" });
    let newest = 0;
    const open = async (index, wantsDetail) => {
      const mine = (newest += 1);
      onChosen(index);
      const row = await rows.row(index);
      if (mine !== newest) return; // another one was chosen since
      const back = button("Back to the list", () => { list.node.focus(); list.node.scrollIntoView({ block: "nearest" }); }, { class: "back" });
      pane.replaceChildren(back, detail(index, row));
      pane.scrollTop = 0;
      if (wantsDetail && matchMedia("(max-width: 820px)").matches) pane.scrollIntoView();
    };
    const list = new VirtualList(what, rowContent, open);
    const update = async () => {
      const kept = await keep();
      if (!kept) return; // the form has changed since
      list.show(kept);
      count.textContent = `${number(kept.length)} ${what.toLowerCase()}`;
      const at = kept.indexOf(chosen());
      if (at >= 0) list.select(at, false);
      else if (kept.length) list.select(0, false);
      else pane.replaceChildren(el("p", { class: "muted" }, `No ${what.toLowerCase()} pass these filters.`));
    };
    form.addEventListener("input", update);
    form.addEventListener("submit", (event) => event.preventDefault());
    const node = el("div", { class: "browser" }, form, el("div", { class: "panes" }, el("div", { class: "side" }, count, list.node), pane));
    update();
    return { node, update };
  }
  function select(label, name, options, value) {
    const box = el("select", { name }, options.map(([key, text]) => el("option", { value: key, selected: String(key) === String(value) }, text)));
    return el("label", {}, el("span", {}, label), box);
  }
  // Returns a test of the texts of rows, or null where no text is searched for.
  async function textTest(rows, words) {
    const wanted = words.trim().toLowerCase();
    if (!wanted) return () => true;
    if (!rows.haystacks) announce("Unpacking all texts …");
    const texts = await rows.texts();
    return (index) => texts[index].includes(wanted);
  }

  // --- solutions --------------------------------------------------------------------------------

  // The bits of the index: those of a solution, and above them those of the judges that are asked for.
  const JUDGE_BITS = 8;
  const FLAGS = {
    wrong_answer: 1, cut: 2, label_not_truth: 4, values: 8, labels: 16,
    judged: 1 << JUDGE_BITS, wrong_verdict: 2 << JUDGE_BITS, missed: 4 << JUDGE_BITS,
    not_label: 8 << JUDGE_BITS, unparsed: 16 << JUDGE_BITS,
  };
  const ONLY = [
    ["wrong_verdict", "Wrong verdict"],
    ["missed", "First error misjudged"],
    ["not_label", "Verdict against its label"],
    ["unparsed", "Without verdict"],
    ["label_not_truth", "Label against the truth"],
    ["wrong_answer", "Wrong answer"],
    ["cut", "Cut by the length limit"],
    ["values", "With values"],
  ];
  const CELLS = ["both right", "only A right", "only B right", "both wrong"];

  function solutionTexts(row) {
    const judged = Object.values(row.judged ?? {}).flatMap((j) => [...j.chunks.flat(), ...j.whole].map((w) => w[2]));
    return [row.id, row.question ?? "", ...row.chunks, ...judged];
  }

  function solutionsView(data, parameters, pair) {
    const index = data.index.solutions;
    const { overview } = data;
    const size = index.id.length;
    const bitsOf = new Map();
    const bits = (judge) => {
      if (!bitsOf.has(judge)) {
        const asked = pair ? [pair.a, pair.b] : judge === "" ? [...index.judge_flags.keys()] : [Number(judge)];
        bitsOf.set(judge, Int32Array.from(index.flags, (own, i) =>
          asked.reduce((found, j) => found | (index.judge_flags[j][i] << JUDGE_BITS), own)));
      }
      return bitsOf.get(judge);
    };
    const has = (i, name, judge) => (bits(judge)[i] & FLAGS[name]) !== 0;
    const offered = ONLY.filter(([name]) => index.id.some((_, i) => (!pair || pair.cells[i] >= 0) && has(i, name, "")));
    const only = new Set((parameters.get("only") ?? "").split(","));
    const judges = overview.judges.map((name, j) => [j, name]);
    const all = [["", "all"]];
    const form = el("form", { class: "filters", role: "search", "aria-label": "Filters" },
      el("label", { class: "grow" }, el("span", {}, "Text"), el("input", { type: "search", name: "q", value: parameters.get("q") ?? "", placeholder: "in questions, chunks and judgments" })),
      index.origins.length > 1 && select("From", "origin", [...all, ...index.origins.entries()], parameters.get("origin") ?? ""),
      index.subsets.length > 1 && select("Subset", "subset", [...all, ...index.subsets.map((s, i) => [i, s || "(none)"])], parameters.get("subset") ?? ""),
      !pair && judges.length > 1 && select("Judge", "judge", [...all, ...judges], parameters.get("judge") ?? ""),
      select("Order", "order", [["", pair ? "disagreements first" : "as in the runs"], ["long", "longest first"], ["short", "shortest first"], ...(judges.length ? [["wrong", "most wrong first"]] : [])], parameters.get("order") ?? ""),
      el("fieldset", { class: "lengths" }, el("legend", {}, "Chunks"),
        el("input", { type: "number", name: "min", min: 0, "aria-label": "Fewest chunks", placeholder: "from", value: parameters.get("min") ?? "" }),
        el("input", { type: "number", name: "max", min: 0, "aria-label": "Most chunks", placeholder: "to", value: parameters.get("max") ?? "" })),
      offered.length ? el("fieldset", { class: "only" }, el("legend", {}, "Only"), offered.map(([name, label]) =>
        el("label", { class: "check" }, el("input", { type: "checkbox", name: "only", value: name, checked: only.has(name) }), el("span", {}, label), " ", el("span", { class: "tally" })))) : null);

    let cell = pair && parameters.has("cell") ? Number(parameters.get("cell")) : null;
    let asked = 0;
    const keep = async () => {
      const mine = (asked += 1);
      const values = new FormData(form);
      const get = (name) => values.get(name) ?? "";
      const hasText = await textTest(data.solutions, get("q"));
      if (mine !== asked) return null;
      const wanted = values.getAll("only").reduce((found, name) => found | FLAGS[name], 0);
      const min = get("min") === "" ? 0 : Number(get("min"));
      const max = get("max") === "" ? Infinity : Number(get("max"));
      const [origin, subset, judge] = [get("origin"), get("subset"), get("judge")];
      const ofJudge = bits(judge);
      const tally = offered.map(() => 0);
      const kept = [];
      for (let i = 0; i < size; i += 1) {
        if (pair && (pair.cells[i] < 0 || (cell !== null && pair.cells[i] !== cell))) continue;
        if (origin !== "" && index.origin[i] !== Number(origin)) continue;
        if (subset !== "" && index.subset[i] !== Number(subset)) continue;
        if (judge !== "" && !(ofJudge[i] & FLAGS.judged)) continue;
        if (index.chunks[i] < min || index.chunks[i] > max || !hasText(i)) continue;
        offered.forEach(([name], k) => { if (ofJudge[i] & FLAGS[name]) tally[k] += 1; });
        if ((ofJudge[i] & wanted) === wanted) kept.push(i);
      }
      form.querySelectorAll(".tally").forEach((node, k) => { node.textContent = number(tally[k]); });
      sort(kept, get("order"), judge);
      remember(values);
      return kept;
    };
    const sort = (kept, order, judge) => {
      const badness = (i) => ["unparsed", "wrong_verdict", "missed"].reduce((sum, name) => sum + has(i, name, judge), 0);
      if (order === "long") kept.sort((a, b) => index.chunks[b] - index.chunks[a]);
      else if (order === "short") kept.sort((a, b) => index.chunks[a] - index.chunks[b]);
      else if (order === "wrong") kept.sort((a, b) => badness(b) - badness(a));
      else if (pair) kept.sort((a, b) => [2, 0, 1, 3][pair.cells[a]] - [2, 0, 1, 3][pair.cells[b]]);
    };
    // A link to the item carries its number and its id: the id still finds it in another report.
    let chosen = size ? index.id.findIndex((id, i) => id === parameters.get("item") && (!parameters.has("at") || Number(parameters.get("at")) === i)) : -1;
    if (chosen < 0) chosen = index.id.indexOf(parameters.get("item"));
    const remember = (values) => {
      const found = new URLSearchParams();
      if (pair) found.set("pair", overview.comparisons.indexOf(pair));
      if (cell !== null) found.set("cell", cell);
      for (const name of ["q", "origin", "subset", "judge", "order", "min", "max"]) if (values.get(name)) found.set(name, values.get(name));
      if (values.has("only")) found.set("only", values.getAll("only").join(","));
      view.filters = found;
    };
    const link = (i) => {
      const found = new URLSearchParams(view.filters);
      found.set("item", index.id[i]);
      found.set("at", i);
      return `#${pair ? "compare" : "solutions"}?${found}`;
    };
    const rowContent = (i) => {
      const marks = [];
      if (pair) marks.push(mark(CELLS[pair.cells[i]], pair.cells[i] === 0 ? "good" : pair.cells[i] === 3 ? "bad" : "warn"));
      else if (has(i, "missed", judgeOf(form))) marks.push(mark("misjudged", "bad"));
      else if (has(i, "wrong_verdict", judgeOf(form))) marks.push(mark("wrong verdict", "warn"));
      if (has(i, "unparsed", judgeOf(form))) marks.push(mark("no verdict", "warn"));
      if (has(i, "wrong_answer", "")) marks.push(mark("wrong answer", "plain"));
      return [
        el("span", { class: "row-top" }, el("span", { class: "row-id" }, index.id[i]), el("span", { class: "muted" }, `${index.chunks[i]} ${index.chunks[i] === 1 ? "chunk" : "chunks"}`)),
        el("span", { class: "row-bottom" }, marks, el("span", { class: "snippet" }, index.snippet[i])),
      ];
    };
    const shownJudges = () => (pair ? [pair.a, pair.b] : judgeOf(form) === "" ? judges.map(([j]) => j) : [Number(judgeOf(form))]);
    const made = browser({
      what: "Solutions",
      rows: data.solutions,
      form,
      keep,
      rowContent,
      detail: (i, row) => solutionDetail(row, index.origins[index.origin[i]], overview.judges, shownJudges(), link(i), pair),
      chosen: () => chosen,
      onChosen: (i) => {
        chosen = i;
        view.remember(link(i));
      },
    });
    if (!pair) return el("div", { class: "wide" }, el("h1", { class: "unseen" }, "Solutions"), made.node);
    return el("div", { class: "wide" }, comparisonHead(overview, pair, cell, (picked) => {
      cell = picked;
      made.update();
    }), made.node);
  }
  const judgeOf = (form) => form.elements.judge?.value ?? "";
  const mark = (text, kind) => el("span", { class: `mark-${kind}` }, text);

  function solutionDetail(row, origin, judgeNames, judges, link, pair) {
    const judged = judges.filter((j) => row.judged?.[j]);
    const facts = [
      ["from", origin], row.subset && ["subset", row.subset], ["chunks", row.chunks.length],
      row.tokens && ["tokens", row.tokens], row.answer && ["reference answer", row.answer],
      row.is_correct !== undefined && ["final answer", verdictMark(row.is_correct, row.is_correct ? "right" : "wrong")],
      row.is_cut && ["ended", "by the length limit"],
      row.first_error !== undefined && ["first error", row.first_error < 0 ? "none" : `chunk ${row.first_error + 1}`],
      ...judged.filter((j) => row.judged[j].predicted !== null).map((j) => {
        const found = row.judged[j].predicted;
        return [`first error, ${nameOf(j, judgeNames, pair)}`, verdictMark(found === row.first_error, found < 0 ? "none" : `chunk ${found + 1}`)];
      }),
    ].filter(Boolean);
    return el("article", {},
      el("header", {}, el("h2", {}, row.id), el("a", { href: link, class: "permalink" }, "Link to this item")),
      el("dl", { class: "facts" }, facts.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, typeof value === "number" ? number(value) : value)))),
      row.question && el("section", { "aria-label": "Question" }, el("h3", {}, "Question"), textBlock(row.question, { class: "said question" })),
      chain(row, judged, judgeNames, pair),
      chunkTable(row, judged, judgeNames, pair),
      judged.filter((j) => row.judged[j].whole.length).map((j) => el("section", {}, el("h3", {}, `The whole solution, ${nameOf(j, judgeNames, pair)}`), judgment(row.judged[j].whole, row.first_error === undefined ? null : row.first_error < 0))));
  }
  const nameOf = (j, names, pair) => (pair ? `${j === pair.a ? "A" : "B"}: ${names[j]}` : names[j]);
  const verdictMark = (isGood, text) => el("span", { class: isGood ? "good" : "bad" }, isGood ? "✓ " : "✗ ", text);

  // The value before and after each chunk, and what judges say of it, as lines along the chain.
  function chain(row, judged, judgeNames, pair) {
    const [width, height, left, top, bottom] = [innerWidth < 700 ? 330 : 640, 170, 40, 12, 44];
    const count = row.chunks.length;
    if (count > 60 || (!row.values && !judged.some((j) => row.judged[j].chunks.some((w) => w.length)))) return null;
    const x = scaled(0, count, left, width - 12);
    const y = scaled(0, 1, height - bottom, top);
    const drawing = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": chainSummary(row, judged, judgeNames) });
    for (const tick of [0, 0.5, 1]) {
      drawing.append(svg("line", { class: "grid", x1: left, x2: width - 12, y1: y(tick), y2: y(tick) }), svg("text", { x: left - 6, y: y(tick) + 4, "text-anchor": "end" }, String(tick)));
    }
    const labels = row.truth ?? row.labels ?? [];
    for (let j = 0; j < count; j += 1) {
      if (labels[j] === false) drawing.append(svg("rect", { class: "wrong-chunk", x: x(j), y: top, width: x(j + 1) - x(j), height: height - bottom - top }));
      drawing.append(svg("text", { x: x(j + 0.5), y: height - bottom + 16, "text-anchor": "middle" }, String(j + 1)));
      if (labels[j] !== undefined && labels[j] !== null) drawing.append(svg("text", { class: labels[j] ? "good" : "bad", x: x(j + 0.5), y: height - bottom + 34, "text-anchor": "middle" }, labels[j] ? "✓" : "✗"));
    }
    const path = (pairs) => pairs.map(([px, py], k) => `${k ? "L" : "M"}${px} ${py}`).join("");
    const entries = [];
    if (row.values) {
      const known = row.values.map((v, j) => v && [x(j), y(v[0] / v[1])]).filter(Boolean);
      drawing.append(svg("path", { class: "series s0", d: path(known) }), ...known.map(([cx, cy]) => svg("circle", { class: "dot s0", cx, cy, r: 4 })));
      entries.push([0, "value: right continuations"]);
    }
    judged.slice(0, 4).forEach((j, k) => {
      const known = row.judged[j].chunks.map((w, c) => w.length && [x(c + 0.5), y(w[0][1])]).filter(Boolean);
      drawing.append(svg("path", { class: `series s${k + 1}`, d: path(known) }), ...known.map(([cx, cy]) => svg("rect", { class: `dot s${k + 1}`, x: cx - 3.5, y: cy - 3.5, width: 7, height: 7 })));
      entries.push([k + 1, `P(Positive), ${nameOf(j, judgeNames, pair)}`]);
    });
    const sample = (k) => svg("svg", { width: 26, height: 10, "aria-hidden": "true" }, svg("line", { class: `series s${k}`, x1: 0, x2: 26, y1: 5, y2: 5 }));
    return el("figure", { class: "chain" }, drawing, el("ul", { class: "legend" }, entries.map(([k, name]) => el("li", {}, sample(k), name)),
      labels.length ? el("li", {}, "✓ ✗ ", row.truth ? "the truth" : "the label") : null));
  }
  function chainSummary(row, judged, judgeNames) {
    const values = row.values ? `Values along the chain: ${row.values.map((v) => (v ? share(v[0] / v[1]) : "unknown")).join(", ")}. ` : "";
    return values + judged.map((j) => `P(Positive) of ${judgeNames[j]}: ${row.judged[j].chunks.map((w) => (w.length ? share(w[0][1]) : "none")).join(", ")}.`).join(" ");
  }

  const SHOWN_CHUNKS = 100;
  function chunkTable(row, judged, judgeNames, pair) {
    const hasLabel = Boolean(row.labels || row.truth);
    const columns = ["", "Chunk", row.values && "Value", hasLabel && "Label", ...(judged.length === 1 ? ["Verdict", "Judge's reasoning"] : judged.map((j) => nameOf(j, judgeNames, pair)))].filter((c) => c !== null && c !== false && c !== undefined);
    const head = columns.map((name, i) => (i === 0 ? el("th", { scope: "col", role: "columnheader" }, el("span", { class: "unseen" }, "number")) : el("th", { scope: "col", role: "columnheader" }, name)));
    const body = el("tbody", { role: "rowgroup" });
    const cell = (name, kind, ...content) => el("td", { role: "cell", class: kind, "data-name": name }, ...content);
    const chunkRow = (j) => {
      const isRight = row.truth?.[j] ?? row.labels?.[j] ?? null;
      return el("tr", { role: "row", class: row.first_error === j ? "first-error" : null },
        el("th", { scope: "row", role: "rowheader" }, String(j + 1)),
        cell("Chunk", "chunk", row.first_error === j ? el("strong", { class: "bad flag" }, "first error") : null, textBlock(row.chunks[j])),
        row.values ? cell("Value", "value", valueStep(row.values[j], row.values[j + 1])) : null,
        hasLabel ? cell("Label", "label", labelOf(row, j)) : null,
        judged.map((k) => {
          const written = row.judged[k].chunks[j] ?? [];
          const [said, why] = written.length ? [verdict(written[0], isRight), reasoning(written)] : ["–", ""];
          if (judged.length > 1) return cell(nameOf(k, judgeNames, pair), "reasoning", el("div", { class: "both" }, said), why);
          return [cell("Verdict", "verdict", said), cell("Judge's reasoning", "reasoning", why)];
        }));
    };
    appendRows(body, row.chunks.length, chunkRow, columns.length);
    return el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Chunks" },
      el("table", { class: `chunks judges-${Math.min(3, judged.length)}`, role: "table" }, el("caption", { class: "unseen" }, "Chunks, one a row"),
        el("thead", { role: "rowgroup" }, el("tr", { role: "row" }, head)), body));
  }
  // Adds the first rows of a table, and a button that adds more of them.
  function appendRows(body, count, rowOf, width, from = 0) {
    for (let j = from; j < Math.min(count, from + SHOWN_CHUNKS); j += 1) body.append(rowOf(j));
    const left = count - from - SHOWN_CHUNKS;
    if (left <= 0) return;
    const next = button(`Show more of ${number(left)} chunks`, () => { line_.remove(); appendRows(body, count, rowOf, width, from + SHOWN_CHUNKS); });
    const line_ = el("tr", { role: "row" }, el("td", { role: "cell", colspan: width }, next));
    body.append(line_);
  }
  function labelOf(row, j) {
    const said = [];
    if (row.truth) said.push(row.truth[j] === null ? el("span", { class: "muted" }, "after the first error") : verdictMark(row.truth[j], row.truth[j] ? "right" : "wrong"));
    const label = row.labels?.[j];
    if (row.labels) said.push(label === null || label === undefined ? el("span", { class: "muted" }, "no label") : el("span", {}, verdictMark(label, label ? "Positive" : "Negative"), typeof row.truth?.[j] === "boolean" && label !== row.truth[j] ? el("span", { class: "warn" }, " against the truth") : null));
    return said.map((node) => el("div", {}, node));
  }
  function valueStep(before, after) {
    if (!after) return el("span", { class: "muted" }, "–");
    const now = after[0] / after[1];
    const counts = after[1] > 1 ? el("div", { class: "muted" }, `${after[0]} of ${after[1]} right`) : null;
    if (!before) return [share(now), counts];
    const change = now - before[0] / before[1];
    return [el("div", {}, `${share(before[0] / before[1])} → ${share(now)}`), el("div", { class: change < -0.005 ? "bad" : change > 0.005 ? "good" : "muted" }, `${change < -0.005 ? "▼" : change > 0.005 ? "▲" : "="} ${signed(change, 2)}`), counts];
  }
  function verdict([said, p], isRight) {
    const wanted = isRight === null ? null : isRight ? "Positive" : "Negative";
    const isGiven = said === "Positive" || said === "Negative";
    const kind = !isGiven ? "warn" : wanted === null ? "" : said === wanted ? "good" : "bad";
    const sign = { good: "✓ ", bad: "✗ ", warn: "? " }[kind] ?? "";
    const bar = svg("svg", { class: "mark", width: 52, height: 8, "aria-hidden": "true" },
      svg("rect", { class: "axis-box", x: 0.5, y: 0.5, width: 51, height: 7 }), svg("rect", { class: "level", x: 0.5, y: 0.5, width: 51 * p, height: 7 }));
    return [el("div", { class: kind }, sign, said), el("div", { class: "muted p" }, `P ${share(p)} `, bar)];
  }
  function reasoning(written) {
    const votes = written.slice(1);
    if (!votes.length) return textBlock(written[0][2]);
    const tally = {};
    for (const [said] of votes) tally[said] = (tally[said] ?? 0) + 1;
    const counts = Object.entries(tally).map(([said, n]) => `${n} ${said}`).join(", ");
    const details = el("details", { class: "beside" }, el("summary", {}, `${votes.length} votes: ${counts}`));
    onOpen(details, () => details.append(el("ol", {}, votes.map(([said, p, text]) => el("li", {}, el("strong", {}, `${said}, P ${share(p)}`), textBlock(text))))));
    return [textBlock(written[0][2]), details];
  }
  const judgment = (written, isRight) => el("div", { class: "whole" }, el("div", {}, verdict(written[0], isRight)), reasoning(written));

  // --- two judges -------------------------------------------------------------------------------

  function comparisonHead(overview, pair, cell, pick) {
    const names = overview.judges;
    const found = pair.statistics;
    const counts = [0, 0, 0, 0];
    for (const c of pair.cells) if (c >= 0) counts[c] += 1;
    const all = found.average;
    const buttons = [];
    const cellButton = (c) => {
      const node = button([el("strong", {}, number(counts[c])), ` ${CELLS[c]}`], () => {
        const picked = node.getAttribute("aria-pressed") === "true" ? null : c;
        for (const other of buttons) other.setAttribute("aria-pressed", String(other === node && picked !== null));
        pick(picked);
      }, { class: `cell c${c}`, "aria-pressed": String(cell === c) });
      buttons.push(node);
      return node;
    };
    const four = el("table", { class: "mcnemar" },
      el("caption", {}, "Items by who finds the first error exactly. Choose a cell to see its items."),
      el("thead", {}, el("tr", {}, el("td", {}), el("th", { scope: "col" }, "B right"), el("th", { scope: "col" }, "B wrong"))),
      el("tbody", {},
        el("tr", {}, el("th", { scope: "row" }, "A right"), el("td", {}, cellButton(0)), el("td", {}, cellButton(1))),
        el("tr", {}, el("th", { scope: "row" }, "A wrong"), el("td", {}, cellButton(2)), el("td", {}, cellButton(3)))));
    const subsets = Object.entries(found.subsets);
    const parts = subsets.length > 1 ? [...subsets, ["average", all]] : subsets;
    const range = (format, value, [from, to]) => `${formats[format](value)} [${formats[format](from)}, ${formats[format](to)}]`;
    const spec = {
      title: "Paired comparison",
      columns: [["", "text"], ["A", "raw"], ["B", "raw"], ["B − A, 95%", "raw"], ["p", "raw"]],
      rows: parts.flatMap(([name, c]) => {
        const prefix = parts.length > 1 ? `${name}: ` : "";
        return [
          [`${prefix}F1, ${number(c.items)} items`, formats.percent(c.f1_a), formats.percent(c.f1_b), range("points", c.difference, c.difference_interval), formats.p(c.difference_p)],
          [`${prefix}AUC`, number(c.auc_a), number(c.auc_b), range("gain", c.auc_b - c.auc_a, c.auc_difference_interval), ""],
          [`${prefix}right alone`, number(c.right_by_a_alone), number(c.right_by_b_alone), "", formats.p(c.mcnemar_p)],
        ];
      }),
    };
    const [low, high] = all.difference_interval.map(formats.points);
    const pairs = overview.comparisons.map((c, i) => [i, `${names[c.a]} and ${names[c.b]}`]);
    const chooser = select("Judges", "pair", pairs, overview.comparisons.indexOf(pair));
    chooser.addEventListener("change", (event) => { location.hash = `#compare?pair=${event.target.value}`; });
    return el("section", { class: "versus" },
      el("h1", {}, "Two judges on the same items"),
      pairs.length > 1 ? chooser : null,
      el("p", { class: "sides" }, el("strong", {}, "A"), ` ${names[pair.a]} (${found.counted_a})`, el("br"), el("strong", {}, "B"), ` ${names[pair.b]} (${found.counted_b})`),
      el("p", { class: "headline" }, el("strong", {}, `B − A: ${formats.points(all.difference)} points of F1`), ` [${low}, ${high}], p ${formats.p(all.difference_p)} by a paired bootstrap; McNemar's exact p ${formats.p(all.mcnemar_p)}`),
      el("div", { class: "columns" }, four, table(spec)),
      el("p", { class: "note" }, "95% intervals. They cover the choice of items, not the seed of training. The four cells count the items that this page shows."));
  }

  // --- searches ---------------------------------------------------------------------------------

  function sessionTexts(row) {
    return [row.id, row.question, ...row.results.flatMap((r) => [r.completion, ...r.attempts.flatMap((a) => [a.text, a.judgment])])];
  }
  function sessionsView(data, parameters) {
    const index = data.index.sessions;
    const options = [["", "any"], ...index.methods.entries()];
    const all = [["", "all"]];
    const form = el("form", { class: "filters", role: "search", "aria-label": "Filters" },
      el("label", { class: "grow" }, el("span", {}, "Text"), el("input", { type: "search", name: "q", value: parameters.get("q") ?? "", placeholder: "in problems and solutions" })),
      index.runs.length > 1 && select("Run", "run", [...all, ...index.runs.entries()], parameters.get("run") ?? ""),
      select("Right by", "right", options, parameters.get("right") ?? ""),
      select("Wrong by", "wrong", options, parameters.get("wrong") ?? ""),
      select("Order", "order", [["", "as in the run"], ["rejected", "most rejected tokens first"], ["forced", "most forced chunks first"]], parameters.get("order") ?? ""));
    let asked = 0;
    const keep = async () => {
      const mine = (asked += 1);
      const values = new FormData(form);
      const get = (name) => values.get(name) ?? "";
      const hasText = await textTest(data.sessions, get("q"));
      if (mine !== asked) return null;
      const kept = [];
      for (let i = 0; i < index.id.length; i += 1) {
        if (get("run") !== "" && index.run[i] !== Number(get("run"))) continue;
        if (get("right") !== "" && index.right[Number(get("right"))][i] !== 1) continue;
        if (get("wrong") !== "" && index.right[Number(get("wrong"))][i] !== 0) continue;
        if (hasText(i)) kept.push(i);
      }
      const order = get("order");
      if (order) kept.sort((a, b) => index[order][b] - index[order][a]);
      view.filters = new URLSearchParams([...values].filter(([, value]) => value));
      return kept;
    };
    let chosen = index.id.findIndex((id, i) => id === parameters.get("item") && (!parameters.has("at") || Number(parameters.get("at")) === i));
    const link = (i) => {
      const found = new URLSearchParams(view.filters);
      found.set("item", index.id[i]);
      found.set("at", i);
      return `#search?${found}`;
    };
    const searches = index.methods.map((name, m) => [name, m]).filter(([name]) => !/^sample\d+$/.test(name));
    const rowContent = (i) => [
      el("span", { class: "row-top" }, el("span", { class: "row-id" }, index.id[i]), el("span", { class: "muted" }, `${number(index.rejected[i])} rejected`)),
      el("span", { class: "row-bottom" }, searches.slice(0, 3).map(([name, m]) => index.right[m][i] >= 0 && mark(`${index.right[m][i] ? "✓" : "✗"} ${name.replaceAll("_", " ")}`, index.right[m][i] ? "good" : "bad"))),
    ];
    const made = browser({
      what: "Problems", rows: data.sessions, form, keep, rowContent,
      detail: (i, row) => sessionDetail(row, link(i)),
      chosen: () => chosen,
      onChosen: (i) => {
        chosen = i;
        view.remember(link(i));
      },
    });
    return el("div", { class: "wide" }, el("h1", { class: "unseen" }, "Search"), el("p", { class: "note" }, "Of a search with one beam, such as chunk-reset, all attempts are shown as they were written. Of others the records hold the solution, and count the tokens that are not in it."), made.node);
  }
  // Every chunk that a search wrote, in order, with those that were taken back.
  function attemptsTable(attempts, method) {
    const columns = ["", "Chunk", "Verdict", "Judge's reasoning"];
    const head = columns.map((name, i) => el("th", { scope: "col", role: "columnheader" }, i ? name : el("span", { class: "unseen" }, "number")));
    const body = el("tbody", { role: "rowgroup" });
    const cell = (name, kind, ...content) => el("td", { role: "cell", class: kind, "data-name": name }, ...content);
    const attemptRow = (i) => {
      const a = attempts[i];
      return el("tr", { role: "row", class: a.is_kept ? null : "taken-back" },
        el("th", { scope: "row", role: "rowheader" }, String(a.num_before + 1)),
        cell("Chunk", "chunk", a.is_kept ? null : el("strong", { class: "bad flag" }, "taken back"), textBlock(a.text)),
        cell("Verdict", "verdict", a.verdict === null ? el("span", { class: "muted" }, "not judged") : verdict([a.verdict, a.p_positive], null)),
        cell("Judge's reasoning", "reasoning", textBlock(a.judgment)));
    };
    appendRows(body, attempts.length, attemptRow, columns.length);
    return el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": `Chunks of ${method}` },
      el("table", { class: "chunks judges-1", role: "table" }, el("caption", { class: "unseen" }, "Chunks as they were written, one a row"),
        el("thead", { role: "rowgroup" }, el("tr", { role: "row" }, head)), body));
  }
  function sessionDetail(row, link) {
    const isSample = (r) => /^sample\d+$/.test(r.method);
    const name = (r) => r.method.replaceAll("_", " ");
    const spec = {
      title: "What each method found",
      columns: [["", "text"], ["", "text"], ["answer", "text"], ["accepted", "number"], ["rejected", "number"], ["judge wrote", "number"], ["forced chunks", "number"], ["FLOPs", "number"]],
      rows: row.results.filter((r) => !isSample(r)).map((r) => [name(r), r.is_correct ? "✓ right" : "✗ wrong", r.answer.slice(0, 60), r.accepted_tokens, r.rejected_tokens, r.judge_tokens, r.forced_chunks, r.policy_flops + r.judge_flops]),
    };
    const one = (r) => {
      if (r.attempts.length) return [attemptsTable(r.attempts, name(r))];
      const cut = r.completion.split(/(?<=<\/chunk>)/).filter((text) => text.trim());
      const isJudged = r.chunk_scores.length === cut.length;
      const rejected = r.rejected_tokens ? `${number(r.rejected_tokens)} tokens are in no solution. The records do not hold them.` : null;
      return [
        rejected && el("p", { class: "note" }, rejected),
        r.forced_chunks ? el("p", { class: "warn" }, `${number(r.forced_chunks)} of the chunks below were kept although the judge rejected them.`) : null,
        el("ol", { class: "steps" }, cut.map((text, j) => el("li", {}, isJudged ? el("span", { class: "score" }, `P ${share(r.chunk_scores[j])}`) : null, textBlock(text)))),
        !isJudged && r.chunk_scores.length ? el("p", { class: "note" }, `Scores of the chunks that were judged: ${r.chunk_scores.map(share).join(", ")}`) : null,
      ];
    };
    const method = (r) => el("section", { class: "method" }, el("h3", {}, name(r), " ", verdictMark(r.is_correct, r.is_correct ? "right" : "wrong")), one(r));
    const samples = row.results.filter(isSample).map((r) => {
      const details = el("details", { class: "beside" }, el("summary", {}, `${name(r)}: `, verdictMark(r.is_correct, r.answer.slice(0, 60) || "no answer")));
      onOpen(details, () => details.append(...one(r).filter(Boolean)));
      return details;
    });
    return el("article", {},
      el("header", {}, el("h2", {}, row.id), el("a", { href: link, class: "permalink" }, "Link to this item")),
      el("dl", { class: "facts" }, [["run", row.run], ["reference answer", row.answer || "not in the records"]].map(([k, v]) => el("div", {}, el("dt", {}, k), el("dd", {}, v)))),
      row.question ? el("section", {}, el("h3", {}, "Problem"), textBlock(row.question, { class: "said question" })) : el("p", { class: "note" }, "The run does not hold the text of its problems."),
      table(spec),
      row.results.filter((r) => !isSample(r)).map(method),
      samples.length ? el("section", {}, el("h3", {}, `Samples, which votes count: ${row.results.filter((r) => isSample(r) && r.is_correct).length} of ${samples.length} right`), samples) : null);
  }

  // --- views ------------------------------------------------------------------------------------

  const VIEWS = {
    overview: ["Overview", () => null],
    solutions: ["Solutions", (data) => data.index.solutions.id.length],
    compare: ["Two judges", (data) => data.overview.comparisons.length],
    search: ["Search", (data) => data.index.sessions.id.length],
  };
  const view = {
    data: null,
    filters: new URLSearchParams(),
    remember(hash) {
      history.replaceState(null, "", hash);
    },
    show() {
      const [name, query] = location.hash.slice(1).split(/\?(.*)/s);
      const parameters = new URLSearchParams(query ?? "");
      const isThere = (key) => key in VIEWS && VIEWS[key][1](this.data) !== 0;
      const key = isThere(name) ? name : "overview";
      byId("nav").replaceChildren(...Object.entries(VIEWS).filter(([k]) => isThere(k)).map(([k, [title, count]]) => {
        const n = count(this.data);
        return el("a", { href: `#${k}`, "aria-current": k === key ? "page" : null }, title, n && k !== "compare" ? el("span", { class: "tally" }, ` ${number(n)}`) : null);
      }));
      const pair = this.data.overview.comparisons[Number(parameters.get("pair") ?? 0)] ?? this.data.overview.comparisons[0];
      const made = {
        overview: () => overviewView(this.data),
        solutions: () => solutionsView(this.data, parameters, null),
        compare: () => solutionsView(this.data, parameters, pair),
        search: () => sessionsView(this.data, parameters),
      }[key]();
      byId("main").replaceChildren(made);
      document.body.dataset.view = key;
    },
  };

  function wireTools() {
    byId("theme").addEventListener("click", () => {
      const root = document.documentElement;
      const isDark = (root.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
      root.dataset.theme = isDark ? "light" : "dark";
    });
    byId("source").addEventListener("click", (event) => {
      asSource = !asSource;
      event.currentTarget.setAttribute("aria-pressed", String(asSource));
      view.show();
    });
    document.querySelector(".skip").addEventListener("click", (event) => {
      event.preventDefault();
      byId("main").focus();
    });
  }

  async function start() {
    const [overview, index] = await Promise.all([unpack("overview"), unpack("index")]);
    view.data = {
      overview,
      index,
      solutions: new Rows("solutions", index.solutions.starts, solutionTexts),
      sessions: new Rows("sessions", index.sessions.starts, sessionTexts),
    };
    wireTools();
    view.show();
    window.addEventListener("hashchange", () => view.show());
  }

  start().catch((error) => {
    byId("main").replaceChildren(el("p", { class: "bad" }, `This report cannot be shown: ${error.message}. It needs a browser of 2023 or later.`));
    throw error;
  });
})();
