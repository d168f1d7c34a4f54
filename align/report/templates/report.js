"use strict";
(() => {
  const form = document.getElementById("filter");
  if (form) browse(form);
  followSections();
  reachScrollers();

  // A long text scrolls in its box: the keyboard must get there, and pass by those that do not scroll. Measured where
  // a question comes into view, so that opening thousands at once stays quick.
  function reachScrollers() {
    const observer = new IntersectionObserver((entries) => {
      for (const { target, isIntersecting } of entries) {
        if (!isIntersecting) continue;
        observer.unobserve(target);
        for (const text of target.querySelectorAll(".said, .ask .text, .reference")) {
          if (text.scrollHeight > text.clientHeight + 1) text.tabIndex = 0;
          else text.removeAttribute("tabindex");
        }
      }
    }, { rootMargin: "50%" });
    document.addEventListener("toggle", (event) => observer.observe(event.target), true);
  }

  // Filter and search work on what is in the page already; nothing is written as HTML.
  function browse(form) {
    const search = document.getElementById("search");
    const unfold = document.getElementById("unfold");
    const shown = document.getElementById("shown");
    const nothing = document.getElementById("nothing");
    const items = [...document.querySelectorAll(".q")].map((element) => ({
      element,
      kind: element.dataset.kind,
      text: element.textContent.toLowerCase(),
    }));
    const matching = () => {
      const kind = form.elements.kind.value;
      const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
      return items.filter((item) => (!kind || item.kind === kind) && words.every((word) => item.text.includes(word)));
    };
    const update = () => {
      const found = new Set(matching());
      for (const item of items) item.element.hidden = !found.has(item);
      shown.textContent = found.size === items.length ? "" : `${found.size} shown`;
      nothing.hidden = found.size > 0;
    };
    const open = (all) => {
      for (const item of matching()) item.element.open = all;
      unfold.setAttribute("aria-pressed", String(all));
      unfold.textContent = all ? "Close all" : "Open all";
    };
    form.hidden = false;
    form.addEventListener("input", update);
    form.addEventListener("submit", (event) => event.preventDefault());
    unfold.addEventListener("click", () => open(unfold.getAttribute("aria-pressed") !== "true"));
    document.addEventListener("keydown", (event) => {
      if (event.key === "/" && !event.ctrlKey && !event.metaKey && !/^(INPUT|TEXTAREA)$/.test(event.target.tagName)) {
        event.preventDefault();
        search.focus();
      }
    });
    update();
  }

  function followSections() {
    const links = new Map([...document.querySelectorAll("nav a")].map((link) => [link.hash.slice(1), link]));
    const visible = new Set();
    const observer = new IntersectionObserver(
      (entries) => {
        for (const entry of entries) visible[entry.isIntersecting ? "add" : "delete"](entry.target.id);
        const current = [...links.keys()].find((id) => visible.has(id));
        for (const [id, link] of links) {
          if (id === current) link.setAttribute("aria-current", "true");
          else link.removeAttribute("aria-current");
        }
      },
      { rootMargin: "-10% 0px -60% 0px" },
    );
    for (const id of links.keys()) observer.observe(document.getElementById(id));
  }
})();
