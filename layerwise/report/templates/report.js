(function () {
  "use strict";
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const config = { displayModeBar: false, responsive: true, scrollZoom: false, doubleClick: false };
  const NARROW = 560;

  // A colour written var(--name) takes the theme's value, so that charts follow light and dark.
  function themed(value, style) {
    if (typeof value === "string") {
      return value.startsWith("var(--") ? style.getPropertyValue(value.slice(4, -1)).trim() : value;
    }
    if (Array.isArray(value)) return value.map((v) => themed(v, style));
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, themed(v, style)]));
    }
    return value;
  }

  function put(figure, path, value) {
    const keys = path.split(".");
    const last = keys.pop();
    const root = keys[0] === "data" ? figure : figure.layout;
    keys.reduce((node, key) => node[key], root)[last] = value;
  }

  function draw(box) {
    const figure = themed(figures[box.dataset.figure], getComputedStyle(document.documentElement));
    if (box.clientWidth < NARROW) {
      for (const [path, value] of Object.entries(figure.narrow)) put(figure, path, value);
    }
    return Plotly.react(box, figure.data, figure.layout, config);
  }

  const boxes = Array.from(document.querySelectorAll("[data-figure]"));
  const drawAll = () => Promise.all(boxes.map(draw));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  matchMedia("(max-width: " + (NARROW + 60) + "px)").addEventListener("change", drawAll);
  drawAll().then(() => document.documentElement.setAttribute("data-drawn", "yes"));

  const button = document.querySelector(".commands button");
  if (button) {
    button.addEventListener("click", function () {
      const text = Array.from(document.querySelectorAll(".commands code"), (c) => c.textContent).join("\n");
      const selected = () => getSelection().selectAllChildren(button.parentElement.querySelector("pre"));
      const done = () => { button.textContent = button.dataset.done; };
      if (navigator.clipboard) navigator.clipboard.writeText(text).then(done, selected); else selected();
    });
  }
})();
