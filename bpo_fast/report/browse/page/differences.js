"use strict";
// Where two texts differ, word by word: the fewest words put in and left out (Myers, Algorithmica 1, 1986).

const MOST_EDITS = 2000; // texts that differ in more words are shown as different from the first such word to the last
const segmenter = new Intl.Segmenter("en", { granularity: "word" });

// The words and signs of a text as [text, first character, character behind the last]; white space lies between them.
function wordsOf(text) {
  const words = [];
  for (const { segment, index } of segmenter.segment(text)) {
    if (segment.trim()) words.push([segment, index, index + segment.length]);
  }
  return words;
}

// Runs of two lists, in order: [words of a, words of b, whether they are equal].
function runsOf(a, b) {
  let start = 0;
  while (start < a.length && start < b.length && a[start] === b[start]) start++;
  let end = 0;
  while (end < a.length - start && end < b.length - start && a.at(-1 - end) === b.at(-1 - end)) end++;
  const [middleA, middleB] = [a.slice(start, a.length - end), b.slice(start, b.length - end)];
  const runs = [];
  add(runs, start, start, true);
  let [atA, atB] = [0, 0];
  for (const [inA, inB] of commonOf(middleA, middleB)) {
    add(runs, inA - atA, inB - atB, false);
    add(runs, 1, 1, true);
    [atA, atB] = [inA + 1, inB + 1];
  }
  add(runs, middleA.length - atA, middleB.length - atB, false);
  add(runs, end, end, true);
  return runs;
}

function add(runs, ofA, ofB, equal) {
  if (!ofA && !ofB) return;
  const last = runs.at(-1);
  if (last?.[2] === equal) {
    last[0] += ofA;
    last[1] += ofB;
  } else runs.push([ofA, ofB, equal]);
}

// The longest common part of two lists as [index in a, index in b], in order; none beyond MOST_EDITS.
function commonOf(a, b) {
  const most = Math.min(a.length + b.length, MOST_EDITS);
  const reach = new Int32Array(2 * most + 3); // diagonal k = index in a - index in b -> the farthest index in a
  const former = []; // of each number of edits, the diagonals -edits to edits before it
  for (let edits = 0; edits <= most; edits++) {
    former.push(reach.slice(most + 1 - edits - 1, most + 1 + edits + 2));
    for (let k = -edits; k <= edits; k += 2) {
      let inA = down(reach, most + 1 + k, k, edits) ? reach[most + 2 + k] : reach[most + k] + 1;
      while (inA < a.length && inA - k < b.length && a[inA] === b[inA - k]) inA++;
      reach[most + 1 + k] = inA;
      if (inA >= a.length && inA - k >= b.length) return traced(former, a.length, b.length);
    }
  }
  return [];
}

// Whether the farthest path to a diagonal comes by a word of b.
function down(reach, place, k, edits) {
  return k === -edits || (k !== edits && reach[place - 1] < reach[place + 1]);
}

function traced(former, inA, inB) {
  const common = [];
  for (let edits = former.length - 1; edits >= 0; edits--) {
    const [reach, k] = [former[edits], inA - inB];
    const place = edits + 1 + k;
    const fromK = down(reach, place, k, edits) ? k + 1 : k - 1;
    const fromA = edits ? reach[edits + 1 + fromK] : 0;
    const fromB = edits ? fromA - fromK : 0;
    while (inA > fromA && inB > fromB && inA > 0 && inB > 0) common.push([--inA, --inB]);
    [inA, inB] = [fromA, fromB];
  }
  return common.reverse();
}

// The runs with those words left out that are equal by chance: fewer than differ before them, and after them.
function joined(runs) {
  const kept = [];
  for (const run of runs) {
    kept.push([...run]);
    while (kept.length > 2 && !kept.at(-1)[2] && fewer(kept.at(-2), kept.at(-3)) && fewer(kept.at(-2), kept.at(-1))) {
      const [after, between] = [kept.pop(), kept.pop()];
      for (const side of [0, 1]) kept.at(-1)[side] += between[side] + after[side];
    }
  }
  return kept;
}

function fewer(equal, changed) {
  return equal[0] < Math.max(changed[0], changed[1]);
}

// The parts of two texts, in order: {chosen, rejected, equal}, of texts with the white space behind them.
function differences(chosen, rejected) {
  const [a, b] = [wordsOf(chosen), wordsOf(rejected)];
  const word = ([text]) => text;
  const parts = [];
  let [atA, atB] = [0, 0];
  for (const [ofA, ofB, equal] of joined(runsOf(a.map(word), b.map(word)))) {
    parts.push({ chosen: slice(chosen, a, atA, ofA), rejected: slice(rejected, b, atB, ofB), equal });
    atA += ofA;
    atB += ofB;
  }
  return parts;
}

// `count` words from `first` on, to where the next begins; the first word has the white space before it.
function slice(text, words, first, count) {
  const startOf = (index) => (index === 0 ? 0 : index < words.length ? words[index][1] : text.length);
  return count ? text.slice(startOf(first), startOf(first + count)) : "";
}
