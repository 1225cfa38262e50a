"use strict";
// What every part of the page uses: elements, numbers, colours, the packed blocks, the tooltip. Nothing is loaded.
function complain(what) {
  document.documentElement.dataset.error = what;
  const p = document.createElement("p");
  p.className = "notice bad";
  p.textContent = `This page hit an error while drawing itself: ${what}`;
  document.querySelector("main").prepend(p);
}
addEventListener("error", (e) => complain(e.message));
addEventListener("unhandledrejection", (e) => complain(String(e.reason)));

const DATA = JSON.parse(document.getElementById("data").textContent);
const RUNS = DATA.runs;
const $ = (id) => document.getElementById(id);
const SVG = new Set(["svg", "path", "line", "text", "circle", "g", "rect", "polygon", "title", "tspan"]);

// Text only ever becomes a text node: what a model wrote can not become markup.
function h(tag, attrs = {}, ...children) {
  const el = SVG.has(tag) ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [key, value] of Object.entries(attrs)) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) el.addEventListener(key.slice(2), value);
    else el.setAttribute(key, value === true ? "" : value);
  }
  for (const child of children.flat(Infinity)) if (child !== null && child !== undefined && child !== false) el.append(child);
  return el;
}

// numbers -------------------------------------------------------------------------------------------------------------
const finite = (x) => typeof x === "number" && Number.isFinite(x);
const minus = (text) => text.replace("-", "−");
const pct = (x, digits = 1) => `${(100 * x).toFixed(digits)} %`;
const signed = (x) => `${x < 0 ? "−" : "+"}${(100 * Math.abs(x)).toFixed(1)}`;
const whole = (x) => x.toLocaleString("en");
function short(x) {
  if (x === null || x === undefined) return "–";
  if (typeof x === "string") return x;
  const a = Math.abs(x);
  if (a === 0) return "0";
  if (a >= 1e9) return minus((x / 1e9).toFixed(1)) + " G";
  if (a >= 1e6) return minus((x / 1e6).toFixed(1)) + " M";
  if (a >= 1e4) return minus((x / 1e3).toFixed(1)) + " k";
  if (a < 1e-3) return minus(x.toExponential(1));
  return minus(String(Number(x.toPrecision(a < 1 ? 2 : 3))));
}
function span(seconds) {
  if (!(seconds > 0)) return "–";
  if (seconds < 1) return `${(1000 * seconds).toFixed(0)} ms`;
  if (seconds < 90) return `${seconds.toFixed(seconds < 10 ? 1 : 0)} s`;
  if (seconds < 5400) return `${(seconds / 60).toFixed(0)} min`;
  return seconds < 172800 ? `${(seconds / 3600).toFixed(1)} h` : `${(seconds / 86400).toFixed(1)} days`;
}
const clock = (unix) => new Date(1000 * unix).toISOString().slice(0, 19).replace("T", " ");
const said = (word) => String(word || "").replaceAll("_", " ");

// series --------------------------------------------------------------------------------------------------------------
const points = (run, name) => (run.series[name] ? run.series[name][0].map((step, n) => ({ step, y: run.series[name][1][n] })).filter((p) => finite(p.y)) : []);
// `*` between slashes is a data source, which may have slashes of its own (openai/gsm8k).
function matching(run, pattern) {
  if (!pattern.includes("*")) return run.series[pattern] ? [pattern] : [];
  const re = new RegExp("^" + pattern.replace(/[.+?^${}()|[\]\\]/g, "\\$&").replaceAll("/*/", "/.+/").replaceAll("*", "[^/]+") + "$");
  return Object.keys(run.series).filter((name) => re.test(name));
}
const sourceOf = (name) => (name.match(/^val-\w+\/(.+)\/(?:acc|collapse)\//) || [name, name])[1];
const accuracyNames = (run) => matching(run, "val-core/*/acc/mean@*");
// The share of a run's steps in each band of calls, from the monitor; of an evaluation, from its own split.
const BANDS = ["0", "1", "2-4", "5-9", "10-19", "20+"];
function bandPrefix(run) {
  if (run.series["collapse/calls_hist/0"]) return "collapse/calls_hist/";
  const name = matching(run, "val-aux/*/collapse/calls_hist/0")[0];
  return name ? name.slice(0, -1) : null;
}
// Spans of steps in which the collapse alarm was on: [[first, last], ...].
function alarms(run) {
  const out = [];
  for (const p of points(run, "collapse/alarm")) {
    const last = out[out.length - 1];
    if (p.y > 0 && last && last.open) last[1] = p.step;
    else if (p.y > 0) out.push(Object.assign([p.step, p.step], { open: true }));
    else if (last) last.open = false;
  }
  return out;
}

// colours -------------------------------------------------------------------------------------------------------------
const color = (run) => `var(--r${run % 8})`;
const shade = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const dot = (run) => h("span", { class: "dot", style: `background:${color(run)}` });
const themes = ["auto", "light", "dark"];
const dark = matchMedia("(prefers-color-scheme: dark)");
let theme = "auto";
try { theme = localStorage.getItem("aster-theme") || "auto"; } catch { /* storage is off for files in some browsers */ }
const themed = []; // what must be drawn again in other colours
function applyTheme() {
  document.documentElement.dataset.theme = theme === "auto" ? (dark.matches ? "dark" : "light") : theme;
  $("theme").textContent = { auto: "Auto", light: "Light", dark: "Dark" }[theme];
  for (const again of themed) again();
}
$("theme").addEventListener("click", () => {
  theme = themes[(themes.indexOf(theme) + 1) % 3];
  try { localStorage.setItem("aster-theme", theme); } catch { /* as above */ }
  applyTheme();
});
dark.addEventListener("change", applyTheme);
applyTheme();

// packed blocks -------------------------------------------------------------------------------------------------------
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

// tooltip -------------------------------------------------------------------------------------------------------------
function tip(event, content) {
  const el = $("tip");
  el.replaceChildren(...content);
  el.hidden = false;
  const box = el.getBoundingClientRect();
  el.style.left = `${Math.max(8, Math.min(event.clientX + 14, innerWidth - box.width - 12))}px`;
  el.style.top = `${event.clientY + 16 + box.height > innerHeight ? event.clientY - box.height - 12 : event.clientY + 16}px`;
}
const untip = () => { $("tip").hidden = true; };
