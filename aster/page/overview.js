// The head of the page: how fresh it is, the alarm, the numbers of each run, accuracies.
function ends(run, name) {
  const values = points(run, name).map((p) => p.y);
  return values.length ? [values[0], values[values.length - 1]] : null;
}

function sparkline(run, name, paint, { low = null, high = null, width = 108, height = 26 } = {}) {
  const p = points(run, name);
  if (p.length < 2) return h("span", { class: "nospark" });
  const ys = p.map((q) => q.y);
  const a = Math.min(...ys, low ?? Infinity), b = Math.max(...ys, high ?? -Infinity);
  const x0 = p[0].step, x1 = p[p.length - 1].step;
  const X = (s) => 2 + (width - 6) * (s - x0) / (x1 - x0 || 1), Y = (y) => 3 + (height - 6) * (b === a ? 0.5 : 1 - (y - a) / (b - a));
  const last = p[p.length - 1];
  return h("svg", { class: "spark", width, height, viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" },
    h("path", { d: p.map((q, n) => `${n ? "L" : "M"}${X(q.step).toFixed(1)} ${Y(q.y).toFixed(1)}`).join(""), style: `stroke:${paint}` }),
    h("circle", { cx: X(last.step), cy: Y(last.y), r: 2.4, style: `fill:${paint}` }));
}

// What is worth a number: [label, series, how to write it, vertical range]. The first that fits of a list is taken.
function vital(run) {
  const out = [];
  const add = (label, name, form, range = {}) => { const e = name && ends(run, name); if (e) out.push({ label, name, form, range, first: e[0], last: e[1] }); };
  const unit = { low: 0, high: 1 };
  add("loss", run.series["train/loss"] ? "train/loss" : null, (x) => x.toFixed(3), { low: 0 });
  add("validation loss", "val/loss", (x) => x.toFixed(3), { low: 0 });
  add("tool format", "val/tool_format_accuracy", (x) => pct(x), unit);
  add("training reward", "critic/score/mean", (x) => x.toFixed(3), unit);
  for (const name of accuracyNames(run)) add(`${sourceOf(name)} ${name.split("/").pop().replace("mean", "avg")}`, name, (x) => pct(x), unit);
  const aux = run.series["collapse/calls_mean"] ? "collapse/" : (matching(run, "val-aux/*/collapse/calls_mean")[0] || "").replace("calls_mean", "");
  if (aux) add("calls per trajectory", `${aux}calls_mean`, (x) => x.toFixed(2), { low: 0 });
  if (aux) add("at most one call", `${aux}ratio`, (x) => pct(x, 0), unit);
  add("entropy", "actor/entropy", (x) => x.toFixed(3), { low: 0 });
  add("engine–learner KL", "training/mismatch_k3", short, { low: 0 });
  add("throughput", "perf/throughput", (x) => `${short(x)} tok/s`, { low: 0 });
  return out;
}

function freshness() {
  const el = $("live");
  const newest = Math.max(...RUNS.map((r) => r.ended));
  if (!DATA.every) { el.remove(); return; }
  const label = h("span", {}), button = h("button", { class: "quiet" }, "Pause");
  let paused = false, due = Date.now() + 1000 * DATA.every;
  try { paused = sessionStorage.getItem("aster-paused") === "1"; } catch { /* storage is off */ }
  const state = () => { button.textContent = paused ? "Go on" : "Pause"; el.classList.toggle("paused", paused); };
  button.addEventListener("click", () => { paused = !paused; due = Date.now() + 1000 * DATA.every; try { sessionStorage.setItem("aster-paused", paused ? "1" : "0"); } catch { /* storage is off */ } state(); });
  const ago = (unix) => { const s = Math.max(1, Math.round(Date.now() / 1000 - unix)); return `${s < 90 ? `${s} s` : span(s)} ago`; };
  const tick = () => {
    const busy = $("viewer").open || document.activeElement?.type === "search";
    label.textContent = `Live. Newest line ${newest ? ago(newest) : "not yet"}; this page was written ${ago(DATA.made)}. ` +
      (paused ? "Not reloading." : busy ? "Reloads when you are done reading." : `Reloads in ${Math.max(0, Math.ceil((due - Date.now()) / 1000))} s.`);
    if (!paused && !busy && Date.now() > due) { due = Infinity; location.reload(); }
  };
  el.hidden = false;
  el.append(h("i", { class: "pulse" }), label, button);
  state(); tick(); setInterval(tick, 1000);
}

function overview() {
  $("headline").textContent = DATA.title;
  const began = RUNS.map((r) => r.began).filter((x) => x > 0), ended = RUNS.map((r) => r.ended).filter((x) => x > 0);
  const about = RUNS.length === 1 ? RUNS[0] : null;
  const facts = [];
  if (about?.description) facts.push(about.description);
  if (about?.steps) facts.push(about.planned >= about.steps ? `step ${about.steps} of ${about.planned}` : `${about.steps} steps`);
  if (began.length) facts.push(`${span(Math.max(...ended) - Math.min(...began))} from first to last line`);
  facts.push(`${whole(DATA.trajectories_total)} trajectories on disk`, `page written ${clock(DATA.made).slice(0, 16)} UTC`);
  $("lede").textContent = facts.join(" · ");
  for (const [i, run] of RUNS.entries()) banner(run, i);
  if (DATA.notes.length) $("alarms").append(h("details", { class: "notice plain" }, h("summary", {}, `${DATA.notes.length} thing${DATA.notes.length > 1 ? "s" : ""} could not be read`), DATA.notes.slice(0, 50).map((n) => h("p", {}, n))));
  if (RUNS.length === 1) $("vitals").append(tiles(RUNS[0])); else $("vitals").append(runTable());
}

function banner(run, i) {
  const spans = alarms(run), events = run.events.filter((e) => e.kind === "collapse");
  const others = run.events.filter((e) => !e.kind.startsWith("collapse"));
  const who = RUNS.length > 1 ? [dot(i), h("span", {}, run.name)] : [];
  if (events.length || spans.length) {
    const now = !spans.length || isOn(run);
    const when = spans.length ? spansOf(spans) : `step ${events[0].step}`;
    $("alarms").append(h("div", { class: `alarm${now ? "" : " over"}`, role: now ? "alert" : "status" },
      h("div", { class: "alarm-mark", "aria-hidden": "true" }, now ? "!" : "✓"),
      h("div", {}, h("strong", {}, who, now ? "Interaction collapse" : "Interaction collapse, over"), h("span", { class: "when" }, when),
        events.slice(-2).map((e) => h("p", {}, `Step ${e.step}: ${e.message.replace(/^interaction collapse: /, "")}`)),
        h("a", { href: "#tooluse" }, "See how the calls went"))));
  }
  for (const e of others.slice(-6)) $("alarms").append(h("p", { class: "notice plain" }, who, h("b", {}, `${said(e.kind)}, step ${e.step}. `), e.message));
  if (others.length > 6) $("alarms").append(h("p", { class: "muted" }, `and ${others.length - 6} earlier events of ${run.name}`));
}

const isOn = (run) => { const p = points(run, "collapse/alarm"); return p.length > 0 && p[p.length - 1].y > 0; };
const spansOf = (spans) => {
  const words = spans.map(([a, b]) => (a === b ? `step ${a}` : `steps ${a} to ${b}`));
  return words.length < 3 ? words.join(", ") : `${words.length} times, last ${words[words.length - 1]}`;
};
function alarmWord(run) {
  if (!run.series["collapse/alarm"]) return null;
  const spans = alarms(run);
  if (!spans.length) return h("span", { class: "badge good" }, "✓ silent");
  return isOn(run) ? h("span", { class: "badge bad" }, `! since step ${spans[spans.length - 1][0]}`) : h("span", { class: "badge" }, `✓ over: ${spansOf(spans)}`);
}

function tiles(run) {
  const list = vital(run).slice(0, 8);
  return h("div", { class: "tiles" }, list.map((v) => h("div", { class: "tile" }, h("div", { class: "label" }, v.label),
    h("div", { class: "value" }, v.form(v.last)), h("div", { class: "was" }, v.first === v.last ? "" : `from ${v.form(v.first)}`), sparkline(run, v.name, "var(--accent)", v.range))),
    run.series["collapse/alarm"] && h("div", { class: "tile" }, h("div", { class: "label" }, "collapse alarm"), ...alarmTile(run)));
}

function alarmTile(run) {
  const spans = alarms(run), on = isOn(run), last = spans[spans.length - 1];
  const word = on ? "on" : spans.length ? "over" : "silent";
  const when = on ? `since step ${last[0]}` : spans.length ? `was on: ${spansOf(spans)}` : `${points(run, "collapse/alarm").length} steps watched`;
  return [h("div", { class: "value", style: on ? "color:var(--bad)" : spans.length ? "" : "color:var(--good)" }, `${on ? "!" : "✓"} ${word}`), h("div", { class: "was" }, when)];
}

// Runs under each other, the same number in the same column; columns that no run has are left out.
function runTable() {
  // in the order of `vital`, whoever has them; what only concerns one run at a time is left to the curves
  const order = ["loss", "validation loss", "tool format", "training reward"], late = ["calls per trajectory", "at most one call"];
  const all = [...new Set(RUNS.flatMap((r) => vital(r).map((v) => v.label)))];
  if (!all.includes("loss")) late.push("entropy");
  const columns = [...order.filter((c) => all.includes(c)), ...all.filter((c) => c.includes("avg@")), ...late.filter((c) => all.includes(c))];
  const cell = (run, i, label) => {
    const v = vital(run).find((x) => x.label === label);
    if (!v) return h("td", { class: "none" });
    return h("td", {}, h("div", { class: "pair" }, h("div", {}, h("b", {}, v.form(v.last)), v.first !== v.last && h("small", {}, `from ${v.form(v.first)}`)), sparkline(run, v.name, color(i), { ...v.range, width: 64, height: 24 })));
  };
  const anyAlarm = RUNS.some((r) => r.series["collapse/alarm"]);
  return h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "numbers of every run" }, h("table", { class: "runs" },
    h("thead", {}, h("tr", {}, h("th", {}, "run"), anyAlarm && h("th", {}, "collapse alarm"), columns.map((c) => h("th", {}, c)))),
    h("tbody", {}, RUNS.map((run, i) => h("tr", {},
      h("th", { scope: "row", title: run.path }, h("div", { class: "who" }, dot(i), h("span", {}, run.name)), h("small", {}, [{ rl: "GRPO", sft: "supervised", eval: "evaluation" }[run.stage] || run.stage, run.stage !== "eval" && `${whole(run.steps)} steps`, span(run.ended - run.began || points(run, "timing_s/testing")[0]?.y)].filter(Boolean).join(", "))),
      anyAlarm && h("td", {}, alarmWord(run)),
      columns.map((c) => cell(run, i, c)))))));
}

// accuracy ------------------------------------------------------------------------------------------------------------
function forest() {
  const rows = DATA.accuracy;
  if (!rows.length) { $("accuracy").remove(); document.querySelector('nav a[href="#accuracy"]').remove(); return; }
  const order = new Map(RUNS.map((r, i) => [r.name, i]));
  for (const source of new Set(rows.map((r) => `${r.source} ${r.metric}`))) {
    const mine = rows.filter((r) => `${r.source} ${r.metric}` === source);
    const best = mine.some((r) => finite(r.best));
    const body = mine.map((r) => {
      const x = (v) => 100 * v, run = order.get(r.run), d = r.versus;
      const bar = h("div", { class: "ci", role: "img", "aria-label": r.low === null ? pct(r.mean) : `${pct(r.mean)}, interval ${pct(r.low)} to ${pct(r.high)}` },
        [0, 25, 50, 75, 100].map((v) => h("i", { class: "tick", style: `left:${v}%` })),
        r.low !== null && h("i", { class: "range", style: `left:${x(r.low)}%;width:${x(r.high - r.low)}%;background:${color(run)}` }),
        h("i", { class: "mean", style: `left:${x(r.mean)}%;background:${color(run)}` }));
      return h("tr", {},
        h("th", { scope: "row" }, h("div", { class: "who" }, dot(run), h("span", {}, r.run), RUNS[run].stage !== "eval" && h("small", {}, `step ${r.step}`))),
        h("td", { class: "bars" }, bar),
        h("td", { class: "r" }, h("b", {}, pct(r.mean))),
        h("td", { class: "r soft" }, r.low === null ? "–" : `${(100 * r.low).toFixed(1)} to ${(100 * r.high).toFixed(1)}`),
        best && h("td", { class: "r" }, finite(r.best) ? `${pct(r.best)} / ${finite(r.majority) ? pct(r.majority) : "–"}` : "–"),
        h("td", { class: "r" }, d ? h("span", { title: `against ${d.run}, step ${d.step}, on ${d.problems} problems` }, h("b", {}, signed(d.mean)), h("span", { class: "soft" }, ` (${signed(d.low)} to ${signed(d.high)})`)) : h("span", { class: "soft" }, "–")),
        h("td", { class: "r soft" }, d ? (d.p < 0.001 ? "< 0.001" : d.p.toFixed(3)) : ""));
    });
    const n = source.split("@")[1];
    $("forest").append(h("h3", {}, source.replace("mean@", "avg@")), h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": `accuracy on ${source}` }, h("table", { class: "forest" },
      h("thead", {}, h("tr", {}, h("th", {}, "run"), h("th", { class: "scale" }, h("span", {}, "0"), h("span", {}, "50"), h("span", {}, "100 %")), h("th", { class: "r" }, "accuracy"), h("th", { class: "r" }, "95 % interval"), best && h("th", { class: "r" }, `pass@${n} / maj@${n}`), h("th", { class: "r" }, "points against the first, paired"), h("th", { class: "r" }, "p"))),
      h("tbody", {}, body))));
  }
}
