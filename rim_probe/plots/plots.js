// What panels do in a browser, in the app and in a saved file alike. `root` may redraw what it holds, so every listener sits on
// `root` and looks for its target when something happens. `act` receives {view: {...}} or {do: {...}}; a saved file ignores it.
function pictures(root, act) {
  const near = (event, selector) => event.target.closest?.(selector);

  // ---- reading: marks explain themselves in the picture's line of text; what belongs together lights up together
  function light(link, on) {
    for (const name of link.dataset.link.split(" "))
      for (const other of link.closest(".pic").querySelectorAll(`[data-link~="${CSS.escape(name)}"]`)) other.classList.toggle("lit", on);
  }
  function shade(mark, on) {
    const box = mark.closest(".pic").querySelector("[data-shades]");
    const shades = box && JSON.parse(box.dataset.shades);
    box?.querySelectorAll(".word").forEach((word, i) => word.style.setProperty("--w", shades[on ? mark.dataset.shade : box.dataset.rest][i]));
  }
  function point(on, event) {
    const [tip, link, shader] = ["[data-tip]", "[data-link]", "[data-shade]"].map((mark) => near(event, `.pic ${mark}`));
    if (on && tip) tip.closest(".pic").querySelector(".pic-tip").textContent = tip.dataset.tip;
    if (link) light(link, on);
    if (shader) shade(shader, on);
  }
  for (const [name, on] of [["mouseover", true], ["focusin", true], ["mouseout", false], ["focusout", false]])
    root.addEventListener(name, (event) => point(on, event));

  // ---- choosing
  root.addEventListener("click", (event) => {
    const [view, action, tool] = ["[data-view]", "[data-do]", "[data-tool]"].map((mark) => near(event, mark));
    if (view) act({ view: JSON.parse(view.dataset.view) });
    if (action) act({ do: JSON.parse(action.dataset.do) });
    if (tool) tools[tool.dataset.tool](tool.closest("[data-panel]"), tool);
  });
  root.addEventListener("change", (event) => {
    const key = event.target.dataset?.viewKey;
    if (key) act({ view: { [key]: event.target.value } });
  });
  root.addEventListener("keydown", (event) => {
    const cell = near(event, "[data-cell]");
    const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (!cell || !step) return;
    const [row, column] = cell.dataset.cell.split(",").map(Number);
    const next = cell.closest("[data-grid]").querySelector(`[data-cell="${row + step[0]},${column + step[1]}"]`);
    if (!next) return;
    event.preventDefault();
    cell.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  });

  // ---- charts: drawn when nearly in sight; plotly.js comes with the first one, from the server of the page
  const isDark = (slot) => Boolean(slot.closest(".dark") || (slot.closest(".pic-page") && matchMedia("(prefers-color-scheme: dark)").matches));
  const coloured = (text, dark) => (dark ? text.replace(/"(#\w{6}|rgba\([\d.,]+\))"/g, (whole, light) => `"${pictures.dark[light] ?? light}"`) : text);
  function load() {
    if (window.Plotly) return Promise.resolve();
    pictures.plotly ??= new Promise((resolve, reject) => {
      const script = document.createElement("script");
      Object.assign(script, { src: `${window.gradio_config?.root ?? ""}/plotly.js`, onload: resolve, onerror: reject });
      document.head.append(script);
    });
    return pictures.plotly;
  }
  async function draw(slot) {
    try {
      await load();
    } catch {
      slot.textContent = "The chart could not be drawn; its numbers are in the table below.";
      return;
    }
    if (!slot.dataset.figure) return; // the panel was drawn anew while plotly.js came
    const { data, layout } = JSON.parse(coloured(slot.dataset.figure, isDark(slot)));
    layout.dragmode = matchMedia("(pointer: coarse)").matches ? false : "zoom"; // a finger scrolls the page
    const filename = `rim-probe-${slot.closest("[data-panel]")?.dataset.panel ?? "figure"}`;
    const svg = { name: "svg", title: "Download as SVG", icon: Plotly.Icons.disk, click: (chart) => picture(chart, filename, "svg") };
    const png = { name: "png", title: "Download as PNG", icon: Plotly.Icons.camera, click: (chart) => picture(chart, filename, "png") };
    const modeBarButtonsToRemove = ["toImage", "select2d", "lasso2d", "autoScale2d"];
    Plotly.newPlot(slot, data, layout, { responsive: true, displaylogo: false, showSendToCloud: false, modeBarButtonsToRemove, modeBarButtonsToAdd: [png, svg] });
  }
  // A picture for a paper: light, on white, under its title.
  function picture(chart, filename, format) {
    const { data, layout } = JSON.parse(chart.dataset.figure);
    const text = (chart.getAttribute("aria-label") ?? "").split(";")[0].replace(/[<>&]/g, "");
    const under = (chart.closest("[data-panel]")?.querySelector(".pic-tools")?.dataset.caption ?? "").replace(/[<>&]/g, "");
    const subtitle = { text: under.length > 150 ? under.slice(0, 149) + "…" : under, font: { size: 11 } };
    Object.assign(layout, { paper_bgcolor: "#fff", plot_bgcolor: "#fff", title: { text, subtitle, x: 0.01, y: 0.99, yanchor: "top", font: { size: 15 } } });
    layout.margin = { ...layout.margin, l: 24, r: 24, t: layout.margin.t + 60, b: 30 };
    const height = layout.height + 80;
    Plotly.downloadImage({ data, layout: { ...layout, height } }, { format, filename, width: Math.max(900, chart.clientWidth), height });
  }
  const seen = new IntersectionObserver(
    (entries) => {
      for (const { target, isIntersecting } of entries) {
        if (!isIntersecting) continue;
        seen.unobserve(target);
        draw(target);
      }
    },
    { rootMargin: "300px" },
  );
  function watchCharts() {
    for (const slot of root.querySelectorAll(".chart-slot:not([data-seen])")) {
      slot.dataset.seen = "";
      seen.observe(slot);
    }
  }
  new MutationObserver(watchCharts).observe(root, { childList: true, subtree: true });
  watchCharts();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => root.querySelectorAll(".js-plotly-plot").forEach(draw));

  // ---- taking it home
  function save(name, url) {
    Object.assign(document.createElement("a"), { download: name, href: url }).click();
  }
  function say(button, words) {
    button.dataset.name ??= button.textContent;
    button.textContent = words;
    setTimeout(() => (button.textContent = button.dataset.name), 1600);
  }
  // The whole panel as it would be printed: light, without its controls, over its caption (export.js).
  async function take(panel, button, format) {
    const slots = [...panel.querySelectorAll(".chart-slot")].filter((slot) => slot.checkVisibility());
    if (slots.length) await load();
    const charts = new Map();
    for (const slot of slots) {
      const { data, layout } = JSON.parse(slot.dataset.figure);
      const size = { width: slot.offsetWidth, height: slot.offsetHeight };
      charts.set(slot, await Plotly.toImage({ data, layout: { ...layout, ...size } }, { format: "svg", ...size }));
    }
    const { text, width, height } = panelSvg(panel, charts, panel.querySelector(".pic-tools").dataset.caption);
    const name = `rim-probe-${panel.dataset.panel}.${format}`;
    if (format === "svg") return save(name, URL.createObjectURL(new Blob([text], { type: "image/svg+xml" })));
    const image = Object.assign(new Image(), { src: "data:image/svg+xml;charset=utf-8," + encodeURIComponent(text) });
    await image.decode();
    const canvas = Object.assign(document.createElement("canvas"), { width: 2 * width, height: 2 * height });
    canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
    canvas.toBlob((blob) => save(name, URL.createObjectURL(blob)));
  }
  const quote = (text) => (/[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
  const tools = {
    full(panel) {
      // What holds the picture, where it may be drawn anew: a picture that is replaced would drop out of full screen.
      if (document.fullscreenElement) document.exitFullscreen();
      else (root === document.body ? panel : root).requestFullscreen();
    },
    csv(panel) {
      const rows = [...panel.querySelectorAll(".pic-table tr")].map((row) => [...row.children].map((cell) => quote(cell.textContent)).join(","));
      save(`rim-probe-${panel.dataset.panel}.csv`, URL.createObjectURL(new Blob([rows.join("\n") + "\n"], { type: "text/csv" })));
    },
    async python(panel, button) {
      const code = panel.querySelector(".pic-python");
      try {
        await navigator.clipboard.writeText(code.textContent);
        say(button, "Copied");
      } catch {
        code.hidden = !code.hidden; // no clipboard here (an insecure address): show it for copying by hand
      }
    },
    svg: (panel, button) => take(panel, button, "svg"),
    png: (panel, button) => take(panel, button, "png"),
  };
}
