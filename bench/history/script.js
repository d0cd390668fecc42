"use strict";

// Below a drawing stands its newest figure, or the one at the pointer, or where arrow keys went.
for (const figure of document.querySelectorAll(".chart")) {
  const points = JSON.parse(figure.dataset.points);
  const drawing = figure.querySelector(":scope > svg");
  const reading = figure.querySelector("[data-reading]");
  const marks = [...figure.querySelectorAll(".mark")];
  let chosen = null;

  // The browser's own hints, which are there without a script, would cover the drawing.
  for (const mark of marks) mark.querySelector("title").remove();

  const choose = (place) => {
    chosen = place;
    const text = points[place][2];
    reading.textContent = text;
    for (const mark of marks) mark.classList.toggle("chosen", mark.dataset.text === text);
  };
  const leave = () => {
    chosen = null;
    reading.textContent = reading.dataset.latest;
    for (const mark of marks) mark.classList.remove("chosen");
  };
  drawing.addEventListener("pointermove", (event) => {
    const box = drawing.getBoundingClientRect();
    const scale = 360 / box.width;
    const x = (event.clientX - box.left) * scale;
    const y = (event.clientY - box.top) * scale;
    const distance = (point) => Math.hypot(point[0] - x, 0.3 * (point[1] - y)); // the column counts most
    choose(points.reduce((best, point, place) => (distance(point) < distance(points[best]) ? place : best), 0));
  });
  drawing.addEventListener("pointerleave", leave);
  figure.addEventListener("blur", leave);
  figure.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!move) return;
    event.preventDefault();
    const place = chosen === null ? (move > 0 ? -1 : points.length) : chosen;
    choose(Math.min(Math.max(place + move, 0), points.length - 1));
  });
}
