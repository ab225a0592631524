// What pictures do in a browser, in the app and in a saved file alike. `root` may redraw what it holds, so every listener sits on
// `root` and looks for its target when something happens. `act` receives {view: {...}} or {do: {...}}; a saved file ignores it.
function pictures(root, act) {
  const near = (event, selector) => (event.target.closest ? event.target.closest(selector) : null);

  // ---- reading: marks explain themselves in the picture's line of text; what belongs together lights up together
  function show(mark) {
    const picture = mark.closest(".pic");
    const line = picture && picture.querySelector(".pic-tip");
    if (line && mark.dataset.tip) line.textContent = mark.dataset.tip;
  }
  function light(scope, name, on) {
    for (const other of scope.querySelectorAll(`[data-link~="${CSS.escape(name)}"]`)) other.classList.toggle("lit", on);
  }
  function shade(mark, on) {
    const box = mark.closest(".pic").querySelector("[data-shades]");
    if (!box) return;
    const weights = on ? JSON.parse(box.dataset.shades)[mark.dataset.shade] : null;
    const rest = box.dataset.rest ? JSON.parse(box.dataset.shades)[box.dataset.rest] : null;
    const shown = weights || rest || [];
    box.querySelectorAll(".word").forEach((word, i) => word.style.setProperty("--w", shown[i] || 0));
  }
  function enter(event) {
    const tip = near(event, "[data-tip]");
    if (tip) show(tip);
    const link = near(event, "[data-link]");
    if (link && link.closest(".pic")) for (const name of link.dataset.link.split(" ")) light(link.closest(".pic"), name, true);
    const shader = near(event, "[data-shade]");
    if (shader && shader.closest(".pic")) shade(shader, true);
  }
  function leave(event) {
    const link = near(event, "[data-link]");
    if (link && link.closest(".pic")) for (const name of link.dataset.link.split(" ")) light(link.closest(".pic"), name, false);
    const shader = near(event, "[data-shade]");
    if (shader && shader.closest(".pic")) shade(shader, false);
  }
  root.addEventListener("mouseover", enter);
  root.addEventListener("focusin", enter);
  root.addEventListener("mouseout", leave);
  root.addEventListener("focusout", leave);

  // ---- choosing
  root.addEventListener("click", (event) => {
    const view = near(event, "[data-view]");
    if (view) act({ view: JSON.parse(view.dataset.view) });
    const action = near(event, "[data-do]");
    if (action) act({ do: JSON.parse(action.dataset.do) });
    const tool = near(event, "[data-tool]");
    if (tool) tools[tool.dataset.tool](tool.closest("[data-panel]"), tool);
  });
  root.addEventListener("change", (event) => {
    const key = event.target.dataset && event.target.dataset.viewKey;
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

  // ---- taking it home
  function save(name, url) {
    const link = document.createElement("a");
    link.download = name;
    link.href = url;
    link.click();
  }
  function say(button, words) {
    button.dataset.name ??= button.textContent;
    button.textContent = words;
    setTimeout(() => (button.textContent = button.dataset.name), 1600);
  }
  // The text of a rule that is about something in the picture; a media rule is settled here, where the window is.
  function rulesFor(picture, rule) {
    if (rule.media) return matchMedia(rule.conditionText).matches ? [...rule.cssRules].flatMap((inner) => rulesFor(picture, inner)) : [];
    if (!rule.selectorText) return rule.cssRules && rule.cssRules[0]?.selectorText ? [rule.cssText] : [];
    const plain = rule.selectorText.replace(/::?(before|after|hover|focus|focus-visible|marker|placeholder)/g, "");
    try {
      return picture.matches(plain) || picture.querySelector(plain) ? [rule.cssText] : [];
    } catch {
      return [];
    }
  }
  const quote = (text) => (/[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
  const tools = {
    full(picture) {
      // What holds the picture, where it may be drawn anew: a picture that is replaced would drop out of full screen.
      if (document.fullscreenElement) document.exitFullscreen();
      else (root === document.body ? picture : root).requestFullscreen();
    },
    csv(picture) {
      const rows = [...picture.querySelectorAll(".pic-table tr")].map((row) =>
        [...row.children].map((cell) => quote(cell.textContent)).join(","),
      );
      save(`rim-probe-${picture.dataset.panel}.csv`, URL.createObjectURL(new Blob([rows.join("\n") + "\n"], { type: "text/csv" })));
    },
    async python(picture, button) {
      const code = picture.querySelector(".pic-python");
      try {
        await navigator.clipboard.writeText(code.textContent);
        say(button, "Copied");
      } catch {
        code.hidden = !code.hidden; // no clipboard here (an insecure address): show it for copying by hand
      }
    },
    // A browser draws HTML into a canvas by way of an SVG that holds a copy of it together with the rules that style it.
    async png(picture, button) {
      const { width, height } = picture.getBoundingClientRect();
      const copy = picture.cloneNode(true);
      for (const extra of copy.querySelectorAll(".pic-tools, .pic-table, .pic-python, .pic-tip")) extra.remove();
      const rules = [...document.styleSheets].flatMap((sheet) => {
        try {
          return [...sheet.cssRules].flatMap((rule) => rulesFor(picture, rule));
        } catch {
          return []; // another host's sheet
        }
      });
      const style = getComputedStyle(picture);
      copy.setAttribute("style", `width:${width}px;padding:16px;background:${style.getPropertyValue("--paper")};color:${style.getPropertyValue("--ink")};font-family:${style.fontFamily.replaceAll('"', "'")};font-size:${style.fontSize}`);
      for (const name of ["--memory", "--cot", "--ink", "--soft", "--line", "--edge-line", "--paper", "--sheet", "--right", "--wrong", "--direct", "--serif"])
        copy.style.setProperty(name, style.getPropertyValue(name));
      copy.querySelectorAll(".lit").forEach((mark) => mark.classList.remove("lit"));
      // Rules may ask for what the page around is called (Gradio puts its names before every rule).
      const page = picture.closest(".gradio-container");
      const around = document.createElement("div");
      if (page) around.className = `${page.className} ${picture.closest(".dark") ? "dark" : ""}`;
      around.style.cssText = "all: initial; display: block";
      around.innerHTML = '<div class="contain"></div>';
      around.firstChild.append(copy);
      const body = new XMLSerializer().serializeToString(around);
      const css = rules.join("\n").replaceAll("&", "&amp;").replaceAll("<", "&lt;");
      const svg = `<svg xmlns="http://www.w3.org/2000/svg" width="${width + 32}" height="${height}"><style>${css}</style><foreignObject width="100%" height="100%">${body}</foreignObject></svg>`;
      const image = new Image();
      image.src = "data:image/svg+xml;charset=utf-8," + encodeURIComponent(svg);
      try {
        await image.decode();
      } catch {
        return say(button, "Not in this browser");
      }
      const canvas = document.createElement("canvas");
      canvas.width = 2 * (width + 32);
      canvas.height = 2 * height;
      const pen = canvas.getContext("2d");
      pen.scale(2, 2);
      pen.fillStyle = style.getPropertyValue("--paper");
      pen.fillRect(0, 0, canvas.width, canvas.height);
      pen.drawImage(image, 0, 0);
      canvas.toBlob((blob) => save(`rim-probe-${picture.dataset.panel}.png`, URL.createObjectURL(blob)));
    },
  };
}
