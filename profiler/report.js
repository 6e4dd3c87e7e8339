// Draws the charts that the page carries as JSON in the page's colours, and sorts its tables.
"use strict";

function themed(layout) {
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(name).trim();
  const axis = { gridcolor: colour("--grid"), linecolor: colour("--line"), zerolinecolor: colour("--line") };
  const own = structuredClone(layout);
  for (const name of ["xaxis", "yaxis"]) own[name] = { ...axis, ...own[name] };
  return {
    ...own,
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: colour("--text") },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: colour("--soft"), activecolor: colour("--accent") },
    hoverlabel: { bgcolor: colour("--card"), bordercolor: colour("--line"), font: { color: colour("--text") } },
  };
}

function draw() {
  const charts = JSON.parse(document.getElementById("charts").textContent);
  // Those that need no server.
  const modeBarButtons = [["toImage", "zoom2d", "pan2d", "resetScale2d"]];
  for (const { id, data, layout } of charts)
    Plotly.react(id, data, themed(layout), { responsive: true, displaylogo: false, modeBarButtons });
}

function sort(header) {
  const table = header.closest("table");
  const headers = [...header.parentElement.children];
  const column = headers.indexOf(header);
  const ascending = header.getAttribute("aria-sort") !== "ascending";
  for (const other of headers) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", ascending ? "ascending" : "descending");
  const value = (row) => {
    const text = row.children[column].dataset.value;
    return text === "" ? null : Number(text);
  };
  const rows = [...table.tBodies[0].rows].sort((a, b) => {
    const [x, y] = [value(a), value(b)];
    if (x === null || y === null) return (x === null) - (y === null); // what has no value stays last
    return ascending ? x - y : y - x;
  });
  table.tBodies[0].append(...rows);
}

for (const button of document.querySelectorAll("th button"))
  button.addEventListener("click", () => sort(button.closest("th")));
if (window.Plotly) {
  draw();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
}
