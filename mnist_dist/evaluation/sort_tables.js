// Makes the headers of tables with the class "sortable" into buttons that sort the rows.
"use strict";
for (const table of document.querySelectorAll("table.sortable")) {
  const headers = [...table.tHead.rows[0].cells];
  const body = table.tBodies[0];
  const text = (row, column) => row.cells[column].textContent.trim();
  const number = (row, column) => parseFloat(text(row, column).replaceAll(",", ""));
  headers.forEach((header, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...header.childNodes);
    header.append(button);
    button.addEventListener("click", () => {
      const isNumber = header.classList.contains("number");
      // Numbers begin with the largest, words with the first; a second click turns the order round.
      const first = isNumber ? "descending" : "ascending";
      const second = isNumber ? "ascending" : "descending";
      const order = header.getAttribute("aria-sort") === first ? second : first;
      const sign = order === "ascending" ? 1 : -1;
      const rows = [...body.rows];
      rows.sort((a, b) => {
        if (!isNumber) return sign * text(a, column).localeCompare(text(b, column), "en", { numeric: true });
        const [x, y] = [number(a, column), number(b, column)];
        if (isNaN(x) || isNaN(y)) return isNaN(x) - isNaN(y); // Cells without a number are last in both orders.
        return sign * (x - y);
      });
      headers.forEach((other) => other.removeAttribute("aria-sort"));
      header.setAttribute("aria-sort", order);
      body.append(...rows);
    });
  });
}
