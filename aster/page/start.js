// In the order in which a reader meets it. What scrolls into view later is drawn after the first paint.
function drawAll() { toolUse(); curves(); drawStep(); }

function remember() {
  // A page that reloads itself comes back where the reader was.
  try {
    const kept = JSON.parse(sessionStorage.getItem("aster-place") || "null");
    if (kept && kept.title === DATA.title && DATA.every) requestAnimationFrame(() => scrollTo(0, kept.y));
    addEventListener("pagehide", () => sessionStorage.setItem("aster-place", JSON.stringify({ title: DATA.title, y: scrollY })));
  } catch { /* storage is off */ }
}

async function start() {
  overview(); freshness(); curveBar(); toolUse(); curves(); forest(); configs();
  ROWS = await unpack("rows");
  found = ROWS;
  if (!ROWS.length) for (const id of ["filters", "count", "pager", "table"]) $(id).hidden = true;
  const all = DATA.trajectories_total;
  $("trajectory-lede").textContent = !all ? "These runs wrote no rollouts." : ROWS.length < all
    ? `${whole(ROWS.length)} of ${whole(all)} are in this page, the first of every step; --max-trajectories takes more.`
    : "Every trajectory of every step. Open one to read its turns and tokens.";
  filterBar();
  await refresh();
  await stepSection();
  themed.push(drawAll);
  let redraw = null, width = innerWidth;
  addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; clearTimeout(redraw); redraw = setTimeout(drawAll, 120); } });
  const wanted = location.hash.match(/^#trajectory-(\d+)$/);
  if (wanted && found[Number(wanted[1])]) await open(Number(wanted[1]));
  remember();
  document.body.dataset.ready = "true";
  document.body.dataset.readyMs = String(Math.round(performance.now()));
}
start();
