// Shows the first rows of long tables with the class "foldable", and a button for the rest.
"use strict";
const SHOWN_ROWS = 20; // As in listing.css.
for (const table of document.querySelectorAll("table.foldable")) {
  const rows = table.tBodies[0].rows.length;
  if (rows <= SHOWN_ROWS + 5) continue;
  const button = document.createElement("button");
  const fold = (isFolded) => {
    table.classList.toggle("folded", isFolded);
    button.setAttribute("aria-expanded", String(!isFolded));
    button.textContent = isFolded ? `Show all ${rows.toLocaleString("en")} rows` : `Show the first ${SHOWN_ROWS} rows`;
  };
  button.type = "button";
  button.className = "unfold";
  button.addEventListener("click", () => fold(!table.classList.contains("folded")));
  fold(true);
  table.closest(".scroll").after(button);
}
