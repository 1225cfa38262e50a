// The table of trajectories: filters, order, search, pages. Texts are unpacked only when they are searched or read.
let ROWS = [], found = [], page = 0, sortBy = null, sortDown = false, hits = null, searchRun = 0;
const PAGE = 50;
const filter = { run: "", kind: "", step: "", src: "", ok: "", cause: "", calls: "", length: "", text: "", deep: false };
const verdict = (row) => (row.rep ? ["replaced", "warn", "–"] : row.ok === null ? ["lost", "warn", "–"] : row.ok ? ["right", "good", "✓"] : ["wrong", "bad", "✗"]);
const CALLS = [["0", 0, 0], ["1", 1, 1], ["2–4", 2, 4], ["5–9", 5, 9], ["10–19", 10, 19], ["20+", 20, Infinity]];
const OUTCOMES = { 1: ["right", (r) => r.ok === 1], 0: ["wrong", (r) => r.ok === 0], null: ["lost by us", (r) => r.ok === null], split: ["verifiers disagree", (r) => r.split === 1] };
let lengths = []; // quartiles of the tokens, so that the choices fit the run

const distinct = (key) => [...new Set(ROWS.map((r) => r[key]))].sort((a, b) => (typeof a === "number" ? a - b : String(a).localeCompare(String(b))));
function select(label, key, values, show = (v) => v) {
  return h("select", { id: `filter-${key}`, "aria-label": label, onchange: (e) => { filter[key] = e.target.value; if (key === "run" || key === "kind") steps(); refresh(); } },
    h("option", { value: "" }, label), values.map((v) => h("option", { value: String(v) }, String(show(v)))));
}
function steps() {
  const kept = ROWS.filter((r) => (filter.run === "" || r.run === Number(filter.run)) && (filter.kind === "" || r.kind === filter.kind));
  const values = [...new Set(kept.map((r) => r.step))].sort((a, b) => a - b);
  if (!values.includes(Number(filter.step))) filter.step = "";
  $("filter-step").replaceChildren(h("option", { value: "" }, "every step"), ...values.map((v) => h("option", { value: v, selected: String(v) === filter.step }, `step ${v}`)));
}

function filterBar() {
  const bar = $("filters");
  let timer = null;
  const search = h("input", { type: "search", id: "filter-text", class: "grow", placeholder: "Search problem, answer, row id", "aria-label": "search",
    oninput: (e) => { filter.text = e.target.value.trim().toLowerCase(); clearTimeout(timer); timer = setTimeout(refresh, 180); } });
  const tokens = ROWS.map((r) => r.tok).filter(finite).sort((a, b) => a - b);
  const q = [0.25, 0.5, 0.75].map((f) => tokens[Math.floor(f * (tokens.length - 1))]);
  lengths = tokens.length && q[0] < q[2] ? [[`up to ${whole(q[0])} tokens`, 0, q[0]], [`${whole(q[0] + 1)} to ${whole(q[2])} tokens`, q[0] + 1, q[2]], [`over ${whole(q[2])} tokens`, q[2] + 1, Infinity]] : [];
  if (RUNS.length > 1) bar.append(select("every run", "run", distinct("run"), (v) => RUNS[v].name));
  if (distinct("kind").length > 1) bar.append(select("training and validation", "kind", distinct("kind"), (v) => (v === "val" ? "validation" : "training")));
  bar.append(h("select", { id: "filter-step", "aria-label": "step", onchange: (e) => { filter.step = e.target.value; refresh(); } }));
  if (distinct("src").length > 1) bar.append(select("every source", "src", distinct("src")));
  bar.append(select("right or wrong", "ok", Object.keys(OUTCOMES).sort().reverse(), (v) => OUTCOMES[v][0]));
  bar.append(select("every ending", "cause", distinct("cause").filter(Boolean), said));
  bar.append(select("any number of calls", "calls", CALLS.map((_, i) => i), (i) => (i === "1" || i === 1 ? "1 call" : `${CALLS[i][0]} calls`)));
  if (lengths.length) bar.append(select("any length", "length", lengths.map((_, i) => i), (i) => lengths[i][0]));
  bar.append(search, h("label", {}, h("input", { type: "checkbox", id: "filter-deep", onchange: (e) => { filter.deep = e.target.checked; refresh(); } }), " also inside the texts"),
    h("button", { class: "quiet", id: "filter-clear", onclick: () => { for (const k of Object.keys(filter)) filter[k] = k === "deep" ? false : ""; for (const el of bar.querySelectorAll("select, input")) { if (el.type === "checkbox") el.checked = false; else el.value = ""; } steps(); refresh(); } }, "Clear"));
  steps();
}

function fits(r) {
  const f = filter, within = (x, [, low, high]) => finite(x) && x >= low && x <= high;
  return (f.run === "" || r.run === Number(f.run)) && (f.kind === "" || r.kind === f.kind) && (f.step === "" || r.step === Number(f.step)) && (f.src === "" || r.src === f.src) &&
    (f.ok === "" || OUTCOMES[f.ok][1](r)) && (f.cause === "" || r.cause === f.cause) && (f.calls === "" || within(r.calls, CALLS[f.calls])) && (f.length === "" || within(r.tok, lengths[f.length]));
}

async function refresh() {
  const mine = ++searchRun, text = filter.text;
  let kept = ROWS.filter(fits);
  hits = null;
  if (text) {
    const shallow = (r) => `${r.q} ${r.pred} ${r.gt} ${r.id}`.toLowerCase().includes(text);
    if (filter.deep) {
      const inside = new Set(), wanted = [...new Set(kept.map((r) => r.c))], sought = JSON.stringify(text).slice(1, -1);
      for (const [n, c] of wanted.entries()) {
        if (mine !== searchRun) return;
        if (n % 5 === 0) $("count").textContent = `Searching the texts, ${Math.round(100 * n / wanted.length)} %`;
        const block = await (chunks.get(c) || unpack(`chunk-${c}`));
        for (const [i, d] of block.entries()) if (JSON.stringify({ ...d, tk: undefined }).toLowerCase().includes(sought)) inside.add(`${c}/${i}`);
      }
      kept = kept.filter((r) => shallow(r) || inside.has(`${r.c}/${r.i}`));
      hits = text;
    } else kept = kept.filter(shallow);
  }
  if (mine !== searchRun) return;
  const rank = (r) => (r[sortBy] === null || r[sortBy] === undefined ? -1e18 : r[sortBy]);
  if (sortBy) kept = kept.slice().sort((a, b) => (rank(a) === rank(b) ? 0 : rank(a) < rank(b) ? -1 : 1) * (sortDown ? -1 : 1));
  found = kept;
  page = 0;
  table();
}

const COLUMNS = [["run", "run"], ["step", "step", "r"], ["kind", "kind"], ["src", "source"], ["ok", "result"], ["q", "problem"], ["pred", "answer", "r"], ["gt", "truth", "r"], ["cause", "ended by"], ["calls", "calls", "r"], ["tok", "tokens", "r"], ["s", "seconds", "r"]];
const DOWN_FIRST = new Set(["calls", "tok", "s", "ok"]);
function table() {
  const columns = COLUMNS.filter(([key]) => !(key === "run" && RUNS.length < 2) && !((key === "src" || key === "kind") && distinct(key).length < 2));
  const cell = (r, [key, , cls]) => {
    if (key === "run") return h("td", {}, h("div", { class: "who" }, dot(r.run), h("span", {}, RUNS[r.run].name)));
    if (key === "kind") return h("td", { class: "soft" }, r.kind === "val" ? "validation" : "training");
    if (key === "ok") return h("td", {}, h("span", { class: `badge ${verdict(r)[1]}` }, `${verdict(r)[2]} ${verdict(r)[0]}`), r.split && h("span", { class: "badge warn", title: "the two verifiers disagree" }, "≠"));
    if (key === "q") return h("td", { class: "q" }, h("div", {}, r.q));
    if (key === "cause") return h("td", { class: "soft" }, said(r.cause));
    if (key === "pred" || key === "gt") return h("td", { class: "r" }, h("div", { class: "clip", title: r[key] }, r[key] || "–"));
    return h("td", { class: cls || "" }, r[key] === null || r[key] === undefined ? "–" : typeof r[key] === "number" ? (key === "s" ? r.s.toFixed(2) : whole(r[key])) : r[key]);
  };
  const sort = (key) => { sortDown = sortBy === key ? !sortDown : DOWN_FIRST.has(key); sortBy = key; refresh(); };
  const arrow = (key) => h("i", { "aria-hidden": "true" }, sortBy === key ? (sortDown ? "↓" : "↑") : "");
  const from = page * PAGE;
  const walk = (e, n) => {
    if (e.key === "Enter" || e.key === " ") { e.preventDefault(); open(from + n); }
    const to = { ArrowDown: "nextElementSibling", j: "nextElementSibling", ArrowUp: "previousElementSibling", k: "previousElementSibling" }[e.key];
    if (to && e.currentTarget[to]) { e.preventDefault(); e.currentTarget[to].focus(); }
  };
  $("table").replaceChildren(
    h("thead", {}, h("tr", {}, columns.map(([key, label, cls]) => h("th", { class: cls || "", "aria-sort": sortBy === key ? (sortDown ? "descending" : "ascending") : null }, h("button", { class: "sort", "data-sort": key, onclick: () => sort(key) }, cls ? [arrow(key), label] : [label, arrow(key)]))))),
    h("tbody", {}, found.slice(from, from + PAGE).map((r, n) => h("tr", { tabindex: 0, "aria-label": `${verdict(r)[0]}, ${r.calls ?? "unknown"} calls: ${r.q.slice(0, 80)}. Enter opens it`, onclick: () => open(from + n), onkeydown: (e) => walk(e, n) }, columns.map((c) => cell(r, c))))));
  if (!found.length) $("table").append(h("caption", { class: "empty" }, ROWS.length ? "No trajectory fits these filters." : "These runs wrote no rollouts."));
  const last = Math.max(0, Math.ceil(found.length / PAGE) - 1);
  const go = (to) => () => { page = Math.max(0, Math.min(last, to)); table(); };
  const judged = found.filter((r) => r.ok !== null), right = judged.filter((r) => r.ok === 1).length, calls = found.map((r) => r.calls).filter(finite);
  $("count").textContent = !found.length ? "" : `${whole(found.length)} trajector${found.length === 1 ? "y" : "ies"}` + (judged.length ? `, ${pct(right / judged.length)} right` : "") + (calls.length ? `, ${(calls.reduce((a, b) => a + b, 0) / calls.length).toFixed(2)} calls each` : "");
  $("pager").hidden = last === 0;
  $("pager").replaceChildren(h("button", { class: "step", disabled: page === 0, onclick: go(0), "aria-label": "first page" }, "«"), h("button", { class: "step", disabled: page === 0, onclick: go(page - 1) }, "Back"),
    h("span", { class: "num" }, `page ${page + 1} of ${last + 1}`), h("button", { class: "step", disabled: page === last, onclick: go(page + 1) }, "Next"), h("button", { class: "step", disabled: page === last, onclick: go(last), "aria-label": "last page" }, "»"));
}
