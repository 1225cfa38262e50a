// One step on the clock: the learner's lane, what each engine had in hand, and every trajectory as a line.
let stepView = null, stepAt = -1;
const LANE = [["generating", "--r0"], ["in a tool", "--r1"], ["waiting", "--wait"], ["verdict", "--r2"]];
const PHASE_INK = { rollouts: "--wait", "log-probs": "--r2", update: "--r3", validation: "--r4", weights: "--r4", rest: "--line" };

async function showStep(at) {
  if (at < 0 || at >= DATA.steps.length) return;
  stepAt = at;
  stepView = await unpack(`step-${at}`);
  if (stepAt !== at) return;
  const pick = $("step-pick");
  pick.value = String(at);
  $("step-back").disabled = at === 0;
  $("step-next").disabled = at === DATA.steps.length - 1;
  drawStep();
}

function stepBar() {
  const label = ([run, kind, step]) => `${RUNS.length > 1 ? `${RUNS[run].name}, ` : ""}${RUNS[run].stage === "eval" ? "evaluation" : kind === "val" ? `validation at ${step}` : `step ${step}`}`;
  $("step-bar").append(
    h("button", { id: "step-back", class: "step", "aria-label": "previous step", onclick: () => showStep(stepAt - 1) }, "←"),
    h("select", { id: "step-pick", "aria-label": "step", onchange: (e) => showStep(Number(e.target.value)) }, DATA.steps.map((s, i) => h("option", { value: i }, label(s)))),
    h("button", { id: "step-next", class: "step", "aria-label": "next step", onclick: () => showStep(stepAt + 1) }, "→"),
    h("span", { class: "key" }, LANE.map(([name, ink]) => h("span", {}, h("i", { style: `background:var(${ink})` }), name))));
}

// How many trajectories of an engine are generating, in a tool, waiting, at each of `n` moments.
function inHand(view, engine, n) {
  const counts = LANE.map(() => new Float64Array(n));
  const at = (ms) => Math.max(0, Math.min(n, Math.round(n * ms / view.end)));
  const add = (series, a, b, by) => { for (let i = at(a); i < at(b); i++) series[i] += by; };
  for (const [e, began, ended, , , gen, tool, score] of view.t) {
    if (e !== engine) continue;
    add(counts[2], began, ended, 1);
    add(counts[3], ended, ended + score, 1);
    for (const [list, series] of [[gen, counts[0]], [tool, counts[1]]]) for (let i = 0; i < list.length; i += 2) { add(series, began + list[i], began + list[i + 1], 1); add(counts[2], began + list[i], began + list[i + 1], -1); }
  }
  for (let i = 0; i < n; i++) counts[2][i] = Math.max(0, counts[2][i]);
  return counts;
}

function drawStep() {
  const v = stepView, box = $("step-chart");
  if (!v) return;
  const W = Math.max(box.clientWidth, 260), left = W < 560 ? 70 : 112, right = 10, width = W - left - right;
  const X = (ms) => left + width * ms / v.end;
  const lanes = v.engines.length, laneH = lanes > 8 ? 26 : 46, head = v.learner.length ? 34 : 0;
  const H = head + lanes * (laneH + 10) + 22;
  const svg = h("svg", { height: H, viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": v.said.join(" ") || "timeline of a step" });
  const grid = ticks(0, v.end / 1000, Math.max(3, Math.min(9, width / 90)));
  for (const s of grid) svg.append(h("line", { class: "axis", x1: X(1000 * s), x2: X(1000 * s), y1: 0, y2: H - 18 }), h("text", { x: X(1000 * s), y: H - 4, "text-anchor": "middle" }, `${tickText(s, grid[1])} s`));
  if (v.learner.length) {
    svg.append(h("text", { class: "lane", x: left - 10, y: 17, "text-anchor": "end" }, "learner"));
    for (const [name, a, b] of v.learner) {
      const wide = X(b) - X(a), label = name === "rollouts" ? "waits for rollouts" : name;
      const g = h("g", {}, h("rect", { x: X(a), y: 3, width: Math.max(0.5, wide - 1), height: 20, rx: 3, style: `fill:var(${PHASE_INK[name] || "--wait"})`, class: name === "rollouts" ? "idle" : "" }));
      if (wide > 6.4 * label.length + 8) g.append(h("text", { x: X(a) + 7, y: 17, class: name === "rollouts" || name === "rest" ? "on-light" : "on-dark" }, label));
      g.addEventListener("pointermove", (e) => tip(e, [h("b", {}, label), h("div", {}, `${span((b - a) / 1000)}, ${pct((b - a) / v.end, 0)} of the step`)]));
      g.addEventListener("pointerleave", untip);
      svg.append(g);
    }
  }
  const n = Math.max(60, Math.floor(width / 2));
  const all = v.engines.map((_, e) => inHand(v, e, n));
  const most = Math.max(1, ...all.flatMap((c) => Array.from(c[0], (x, i) => x + c[1][i] + c[2][i] + c[3][i])));
  all.forEach((counts, e) => {
    const y0 = head + e * (laneH + 10) + laneH;
    svg.append(h("text", { class: "lane", x: left - 10, y: y0 - laneH / 2 + 4, "text-anchor": "end" }, clip(v.engines[e] || "engine", W < 560 ? 8 : 15)), h("line", { class: "axis", x1: left, x2: W - right, y1: y0, y2: y0 }));
    const base = new Float64Array(n);
    LANE.forEach(([name, ink], k) => {
      let d = "";
      for (let i = 0; i < n; i++) {
        const c = counts[k][i];
        if (c > 0) d += `M${(left + width * i / n).toFixed(1)} ${(y0 - laneH * base[i] / most).toFixed(1)}h${(width / n + 0.3).toFixed(2)}v${(-laneH * c / most).toFixed(1)}h${(-width / n - 0.3).toFixed(2)}Z`;
        base[i] += c;
      }
      svg.append(h("path", { d, style: `fill:var(${ink})`, "aria-label": name, "shape-rendering": "crispEdges" }));
    });
    const hit = h("rect", { x: left, y: y0 - laneH, width, height: laneH, fill: "transparent" });
    hit.addEventListener("pointermove", (ev) => {
      const r = svg.getBoundingClientRect(), i = Math.max(0, Math.min(n - 1, Math.floor(n * ((ev.clientX - r.left) * W / r.width - left) / width)));
      tip(ev, [h("b", {}, `${v.engines[e] || "engine"} at ${(v.end * i / n / 1000).toFixed(2)} s`), ...LANE.map(([name, ink], k) => h("div", {}, h("span", { class: "dot", style: `background:var(${ink})` }), `${counts[k][i]} ${name}`))]);
    });
    hit.addEventListener("pointerleave", untip);
    svg.append(hit);
  });
  box.replaceChildren(svg, gantt(v, { W, left, width }));
  const [run, kind, step] = DATA.steps[stepAt];
  $("step-said").replaceChildren(...v.said.map((s) => h("li", {}, s)));
  $("step-note").textContent = v.learner.length ? "" : kind === "val" || RUNS[run].stage === "eval" ? "An evaluation has no learner; times are those of its trajectories." : `Step ${step} has no timing in metrics.jsonl yet.`;
}

// Every trajectory a line, in order of beginning: canvas, since a step may have a thousand.
function gantt(v, { W, left, width }) {
  const rows = v.t.length, rowH = Math.max(1, Math.min(7, 380 / Math.max(rows, 1))), H = Math.ceil(rows * rowH) + 4;
  const scale = devicePixelRatio || 1;
  const canvas = h("canvas", { width: Math.round(W * scale), height: Math.round(H * scale), style: `width:${W}px;height:${H}px`, role: "img", "aria-label": `${rows} trajectories of this step, each a line; the table below lists them` });
  const g = canvas.getContext("2d");
  g.scale(scale, scale);
  const paint = { gen: shade("--r0"), tool: shade("--r1"), wait: shade("--wait"), lost: shade("--bad"), score: shade("--r2") };
  const thin = rowH > 3 ? rowH - 1 : rowH;
  v.t.forEach(([, began, ended, ok, , gen, tool, score], n) => {
    const y = 2 + n * rowH, x = (ms) => left + width * ms / v.end, bar = (a, b, ink) => { g.fillStyle = ink; g.fillRect(x(a), y, Math.max(0.6, x(b) - x(a)), thin); };
    bar(began, ended, ok === null || ok === 2 ? paint.lost : paint.wait);
    if (score) bar(ended, ended + score, paint.score);
    for (let i = 0; i < gen.length; i += 2) bar(began + gen[i], began + gen[i + 1], paint.gen);
    for (let i = 0; i < tool.length; i += 2) bar(began + tool[i], began + tool[i + 1], paint.tool);
  });
  g.fillStyle = shade("--soft");
  g.font = `12px ${shade("--sans")}`;
  g.textAlign = "right";
  g.textBaseline = "top";
  g.fillText(W < 560 ? `${whole(rows)} traj.` : `${whole(rows)} trajectories`, left - 10, 4);
  const at = (e) => v.t[Math.floor((e.offsetY - 2) / rowH)];
  canvas.addEventListener("pointermove", (e) => {
    const t = at(e);
    if (!t) return untip();
    canvas.style.cursor = t[4] >= 0 ? "pointer" : "default";
    const row = ROWS[t[4]], calls = t[6].length / 2;
    tip(e, [h("b", {}, t[3] === 2 ? "lost, run again" : t[3] === null ? "lost by our infrastructure" : t[3] ? "right" : "wrong"), h("div", {}, `${span((t[2] - t[1]) / 1000)}, ${calls} call${calls === 1 ? "" : "s"}`), row && h("div", {}, clip(row.q, 80)), t[4] >= 0 && h("div", {}, "click to read it")]);
  });
  canvas.addEventListener("pointerleave", untip);
  canvas.addEventListener("click", (e) => { const t = at(e); if (t && t[4] >= 0) openRow(ROWS[t[4]]); });
  return canvas;
}

async function stepSection() {
  if (!DATA.steps.length) { $("step").remove(); document.querySelector('nav a[href="#step"]').remove(); return; }
  stepBar();
  // the step in the middle of the last training run: beginnings are warm-ups, ends may be half-written
  const trained = DATA.steps.map((s, i) => [s, i]).filter(([s]) => s[1] === "train");
  const last = trained.length ? trained[trained.length - 1][0][0] : null;
  const of = trained.filter(([s]) => s[0] === last);
  await showStep(of.length ? of[Math.floor(of.length / 2)][1] : 0);
}
