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

// ---- links of the masthead
document.addEventListener("click", async (event) => {
  const near = (selector) => event.target.closest?.(selector);
  if (near("[data-tour]")) document.querySelector("#tour [data-step]")?.click();
  const button = near("[data-copy-link], [data-copy]");
  if (!button) return;
  const text = button.dataset.copy === undefined ? location.href : button.parentNode.querySelector("pre").textContent;
  const name = button.textContent;
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
    setTimeout(() => (button.textContent = name), 1600);
  } catch {
    prompt("Copy this:", text); // no clipboard here (an insecure address)
  }
});

// ---- which panel is open: the tabs know at once, the server draws what belongs below them
window.rimProbe = {
  mark(panel) {
    for (const tab of document.querySelectorAll("#tabs [role=tab]")) {
      const open = tab.dataset.panel === panel;
      tab.setAttribute("aria-selected", open);
      tab.tabIndex = open ? 0 : -1;
      const row = tab.closest(".tabs");
      if (open && row.scrollWidth > row.clientWidth) row.scrollLeft = tab.offsetLeft - row.clientWidth / 2;
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
  // Another panel or question is a place of its own in the browser's history; what is selected in a panel is not.
  went: false, // by Back or Forward
  place(query) {
    const parts = new URLSearchParams(query);
    for (const key of [...parts.keys()]) if (/^(v|c)\./.test(key)) parts.delete(key);
    return parts.toString();
  },
  visit(address) {
    const moved = !this.went && this.place(address) !== this.place(location.search);
    this.went = false;
    if (address !== location.search) history[moved ? "pushState" : "replaceState"](null, "", location.pathname + address);
  },
  // The server has drawn: what it drew says which panel it is, and the address that brings it back.
  drawn(element) {
    if (element.querySelector("[data-reload]")) return location.reload();
    const panel = element.querySelector("[data-open]");
    if (panel) {
      document.querySelector("#panel").classList.remove("busy");
      this.mark(panel.dataset.open);
      // A panel that opens may be out of sight: below the question on a narrow screen, above a button at the end of another one.
      if (panel.dataset.open !== this.open) {
        this.open = panel.dataset.open;
        requestAnimationFrame(() => this.reveal());
      }
      this.visit(panel.dataset.address);
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
window.addEventListener("popstate", () => {
  window.rimProbe.went = true;
  window.rimProbe.send?.({ go: location.search });
});
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || !/^[1-9]$/.test(event.key)) return;
  if (event.target.closest && event.target.closest("input, textarea, select, [contenteditable]")) return;
  const tab = document.querySelectorAll("#tabs [role=tab]")[Number(event.key) - 1];
  if (tab) tab.click();
});
