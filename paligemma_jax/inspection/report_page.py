"""The report's page: HTML with {{marks}} to be filled, its style and its script; nothing is fetched from anywhere.

Without the script the page still shows the picture, the words and all maps as pictures.
"""

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{{title}}</title>
<style>{{style}}</style>
</head>
<body>
<header>
<h1>{{prompt}}</h1>
<p class="meta">{{meta}}</p>
</header>
<main id="explorer">
<section class="stage" aria-label="Picture">
<div class="frame" id="frame"><img src="{{image}}" alt="The picture" draggable="false"><canvas id="map"></canvas>
<div id="cell" hidden></div></div>
<div class="legend" hidden><span id="low"></span><div class="bar"></div><span id="high"></span></div>
<p class="caption" id="caption" aria-live="polite"></p>
</section>
<section class="side">
<h2>Answer</h2>
<div class="answer" id="answer">{{words}}</div>
<div class="controls" hidden>
<h2>Map</h2>
<div class="kinds" id="kinds" role="radiogroup" aria-label="Map"></div>
<label id="layers">Layer <input type="range" id="layer" min="0" step="1"><output id="layer-name"></output></label>
<label>Strength <input type="range" id="strength" min="0" max="100" value="65"></label>
<label id="follow-row" class="check"><input type="checkbox" id="follow" checked>
<span>Pointing at a patch shows what is like it</span></label>
</div>
<div class="patch" hidden>
<h2 id="patch-title">Word or patch</h2>
<p class="hint" id="hint">Point at a word or at the picture, or tab to it and use the arrow keys. A click holds a
word or a patch, Escape lets go.</p>
<div id="patch"></div>
</div>
<noscript><p class="hint">Scripts are off: the maps are below as pictures.</p></noscript>
</section>
</main>
<section class="plates">
<h2>All maps</h2>
{{plates}}
</section>
<script type="application/json" id="data">{{data}}</script>
<script>{{script}}</script>
</body>
</html>
"""

STYLE = """
:root{color-scheme:light dark;--paper:#fbfaf8;--card:#fff;--ink:#1d1e21;--faint:#64676d;--line:#dedcd7;--mark:#b5400f;
--wash:#fbeadf}
@media(prefers-color-scheme:dark){:root{--paper:#151517;--card:#1e1f22;--ink:#ececee;--faint:#a0a3a9;--line:#36373c;
--mark:#ff9d62;--wash:#3a2a20}}
*{box-sizing:border-box}
[hidden]{display:none!important}
body{margin:0 auto;max-width:78rem;padding:1.6rem clamp(1rem,3vw,2.5rem) 4rem;background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",sans-serif}
header{border-bottom:1px solid var(--line);margin-bottom:1.4rem}
h1{font-size:clamp(1.3rem,3vw,1.9rem);line-height:1.2;margin:.1rem 0 .3rem;overflow-wrap:anywhere}
h2{font-size:.82rem;font-weight:600;color:var(--faint);margin:1.3rem 0 .45rem}
.side>h2:first-child{margin-top:0}
p{margin:.3rem 0}.meta,.caption,.hint{color:var(--faint);font-size:.9rem}
.meta{padding-bottom:.8rem;overflow-wrap:anywhere}
main{display:grid;grid-template-columns:minmax(0,1.15fr) minmax(0,1fr);gap:2rem;align-items:start}
@media(max-width:52rem){main{grid-template-columns:minmax(0,1fr);gap:1.2rem}}
@media(min-width:52.01rem){.stage{position:sticky;top:1rem}}
.frame{position:relative;line-height:0;border-radius:4px;overflow:hidden;background:#000;width:fit-content;
max-width:100%;margin:0 auto}
.frame img{display:block;max-width:100%;max-height:74vh;width:{{width}}px;height:auto}
.frame canvas{position:absolute;inset:0;width:100%;height:100%;touch-action:pan-y;cursor:crosshair}
.frame canvas:focus-visible{outline:3px solid var(--mark);outline-offset:-3px}
#cell{position:absolute;pointer-events:none;border:2px solid #fff;outline:1px solid #000;border-radius:1px}
.legend{display:grid;grid-template-columns:auto 1fr auto;gap:.6rem;align-items:center;margin-top:.6rem;
font-size:.82rem;color:var(--faint);font-variant-numeric:tabular-nums}
.bar{height:.6rem;border-radius:2px;background:linear-gradient(90deg,{{gradient}})}
.answer{display:flex;flex-wrap:wrap;gap:.35rem}
.word{font:inherit;font-size:.95rem;color:inherit;background:var(--card);border:1px solid var(--line);
border-radius:4px;padding:.2rem .5rem;display:inline-flex;flex-direction:column;align-items:flex-start;
text-align:left;max-width:100%;overflow-wrap:anywhere}
button.word{cursor:pointer}
.word small{color:var(--faint);font-size:.72rem;line-height:1.2;font-variant-numeric:tabular-nums}
.word.on{border-color:var(--mark);background:var(--wash)}
.word.held{box-shadow:0 0 0 1px var(--mark)}
button:focus-visible,input:focus-visible,summary:focus-visible{outline:2px solid var(--mark);outline-offset:2px}
.kinds{display:flex;flex-wrap:wrap;gap:.35rem;margin-bottom:.6rem}
.kinds label{border:1px solid var(--line);border-radius:4px;padding:.2rem .6rem;background:var(--card);cursor:pointer;
font-size:.92rem}
.kinds label:has(:checked){border-color:var(--mark);background:var(--wash)}
.kinds label:focus-within{outline:2px solid var(--mark);outline-offset:2px}
.kinds input{position:absolute;opacity:0;width:1px;height:1px}
.controls>label{display:grid;grid-template-columns:4.6rem minmax(6rem,12rem) 1fr;gap:.6rem;align-items:center;
font-size:.9rem;margin:.3rem 0}
.controls>label.check{grid-template-columns:auto 1fr;justify-content:start}
.check input{accent-color:var(--mark);margin:0}
@media(max-width:30rem){.controls>label:not(.check){grid-template-columns:4.6rem 1fr}output{grid-column:2}}
input[type=range]{accent-color:var(--mark);width:100%}
table{border-collapse:collapse;width:100%;font-size:.88rem}
th,td{text-align:left;font-weight:400;padding:.16rem .5rem .16rem 0;vertical-align:baseline;
border-bottom:1px solid var(--line)}
th{color:var(--faint);white-space:nowrap;width:1%}
td{overflow-wrap:anywhere}
td span{display:inline-block;margin-right:.7rem;white-space:pre-wrap}
td span small{color:var(--faint);margin-left:.25rem;font-variant-numeric:tabular-nums}
.plates{margin-top:2.5rem;border-top:1px solid var(--line)}
details{border-bottom:1px solid var(--line)}
summary{cursor:pointer;padding:.55rem 0}
details div{overflow-x:auto;padding-bottom:1rem}
details img{display:block;max-width:100%;height:auto;background:#fff;border-radius:4px}
details img.wide{max-width:none}
"""

SCRIPT = """
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = id => document.getElementById(id);
  const canvas = $("map"), context = canvas.getContext("2d"), cell = $("cell"), side = data.side;
  const words = [...document.querySelectorAll(".word")];
  const state = {kind: 0, layer: 0, word: -1, heldWord: -1, patch: -1, heldPatch: -1};
  const bytes = text => Uint8Array.from(atob(text), c => c.charCodeAt(0));
  for (const kind of data.kinds) for (const map of kind.maps.flat()) map.values = bytes(map.values);
  const palette = data.colors.map(c => [1, 3, 5].map(i => parseInt(c.slice(i, i + 2), 16)));
  const color = share => {
    const place = share * (palette.length - 1), low = Math.min(Math.floor(place), palette.length - 2);
    return palette[low].map((v, i) => v + (palette[low + 1][i] - v) * (place - low));
  };
  const show = value => value && Math.abs(value) < 1e-3 ? value.toExponential(1) : String(Number(value.toPrecision(3)));
  const element = (name, text, parent) => {
    const made = document.createElement(name);
    if (text !== undefined) made.textContent = text;
    if (parent) parent.append(made);
    return made;
  };

  const alike = data.alike;
  if (alike) alike.values = bytes(alike.values);
  const placed = patch => "in row " + (Math.floor(patch / side) + 1) + ", column " + (patch % side + 1);

  // What is chosen: a word's map where the kind has one for each word, else the only one.
  function current() {
    const kind = data.kinds[state.kind];
    if (!kind) return null;
    const layer = Math.min(state.layer, kind.maps.length - 1), row = kind.maps[layer];
    return {kind, layer, map: row[kind.words ? state.word + 1 : 0]};
  }

  // How alike all patches are to one: its pairs stand in the lower triangle. The patch itself, which is most like
  // itself, has no say in the colours.
  function likeness(patch) {
    const pair = (i, j) => i < j ? pair(j, i) : i * (i + 1) / 2 + j;
    const steps = Array.from({length: side * side}, (_, other) => alike.values[pair(patch, other)]);
    const others = steps.filter((_, other) => other !== patch);
    const low = Math.min(...others, 255), high = Math.max(...others, low + 1);
    const value = step => alike.low + (alike.high - alike.low) * step / 255;
    const values = Uint8Array.from(steps, step => 255 * Math.min(1, (step - low) / (high - low)));
    return {low: value(low), high: value(high), values, title: alike.title + " " + placed(patch)};
  }

  // A word that is pointed at or held keeps its own map.
  const followed = () => alike && $("follow").checked && state.patch >= 0 && state.word < 0;

  function caption({kind, layer}) {
    const word = state.word < 0 ? "the whole answer" : "\\u201c" + data.words[state.word] + "\\u201d";
    return kind.title + (kind.words ? ", " + word : "") + (kind.layers ? ", " + kind.layers[layer] : "");
  }

  // Values between the middles of patches are mixed from the four around.
  function paint() {
    const shown = current();
    const width = canvas.width = Math.max(1, Math.min(640, canvas.clientWidth)), height = canvas.height =
      Math.max(1, Math.min(640, canvas.clientHeight));
    if (!shown) return;
    const {kind, layer} = shown, map = followed() ? likeness(state.patch) : shown.map;
    const image = context.createImageData(width, height);
    const strength = $("strength").value / 100;
    const between = (place, size) => {
      const at = Math.min(Math.max((place + 0.5) * side / size - 0.5, 0), side - 1), low = Math.floor(at);
      return [low, Math.min(low + 1, side - 1), at - low];
    };
    const across = Array.from({length: width}, (_, x) => between(x, width));
    const table = Array.from({length: 256}, (_, i) => color(i / 255));
    for (let y = 0; y < height; y++) {
      const [top, bottom, v] = between(y, height);
      for (let x = 0; x < width; x++) {
        const [left, right, u] = across[x];
        const upper = map.values[top * side + left] * (1 - u) + map.values[top * side + right] * u;
        const lower = map.values[bottom * side + left] * (1 - u) + map.values[bottom * side + right] * u;
        const value = upper * (1 - v) + lower * v, rgb = table[Math.round(value)], at = 4 * (y * width + x);
        image.data[at] = rgb[0]; image.data[at + 1] = rgb[1]; image.data[at + 2] = rgb[2];
        image.data[at + 3] = 255 * Math.min(1, strength * (0.75 + 0.5 * value / 255));
      }
    }
    context.putImageData(image, 0, 0);
    $("low").textContent = show(map.low);
    $("high").textContent = show(map.high);
    $("caption").textContent = map.title || caption(shown);
    $("layers").hidden = !kind.layers;
    if (kind.layers) {
      $("layer").max = kind.layers.length - 1;
      $("layer-name").textContent = kind.layers[layer];
    }
    words.forEach((word, i) => {
      word.classList.toggle("on", kind.words && i === state.word);
      word.classList.toggle("held", i === state.heldWord);
      word.setAttribute("aria-pressed", i === state.heldWord);
    });
  }

  function ranked(row, entries) {
    const td = element("td", undefined, row);
    for (const [text, score] of entries) {
      const span = element("span", data.texts[text], td);
      element("small", show(score), span);
    }
  }

  // The words that each layer would say in place of a word: of its one token several, else one for each.
  function describeWord(line) {
    const [start, stop] = data.spans[state.word];
    $("patch-title").textContent = "Said in place of \\u201c" + data.words[state.word] + "\\u201d";
    data.after.forEach((layer, i) => {
      const tokens = layer.slice(start, stop);
      ranked(line(where(i)), tokens.length > 1 ? tokens.map(token => token[0]) : tokens[0]);
    });
  }

  const where = i => i ? "after layer " + i : "before layer 1";

  function describe() {
    const patch = state.patch, shown = current(), panel = $("patch");
    const word = data.after && state.word >= 0 && (patch < 0 || state.word !== state.heldWord);
    cell.hidden = patch < 0;
    panel.replaceChildren();
    $("hint").hidden = patch >= 0 || word;
    $("patch-title").textContent = "Word or patch";
    if (patch < 0 && !word) return;
    const table = element("table", undefined, panel);
    const line = (name, value) => {
      const tr = element("tr", undefined, table);
      element("th", name, tr).scope = "row";
      if (value !== undefined) element("td", value, tr);
      return tr;
    };
    if (word) return describeWord(line);
    const row = Math.floor(patch / side), column = patch % side, part = 100 / side;
    const places = {left: column * part, top: row * part, width: part, height: part};
    for (const name in places) cell.style[name] = places[name] + "%";
    $("patch-title").textContent = "Patch " + placed(patch);
    if (shown) {
      const {low, high, values} = shown.map;
      line(shown.kind.name.toLowerCase(), show(low + (high - low) * values[patch] / 255));
    }
    if (shown.kind.name !== "Norms") line("norm", show(data.norms[patch]));
    if (data.nearest) ranked(line("nearest words"), data.nearest[patch]);
    if (data.said) data.said.forEach((layer, i) => ranked(line(where(i)), layer[patch]));
  }

  function refresh() { paint(); describe(); }

  data.kinds.forEach((kind, i) => {
    const label = element("label", undefined, $("kinds")), input = element("input", undefined, label);
    Object.assign(input, {type: "radio", name: "kind", checked: i === 0});
    label.append(kind.name);
    input.addEventListener("change", () => { state.kind = i; refresh(); });
  });
  $("layer").value = 0;
  $("layer").addEventListener("input", event => { state.layer = Number(event.target.value); refresh(); });
  $("strength").addEventListener("input", paint);
  $("follow").addEventListener("change", refresh);
  $("follow-row").hidden = !alike;

  // Words: pointing and focus show their map, a click holds it.
  const perWord = data.kinds.findIndex(kind => kind.words);
  words.forEach((word, i) => {
    const enter = () => { state.word = i; refresh(); };
    const leave = () => { state.word = state.heldWord; refresh(); };
    word.addEventListener("pointerenter", enter);
    word.addEventListener("focus", enter);
    word.addEventListener("pointerleave", leave);
    word.addEventListener("blur", leave);
    word.addEventListener("click", () => {
      state.heldWord = state.heldWord === i ? -1 : i;
      state.word = state.heldWord;
      if (state.heldWord >= 0 && perWord >= 0 && !data.kinds[state.kind].words) {
        state.kind = perWord;
        $("kinds").querySelectorAll("input")[perWord].checked = true;
      }
      refresh();
    });
  });

  // Patches: pointing shows them, a click holds one and lets go of the word, arrow keys walk.
  const point = patch => {
    if (patch === state.patch) return;
    state.patch = patch;
    refresh();
  };
  const at = event => {
    const box = canvas.getBoundingClientRect();
    const place = (value, size) => Math.min(side - 1, Math.max(0, Math.floor(value / size * side)));
    return place(event.clientY - box.top, box.height) * side + place(event.clientX - box.left, box.width);
  };
  canvas.tabIndex = 0;
  canvas.setAttribute("role", "application");
  canvas.setAttribute("aria-label", "Patches of the picture: arrow keys walk from one to the next");
  canvas.addEventListener("pointermove", event => point(at(event)));
  canvas.addEventListener("pointerleave", () => point(state.heldPatch));
  canvas.addEventListener("click", event => {
    const patch = at(event);
    state.heldPatch = state.heldPatch === patch ? -1 : patch;
    Object.assign(state, {patch, word: -1, heldWord: -1});
    refresh();
  });
  canvas.addEventListener("keydown", event => {
    const step = {ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0]}[event.key];
    if (!step) return;
    event.preventDefault();
    const clamp = value => Math.min(side - 1, Math.max(0, value));
    const row = clamp(Math.floor(state.patch / side) + step[0]), column = clamp(state.patch % side + step[1]);
    state.heldPatch = state.patch < 0 ? 0 : row * side + column;
    point(state.heldPatch);
  });
  document.addEventListener("keydown", event => {
    if (event.key !== "Escape") return;
    Object.assign(state, {word: -1, heldWord: -1, patch: -1, heldPatch: -1});
    refresh();
  });

  document.querySelectorAll(".controls, .patch, .legend").forEach(part => { part.hidden = false; });
  if (!data.kinds.length) document.querySelectorAll(".controls, .legend").forEach(part => { part.hidden = true; });
  new ResizeObserver(paint).observe(canvas);
  refresh();
})();
"""
