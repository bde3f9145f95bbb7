"use strict";
// One pair as elements. Texts of the data become text nodes and attributes, never HTML.

const LONG = 220; // words; a longer response is folded
const plain = new Intl.NumberFormat("en", { maximumFractionDigits: 2 });
const signed = new Intl.NumberFormat("en", { maximumFractionDigits: 2, signDisplay: "exceptZero" });

// An element; children that are null are left out.
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

function cardOf(pair, texts, together) {
  const [id, kind] = [pairs.id[pair], nameOf("kind", pair)];
  const card = make("article", { class: "pair", tabindex: "-1", "aria-label": `Pair ${id} ${kind}` });
  const body = make(
    "div",
    { class: "body" },
    headOf(pair, id, kind, together),
    ...questionOf(texts.turns),
    make("div", { class: "answers" }, ...answersOf(pair, texts, together)),
    footOf(pair, texts),
  );
  if (texts.images.length) card.append(make("div", { class: "images" }, ...texts.images.map(imageOf)));
  card.append(body);
  return card;
}

function nameOf(column, pair) {
  return pairs.names[column][pairs[column][pair]];
}

function headOf(pair, id, kind, together) {
  const marks = pairs.names.mark.filter((_, index) => (pairs.marks[pair] >> index) & 1);
  const names = ["variant", "source"].map((column) => nameOf(column, pair)).filter(Boolean);
  const siblings = pairs.countOfId.get(id); // this pair among them
  const all = make("a", { href: hashOf({ pair: id, together }) }, `all ${plain.format(siblings)} of this id`);
  const link = hashOf({ pair: id, kind, variant: nameOf("variant", pair), together });
  return make(
    "header",
    {},
    kind ? make("b", { class: "kind" }, kind) : null,
    ...names.map((name) => make("bdi", {}, name)),
    ...marks.map((mark) => make("span", { class: "mark" }, mark)),
    make("a", { class: "id", href: link, title: "Link to this pair" }, "#", make("bdi", {}, id)),
    siblings > 1 ? all : null,
  );
}

function imageOf(image) {
  if (image.reason) return missing(image.name, image.reason);
  const { src, width = null, height = null } = image;
  const shown = make("img", { src, width, height, alt: image.name, loading: "lazy", decoding: "async" });
  const link = image.file ? make("a", { href: image.file, target: "_blank", title: "Open the image" }, shown) : shown;
  shown.onerror = () => link.replaceWith(missing(image.name, "This browser cannot show it, or the file is gone."));
  return link;
}

function missing(name, reason) {
  return make("div", { class: "missing" }, make("b", {}, "No image"), make("bdi", {}, name), make("span", {}, reason));
}

// The last message is the question; the ones before it come smaller, with who says them.
function questionOf(turns) {
  const last = turns.at(-1);
  return turns.map((turn) =>
    turn === last && turn[0] === "user"
      ? make("p", { class: "question text", dir: "auto" }, turn[1])
      : make("p", { class: "turn text", dir: "auto" }, make("b", {}, turn[0]), " ", turn[1]),
  );
}

function answersOf(pair, texts, together) {
  if (texts.rejected === null) return [answerOf("chosen", pair, texts, [texts.chosen])];
  const parts = differences(texts.chosen, texts.rejected);
  if (together) {
    const both = parts.flatMap(({ chosen, rejected, equal }) =>
      equal ? [chosen] : [...marked("del", rejected), ...marked("ins", chosen)],
    );
    return [answerOf("both", pair, texts, both)];
  }
  const side = (name, tag) => parts.flatMap((part) => (part.equal ? [part[name]] : marked(tag, part[name])));
  return [
    answerOf("chosen", pair, texts, side("chosen", "ins")),
    answerOf("rejected", pair, texts, side("rejected", "del")),
  ];
}

// A text in a mark, the white space around it outside.
function marked(tag, text) {
  const [, before, inside, after] = text.match(/^(\s*)(.*?)(\s*)$/s);
  return inside ? [before, make(tag, {}, inside), after] : [text];
}

const TITLES = { chosen: "Chosen", rejected: "Rejected", both: "From rejected to chosen" };

function answerOf(side, pair, texts, content) {
  const [chosen, rejected] = [pairs.chosenWords[pair], pairs.rejectedWords[pair]];
  const words = { chosen, rejected, both: Math.max(chosen, rejected) };
  const logp = texts.logps[side === "chosen" ? 0 : 1];
  const facts = [`${plain.format(words[side])} ${words[side] === 1 ? "word" : "words"}`];
  if (side === "both") facts[0] = `${plain.format(rejected)} to ${plain.format(chosen)} words`;
  else if (logp !== null) facts.push(`log-prob ${plain.format(logp)}`);
  const text = make("div", { class: "text", dir: "auto" }, ...content);
  const title = make("h3", {}, TITLES[side], " ", make("small", {}, facts.join(", ")));
  const answer = make("div", { class: `answer ${side}` }, title, text);
  if (words[side] > LONG) {
    text.classList.add("folded");
    const unfold = make("button", { class: "unfold", type: "button", "aria-expanded": "false" }, "Show all of it");
    unfold.onclick = () => {
      const folded = text.classList.toggle("folded");
      unfold.textContent = folded ? "Show all of it" : "Show less";
      unfold.setAttribute("aria-expanded", String(!folded));
    };
    answer.append(unfold);
  }
  return answer;
}

function footOf(pair, texts) {
  const facts = [];
  if (!Number.isNaN(pairs.gap[pair])) facts.push(`log-prob gap ${signed.format(pairs.gap[pair])}`);
  if (texts.rejected !== null) facts.push(`rejected is ${lengthOf(pairs.longer[pair])}`);
  const fields = Object.entries(texts.fields);
  const more = fields.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, make("bdi", {}, value))]);
  return make(
    "footer",
    {},
    make("span", {}, facts.join(" · ")),
    more.length ? make("details", {}, make("summary", {}, "how it was made"), make("dl", {}, ...more)) : null,
  );
}

function lengthOf(longer) {
  if (!longer) return "as long as chosen";
  const words = Math.abs(longer) === 1 ? "word" : "words";
  return `${plain.format(Math.abs(longer))} ${words} ${longer > 0 ? "longer" : "shorter"} than chosen`;
}
