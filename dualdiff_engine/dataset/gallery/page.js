// The gallery: a grid of which only the cells in view exist. Every text goes in as textContent.
"use strict";

const data = window.GALLERY;
const at = (id) => document.getElementById(id);
const grid = at("grid"), space = at("space"), large = at("large");
const NOT_MARKED = "none";
// cells in view at most: with their pictures and names, five nodes each
const MOST_CELLS = 60;
const memory = `dualdiff-gallery-${data.id}`;

const marks = new Map();
let shown = [], selected = 0, columns = 1, size = 200, side = "image";
let cells = new Map();

const nameOf = (row) =>
  `${data.products[row.product]}/${data.defects[row.defect]}/${String(row.number).padStart(6, "0")}`;

// ---- marks

function load() {
  try {
    for (const [n, mark] of JSON.parse(localStorage.getItem(memory) || "[]")) marks.set(n, mark);
  } catch { /* a browser that keeps nothing for files */ }
}

function mark(what) {
  if (!shown.length) return;
  const n = shown[selected];
  if (what === NOT_MARKED) marks.delete(n); else marks.set(n, what);
  try {
    localStorage.setItem(memory, JSON.stringify([...marks]));
  } catch { /* the marks last as long as the page */ }
  cells.delete(n);
  if (what === NOT_MARKED) select(selected); else select(selected + 1);
  draw();
}

function download() {
  const lines = [...marks].filter(([n, mark]) => mark === "reject" && isAccepted(data.rows[n]))
    .map(([n]) => nameOf(data.rows[n])).sort();
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob(lines.map((line) => line + "\n"), {type: "text/plain"}));
  link.download = "rejected.txt";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

// what a gate has rejected needs no rejection
const isAccepted = (row) => data.verdicts[row.verdict] === "accepted";

// ---- filters

function fill(id, names) {
  const select = at(id);
  select.append(new Option("all", ""));
  names.forEach((name, n) => select.append(new Option(name, String(n))));
  select.addEventListener("change", filter);
}

function filter() {
  const wanted = ["product", "defect", "verdict"].map((id) => [id, at(id).value]);
  const score = at("score").value, marked = at("marked").value;
  const least = at("least").value, most = at("most").value;
  const bounded = score !== "" && (least !== "" || most !== "");
  const before = shown[selected];
  shown = [];
  data.rows.forEach((row, n) => {
    if (wanted.some(([id, value]) => value !== "" && row[id] !== Number(value))) return;
    if (marked !== "" && (marks.get(n) || NOT_MARKED) !== MARKS[Number(marked)]) return;
    if (bounded) {
      const value = row.scores[Number(score)];
      if (value === null || (least !== "" && value < Number(least))) return;
      if (most !== "" && value > Number(most)) return;
    }
    shown.push(n);
  });
  at("count").textContent = `${shown.length} of ${data.rows.length} pairs`;
  grid.scrollTop = 0;
  select(Math.max(0, shown.indexOf(before)));
  layout();
}

const MARKS = [NOT_MARKED, "accept", "reject"];

// ---- the grid

function layout() {
  const width = grid.clientWidth, height = grid.clientHeight;
  size = Math.max(160, Math.ceil(Math.sqrt((width * height) / (MOST_CELLS / 2))));
  columns = Math.max(1, Math.floor(width / size));
  space.style.height = `${Math.ceil(shown.length / columns) * size}px`;
  clear();
  reveal();
  draw();
}

function clear() {
  space.replaceChildren();
  cells = new Map();
}

function draw() {
  const first = Math.floor(grid.scrollTop / size) * columns;
  const end = Math.ceil((grid.scrollTop + grid.clientHeight) / size) * columns;
  const next = new Map();
  for (let place = first; place < Math.min(end, shown.length); place += 1) {
    const n = shown[place];
    const cell = cells.get(n) || cellOf(n);
    cell.style.left = `${(place % columns) * size}px`;
    cell.style.top = `${Math.floor(place / columns) * size}px`;
    cell.style.width = cell.style.height = `${size}px`;
    cell.setAttribute("aria-selected", String(place === selected));
    cell.setAttribute("aria-posinset", String(place + 1));
    cell.setAttribute("aria-setsize", String(shown.length));
    next.set(n, cell);
  }
  space.replaceChildren(...next.values());
  cells = next;
  if (cells.has(shown[selected])) {
    grid.setAttribute("aria-activedescendant", `pair-${shown[selected]}`);
  } else {
    grid.removeAttribute("aria-activedescendant");
  }
}

function cellOf(n) {
  const row = data.rows[n], cell = element("div", `cell ${marks.get(n) || ""}`);
  const frame = element("div", "frame"), tint = element("div", "tint"), name = element("div", "name");
  const source = side === "anomaly" && row.anomaly ? row.anomaly : row.image;
  frame.append(picture(source, nameOf(row)), tint);
  tint.append(picture(row.mask, ""));
  const scores = data.scores.map((score, k) => [score, row.scores[k]]).filter(([, v]) => v !== null);
  const told = [nameOf(row), data.verdicts[row.verdict], marks.get(n) || ""]
    .concat(scores.map(([score, value]) => `${score} ${Number(value.toPrecision(4))}`));
  name.textContent = told.filter(Boolean).join(" · ");
  name.title = name.textContent;
  cell.append(frame, name);
  cell.id = `pair-${n}`;
  cell.setAttribute("role", "option");
  cell.setAttribute("aria-label", name.textContent);
  cell.addEventListener("click", () => { select(shown.indexOf(n)); draw(); });
  cell.addEventListener("dblclick", enlarge);
  return cell;
}

function element(kind, classes) {
  const made = document.createElement(kind);
  made.className = classes;
  return made;
}

function picture(source, text) {
  const image = document.createElement("img");
  image.decoding = "async";
  image.alt = text;
  image.src = source;
  return image;
}

// ---- moving

function select(place) {
  selected = Math.min(Math.max(place, 0), Math.max(shown.length - 1, 0));
  reveal();
  if (large.open) enlarge();
}

function reveal() {
  const top = Math.floor(selected / columns) * size;
  if (top < grid.scrollTop) grid.scrollTop = top;
  const over = top + size - grid.clientHeight;
  if (over > grid.scrollTop) grid.scrollTop = over;
}

function enlarge() {
  if (!shown.length) return;
  const cell = cellOf(shown[selected]);
  cell.removeAttribute("id");
  cell.style.position = "relative";
  large.replaceChildren(cell);
  large.classList.toggle("plain", grid.classList.contains("plain"));
  if (!large.open) large.showModal();
}

function switchSide() {
  side = side === "image" ? "anomaly" : "image";
  clear();
  if (large.open) enlarge();
}

const rowsInView = () => Math.max(1, Math.floor(grid.clientHeight / size));
const KEYS = {
  ArrowLeft: () => select(selected - 1),
  ArrowRight: () => select(selected + 1),
  ArrowUp: () => select(selected - columns),
  ArrowDown: () => select(selected + columns),
  PageUp: () => select(selected - columns * rowsInView()),
  PageDown: () => select(selected + columns * rowsInView()),
  Home: () => select(0),
  End: () => select(shown.length - 1),
  Enter: enlarge,
  a: () => mark("accept"),
  r: () => mark("reject"),
  u: () => mark(NOT_MARKED),
  d: download,
  b: switchSide,
  o: () => {
    grid.classList.toggle("plain");
    large.classList.toggle("plain", grid.classList.contains("plain"));
  },
};

document.addEventListener("keydown", (event) => {
  const typing = /^(INPUT|SELECT|BUTTON)$/.test(event.target.tagName);
  if (typing || event.ctrlKey || event.metaKey || event.altKey || !Object.hasOwn(KEYS, event.key)) return;
  event.preventDefault();
  KEYS[event.key]();
  draw();
});

for (const [id, act] of [["accept", KEYS.a], ["reject", KEYS.r], ["clear", KEYS.u], ["download", download]]) {
  at(id).addEventListener("click", act);
}
for (const id of ["least", "most"]) at(id).addEventListener("input", filter);
grid.addEventListener("scroll", draw);
window.addEventListener("resize", layout);

load();
fill("product", data.products);
fill("defect", data.defects);
fill("verdict", data.verdicts);
fill("marked", MARKS);
fill("score", data.scores);
filter();
grid.focus();
