// What the drawn parts of the page do in the browser. Runs once per gr.HTML, with `element` and `trigger`; the HTML inside is
// replaced while a run streams, so every listener sits on `element` and looks for its target when something happens.

pictures(element, () => {}); // full screen, PNG and CSV, as for every other figure

// ---- choosing: a question or a model that a notice offers, a recorded run, to load a model once more
element.addEventListener("click", (event) => {
  const [example, model, recording, again, replay] = ["[data-example]", "[data-model]", "[data-recorded]", "[data-again]", ".replay"].map(
    (mark) => event.target.closest(mark),
  );
  if (example) trigger("select", JSON.parse(example.dataset.example));
  if (model) trigger("select", { model: model.dataset.model });
  if (recording) trigger("select", { index: Number(recording.dataset.recorded) });
  if (again) trigger("select", { again: true });
  if (replay) toggleReplay(replay.closest(".stage"));
});

// ---- reading: marks explain themselves in a line of text below them
function showTip(mark) {
  const line = mark.closest(".stage").querySelector(".tip");
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

// ---- slow motion: a finished race once more, all methods from the same zero, stretched to a length an eye can follow
function toggleReplay(stage) {
  if (stage.classList.contains("replaying")) return stage.classList.remove("replaying");
  const [marks, playhead, button] = [[...stage.querySelectorAll("[data-t]")], stage.querySelector(".playhead"), stage.querySelector(".replay")];
  const { end, axis, replay } = stage.dataset;
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
    playhead.dataset.now = end < 1 ? `${(1000 * Math.max(now, 0)).toFixed(end < 0.1 ? 1 : 0)} ms` : `${Math.max(now, 0).toFixed(2)} s`;
    if (!over) return requestAnimationFrame(draw);
    stage.classList.remove("replaying");
    playhead.hidden = true;
    button.textContent = button.dataset.idle;
  };
  draw(begun);
}
// By itself after every run and on load, once for each race.
let played = null;
function play() {
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  for (const stage of element.querySelectorAll(".stage:is(.done, .loaded)")) {
    const run = stage.getAttribute("aria-label");
    if (run !== played && !still && stage.querySelector(".replay") && stage.checkVisibility()) toggleReplay(stage);
    played = run;
  }
}
play();

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
  play();
});
