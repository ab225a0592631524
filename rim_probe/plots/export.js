// A panel as an SVG of boxes, words and charts: read from where the browser has put them, so it opens in any editor.
// `charts`: for each chart's box its own SVG as a data address.
function panelSvg(panel, charts, caption) {
  const escape = (text) => text.replace(/[&<>"]/g, (sign) => `&#${sign.charCodeAt(0)};`);
  const pen = Object.assign(document.createElement("canvas"), { width: 1, height: 1 }).getContext("2d", { willReadFrequently: true });
  const known = new Map();
  function paint(colour) {
    // Any CSS colour, as [#rrggbb, opacity].
    if (!known.has(colour)) {
      pen.clearRect(0, 0, 1, 1);
      pen.fillStyle = colour;
      pen.fillRect(0, 0, 1, 1);
      const [r, g, b, a] = pen.getImageData(0, 0, 1, 1).data;
      known.set(colour, [`#${[r, g, b].map((part) => part.toString(16).padStart(2, "0")).join("")}`, a / 255]);
    }
    return known.get(colour);
  }
  const out = [];
  const defs = [];
  const fill = (colour, name = "fill") => `${name}="${paint(colour)[0]}" ${name}-opacity="${paint(colour)[1].toFixed(3)}"`;
  const box = (x, y, w, h, r, rest) => out.push(`<rect x="${x.toFixed(1)}" y="${y.toFixed(1)}" width="${w.toFixed(1)}" height="${h.toFixed(1)}" rx="${r}" ${rest}/>`);

  // Light, without controls, nothing scrolled away; all of it is undone before the browser draws again.
  const dark = [...document.querySelectorAll(".dark")];
  const scrolled = [...panel.querySelectorAll("*")].filter((one) => one.scrollTop || one.scrollLeft).map((one) => [one, one.scrollTop, one.scrollLeft]);
  dark.forEach((one) => one.classList.remove("dark"));
  panel.classList.add("exporting");
  scrolled.forEach(([one]) => one.scrollTo(0, 0));
  const from = panel.getBoundingClientRect();
  const edge = 16;
  const place = ({ left, top, width, height }) => [left - from.left + edge, top - from.top + edge, width, height];
  let [right, bottom] = [from.width, from.height].map((size) => size + 2 * edge);

  function background(style, [x, y, w, h], radius) {
    if (paint(style.backgroundColor)[1]) box(x, y, w, h, radius, fill(style.backgroundColor));
    const gradient = /^(repeating-)?linear-gradient\((?:to (top|right)|[\d.]+deg)?/.exec(style.backgroundImage);
    if (!gradient) return;
    const stops = [...style.backgroundImage.matchAll(/((?:rgba?|color|oklab|oklch|lab|hsl)\([^)]*\)|transparent)\s*(-?[\d.]+(?:%|px))?/g)];
    if (gradient[1]) return box(x, y, w, h, radius, fill(stops[0][1]) + ' opacity="0.55"'); // hatching
    const along = gradient[2] === "top" ? 'x1="0" y1="1" x2="0" y2="0"' : 'x1="0" y1="0" x2="1" y2="0"';
    let last = 0;
    const marks = stops.map(([, colour, at], i) => {
      last = Math.max(last, at ? (at.endsWith("px") ? parseFloat(at) / (gradient[2] === "top" ? h : w) : parseFloat(at) / 100) : i / (stops.length - 1));
      return `<stop offset="${last.toFixed(4)}" ${fill(colour, "stop").replace('stop="', 'stop-color="')}/>`;
    });
    defs.push(`<linearGradient id="g${defs.length}" ${along}>${marks.join("")}</linearGradient>`);
    box(x, y, w, h, radius, `fill="url(#g${defs.length - 1})"`);
  }
  function border(style, [x, y, w, h], radius) {
    const sides = ["Top", "Right", "Bottom", "Left"].map((side) => ({
      wide: style[`border${side}Style`] === "none" ? 0 : parseFloat(style[`border${side}Width`]),
      colour: style[`border${side}Color`],
      dash: style[`border${side}Style`] === "dashed" ? ' stroke-dasharray="4 3"' : style[`border${side}Style`] === "dotted" ? ' stroke-dasharray="1 2"' : "",
    }));
    const [first] = sides;
    if (sides.every((side) => side.wide === first.wide && side.colour === first.colour)) {
      if (first.wide) box(x + first.wide / 2, y + first.wide / 2, w - first.wide, h - first.wide, radius, `fill="none" ${fill(first.colour, "stroke")} stroke-width="${first.wide}"${first.dash}`);
    } else {
      const lines = [[x, y, x + w, y], [x + w, y, x + w, y + h], [x, y + h, x + w, y + h], [x, y, x, y + h]];
      sides.forEach(({ wide, colour, dash }, i) => {
        const inward = [[0, wide / 2], [-wide / 2, 0], [0, -wide / 2], [wide / 2, 0]][i];
        const [x1, y1, x2, y2] = lines[i].map((value, k) => (value + inward[k % 2]).toFixed(1));
        if (wide && paint(colour)[1]) out.push(`<line x1="${x1}" y1="${y1}" x2="${x2}" y2="${y2}" ${fill(colour, "stroke")} stroke-width="${wide}"${dash}/>`);
      });
    }
    const ring = /(rgba?\([^)]*\)|color\([^)]*\)) 0px 0px 0px ([\d.]+)px inset/.exec(style.boxShadow);
    if (ring) box(x + 1, y + 1, w - 2, h - 2, radius, `fill="none" ${fill(ring[1], "stroke")} stroke-width="${ring[2]}"`);
    if (style.outlineStyle === "solid" && parseFloat(style.outlineWidth)) box(x, y, w, h, radius, `fill="none" ${fill(style.outlineColor, "stroke")} stroke-width="${parseFloat(style.outlineWidth)}"`);
  }
  const range = document.createRange();
  function words(node, style) {
    pen.font = `${style.fontStyle} ${style.fontWeight} ${style.fontSize} ${style.fontFamily}`;
    const { fontBoundingBoxAscent: up, fontBoundingBoxDescent: down } = pen.measureText("x");
    const look = `${fill(style.color)} font-family="${escape(style.fontFamily)}" font-size="${style.fontSize}" font-weight="${style.fontWeight}"${style.fontStyle === "italic" ? ' font-style="italic"' : ""}`;
    for (const word of node.data.matchAll(/\S+/g)) {
      range.setStart(node, word.index);
      range.setEnd(node, word.index + word[0].length);
      for (const part of range.getClientRects()) {
        const [x, y, w, h] = place(part);
        if (w < 0.5) continue;
        const whole = range.getClientRects().length === 1 ? word[0] : piece(node, word, part);
        const shown = style.textTransform === "uppercase" ? whole.toUpperCase() : whole;
        out.push(`<text x="${x.toFixed(1)}" y="${(y + (h - up - down) / 2 + up).toFixed(1)}" textLength="${w.toFixed(1)}" lengthAdjust="spacingAndGlyphs" ${look}>${escape(shown)}</text>`);
        right = Math.max(right, x + w + edge);
      }
    }
  }
  function piece(node, word, part) {
    // A word that is broken over lines: the characters of one of them.
    const one = document.createRange();
    return [...word[0]].filter((_, i) => {
      one.setStart(node, word.index + i);
      one.setEnd(node, word.index + i + 1);
      return Math.abs(one.getBoundingClientRect().top - part.top) < 2;
    }).join("");
  }
  function drawing(svg, [x, y, w, h]) {
    const copy = svg.cloneNode(true);
    const [olds, news] = [svg, copy].map((one) => [one, ...one.querySelectorAll("*")]);
    news.forEach((one, i) => {
      const style = getComputedStyle(olds[i]);
      for (const name of ["fill", "stroke"]) one.setAttribute(name, style[name] === "none" ? "none" : paint(style[name])[0]);
      for (const name of ["stroke-width", "stroke-dasharray", "opacity", "vector-effect"]) one.setAttribute(name, style.getPropertyValue(name));
    });
    for (const [name, value] of Object.entries({ x, y, width: w, height: h, overflow: "visible" })) copy.setAttribute(name, value);
    out.push(new XMLSerializer().serializeToString(copy));
  }
  function walk(node) {
    if (node.nodeType === Node.TEXT_NODE) return node.data.trim() && words(node, getComputedStyle(node.parentNode));
    if (node.nodeType !== Node.ELEMENT_NODE || !node.checkVisibility({ visibilityProperty: true, opacityProperty: true })) return;
    const at = place(node.getBoundingClientRect());
    const style = getComputedStyle(node);
    if (node.classList.contains("sr")) return;
    if (charts.has(node)) {
      const text = decodeURIComponent(charts.get(node).replace(/^data:image\/svg\+xml,/, ""));
      return out.push(text.replace("<svg ", `<svg x="${at[0]}" y="${at[1]}" `));
    }
    const faint = Number(style.opacity) < 1;
    if (faint) out.push(`<g opacity="${style.opacity}">`);
    if (node instanceof SVGSVGElement) drawing(node, at);
    else {
      const radius = Math.min(parseFloat(style.borderTopLeftRadius) || 0, at[3] / 2);
      if (style.display !== "contents" && node !== panel) {
        background(style, at, radius);
        border(style, at, radius);
        if (at[2]) right = Math.max(right, at[0] + at[2] + edge);
      }
      for (const child of node.childNodes) walk(child);
    }
    if (faint) out.push("</g>");
  }
  try {
    walk(panel);
  } finally {
    panel.classList.remove("exporting");
    dark.forEach((one) => one.classList.add("dark"));
    scrolled.forEach(([one, top, left]) => one.scrollTo(left, top));
  }
  const longest = Math.floor((right - 2 * edge) / 6.2);
  const lines = caption.match(new RegExp(`.{1,${longest}}(?:\\s|$)|\\S+`, "g")) ?? [];
  lines.forEach((line, i) => out.push(`<text x="${edge}" y="${bottom + 6 + 16 * i}" font-family="sans-serif" font-size="12" fill="#57534e">${escape(line.trim())}</text>`));
  const [width, height] = [Math.ceil(right), Math.ceil(bottom + 16 * lines.length + 8)];
  const text = `<svg xmlns="http://www.w3.org/2000/svg" width="${width}" height="${height}" viewBox="0 0 ${width} ${height}"><title>${escape(caption)}</title><defs>${defs.join("")}</defs><rect width="100%" height="100%" fill="#fff"/>${out.join("\n")}</svg>`;
  return { text, width, height };
}
