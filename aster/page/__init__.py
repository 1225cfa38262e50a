"""The offline report page: what a run directory says, shaped for a reader (`runs`, `trajectories`, `turns`, `tokens`,
`steps`), and the page itself (`page.html`, `style.css`, the scripts in the order of `report.SCRIPTS`), which `aster
report` puts into one file."""
