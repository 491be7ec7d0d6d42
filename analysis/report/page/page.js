"use strict";

// Tables: a click on a column's head sorts by it, another one turns the order round.
for (const head of document.querySelectorAll("table.sortable th")) {
  const button = document.createElement("button");
  button.type = "button";
  button.append(...head.childNodes);
  head.append(button);
  button.addEventListener("click", () => {
    const table = head.closest("table");
    const body = table.tBodies[0];
    const column = head.cellIndex;
    const down = head.getAttribute("aria-sort") === "ascending";
    const key = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent;
    const order = (a, b) => {
      const [one, two] = [key(a), key(b)];
      if (one === "" || two === "") return (one === "") - (two === ""); // nothing goes last
      const difference = Number(one) - Number(two);
      const sign = Number.isNaN(difference) ? one.localeCompare(two) : difference;
      return down ? -sign : sign;
    };
    body.append(...[...body.rows].sort(order));
    for (const other of table.querySelectorAll("th")) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
  });
}

// Models: a checkbox shows or hides what belongs to one of them in every figure of its run.
for (const box of document.querySelectorAll(".models input")) {
  const show = () => {
    for (const part of box.closest("section").querySelectorAll(`[id*=":${box.value}:"]`)) {
      part.style.display = box.checked ? "" : "none";
    }
  };
  box.addEventListener("change", show);
  show(); // a browser may remember the box of an earlier visit
}

// Figures: the values under the pointer.
for (const figure of document.querySelectorAll("figure[data-values]")) {
  const data = JSON.parse(document.getElementById(figure.dataset.values).textContent);
  const svg = figure.querySelector("svg.plot");
  const [left, top, right, bottom] = data.plot.box;
  const line = document.createElementNS("http://www.w3.org/2000/svg", "line");
  for (const [name, value] of Object.entries({ y1: top, y2: bottom, stroke: "currentColor", "stroke-width": 0.7 })) {
    line.setAttribute(name, value);
  }
  const box = document.createElement("div");
  box.className = "values";
  const hide = () => { line.remove(); box.remove(); };
  const format = (value) => (value === null ? "none" : String(Number(value.toPrecision(4))));
  svg.addEventListener("pointermove", (event) => {
    const place = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    if (place.x < left || place.x > right || place.y < top || place.y > bottom) return hide();
    const [low, high] = data.plot.x;
    const x = low + ((place.x - left) / (right - left)) * (high - low);
    let nearest = 0;
    data.x.forEach((value, i) => { if (Math.abs(value - x) < Math.abs(data.x[nearest] - x)) nearest = i; });
    const at = left + ((data.x[nearest] - low) / (high - low)) * (right - left);
    line.setAttribute("x1", at);
    line.setAttribute("x2", at);
    const rows = [`${data.label} ${format(data.x[nearest])}`];
    for (const series of data.series) {
      const toggle = series.model && figure.closest("section").querySelector(`.models input[value="${series.model}"]`);
      if (!toggle || toggle.checked) rows.push(`${series.label}: ${format(series.y[nearest])}`);
    }
    box.replaceChildren(...rows.map((text) => {
      const row = document.createElement("div");
      row.textContent = text;
      return row;
    }));
    svg.append(line);
    figure.append(box);
    const inside = event.clientX - figure.getBoundingClientRect().left;
    const room = figure.clientWidth - box.offsetWidth;
    box.style.left = `${Math.max(0, Math.min(room, inside > figure.clientWidth / 2 ? inside - box.offsetWidth - 16 : inside + 16))}px`;
  });
  svg.addEventListener("pointerleave", hide);
}

// A print shows what is folded away on screen.
window.addEventListener("beforeprint", () => {
  for (const folded of document.querySelectorAll("details")) folded.open = true;
});
