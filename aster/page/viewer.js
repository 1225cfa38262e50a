// The table of trajectories and the view of one. Texts are unpacked chunk by chunk, only when they are needed.
async function unpack(id) {
  const raw = Uint8Array.from(atob($(id).textContent), (c) => c.charCodeAt(0));
  return JSON.parse(await new Response(new Blob([raw]).stream().pipeThrough(new DecompressionStream("gzip"))).text());
}
const chunks = new Map();
async function details(row) {
  if (!chunks.has(row.c)) {
    if (chunks.size > 60) chunks.delete(chunks.keys().next().value);
    chunks.set(row.c, unpack(`chunk-${row.c}`));
  }
  return (await chunks.get(row.c))[row.i];
}

let ROWS = [], found = [], page = 0, sortBy = null, sortDown = false, hits = null, searchRun = 0;
const PAGE = 50;
const filter = { run: "", kind: "", step: "", src: "", ok: "", cause: "", text: "", deep: false };
const verdict = (row) => (row.ok === null ? ["lost", "warn", "–"] : row.ok ? ["right", "good", "✓"] : ["wrong", "bad", "✗"]);

function select(label, key, values, show = (v) => v) {
  const el = h("select", { "aria-label": label, onchange: (e) => { filter[key] = e.target.value; if (key === "run" || key === "kind") steps(); refresh(); } },
    h("option", { value: "" }, label), values.map((v) => h("option", { value: String(v) }, String(show(v)))));
  el.id = `filter-${key}`;
  return el;
}
const distinct = (key) => [...new Set(ROWS.map((r) => r[key]))].sort((a, b) => (typeof a === "number" ? a - b : String(a).localeCompare(String(b))));

function steps() {
  const kept = ROWS.filter((r) => (filter.run === "" || r.run === Number(filter.run)) && (filter.kind === "" || r.kind === filter.kind));
  const values = [...new Set(kept.map((r) => r.step))].sort((a, b) => a - b);
  if (!values.includes(Number(filter.step))) filter.step = "";
  const el = $("filter-step");
  el.replaceChildren(h("option", { value: "" }, "every step"), ...values.map((v) => h("option", { value: v, selected: String(v) === filter.step }, `step ${v}`)));
}

function filterBar() {
  const bar = $("filters");
  let timer = null;
  const search = h("input", { type: "search", class: "grow", placeholder: "Search problem, answer, row id …", "aria-label": "search",
    oninput: (e) => { filter.text = e.target.value.trim().toLowerCase(); clearTimeout(timer); timer = setTimeout(refresh, 180); } });
  if (DATA.runs.length > 1) bar.append(select("every run", "run", distinct("run"), (v) => DATA.runs[v].name));
  bar.append(select("training and validation", "kind", distinct("kind"), (v) => (v === "val" ? "validation" : "training")));
  bar.append(h("select", { id: "filter-step", "aria-label": "step", onchange: (e) => { filter.step = e.target.value; refresh(); } }));
  if (distinct("src").length > 1) bar.append(select("every source", "src", distinct("src")));
  bar.append(select("right or wrong", "ok", ["1", "0", "null"], (v) => ({ 1: "right", 0: "wrong", null: "lost by us" })[v]));
  bar.append(select("every ending", "cause", distinct("cause").filter(Boolean), (v) => v.replaceAll("_", " ")));
  bar.append(search, h("label", {}, h("input", { type: "checkbox", onchange: (e) => { filter.deep = e.target.checked; refresh(); } }), "also in the texts"));
  steps();
}

async function refresh() {
  const mine = ++searchRun;
  const f = filter;
  const text = f.text;
  let kept = ROWS.filter((r) => (f.run === "" || r.run === Number(f.run)) && (f.kind === "" || r.kind === f.kind) && (f.step === "" || r.step === Number(f.step)) &&
    (f.src === "" || r.src === f.src) && (f.ok === "" || String(r.ok) === f.ok) && (f.cause === "" || r.cause === f.cause));
  hits = null;
  if (text) {
    const shallow = (r) => `${r.q} ${r.pred} ${r.gt} ${r.id}`.toLowerCase().includes(text);
    if (f.deep) {
      const inside = new Set();
      const wanted = [...new Set(kept.map((r) => r.c))];
      for (const [n, c] of wanted.entries()) {
        if (mine !== searchRun) return;
        if (n % 5 === 0) $("pager").textContent = `Searching the texts … ${Math.round(100 * n / wanted.length)} %`;
        const block = await (chunks.get(c) || unpack(`chunk-${c}`));
        for (const [i, d] of block.entries()) if (JSON.stringify(d).toLowerCase().includes(JSON.stringify(text).slice(1, -1))) inside.add(`${c}/${i}`);
      }
      kept = kept.filter((r) => shallow(r) || inside.has(`${r.c}/${r.i}`));
      hits = text;
    } else kept = kept.filter(shallow);
  }
  if (mine !== searchRun) return;
  if (sortBy) kept = kept.slice().sort((a, b) => (a[sortBy] === b[sortBy] ? 0 : a[sortBy] === null || (a[sortBy] < b[sortBy]) ? -1 : 1) * (sortDown ? -1 : 1));
  found = kept;
  page = 0;
  table();
}

const COLUMNS = [["run", "run"], ["step", "step", "r"], ["kind", "kind"], ["src", "source"], ["ok", "result"], ["q", "problem"], ["pred", "answer"], ["gt", "truth"], ["cause", "ended by"], ["calls", "calls", "r"], ["tok", "tokens", "r"], ["s", "seconds", "r"]];
function table() {
  const columns = COLUMNS.filter(([key]) => (key !== "run" || DATA.runs.length > 1) && (key !== "src" || distinct("src").length > 1));
  const cell = (r, [key, , cls]) => {
    if (key === "run") return h("td", {}, h("span", { class: "dot", style: `background:${color(r.run)};margin-right:7px` }), DATA.runs[r.run].name);
    if (key === "kind") return h("td", {}, r.kind === "val" ? "validation" : "training");
    if (key === "ok") return h("td", {}, h("span", { class: `badge ${verdict(r)[1]}` }, verdict(r)[0]));
    if (key === "q") return h("td", { class: "q" }, h("div", {}, r.q));
    if (key === "cause") return h("td", {}, r.cause.replaceAll("_", " "));
    if (key === "pred" || key === "gt") return h("td", {}, h("div", { class: "clip", title: r[key] }, r[key] || "–"));
    return h("td", { class: cls || "" }, r[key] === null || r[key] === undefined ? "–" : typeof r[key] === "number" ? r[key].toLocaleString("en") : r[key]);
  };
  const from = page * PAGE;
  $("table").replaceChildren(
    h("thead", {}, h("tr", {}, columns.map(([key, label, cls]) => h("th", { class: cls || "", "data-sort": key, onclick: () => { sortDown = sortBy === key ? !sortDown : ["calls", "tok", "s", "ok"].includes(key); sortBy = key; refresh(); } }, label, sortBy === key ? (sortDown ? " ↓" : " ↑") : "")))),
    h("tbody", {}, found.slice(from, from + PAGE).map((r, n) => h("tr", { tabindex: 0, onclick: () => open(from + n), onkeydown: (e) => { if (e.key === "Enter") open(from + n); } }, columns.map((c) => cell(r, c))))));
  if (!found.length) $("table").append(h("caption", { class: "empty" }, ROWS.length ? "No trajectory fits these filters." : "These runs wrote no rollouts."));
  const last = Math.max(0, Math.ceil(found.length / PAGE) - 1);
  const go = (to) => () => { page = Math.max(0, Math.min(last, to)); table(); };
  const right = found.filter((r) => r.ok === 1).length, judged = found.filter((r) => r.ok !== null).length;
  $("pager").replaceChildren(
    h("span", { class: "num" }, found.length ? `${(from + 1).toLocaleString("en")}–${Math.min(from + PAGE, found.length).toLocaleString("en")} of ${found.length.toLocaleString("en")}` : "", judged ? ` · ${pct(right / judged)} right` : ""),
    h("span", {}, h("button", { class: "step", disabled: page === 0, onclick: go(0) }, "«"), " ", h("button", { class: "step", disabled: page === 0, onclick: go(page - 1) }, "‹ back"), ` page ${page + 1} of ${last + 1} `, h("button", { class: "step", disabled: page === last, onclick: go(page + 1) }, "next ›"), " ", h("button", { class: "step", disabled: page === last, onclick: go(last) }, "»")));
}

// one trajectory ------------------------------------------------------------------------------------------------------
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
  if (!hits || !text.toLowerCase().includes(hits)) return [text];
  const out = [];
  let at = 0;
  for (let i = text.toLowerCase().indexOf(hits); i >= 0; i = text.toLowerCase().indexOf(hits, at)) {
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
    box.append(h("button", { class: "more", onclick: (e) => { pre.classList.remove("long"); e.target.remove(); } }, "show all"));
  }
  return box;
}
const seconds = (s) => (s === undefined || s === null ? "" : s < 10 ? `${s.toFixed(2)} s` : `${s.toFixed(0)} s`);

async function open(at) {
  const row = found[at];
  const d = await details(row);
  const v = $("viewer");
  const [word, cls] = verdict(row);
  const family = ROWS.filter((r) => r.run === row.run && r.kind === row.kind && r.step === row.step && r.id && r.id === row.id);
  const move = (to) => { if (to >= 0 && to < found.length) open(to); };
  const show = (r) => { const i = found.indexOf(r); if (i < 0) found = [r, ...found]; open(Math.max(i, 0)); };
  const parts = [];
  const busy = d.turns.reduce((a, t) => a + (t.s || 0) + (t.call_s || 0), 0);
  for (const [n, t] of d.turns.entries()) {
    const failed = t.outcome && t.outcome !== "success";
    const final = n === d.turns.length - 1 && !t.code;
    parts.push(h("div", { class: `turn${failed ? " failed" : ""}${final ? " final" : ""}` },
      h("header", {}, h("b", {}, final ? "Final turn" : `Turn ${n + 1}`), t.tok !== undefined && h("span", {}, `${t.tok.toLocaleString("en")} tokens`), h("span", {}, seconds(t.s)), t.end === "length" && h("span", { class: "badge warn" }, "cut by length"), t.lost && h("span", { class: "badge warn" }, "session state lost")),
      t.think && part("think", "thinking", t.think), t.text && part("text", final ? "answer" : "text", t.text),
      t.code && part("code", "python", t.code, { extra: `${t.code.split("\n").length} lines` }), (t.more || []).map((c) => part("code", "python, further call", c)),
      t.obs !== undefined && part("obs", "observation", t.obs || "(no output)", { failed, fold: 18, extra: [t.status, seconds(t.call_s)].filter(Boolean).join(" · ") })));
  }
  const facts = [["answer", row.pred || "–"], ["truth", row.gt || "–"], ["ended by", row.cause.replaceAll("_", " ") || "–"], ["reward", d.reward ?? d.score ?? "–"], ["response", row.tok === null || row.tok === undefined ? "–" : `${row.tok.toLocaleString("en")} tokens, ${(d.model_tokens ?? 0).toLocaleString("en")} by the model`], ["policy version", d.policy_version === undefined ? "–" : d.policy_version_oldest !== d.policy_version ? `${d.policy_version_oldest}–${d.policy_version}` : d.policy_version], ["math_verify / strict", `${d.acc_math_verify ?? "–"} / ${d.acc_strict ?? "–"}`], ["engine", d.engine || "–"]];
  v.replaceChildren(
    h("div", { class: "view-head" },
      h("div", { class: "bar" }, h("span", { class: `badge ${cls}` }, word), h("strong", {}, `${DATA.runs[row.run].name} · ${row.kind === "val" ? "validation" : "training"} step ${row.step}`), h("span", { class: "muted", style: "margin:0;flex:1" }, row.src),
        h("span", { class: "moves" }, h("button", { class: "step", disabled: at === 0, title: "previous (←)", onclick: () => move(at - 1) }, "←"),  " ", h("button", { class: "step", disabled: at >= found.length - 1, title: "next (→)", onclick: () => move(at + 1) }, "→"),  " ", h("button", { class: "step", title: "close (Esc)", onclick: () => v.close() }, "✕"))),
      family.length > 1 && h("div", { class: "bar" }, h("span", { class: "muted", style: "margin:0;font-size:13px" }, "samples of this problem"), h("span", { class: "siblings" }, family.map((r, i) => h("button", { class: verdict(r)[1], "aria-current": r === row, title: `${verdict(r)[0]}, ${r.calls} calls`, onclick: () => show(r) }, `${verdict(r)[2]} ${r.n ?? i}`))))),
    h("div", { class: "view-body", tabindex: -1, autofocus: true },
      d.error && h("p", { class: "notice" }, `Lost by our infrastructure, not by the model: ${d.error}`),
      h("dl", { class: "facts", style: "grid-template-columns:auto 1fr auto 1fr;margin-bottom:12px" }, facts.map(([k, x]) => [h("dt", {}, k), h("dd", { style: "text-align:left;overflow-wrap:anywhere" }, String(x))])),
      busy > 0 && h("div", {}, h("div", { class: "meter", title: "time, in order: generating, in the tool" }, d.turns.flatMap((t) => [h("i", { class: "gen", style: `flex:${(t.s || 0) / busy}` }), t.call_s ? h("i", { class: "tool", style: `flex:${t.call_s / busy}` }) : null])),
        h("p", { class: "muted", style: "font-size:13px" }, h("span", { class: "dot", style: "background:var(--r0);margin-right:5px" }), `generating ${seconds(d.generate_s)}   `, h("span", { class: "dot", style: "background:var(--r1);margin:0 5px 0 10px" }), `in the tool ${seconds(d.tool_s)}`, d.queue_s ? `, queueing ${seconds(d.queue_s)}` : "")),
      part("text", "prompt", d.input, { fold: 14 }), parts,
      h("p", { class: "muted num", style: "font-size:12.5px;overflow-wrap:anywhere" }, [row.id && `row ${row.id}`, d.uid].filter(Boolean).join(" · "))));
  v.onkeydown = (e) => { if (e.key === "ArrowLeft") move(at - 1); if (e.key === "ArrowRight") move(at + 1); };
  if (v.open) v.querySelector(".view-body").focus();
  else v.showModal();
  v.scrollTop = 0;
}
$("viewer").addEventListener("click", (e) => { if (e.target === $("viewer")) $("viewer").close(); });

async function start() {
  ROWS = await unpack("rows");
  found = ROWS;
  $("trajectory-lede").textContent = ROWS.length < DATA.trajectories_total
    ? `${ROWS.length.toLocaleString("en")} of ${DATA.trajectories_total.toLocaleString("en")} are in this page, the first of every step; --max-trajectories takes more.`
    : "Every trajectory of every step. Click one to read it; ← and → walk through the list.";
  filterBar();
  await refresh();
  const wanted = location.hash.match(/^#trajectory-(\d+)$/);
  if (wanted && found[Number(wanted[1])]) await open(Number(wanted[1]));
  document.body.dataset.ready = "true";
}
start();
