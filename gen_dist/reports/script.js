"use strict";

// Sliders choose which picture of a series is shown; all of them stand in the page.
for (const figure of document.querySelectorAll(".series")) {
  const slider = figure.querySelector("input");
  if (!slider) continue;
  const pictures = figure.querySelectorAll("img");
  const output = figure.querySelector("output");
  const labels = slider.dataset.labels.split("|");
  const button = figure.querySelector("[data-play]");
  let playing = 0;

  const show = () => {
    pictures.forEach((picture, place) => { picture.hidden = place !== slider.valueAsNumber; });
    output.textContent = labels[slider.valueAsNumber];
    slider.setAttribute("aria-valuetext", labels[slider.valueAsNumber]);
  };
  const stop = () => {
    clearInterval(playing);
    playing = 0;
    button.textContent = "▶";
  };
  slider.addEventListener("input", () => { stop(); show(); });
  button.addEventListener("click", () => {
    if (playing) { stop(); return; }
    if (slider.value === slider.max) slider.value = 0;
    show();
    button.textContent = "❚❚";
    playing = setInterval(() => {
      slider.stepUp();
      show();
      if (slider.value === slider.max) stop();
    }, 500);
  });
  show(); // browsers restore a slider's place when a page is loaded again
}

// Originals, reconstructions and their difference stand in a row. Here they take one place, and a slider chooses.
for (const figure of document.querySelectorAll(".pairs")) {
  const panes = [...figure.querySelectorAll(".pane")];
  const place = figure.querySelector(".panes");
  const controls = figure.querySelector(".slider");
  const slider = figure.querySelector("input");
  const output = figure.querySelector("output");
  const button = figure.querySelector("[data-zoom]");
  let zoom = 1;

  const show = () => {
    panes.forEach((pane, index) => { pane.hidden = index !== slider.valueAsNumber; });
    const label = panes[slider.valueAsNumber].dataset.label;
    output.textContent = label;
    slider.setAttribute("aria-valuetext", label);
  };
  button.addEventListener("click", () => {
    // The middle of what is seen stays in the middle.
    const x = (place.scrollLeft + place.clientWidth / 2) / zoom;
    const y = (place.scrollTop + place.clientHeight / 2) / zoom;
    if (zoom === 1) place.style.height = `${place.offsetHeight}px`;
    zoom = zoom === 4 ? 1 : 2 * zoom;
    if (zoom === 1) place.style.height = "";
    place.style.setProperty("--zoom", zoom);
    place.scrollTo(x * zoom - place.clientWidth / 2, y * zoom - place.clientHeight / 2);
    button.textContent = `${zoom}×`;
    button.setAttribute("aria-label", `zoom, now ${zoom} times`);
  });
  slider.addEventListener("input", show);
  figure.classList.add("stacked");
  controls.hidden = false;
  show();
}

// The legend of a chart shows the values at the pointer, or where arrow keys went.
const SVG = "http://www.w3.org/2000/svg";
for (const figure of document.querySelectorAll(".chart")) {
  const lines = Object.entries(JSON.parse(figure.dataset.points)).filter(([, points]) => points.length);
  const drawing = figure.querySelector(":scope > svg");
  const cursor = figure.querySelector("[data-cursor]");
  const at = figure.querySelector("[data-at]");
  const values = Object.fromEntries([...figure.querySelectorAll("[data-line]")].map((one) => [one.dataset.line, one]));
  const steps = [...new Set(lines.flatMap(([, points]) => points.map((point) => point[2])))].sort((a, b) => a - b);
  let chosen = null;

  const add = (kind, attributes) => {
    const shape = document.createElementNS(SVG, kind);
    for (const [name, value] of Object.entries(attributes)) shape.setAttribute(name, value);
    cursor.append(shape);
  };
  const nearest = (points, step) =>
    points.reduce((best, point) => (Math.abs(point[2] - step) < Math.abs(best[2] - step) ? point : best));
  const choose = (step) => {
    chosen = step;
    cursor.replaceChildren();
    for (const [name, points] of lines) {
      const [x, y, , value] = nearest(points, step);
      if (!cursor.childElementCount) add("path", { class: "cursor", d: `M${x} 8V178` });
      const colour = values[name].parentElement.querySelector("path").classList[0];
      add("circle", { class: colour, cx: x, cy: y, r: 3.2 });
      values[name].textContent = value;
    }
    at.textContent = `step ${step.toLocaleString("en")}`;
  };
  const leave = () => {
    chosen = null;
    cursor.replaceChildren();
    for (const one of Object.values(values)) one.textContent = one.dataset.last;
    at.textContent = "last value";
  };
  if (!steps.length) continue;
  drawing.addEventListener("pointermove", (event) => {
    const box = drawing.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * 360;
    const all = lines.flatMap(([, points]) => points);
    choose(all.reduce((best, point) => (Math.abs(point[0] - x) < Math.abs(best[0] - x) ? point : best))[2]);
  });
  drawing.addEventListener("pointerleave", leave);
  figure.addEventListener("blur", leave);
  figure.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!move) return;
    event.preventDefault();
    const place = chosen === null ? (move > 0 ? -1 : steps.length) : steps.indexOf(chosen);
    choose(steps[Math.min(Math.max(place + move, 0), steps.length - 1)]);
  });
}
