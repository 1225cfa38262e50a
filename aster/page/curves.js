// Which curves there are, and which run's lines go into each.
// keys: [series, label]; a * stands for one part of the name. rule: a threshold. stage: drawn apart for SFT and RL.
const SPECS = [
  ["Learning", [
    { name: "Training reward", keys: [["critic/score/mean", "reward"]], range: [0, 1] },
    { name: "Validation accuracy", keys: [["val-core/*/acc/mean@*", ""]], band: ["/ci_low", "/ci_high"], range: [0, 1], sub: "with its 95 % interval" },
    { name: "Loss", keys: [["train/loss", "training"], ["val/loss", "validation"]], sub: "nats per target token" },
    { name: "Format of tool calls", keys: [["val/tool_format_accuracy", "accuracy"]], range: [0, 1], sub: "share of calls that greedy sampling would write in form" },
    { name: "Groups without a signal", keys: [["training/all_correct_groups_ratio", "all right"], ["training/all_wrong_groups_ratio", "all wrong"]], range: [0, 1], sub: "every sample judged the same" },
  ]],
  ["Tool use", [
    { name: "Calls per trajectory", keys: [["collapse/calls_mean", "mean"], ["collapse/calls_p90", "p90"]], range: [0, null] },
    { name: "Collapse ratio", keys: [["collapse/ratio", "≤ 1 call"], ["collapse/post_hoc_ratio", "post hoc"]], range: [0, 1], rule: RUNS.map((r) => r.config["collapse.max_ratio"]).find(finite) ?? 0.3, ruleText: "alarm", sub: "trajectories with at most one call" },
    { name: "First and last call", keys: [["collapse/first_call_position", "first"], ["collapse/last_call_position", "last"]], range: [0, 1], sub: "share of the model's tokens before it" },
    { name: "Use of session state", keys: [["collapse/state_reuse_ratio", "builds on earlier"], ["collapse/repeated_code_ratio", "same code again"]], range: [0, 1], sub: "of calls after the first" },
    { name: "Failing calls", keys: [["collapse/error_ratio", "failed"], ["collapse/recovery_rate", "recovered next"]], range: [0, 1] },
    { name: "Calls when right, when wrong", keys: [["collapse/correct/calls_mean", "right"], ["collapse/wrong/calls_mean", "wrong"]], range: [0, null], sub: "per trajectory, mean" },
    { name: "Accuracy by number of calls", keys: [["collapse/acc_at_calls/0", "0 calls"], ["collapse/acc_at_calls/1-4", "1–4"], ["collapse/acc_at_calls/5-9", "5–9"], ["collapse/acc_at_calls/10+", "10+"]], range: [0, 1] },
    { name: "Push on calls", keys: [["collapse/advantage_weighted_calls", "advantage × calls"]], sub: "above 0: the step teaches more calls" },
    { name: "Calls in validation", keys: [["val-aux/*/collapse/calls_mean", ""]], range: [0, null], sub: "per trajectory, mean" },
  ]],
  ["Policy", [
    { name: "Entropy", keys: [["actor/entropy", "entropy"]], range: [0, null], sub: "nats per token" },
    { name: "Engine against learner", keys: [["training/mismatch_k3", "KL, k3"]], log: true, sub: "nats per token, same weights" },
    { name: "Probability correlation", keys: [["training/rollout_actor_probs_pearson_corr", "pearson"]], sub: "engine and learner, same tokens" },
    { name: "KL of the update", keys: [["actor/ppo_kl", "old − current"]], zeros: "left out", sub: "nats per token" },
    { name: "Clipped tokens", keys: [["actor/pg_clipfrac", "clip"], ["actor/pg_clipfrac_lower", "dual clip"], ["actor/tis_capped_ratio", "TIS cap"]], range: [0, null], zeros: "left out", sub: "share of loss tokens" },
    { name: "Gradient norm", keys: [["actor/grad_norm", "norm"]], range: [0, null], sub: "before clipping" },
    { name: "Learning rate", keys: [["actor/lr", "rate"]], range: [0, null] },
  ]],
  ["Trajectories", [
    { name: "Response length", keys: [["response_length/mean", "mean"], ["response_length/max", "longest"]], range: [0, null], sub: "tokens, observations included" },
    { name: "Why they ended", keys: [["causes/max_tokens_ratio", "tokens"], ["causes/max_tool_calls_ratio", "calls"], ["causes/observation_overflow_ratio", "observation"], ["causes/malformed_end_ratio", "malformed"]], range: [0, null], zeros: "left out", sub: "budgets and malformed calls; the rest answered" },
    { name: "Lost by our infrastructure", keys: [["infra_failed_rate", "of attempts"]], range: [0, null], sub: "kept out of every statistic" },
  ]],
  ["System", [
    { name: "Throughput", keys: [["perf/throughput", "tokens / s"]], range: [0, null], sub: "per device, prompt and response" },
    { name: "Time of a trajectory", keys: [["timing_s/agent_loop/generate_sequences/mean", "generating"], ["timing_s/agent_loop/tool_calls/mean", "in tools"], ["timing_s/agent_loop/tool_queue/mean", "queueing"]], range: [0, null], sub: "seconds, mean" },
  ]],
];
const shown = new Set(RUNS.keys());
// Stages follow each other, each from the model of the one before; runs from the same model are alternatives.
let inSequence = RUNS.length > 1 && RUNS.every((r, i) => RUNS.slice(0, i).every((q) => r.stage === "eval" || q.stage !== r.stage || (q.config["model.path"] !== r.config["model.path"] && r.began >= q.ended - 1)));
let smooth = 0;

// The lines of a spec for runs of one stage. Steps of SFT and RL are different things.
function linesOf(spec, stage) {
  const out = [], seams = [];
  let offset = 0;
  const runs = [...RUNS.entries()].filter(([i, r]) => shown.has(i) && r.stage === stage);
  const having = runs.filter(([, r]) => spec.keys.some(([pattern]) => matching(r, pattern).length));
  const several = having.length > 1;
  const alone = spec.keys.filter(([pattern]) => having.some(([, r]) => matching(r, pattern).length)).length < 2;
  for (const [i, run] of having) {
    let last = 0, any = false;
    // Runs on top of each other are told apart by colour, so only the first two keys fit; alone, keys have the colours.
    const keys = several && !inSequence ? spec.keys.slice(0, 2) : spec.keys;
    for (const [k, [pattern, label]] of keys.entries()) {
      for (const [j, name] of matching(run, pattern).entries()) {
        const s = run.series[name];
        if (stage === "eval" && s[0].length < 2) continue;
        const band = (spec.band || []).map((end) => run.series[name + end]);
        const p = s[0].map((step, n) => ({ x: step + (several && inSequence ? offset : 0), step, y: s[1][n], low: band[0] ? band[0][1][n] : null, high: band[1] ? band[1][1][n] : null })).filter((q) => finite(q.y));
        let ema = null;
        for (const q of p) { ema = ema === null ? q.y : smooth * ema + (1 - smooth) * q.y; q.drawn = smooth ? ema : q.y; }
        const key = label || sourceOf(name);
        if (!p.length || (spec.zeros && p.every((q) => q.y === 0))) continue;
        any = true;
        const overlaid = several && !inSequence;
        out.push({ points: p, name: overlaid ? `${run.name} ${key}` : key, label: overlaid ? (k + j ? "" : run.name) : key, mute: overlaid && k + j > 0, color: RUNS.length > 1 && (overlaid || alone) ? color(i) : color(k + j), dash: overlaid ? DASHES[(k + j) % 5] : "", last: i });
        last = Math.max(last, s[0][s[0].length - 1]);
      }
    }
    if (any && several && inSequence) seams.push({ x: offset, label: run.name });
    offset += last;
  }
  // In sequence the same key goes on: only its last piece carries the label.
  if (several && inSequence) for (const l of out) l.mute = out.some((m) => m.label === l.label && m.last > l.last);
  return { lines: out, seams, second: several && !inSequence && spec.keys.length > 1 && out.some((l) => l.dash) };
}

function curves() {
  const root = $("charts");
  root.replaceChildren();
  const stages = [...new Set(RUNS.map((r) => r.stage))];
  for (const [heading, specs] of SPECS) {
    const alive = specs.flatMap((spec) => stages.map((stage) => ({ spec, stage, ...linesOf(spec, stage) }))).filter((c) => c.lines.length && c.lines.some((l) => l.points.length > 1 || l.points[0].low !== null));
    const grid = h("div", { class: "grid" });
    const extra = heading === "System" ? splits() : [];
    if (!alive.length && !extra.length) continue;
    root.append(h("h3", {}, heading), grid);
    for (const { spec, stage, lines, seams, second } of alive) {
      const twice = alive.filter((c) => c.spec === spec).length > 1;
      const box = h("figure", { class: "chart" });
      grid.append(box);
      const sub = [spec.sub, second && `dashed: ${spec.keys[1][1]}`].filter(Boolean).join(" · ");
      box.append(h("figcaption", {}, h("b", {}, spec.name + (twice ? { sft: ", supervised", rl: ", GRPO", eval: ", evaluation" }[stage] || "" : "")), h("span", {}, sub)), lineChart(box, lines, { ...spec, seams, smooth }));
    }
    for (const { title, make } of extra) {
      const box = h("figure", { class: "chart" });
      grid.append(box);
      box.append(h("figcaption", {}, h("b", {}, title), h("span", {}, "seconds by phase")), make(box));
    }
  }
  if (!root.children.length) root.append(h("p", { class: "muted" }, "No curve: these runs logged a single step, or every run is switched off above."));
}

// Where a step's time went, a bar per step.
const PHASES = [["timing_s/gen", "rollouts", "var(--r0)"], ["timing_s/old_log_prob", "log-probs", "var(--r2)"], ["timing_s/update_actor", "update", "var(--r3)"], ["timing_s/validation_wait", "validation", "var(--r4)"], ["timing_s/publish", "weights", "var(--r1)"]];
function splits() {
  const out = [];
  for (const [i, run] of RUNS.entries()) {
    const all = points(run, "timing_s/step");
    if (!shown.has(i) || all.length < 2) continue;
    const parts = PHASES.map(([name, label, paint]) => ({ label, color: paint, at: new Map(points(run, name).map((p) => [p.step, p.y])) })).filter((p) => p.at.size);
    if (parts.length < 2) continue;
    const rest = new Map(all.map((p) => [p.step, Math.max(0, p.y - parts.reduce((a, q) => a + (q.at.get(p.step) || 0), 0))]));
    parts.push({ label: "rest", color: "var(--faint)", at: rest });
    out.push({ title: RUNS.length > 1 ? `Time of a step, ${run.name}` : "Time of a step", make: (box) => stackChart(box, all.map((p) => p.step), parts, { name: "Time of a step", height: 176, form: (x) => span(x) }) });
  }
  return out;
}

const bandLabel = (b) => (b === "1" ? "1 call" : b === "0" ? "no call" : b.replace("-", "–"));

// How many calls trajectories make, a column per step: one picture per run, on the same scale.
function toolUse() {
  const root = $("bands");
  root.replaceChildren();
  const mine = [...RUNS.entries()].filter(([i, r]) => shown.has(i) && bandPrefix(r));
  const figures = mine.filter(([, r]) => points(r, `${bandPrefix(r)}0`).length > 1);
  if (!mine.length) { $("tooluse").hidden = true; return; }
  $("tooluse").hidden = false;
  const draws = [];
  root.className = figures.length > 1 ? "bands two" : "bands";
  for (const [i, run] of figures) {
    const prefix = bandPrefix(run);
    const steps = points(run, `${prefix}0`).map((p) => p.step);
    const parts = BANDS.map((b, n) => ({ label: bandLabel(b), color: `var(--b${n})`, ink: `var(--bt${n})`, inside: `var(--bi${n})`, at: new Map(points(run, prefix + b).map((p) => [p.step, p.y])) }));
    const spans = alarms(run);
    const word = run.series["collapse/alarm"] && ["collapse alarm ", alarmWord(run)];
    const box = h("figure", { class: "chart" }, h("figcaption", {}, h("b", {}, RUNS.length > 1 && dot(i), run.name), h("span", {}, word)));
    root.append(box);
    draws.push(() => box.append(stackChart(box, steps, parts, { name: `Tool calls of ${run.name}`, height: figures.length > 1 ? 190 : 230, most: 1, form: (x) => pct(x, 0), marks: spans })));
  }
  for (const draw of draws) draw(); // now that each has its width
  const single = mine.filter((run) => !figures.includes(run));
  $("shares").replaceChildren(...single.flatMap(([i, run]) => [h("div", { class: "who" }, RUNS.length > 1 && dot(i), h("span", {}, run.name)), shares(run)]));
}

// One step only, as in an evaluation: a bar.
function shares(run) {
  const prefix = bandPrefix(run);
  const parts = BANDS.map((b, n) => [bandLabel(b), n, points(run, prefix + b)[0]?.y || 0]).filter(([, , v]) => v > 0);
  return h("div", { class: "share", role: "img", "aria-label": parts.map(([label, , v]) => `${label} ${pct(v, 0)}`).join(", ") },
    parts.map(([label, n, v]) => h("i", { style: `flex:${v};background:var(--b${n});color:var(--bi${n})`, title: `${label}: ${pct(v)}` }, v > 0.08 ? `${label} ${pct(v, 0)}` : "")));
}

function curveBar() {
  const bar = $("curve-bar");
  const again = () => { toolUse(); curves(); };
  if (RUNS.length > 1) {
    for (const [i, run] of RUNS.entries()) {
      if (run.stage === "eval" && !accuracyNames(run).some((n) => run.series[n][0].length > 1)) continue;
      const b = h("button", { class: "toggle", "aria-pressed": "true" }, dot(i), run.name);
      b.addEventListener("click", () => { if (shown.has(i)) shown.delete(i); else shown.add(i); b.setAttribute("aria-pressed", String(shown.has(i))); again(); });
      bar.append(b);
    }
    const mode = h("select", { "aria-label": "how runs share a chart", onchange: (e) => { inSequence = e.target.value === "1"; again(); } },
      h("option", { value: 1, selected: inSequence }, "one after the other"), h("option", { value: 0, selected: !inSequence }, "on top of each other"));
    bar.append(mode);
  }
  const pick = h("select", { onchange: (e) => { smooth = Number(e.target.value); curves(); } },
    h("option", { value: 0 }, "none"), h("option", { value: 0.6 }, "light"), h("option", { value: 0.9 }, "strong"));
  bar.append(h("label", {}, "Smoothing ", pick));
}

function configs() {
  for (const [i, run] of RUNS.entries()) {
    const before = i ? RUNS[i - 1].config : null;
    const keys = Object.keys(run.config);
    const changed = (k) => before && k in before && JSON.stringify(before[k]) !== JSON.stringify(run.config[k]);
    $("configs").append(h("details", { class: "config" },
      h("summary", {}, RUNS.length > 1 && dot(i), h("b", {}, run.name), h("span", { class: "soft" }, [run.run_id, run.config_hash && `config ${run.config_hash}`, before && `${keys.filter(changed).length} values differ from ${RUNS[i - 1].name}`].filter(Boolean).join(" · "))),
      h("div", { class: "configs" }, keys.map((k) => h("div", { class: changed(k) ? "changed" : "" }, h("span", {}, k), ` ${JSON.stringify(run.config[k])}`)))));
  }
}
