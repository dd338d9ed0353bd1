"use strict";
// Draws the charts with Vega-Lite at the width and in the colours of the page; filters the answers.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const root = document.documentElement;

  // Columns are a third of the size of rows in the file; the library wants rows.
  const rowsOf = (columns) => {
    const names = Object.keys(columns);
    const count = names.length ? columns[names[0]].length : 0;
    return Array.from({ length: count }, (_, i) =>
      Object.fromEntries(names.map((name) => [name, columns[name][i]])));
  };
  const datasets = Object.fromEntries(
    Object.entries(data.datasets).map(([name, columns]) => [name, rowsOf(columns)]));

  const colour = (name) => getComputedStyle(root).getPropertyValue(`--${name}`).trim();

  const theme = (width) => {
    const text = colour("text"), muted = colour("muted"), line = colour("line");
    const font = getComputedStyle(document.body).fontFamily;
    return {
      background: null,
      font,
      view: { stroke: null },
      axis: {
        domainColor: line, tickColor: line, gridColor: line, gridOpacity: 0.8, labelColor: muted,
        titleColor: muted, titleFontWeight: 400, labelFontSize: 11, titleFontSize: 12,
        labelOverlap: true, titlePadding: 6,
      },
      axisY: { minExtent: 44, maxExtent: 44, domain: false, ticks: false, labelPadding: 6, titleX: -40 },
      legend: {
        labelColor: text, titleColor: muted, titleFontWeight: 400, labelFontSize: 12,
        titleFontSize: 12, symbolType: "square", symbolStrokeWidth: 2, offset: 8,
      },
      title: { anchor: "start", color: text, fontSize: 12.5, fontWeight: 600, frame: "group", offset: 6, limit: width - 62 },
      text: { color: muted },
      rule: { color: muted },
      line: { color: text },
      bar: { color: muted },
      circle: { color: text },
      point: { color: text },
    };
  };

  // "text" as a colour of a scale stands for the colour of the text.
  const tinted = (value, text) => {
    if (Array.isArray(value)) return value.map((item) => tinted(item, text));
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([key, item]) => [
      key, key === "range" && Array.isArray(item) ? item.map((c) => (c === "text" ? text : c)) : tinted(item, text),
    ]));
  };

  const views = new Map();
  const draw = async (figure) => {
    const width = figure.clientWidth;
    const spec = tinted(structuredClone(data.charts[figure.dataset.chart]), colour("text"));
    spec.datasets = datasets;
    if (spec.vconcat) {
      for (const panel of spec.vconcat) panel.width = width - 62;
    } else {
      spec.width = "container";
      spec.autosize = { type: "fit-x", contains: "padding" };
    }
    const options = {
      mode: "vega-lite", renderer: "canvas", actions: false, ast: true, defaultStyle: false,
      tooltip: { disableDefaultStyle: true }, config: theme(width),
    };
    views.get(figure)?.finalize();
    const result = await window.vegaEmbed(figure, spec, options);
    views.set(figure, result);
    figure.dataset.drawn = String(width);
  };
  const drawAll = () => Promise.all([...document.querySelectorAll("[data-chart]")].map(draw));

  const button = document.getElementById("theme");
  const choices = ["auto", "light", "dark"];
  button.addEventListener("click", () => {
    const next = choices[(choices.indexOf(button.textContent.split(" ")[1]) + 1) % choices.length];
    button.textContent = `theme: ${next}`;
    if (next === "auto") delete root.dataset.theme;
    else root.dataset.theme = next;
    drawAll();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);

  let waiting = 0, drawnAt = innerWidth;
  addEventListener("resize", () => {
    if (innerWidth === drawnAt) return; // on a phone scrolling changes the height
    clearTimeout(waiting);
    waiting = setTimeout(() => { drawnAt = innerWidth; drawAll(); }, 150);
  });

  for (const key of document.querySelectorAll(".key")) {
    const place = Number(key.className.match(/k(\d+)/)[1]);
    key.style.background = (data.datasets.colours?.stage ?? [])[place] ?? "transparent";
  }

  const form = document.getElementById("filters");
  if (form) {
    const list = document.getElementById("cases");
    const cases = [...list.children];
    const number = (element, name, otherwise) =>
      element.dataset[name] === "" ? otherwise : Number(element.dataset[name]);
    const orders = {
      "": (element) => cases.indexOf(element),
      gain: (element) => -number(element, "gain", -1e9),
      loss: (element) => number(element, "gain", 1e9),
      score: (element) => number(element, "score", 1e9),
    };
    const more = document.getElementById("more");
    let limit = 8;
    const apply = () => {
      const wanted = new FormData(form);
      const text = wanted.get("text").toLowerCase();
      let found = 0;
      const key = orders[wanted.get("order")];
      const ordered = [...cases].sort((a, b) => key(a) - key(b));
      for (const element of ordered) {
        const fits = ["group", "outcome"].every(
          (name) => !wanted.get(name) || element.dataset[name] === wanted.get(name));
        const isFound = fits && element.textContent.toLowerCase().includes(text);
        found += isFound ? 1 : 0;
        element.hidden = !isFound || found > limit;
      }
      list.append(...ordered);
      form.querySelector("output").textContent = `${found} of ${cases.length}`;
      more.hidden = found <= limit;
      more.textContent = `show ${Math.min(20, found - limit)} more`;
    };
    more.addEventListener("click", () => { limit += 20; apply(); });
    form.addEventListener("input", apply);
    form.addEventListener("submit", (event) => event.preventDefault());
    apply();
  }

  drawAll().then(() => { root.dataset.ready = "true"; });
})();
