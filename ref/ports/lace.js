/* LACE in JavaScript: copy the functions `lace` and `row`; they need no package. The rest answers the checker, in Node.
 *
 *     const { loss, gradient } = lace([[1, 4, 2], [0, 5, 0]], [1, 0]);
 *
 * Certified at the levels core, gradient, batch, layout, large and rows. It computes in float64. Results for float32 data
 * are within the exact tolerances; for float64 within the plain ones, where an error may grow with the margin:
 *
 *     python -m lace_loss.ref check --command 'node ref/ports/lace.js' --levels core gradient batch layout large rows \
 *         --dtypes f32          and again with --dtypes f64 --plain
 */
"use strict";

const DEFAULTS = {
  weight: undefined, ignoreIndex: -100, reduction: "mean", labelSmoothing: 0, strength: 1, gradOutput: 1,
};

/* Loss and gradient of rows of logits (arrays of any kind). A target is a class (a number or a BigInt) or an array of the
 * classes' probabilities.
 * Options as in PyTorch: weight, ignoreIndex, reduction "mean", "sum" or "none", labelSmoothing; and strength (1 is LACE,
 * 0 cross entropy) and gradOutput, which multiplies the gradient: a number, or for "none" one a row. */
function lace(logits, targets, options = {}) {
  const unknown = Object.keys(options).find((name) => !Object.hasOwn(DEFAULTS, name));
  if (unknown !== undefined) throw new TypeError(`there is no option ${unknown}: ${Object.keys(DEFAULTS).join(", ")}`);
  const { weight, ignoreIndex, reduction, labelSmoothing, strength, gradOutput } = { ...DEFAULTS, ...options };
  if (!["none", "mean", "sum"].includes(reduction)) throw new RangeError(`reduction is ${reduction}: none, mean or sum`);
  if (targets.length !== logits.length) throw new RangeError(`${targets.length} targets for ${logits.length} rows`);
  let divisor = 0;
  const rows = Array.from(logits, (z, i) => {
    const t = targets[i], hard = typeof t === "number" || typeof t === "bigint", w = (k) => (weight ? weight[k] : 1);
    if (!hard && (typeof t !== "object" || t === null || t.length !== z.length))
      throw new TypeError(`target ${i} must be a number, a BigInt or ${z.length} probabilities, got ${t}`);
    if (hard && t == ignoreIndex) return { loss: 0, gradient: null }; // == compares a BigInt with a number exactly
    if (hard && z[t] === undefined) throw new RangeError(`target ${i} is ${t}, not a class: 0 to ${z.length - 1}`);
    divisor += hard ? w(t) : 1;
    const y = (k) => (hard ? Number(k == t) : t[k]);
    const a = Array.from(z, (_, k) => ((1 - labelSmoothing) * y(k) + labelSmoothing / z.length) * w(k));
    return row(z, a, strength);
  });
  if (reduction !== "mean") divisor = 1;
  const factor = (i) => (typeof gradOutput === "number" ? gradOutput : gradOutput[i]) / divisor;
  const losses = rows.map((r) => r.loss);
  return {
    loss: reduction === "none" ? losses : losses.reduce((sum, loss) => sum + loss, 0) / divisor,
    gradient: rows.map((r, i) => Array.from(logits[i], (_, j) => (r.gradient ? r.gradient[j] * factor(i) : 0))),
  };
}

/* sum_k a_k f_k of one row, f_k = ((1-s) + s (1 - q_k)) (-log q_k), and its gradient. Nothing is formed as 1 - q, log q or
 * q - 1 where that cancels: the largest class is left out of the sum by its index. */
function row(z, a, s) {
  const largest = z.reduce((x, y) => Math.max(x, y)); // NaN if there is one
  const top = z.indexOf(largest), max = Number.isFinite(largest) ? largest : NaN;
  const e = Array.from(z, (x, j) => (j === top ? 0 : Math.exp(x - max)));
  const rest = e.reduce((x, y) => x + y), logSum = Math.log1p(rest);
  const q = e.map((x, j) => (j === top ? 1 : x) / (1 + rest));
  const r = q.map((x, j) => (j === top ? rest / (1 + rest) : 1 - x));
  const n = Array.from(z, (x) => max - x + logSum);
  const f = n.map((x, k) => (1 - s + s * r[k]) * x);
  const ak = a.map((x, k) => x * (1 - s + s * (r[k] + (q[k] === 0 ? 0 : q[k] * n[k]))));
  let most = 0, others = 0; // the sum of ak without its largest entry
  ak.forEach((x, k) => { if (Math.abs(x) > Math.abs(ak[most])) most = k; });
  ak.forEach((x, k) => { if (k !== most) others += x; });
  return {
    loss: f.reduce((sum, x, k) => sum + (a[k] === 0 && x === Infinity ? 0 : a[k] * x), 0),
    gradient: q.map((x, j) => x * (j === most ? others : others - ak[j] + ak[most]) - r[j] * ak[j]),
  };
}

module.exports = { lace };

/* The protocol of ref/vectors/README.md. */
function answer(words, bytes) {
  const view = new DataView(new ArrayBuffer(8));
  const decode = (word, size = bytes) => {
    if (word === "nan") return NaN;
    view.setBigUint64(0, BigInt("0x" + word) << BigInt(64 - 8 * size));
    return size === 4 ? view.getFloat32(0) : view.getFloat64(0);
  };
  const encode = (x) => {
    if (bytes === 4) view.setFloat32(0, x);
    else view.setFloat64(0, x);
    return view.getBigUint64(0).toString(16).padStart(16, "0").slice(0, 2 * bytes);
  };
  const list = (key) => words[key] && words[key].map((word) => decode(word));
  const shape = words.shape.map(Number), space = shape.slice(2).reduce((x, y) => x * y, 1);
  const [samples, classes] = shape.length === 1 ? [1, shape[0]] : [shape[0] * space, shape[1]];
  // Where in the file's order class j of sample i is.
  const place = (i, j) => (Math.floor(i / space) * classes + j) * space + (i % space);
  const rowsOf = (x) => Array.from({ length: samples }, (_, i) => Array.from({ length: classes }, (_, j) => x[place(i, j)]));
  let z = list("logits");
  if (!z) {
    let [x, power] = words.lcg.map(Number);
    z = Array.from({ length: samples * classes }, () => {
      x = Number((1664525n * BigInt(x) + 1013904223n) % 4294967296n);
      return (Math.floor(x / 256) - 2 ** 23) * 2 ** power;
    });
    if (words.put) z[Number(words.put[0])] = decode(words.put[1]);
  }
  const given = list("grad-output"), reduction = words.reduction[0];
  const options = { weight: list("weight"), reduction };
  if (words["ignore-index"]) options.ignoreIndex = Number(words["ignore-index"][0]);
  if (words.smoothing) options.labelSmoothing = decode(words.smoothing[0], 8);
  if (words.strength) options.strength = decode(words.strength[0], 8);
  if (given) options.gradOutput = reduction === "none" ? given : given[0];
  const targets = words.probabilities ? rowsOf(list("probabilities")) : words.target.map(Number);
  let found;
  try {
    found = lace(rowsOf(z), targets, options);
  } catch (error) {
    if (error instanceof RangeError) return "error";
    throw error;
  }
  const gradient = [];
  found.gradient.forEach((row, i) => row.forEach((x, j) => { gradient[place(i, j)] = x; }));
  const asked = words.at ? words.at.map((j) => gradient[j]) : gradient;
  return [["loss", ...[found.loss].flat().map(encode)], ["gradient", ...asked.map(encode)]].map((line) => line.join(" ")).join("\n");
}

if (require.main === module) {
  let words = {}, bytes = 0;
  for (const line of require("fs").readFileSync(0, "latin1").split("\n")) {
    const [key, ...rest] = line.split(" ").filter((word) => word !== "");
    words[key] = rest;
    if (key === "dtype") bytes = rest[0] === "f32" ? 4 : 8;
    if (key === "end") {
      console.log(`case ${words.case[0]}\n${answer(words, bytes)}\nend`);
      words = {};
    }
  }
}
