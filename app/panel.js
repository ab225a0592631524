// The panels in the browser: sends what is chosen to the server, and keeps the tabs and the address in step with what comes.
// Runs once per gr.HTML with `element` and `trigger`; `pictures` comes from rim_probe/pictures/picture.js.

function send(what) {
  document.querySelector("#panel")?.classList.add("busy");
  trigger("select", what);
}
pictures(element, send);

element.addEventListener("click", (event) => {
  const tab = event.target.closest("[role=tab]");
  if (tab) openPanel(tab);
  if (event.target.closest("[data-save]")) document.querySelector("#export-button").click();
});
element.addEventListener("keydown", (event) => {
  const tab = event.target.closest("[role=tab]");
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!tab || !step) return;
  event.preventDefault();
  const tabs = [...element.querySelectorAll("[role=tab]")];
  const next = tabs[(tabs.indexOf(tab) + step + tabs.length) % tabs.length];
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

// ---- after the server has drawn: focus goes back to the control that was used, for it was replaced by a new one
let used = null;
element.addEventListener("focusin", (event) => {
  const mark = event.target.closest("[data-view], [data-do], [data-view-key], [data-do-input], [data-cell]");
  used = mark && ["view", "do", "viewKey", "doInput", "cell"].map((key) => [key, mark.dataset[key]]).filter((pair) => pair[1]);
});
watch("value", () => {
  window.rimProbe.drawn(element);
  if (!used || document.activeElement !== document.body) return;
  const names = { view: "data-view", do: "data-do", viewKey: "data-view-key", doInput: "data-do-input", cell: "data-cell" };
  const again = element.querySelector(used.map(([key, value]) => `[${names[key]}="${CSS.escape(value)}"]`).join(""));
  if (again) again.focus({ preventScroll: true });
});
