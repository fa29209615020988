"use strict";
/* Everything is readable without this script. With it a moment can be chosen, and the pictures of a panel show what
   was listened to at that moment instead of at all moments together. */
(() => {
  const EVEN = 127;
  const MORE = [{{ colours.more | join(", ") }}];
  const LESS = [{{ colours.less | join(", ") }}];

  const paint = (levels, rows, columns) => {
    const canvas = document.createElement("canvas");
    canvas.width = columns;
    canvas.height = rows;
    const image = canvas.getContext("2d").createImageData(columns, rows);
    levels.forEach((level, cell) => {
      const signed = (level - EVEN) / EVEN;
      const [red, green, blue, opacity] = signed > 0 ? MORE : LESS;
      image.data.set([red, green, blue, Math.round(Math.abs(signed) * opacity)], 4 * cell);
    });
    canvas.getContext("2d").putImageData(image, 0, 0);
    return canvas.toDataURL();
  };

  const enliven = (panel, labels) => {
    const rows = Number(panel.dataset.rows);
    const columns = Number(panel.dataset.columns);
    const levels = Uint8Array.from(atob(panel.dataset.levels), (letter) => letter.charCodeAt(0));
    const heats = [...panel.querySelectorAll(".heat")];
    const still = heats.map((heat) => heat.src);
    const chooser = panel.querySelector(".chooser");
    const slider = chooser.querySelector("input");
    const output = chooser.querySelector("output");
    const button = chooser.querySelector("button");
    const cells = panel.querySelector(".cells");
    const cursor = cells.querySelector(".cursor");
    const size = rows * columns;

    const show = (moment) => {
      slider.value = moment;
      const query = moment - 1;
      output.textContent = moment ? `at ${labels[query]}` : "at all moments";
      cursor.hidden = !moment;
      cursor.style.top = `${(100 * query) / labels.length}%`;
      cursor.style.height = `max(5px, ${100 / labels.length}%)`;
      heats.forEach((heat, index) => {
        const start = (query * heats.length + index) * size;
        heat.src = moment ? paint(levels.subarray(start, start + size), rows, columns) : still[index];
      });
    };

    let playing = 0;
    const stop = () => {
      clearInterval(playing);
      playing = 0;
      button.textContent = "▶";
    };
    const play = () => {
      button.textContent = "❚❚";
      playing = setInterval(() => show(1 + (Number(slider.value) % labels.length)), Math.max(120, 4000 / labels.length));
    };
    button.addEventListener("click", () => (playing ? stop() : play()));
    slider.addEventListener("input", () => { stop(); show(Number(slider.value)); });
    cells.addEventListener("click", (event) => {
      stop();
      const box = cells.getBoundingClientRect();
      const moment = 1 + Math.min(labels.length - 1, Math.floor(((event.clientY - box.top) / box.height) * labels.length));
      show(moment === Number(slider.value) ? 0 : moment);
    });
    cells.classList.add("live");
    chooser.hidden = false;
  };

  for (const section of document.querySelectorAll(".direction")) {
    const labels = section.dataset.queries.split("|");
    for (const panel of section.querySelectorAll(".panel")) {
      if (panel.dataset.levels) enliven(panel, labels);
    }
  }
})();
