"use strict";
// Overview, accuracy and curves. Everything is drawn from the element #data; nothing is loaded. viewer.js follows.
function complain(what) {
  document.documentElement.dataset.error = what;
  const p = document.createElement("p");
  p.className = "notice";
  p.textContent = `This page hit an error while drawing itself: ${what}`;
  document.querySelector("main").prepend(p);
}
addEventListener("error", (e) => complain(e.message));
addEventListener("unhandledrejection", (e) => complain(String(e.reason)));

const DATA = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);

function h(tag, attrs = {}, ...children) {
  const svg = ["svg", "path", "line", "text", "circle", "g", "rect", "polygon"].includes(tag);
  const el = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [key, value] of Object.entries(attrs)) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) el.addEventListener(key.slice(2), value);
    else el.setAttribute(key, value === true ? "" : value);
  }
  for (const child of children.flat(Infinity)) if (child !== null && child !== undefined && child !== false) el.append(child);
  return el;
}

const color = (run) => `var(--r${run % 8})`;
const pct = (x, digits = 1) => `${(100 * x).toFixed(digits)} %`;
const signed = (x) => `${x < 0 ? "−" : "+"}${(100 * Math.abs(x)).toFixed(1)}`;
function short(x) {
  if (x === null || x === undefined) return "–";
  if (typeof x === "string") return x;
  const a = Math.abs(x);
  if (a === 0) return "0";
  if (a >= 1e9) return (x / 1e9).toFixed(1) + "G";
  if (a >= 1e6) return (x / 1e6).toFixed(1) + "M";
  if (a >= 1e4) return (x / 1e3).toFixed(1) + "k";
  if (a < 1e-3) return x.toExponential(1).replace("e-", "e−");
  return String(Number(x.toPrecision(a < 1 ? 3 : 4)));
}
function span(seconds) {
  if (!(seconds > 0)) return "–";
  if (seconds < 90) return `${seconds.toFixed(0)} s`;
  if (seconds < 5400) return `${(seconds / 60).toFixed(0)} min`;
  return seconds < 172800 ? `${(seconds / 3600).toFixed(1)} h` : `${(seconds / 86400).toFixed(1)} days`;
}
const finite = (x) => typeof x === "number" && Number.isFinite(x);
function ends(run, name) {
  const s = run.series[name];
  if (!s) return null;
  const values = s[1].filter(finite);
  return values.length ? [values[0], values[values.length - 1]] : null;
}

// theme ---------------------------------------------------------------------------------------------------------------
const themes = ["auto", "light", "dark"];
const dark = matchMedia("(prefers-color-scheme: dark)");
let theme = "auto";
try { theme = localStorage.getItem("aster-theme") || "auto"; } catch { /* storage is off for files in some browsers */ }
function applyTheme() {
  document.documentElement.dataset.theme = theme === "auto" ? (dark.matches ? "dark" : "light") : theme;
  $("theme").textContent = `Theme: ${theme}`;
}
$("theme").addEventListener("click", () => {
  theme = themes[(themes.indexOf(theme) + 1) % 3];
  try { localStorage.setItem("aster-theme", theme); } catch { /* as above */ }
  applyTheme();
});
dark.addEventListener("change", applyTheme);
applyTheme();

// overview ------------------------------------------------------------------------------------------------------------
function overview() {
  const runs = DATA.runs;
  $("headline").textContent = DATA.title;
  const whole = Math.max(...runs.map((r) => r.ended)) - Math.min(...runs.map((r) => r.began));
  const made = new Date(1000 * DATA.made).toISOString().slice(0, 16).replace("T", " ");
  $("lede").textContent = `${span(whole)} from first to last line · page made ${made} UTC · ` +
    `${DATA.trajectories_total.toLocaleString("en")} trajectories on disk`;
  for (const [i, run] of runs.entries()) {
    for (const e of run.events) {
      $("alarms").append(h("p", { class: `notice${e.kind.endsWith("_over") ? " over" : ""}` }, h("b", {}, `${run.name}, step ${e.step}: `), e.message));
    }
    $("cards").append(card(run, i));
  }
}

function card(run, i) {
  const facts = [];
  const arrow = (label, name, form) => {
    const e = ends(run, name);
    if (e) facts.push([label, e[0] === e[1] ? [form(e[1])] : [h("i", {}, `${form(e[0])} → `), form(e[1])]]);
  };
  arrow("loss", "train/loss", short);
  arrow("training reward", "critic/score/mean", (x) => x.toFixed(3));
  for (const name of Object.keys(run.series)) {
    const m = name.match(/^val-core\/(.+)\/acc\/mean@(\d+)$/);
    if (m) arrow(`${m[1]} avg@${m[2]}`, name, (x) => pct(x));
  }
  arrow("calls per trajectory", "tool_use_info/avg_tool_calls_per_trajectory", (x) => x.toFixed(2));
  arrow("collapse ratio", "collapse/ratio", (x) => pct(x, 0));
  arrow("entropy", "actor/entropy", (x) => x.toFixed(3));
  if (run.stage === "eval") {
    for (const name of matching(run, "val-aux/*/collapse/calls_mean")) arrow("calls per trajectory", name, (x) => x.toFixed(2));
    for (const name of matching(run, "val-aux/*/collapse/ratio")) arrow("at most one call", name, (x) => pct(x, 0));
  }
  const speed = run.series["perf/throughput"];
  if (speed) facts.push(["throughput", [`${short(speed[1].reduce((a, b) => a + b, 0) / speed[1].length)} tok/s`]]);
  const lost = run.series["infra_failed_rate"];
  if (lost && lost[1].some((x) => x > 0)) facts.push(["lost by us, worst step", [pct(Math.max(...lost[1]))]]);
  return h("article", { class: "card" },
    h("header", {}, h("span", { class: "dot", style: `background:${color(i)}` }), h("b", { title: run.path }, run.name), h("span", { class: "badge" }, run.stage || "run")),
    h("div", { class: "about", title: run.description }, run.description || run.path),
    h("dl", { class: "facts" }, facts.map(([k, v]) => [h("dt", {}, k), h("dd", {}, v)])),
    h("footer", {}, h("span", {}, run.stage === "eval" ? "evaluation" : `${run.steps} steps`), h("span", {}, span(run.ended - run.began || (run.series["timing_s/testing"] || [0, [0]])[1][0])), h("span", { title: "config hash" }, run.config_hash)));
}

// accuracy ------------------------------------------------------------------------------------------------------------
function forest() {
  const rows = DATA.accuracy;
  if (!rows.length) { $("accuracy").remove(); document.querySelector('nav a[href="#accuracy"]').remove(); return; }
  const order = new Map(DATA.runs.map((r, i) => [r.name, i]));
  const sources = [...new Set(rows.map((r) => `${r.source} ${r.metric}`))];
  for (const source of sources) {
    const mine = rows.filter((r) => `${r.source} ${r.metric}` === source);
    const body = mine.map((r) => {
      const x = (v) => 8 + 284 * v;
      const run = order.get(r.run);
      const svg = h("svg", { viewBox: "0 0 300 26", preserveAspectRatio: "none", height: 26, role: "img", "aria-label": `${pct(r.mean)}` },
        [0, 0.25, 0.5, 0.75, 1].map((v) => h("line", { class: "axis", x1: x(v), x2: x(v), y1: 0, y2: 26 })),
        r.low !== null && h("line", { x1: x(r.low), x2: x(r.high), y1: 13, y2: 13, style: `stroke:${color(run)}`, "stroke-width": 4, "stroke-linecap": "round", opacity: 0.4 }),
        h("rect", { x: x(r.mean) - 2, y: 4, width: 4, height: 18, rx: 2, style: `fill:${color(run)}` }));
      const d = r.versus;
      return h("tr", {},
        h("td", {}, h("span", { class: "dot", style: `background:${color(run)};margin-right:8px` }), r.run, h("span", { class: "muted" }, DATA.runs[run].stage === "eval" ? "" : ` step ${r.step}`)),
        h("td", { style: "width:38%" }, svg),
        h("td", { class: "r" }, h("b", {}, pct(r.mean))),
        h("td", { class: "r" }, r.low === null ? "–" : `${(100 * r.low).toFixed(1)} – ${(100 * r.high).toFixed(1)}`),
        h("td", { class: "r" }, d ? h("span", { title: `against ${d.run}, step ${d.step}, on ${d.problems} problems, p = ${d.p.toFixed(3)}` },
          h("b", {}, signed(d.mean)), ` (${signed(d.low)} to ${signed(d.high)})`) : "–"),
        h("td", { class: "r" }, d ? d.p.toFixed(3) : ""));
    });
    $("forest").append(h("h3", {}, source.replace("mean@", "avg@")), h("div", { class: "scroll forest" }, h("table", {},
      h("thead", {}, h("tr", {}, h("th", {}, "run"), h("th", {}, "0 %, 25, 50, 75, 100 %"), h("th", { class: "r" }, "accuracy"), h("th", { class: "r" }, "95 % interval"), h("th", { class: "r" }, "points against the first (paired)"), h("th", { class: "r" }, "p"))),
      h("tbody", {}, body))));
  }
}

// curves --------------------------------------------------------------------------------------------------------------
// One spec per chart. keys: [series, label]; a key with * stands for every series that fits. rule: a threshold line.
const SPECS = [
  ["Learning", [
    { name: "Training reward", keys: [["critic/score/mean", "reward"]], range: [0, 1] },
    { name: "Validation accuracy", keys: [["val-core/*/acc/mean@*", ""]], band: ["/ci_low", "/ci_high"], range: [0, 1], sub: "with 95 % interval" },
    { name: "Loss", keys: [["train/loss", "cross-entropy"]], sub: "nats per target token" },
    { name: "Groups without a signal", keys: [["training/all_correct_groups_ratio", "all correct"], ["training/all_wrong_groups_ratio", "all wrong"]], range: [0, 1] },
  ]],
  ["Tool use", [
    { name: "Calls per trajectory", keys: [["collapse/calls_mean", "mean"], ["collapse/calls_p90", "p90"]], range: [0, null] },
    { name: "Collapse ratio", keys: [["collapse/ratio", "at most one call"], ["collapse/post_hoc_ratio", "only post hoc"]], range: [0, 1], rule: 0.3, sub: "alarm above 30 %" },
    { name: "First and last call", keys: [["collapse/first_call_position", "first"], ["collapse/last_call_position", "last"]], range: [0, 1], sub: "share of model tokens before it" },
    { name: "Use of session state", keys: [["collapse/state_reuse_ratio", "calls that build on an earlier one"], ["collapse/repeated_code_ratio", "identical code again"]], range: [0, 1] },
    { name: "Failing calls", keys: [["collapse/error_ratio", "failed"], ["collapse/recovery_rate", "recovered by the next call"]], range: [0, 1] },
    { name: "Push on calls", keys: [["collapse/advantage_weighted_calls", "advantage × calls"]], sub: "above 0: this step teaches more calls" },
    { name: "Accuracy by number of calls", keys: [["collapse/acc_at_calls/0", "0"], ["collapse/acc_at_calls/1-4", "1–4"], ["collapse/acc_at_calls/5-9", "5–9"], ["collapse/acc_at_calls/10+", "10+"]], range: [0, 1] },
    { name: "Calls in validation", keys: [["val-aux/*/collapse/calls_mean", ""]], range: [0, null], sub: "per trajectory, mean" },
    { name: "Calls, right against wrong", keys: [["collapse/correct/calls_mean", "right"], ["collapse/wrong/calls_mean", "wrong"]], range: [0, null] },
  ]],
  ["Policy", [
    { name: "Entropy", keys: [["actor/entropy", "nats per token"]], range: [0, null] },
    { name: "KL of the update", keys: [["actor/ppo_kl", "old − current"]], sub: "nats per token, after the first mini-batch" },
    { name: "Clipped tokens", keys: [["actor/pg_clipfrac", "clip"], ["actor/pg_clipfrac_lower", "dual clip"], ["actor/tis_capped_ratio", "TIS cap"]], range: [0, null] },
    { name: "Engine against learner", keys: [["training/mismatch_k3", "KL, k3"]], log: true, sub: "nats per token" },
    { name: "Probability correlation", keys: [["training/rollout_actor_probs_pearson_corr", "pearson"]], sub: "engine and learner, same tokens" },
    { name: "Gradient norm", keys: [["actor/grad_norm", "before clipping"]], range: [0, null] },
    { name: "Learning rate", keys: [["actor/lr", "lr"]], range: [0, null] },
  ]],
  ["Trajectories", [
    { name: "Response length", keys: [["response_length/mean", "mean"], ["response_length/max", "longest"]], range: [0, null], sub: "tokens, observations included" },
    { name: "Why they ended", keys: [["causes/max_tokens_ratio", "token budget"], ["causes/max_tool_calls_ratio", "call budget"], ["causes/observation_overflow_ratio", "observation overflow"], ["causes/malformed_end_ratio", "malformed call"]], range: [0, null], sub: "the rest answered" },
    { name: "Lost by our infrastructure", keys: [["infra_failed_rate", "of all attempts"]], range: [0, null], sub: "kept out of all statistics" },
  ]],
  ["System", [
    { name: "Throughput", keys: [["perf/throughput", "tokens / s"]], range: [0, null] },
    { name: "Time of a step", keys: [["timing_s/step", "step"], ["timing_s/gen", "rollouts"], ["timing_s/old_log_prob", "π old"], ["timing_s/update_actor", "update"], ["timing_s/publish", "weights"]], range: [0, null], sub: "seconds" },
    { name: "Time of a trajectory", keys: [["timing_s/agent_loop/generate_sequences/mean", "generating"], ["timing_s/agent_loop/tool_calls/mean", "in tools"], ["timing_s/agent_loop/tool_queue/mean", "queueing"]], range: [0, null], sub: "seconds, mean" },
  ]],
];
const DASHES = ["", "6 4", "2 3", "8 3 2 3", "1 4"];
const shown = new Set(DATA.runs.keys());
let inSequence = DATA.runs.every((r, i) => i === 0 || r.began >= DATA.runs[i - 1].ended - 1);
let smooth = 0;

function matching(run, pattern) {
  const re = new RegExp("^" + pattern.replace(/[.+?^${}()|[\]\\]/g, "\\$&").replaceAll("*", "[^/]+") + "$");
  return Object.keys(run.series).filter((name) => re.test(name));
}

// SFT and RL steps are different things: a chart that both have is drawn once for each.
function byStage(spec) {
  const stages = [...new Set(lines(spec).map((l) => DATA.runs[l.run].stage))];
  return stages.length < 2 ? [spec] : stages.map((stage) => ({ ...spec, stage, name: `${spec.name}, ${stage === "sft" ? "SFT" : stage === "rl" ? "RL" : stage}` }));
}

function lines(spec) {
  const out = [];
  let offset = 0;
  for (const [i, run] of DATA.runs.entries()) {
    if (!shown.has(i) || (spec.stage !== undefined && run.stage !== spec.stage)) continue;
    let last = 0;
    for (const [k, [pattern, label]] of spec.keys.entries()) {
      for (const [j, name] of (pattern.includes("*") ? matching(run, pattern) : [pattern]).entries()) {
        const s = run.series[name];
        if (!s || (run.stage === "eval" && s[0].length < 2)) continue;
        const band = spec.band && spec.band.map((end) => run.series[name + end]);
        const points = s[0].map((step, n) => ({ x: step + (inSequence ? offset : 0), step, y: s[1][n], low: band && band[0] ? band[0][1][n] : null, high: band && band[1] ? band[1][1][n] : null }));
        let ema = null;
        for (const p of points) { if (finite(p.y)) { ema = ema === null ? p.y : smooth * ema + (1 - smooth) * p.y; p.drawn = smooth ? ema : p.y; } }
        out.push({ run: i, key: k + j, label: label || name.split("/")[1], points: points.filter((p) => finite(p.y)), from: offset });
        last = Math.max(last, s[0][s[0].length - 1]);
      }
    }
    offset += last;
  }
  return out.filter((l) => l.points.length);
}

function ticks(low, high, count) {
  const raw = (high - low) / count;
  const base = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * base).find((s) => s >= raw * 0.999);
  const out = [];
  for (let v = Math.ceil(low / step - 1e-9) * step; v <= high + step * 1e-9; v += step) out.push(Math.abs(v) < step * 1e-9 ? 0 : v);
  return out;
}

function tickText(v, step) {
  if (!(step > 0) || Math.abs(v) >= 1e4 || (v !== 0 && step < 1e-4)) return short(v);
  const digits = Math.min(5, Math.max(0, -Math.floor(Math.log10(step) + 1e-9) + (String(step).replace(/^0\.0*/, "").startsWith("25") ? 1 : 0)));
  return v.toFixed(digits).replace("-", "−");
}

function draw(box, spec) {
  const all = lines(spec);
  const W = Math.max(box.clientWidth - 30, 220), H = 168, left = 44, right = 8, top = 10, bottom = 20;
  const ys = all.flatMap((l) => l.points.flatMap((p) => [p.y, p.low, p.high].filter(finite)));
  let low = Math.min(...ys), high = Math.max(...ys);
  const log = spec.log && low > 0;
  if (spec.range && !log) { low = Math.min(low, spec.range[0]); high = spec.range[1] === null ? Math.max(high, low) : Math.max(high, spec.range[1]); }
  if (log) { low = Math.floor(Math.log10(low)); high = Math.ceil(Math.log10(high)); if (low === high) high += 1; }
  if (high - low < 1e-12 * Math.max(1, Math.abs(high))) { const pad = Math.abs(high) * 0.1 || 1; high += pad; if (!spec.range) low -= pad; }
  if (!log && !(spec.range && spec.range[1] !== null)) high += (high - low) * 0.06;
  let x0 = Math.min(...all.map((l) => l.points[0].x)), x1 = Math.max(...all.map((l) => l.points[l.points.length - 1].x));
  if (x0 === x1) { x0 -= 1; x1 += 1; }
  const X = (x) => left + (W - left - right) * (x - x0) / (x1 - x0);
  const Y = (y) => { const v = log ? Math.log10(y) : y; return top + (H - top - bottom) * (1 - (v - low) / (high - low)); };
  const severalRuns = new Set(all.map((l) => l.run)).size > 1;
  const paint = (l) => (severalRuns || DATA.runs.length > 1 ? color(l.run) : color(l.key));
  const dash = (l) => (severalRuns || DATA.runs.length > 1 ? DASHES[l.key % 5] : "");
  const svg = h("svg", { height: H, viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": spec.name });
  const yt = log ? Array.from({ length: high - low + 1 }, (_, i) => 10 ** (low + i)).filter((_, i, a) => a.length < 6 || i % 2 === 0) : ticks(low, high, 4);
  for (const t of yt) svg.append(h("line", { class: "axis", x1: left, x2: W - right, y1: Y(t), y2: Y(t) }), h("text", { x: left - 7, y: Y(t) + 4, "text-anchor": "end" }, tickText(t, log ? 0 : yt[1] - yt[0])));
  for (const t of ticks(x0, x1, Math.max(2, Math.min(6, W / 80)))) if (Number.isInteger(t)) svg.append(h("text", { x: X(t), y: H - 4, "text-anchor": "middle" }, String(t)));
  if (spec.rule !== undefined) svg.append(h("line", { class: "rule", x1: left, x2: W - right, y1: Y(spec.rule), y2: Y(spec.rule) }));
  if (inSequence && severalRuns) for (const f of new Set(all.map((l) => l.from))) if (f > x0) svg.append(h("line", { class: "seam", x1: X(f), x2: X(f), y1: top, y2: H - bottom }));
  for (const l of all) {
    const p = l.points;
    const banded = p.filter((q) => finite(q.low) && finite(q.high));
    if (banded.length > 1) svg.append(h("polygon", { points: [...banded.map((q) => `${X(q.x)},${Y(q.high)}`), ...banded.reverse().map((q) => `${X(q.x)},${Y(q.low)}`)].join(" "), style: `fill:${paint(l)}`, opacity: 0.13 }));
    else if (banded.length) svg.append(h("line", { x1: X(banded[0].x), x2: X(banded[0].x), y1: Y(banded[0].low), y2: Y(banded[0].high), style: `stroke:${paint(l)}`, "stroke-width": 3, opacity: 0.3 }));
    const d = (field) => p.map((q, n) => `${n ? "L" : "M"}${X(q.x).toFixed(1)} ${Y(q[field]).toFixed(1)}`).join("");
    if (smooth) svg.append(h("path", { d: d("y"), fill: "none", style: `stroke:${paint(l)}`, "stroke-width": 1, opacity: 0.25 }));
    svg.append(h("path", { d: d("drawn"), fill: "none", style: `stroke:${paint(l)}`, "stroke-width": 1.8, "stroke-linejoin": "round", "stroke-dasharray": dash(l) || null }));
    if (p.length < 30 && !dash(l)) for (const q of p) svg.append(h("circle", { cx: X(q.x), cy: Y(q.drawn), r: 2.4, style: `fill:${paint(l)}` }));
  }
  const cursor = h("line", { class: "seam", y1: top, y2: H - bottom, visibility: "hidden" });
  svg.append(cursor);
  svg.addEventListener("pointermove", (e) => {
    const at = x0 + (x1 - x0) * (((e.clientX - svg.getBoundingClientRect().left) * W / svg.getBoundingClientRect().width) - left) / (W - left - right);
    const near = all.map((l) => ({ l, p: l.points.reduce((a, b) => (Math.abs(b.x - at) < Math.abs(a.x - at) ? b : a)) }));
    const best = near.reduce((a, b) => (Math.abs(b.p.x - at) < Math.abs(a.p.x - at) ? b : a)).p.x;
    cursor.setAttribute("x1", X(best)); cursor.setAttribute("x2", X(best)); cursor.setAttribute("visibility", "visible");
    tip(e, near.filter((n) => n.p.x === best).map((n) => h("div", {}, h("span", { class: "dot", style: `background:${paint(n.l)}` }),
      `${DATA.runs.length > 1 ? DATA.runs[n.l.run].name + " " : ""}step ${n.p.step} · ${n.l.label} ${short(n.p.y)}${finite(n.p.low) ? ` [${short(n.p.low)}, ${short(n.p.high)}]` : ""}`)));
  });
  svg.addEventListener("pointerleave", () => { $("tip").hidden = true; cursor.setAttribute("visibility", "hidden"); });
  const keys = [...new Map(all.map((l) => [l.label, l])).values()];
  const lastOf = all.length && all[all.length - 1].points[all[all.length - 1].points.length - 1].y;
  box.replaceChildren(h("div", { class: "name" }, spec.name, h("span", { title: "last value of the last line" }, all.length === 1 || !severalRuns && keys.length === 1 ? short(lastOf) : "")),
    h("div", { class: "sub" }, spec.sub || ""), svg,
    h("div", { class: "keys" }, keys.length > 1 ? keys.map((l) => h("span", {}, h("svg", { viewBox: "0 0 18 8" }, h("line", { x1: 0, x2: 18, y1: 4, y2: 4, "stroke-width": 2, style: `stroke:${severalRuns || DATA.runs.length > 1 ? "var(--soft)" : paint(l)}`, "stroke-dasharray": dash(l) || null })), l.label)) : ""));
}

function tip(event, content) {
  const el = $("tip");
  el.replaceChildren(...content);
  el.hidden = false;
  const box = el.getBoundingClientRect();
  el.style.left = `${Math.max(8, Math.min(event.clientX + 14, innerWidth - box.width - 12))}px`;
  el.style.top = `${event.clientY + 16 + box.height > innerHeight ? event.clientY - box.height - 12 : event.clientY + 16}px`;
}

function curves() {
  const root = $("charts");
  root.replaceChildren();
  let some = false;
  for (const [heading, specs] of SPECS) {
    const grid = h("div", { class: "grid" });
    const alive = specs.filter((spec) => lines(spec).length).flatMap(byStage);
    if (!alive.length) continue;
    root.append(h("h3", {}, heading), grid);
    for (const spec of alive) { const box = h("div", { class: "card chart" }); grid.append(box); draw(box, spec); }
    some = true;
  }
  if (!some) root.append(h("p", { class: "muted" }, "No curve: these runs logged a single step, or every run is switched off above."));
}

function curveBar() {
  const bar = $("curve-bar");
  if (DATA.runs.length > 1) {
    for (const [i, run] of DATA.runs.entries()) {
      if (run.stage === "eval") continue;
      const b = h("button", { class: "ghost", "aria-pressed": true }, h("span", { class: "dot", style: `background:${color(i)};margin-right:7px` }), run.name);
      b.addEventListener("click", () => { if (shown.has(i)) shown.delete(i); else shown.add(i); b.setAttribute("aria-pressed", shown.has(i)); curves(); });
      bar.append(b);
    }
    const mode = h("button", { class: "ghost", title: "stages one after the other, or runs on top of each other" });
    const label = () => { mode.textContent = inSequence ? "In sequence" : "Overlaid"; };
    mode.addEventListener("click", () => { inSequence = !inSequence; label(); curves(); });
    label();
    bar.append(mode);
  }
  const pick = h("select", { "aria-label": "smoothing", onchange: (e) => { smooth = Number(e.target.value); curves(); } },
    h("option", { value: 0 }, "none"), h("option", { value: 0.6 }, "light"), h("option", { value: 0.9 }, "strong"));
  bar.append(h("label", {}, "Smoothing", pick));
}

// config --------------------------------------------------------------------------------------------------------------
function configs() {
  for (const [i, run] of DATA.runs.entries()) {
    const before = i ? DATA.runs[i - 1].config : null;
    const keys = Object.keys(run.config);
    const changed = (k) => before && k in before && JSON.stringify(before[k]) !== JSON.stringify(run.config[k]);
    const count = keys.filter(changed).length;
    $("configs").append(h("details", { class: "config" },
      h("summary", {}, h("span", { class: "dot", style: `background:${color(i)}` }), run.name, h("span", { class: "muted", style: "margin:0" }, run.run_id, before ? ` · ${count} values differ from ${DATA.runs[i - 1].name}` : "")),
      h("div", { class: "configs" }, keys.map((k) => h("div", { class: changed(k) ? "changed" : "" }, `${k} = ${JSON.stringify(run.config[k])}`)))));
  }
}

overview(); forest(); curveBar(); curves(); configs();
let redraw = null, width = innerWidth;
addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; clearTimeout(redraw); redraw = setTimeout(curves, 120); } });
