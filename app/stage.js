// What the drawn parts of the page do in the browser. Runs once per gr.HTML, with `element` and `trigger`; the HTML inside is
// replaced while a run streams, so every listener sits on `element` and looks for its target when something happens.

pictures(element, () => {}); // full screen, PNG and CSV, as for every other figure

// ---- choosing: an example (question, answer, gold steps), a recorded run (index), to load a model once more, a depth or outcome of the gallery (stays in the browser)
element.addEventListener("click", (event) => {
  const example = event.target.closest("[data-question]");
  if (example) {
    const { question, answer, steps } = example.dataset;
    trigger("select", { question, answer, steps: JSON.parse(steps) });
  }
  const recording = event.target.closest("[data-recorded]");
  if (recording) trigger("select", { index: Number(recording.dataset.recorded) });
  if (event.target.closest("[data-again]")) trigger("select", { again: true });
  const replay = event.target.closest(".replay");
  if (replay) toggleReplay(replay);
});
element.addEventListener("change", (event) => {
  if (event.target.name !== "depth") return;
  for (const list of element.querySelectorAll("[data-depth]")) list.hidden = list.dataset.depth !== event.target.value;
});

// ---- reading: marks explain themselves in a line of text below them
function tipLine(mark) {
  const card = mark.closest(".card");
  return card ? card.querySelector(".strip-note") : element.querySelector(".tip");
}
function showTip(mark) {
  const line = tipLine(mark);
  if (!line) return;
  line.dataset.rest ??= line.textContent;
  line.textContent = mark.dataset.tip;
  for (const other of element.querySelectorAll(".current")) other.classList.remove("current");
  mark.classList.add("current");
}
function hideTips() {
  for (const mark of element.querySelectorAll(".current")) mark.classList.remove("current");
  for (const line of element.querySelectorAll("[data-rest]")) {
    line.textContent = line.dataset.rest;
    delete line.dataset.rest;
  }
}
for (const kind of ["mouseover", "click"])
  element.addEventListener(kind, (event) => {
    const mark = event.target.closest("[data-tip]");
    if (mark) showTip(mark);
  });
element.addEventListener("mouseout", (event) => {
  if (event.target.closest("[data-tip]")) hideTips();
});
element.addEventListener("focusout", hideTips);
element.addEventListener("keydown", (event) => {
  const track = event.target.closest(".track");
  if (!track || !["ArrowLeft", "ArrowRight", "Home", "End"].includes(event.key)) return;
  event.preventDefault();
  const marks = [...track.querySelectorAll("[data-tip]")].sort((a, b) => a.dataset.t - b.dataset.t);
  const at = marks.findIndex((mark) => mark.classList.contains("current"));
  const next = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: marks.length - 1 }[event.key];
  const mark = marks[Math.min(Math.max(next, 0), marks.length - 1)];
  if (mark) showTip(mark);
});

// ---- replaying: a finished race once more, all methods from the same zero, stretched to a length an eye can follow
function toggleReplay(button) {
  const stage = button.closest(".stage");
  const marks = [...stage.querySelectorAll("[data-t]")];
  const playhead = stage.querySelector(".playhead");
  const { end, axis, replay } = stage.dataset;
  if (stage.classList.contains("replaying")) {
    stage.classList.remove("replaying");
    return;
  }
  stage.classList.add("replaying");
  button.textContent = button.dataset.busy;
  playhead.hidden = false;
  const begun = performance.now();
  // A new run redraws the stage and so takes the class away, which ends the replay too.
  const draw = (instant) => {
    const now = ((instant - begun) / 1000 / replay) * end;
    const over = now >= end || !stage.classList.contains("replaying");
    for (const mark of marks) mark.classList.toggle("later", !over && Number(mark.dataset.t) > now);
    playhead.style.left = `${(100 * Math.max(now, 0)) / axis}%`;
    if (!over) return requestAnimationFrame(draw);
    stage.classList.remove("replaying");
    playhead.hidden = true;
    button.textContent = button.dataset.idle;
  };
  requestAnimationFrame(draw);
}

// ---- looking: on a narrow screen the race, or the sentence that says why there is none, may be out of sight when it comes
let before = "";
watch("value", () => {
  const shown = element.querySelector(".stage, .notice");
  const state = shown ? shown.className : "";
  if (state !== before && (state === "notice" || state.includes("running"))) {
    const { top, bottom } = element.getBoundingClientRect();
    if (top > window.innerHeight - 200 || bottom < 100) element.scrollIntoView({ block: "start" });
  }
  before = state;
});
