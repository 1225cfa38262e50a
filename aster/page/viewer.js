// One trajectory: its turns to read, or its tokens, coloured by who wrote them, how likely they were, or which policy.
const KEYWORDS = /^(?:False|None|True|and|as|assert|async|await|break|class|continue|def|del|elif|else|except|finally|for|from|global|if|import|in|is|lambda|nonlocal|not|or|pass|raise|return|try|while|with|yield)$/;
const TOKEN = /(#[^\n]*)|("""[\s\S]*?"""|'''[\s\S]*?'''|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*')|(\b\d[\w.]*)|([A-Za-z_]\w*)/g;
function python(code) {
  const out = [];
  let at = 0;
  for (const m of code.matchAll(TOKEN)) {
    const cls = m[1] ? "c" : m[2] ? "s" : m[3] ? "n" : KEYWORDS.test(m[0]) ? "k" : null;
    if (!cls) continue;
    out.push(code.slice(at, m.index), h("span", { class: cls }, m[0]));
    at = m.index + m[0].length;
  }
  return [...out, code.slice(at)];
}
function marked(text) {
  const low = text.toLowerCase();
  if (!hits || !low.includes(hits) || low.length !== text.length) return [text];
  const out = [];
  let at = 0;
  for (let i = low.indexOf(hits); i >= 0; i = low.indexOf(hits, at)) {
    out.push(text.slice(at, i), h("mark", {}, text.slice(i, i + hits.length)));
    at = i + hits.length;
  }
  return [...out, text.slice(at)];
}
function part(kind, label, text, { extra = "", fold = 26, failed = false } = {}) {
  const pre = h("pre", {}, kind === "code" && !hits ? python(text) : marked(text));
  const box = h("div", { class: `part ${kind}${failed ? " failed" : ""}` }, h("div", { class: "tag" }, h("span", {}, label), h("span", {}, extra)), pre);
  if (text.split("\n").length > fold || text.length > fold * 110) {
    pre.classList.add("long");
    box.append(h("button", { class: "quiet more", onclick: (e) => { pre.classList.remove("long"); e.target.remove(); } }, "Show all"));
  }
  return box;
}
const seconds = (s) => (s === undefined || s === null ? "" : s < 10 ? `${s.toFixed(2)} s` : `${s.toFixed(0)} s`);

// tokens --------------------------------------------------------------------------------------------------------------
const MODES = [["read", "Read"], ["mask", "Who wrote it"], ["lp", "Surprise"], ["r", "Learner against engine"], ["v", "Policy version"]];
let mode = "read";
const SURPRISE = 4, RATIO = 0.2; // nats at which the colour is full

function tokenPaint(tk, kind) {
  const first = tk.v.length ? Math.min(...tk.v.map(([v]) => v)) : 0;
  const versions = tk.v.flatMap(([v, n]) => Array(n).fill(v));
  const tint = (ink, share) => `background:color-mix(in srgb, var(${ink}) ${Math.round(100 * Math.min(1, share))}%, transparent)`;
  return (m) => {
    if (kind === "mask") return "background:var(--model-bg)";
    if (kind === "lp") return tint("--r1", 0.85 * tk.lp[m] * DATA.units.lp / SURPRISE);
    if (kind === "r") { const x = tk.r[m] * DATA.units.r; return tint(x < 0 ? "--r1" : "--r0", 0.85 * Math.abs(x) / RATIO); }
    return tint(`--r${(versions[m] - first) % 8}`, 0.28);
  };
}

function legend(tk, kind) {
  const box = (style, label) => h("span", {}, h("i", { style }), label);
  const obs = box("background:var(--obs-bg)", "observation and template: no loss");
  if (kind === "mask") return [box("background:var(--model-bg)", "sampled by the model: trained on"), obs];
  if (kind === "lp") return [h("span", {}, "certain ", h("i", { class: "ramp", style: "background:linear-gradient(90deg, transparent, color-mix(in srgb, var(--r1) 85%, transparent))" }), ` p ≤ ${Math.exp(-SURPRISE).toFixed(2)}`), h("span", {}, "−log p of the sampled token under the policy that sampled it"), obs];
  if (kind === "r") return [h("span", {}, "learner finds it less likely ", h("i", { class: "ramp", style: "background:linear-gradient(90deg, var(--r1), transparent, var(--r0))" }), " more likely"), h("span", {}, `log ratio, full colour at ${RATIO} nats`), obs];
  const seen = [...new Set(tk.v.map(([v]) => v))], first = Math.min(...seen);
  return [...seen.map((v) => box(`background:color-mix(in srgb, var(--r${(v - first) % 8}) 28%, transparent)`, `version ${v}`)), obs];
}

function tokens(tk, kind) {
  const pre = h("pre", { class: "tokens", tabindex: 0, "aria-label": "the response, token by token" });
  const paint = tokenPaint(tk, kind), index = [];
  let at = 0, token = 0, sampled = 0, mine = true;
  for (const run of tk.m) {
    const group = h("span", { class: mine ? "mine" : "theirs" });
    for (let i = 0; i < run; i++, token++) {
      const text = tk.text.slice(at, at + tk.n[token]);
      at += tk.n[token];
      if (mine) { if (text) group.append(h("span", { "data-t": sampled, style: paint(sampled) }, text.replace(/^\n+$/, (s) => "↵".repeat(s.length) + s))); index.push(text); sampled++; }
      else if (text) group.append(text);
    }
    if (run) pre.append(group);
    mine = !mine;
  }
  const versions = tk.v.flatMap(([v, n]) => Array(n).fill(v));
  pre.addEventListener("pointermove", (e) => {
    const m = e.target.dataset?.t;
    if (m === undefined) return untip();
    const nats = tk.lp[m] * DATA.units.lp;
    tip(e, [h("b", {}, JSON.stringify(index[m])), h("div", {}, `p = ${nats === 0 ? "over 0.97" : Math.exp(-nats).toPrecision(2)}, −log p = ${nats.toFixed(2)}`), tk.r && h("div", {}, `learner − engine ${minus((tk.r[m] * DATA.units.r).toFixed(2))} nats`), h("div", {}, `policy version ${versions[m]}`)].filter(Boolean));
  });
  pre.addEventListener("pointerleave", untip);
  return [h("div", { class: "key legend" }, legend(tk, kind)), pre, tk.cut && h("p", { class: "muted" }, `${whole(tk.cut)} further tokens are not in this page; --max-chars takes more.`)];
}

function modeBar(d, again) {
  if (!d.tk) return h("p", { class: "muted small" }, d.no_tk ? `Tokens cannot be shown: ${d.no_tk}.` : "Tokens are not in the files of this trajectory.");
  return h("div", { class: "modes", role: "group", "aria-label": "how to show it" }, MODES.filter(([m]) => m !== "r" || d.tk.r).map(([m, label], n) => h("button", { "data-mode": m, "aria-pressed": String(mode === m), title: `key ${n + 1}`, onclick: () => { mode = m; again(); } }, label)));
}

// one trajectory ------------------------------------------------------------------------------------------------------
const tick = (x) => (x === undefined || x === null ? "–" : x ? "✓" : "✗");
function openRow(row) {
  let i = found.indexOf(row);
  if (i < 0) { found = [row, ...found]; i = 0; }
  return open(i);
}

function turnsOf(d) {
  return d.turns.map((t, n) => {
    const failed = t.outcome && t.outcome !== "success", final = n === d.turns.length - 1 && !t.code;
    return h("section", { class: `turn${failed ? " failed" : ""}${final ? " final" : ""}`, tabindex: -1, "data-turn": n, "aria-label": final ? "final turn" : `turn ${n + 1}` },
      h("header", {}, h("b", {}, final ? "Final turn" : `Turn ${n + 1}`), t.tok !== undefined && h("span", {}, `${whole(t.tok)} tokens`), h("span", {}, seconds(t.s)), t.end === "length" && h("span", { class: "badge warn" }, "cut by length"), t.lost && h("span", { class: "badge warn" }, "session state lost")),
      t.think && part("think", "thinking", t.think), t.text && part("text", final ? "answer" : "text", t.text),
      t.code && part("code", t.tool || "python", t.code, { extra: `${t.code.split("\n").length} line${t.code.includes("\n") ? "s" : ""}` }), (t.more || []).map((c) => part("code", "further call", c)),
      t.obs !== undefined && part("obs", "observation", t.obs || "(no output)", { failed, fold: 18, extra: [failed ? said(t.outcome) : t.status, seconds(t.call_s)].filter(Boolean).join(" · ") }));
  });
}

function meter(d, v) {
  const busy = d.turns.reduce((a, t) => a + (t.s || 0) + (t.call_s || 0), 0);
  if (!(busy > 0)) return null;
  const jump = (n) => { const el = v.querySelector(`[data-turn="${n}"]`); if (el) { el.scrollIntoView({ block: "start" }); el.focus({ preventScroll: true }); } };
  return h("div", { class: "when" }, h("div", { class: "meter", title: "in order: generating, in a tool" }, d.turns.flatMap((t, n) => [
    h("i", { class: "gen", style: `flex:${Math.max(0.002, (t.s || 0) / busy)}`, title: `turn ${n + 1}, generating ${seconds(t.s)}`, onclick: () => jump(n) }),
    t.call_s ? h("i", { class: "tool", style: `flex:${Math.max(0.002, t.call_s / busy)}`, title: `turn ${n + 1}, in a tool ${seconds(t.call_s)}`, onclick: () => jump(n) }) : null])),
    h("p", { class: "key" }, h("span", {}, h("i", { style: "background:var(--r0)" }), `generating ${seconds(d.generate_s)}`), h("span", {}, h("i", { style: "background:var(--r1)" }), `in a tool ${seconds(d.tool_s)}${d.queue_s > 0.005 ? `, queueing ${seconds(d.queue_s)}` : ""}`)));
}

async function open(at) {
  const row = found[at], d = await details(row), v = $("viewer"), [word, cls] = verdict(row);
  const family = ROWS.filter((r) => r.kind === row.kind && (r.run === row.run ? r.step === row.step : r.kind === "val") && r.id && r.id === row.id).slice(0, 128);
  const move = (to) => { if (to >= 0 && to < found.length) open(to); };
  const name = RUNS[row.run].stage === "eval" ? "evaluation" : `${row.kind === "val" ? "validation at" : "training"} step ${row.step}`;
  const version = d.policy_version === undefined ? "–" : d.policy_version_oldest !== d.policy_version ? `${d.policy_version_oldest} to ${d.policy_version}` : d.policy_version;
  const facts = [["answer", row.pred || "–"], ["truth", row.gt || "–"], ["ended by", said(row.cause) || "–"], ["reward", d.reward ?? d.score ?? "–"],
    ["strict verdict", tick(d.acc_strict)], ["math-verify", tick(d.acc_math_verify)],
    ["response", finite(row.tok) ? `${whole(row.tok)} tokens${d.model_tokens === undefined ? "" : `, ${whole(d.model_tokens)} sampled`}` : "–"], ["calls", row.calls ?? "–"], ["policy version", version], ["engine", d.engine || "–"]];
  const view = h("div", {});
  const draw = () => {
    const kind = d.tk && mode !== "read" && (mode !== "r" || d.tk.r) ? mode : "read";
    view.replaceChildren(...[modeBar(d, draw), kind === "read" ? [part("prompt", "prompt", d.input, { fold: 12 }), turnsOf(d)] : tokens(d.tk, kind)].flat(2).filter(Boolean));
    for (const b of view.querySelectorAll("[data-mode]")) b.setAttribute("aria-pressed", String(b.dataset.mode === kind));
    // What had the focus may be gone; keys go on working only inside the dialog.
    if (v.open && !v.contains(document.activeElement)) v.querySelector(".view-body").focus({ preventScroll: true });
  };
  draw();
  const sibling = (r, i) => h("button", { class: verdict(r)[1], "aria-current": r === row ? "true" : null, title: `${RUNS[r.run].name}, sample ${r.n ?? i}: ${verdict(r)[0]}, ${r.calls} calls`, onclick: () => openRow(r) }, `${verdict(r)[2]} ${r.n ?? i}`);
  const families = [...new Set(family.map((r) => r.run))].map((run) => h("span", { class: "siblings" }, familyName(run, row.run), family.filter((r) => r.run === run).map(sibling)));
  v.replaceChildren(
    h("header", { class: "view-head" },
      h("div", { class: "bar" }, h("span", { class: `badge ${cls}` }, `${verdict(row)[2]} ${word}`), h("strong", { id: "viewer-title" }, `${RUNS[row.run].name}, ${name}`), h("span", { class: "soft grow" }, row.src),
        h("span", { class: "soft num" }, `${whole(at + 1)} of ${whole(found.length)}`),
        h("span", { class: "moves" }, h("button", { class: "step", disabled: at === 0, "aria-label": "previous trajectory", onclick: () => move(at - 1) }, "←"), h("button", { class: "step", disabled: at >= found.length - 1, "aria-label": "next trajectory", onclick: () => move(at + 1) }, "→"), h("button", { class: "step", "aria-label": "close", onclick: () => v.close() }, "✕"))),
      family.length > 1 && h("div", { class: "bar family" }, h("span", { class: "soft" }, "same problem"), families)),
    h("div", { class: "view-body", tabindex: -1 },
      d.error && h("p", { class: "notice bad" }, h("b", {}, row.rep ? "Lost by our infrastructure and run again. " : "Lost by our infrastructure, not by the model; it has no reward. "), d.error),
      row.split && h("p", { class: "notice" }, "The two verifiers disagree on this answer."),
      h("dl", { class: "facts" }, facts.map(([k, x]) => h("div", {}, h("dt", {}, k), h("dd", {}, String(x))))),
      meter(d, v), view,
      h("p", { class: "muted small" }, [row.id && `row ${row.id}`, d.uid].filter(Boolean).join(" · "))),
    h("footer", { class: "view-foot" }, h("kbd", {}, "←"), h("kbd", {}, "→"), " trajectories ", h("kbd", {}, "j"), h("kbd", {}, "k"), " turns ", d.tk && [h("kbd", {}, "1"), "–", h("kbd", {}, String(d.tk.r ? 5 : 4)), " colours "], h("kbd", {}, "Esc"), " close"));
  v.onkeydown = (e) => {
    if (e.ctrlKey || e.metaKey || e.altKey) return;
    const modes = MODES.filter(([m]) => m === "read" || (d.tk && (m !== "r" || d.tk.r)));
    if (e.key === "ArrowLeft") move(at - 1);
    else if (e.key === "ArrowRight") move(at + 1);
    else if (modes[Number(e.key) - 1]) { mode = modes[Number(e.key) - 1][0]; draw(); }
    else if (e.key === "j" || e.key === "k") {
      const turns = [...v.querySelectorAll(".turn")], here = turns.indexOf(document.activeElement?.closest(".turn"));
      const to = turns[Math.max(0, Math.min(turns.length - 1, here + (e.key === "j" ? 1 : -1)))];
      if (to) { to.focus({ preventScroll: true }); to.scrollIntoView({ block: "start" }); }
    }
  };
  untip();
  if (!v.open) v.showModal();
  v.querySelector(".view-body").focus({ preventScroll: true });
  v.scrollTop = 0;
}
const familyName = (run, mine) => (RUNS.length > 1 ? h("small", { class: run === mine ? "" : "soft" }, dot(run), RUNS[run].name) : null);
$("viewer").addEventListener("click", (e) => { if (e.target === $("viewer")) $("viewer").close(); });
