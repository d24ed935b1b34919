"use strict";
// The viewer of a run: slices with picks and truth, the score above a confidence, and all centres in space. It uses
// nothing but the page that viewer.html makes of it; tests/figures/test_viewer.py runs `score` and the page.
//
// `data` is what viewer.py writes. Coordinates are x, y, z in Angstrom; canvases have x to the right and y upwards.

const BETA = 4;

/** For each true particle, the highest confidence of a pick of its type that is near enough to find it, or -1. */
function findBest(data) {
  return data.truth.type.map((type, t) => {
    const reach = data.particles[type].radius * data.matchFraction;
    let best = -1;
    data.picks.type.forEach((other, p) => {
      if (other !== type || !isNear(data.picks.xyz[p], data.truth.xyz[t], reach)) return;
      best = Math.max(best, data.picks.confidence[p]);
    });
    return best;
  });
}

function isNear([x, y, z], [u, v, w], reach) {
  return (x - u) ** 2 + (y - v) ** 2 + (z - w) ** 2 <= reach ** 2;
}

/** The competition's score of the picks with at least this confidence: {rows, mean}, a row for each particle. As in the
 * kit's `score_submission`, a particle without truth has zeros, and picks beyond the first on a particle are false. */
function score(data, best, threshold) {
  const rows = data.particles.map((particle, type) => {
    const isOwn = (other) => other === type;
    const picks = data.picks.type.filter((other, p) => isOwn(other) && data.picks.confidence[p] >= threshold).length;
    const truth = data.truth ? data.truth.type.filter(isOwn).length : 0;
    if (!truth) return { picks, truth, hits: 0, wrong: 0, missed: 0, fBeta: 0 };
    const hits = best.filter((confidence, t) => isOwn(data.truth.type[t]) && confidence >= threshold).length;
    const fBeta = ((1 + BETA ** 2) * hits) / (BETA ** 2 * truth + picks);
    return { picks, truth, hits, wrong: picks - hits, missed: truth - hits, fBeta };
  });
  const total = data.particles.reduce((sum, particle) => sum + particle.weight, 0);
  const weighted = rows.reduce((sum, row, type) => sum + row.fBeta * data.particles[type].weight, 0);
  return { rows, mean: total ? weighted / total : 0 };
}

/** Whether each pick is near enough to a true particle of its type to find it. */
function findRight(data) {
  return data.picks.type.map((type, p) => {
    const reach = data.particles[type].radius * data.matchFraction;
    return data.truth.type.some((other, t) => other === type && isNear(data.picks.xyz[p], data.truth.xyz[t], reach));
  });
}

/** The radius of the circle in which a plane at height z cuts a sphere, or 0. */
function cutSphere(radius, centre, z) {
  return Math.sqrt(Math.max(0, radius ** 2 - (centre - z) ** 2));
}

/** Turn a point about the vertical axis of the screen by `turn`, then tilt it towards the reader: right, up, near. */
function project([x, y, z], turn, tilt) {
  const right = x * Math.cos(turn) - y * Math.sin(turn);
  const back = x * Math.sin(turn) + y * Math.cos(turn);
  return [right, z * Math.cos(tilt) + back * Math.sin(tilt), z * Math.sin(tilt) - back * Math.cos(tilt)];
}

/** Fit a canvas to its place on the page; return its context, in which a unit is a pixel of the page, and its size. */
function prepare(canvas) {
  const { width, height } = canvas.getBoundingClientRect();
  const dots = window.devicePixelRatio || 1;
  canvas.width = Math.round(width * dots);
  canvas.height = Math.round(height * dots);
  const context = canvas.getContext("2d");
  context.setTransform(dots, 0, 0, dots, 0, 0);
  return [context, width, height];
}

function start(data) {
  const find = (id) => document.getElementById(id);
  const slices = data.slices.map((source) => {
    const image = new Image();
    image.src = source;
    return image;
  });
  const best = data.truth ? findBest(data) : [];
  const right = data.truth ? findRight(data) : [];
  // Confidences crowd near 0 or 1, so a step of the slider is the next pick, not the same amount.
  const steps = [...new Set([0, ...data.picks.confidence])].sort((a, b) => a - b);
  const state = { slice: data.first, step: 0, turn: 0.6, tilt: 0.4, hidden: new Set(), truth: true, picks: true };
  const [depth, height, width] = data.shape;
  const extent = [width, height, depth].map((size) => size * data.spacing);
  const isShown = (type) => !state.hidden.has(type);
  const heightOf = (slice) => slice * data.step * data.spacing;

  function drawSlice() {
    const [context, across, down] = prepare(find("slice"));
    const scale = across / extent[0];
    // The first voxel's centre is at 0, so its edge is half a voxel before.
    const place = ([x, y]) => [(x + data.spacing / 2) * scale, down - (y + data.spacing / 2) * scale];
    const image = slices[state.slice];
    const [covered, risen] = data.covered.map((size) => size * data.spacing * scale);
    if (image.complete && image.naturalWidth) context.drawImage(image, 0, down - risen, covered, risen);
    else image.onload = drawSlice;
    const z = heightOf(state.slice);
    const circle = (type, xyz, isWhole) => {
      const radius = cutSphere(data.particles[type].radius, xyz[2], z) * scale;
      if (!radius) return;
      context.setLineDash(isWhole ? [] : [5, 4]);
      stroke(context, data.particles[type].colour, 1.8, () => context.arc(...place(xyz), radius, 0, 2 * Math.PI));
      context.setLineDash([]);
    };
    eachTrue((type, xyz, t) => circle(type, xyz, best[t] >= steps[state.step]));
    eachPick((type, xyz, p) => {
      if (!data.truth) circle(type, xyz, true);
      if (!cutSphere(data.particles[type].radius, xyz[2], z)) return;
      const [x, y] = place(xyz);
      const [long, short] = data.truth && !right[p] ? [7, 0] : [5, 5];  // + for a wrong pick, else ×
      stroke(context, data.particles[type].colour, 2, () => {
        context.moveTo(x - long, y - short);
        context.lineTo(x + long, y + short);
        context.moveTo(x - short, y + long);
        context.lineTo(x + short, y - long);
      });
    });
    drawBar(context, down, scale);
  }

  function eachTrue(draw) {
    if (!data.truth || !state.truth) return;
    data.truth.type.forEach((type, t) => isShown(type) && draw(type, data.truth.xyz[t], t));
  }

  function eachPick(draw) {
    if (!state.picks) return;
    data.picks.type.forEach((type, p) => {
      if (isShown(type) && data.picks.confidence[p] >= steps[state.step]) draw(type, data.picks.xyz[p], p);
    });
  }

  /** A scale bar of a round number of nanometres, about a fifth of the picture. */
  function drawBar(context, down, scale) {
    const wanted = extent[0] / 50;
    const unit = 10 ** Math.floor(Math.log10(wanted));
    const length = unit * [5, 2, 1].find((factor) => factor * unit <= wanted);
    stroke(context, "#000000", 3, () => {
      context.moveTo(12, down - 12);
      context.lineTo(12 + length * 10 * scale, down - 12);
    });
    write(context, `${length} nm`, 12, down - 20);
  }

  function drawSpace() {
    const [context, across, down] = prepare(find("space"));
    const scale = (0.94 * Math.min(across, down)) / Math.hypot(...extent);
    const place = (xyz) => {
      const [x, y, near] = project(xyz.map((value, axis) => value - extent[axis] / 2), state.turn, state.tilt);
      return [across / 2 + x * scale, down / 2 - y * scale, near];
    };
    const z = heightOf(state.slice);
    const [w, h, d] = extent;
    context.strokeStyle = getComputedStyle(document.body).color;
    for (const [level, thickness] of [[0, 0.7], [d, 0.7], [z, 2]]) {
      context.lineWidth = thickness;
      outline(context, [[0, 0, level], [w, 0, level], [w, h, level], [0, h, level]].map(place));
    }
    context.lineWidth = 0.7;
    for (const [x, y] of [[0, 0], [w, 0], [w, h], [0, h]]) outline(context, [[x, y, 0], [x, y, d]].map(place));
    const ink = context.strokeStyle;
    const shapes = [];
    eachTrue((type, xyz) => shapes.push([type, ...place(xyz), false]));
    eachPick((type, xyz) => shapes.push([type, ...place(xyz), true]));
    shapes.sort((a, b) => a[3] - b[3]);  // the far ones first
    for (const [type, x, y, , isPick] of shapes) {
      context.beginPath();
      context.arc(x, y, Math.max(2, data.particles[type].radius * scale), 0, 2 * Math.PI);
      context.fillStyle = data.particles[type].colour;
      context.globalAlpha = 0.55;
      if (isPick) context.fill();
      context.globalAlpha = 1;
      context.strokeStyle = isPick ? ink : data.particles[type].colour;
      context.lineWidth = isPick ? 0.4 : 1.5;
      context.stroke();
    }
  }

  function showCounts() {
    const threshold = steps[state.step];
    const { rows, mean } = score(data, best, threshold);
    rows.forEach((row, type) => {
      const cells = find(`row-${type}`).querySelectorAll("td");
      const counted = [row.fBeta.toFixed(3), row.picks, row.hits, row.missed, row.wrong];
      const known = row.truth ? counted : ["–", row.picks, "–", "–", "–"];
      (data.truth ? known : [row.picks]).forEach((value, i) => (cells[i].textContent = value));
    });
    if (data.truth) find("mean").textContent = mean.toFixed(4);
    find("threshold").textContent = state.step ? `${threshold.toPrecision(3)} and above` : "all picks";
    find("confidence").setAttribute("aria-valuetext", find("threshold").textContent);
  }

  function showHeight() {
    const nanometres = (heightOf(state.slice) / 10).toFixed(1);
    find("height").textContent = `${nanometres} nm, slice ${state.slice * data.step} of ${depth}`;
    find("z").setAttribute("aria-valuetext", find("height").textContent);
  }

  function draw() {
    drawSlice();
    drawSpace();
    showHeight();
    showCounts();
  }

  const listen = (id, most, key) => {
    find(id).max = most;
    find(id).value = state[key];
    find(id).addEventListener("input", () => {
      state[key] = Number(find(id).value);
      draw();
    });
  };
  listen("z", data.slices.length - 1, "slice");
  listen("confidence", steps.length - 1, "step");
  data.particles.forEach((_, type) => {
    find(`type-${type}`).addEventListener("change", (event) => {
      state.hidden[event.target.checked ? "delete" : "add"](type);
      draw();
    });
  });
  for (const id of ["truth", "picks"]) {
    if (!find(id)) continue;
    find(id).addEventListener("change", (event) => {
      state[id] = event.target.checked;
      draw();
    });
  }
  const space = find("space");
  const turn = (about, over) => {
    state.turn += about;
    state.tilt = Math.min(Math.PI / 2, Math.max(-Math.PI / 2, state.tilt + over));
    drawSpace();
  };
  space.addEventListener("pointerdown", (event) => space.setPointerCapture(event.pointerId));
  space.addEventListener("pointermove", (event) => event.buttons && turn(event.movementX / 100, event.movementY / 100));
  const keys = { ArrowLeft: [-0.1, 0], ArrowRight: [0.1, 0], ArrowUp: [0, -0.1], ArrowDown: [0, 0.1] };
  space.addEventListener("keydown", (event) => {
    if (!keys[event.key]) return;
    event.preventDefault();  // else the page would scroll
    turn(...keys[event.key]);
  });
  new ResizeObserver(draw).observe(find("slice"));
  // A frame that is out of sight observes nothing.
  for (const event of ["load", "beforeprint"]) addEventListener(event, draw);
  draw();
}

/** Draw a path with a white border, so that it stands out from a picture. */
function stroke(context, colour, thickness, trace) {
  for (const [style, width] of [["white", thickness + 1.6], [colour, thickness]]) {
    context.beginPath();
    trace();
    context.strokeStyle = style;
    context.lineWidth = width;
    context.stroke();
  }
}

function outline(context, corners) {
  context.beginPath();
  corners.forEach(([x, y]) => context.lineTo(x, y));
  context.closePath();
  context.stroke();
}

function write(context, text, x, y) {
  context.font = "13px sans-serif";
  context.lineWidth = 3;
  context.strokeStyle = "white";
  context.strokeText(text, x, y);
  context.fillStyle = "black";
  context.fillText(text, x, y);
}

if (typeof module !== "undefined") module.exports = { cutSphere, findBest, project, score };
else start(JSON.parse(document.getElementById("data").textContent));
