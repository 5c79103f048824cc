// Drawing on canvas: colours, matrices, the figure of one step, the triangle of weights. Knows nothing of controls.

const KINDS = ["kept", "new", "again"];
let palette = {};

const whole = (count) => count.toLocaleString("en-GB");
const short = (count) =>
  count < 1e5 ? whole(count) : count < 1e6 ? (count / 1e3).toFixed(0) + " k" : (count / 1e6).toFixed(1) + " M";
const plural = (n, one) => `${whole(n)} ${one}${n === 1 ? "" : "s"}`;
const percent = (share) => (100 * share).toFixed(1) + "\u00a0%";
const number = (x) => (x === 0 ? "0" : String(Number(x.toPrecision(3)))).replace("-", "−");

/** Reads the colours of the style sheet: light and dark are decided there. */
function readPalette() {
  const style = getComputedStyle(document.documentElement);
  const get = (name) => style.getPropertyValue("--" + name).trim();
  palette = { ramp: {}, share: {}, mono: get("mono") };
  for (const name of ["panel", "ink", "soft", "line", "faint", "accent", ...KINDS]) palette[name] = get(name);
  for (const kind of KINDS) {
    palette.ramp[kind] = ramp(get("ramp-" + kind));
    palette.share[kind] = ramp(get("share-" + kind));
  }
}

/** 256 colours through three: bytes [256 · 3]. */
function ramp(text) {
  const [low, middle, high] = text.split(/\s+/).map((hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16)));
  const out = new Uint8Array(768);
  for (let i = 0; i < 256; i++) {
    const [a, b, t] = i < 128 ? [low, middle, i / 127.5] : [middle, high, i / 127.5 - 1];
    for (let c = 0; c < 3; c++) out[3 * i + c] = Math.round(a[c] + (b[c] - a[c]) * t);
  }
  return out;
}

function gradient(colours) {
  const stops = [0, 64, 128, 191, 255].map((i) => `rgb(${colours[3 * i]} ${colours[3 * i + 1]} ${colours[3 * i + 2]})`);
  return `linear-gradient(90deg, ${stops.join(", ")})`;
}

const regions = new WeakMap(); // canvas → where the pointer finds a cell, and what it says

/** A canvas made ready for so many pixels of height: its context, and its width. */
function open(canvas, height, width = canvas.clientWidth) {
  const ratio = window.devicePixelRatio || 1;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  canvas.style.height = height + "px";
  const pen = canvas.getContext("2d");
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  pen.font = "12px " + palette.mono;
  pen.lineWidth = 1;
  regions.set(canvas, []);
  return { pen, width, canvas };
}

function canvasOf(width, height) {
  return Object.assign(document.createElement("canvas"), { width, height });
}

/** A matrix of cells in a box {x, y, w, h}. colour(row, column) → [ramp, 0 … 1, opacity] or nothing; tell(row, column) → text. */
function matrix(view, box, rows, columns, colour, tell) {
  if (!rows || !columns) return;
  const image = new ImageData(columns, rows);
  for (let row = 0, at = 0; row < rows; row++) {
    for (let column = 0; column < columns; column++, at += 4) {
      const found = colour(row, column);
      if (!found) continue;
      const i = 3 * Math.round(255 * Math.min(Math.max(found[1], 0), 1));
      image.data.set([found[0][i], found[0][i + 1], found[0][i + 2], Math.round(255 * (found[2] ?? 1))], at);
    }
  }
  let picture = canvasOf(columns, rows);
  picture.getContext("2d").putImageData(image, 0, 0);
  const [width, height] = [Math.min(columns, Math.ceil(box.w)), Math.min(rows, Math.ceil(box.h))];
  if (width < columns || height < rows) {
    const smaller = canvasOf(width, height); // more cells than pixels: averaged, along that side alone
    smaller.getContext("2d").drawImage(picture, 0, 0, width, height);
    picture = smaller;
  }
  view.pen.imageSmoothingEnabled = false;
  view.pen.drawImage(picture, box.x, box.y, box.w, box.h);
  regions.get(view.canvas).push({ ...box, rows, columns, tell });
}

function outline(pen, box, colour, dash = [], width = 1) {
  pen.strokeStyle = colour;
  pen.lineWidth = width;
  pen.setLineDash(dash);
  pen.strokeRect(box.x - width / 2, box.y - width / 2, box.w + width, box.h + width);
  pen.setLineDash([]);
}

/** Lines of the background between cells that are large enough for them. */
function grid(pen, box, rows, columns) {
  pen.fillStyle = palette.panel;
  if (columns > 1 && box.w / columns >= 7)
    for (let i = 1; i < columns; i++) pen.fillRect(box.x + (i * box.w) / columns - 0.5, box.y, 1, box.h);
  if (rows > 1 && box.h / rows >= 7)
    for (let i = 1; i < rows; i++) pen.fillRect(box.x, box.y + (i * box.h) / rows - 0.5, box.w, 1);
}

function label(pen, text, x, y, colour = palette.soft, align = "center") {
  pen.fillStyle = colour;
  pen.textAlign = align;
  pen.textBaseline = "middle";
  pen.fillText(text, x, y);
}

/** One step's attention as a figure in which what is multiplied lies side by side:
 *
 *            Kᵀ         V           columns of Kᵀ stand over their weights, columns of V over the output's,
 *    q    weights      out          and rows of q, weights and output are one token's
 *
 * step: { from, to, all, widths: [D, E], cached, held, everyPair, value(name, row, column), fraction(name, number),
 *         weight(query, row), sees(query, row), state(row), name(row) }. Tokens from … to - 1 are new; `all` is the whole
 *         text's length; a step without a cache begins at token 0.
 */
function drawStep(canvas, step) {
  const figure = layOut(canvas, step),
    { pen, boxes } = figure;
  for (const box of Object.values(boxes)) outline(pen, box, palette.line);
  drawKept(figure, step);
  drawAsked(figure, step);
  for (const name of ["q", "out", "v"])
    outline(pen, figure.rows(boxes[name], step.from, step.to), palette.new, [], 1.5);
  outline(pen, figure.columns(boxes.k, step.from, step.to), palette.new, [], 1.5);
  const line = figure.rows(boxes.weights, step.from, step.to);
  outline(pen, figure.columns(line, 0, step.to), palette.new, [], 1.5);
  nameParts(figure, step);
}

/** Sizes and places: the matrices' boxes, and parts of a box by rows or columns that stand for tokens. */
function layOut(canvas, step) {
  const full = canvas.clientWidth,
    gap = full < 420 ? 18 : 26,
    top = 22;
  const cell = Math.min(24, (0.32 * full) / step.all),
    side = cell * step.all;
  const wide = Math.min((full - side - 2 * gap - 2) / 2, 190),
    tall = Math.min(wide, 170);
  const left = Math.max((full - side - 2 * wide - 2 * gap) / 2, 1),
    base = top + Math.max(tall, side),
    below = base + 18;
  const [first, second, third] = [left, left + wide + gap, left + wide + 2 * gap + side];
  const view = open(canvas, Math.ceil(below + side + 20));
  return {
    ...view,
    cell,
    begun: step.cached ? step.from : 0,
    boxes: {
      q: { x: first, y: below, w: wide, h: side },
      k: { x: second, y: base - tall, w: side, h: tall },
      weights: { x: second, y: below, w: side, h: side },
      v: { x: third, y: base - side, w: wide, h: side },
      out: { x: third, y: below, w: wide, h: side },
    },
    rows: (box, from, to) => ({ ...box, y: box.y + from * cell, h: (to - from) * cell }),
    columns: (box, from, to) => ({ ...box, x: box.x + from * cell, w: (to - from) * cell }),
    kind: (row) => (row >= step.from ? "new" : step.cached ? "kept" : "again"),
  };
}

/** K and V: a token's column and row, in the colour of what becomes of it. */
function drawKept(figure, step) {
  const { pen, boxes, rows, columns } = figure;
  const state = (row) => (step.cached && row < step.from ? step.state(row) : "seen");
  const paint = (name, row, channel) =>
    state(row) === "gone"
      ? null
      : [
          palette.ramp[figure.kind(row)],
          step.fraction(name, step.value(name, row, channel)),
          state(row) === "hidden" ? 0.28 : 1,
        ];
  const tell = (name, row, channel) =>
    tellCell(step, name, row, channel) + (state(row) === "seen" ? "" : `\n${state(row)}`);
  const [keys, values] = step.widths,
    k = columns(boxes.k, 0, step.to),
    v = rows(boxes.v, 0, step.to);
  matrix(figure, k, keys, step.to, (c, row) => paint("k", row, c), (c, row) => tell("k", row, c)); // prettier-ignore
  matrix(figure, v, step.to, values, (row, c) => paint("v", row, c), (row, c) => tell("v", row, c)); // prettier-ignore
  grid(pen, k, 1, step.to);
  grid(pen, v, step.to, 1);
  for (let row = 0, begin = 0; row < step.from; row++) {
    if (state(row) !== "gone") begin = row + 1;
    else if (state(row + 1) !== "gone")
      for (const box of [columns(boxes.k, begin, row + 1), rows(boxes.v, begin, row + 1)])
        outline(pen, box, palette.kept, [2, 3]);
  }
}

/** q, weights and output of the tokens that are asked in this step: with a cache the new ones only. */
function drawAsked(figure, step) {
  const { pen, boxes, begun, kind } = figure,
    count = step.to - begun;
  for (const [name, width] of [
    ["q", step.widths[0]],
    ["out", step.widths[1]],
  ]) {
    const box = figure.rows(boxes[name], begun, step.to);
    const paint = (row, c) => [palette.ramp[kind(row)], step.fraction(name, step.value(name, row, c))];
    matrix(figure, box, count, width, (row, c) => paint(begun + row, c), (row, c) => tellCell(step, name, begun + row, c)); // prettier-ignore
    grid(pen, box, count, 1);
  }
  // Without a cache there is no window either: pairs that it hides are computed, with weights that no trace has.
  const share = (query, row) => (step.sees(query, row) ? step.weight(query, row) : step.everyPair ? 0 : null);
  const paint = (query, row) =>
    row > query || share(query, row) === null ? null : [palette.share[kind(query)], share(query, row)];
  const box = figure.columns(figure.rows(boxes.weights, begun, step.to), 0, step.to);
  matrix(figure, box, count, step.to, (query, row) => paint(begun + query, row), (query, row) => tellPair(step, begun + query, row)); // prettier-ignore
  grid(pen, box, count, step.to);
  if (begun < step.from) outline(pen, { ...box, h: (step.from - begun) * figure.cell }, palette.again);
}

/** What the matrices are called, their shapes, and the tokens' numbers. */
function nameParts(figure, step) {
  const { pen, boxes, cell, begun } = figure,
    [keys, values] = step.widths,
    count = step.to - begun;
  const over = (box, text) => label(pen, text, box.x + box.w / 2, box.y - 12, palette.ink);
  const under = (box, text) => label(pen, text, box.x + box.w / 2, box.y + box.h + 13, palette.ink);
  over(boxes.k, `Kᵀ ${keys}×${step.held}`);
  over(boxes.v, `V ${step.held}×${values}`);
  under(boxes.q, `q ${count}×${keys}`);
  under(boxes.weights, "weights");
  under(boxes.out, `output ${count}×${values}`);
  for (let row = 0; cell >= 13 && row < step.to; row++) {
    label(pen, row, boxes.weights.x + (row + 0.5) * cell, boxes.weights.y - 9);
    if (row >= begun) label(pen, row, boxes.weights.x - 12, boxes.weights.y + (row + 0.5) * cell);
  }
}

function tellCell(step, name, row, channel) {
  const mark = name === "out" ? "output" : name;
  return `${mark} · ${step.name(row)} · channel ${channel}\n${number(step.value(name, row, channel))}`;
}

function tellPair(step, query, row) {
  if (row > query) return `${step.name(query)}\ncan't see what comes later`;
  return (
    `${step.name(query)} → ${step.name(row)}\n` +
    (step.sees(query, row) ? percent(step.weight(query, row)) : lets ? "let go by the policy" : "hidden by the window")
  );
}

/** All weights up to a step: { from, to, all, weight, sees, name, token(row) }. */
function drawTriangle(canvas, step) {
  const full = canvas.clientWidth,
    room = Math.min(96, full * 0.24);
  const labelled = (full - room - 4) / step.all >= 9.5,
    left = labelled ? room : 2,
    foot = labelled ? 18 : 4;
  const cell = Math.min(34, (full - left - 4) / step.all),
    side = cell * step.all;
  const view = open(canvas, Math.ceil(side + foot + 4)),
    pen = view.pen;
  const box = { x: left, y: 2, w: cell * step.to, h: cell * step.to };
  matrix(
    view,
    box,
    step.to,
    step.to,
    (query, row) =>
      step.sees(query, row) ? [palette.share[query >= step.from ? "new" : "kept"], step.weight(query, row)] : null,
    (query, row) => tellPair(step, query, row),
  );
  grid(pen, box, step.to, step.to);
  outline(pen, { ...box, y: box.y + step.from * cell, h: (step.to - step.from) * cell }, palette.new, [], 1.5);
  pen.strokeStyle = palette.line;
  pen.beginPath(); // the whole text's staircase
  pen.moveTo(left, 2);
  for (let row = 0; row < step.all; row++)
    (pen.lineTo(left + (row + 1) * cell, 2 + row * cell), pen.lineTo(left + (row + 1) * cell, 2 + (row + 1) * cell));
  pen.lineTo(left, 2 + side);
  pen.closePath();
  pen.stroke();
  if (!labelled) return;
  if (cell < 13) pen.font = "10px " + palette.mono;
  for (let row = 0; row < step.all; row++) {
    const colour = row >= step.to ? palette.line : row >= step.from ? palette.new : palette.soft;
    label(pen, fit(pen, step.token(row), room - 30), left - 24, 2 + (row + 0.5) * cell, colour, "right");
    label(pen, row, left - 5, 2 + (row + 0.5) * cell, colour, "right");
    if (row === step.to - 1 || (Math.abs(row - step.to + 1) > 1 && row % 5 === 0) || cell >= 18)
      label(pen, row, left + (row + 0.5) * cell, side + 13, colour);
  }
}

function fit(pen, text, width) {
  let cut = Array.from(text);
  if (pen.measureText(text).width <= width) return text;
  while (cut.length > 1 && pen.measureText(cut.join("") + "…").width > width) cut = cut.slice(0, -1);
  return cut.join("") + "…";
}
