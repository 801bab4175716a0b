"use strict";
document.documentElement.classList.add("js");

// Filters and pages: a card is shown if it matches every choice; a choice about answers hides single answers too.
for (const bar of document.querySelectorAll(".filters")) {
  const list = document.getElementById(bar.dataset.for);
  const size = Number(list.dataset.size);
  const output = bar.querySelector("output");
  const turns = bar.querySelectorAll("[data-page]");
  let page = 0;

  const matches = (card, select) => {
    if (!select.value) return true;
    if (select.dataset.key in card.dataset) return card.dataset[select.dataset.key] === select.value;
    let any = false;
    for (const sample of card.querySelectorAll(".sample")) {
      sample.hidden = !sample.dataset.marks.split("|").includes(select.value);
      any ||= !sample.hidden;
    }
    return any;
  };
  const show = () => {
    for (const sample of list.querySelectorAll(".sample")) sample.hidden = false;
    const selects = [...bar.querySelectorAll("select")];
    const cards = [...list.children];
    const found = cards.filter((card) => selects.map((select) => matches(card, select)).every(Boolean));
    const pages = Math.max(1, Math.ceil(found.length / size));
    page = Math.min(Math.max(page, 0), pages - 1);
    for (const card of cards) card.hidden = true;
    for (const card of found.slice(page * size, (page + 1) * size)) card.hidden = false;
    output.textContent = `page ${page + 1} of ${pages}, ${found.length} shown of ${cards.length}`;
    turns[0].disabled = page === 0;
    turns[1].disabled = page === pages - 1;
  };
  for (const select of bar.querySelectorAll("select")) select.addEventListener("change", () => { page = 0; show(); });
  for (const turn of turns) turn.addEventListener("click", () => { page += Number(turn.dataset.page); show(); });
  bar.querySelector("[data-open]").addEventListener("click", (event) => {
    const open = event.target.textContent === "open all";
    for (const sample of list.querySelectorAll(".sample")) sample.open = open;
    event.target.textContent = open ? "close all" : "open all";
  });
  show();
}

// Tooltips of charts at once instead of after the browser's pause.
const tip = document.getElementById("tip");
for (const band of document.querySelectorAll(".hit")) {
  const title = band.querySelector("title");
  const text = title.textContent;
  title.remove();
  band.addEventListener("pointermove", (event) => {
    tip.textContent = text;
    tip.hidden = false;
    const left = event.clientX + 14 + tip.offsetWidth > window.innerWidth ? event.clientX - 14 - tip.offsetWidth : event.clientX + 14;
    tip.style.left = `${left}px`;
    tip.style.top = `${event.clientY + 14}px`;
  });
  band.addEventListener("pointerleave", () => { tip.hidden = true; });
}
