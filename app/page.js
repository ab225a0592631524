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
