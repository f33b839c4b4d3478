// The interactive parts of the report. Texts of models and data sets enter the page through `text` and `visible` alone,
// as text nodes: nothing here parses HTML.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const PAGE = 20; // prompts shown at a time
const LONG = 2000; // characters shown before "Show all"
const byId = (id) => document.getElementById(id);
const format = new Intl.NumberFormat("en");

// --- Elements and untrusted text ---------------------------------------------------------------------------------

function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

// Control and format characters (bidi overrides among them), lone surrogates and separators; not the joiners that
// Bengali and Persian are written with, nor line breaks and tabs.
const INVISIBLE = /(?![\n\t\u200c\u200d])[\p{Cc}\p{Cf}\p{Cs}\p{Zl}\p{Zp}]/gu;

function symbol(character) {
  const code = character.codePointAt(0);
  if (code < 0x20) return String.fromCodePoint(0x2400 + code);
  return code === 0x7f ? "\u2421" : `U+${code.toString(16).toUpperCase().padStart(4, "0")}`;
}

// Text nodes, with a visible symbol for each character that would otherwise act on what stands around it.
function visible(string) {
  const fragment = document.createDocumentFragment();
  let end = 0;
  for (const match of string.matchAll(INVISIBLE)) {
    if (match.index > end) fragment.append(string.slice(end, match.index));
    const name = `U+${match[0].codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`;
    fragment.append(element("span", { class: "control", title: `control character ${name}` }, symbol(match[0])));
    end = match.index + match[0].length;
  }
  fragment.append(string.slice(end));
  return fragment;
}

function languageTag(code) {
  return /^[A-Za-z]{2,8}(-[A-Za-z0-9]{1,8})*$/.test(code) ? code : null;
}

// A block of untrusted text in its own direction; what is long waits for a click.
function words(string, language) {
  const block = element("div", { class: "words", dir: "auto", lang: languageTag(language) });
  if (string.length <= LONG) {
    block.append(visible(string));
    return block;
  }
  // A cut through a surrogate pair would show half a character.
  const cut = /[\ud800-\udbff]/.test(string[LONG - 1]) ? LONG - 1 : LONG;
  block.append(visible(string.slice(0, cut)), "…");
  const more = element("button", {
    type: "button",
    class: "more",
    onclick: () => {
      block.replaceChildren(visible(string));
      more.remove();
    },
  }, `Show all ${format.format(string.length)} characters`);
  return element("div", {}, block, more);
}

const clip = (string, most) => (string.length > most ? `${string.slice(0, most)}…` : string);

const languageName = (code) => data.languages[code] || code;

// --- Theme -------------------------------------------------------------------------------------------------------

{
  const button = byId("theme");
  const root = document.documentElement;
  let dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const label = () => (button.textContent = dark ? "Light" : "Dark");
  button.hidden = false;
  button.addEventListener("click", () => {
    dark = !dark;
    root.dataset.theme = dark ? "dark" : "light";
    label();
  });
  label();
}

// --- Filters -----------------------------------------------------------------------------------------------------

// A labelled <select>; `choices` are [value, text] pairs or, in optgroups, {group, choices}.
function chooser(label, name, choices, change) {
  const option = ([value, text]) => element("option", { value }, visible(text));
  const options = choices.map((choice) =>
    Array.isArray(choice) ? option(choice) : element("optgroup", { label: choice.group }, ...choice.choices.map(option)));
  const select = element("select", { name, onchange: change }, ...options);
  return element("label", {}, label, select);
}

// [value, "text (count)"] of the values that occur, the first for all of them.
function counted(all, values, text = (value) => value) {
  const counts = new Map();
  for (const value of values) counts.set(value, (counts.get(value) || 0) + 1);
  const choices = [...counts].map(([value, count]) => [value, `${text(value)} (${format.format(count)})`]);
  return [["", all], ...choices];
}

// --- Responses ---------------------------------------------------------------------------------------------------

const PASS = { greedy: "greedy", t1: "sampled, T=1", likelihood: "multiple choice" };
const CHANGE = { better: "Better", worse: "Worse", other: "Otherwise changed", same: "Unchanged", "": "Not in both" };
const transition = (prompt) => prompt.outcomes.join(" → ");
const paired = data.prompts.some((prompt) => prompt.change);

function startResponses() {
  const form = byId("filters");
  const prompts = data.prompts;
  const values = (key) => prompts.map((prompt) => prompt[key]);
  const outcomes = paired
    ? [["", "All"],
       { group: "Change", choices: counted("", values("change"), (c) => CHANGE[c]).slice(1).map(([v, t]) => [`change:${v}`, t]) },
       { group: "Verdict", choices: counted("", prompts.map(transition)).slice(1).map(([v, t]) => [`verdict:${v}`, t]) }]
    : counted("All", prompts.map((prompt) => prompt.outcomes[1])).map(([v, t]) => [v && `after:${v}`, t]);
  let page = 0;
  let found = prompts;
  const update = () => {
    page = 0;
    found = filter(form, prompts);
    show();
  };
  let typed;
  form.append(
    chooser("Benchmark", "benchmark", counted("All", values("benchmark")), update),
    chooser("Language", "language", counted("All", values("language"), languageName), update),
    chooser("Decoding", "pass", counted("All", values("pass"), (name) => PASS[name] || name), update),
    chooser(paired ? "Change of verdict" : "Verdict", "outcome", outcomes, update),
    element("label", { class: "search" }, "Search", element("input", {
      type: "search", name: "search", placeholder: "in prompts, responses, ids",
      oninput: () => { clearTimeout(typed); typed = setTimeout(update, 150); },
    })),
  );
  form.addEventListener("submit", (event) => { event.preventDefault(); update(); });

  function show(focus) {
    const last = Math.max(0, Math.ceil(found.length / PAGE) - 1);
    page = Math.min(page, last);
    byId("found").textContent = `${format.format(found.length)} of ${format.format(prompts.length)} prompts`;
    byId("prompts").replaceChildren(...found.slice(page * PAGE, (page + 1) * PAGE).map(card));
    const go = (to) => () => { page = to; show(true); };
    byId("pages").replaceChildren(
      element("button", { type: "button", disabled: page === 0, onclick: go(0) }, "First"),
      element("button", { type: "button", disabled: page === 0, onclick: go(page - 1) }, "Previous"),
      `page ${format.format(page + 1)} of ${format.format(last + 1)}`,
      element("button", { type: "button", disabled: page === last, onclick: go(page + 1) }, "Next"),
    );
    if (focus) byId("responses").scrollIntoView();
  }
  show();
}

function filter(form, prompts) {
  const chosen = Object.fromEntries(new FormData(form));
  const [kind, ...rest] = chosen.outcome.split(":");
  const outcome = rest.join(":");
  const of = { change: (p) => p.change, verdict: transition, after: (p) => p.outcomes[1] }[kind];
  const needle = chosen.search.trim().toLowerCase();
  return prompts.filter((prompt) =>
    ["benchmark", "language", "pass"].every((key) => !chosen[key] || prompt[key] === chosen[key])
    && (!of || of(prompt) === outcome)
    && (!needle || haystack(prompt).includes(needle)));
}

const haystacks = new Map(); // made at the first search, for it takes a moment with thousands of prompts

function haystack(prompt) {
  if (!haystacks.has(prompt)) {
    const texts = [prompt.id, prompt.category, prompt.prompt, ...prompt.responses.map((side) => side?.response ?? "")];
    haystacks.set(prompt, texts.join("\n").toLowerCase());
  }
  return haystacks.get(prompt);
}

function card(prompt) {
  const meta = [prompt.benchmark, PASS[prompt.pass] || prompt.pass, clip(prompt.id, 80), clip(prompt.category, 80)];
  const chips = paired ? [chip(prompt.outcomes[0]), " → ", chip(prompt.outcomes[1])] : [chip(prompt.outcomes[1])];
  const head = [
    element("span", { class: "where" }, visible(languageName(prompt.language))),
    element("bdi", { class: "meta" }, visible(meta.filter(Boolean).join(" · ") + (prompt.harmful ? " · harmful" : ""))),
    element("span", { class: "outcomes" }, ...chips),
  ];
  if (!prompt.harmful) return element("article", { class: "prompt" }, element("div", { class: "head" }, ...head), body(prompt));
  const details = element("details", { class: "prompt" }, element("summary", { class: "head" }, ...head));
  details.addEventListener("toggle", () => details.append(body(prompt)), { once: true });
  return details;
}

const chip = (outcome) => element("span", { class: `chip ${/^[a-z]+$/.test(outcome) ? outcome : ""}` }, visible(outcome));

function body(prompt) {
  const sides = prompt.responses.map((side, index) => side && element("div", { class: "side" },
    element("p", { class: "label" }, data.labels[index] || "response"),
    words(side.response ?? "", prompt.language),
    element("p", { class: "label" }, visible(remarks(side)))));
  return element("div", { class: "body" },
    element("p", { class: "label" }, "prompt"),
    words(prompt.prompt, prompt.language),
    element("div", { class: "sides" }, ...sides.filter(Boolean)));
}

function remarks(side) {
  const told = (key, yes, no) => (key in side ? (side[key] ? yes : no) : "");
  return [
    side.judge && `${clip(side.judge, 60)}: ${clip(side.reason ?? "", 300)}`,
    "tokens" in side ? `${format.format(side.tokens)} tokens` : "",
    told("stopped", "", "cut at the limit"),
    told("exact_match", "matches the answer", "does not match the answer"),
    told("correct", "right choice", "wrong choice"),
    told("language_match", "", "another language than the prompt's"),
  ].filter(Boolean).join(" · ");
}

// --- Tokens of training responses ----------------------------------------------------------------------------------

const MEASURES = { weight: "weight", w_T: "w_T, teacher", w_S: "w_S, student", kl: "KL" };

function startTokens() {
  const form = byId("token-filters");
  const rows = data.completions;
  const title = (row) => `step ${row.step} · ${languageName(row.language)} · ${row.id}${row.harmful === false ? "" : " · harmful"}`;
  const measures = Object.entries(MEASURES).filter(([key]) => rows.some((row) => row[key]));
  const update = () => {
    const { row, measure } = Object.fromEntries(new FormData(form));
    byId("completion").replaceChildren(completion(rows[Number(row)], measure));
  };
  const choose = chooser("Response", "row", rows.map((row, index) => [String(index), title(row)]), update);
  const select = choose.querySelector("select");
  select.value = String(rows.length - 1);
  const step = (by) => () => {
    select.value = String(Math.min(rows.length - 1, Math.max(0, Number(select.value) + by)));
    update();
  };
  form.append(choose, chooser("Colour by", "measure", measures, update),
    element("button", { type: "button", onclick: step(-1) }, "Previous"),
    element("button", { type: "button", onclick: step(1) }, "Next"));
  form.addEventListener("submit", (event) => event.preventDefault());
  update();
}

function completion(row, measure) {
  const inside = () => {
    const most = Math.max(...row[measure], 0);
    return element("div", { class: "body" },
      element("p", { class: "label" }, "prompt of the student"),
      words(row.student_prompt ?? "", row.language),
      element("details", { class: "teacher" }, element("summary", {}, "prompt of the teacher"),
        words(row.teacher_prompt ?? "", "")),
      element("p", { class: "label" }, `response, ${MEASURES[measure]}: 0`, element("span", { class: "ramp" }),
        `${significant(most)}, the most in it`),
      tokens(row, measure, most));
  };
  if (row.harmful === false) return element("article", { class: "prompt" }, inside());
  const head = element("summary", { class: "head" }, "A response to a harmful prompt");
  const details = element("details", { class: "prompt" }, head);
  details.addEventListener("toggle", () => details.append(inside()), { once: true });
  return details;
}

// One stop for the tab key; from there the arrow keys walk.
function tokens(row, measure, most) {
  const block = element("div", { class: "tokens", dir: "auto", lang: languageTag(row.language), role: "group",
    "aria-label": "Tokens: arrow keys walk through them" });
  const spans = row.tokens.map((token, index) => {
    const span = element("span", { class: "token", tabindex: index ? "-1" : "0", "aria-describedby": "tip" });
    span.append(visible(token.replaceAll("\n", "↵")) , token.includes("\n") ? "\n" : "");
    span.style.setProperty("--w", most > 0 ? row[measure][index] / most : 0);
    const told = () => showTip(span, Object.entries({ ...MEASURES, student_entropy: "student's entropy", teacher_entropy: "teacher's entropy" })
      .filter(([key]) => row[key]).map(([key, name]) => `${name}: ${significant(row[key][index])}`).join("\n"));
    span.addEventListener("pointerenter", told);
    span.addEventListener("focus", told);
    span.addEventListener("pointerleave", hideTip);
    span.addEventListener("blur", hideTip);
    return span;
  });
  block.addEventListener("keydown", (event) => {
    const ahead = getComputedStyle(block).direction === "rtl" ? "ArrowLeft" : "ArrowRight";
    const back = ahead === "ArrowRight" ? "ArrowLeft" : "ArrowRight";
    const now = spans.indexOf(document.activeElement);
    const to = { [ahead]: now + 1, [back]: now - 1, Home: 0, End: spans.length - 1 }[event.key];
    if (now < 0 || to === undefined || !spans[to]) return;
    event.preventDefault();
    spans[now].tabIndex = -1;
    spans[to].tabIndex = 0;
    spans[to].focus();
  });
  block.append(...spans);
  return block;
}

const significant = (value) => (Math.abs(value) >= 0.001 || !value ? Number(value.toPrecision(3)) : value.toExponential(1)).toString();

function showTip(anchor, text) {
  const tip = byId("tip");
  tip.textContent = text;
  tip.hidden = false;
  const box = anchor.getBoundingClientRect();
  const left = Math.min(box.left, document.documentElement.clientWidth - tip.offsetWidth - 8);
  tip.style.left = `${Math.max(8, left) + scrollX}px`;
  const above = box.top - tip.offsetHeight - 6;
  tip.style.top = `${(above > 56 ? above : box.bottom + 6) + scrollY}px`;
}

function hideTip() {
  byId("tip").hidden = true;
}
document.addEventListener("keydown", (event) => { if (event.key === "Escape") hideTip(); });

// --- Curves: the value under the pointer, or step by step with the arrow keys ----------------------------------------

for (const figure of document.querySelectorAll("[data-curve]")) {
  const { scale, series } = data.curves[figure.dataset.curve];
  const [low, high] = scale;
  const { left, right, width } = data.plot;
  const svg = figure.querySelector("svg");
  const cursor = svg.querySelector(".cursor");
  const output = figure.querySelector("output");
  const rest = output.textContent;
  const steps = [...new Set(Object.values(series).flatMap((points) => points.map(([x]) => x)))].sort((a, b) => a - b);
  let index = steps.length - 1;
  const read = () => {
    const at = left + ((steps[index] - low) / (high - low)) * (right - left);
    cursor.setAttribute("x1", at);
    cursor.setAttribute("x2", at);
    cursor.classList.add("on");
    const values = Object.entries(series).map(([name, points]) => {
      const point = points.find(([x]) => x === steps[index]);
      const value = point && point[1] !== null ? significant(point[1]) : "–";
      return Object.keys(series).length > 1 ? `${name} ${value}` : value;
    });
    output.textContent = `step ${steps[index]}: ${values.join(", ")}`;
  };
  const leave = () => {
    cursor.classList.remove("on");
    output.textContent = rest;
  };
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const at = ((event.clientX - box.left) / box.width) * width;
    const step = low + ((at - left) / (right - left)) * (high - low);
    index = steps.reduce((best, x, i) => (Math.abs(x - step) < Math.abs(steps[best] - step) ? i : best), 0);
    read();
  });
  svg.addEventListener("pointerleave", leave);
  figure.addEventListener("focus", read);
  figure.addEventListener("blur", leave);
  figure.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!by) return;
    event.preventDefault();
    index = Math.min(steps.length - 1, Math.max(0, index + by));
    read();
  });
}

if (byId("filters")) startResponses();
if (byId("token-filters")) startTokens();
