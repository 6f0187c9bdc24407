// A field above each long table that hides the rows without the words typed into it.
// Words are looked for in all columns; "column:word" looks in one, as in "griffin:no gated".
document.addEventListener("DOMContentLoaded", () => {
  const LONG = 20;
  for (const table of document.querySelectorAll("article table")) {
    const rows = [...table.querySelectorAll("tbody tr")];
    if (rows.length < LONG || table.closest(".cell_output, .highlight")) continue;
    const columns = [...table.querySelectorAll("thead th")].map((cell) =>
      cell.textContent.trim().toLowerCase(),
    );
    table.classList.add("long");
    table.classList.toggle("reasons", columns.at(-1) === "reason");
    const cells = rows.map((row) =>
      [...row.cells].map((cell) => cell.textContent.trim().toLowerCase()),
    );
    const matches = (row, word) => {
      const [name, ...rest] = word.split(":");
      const column = columns.indexOf(name);
      const value = rest.join(":");
      if (column >= 0 && rest.length) return row[column] === value || (value.length > 3 && row[column].includes(value));
      return row.some((text) => text.includes(word));
    };

    const field = document.createElement("input");
    field.type = "search";
    field.className = "filter";
    field.placeholder = columns.includes("griffin")
      ? "Filter: words, or column:word, such as griffin:no"
      : "Filter: words";
    field.setAttribute("aria-label", "Filter the rows of this table");
    const count = document.createElement("output");
    count.className = "filter-count";
    const update = () => {
      const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      rows.forEach((row, number) => {
        row.hidden = !words.every((word) => matches(cells[number], word));
        shown += row.hidden ? 0 : 1;
      });
      count.textContent = `${shown} of ${rows.length} rows`;
    };
    field.addEventListener("input", update);
    const bar = document.createElement("div");
    bar.className = "filter-bar";
    bar.append(field, count);
    const place = table.closest(".pst-scrollable-table-container") ?? table;
    place.before(bar);
    update();
  }
});
