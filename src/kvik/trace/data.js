// The trace that the page holds, what is chosen of it, and the numbers behind what is chosen.

const data = JSON.parse(document.getElementById("trace").textContent);
const by = (id) => document.getElementById(id);
const count = data.tokens.length,
  ends = data.steps.map((step) => step.end);
const state = { step: 0, layer: data.layer, head: data.head };
let playing = 0;
/** Whether a policy lets rows go, lane by lane; else they are hidden by a window, if at all. */
const lets = data.hides === "every row";

function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}
const clamp = (x, low, high) => Math.min(Math.max(x, low), high);

/** f16 fractions of a scale, in base64, as f32. */
function numbers(array) {
  const bytes = Uint8Array.from(atob(array.data), (c) => c.charCodeAt(0)),
    view = new DataView(bytes.buffer);
  return Float32Array.from({ length: bytes.length / 2 }, (_, i) => {
    const bits = view.getUint16(2 * i, true),
      exponent = (bits >> 10) & 31,
      fraction = bits & 1023;
    const size = exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -24 * fraction;
    return (bits >> 15 ? -size : size) * array.scale;
  });
}

const decoded = new Map();
/** A layer's arrays as numbers, decoded when they are first looked at. */
function layerOf(layer) {
  if (!decoded.has(layer)) {
    const kept = data.kept_layers.find((each) => each.layer === layer),
      found = { kept };
    for (const name of ["q", "out", "k", "v", "weights"]) found[name] = numbers(kept[name]);
    decoded.set(layer, found);
  }
  return decoded.get(layer);
}

/** The number beyond which a matrix's colours saturate: most cells lie within. */
function reach(values) {
  const sizes = Float32Array.from(values, Math.abs).sort();
  return sizes[Math.floor(0.985 * (sizes.length - 1))] || 1;
}

const within = (runs, place) => runs.some((edge, i) => i % 2 === 0 && edge <= place && place < runs[i + 1]);
/** How many of the first rows are such. */
const tally = (rows, such) => Array.from({ length: rows }, (_, row) => such(row)).filter(Boolean).length;
const laneOf = (head) => Math.floor(head / (data.heads / data.lanes));

/** All that the panels ask of the chosen layer and head. */
function look() {
  const layer = layerOf(state.layer),
    head = data.kept_heads.indexOf(state.head),
    lane = data.kept_lanes.indexOf(laneOf(state.head));
  const slice = (name, index, many) =>
    layer[name].subarray((index * layer[name].length) / many, ((index + 1) * layer[name].length) / many);
  const heads = data.kept_heads.length,
    lanes = data.kept_lanes.length;
  const arrays = {
    q: slice("q", head, heads),
    out: slice("out", head, heads),
    k: slice("k", lane, lanes),
    v: slice("v", lane, lanes),
  };
  const weights = slice("weights", head, heads),
    widths = [arrays.k.length / count, arrays.v.length / count];
  const reaches = Object.fromEntries(Object.entries(arrays).map(([name, values]) => [name, reach(values)]));
  const seen = data.shared[layer.kept.seen[lane]],
    held = data.shared[layer.kept.held[lane]];
  const width = (name) => arrays[name].length / count;
  const step = data.steps[state.step];
  const sees = (query, row) => within(seen[query], row);
  return {
    from: step.start,
    to: step.end,
    all: count,
    widths,
    sees,
    value: (name, row, column) => arrays[name][row * width(name) + column],
    fraction: (name, value) => 0.5 + (0.5 * value) / reaches[name],
    weight: (query, row) => weights[(query * (query + 1)) / 2 + row],
    state: (row) => (sees(step.end - 1, row) ? "seen" : within(held[state.step], row) ? "hidden" : "gone"),
    held: tally(step.end, (row) => row >= step.start || within(held[state.step], row)),
    token: (row) => data.tokens[row],
    name: (row) => `${row} ${data.tokens[row]}`,
    rows: layer.kept.rows[lane].map((place) => data.shared[place]),
    pairs: layer.kept.pairs[head].map((place) => data.shared[place]),
  };
}
