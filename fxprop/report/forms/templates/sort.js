// a click on a column's heading sorts by it, the largest number first; a second click turns the order round
for (const table of document.querySelectorAll(".fxprop table.sortable")) {
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => {
    const button = document.createElement("button");
    button.textContent = heading.textContent;
    heading.replaceChildren(button);
    button.addEventListener("click", () => {
      const numeric = heading.classList.contains("number");
      const first = numeric ? "descending" : "ascending";
      const order = heading.getAttribute("aria-sort") === first
        ? (numeric ? "ascending" : "descending") : first;
      headings.forEach((other) => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", order);
      const key = (row) => {
        const cell = row.cells[column];
        return numeric ? Number(cell.dataset.value ?? -1) : cell.textContent.trim();
      };
      const compare = numeric ? (a, b) => key(a) - key(b)
        : (a, b) => key(a).localeCompare(key(b), undefined, { numeric: true });
      const sign = order === "ascending" ? 1 : -1;
      const body = table.tBodies[0];
      body.append(...[...body.rows].sort((a, b) => sign * compare(a, b)));
    });
  });
}
