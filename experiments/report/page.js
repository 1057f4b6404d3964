// Tables sort by a click on a header, by number where a cell has one; empty cells stay last.
const collator = new Intl.Collator(undefined, { numeric: true });

function compare(a, b) {
  return a.dataset.v !== undefined && b.dataset.v !== undefined
    ? Number(a.dataset.v) - Number(b.dataset.v)
    : collator.compare(a.textContent, b.textContent);
}

for (const header of document.querySelectorAll("th")) {
  header.querySelector("button").addEventListener("click", () => {
    const body = header.closest("table").tBodies[0];
    const up = header.getAttribute("aria-sort") !== "ascending";
    const cell = (row) => row.cells[header.cellIndex];
    const rows = [...body.rows].sort((a, b) => {
      const empty = (cell(a).textContent === "") - (cell(b).textContent === "");
      return empty || (up ? 1 : -1) * compare(cell(a), cell(b));
    });
    for (const other of header.parentNode.cells) other.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", up ? "ascending" : "descending");
    body.append(...rows);
  });
}

for (const input of document.querySelectorAll(".filter")) {
  input.hidden = false;
  input.addEventListener("input", () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const row of input.nextElementSibling.querySelectorAll("tbody tr")) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
    }
  });
}
