// The pointer's moment in every panel: a line, and the values beside the names.
const data = JSON.parse(document.getElementById("data").textContent);
const figures = [...document.querySelectorAll("figure")];
const shown = (value) => value === null || value === undefined ? "-" : value.toLocaleString("en", { maximumSignificantDigits: 4 });
document.querySelector(".charts").addEventListener("mousemove", (event) => {
  const panel = event.target.closest("svg.panel");
  if (!panel) return;
  const box = panel.getBoundingClientRect();
  const share = ((event.clientX - box.left) / box.width - data.left) / data.plot;
  const points = data.values[0][0].length;
  const point = Math.min(points - 1, Math.max(0, Math.floor(share * points)));
  const x = data.width * (data.left + data.plot * (point + 0.5) / points);
  figures.forEach((figure, index) => {
    const cross = figure.querySelector(".cross");
    cross.setAttribute("x1", x);
    cross.setAttribute("x2", x);
    figure.querySelectorAll(".legend b").forEach((value, series) => { value.textContent = shown(data.values[index][series][point]); });
  });
});
