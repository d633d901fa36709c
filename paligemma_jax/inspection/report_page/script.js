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
    const at = share * (palette.length - 1), low = Math.min(Math.floor(at), palette.length - 2);
    return palette[low].map((v, i) => v + (palette[low + 1][i] - v) * (at - low));
  };
  const show = value => value && Math.abs(value) < 1e-3 ? value.toExponential(1) : String(Number(value.toPrecision(3)));
  const element = (name, text, parent) => {
    const made = document.createElement(name);
    if (text !== undefined) made.textContent = text;
    if (parent) parent.append(made);
    return made;
  };

  const pairs = data.patch_similarity;
  if (pairs) pairs.values = bytes(pairs.values);
  const position = patch => "in row " + (Math.floor(patch / side) + 1) + ", column " + (patch % side + 1);

  // The selected map: of a word where the kind has one for each word, else the only one.
  function current() {
    const kind = data.kinds[state.kind];
    if (!kind) return null;
    const layer = Math.min(state.layer, kind.maps.length - 1), row = kind.maps[layer];
    return {kind, layer, map: row[kind.words ? state.word + 1 : 0]};
  }

  // Similarity of all patches to one, from the lower triangle of the matrix. The patch itself, always most similar,
  // does not set the range of the colours.
  function similarityTo(patch) {
    const pair = (i, j) => i < j ? pair(j, i) : i * (i + 1) / 2 + j;
    const levels = Array.from({length: side * side}, (_, other) => pairs.values[pair(patch, other)]);
    const others = levels.filter((_, other) => other !== patch);
    const low = Math.min(...others, 255), high = Math.max(...others, low + 1);
    const value = level => pairs.low + (pairs.high - pairs.low) * level / 255;
    const values = Uint8Array.from(levels, level => 255 * Math.min(1, (level - low) / (high - low)));
    return {low: value(low), high: value(high), values, title: pairs.title + " " + position(patch)};
  }

  // A word that is pointed at or held keeps its own map.
  const followed = () => pairs && $("follow").checked && state.patch >= 0 && state.word < 0;

  function caption({kind, layer}) {
    const word = state.word < 0 ? "the whole answer" : "\u201c" + data.words[state.word] + "\u201d";
    return kind.title + (kind.words ? ", " + word : "") + (kind.layers ? ", " + kind.layers[layer] : "");
  }

  // Bilinear interpolation between the centres of patches.
  function paint() {
    const shown = current();
    const width = canvas.width = Math.max(1, Math.min(640, canvas.clientWidth)), height = canvas.height =
      Math.max(1, Math.min(640, canvas.clientHeight));
    if (!shown) return;
    const {kind, layer} = shown, map = followed() ? similarityTo(state.patch) : shown.map;
    const image = context.createImageData(width, height);
    const strength = $("strength").value / 100;
    const between = (pixel, size) => {
      const at = Math.min(Math.max((pixel + 0.5) * side / size - 0.5, 0), side - 1), low = Math.floor(at);
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
    $("unit").textContent = map.title ? "cosine" : kind.unit;
    $("caption").textContent = map.title || caption(shown);
    $("layers").hidden = !kind.layers;
    if (kind.layers) {
      $("layer").max = kind.layers.length - 1;
      $("layer-name").textContent = kind.layers[layer];
    }
    words.forEach((word, i) => {
      word.classList.toggle("on", Boolean(kind.words) && i === state.word);
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

  // The logit lens at a word: several tokens of each layer for a word of one token, else one for each of its tokens.
  function describeWord(line) {
    const [start, stop] = data.spans[state.word];
    $("patch-title").textContent = "Said in place of \u201c" + data.words[state.word] + "\u201d";
    const location = data.locations[state.word];
    if (location) line("means", location.text);
    data.text_lens.forEach((layer, i) => {
      const tokens = layer.slice(start, stop);
      ranked(line(where(i)), tokens.length > 1 ? tokens.map(token => token[0]) : tokens[0]);
    });
  }

  const where = i => i ? "after layer " + i : "before layer 1";

  // A location is shown as the edge of the box that it is.
  function showEdge() {
    const location = data.locations[state.word], edge = $("edge");
    edge.hidden = !location;
    if (!location) return;
    const across = location.edge % 2 === 0;
    edge.className = across ? "across" : "down";
    edge.style.top = across ? "calc(" + 100 * location.share + "% - 1px)" : "";
    edge.style.left = across ? "" : "calc(" + 100 * location.share + "% - 1px)";
  }

  function describe() {
    showEdge();
    const patch = state.patch, shown = current(), panel = $("patch");
    const word = data.text_lens && state.word >= 0 && (patch < 0 || state.word !== state.heldWord);
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
    const bounds = {left: column * part, top: row * part, width: part, height: part};
    for (const name in bounds) cell.style[name] = bounds[name] + "%";
    $("patch-title").textContent = "Patch " + position(patch);
    if (shown) {
      const {low, high, values} = shown.map;
      line(shown.kind.name.toLowerCase(), show(low + (high - low) * values[patch] / 255));
    }
    if (shown.kind.name !== "Norms") line("norm", show(data.norms[patch]));
    if (data.nearest) ranked(line("nearest words"), data.nearest[patch]);
    if (data.patch_lens) data.patch_lens.forEach((layer, i) => ranked(line(where(i)), layer[patch]));
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
  const objects = $("objects");
  $("objects-row").hidden = !objects;
  $("about-locations").hidden = !data.locations.some(Boolean);
  if (objects) {
    $("show-objects").addEventListener("change", event => { objects.style.display = event.target.checked ? "" : "none"; });
  }
  $("follow-row").hidden = !pairs;

  // Words: hovering and focus show their map, a click holds it.
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

  // Patches: hovering shows them, a click holds one and releases the word, arrow keys move.
  const point = patch => {
    if (patch === state.patch) return;
    state.patch = patch;
    refresh();
  };
  const at = event => {
    const box = canvas.getBoundingClientRect();
    const index = (value, size) => Math.min(side - 1, Math.max(0, Math.floor(value / size * side)));
    return index(event.clientY - box.top, box.height) * side + index(event.clientX - box.left, box.width);
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
