// Draws the figures in the colours of the scheme in use: a text "--name" anywhere in them is a style sheet variable.
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const isTouch = matchMedia("(pointer: coarse)").matches;

  const painted = (value, style) => {
    if (typeof value === "string") return (value.startsWith("--") && style.getPropertyValue(value).trim()) || value;
    if (Array.isArray(value)) return value.map((item) => painted(item, style));
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, painted(item, style)]));
  };

  const draw = () => {
    const style = getComputedStyle(document.documentElement);
    for (const [id, figure] of Object.entries(figures)) {
      const { data, layout } = painted(figure, style);
      layout.dragmode = isTouch ? false : "zoom"; // a finger scrolls the page
      Plotly.react(id, data, layout, { responsive: true, displayModeBar: false });
    }
  };

  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  draw();
})();
