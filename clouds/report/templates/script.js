"use strict";

// Figures
const source = document.getElementById("figures");
const specs = source ? JSON.parse(source.textContent) : [];
const plots = [...document.querySelectorAll(".plot")];
for (const plot of plots) {
  const { data, layout } = specs[Number(plot.dataset.figure)];
  plot.replaceChildren();
  if (plot.clientWidth < 420) layout.height += 8 * data.length; // the legend has one column
  layout.font.family = getComputedStyle(document.body).fontFamily;
  Plotly.newPlot(plot, data, layout, { displayModeBar: false, responsive: true });
}

// Print: figures fit the paper, and nothing is folded away.
const PAPER_WIDTH = 320;
let folded = [];
addEventListener("beforeprint", () => {
  folded = [...document.querySelectorAll("details:not([open])")];
  for (const details of folded) details.open = true;
  for (const plot of plots) Plotly.relayout(plot, { width: PAPER_WIDTH });
});
addEventListener("afterprint", () => {
  for (const details of folded) details.open = false;
  for (const plot of plots) Plotly.relayout(plot, { width: null, autosize: true });
});

// A slider between two of the tiles of a sample
function element(name, properties, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

function chooser(text, images, selected, changed) {
  const options = images.map((image, i) => new Option(image.alt, i, false, i === selected));
  const select = element("select", { onchange: () => changed(Number(select.value)) }, ...options);
  return element("label", {}, text, select);
}

function addSlider(sample) {
  const images = [...sample.querySelectorAll(".tiles img")];
  const left = element("img", { alt: "", className: "left" });
  const right = element("img", { alt: "", className: "right" });
  const stage = element("div", { className: "stage" }, right, left);
  const range = element("input", { type: "range", min: 0, max: 1000, value: 500 });
  range.setAttribute("aria-label", "position between the left and the right image");
  const move = () => stage.style.setProperty("--x", `${range.value / 10}%`);
  range.oninput = move;
  stage.append(element("div", { className: "line" }), range);
  const show = (image) => (i) => { image.src = images[i].src; };
  const last = images.length - 1;
  show(left)(0);
  show(right)(last);
  move();
  const choosers = element(
    "div", { className: "choosers" },
    chooser("left ", images, 0, show(left)),
    chooser("right ", images, last, show(right)),
  );
  sample.querySelector(".views").prepend(element("div", { className: "slider" }, stage, choosers));
}

document.querySelectorAll(".sample").forEach(addSlider);
