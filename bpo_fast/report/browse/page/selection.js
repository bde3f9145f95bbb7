"use strict";
// Which pairs are shown, and in what order.

const COLUMNS = ["kind", "variant", "source"];
const SORTS = {
  order: { label: "as written", key: (pair) => pair },
  id: { label: "id", key: (pair) => pairs.rank[pair] },
  gap: { label: "log-prob gap", key: (pair) => pairs.gap[pair] },
  length: { label: "length difference", key: (pair) => pairs.longer[pair] },
  random: { label: "at random", key: scrambled },
};
const orders = new Map(); // sort and direction -> all pairs in order

// All pairs in the order of a sort; those without a value come last, either way.
function ordered(sort, descending) {
  const name = `${sort} ${descending}`;
  if (!orders.has(name)) {
    const keys = Float64Array.from({ length: pairs.count }, (_, pair) => SORTS[sort].key(pair));
    const sign = descending ? -1 : 1;
    const compare = (a, b) => sign * (keys[a] - keys[b]) || a - b;
    const known = [];
    const unknown = [];
    for (let pair = 0; pair < pairs.count; pair++) (Number.isNaN(keys[pair]) ? unknown : known).push(pair);
    const order = new Uint32Array(pairs.count);
    order.set(Uint32Array.from(known).sort(compare));
    order.set(unknown, known.length);
    orders.set(name, order);
  }
  return orders.get(name);
}

// The pairs that a state selects, in its order; `found` has a 1 for each that a search found, null for no search.
function selected(state, found) {
  const codes = [];
  for (const column of COLUMNS) {
    if (state[column] !== null) codes.push([pairs[column], pairs.names[column].indexOf(state[column])]);
  }
  const bit = state.mark === null ? 0 : 1 << pairs.names.mark.indexOf(state.mark);
  return ordered(state.sort, state.descending).filter(
    (pair) =>
      codes.every(([column, code]) => column[pair] === code) &&
      (!bit || pairs.marks[pair] & bit) &&
      (state.pair === null || pairs.id[pair] === state.pair) &&
      (found === null || found[pair]),
  );
}

// How many pairs have each value of a column, the most first: [value, count].
function countsOf(column) {
  const names = pairs.names[column];
  const counts = new Array(names.length).fill(0);
  if (column === "mark") {
    for (const marks of pairs.marks) names.forEach((_, index) => (counts[index] += (marks >> index) & 1));
  } else for (const code of pairs[column]) counts[code]++;
  return names.map((value, index) => [value, counts[index]]).filter((each) => each[1]).sort((a, b) => b[1] - a[1]);
}

// The words of a search, phrases in quotes whole: a pair must have all of them, in any of its texts or its id.
function termsOf(query) {
  return [...query.matchAll(/"([^"]+)"|(\S+)/g)].map((match) => match[1] ?? match[2]);
}

function patternOf(term) {
  return new RegExp(term.replace(/[\\^$.*+?()[\]{}|/]/g, "\\$&"), "iu");
}

// Searches all texts, file by file; calls `progress` with what is found and the share that is read, until it is false.
async function search(terms, progress) {
  const patterns = terms.map(patternOf);
  const found = new Uint8Array(pairs.count);
  const number = Math.ceil(pairs.count / pairs.pairsAFile);
  for (let file = 0; file < number; file++) {
    for (let ahead = 1; ahead <= 4 && file + ahead < number; ahead++) textsOfFile(file + ahead).catch(() => {});
    const texts = await textsOfFile(file);
    texts.forEach((each, index) => {
      const pair = file * pairs.pairsAFile + index;
      const all = [pairs.id[pair], each.chosen, each.rejected ?? "", ...each.turns.map((turn) => turn[1])].join("\n");
      found[pair] = patterns.every((pattern) => pattern.test(all));
    });
    if (!progress(found, (file + 1) / number)) return;
  }
}

// A number that looks drawn, the same for a pair every time (the finalizer of MurmurHash3).
function scrambled(pair) {
  let mixed = pair + 1;
  mixed = Math.imul(mixed ^ (mixed >>> 16), 0x85ebca6b);
  mixed = Math.imul(mixed ^ (mixed >>> 13), 0xc2b2ae35);
  return (mixed ^ (mixed >>> 16)) >>> 0;
}
