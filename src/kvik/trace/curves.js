// Curves over the text's length, as lines or as filled steps.

const HIGH = 168; // pixels, of which the curves have those from TOP to BASE
const TOP = 20;
const BASE = 146;
const MARGIN = 8;

/** Curves up to a step, faint where they are still to come.
 *  series: [{ name, colour, values, pale }]; ends: length of the text at each step's end; at: the step's index. */
function drawCurves(canvas, series, ends, at, filled = false) {
  const { pen, width } = open(canvas, HIGH),
    all = ends[ends.length - 1],
    most = Math.max(1, ...series.flatMap((each) => each.values));
  const x = (length) => MARGIN + ((width - 2 * MARGIN) * length) / all,
    y = (value) => BASE - ((BASE - TOP) * value) / most;
  drawAxes(pen, width, most, all, ends[at], x);
  for (const each of series) {
    const points = each.values.map((value, i) => [x(ends[i]), y(value)]);
    const path = filled ? steps(points, x(0)) : [[x(0), y(0)], ...points];
    const walked = path.slice(0, filled ? 2 * at + 2 : at + 2);
    pen.strokeStyle = palette.line;
    line(pen, path);
    if (filled) fill(pen, walked, each.colour, each.pale ? 0.22 : 0.85);
    pen.strokeStyle = each.colour;
    pen.lineWidth = filled ? 1 : 2.25;
    line(pen, walked);
    pen.lineWidth = 1;
    if (!filled) dot(pen, walked[walked.length - 1], each.colour);
  }
  const columns = Math.max(Math.round(width - 2 * MARGIN), 1),
    box = { x: MARGIN, y: 0, w: columns, h: HIGH, rows: 1, columns };
  regions.get(canvas).push({ ...box, tell: (_, column) => tellCurves(series, ends, ((column + 0.5) * all) / columns) });
}

function drawAxes(pen, width, most, all, now, x) {
  const across = (height) => line(pen, [[MARGIN, height], [width - MARGIN, height]]); // prettier-ignore
  pen.strokeStyle = palette.faint;
  across(TOP);
  across((TOP + BASE) / 2);
  pen.strokeStyle = palette.soft;
  across(BASE);
  label(pen, short(most), MARGIN, TOP - 10, palette.soft, "left");
  label(pen, "0", x(0), BASE + 12);
  label(pen, plural(all, "token"), width - MARGIN, BASE + 12, palette.soft, "right");
  if (now < all * 0.75 && now > all * 0.08) label(pen, now, x(now), BASE + 12, palette.ink);
}

/** What the curves say at the step whose end lies nearest. */
function tellCurves(series, ends, length) {
  const far = (i) => Math.abs(ends[i] - length);
  const i = ends.reduce((best, _, each) => (far(each) < far(best) ? each : best), 0);
  return [plural(ends[i], "token"), ...series.map((each) => `${each.name}: ${whole(each.values[i])}`)].join("\n");
}

/** Each point's height from the point before it on. */
function steps(points, left) {
  return points.flatMap(([px, py], i) => [[i ? points[i - 1][0] : left, py], [px, py]]); // prettier-ignore
}

function line(pen, points) {
  pen.beginPath();
  points.forEach(([px, py], i) => (i ? pen.lineTo(px, py) : pen.moveTo(px, py)));
  pen.stroke();
}

function fill(pen, points, colour, opacity) {
  pen.fillStyle = colour;
  pen.globalAlpha = opacity;
  pen.beginPath();
  pen.moveTo(points[0][0], BASE);
  for (const [px, py] of points) pen.lineTo(px, py);
  pen.lineTo(points[points.length - 1][0], BASE);
  pen.fill();
  pen.globalAlpha = 1;
}

function dot(pen, [px, py], colour) {
  pen.fillStyle = palette.panel;
  pen.beginPath();
  pen.arc(px, py, 5.5, 0, 7);
  pen.fill();
  pen.fillStyle = colour;
  pen.beginPath();
  pen.arc(px, py, 4, 0, 7);
  pen.fill();
}
