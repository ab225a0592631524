// The panels in the browser: sends what is chosen to the server, and keeps the tabs and the address in step with what comes.
// Runs once per gr.HTML with `element` and `trigger`; `pictures` comes from rim_probe/plots/plots.js.

function send(what) {
  document.querySelector("#panel")?.classList.add("busy");
  trigger("select", what);
}
pictures(element, send);
if (element.querySelector("[role=tablist]")) window.rimProbe.send = send;

element.addEventListener("click", (event) => {
  const tab = event.target.closest("[role=tab]");
  if (tab) openPanel(tab);
  const other = event.target.closest("[data-to]");
  if (other) document.querySelector(`#tab-${other.dataset.to}`).click();
  if (event.target.closest("[data-save]")) document.querySelector("#export-button").click();
});
element.addEventListener("keydown", (event) => {
  const tab = event.target.closest("[role=tab]");
  if (!tab) return;
  const tabs = [...element.querySelectorAll("[role=tab]")];
  const at = tabs.indexOf(tab);
  const next = { ArrowRight: tabs[(at + 1) % tabs.length], ArrowLeft: tabs.at(at - 1), Home: tabs[0], End: tabs.at(-1) }[event.key];
  if (!next) return;
  event.preventDefault();
  next.focus();
  openPanel(next);
});
element.addEventListener("change", (event) => {
  const name = event.target.dataset && event.target.dataset.doInput;
  if (name) send({ do: { act: name, text: event.target.value } });
});
function openPanel(tab) {
  window.rimProbe.mark(tab.dataset.panel);
  send({ panel: tab.dataset.panel });
}

// ---- after the server has drawn: focus goes back to the control that was used, for it was replaced by a new one, and what was
// scrolled stays where it was
const MARKS = "[data-view], [data-do], [data-view-key], [data-do-input]";
const BOXES = ".layers-scroll, .chart-scroll, .surgery-map, .pic-scroll, ol";
let used = null;
let scrolled = [];
element.addEventListener("focusin", (event) => {
  const mark = event.target.closest(MARKS);
  if (!mark) return (used = null);
  const { cell, view, do: act, viewKey, doInput } = mark.dataset;
  const keys = { "data-cell": cell, "data-view": view, "data-do": act, "data-view-key": viewKey, "data-do-input": doInput };
  const exact = Object.entries(keys).filter(([, value]) => value).map(([name, value]) => `[${name}="${CSS.escape(value)}"]`);
  used = { selectors: [exact.join("")], place: [...element.querySelectorAll(MARKS)].indexOf(mark), of: count() };
  if (cell) used.selectors = ["[data-cell][aria-current]", ...used.selectors]; // pressed, so it is the chosen one now
  const label = mark.getAttribute("aria-label");
  if (label) used.selectors.push(`[aria-label="${CSS.escape(label)}"]`); // "one more block" asks for another number each time
});
element.addEventListener(
  "scroll",
  () => (scrolled = [...element.querySelectorAll(BOXES)].map((box) => [box.className, box.scrollLeft, box.scrollTop])),
  true,
);
function count() {
  return element.querySelectorAll(MARKS).length;
}
let newest = 0;
watch("value", () => {
  // Two events may be answered in another order than they were drawn in: what is older than what is shown is drawn anew.
  const number = Number(element.querySelector("[data-open]")?.dataset.drawn ?? newest);
  const stale = number < newest;
  newest = number; // also where it is lower: a server that was started anew counts from the beginning
  if (stale) return send({});
  window.rimProbe.drawn(element);
  const boxes = [...element.querySelectorAll(BOXES)];
  if (boxes.length === scrolled.length)
    boxes.forEach((box, i) => {
      if (box.className === scrolled[i][0]) [box.scrollLeft, box.scrollTop] = scrolled[i].slice(1);
    });
  if (!used || document.activeElement !== document.body) return;
  const able = (mark) => mark && !mark.disabled;
  let again = used.selectors.map((selector) => element.querySelector(selector)).find(able);
  if (!again && used.of === count()) again = element.querySelectorAll(MARKS)[used.place]; // a switch that now says the opposite
  if (!able(again)) again = element.querySelector("[role=tabpanel]"); // gone: another panel has opened
  if (again) again.focus({ preventScroll: true });
});
