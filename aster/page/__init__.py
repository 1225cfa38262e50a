"""The offline report page: what a run directory says, shaped for a reader (`runs`, `trajectories`), and the page itself
(`page.html`, `style.css`, `charts.js`, `viewer.js`), which `aster report` puts into one file."""
