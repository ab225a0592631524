/* Draws the figures of the report page and serves its downloads. Nothing is fetched: plotly and the data stand in this
   page, gzipped, and a browser that cannot unpack them still has every number in the tables. */
(async () => {
  const PRINT_WIDTH = 660;
  const CHARACTER = 6.6; // width of a tick label's character in px
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const plots = [...document.querySelectorAll(".plot")];
  let payload, printing = false;

  const unpack = async (id) => {
    const bytes = Uint8Array.from(atob(document.getElementById(id).textContent.trim()), (c) => c.charCodeAt(0));
    return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
  };

  const give_up = (reason) => {
    document.getElementById("trouble").hidden = false;
    document.getElementById("trouble-reason").textContent = String(reason);
    plots.forEach((plot) => plot.remove());
    document.querySelectorAll("details.numbers").forEach((numbers) => (numbers.open = true));
  };

  try {
    payload = JSON.parse(await unpack("payload"));
    const script = document.createElement("script");
    script.textContent = await unpack("plotly");
    document.head.append(script);
    if (!window.Plotly) throw new Error("plotly did not start");
  } catch (error) {
    give_up(error);
    return;
  }

  /* A copy of a figure in the colours of the theme. */
  const themed = (part, is_dark) => {
    if (typeof part === "string") return (is_dark && payload.dark[part]) || part;
    if (Array.isArray(part)) return part.map((one) => themed(one, is_dark));
    if (part === null || typeof part !== "object") return part;
    return Object.fromEntries(Object.entries(part).map(([key, value]) => [key, themed(value, is_dark)]));
  };

  const text_length = (label) => String(label).replace(/&\w+;/g, "x").length;
  const shortened = (label, longest) => {
    const whole = new DOMParser().parseFromString(label, "text/html").documentElement.textContent;
    if (whole.length <= longest) return label;
    return (whole.slice(0, longest - 1) + "…").replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  };

  /* Labels of a heat map for the width there is: long ones cut or turned, some left out where they would touch. */
  const fit = (layout, width) => {
    const { xaxis, yaxis } = layout;
    if (!xaxis.ticktext) return;
    const longest_y = Math.max(10, Math.floor((0.3 * width) / CHARACTER));
    yaxis.ticktext = yaxis.ticktext.map((label) => shortened(String(label), longest_y));
    const left = CHARACTER * Math.max(...yaxis.ticktext.map(text_length)) + 30;
    const cell = (width - left - 80) / xaxis.ticktext.length;
    const longest = Math.max(...xaxis.ticktext.map(text_length));
    xaxis.tickangle = longest * CHARACTER > cell - 4 ? (longest <= 3 ? 0 : -60) : 0;
    const needed = xaxis.tickangle ? 15 : longest * CHARACTER + 6;
    const step = Math.max(1, Math.ceil(needed / cell));
    xaxis.tickvals = xaxis.tickvals.filter((place) => place % step === 0);
    xaxis.ticktext = xaxis.ticktext.filter((_, place) => place % step === 0).map((label) => shortened(String(label), 20));
    if (xaxis.tickangle) layout.height += Math.min(longest, 20) * CHARACTER * 0.8;
  };

  const draw = (plot) => {
    const { data, layout } = themed(payload.figures[plot.dataset.figure], dark.matches && !printing);
    const width = printing ? PRINT_WIDTH : plot.clientWidth;
    if (!width) return;
    layout.width = width;
    layout.dragmode = matchMedia("(pointer: coarse)").matches ? false : "zoom";
    fit(layout, width);
    for (const trace of data) if (plot.hiddenGroups?.has(trace.legendgroup)) trace.visible = false;
    plot.style.height = layout.height + "px";
    plot.drawnWidth = width;
    Plotly.react(plot, data, layout, { displayModeBar: false, doubleClick: "reset" });
    plot.classList.add("drawn");
  };

  // Drawn when nearly in sight, so that a long report opens at once.
  const seen = new IntersectionObserver(
    (entries) => {
      for (const { target, isIntersecting } of entries) {
        if (!isIntersecting) continue;
        seen.unobserve(target);
        draw(target);
      }
    },
    { rootMargin: "800px" },
  );
  const resized = new ResizeObserver((entries) => {
    for (const { target } of entries) {
      const stale = target.classList.contains("drawn") && target.clientWidth !== target.drawnWidth;
      if (stale && !printing) requestAnimationFrame(() => draw(target));
    }
  });
  plots.forEach((plot) => (seen.observe(plot), resized.observe(plot)));
  const redraw = () => plots.filter((plot) => plot.classList.contains("drawn")).forEach(draw);
  dark.addEventListener("change", redraw);
  addEventListener("beforeprint", () => ((printing = true), plots.forEach(draw)));
  addEventListener("afterprint", () => ((printing = false), redraw()));

  // A legend's button hides and shows its series.
  for (const button of document.querySelectorAll(".legend button")) {
    button.disabled = false;
    button.addEventListener("click", () => {
      const plot = button.closest("figure").querySelector(".plot");
      plot.hiddenGroups ??= new Set();
      const shown = button.getAttribute("aria-pressed") === "true";
      plot.hiddenGroups[shown ? "add" : "delete"](button.dataset.group);
      button.setAttribute("aria-pressed", String(!shown));
      draw(plot);
    });
  }

  const save = (name, type, text) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type }));
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  };

  /* A picture for a paper: light, on white, with its title and legend, 1,000 px wide. */
  const picture = (id, format) => {
    const { data, layout } = themed(payload.figures[id], false);
    const { title, file } = payload.items[id];
    layout.width = 1000;
    fit(layout, layout.width);
    const entries = data.filter((trace) => trace.legendgroup !== undefined && trace.mode !== "lines").length;
    for (const trace of data) trace.showlegend = trace.mode !== "lines" && trace.type === "scatter";
    layout.height += 80 + 22 * Math.ceil(entries / 2);
    layout.paper_bgcolor = layout.plot_bgcolor = "#ffffff";
    layout.margin = { ...layout.margin, l: 30, r: 30, t: 60, b: entries ? 40 : 70 };
    layout.title = { text: title, x: 0.03, xanchor: "left", font: { size: 17 } };
    layout.showlegend = entries > 0;
    layout.legend = { orientation: "h", yref: "container", y: 0.01, yanchor: "bottom" };
    Plotly.downloadImage({ data, layout }, { format, width: layout.width, height: layout.height, scale: 2, filename: file });
  };

  for (const button of document.querySelectorAll("button[data-save]")) {
    button.hidden = false;
    button.addEventListener("click", () => {
      const { save: kind, item: id } = button.dataset;
      const item = payload.items[id];
      if (kind === "report") save("report.json", "application/json", JSON.stringify(payload.report, null, 1));
      else if (kind === "csv") save(item.file + ".csv", "text/csv", "\ufeff" + item.csv);
      else if (kind === "json") {
        const section = payload.report.sections[item.section];
        const { checkpoint, fingerprint, command } = payload.report.provenance;
        const head = { checkpoint, fingerprint, command, probe: section.name, n: section.n };
        save(item.file + ".json", "application/json", JSON.stringify({ ...head, ...section[item.list][item.place] }, null, 1));
      } else picture(id, kind);
    });
  }

  // The contents follow the reader.
  const links = new Map([...document.querySelectorAll("nav a")].map((link) => [link.hash.slice(1), link]));
  const follow = new IntersectionObserver(
    (entries) => {
      for (const { target, isIntersecting } of entries) {
        if (!isIntersecting) continue;
        links.forEach((link) => link.removeAttribute("aria-current"));
        links.get(target.id)?.setAttribute("aria-current", "true");
      }
    },
    { rootMargin: "-15% 0px -75% 0px" },
  );
  document.querySelectorAll("main > section").forEach((section) => follow.observe(section));
  document.documentElement.dataset.ready = "true";
})();
