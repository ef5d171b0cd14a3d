// Shows the images that the address asks for (`#truth=3&predicted=8`), which links of the page set. Without this script
// all images are shown.
"use strict";
{
  const bar = document.getElementById("filter");
  const figures = [...document.querySelectorAll("figure[data-keys]")].map((figure) => ({
    figure,
    keys: JSON.parse(figure.dataset.keys),
    name: figure.querySelector(".path").title,
  }));
  const links = [...document.querySelectorAll("a.filter")];
  const galleries = [...document.querySelectorAll(".gallery")];

  // An image may be in several galleries; it counts once.
  const distinct = (shown) => new Set(shown.map(({ name }) => name)).size;

  const sentence = (link, shown) => {
    const label = `Only images with ${link.dataset.label}`;
    const on_page = distinct(shown);
    const all = Number(link.dataset.images ?? on_page);
    if (!on_page) return `${label}: this page shows none of them` + (all ? ` (there are ${all.toLocaleString("en")}).` : ".");
    if (link.dataset.images === undefined) return `${label}: ${on_page.toLocaleString("en")} on this page.`;
    return `${label}: ${on_page.toLocaleString("en")} of ${all.toLocaleString("en")} on this page.`;
  };

  // Of a long gallery only the first images are shown until a button is pressed, but all that a filter asks for.
  const limit = (gallery, isFiltered) => {
    const first = Number(gallery.dataset.first);
    const rest = [...gallery.children].slice(first);
    const isShort = !isFiltered && gallery.dataset.whole === undefined && rest.length > 0;
    if (isShort) rest.forEach((figure) => (figure.hidden = true));
    const button = gallery.parentElement.querySelector("button.more");
    if (button) button.hidden = !isShort;
  };

  const apply = () => {
    const fragment = location.hash.slice(1);
    const link = fragment && links.find((one) => one.getAttribute("href") === `#${fragment}`);
    const wanted = link ? [...new URLSearchParams(fragment)] : [];
    const shown = figures.filter(({ keys }) => wanted.every(([key, value]) => keys[key].includes(value)));
    figures.forEach(({ figure }) => (figure.hidden = true));
    shown.forEach(({ figure }) => (figure.hidden = false));
    for (const gallery of galleries) {
      gallery.closest("section").hidden = Boolean(link) && !gallery.querySelector("figure:not([hidden])");
      limit(gallery, Boolean(link));
    }
    for (const one of links) {
      if (one.getAttribute("href") === `#${fragment}`) one.setAttribute("aria-current", "true");
      else one.removeAttribute("aria-current");
    }
    bar.hidden = !link;
    if (!link) return;
    bar.querySelector("span").textContent = sentence(link, shown);
    document.getElementById("images").scrollIntoView();
    document.getElementById("images").focus({ preventScroll: true });
  };

  for (const gallery of galleries) {
    if (gallery.children.length <= Number(gallery.dataset.first)) continue;
    const button = document.createElement("button");
    button.type = "button";
    button.className = "more for-screen";
    button.textContent = `Show all ${gallery.children.length}`;
    button.addEventListener("click", () => {
      gallery.dataset.whole = "";
      apply();
    });
    gallery.after(button);
  }
  window.addEventListener("hashchange", apply);
  apply();
}
