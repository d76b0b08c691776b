"use strict";
(() => {
  const page = JSON.parse(document.getElementById("specs").textContent);
  const root = document.documentElement;

  const narrow = 520;
  const options = (spec, width) => ({
    actions: false,
    renderer: "svg",
    // Expressions are walked, not compiled: the page's policy forbids eval.
    ast: true,
    defaultStyle: false,
    config: {
      ...page.config,
      legend: {
        ...page.config.legend,
        columns: Math.max(1, Math.floor(width / spec.usermeta.legend_width)),
        labelLimit: Math.min(page.config.legend.labelLimit, width - 50),
      },
      axis: { ...page.config.axis, labelLimit: width < narrow ? 130 : page.config.axis.labelLimit },
    },
  });

  const drawn = new Map();
  const draw = async (place) => {
    const spec = page.charts[Number(place.dataset.chart)];
    const width = place.clientWidth;
    if (drawn.get(place)?.width === width) return;
    drawn.get(place)?.view?.finalize();
    try {
      const { view } = await vegaEmbed(place, spec, options(spec, width));
      drawn.set(place, { width, view });
      const svg = place.querySelector("svg");
      svg.setAttribute("role", "img");
      svg.setAttribute("aria-label", spec.description ?? "chart");
      // On paper, long charts of bars are not squeezed into half a page.
      place.classList.toggle("tall", svg.viewBox.baseVal.height > 408);
    } catch (error) {
      place.textContent = "This chart could not be drawn: " + error.message;
      place.classList.add("broken");
      drawn.set(place, { width });
      console.error(error);
    }
  };

  // Drawings follow one another, so that two of the same place never run into each other. What is in view comes first, and
  // between two of them the page answers clicks and scrolling: a long page is open before its last chart is drawn.
  const turn = () => new Promise((resolve) => setTimeout(resolve));
  const inView = (place) => {
    const box = place.getBoundingClientRect();
    return box.bottom > 0 && box.top < innerHeight;
  };
  const nextOf = (waiting) => waiting.splice(Math.max(0, waiting.findIndex(inView)), 1)[0];
  let queue = Promise.resolve();
  const drawAll = () => {
    root.dataset.charts = "drawing";
    queue = queue.then(async () => {
      const waiting = [...document.querySelectorAll(".chart")];
      while (waiting.length) {
        await turn();
        await draw(nextOf(waiting));
      }
      root.dataset.charts = "drawn";
    });
  };
  drawAll();
  let later = 0;
  addEventListener("resize", () => {
    clearTimeout(later);
    later = setTimeout(drawAll, 150);
  });

  const value = (row, column) => {
    const cell = row.cells[column];
    return cell.dataset.sort === undefined ? cell.textContent : Number(cell.dataset.sort);
  };
  const compare = (a, b) =>
    typeof a === "number" && typeof b === "number"
      ? a - b
      : String(a).localeCompare(String(b), "en", { numeric: true });
  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) =>
      head.addEventListener("click", () => {
        const number = head.classList.contains("number");
        const before = head.getAttribute("aria-sort");
        const up = before === null ? !number : before === "descending";
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", up ? "ascending" : "descending");
        const rows = [...table.tBodies[0].rows];
        // Cells without a value stay at the end, whichever way the rest goes.
        const empty = (row) => number && row.cells[column].dataset.sort === undefined;
        rows.sort((a, b) => empty(a) - empty(b) || (up ? 1 : -1) * compare(value(a, column), value(b, column)));
        table.tBodies[0].append(...rows);
      }),
    );
  }
})();
