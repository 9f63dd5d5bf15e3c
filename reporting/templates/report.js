"use strict";
(function () {
  const data = JSON.parse(document.getElementById("data").textContent);
  const STEP = 12; // cards at a time
  const $ = (id) => document.getElementById(id);

  function make(tag, className, text) {
    const node = document.createElement(tag);
    if (className) node.className = className;
    if (text !== undefined) node.textContent = text;
    return node;
  }

  for (const image of document.querySelectorAll("img[data-picture]")) {
    image.src = data.pictures[image.dataset.picture];
  }
  markSection();
  if (!$("cards")) return;

  // ---------------------------------------------------------------- state

  const state = { run: 0, sort: "order", recipe: "fused", search: "", seed: 0, shown: STEP };

  /** A number in 0..1 per call; the same seed gives the same ones (mulberry32). */
  function randomFrom(seed) {
    return function () {
      seed = (seed + 0x6d2b79f5) | 0;
      let t = Math.imul(seed ^ (seed >>> 15), 1 | seed);
      t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
      return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
    };
  }

  const run = () => data.runs[state.run];
  const metricOf = () => data.metrics.find((item) => item.key === state.sort.split(":")[1]);

  function scoreOf(place) {
    const metric = metricOf();
    const table = metric && (run().scores[state.recipe] || {})[metric.key];
    const value = table ? table[place] : undefined;
    return value === undefined || value === null ? null : value;
  }

  /** Places of the stimuli to show, filtered and in order. Without a score: last. */
  function chosen() {
    const words = state.search.toLowerCase().split(/[\s_]+/).filter(Boolean);
    let places = Object.keys(run().cards).map(Number);
    places.sort((a, b) => a - b);
    if (state.sort === "random") {
      const next = randomFrom(state.seed);
      for (let i = places.length - 1; i > 0; i--) {
        const j = Math.floor(next() * (i + 1));
        [places[i], places[j]] = [places[j], places[i]];
      }
    } else if (metricOf()) {
      const upwards = (metricOf().better === "higher") === state.sort.startsWith("worst");
      places.sort((a, b) => {
        const x = scoreOf(a), y = scoreOf(b);
        if (x === null || y === null) return (x === null) - (y === null);
        return upwards ? x - y : y - x;
      });
    }
    return places.filter((place) => {
      const text = (data.stimuli[place].concept + " " + data.stimuli[place].number).toLowerCase();
      return words.every((word) => text.includes(word));
    });
  }

  // ---------------------------------------------------------------- cards

  const colourOf = (name) => /^(separate|progressive)_/.test(name)
    ? name.replace(/^separate_|^progressive_\d+_/, "").replace("superpixel_", "") : "";

  /** A labelled picture that opens larger. */
  function shot(place, picture, label, spoken, options) {
    const button = make("button", "shot" + (options.control ? " control" : ""));
    button.type = "button";
    const image = make("img");
    image.src = data.pictures[picture];
    image.alt = spoken + ": " + data.stimuli[place].concept;
    image.decoding = "async";
    const caption = make("span");
    if (options.colour) {
      button.classList.add("coloured");
      image.style.borderColor = "var(--" + options.colour + ")";
    }
    caption.append(label);
    button.append(image, caption);
    button.addEventListener("click", () => view(place, picture, spoken));
    return button;
  }

  function row(title, nodes) {
    const part = make("div");
    const grid = make("div", "grid5");
    grid.append(...nodes);
    part.append(make("h4", "", title), grid);
    return part;
  }

  const mark = () => (run().marks.length ? " (" + run().marks.join("; ") + ")" : "");

  function topRow(place) {
    const card = run().cards[place], top = make("div", "top");
    const seen = data.stimuli[place].picture;
    if (seen !== null) top.append(shot(place, seen, "seen", "seen", {}));
    if ("fused" in card) top.append(shot(place, card.fused, "fused" + mark(), "drawn, fused" + mark(), {}));
    const fused = run().scores.fused || {};
    const scores = data.metrics
      .filter(({ key }) => data.brief.includes(key) && fused[key] && place in fused[key])
      .map(({ key, label }) => label + " " + fused[key][place].toFixed(2));
    if (scores.length) top.append(make("p", "scores", "fused: " + scores.join(" · ")));
    const controls = run().controls
      .filter((item) => place in item.pictures)
      .map((item) => shot(place, item.pictures[place], item.short, item.label,
        { control: true }));
    const beside = controls.length <= 2 ? controls : [];
    if (beside.length) {
      const side = make("div", "side");
      side.append(...beside);
      top.append(side);
    } else top.classList.add("two");
    return [top, ...(beside.length < controls.length ? [row("controls", controls)] : [])];
  }

  function cardOf(place) {
    const card = make("article", "card"), head = make("header"), stimulus = data.stimuli[place];
    const title = make("h3", "", stimulus.concept);
    title.append(make("span", "", stimulus.number));
    head.append(title);
    card.dataset.place = place;
    if (metricOf()) {
      const value = scoreOf(place);
      const text = value === null ? "–" : value.toFixed(3);
      card.dataset.score = value === null ? "" : value;
      const of = data.titles[state.recipe] || state.recipe;
      head.append(make("span", "score", of + ": " + metricOf().label + " " + text));
    }
    card.append(head, ...topRow(place));
    for (const [kind, names] of Object.entries(data.rows)) {
      const there = names.filter((name) => name in run().cards[place]);
      if (!there.length) continue;
      const titles = { separate: "separate: one modality alone", progressive: "progressive: added one by one" };
      card.append(row(titles[kind] + mark(), there.map((name) => shot(
        place, run().cards[place][name], data.labels[name], "drawn, " + data.titles[name] + mark(),
        { colour: colourOf(name) }))));
    }
    return card;
  }

  function draw() {
    const places = chosen(), total = Object.keys(run().cards).length;
    $("cards").replaceChildren(...places.slice(0, state.shown).map(cardOf));
    $("more").hidden = places.length <= state.shown;
    $("more").textContent = "Show " + Math.min(STEP, places.length - state.shown) + " more";
    const shown = Math.min(state.shown, places.length);
    $("count").textContent = places.length + " of " + total + " stimuli"
      + (state.search ? " match “" + state.search + "”" : "") + ", " + shown + " shown.";
    $("about").textContent = run().name + ": " + run().about + ".";
    const frame = make("span", "dashed", "Dashed frames");
    const beside = run().controls.map((item) => item.short + ", " + item.what).join("; ");
    $("beside").replaceChildren(...(beside ? [frame, " are controls, fused as well: " + beside + "."] : []));
    $("run-marks").replaceChildren(...run().marks.map((text) => make("p", "banner", text)));
  }

  // ---------------------------------------------------------------- viewer

  function view(place, picture, spoken) {
    const seen = data.stimuli[place].picture, pictures = [];
    const add = (index, text) => {
      const figure = make("figure"), image = make("img");
      image.src = data.pictures[index];
      image.alt = text + ": " + data.stimuli[place].concept;
      figure.append(image, make("figcaption", "", text));
      pictures.push(figure);
    };
    if (seen !== null) add(seen, "seen");
    if (picture !== seen) add(picture, spoken);
    $("viewer-title").textContent = data.stimuli[place].concept;
    $("viewer-pictures").replaceChildren(...pictures);
    $("viewer").showModal();
  }
  $("viewer").addEventListener("click", (event) => {
    if (event.target === $("viewer")) $("viewer").close();
  });

  // ---------------------------------------------------------------- controls

  function options(select, pairs, current) {
    select.replaceChildren(...pairs.map(([value, text]) => {
      const option = make("option", "", text);
      option.value = value;
      option.selected = value === String(current);
      return option;
    }));
  }

  function offer() {
    const scored = Object.keys(run().scores);
    const known = data.metrics.filter((item) => scored.some((name) => item.key in run().scores[name]));
    const sorts = [["order", "as in the test set"], ["random", "random"]];
    for (const item of known) sorts.push(["best:" + item.key, "best " + item.label], ["worst:" + item.key, "worst " + item.label]);
    if (!sorts.some(([value]) => value === state.sort)) state.sort = "order";
    options($("sort"), sorts, state.sort);
    if (!scored.includes(state.recipe)) state.recipe = scored.includes("fused") ? "fused" : scored[0];
    options($("recipe"), scored.map((name) => [name, data.titles[name] || name]), state.recipe);
    $("recipe-label").hidden = !metricOf();
    $("seed-label").hidden = state.sort !== "random";
  }

  function change(changes) {
    Object.assign(state, { shown: STEP }, changes);
    offer();
    draw();
  }

  options($("run"), data.runs.map((item, index) => [String(index), item.name]), 0);
  $("run-label").hidden = data.runs.length < 2;
  $("controls").addEventListener("submit", (event) => event.preventDefault());
  $("search").addEventListener("input", (event) => change({ search: event.target.value.trim() }));
  $("sort").addEventListener("change", (event) => change({ sort: event.target.value }));
  $("recipe").addEventListener("change", (event) => change({ recipe: event.target.value }));
  $("run").addEventListener("change", (event) => change({ run: Number(event.target.value) }));
  $("seed").addEventListener("input", (event) => change({ seed: Number(event.target.value) || 0 }));
  $("more").addEventListener("click", () => {
    const before = state.shown;
    state.shown += STEP;
    draw();
    const next = $("cards").children[before];
    if (next) next.querySelector("button").focus();
  });
  change({});

  // ---------------------------------------------------------------- where the reader is

  function markSection() {
    const links = [...document.querySelectorAll("nav a")];
    const byId = new Map(links.map((link) => [link.hash.slice(1), link]));
    if (!("IntersectionObserver" in window)) return;
    const watch = new IntersectionObserver((entries) => {
      for (const entry of entries) {
        if (!entry.isIntersecting) continue;
        for (const link of links) link.removeAttribute("aria-current");
        byId.get(entry.target.id).setAttribute("aria-current", "true");
      }
    }, { rootMargin: "-30% 0px -65% 0px" });
    for (const id of byId.keys()) watch.observe($(id));
  }
})();
