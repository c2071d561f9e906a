//! LACE in Rust: copy `Options`, `lace` and `row`; they need the standard library only. The rest answers the checker.
//!
//!     let (loss, gradient) = lace(&logits, &Target::Classes(&[1, 0]), &Options::default())?;
//!
//! Certified at the levels core, gradient, batch, layout, large and rows. It computes in f64. Results for f32 data are
//! within the exact tolerances; for f64 within the plain ones, where an error may grow with the margin:
//!
//!     rustc -O --edition 2021 -o port ref/ports/lace.rs
//!     python -m lace_loss.ref check --command ./port --levels core gradient batch layout large rows --dtypes f32
//!     python -m lace_loss.ref check --command ./port --levels core gradient batch layout large rows --dtypes f64 --plain

use std::collections::HashMap;
use std::io::{stdin, Read};

#[derive(PartialEq)]
pub enum Reduction { None, Mean, Sum }

pub enum Target<'a> {
    Classes(&'a [i64]),
    /// Of every class in every row.
    Probabilities(&'a [Vec<f64>]),
}

/// As in PyTorch; `strength` 1 is LACE, 0 cross entropy. `grad_output` multiplies the gradient: one number, or one a row.
pub struct Options {
    pub weight: Option<Vec<f64>>,
    pub ignore_index: i64,
    pub reduction: Reduction,
    pub label_smoothing: f64,
    pub strength: f64,
    pub grad_output: Vec<f64>,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            weight: None,
            ignore_index: -100,
            reduction: Reduction::Mean,
            label_smoothing: 0.0,
            strength: 1.0,
            grad_output: vec![1.0],
        }
    }
}

/// Loss (one value, or without a reduction one a row) and gradient of rows of logits; or which row's class does not exist.
pub fn lace(logits: &[Vec<f64>], target: &Target, o: &Options) -> Result<(Vec<f64>, Vec<Vec<f64>>), usize> {
    let (mut losses, mut gradient, mut divisor) = (vec![], vec![], 0.0);
    for (i, z) in logits.iter().enumerate() {
        let w = |k: usize| o.weight.as_ref().map_or(1.0, |w| w[k]);
        let y: Vec<f64> = match target {
            Target::Classes(t) if t[i] == o.ignore_index => {
                losses.push(0.0);
                gradient.push(vec![]);
                continue;
            }
            Target::Classes(t) => {
                let class = usize::try_from(t[i]).ok().filter(|&t| t < z.len()).ok_or(i)?;
                divisor += w(class);
                (0..z.len()).map(|k| f64::from(k == class)).collect()
            }
            Target::Probabilities(y) => {
                divisor += 1.0;
                y[i].clone()
            }
        };
        let e = o.label_smoothing;
        let a: Vec<f64> = (0..z.len()).map(|k| ((1.0 - e) * y[k] + e / z.len() as f64) * w(k)).collect();
        let (l, g) = row(z, &a, o.strength);
        losses.push(l);
        gradient.push(g);
    }
    if o.reduction != Reduction::Mean {
        divisor = 1.0;
    }
    for (i, g) in gradient.iter_mut().enumerate() {
        let factor = o.grad_output[i % o.grad_output.len()] / divisor;
        g.iter_mut().for_each(|g| *g *= factor);
        g.resize(logits[i].len(), 0.0); // ignored: exactly 0
    }
    if o.reduction != Reduction::None {
        losses = vec![losses.iter().sum::<f64>() / divisor];
    }
    Ok((losses, gradient))
}

/// sum_k a_k f_k of one row, f_k = ((1-s) + s (1 - q_k)) (-log q_k), and its gradient. Nothing is formed as 1 - q, log q or
/// q - 1 where that cancels: the largest class is left out of the sum by its index.
fn row(z: &[f64], a: &[f64], s: f64) -> (f64, Vec<f64>) {
    let top = (0..z.len()).fold(0, |top, j| if z[j] > z[top] || z[j].is_nan() { j } else { top });
    let max = if z[top].is_finite() { z[top] } else { f64::NAN };
    let e: Vec<f64> = z.iter().enumerate().map(|(j, x)| if j == top { 0.0 } else { (x - max).exp() }).collect();
    let rest: f64 = e.iter().sum();
    let (mut q, mut ak) = (vec![0.0; z.len()], vec![0.0; z.len()]);
    let (mut r, mut loss, mut most) = (q.clone(), 0.0, 0);
    for k in 0..z.len() {
        q[k] = if k == top { 1.0 } else { e[k] } / (1.0 + rest);
        r[k] = if k == top { rest / (1.0 + rest) } else { 1.0 - q[k] };
        let n = max - z[k] + rest.ln_1p();
        let f = ((1.0 - s) + s * r[k]) * n;
        loss += if a[k] == 0.0 && f.is_infinite() { 0.0 } else { a[k] * f };
        ak[k] = a[k] * ((1.0 - s) + s * (r[k] + if q[k] == 0.0 { 0.0 } else { q[k] * n }));
        most = if ak[k].abs() > ak[most].abs() { k } else { most };
    }
    let others: f64 = (0..z.len()).filter(|&k| k != most).map(|k| ak[k]).sum(); // without the largest entry
    let rest_of = |j: usize| if j == most { others } else { others - ak[j] + ak[most] };
    let gradient = (0..z.len()).map(|j| q[j] * rest_of(j) - r[j] * ak[j]).collect();
    (loss, gradient)
}

// The protocol of ref/vectors/README.md.

fn decode(word: &str) -> f64 {
    match (word, word.len()) {
        ("nan", _) => f64::NAN,
        (_, 8) => f32::from_bits(u32::from_str_radix(word, 16).unwrap()).into(),
        _ => f64::from_bits(u64::from_str_radix(word, 16).unwrap()),
    }
}

fn encode(x: f64, single: bool) -> String {
    if single { format!(" {:08x}", (x as f32).to_bits()) } else { format!(" {:016x}", x.to_bits()) }
}

fn logits(case: &HashMap<&str, Vec<&str>>, count: usize) -> Vec<f64> {
    if let Some(words) = case.get("logits") {
        return words.iter().map(|w| decode(w)).collect();
    }
    let lcg: Vec<i64> = case["lcg"].iter().map(|w| w.parse().unwrap()).collect();
    let mut x = lcg[0] as u32;
    let mut next = || {
        x = x.wrapping_mul(1664525).wrapping_add(1013904223);
        f64::from((x / 256) as i32 - (1 << 23)) * 2f64.powi(lcg[1] as i32)
    };
    let mut z: Vec<f64> = (0..count).map(|_| next()).collect();
    if let Some(put) = case.get("put") {
        z[put[0].parse::<usize>().unwrap()] = decode(put[1]);
    }
    z
}

fn answer(case: &HashMap<&str, Vec<&str>>, single: bool) -> String {
    let shape: Vec<usize> = case["shape"].iter().map(|w| w.parse().unwrap()).collect();
    let count: usize = shape.iter().product();
    let classes = shape[usize::from(shape.len() > 1)];
    let space: usize = shape.iter().skip(2).product();
    // Where in the file's order class j of sample i is.
    let place = |i: usize, j: usize| (i / space * classes + j) * space + i % space;
    let gather = |x: &[f64], i: usize| (0..classes).map(|j| x[place(i, j)]).collect::<Vec<_>>();
    let rows = |x: &[f64]| (0..x.len() / classes).map(|i| gather(x, i)).collect::<Vec<_>>();
    let z = logits(case, count);
    let values = |key: &str| case.get(key).map(|words| words.iter().map(|w| decode(w)).collect::<Vec<_>>());
    let mut o = Options { weight: values("weight"), ..Options::default() };
    o.ignore_index = case.get("ignore-index").map_or(o.ignore_index, |w| w[0].parse().unwrap());
    o.label_smoothing = values("smoothing").map_or(o.label_smoothing, |x| x[0]);
    o.strength = values("strength").map_or(o.strength, |x| x[0]);
    o.grad_output = values("grad-output").unwrap_or(o.grad_output);
    o.reduction = match case["reduction"][0] {
        "none" => Reduction::None,
        "mean" => Reduction::Mean,
        _ => Reduction::Sum,
    };
    let probabilities = rows(&values("probabilities").unwrap_or_default());
    let target: Vec<i64> = case.get("target").map_or(vec![], |t| t.iter().map(|w| w.parse().unwrap()).collect());
    let target = if case.contains_key("target") { Target::Classes(&target) } else { Target::Probabilities(&probabilities) };
    let (loss, gradient) = match lace(&rows(&z), &target, &o) {
        Ok(found) => found,
        Err(_) => return "error".to_string(),
    };
    let mut flat = vec![0.0; count];
    for (i, row) in gradient.iter().enumerate() {
        (0..classes).for_each(|j| flat[place(i, j)] = row[j]);
    }
    let asked: Vec<f64> = match case.get("at") {
        Some(at) => at.iter().map(|w| flat[w.parse::<usize>().unwrap()]).collect(),
        None => flat,
    };
    let line = |key: &str, x: &[f64]| key.to_string() + &x.iter().map(|&x| encode(x, single)).collect::<String>();
    format!("{}\n{}", line("loss", &loss), line("gradient", &asked))
}

fn main() {
    let mut text = String::new();
    stdin().read_to_string(&mut text).unwrap();
    let (mut case, mut single) = (HashMap::new(), false);
    for line in text.lines() {
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        let key = words[0];
        case.insert(key, words[1..].to_vec());
        match key {
            "dtype" => single = case["dtype"][0] == "f32",
            "end" => {
                println!("case {}\n{}\nend", case["case"][0], answer(&case, single));
                case.clear();
            }
            _ => {}
        }
    }
}
