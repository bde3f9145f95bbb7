"use strict";
// The data, in files that call the two functions below: a page that is opened from the disk may run scripts that lie
// beside it, and read nothing else.

const FILES_KEPT = 64;

let pairs = null; // the index: columns of all pairs
let dataFolder = "";
const files = new Map(); // number -> promise of its texts, the last used one last
const arriving = new Map(); // number -> what to call with its texts

function bpoIndex(json) {
  pairs = JSON.parse(json);
  pairs.count = pairs.id.length;
  for (const column of ["rank", "kind", "variant", "source", "marks"]) pairs[column] = Uint32Array.from(pairs[column]);
  pairs.gap = Float64Array.from(pairs.gap, (gap) => gap ?? NaN);
  pairs.countOfId = new Map();
  for (const id of pairs.id) pairs.countOfId.set(id, (pairs.countOfId.get(id) ?? 0) + 1);
  pairs.longer = Int32Array.from(pairs.rejectedWords, (words, pair) => words - pairs.chosenWords[pair]);
  dataFolder = document.currentScript.src.replace(/index\.js$/, "");
  start();
}

function bpoTexts(number, json) {
  arriving.get(number)?.(JSON.parse(json));
}

// The texts of a file, an object a pair.
function textsOfFile(number) {
  const texts = files.get(number) ?? load(number);
  files.delete(number);
  files.set(number, texts);
  if (files.size > FILES_KEPT) files.delete(files.keys().next().value);
  return texts;
}

async function textsOf(pair) {
  return (await textsOfFile(Math.floor(pair / pairs.pairsAFile)))[pair % pairs.pairsAFile];
}

function load(number) {
  return new Promise((resolve, reject) => {
    const script = document.createElement("script");
    arriving.set(number, resolve);
    script.src = `${dataFolder}texts-${String(number).padStart(5, "0")}.js`;
    script.onload = () => done();
    script.onerror = () => {
      done();
      files.delete(number); // so that the next try loads it
      reject(new Error(`${script.src} cannot be read; write the page again.`));
    };
    function done() {
      arriving.delete(number);
      script.remove();
    }
    document.head.append(script);
  });
}
