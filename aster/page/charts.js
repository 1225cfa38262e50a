// Two kinds of chart: lines with labels at their ends and intervals as bands, and stacked shares of a step.
const DASHES = ["", "5 4", "1.5 3", "9 3 2 3", "1 5"];
const LABEL = 12; // px between two labels at line ends

function ticks(low, high, count) {
  const raw = (high - low) / count;
  const base = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * base).find((s) => s >= raw * 0.999);
  const out = [];
  for (let v = Math.ceil(low / step - 1e-9) * step; v <= high + step * 1e-9; v += step) out.push(Math.abs(v) < step * 1e-9 ? 0 : v);
  return out;
}
function tickText(v, step) {
  if (!(step > 0) || Math.abs(v) >= 1e4 || step < 1e-3) return short(v);
  let digits = 0;
  while (digits < 5 && Math.abs(step * 10 ** digits - Math.round(step * 10 ** digits)) > 1e-6 * step * 10 ** digits) digits++;
  return minus(v.toFixed(digits));
}
const axisX = (svg, X, x0, x1, width, y) => {
  for (const t of ticks(x0, x1, Math.max(2, Math.min(8, width / 70)))) if (Number.isInteger(t)) svg.append(h("text", { x: X(t), y, "text-anchor": "middle" }, String(t)));
};
// Labels that would overlap move apart, and stay inside; each is {y, ...}.
function spread(labels, top, bottom, gap = LABEL) {
  labels.sort((a, b) => a.y - b.y);
  for (let n = 1; n < labels.length; n++) labels[n].y = Math.max(labels[n].y, labels[n - 1].y + gap);
  const over = labels.length ? labels[labels.length - 1].y - bottom : 0;
  if (over > 0) for (const l of labels) l.y -= over;
  for (let n = labels.length - 2; n >= 0; n--) labels[n].y = Math.min(labels[n].y, labels[n + 1].y - gap);
  return labels.filter((l) => l.y > top - gap);
}
const clip = (text, most) => (text.length > most ? `${text.slice(0, most - 1)}…` : text);

// lines: [{label, color, dash, points: [{x, step, y, low, high, drawn}], from, name}]
function lineChart(box, lines, spec) {
  const W = Math.max(box.clientWidth, 240), H = 176, top = 12, bottom = 22, left = 40;
  const texts = lines.map((l) => (l.label ? clip(l.label, 20) : ""));
  const right = Math.min(W * 0.36, 12 + 6.1 * Math.max(6, ...texts.map((t) => t.length)));
  const ys = lines.flatMap((l) => l.points.flatMap((p) => [p.y, p.low, p.high].filter(finite)));
  let low = Math.min(...ys), high = Math.max(...ys);
  const log = spec.log && low > 0;
  if (spec.range && !log) { low = Math.min(low, spec.range[0]); high = spec.range[1] === null ? Math.max(high, low) : Math.max(high, spec.range[1]); }
  if (log) { low = Math.floor(Math.log10(low)); high = Math.ceil(Math.log10(high)); if (low === high) high += 1; }
  if (!log && high - low < 1e-9 * Math.max(1e-3, Math.abs(high))) { const pad = Math.abs(high) * 0.1 || 1; high += pad; if (!spec.range) low -= pad; }
  if (!log && !(spec.range && spec.range[1] !== null)) high += (high - low) * 0.06;
  let x0 = Math.min(...lines.map((l) => l.points[0].x)), x1 = Math.max(...lines.map((l) => l.points[l.points.length - 1].x));
  if (x0 === x1) { x0 -= 0.5; x1 += 0.5; }
  const X = (x) => left + (W - left - right) * (x - x0) / (x1 - x0);
  const Y = (y) => top + (H - top - bottom) * (1 - ((log ? Math.log10(Math.max(y, 1e-30)) : y) - low) / (high - low));
  const told = lines.slice(0, 4).map((l) => `${l.name} from ${short(l.points[0].y)} to ${short(l.points[l.points.length - 1].y)}`).join("; ");
  const svg = h("svg", { height: H, viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": `${spec.name}: ${told}` });
  const yt = log ? Array.from({ length: high - low + 1 }, (_, i) => 10 ** (low + i)).filter((_, i, a) => a.length < 5 || i % Math.ceil(a.length / 4) === 0) : ticks(low, high, 3);
  for (const t of yt) svg.append(h("line", { class: "axis", x1: left, x2: W - right, y1: Y(t), y2: Y(t) }), h("text", { x: left - 7, y: Y(t) + 4, "text-anchor": "end" }, tickText(t, log ? 0 : yt[1] - yt[0])));
  axisX(svg, X, x0, x1, W - left - right, H - 5);
  if (spec.rule !== undefined) svg.append(h("line", { class: "rule", x1: left, x2: W - right, y1: Y(spec.rule), y2: Y(spec.rule) }), h("text", { class: "rule-text", x: left + 4, y: Y(spec.rule) - 4 }, spec.ruleText));
  for (const seam of spec.seams || []) {
    if (seam.x > x0) svg.append(h("line", { class: "seam", x1: X(seam.x), x2: X(seam.x), y1: top, y2: H - bottom }));
    svg.append(h("text", { class: "seam-text", x: X(Math.max(seam.x, x0)) + 4, y: top - 2 }, clip(seam.label, 16)));
  }
  const labels = [];
  for (const l of lines) {
    const p = l.points, last = p[p.length - 1];
    const banded = p.filter((q) => finite(q.low) && finite(q.high));
    if (banded.length > 1) svg.append(h("polygon", { class: "band", points: [...banded.map((q) => `${X(q.x)},${Y(q.high)}`), ...banded.slice().reverse().map((q) => `${X(q.x)},${Y(q.low)}`)].join(" "), style: `fill:${l.color}` }));
    else if (banded.length) svg.append(h("line", { class: "whisker", x1: X(banded[0].x), x2: X(banded[0].x), y1: Y(banded[0].low), y2: Y(banded[0].high), style: `stroke:${l.color}` }));
    const d = (field) => p.map((q, n) => `${n ? "L" : "M"}${X(q.x).toFixed(1)} ${Y(q[field]).toFixed(1)}`).join("");
    if (spec.smooth) svg.append(h("path", { class: "raw", d: d("y"), style: `stroke:${l.color}` }));
    svg.append(h("path", { class: "line", d: d("drawn"), style: `stroke:${l.color}`, "stroke-dasharray": l.dash || null }));
    svg.append(h("circle", { cx: X(last.x), cy: Y(last.drawn), r: 2.8, style: `fill:${l.color}` }));
    if (l.label && !l.mute) labels.push({ y: Y(last.drawn) + 4, x: X(last.x) + 7, text: clip(l.label, 20), color: l.color });
  }
  for (const l of spread(labels, top, H - bottom + 4)) svg.append(h("text", { class: "label", x: l.x, y: l.y, style: `fill:${l.color}` }, l.text));
  const cursor = h("line", { class: "cursor", y1: top, y2: H - bottom, visibility: "hidden" });
  svg.append(cursor);
  svg.addEventListener("pointermove", (e) => {
    const r = svg.getBoundingClientRect();
    const at = x0 + (x1 - x0) * ((e.clientX - r.left) * W / r.width - left) / (W - left - right);
    const near = lines.map((l) => ({ l, p: l.points.reduce((a, b) => (Math.abs(b.x - at) < Math.abs(a.x - at) ? b : a)) }));
    const best = near.reduce((a, b) => (Math.abs(b.p.x - at) < Math.abs(a.p.x - at) ? b : a)).p;
    cursor.setAttribute("x1", X(best.x)); cursor.setAttribute("x2", X(best.x)); cursor.setAttribute("visibility", "visible");
    tip(e, [h("b", {}, `step ${best.step}`), ...near.filter((n) => n.p.x === best.x).map((n) => h("div", {}, h("span", { class: "dot", style: `background:${n.l.color}` }),
      `${n.l.name} ${short(n.p.y)}${finite(n.p.low) ? ` (${short(n.p.low)} to ${short(n.p.high)})` : ""}`))]);
  });
  svg.addEventListener("pointerleave", () => { untip(); cursor.setAttribute("visibility", "hidden"); });
  return svg;
}

// parts: [{label, color, at: Map(step -> value)}], bottom first. `most`: the height of the axis; null = the largest sum.
function stackChart(box, steps, parts, { name, height = 210, most = null, form = short, marks = [] }) {
  const W = Math.max(box.clientWidth, 240), H = height, top = 8, bottom = 24, left = 40;
  const right = 12 + 6.2 * Math.max(...parts.map((p) => p.label.length));
  const sums = steps.map((s) => parts.reduce((a, p) => a + (p.at.get(s) || 0), 0));
  const high = most ?? (Math.max(...sums) * 1.04 || 1);
  const wide = (W - left - right) / steps.length, gap = wide > 8 ? Math.min(2, wide * 0.14) : 0;
  const X = (n) => left + n * wide;
  const Y = (v) => top + (H - top - bottom) * (1 - v / high);
  const svg = h("svg", { height: H, viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": `${name}. At the last step: ${parts.map((p) => `${p.label} ${form(p.at.get(steps[steps.length - 1]) || 0)}`).join(", ")}` });
  const yt = most === 1 ? [0, 0.5, 1] : ticks(0, high, 3);
  for (const t of yt) svg.append(h("line", { class: "axis", x1: left, x2: W - right, y1: Y(t), y2: Y(t) }), h("text", { x: left - 7, y: Y(t) + 4, "text-anchor": "end" }, most === 1 ? `${100 * t}%` : tickText(t, yt[1] - yt[0])));
  const base = steps.map(() => 0), labels = [], inside = [];
  for (const part of parts) {
    let d = "";
    steps.forEach((s, n) => {
      const v = part.at.get(s) || 0;
      if (v > 0) d += `M${(X(n) + gap / 2).toFixed(1)} ${Y(base[n]).toFixed(2)}h${(wide - gap).toFixed(2)}V${Y(base[n] + v).toFixed(2)}h${(gap - wide).toFixed(2)}Z`;
      if (n === steps.length - 1 && v > 0.02 * high) labels.push({ y: Y(base[n] + v / 2) + 4, text: part.label, color: part.ink || part.color });
      base[n] += v;
    });
    svg.append(h("path", { d, style: `fill:${part.color}`, "shape-rendering": gap ? null : "crispEdges" }));
    // A part that is gone at the end is named where it was largest.
    const peak = steps.reduce((a, s, n) => ((part.at.get(s) || 0) > (part.at.get(steps[a]) || 0) ? n : a), 0), tallest = part.at.get(steps[peak]) || 0;
    const isLabelled = labels.length && labels[labels.length - 1].text === part.label;
    if (!isLabelled && (H - top - bottom) * tallest / high > 18) inside.push({ x: Math.max(left + 4, X(peak) + 6), y: Y(base[peak] - tallest / 2) + 4, text: part.label, ink: part.inside });
  }
  for (const l of inside) svg.append(h("text", { class: "label", x: l.x, y: l.y, style: `fill:${l.ink || "var(--ink)"}` }, l.text));
  for (const l of spread(labels, top, H - bottom + 4)) svg.append(h("text", { class: "label", x: W - right + 8, y: l.y, style: `fill:${l.color}` }, l.text));
  const every = wide > 26 ? 1 : Math.max(1, (ticks(0, steps.length, Math.max(2, Math.min(9, (W - left - right) / 60)))[1]));
  steps.forEach((s, n) => { if (s % Math.round(every) === 0) svg.append(h("text", { x: X(n) + wide / 2, y: H - 6, "text-anchor": "middle" }, String(s))); });
  for (const [a, b] of marks) {
    const i = steps.indexOf(a), j = steps.indexOf(b);
    if (i >= 0 && j >= 0) svg.append(h("rect", { class: "alarm-span", x: X(i), y: H - bottom + 2, width: (j - i + 1) * wide, height: 3, rx: 1.5 }, h("title", {}, `collapse alarm, steps ${a} to ${b}`)));
  }
  svg.addEventListener("pointermove", (e) => {
    const r = svg.getBoundingClientRect();
    const n = Math.max(0, Math.min(steps.length - 1, Math.floor(((e.clientX - r.left) * W / r.width - left) / wide)));
    tip(e, [h("b", {}, `step ${steps[n]}`), ...parts.slice().reverse().map((p) => h("div", {}, h("span", { class: "dot", style: `background:${p.color}` }), `${p.label}: ${form(p.at.get(steps[n]) || 0)}`))]);
  });
  svg.addEventListener("pointerleave", untip);
  return svg;
}
