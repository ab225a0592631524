// The page's keyboard: Enter (or Ctrl/Cmd+Enter anywhere beside the question) runs, Shift+Enter makes a new line.
document.addEventListener(
  "keydown",
  (event) => {
    if (event.key !== "Enter" || event.isComposing || !event.target.closest) return;
    const typing = event.target.closest("#question, #gold");
    const shortcut = (event.ctrlKey || event.metaKey) && event.target.closest("#page");
    if (!shortcut && (!typing || event.shiftKey)) return;
    event.preventDefault();
    event.stopPropagation();
    document.querySelector("#run").click();
  },
  true,
);

// ---- which panel is open: the tabs know at once, the server draws what belongs below them
window.rimProbe = {
  mark(panel) {
    for (const tab of document.querySelectorAll("#tabs [role=tab]")) {
      const open = tab.dataset.panel === panel;
      tab.setAttribute("aria-selected", open);
      tab.tabIndex = open ? 0 : -1;
    }
    document.querySelector("#stage-column")?.setAttribute("data-panel", panel);
  },
  open: "race",
  reveal() {
    const tabs = document.querySelector("#tabs");
    const { top } = tabs.getBoundingClientRect();
    const covered = parseFloat(getComputedStyle(tabs).scrollMarginTop); // by a step of the tour
    if (top < covered - 8 || top > Math.max(window.innerHeight / 2, covered + 9)) tabs.scrollIntoView({ block: "start" });
  },
  // The server has drawn: what it drew says which panel it is, and the address that brings it back.
  drawn(element) {
    const panel = element.querySelector("[data-open]");
    if (panel) {
      document.querySelector("#panel").classList.remove("busy");
      this.mark(panel.dataset.open);
      // A panel that opens may be out of sight: below the question on a narrow screen, above a button at the end of another one.
      if (panel.dataset.open !== this.open) {
        this.open = panel.dataset.open;
        requestAnimationFrame(() => this.reveal());
      }
      if (panel.dataset.address !== location.search) history.replaceState(null, "", location.pathname + panel.dataset.address);
    }
    const file = element.querySelector("template[data-file]");
    if (file) {
      const link = document.createElement("a");
      link.download = file.dataset.file;
      link.href = URL.createObjectURL(new Blob([file.content.textContent], { type: "application/json" }));
      link.click();
    }
  },
};
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || !/^[1-9]$/.test(event.key)) return;
  if (event.target.closest && event.target.closest("input, textarea, select, [contenteditable]")) return;
  const tab = document.querySelectorAll("#tabs [role=tab]")[Number(event.key) - 1];
  if (tab) tab.click();
});
