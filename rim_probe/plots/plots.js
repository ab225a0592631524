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
    Object.assign(layout, { paper_bgcolor: "#fff", plot_bgcolor: "#fff", title: { text, x: 0.01, y: 0.99, yanchor: "top", font: { size: 15 } } });
    layout.margin = { ...layout.margin, l: 24, r: 24, t: layout.margin.t + 40, b: 30 };
    const height = layout.height + 60;
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
    // The whole panel: a browser draws HTML into a canvas by way of an SVG that holds a copy of it and the rules of its page.
    async png(panel, button) {
      await Promise.all([...panel.querySelectorAll(".chart-slot:not(.js-plotly-plot)")].filter((slot) => slot.checkVisibility()).map(draw));
      const copy = panel.cloneNode(true);
      for (const extra of copy.querySelectorAll(".pic-tools, .pic-controls, .pic-choice, .pic-table, .pic-python, .pic-tip, .modebar-container, .actions")) extra.remove();
      const hidden = [...panel.querySelectorAll("*")].map((box) => (getComputedStyle(box).overflowX === "auto" ? box.scrollWidth - box.clientWidth : 0));
      const [width, height] = [panel.clientWidth + Math.max(0, ...hidden) + 32, panel.clientHeight];
      const style = getComputedStyle(panel);
      copy.setAttribute("style", `width:${width}px;box-sizing:border-box;padding:16px;background:var(--paper);color:var(--ink);font-family:${style.fontFamily.replaceAll('"', "'")};font-size:${style.fontSize}`);
      const colours = ["memory", "cot", "ink", "soft", "line", "edge-line", "paper", "sheet", "right", "wrong"].map((name) => `--${name}`);
      for (const name of [...colours, "--serif"]) copy.style.setProperty(name, style.getPropertyValue(name));
      const around = document.createElement("div");
      around.className = `${panel.closest(".gradio-container")?.className ?? ""} ${isDark(panel) ? "dark" : ""}`; // as rules want it
      around.style.cssText = "all: initial; display: block; padding: 0 !important; max-width: none !important";
      around.append(document.createElement("div"));
      around.firstChild.className = "contain";
      around.firstChild.append(copy);
      const rules = [...document.styleSheets].filter((sheet) => !sheet.href || sheet.href.startsWith(location.origin)).flatMap((sheet) => [...sheet.cssRules]);
      const css = rules.map((rule) => rule.cssText).filter((text) => !/^@(font-face|import)/.test(text)).join("\n");
      const escaped = css.replaceAll("&", "&amp;").replaceAll("<", "&lt;");
      const html = new XMLSerializer().serializeToString(around).replaceAll(`${location.href.split("#")[0].replaceAll("&", "&amp;")}#`, "#");
      const svg = `<svg xmlns="http://www.w3.org/2000/svg" width="${width}" height="${height}"><style>${escaped}</style><foreignObject width="100%" height="100%">${html}</foreignObject></svg>`;
      const image = Object.assign(new Image(), { src: "data:image/svg+xml;charset=utf-8," + encodeURIComponent(svg) });
      try {
        await image.decode();
      } catch {
        return say(button, "Not in this browser");
      }
      const canvas = Object.assign(document.createElement("canvas"), { width: 2 * width, height: 2 * height });
      const pen = canvas.getContext("2d");
      pen.scale(2, 2);
      pen.fillStyle = style.getPropertyValue("--paper");
      pen.fillRect(0, 0, width, height);
      pen.drawImage(image, 0, 0);
      canvas.toBlob((blob) => save(`rim-probe-${panel.dataset.panel}.png`, URL.createObjectURL(blob)));
    },
  };
}
