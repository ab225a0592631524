// The tour's card stays at the top of the window; what a step speaks of is scrolled below it and ringed.
element.addEventListener("click", (event) => {
  const step = event.target.closest("[data-step]");
  if (step) trigger("select", { step: step.dataset.step });
});
const unring = () => document.querySelectorAll(".ringed").forEach((old) => old.classList.remove("ringed"));
function point(selector) {
  const found = document.querySelector(selector);
  if (!found) return false;
  unring();
  found.classList.add("ringed");
  const top = found.getBoundingClientRect().top + scrollY - element.offsetHeight - 24;
  scrollTo({ top, behavior: matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth" });
  return true;
}
watch("value", () => {
  const card = element.querySelector("[data-point]");
  document.documentElement.style.setProperty("--tour", `${element.querySelector(".tour") ? element.offsetHeight : 0}px`);
  if (!card) return unring();
  let tries = 20; // the panel is drawn by the same event, but perhaps a moment later
  const look = () => card.isConnected && !point(card.dataset.point) && tries-- && setTimeout(look, 100);
  setTimeout(look, 150);
});
