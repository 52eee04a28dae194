"use strict";
// Shows a cell's five best tokens while it is pointed at or has the focus; arrow keys move.
// Tokens only ever enter the page as text.
const { cells, symbols } = JSON.parse(document.getElementById("data").textContent);
const table = document.querySelector("table.lens");
const card = document.getElementById("card");
const spoken = document.getElementById("spoken");
const body = table.tBodies[0];
const percent = (p) => (p < 0.001 ? "<0.1" : (100 * p).toFixed(p < 0.1 ? 1 : 0)) + "%";

function element(name, text = "") {
  const made = document.createElement(name);
  made.textContent = text;
  return made;
}

function place(cell) {
  return { row: cell.parentElement.sectionRowIndex, column: cell.cellIndex - 1 };
}

function describe(cell) {
  const { row, column } = place(cell);
  const said = cells[row][column];
  const answer = cells[0][column].top[0][0];
  const layer = body.rows[row].cells[0].firstElementChild.firstChild.textContent.trim();
  const position = table.tHead.rows[0].cells[column + 1].querySelector(".position").firstChild.textContent.trim();
  const list = element("ol");
  for (const [symbol, p] of said.top) {
    const item = element("li");
    item.className = symbol === answer ? "agrees" : "differs";
    item.style.setProperty("--p", 100 * p);
    item.append(element("bdi", symbols[symbol]), element("span", percent(p)));
    list.append(item);
  }
  const note = element("p", "The last layer says ");
  note.append(element("bdi", symbols[answer]), `; this layer gives it ${percent(said.answer)}.`);
  return [element("h3", `Layer ${layer}, position ${position}`), list, note];
}

let shown = null;

function show(cell) {
  shown = cell;
  card.replaceChildren(...describe(cell));
  card.hidden = false;
  beside(cell);
}

function beside(cell) {
  const at = cell.getBoundingClientRect();
  const below = at.bottom + 8 + card.offsetHeight < innerHeight;
  card.style.top = `${Math.max(8, below ? at.bottom + 8 : at.top - card.offsetHeight - 8)}px`;
  card.style.left = `${Math.max(8, Math.min(at.left, innerWidth - card.offsetWidth - 8))}px`;
}

function hide() {
  shown = null;
  card.hidden = true;
}

const cellOf = (event) => event.target.closest?.("table.lens tbody td");

body.addEventListener("mouseover", (event) => {
  const cell = cellOf(event);
  if (cell) show(cell);
});
body.addEventListener("mouseleave", () => {
  const focused = document.activeElement.closest("table.lens tbody td");
  if (focused) show(focused);
  else hide();
});
body.addEventListener("focusin", (event) => {
  const cell = cellOf(event);
  if (!cell) return;
  for (const other of body.querySelectorAll('td[tabindex="0"]')) other.tabIndex = -1;
  cell.tabIndex = 0;
  show(cell);
  spoken.textContent = card.innerText.replaceAll("\n", ", ");
});
body.addEventListener("focusout", hide);
addEventListener("scroll", () => shown && beside(shown), { capture: true, passive: true });

const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
table.addEventListener("keydown", (event) => {
  if (event.key === "Escape") return hide();
  const cell = cellOf(event);
  if (!cell) return;
  const { row, column } = place(cell);
  const last = cells[0].length - 1;
  let target;
  if (event.key in steps) target = [row + steps[event.key][0], column + steps[event.key][1]];
  else if (event.key === "Home") target = [row, 0];
  else if (event.key === "End") target = [row, last];
  else return;
  event.preventDefault();
  const next = cells[target[0]]?.[target[1]] && body.rows[target[0]].cells[target[1] + 1];
  if (!next) return;
  next.focus({ preventScroll: true });
  next.scrollIntoView({ block: "nearest", inline: "nearest" });
});

// The answer is what people came for; the prompt is to the left of it.
const answer = table.tHead.querySelector("th.answer");
if (answer) {
  const before = table.tHead.rows[0].cells[0].offsetWidth + answer.offsetWidth;
  table.parentElement.scrollLeft = answer.offsetLeft - before;
}
