"use strict";
// The state of the page, which stands in the address behind "#" so that a link or the back button restores it, and
// what changes it: controls and keys.

const PAGE = 20; // pairs on a page
const INITIAL = {
  query: "", kind: null, variant: null, source: null, mark: null, pair: null,
  sort: "order", descending: false, together: false, page: 1,
};
const $ = (id) => document.getElementById(id);

let state = INITIAL;
let chosen = new Uint32Array(0); // the pairs that the state selects, in order
let found = null; // a 1 for each pair that the search has found so far; null for no search
let read = 1; // share of the texts that it has read
let searching = 0; // which search is the last
let drawing = 0; // which drawing is the last
let current = -1; // pair that the keys have come to
let landing = 0; // where they go on the page that comes: 1 to its first pair, -1 to its last

function hashOf(changes) {
  const parameters = new URLSearchParams();
  for (const [name, value] of Object.entries({ ...INITIAL, ...changes })) {
    if (value !== INITIAL[name]) parameters.set(name, value);
  }
  return `#${parameters}`;
}

function readHash() {
  const parameters = new URLSearchParams(location.hash.slice(1));
  const next = { ...INITIAL };
  for (const name of Object.keys(INITIAL)) {
    const text = parameters.get(name);
    if (text === null) continue;
    next[name] = typeof INITIAL[name] === "boolean" ? text === "true" : text;
  }
  next.page = Math.max(1, Math.trunc(next.page) || 1);
  if (!Object.hasOwn(SORTS, next.sort)) next.sort = INITIAL.sort;
  return next;
}

// Goes to the state with some changes; back to page 1 where other pairs are selected.
function go(changes, { replace = false } = {}) {
  const next = { ...state, page: 1, ...changes };
  const hash = hashOf(next);
  if (hash === (location.hash || "#")) return;
  if (replace) {
    history.replaceState(null, "", hash);
    follow();
  } else location.hash = hash;
}

// Shows what the address says.
function follow() {
  const before = state;
  state = readHash();
  const terms = termsOf(state.query);
  if (termsOf(before.query).join("\n") !== terms.join("\n")) beginSearch(terms);
  if (document.activeElement !== $("query")) $("query").value = state.query;
  for (const column of [...COLUMNS, "mark"]) $(column).value = state[column] === null ? "" : `=${state[column]}`;
  $("sort").value = state.sort;
  $("descending").textContent = state.descending ? "↓" : "↑";
  $("descending").setAttribute("aria-pressed", state.descending);
  $("together").setAttribute("aria-pressed", state.together);
  const paged = hashOf({ ...before, page: 1 }) === hashOf({ ...state, page: 1 });
  select();
  draw(!paged || before.page !== state.page);
}

function beginSearch(terms) {
  const own = ++searching;
  [found, read] = [null, 1];
  if (!terms.length) return;
  [found, read] = [new Uint8Array(pairs.count), 0];
  let shown = performance.now();
  const report = (now, share) => {
    if (own !== searching) return false;
    [found, read] = [now, share];
    if (share === 1 || performance.now() - shown > 150) {
      shown = performance.now();
      const before = onPage();
      select();
      if (share === 1 || onPage().join() !== before.join()) draw(false);
    }
    return true;
  };
  search(terms, report).catch((error) => own === searching && fail(error));
}

function onPage() {
  return [...chosen.slice((state.page - 1) * PAGE, state.page * PAGE)];
}

function select() {
  chosen = selected(state, found);
  const pages = Math.max(1, Math.ceil(chosen.length / PAGE));
  if (read === 1) state.page = Math.min(state.page, pages);
  const of = chosen.length === pairs.count ? "" : ` of ${plain.format(pairs.count)}`;
  const still = read < 1 ? `, searching ${Math.round(100 * read)} %` : "";
  $("count").textContent = `${plain.format(chosen.length)}${of} pairs${still}`;
  const { sort, descending, together } = INITIAL;
  $("clear").hidden = hashOf({ ...state, sort, descending, together, page: 1 }) === "#";
  $("page").value = state.page;
  $("page").max = pages;
  $("pages").textContent = plain.format(pages);
  $("previous").disabled = state.page <= 1;
  $("next").disabled = state.page >= pages;
}

// Draws the page; `anew` where it is another one, which is read from its top.
async function draw(anew) {
  const own = ++drawing;
  $("list").setAttribute("aria-busy", "true");
  try {
    const shown = onPage();
    const texts = await Promise.all(shown.map(textsOf));
    if (own !== drawing) return;
    const cards = shown.map((pair, index) => cardOf(pair, texts[index], state.together));
    const nothing = make("p", { class: "none" }, read < 1 ? "Nothing found yet." : "No pair is like that.");
    $("list").replaceChildren(...(cards.length ? cards : [nothing]));
    if (landing) moveTo(landing > 0 ? 0 : cards.length - 1);
    else if (anew && $("list").getBoundingClientRect().top < 0) $("list").scrollIntoView();
    else if (shown.includes(current)) moveTo(shown.indexOf(current));
    landing = 0;
    highlight();
    $("list").setAttribute("aria-busy", "false");
  } catch (error) {
    if (own === drawing) fail(error);
  }
}

function fail(error) {
  $("count").textContent = error.message;
  $("list").setAttribute("aria-busy", "false");
}

// Marks what was searched for, over the text and not in it, where the browser can.
function highlight() {
  if (!CSS.highlights) return;
  CSS.highlights.clear();
  const terms = termsOf(state.query);
  if (!terms.length) return;
  const pattern = new RegExp(terms.map((term) => patternOf(term).source).join("|"), "giu");
  const walker = document.createTreeWalker($("list"), NodeFilter.SHOW_TEXT);
  const ranges = [];
  while (walker.nextNode()) {
    if (!walker.currentNode.parentElement.closest(".text, .id")) continue;
    for (const match of walker.currentNode.data.matchAll(pattern)) {
      const range = new Range();
      range.setStart(walker.currentNode, match.index);
      range.setEnd(walker.currentNode, match.index + match[0].length);
      ranges.push(range);
    }
  }
  CSS.highlights.set("found", new Highlight(...ranges));
}

// Goes to a card of the page; past its last or before its first one to the page there.
function moveTo(index) {
  const cards = $("list").querySelectorAll(".pair");
  if (index < 0 || index >= cards.length) {
    landing = index < 0 ? -1 : 1;
    if (!turn(landing)) landing = 0;
    return;
  }
  $("list").querySelector(".current")?.classList.remove("current");
  current = onPage()[index];
  cards[index].classList.add("current");
  cards[index].focus({ preventScroll: true });
  cards[index].scrollIntoView({ block: "start" });
}

// Whether there is a page to turn to.
function turn(by) {
  const page = state.page + by;
  const there = page >= 1 && (page - 1) * PAGE < chosen.length;
  if (there) go({ page });
  return there;
}

const KEYS = {
  j: () => moveTo(onPage().indexOf(current) + 1),
  k: () => moveTo(Math.max(onPage().indexOf(current), 0) - 1),
  ArrowRight: () => turn(1),
  ArrowLeft: () => turn(-1),
  "/": () => $("query").select(),
  d: () => $("together").click(),
  o: () => $("list").querySelector(".pair.current .images a")?.click(),
  "?": () => $("keys").showModal(),
};

function onKey(event) {
  const writes = event.target.matches("input, select, textarea");
  if (event.key === "Escape" && writes) {
    event.preventDefault(); // the browser would empty the field
    event.target.blur();
  }
  if (writes || event.ctrlKey || event.metaKey || event.altKey || $("keys").open) return;
  if (Object.hasOwn(KEYS, event.key)) {
    event.preventDefault();
    KEYS[event.key]();
  }
}

function start() {
  for (const column of [...COLUMNS, "mark"]) {
    const counts = countsOf(column);
    $(column).append(make("option", { value: "" }, column === "mark" ? "anything" : "all"));
    for (const [value, count] of counts) {
      $(column).append(make("option", { value: `=${value}` }, `${value || "none"} (${plain.format(count)})`));
    }
    $(column).parentElement.hidden = counts.length < (column === "mark" ? 1 : 2);
    $(column).onchange = () => go({ [column]: $(column).value ? $(column).value.slice(1) : null });
  }
  const sorts = Object.keys(SORTS).filter((name) => name !== "gap" || pairs.gap.some((gap) => !Number.isNaN(gap)));
  for (const name of sorts) $("sort").append(make("option", { value: name }, SORTS[name].label));
  $("sort").onchange = () => go({ sort: $("sort").value });
  $("descending").onclick = () => go({ descending: !state.descending });
  $("together").onclick = () => go({ together: !state.together, page: state.page });
  $("previous").onclick = () => turn(-1);
  $("next").onclick = () => turn(1);
  $("page").onchange = () => go({ page: Math.min(Math.max(1, Math.trunc($("page").value) || 1), $("page").max) });
  $("clear").onclick = () => {
    const { sort, descending, together } = state;
    $("query").value = "";
    go({ ...INITIAL, sort, descending, together });
  };
  $("help").onclick = () => $("keys").showModal();
  let typing = 0;
  $("query").oninput = () => {
    clearTimeout(typing);
    typing = setTimeout(() => go({ query: $("query").value }, { replace: true }), 250);
  };
  addEventListener("keydown", onKey);
  addEventListener("hashchange", follow);
  follow();
  if (location.hash) $("controls").scrollIntoView(); // a link is to pairs, not to their summary
}
