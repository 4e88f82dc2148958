//! Before the clock: each contender's outputs against the f64 oracle of the tests, within the bounds of the tests.
//!
//! A layer with some of its outputs left out has the same `y` and `dB` at the others; with some of its inputs left out, the same
//! `dA` and `dx`. So the oracle looks at a few outputs and a few inputs, and large shapes take hardly longer than small ones.

use lowrank::{Backend, DType, Float, Tensor};

use crate::bounds::assert_within;
use crate::layer::{Layer, Outputs, SCALE, Verb};
use crate::oracle::{Lora, LoraOut, Mat};

/// What a verb must put out, at some rows and columns of each output.
pub struct Expected {
    what: String,
    dtype: DType,
    parts: Vec<Part>,
}

/// Some rows and columns of an output.
struct Part {
    name: &'static str,
    output: fn(&Outputs) -> &[f32],
    /// Of the whole output.
    width: usize,
    rows: Vec<usize>,
    columns: Vec<usize>,
    want: Mat,
    /// What the same formula gives on magnitudes.
    size: Mat,
    /// How many roundings stand between an input and the result.
    depth: usize,
}

impl Expected {
    pub fn of<B: Backend>(verb: Verb, layer: &Layer<B>) -> Self {
        let (m, k, n, r) = (layer.shape.m, layer.shape.k, layer.shape.n, layer.shape.r);
        let [all_m, all_k, all_n, all_r] = [m, k, n, r].map(|count| (0..count).collect::<Vec<_>>());
        let (few_n, few_k) = (sample(n), sample(k));
        let mut parts = Vec::new();
        let mut expect = |name, output, width, rows: &[usize], columns: &[usize], [want, size]: [Mat; 2], depth| {
            parts.push(Part { name, output, width, rows: rows.to_vec(), columns: columns.to_vec(), want, size, depth });
        };
        match verb {
            Verb::LoraMerge => {
                let part = cut(layer, &[0], &few_k, &few_n);
                let sides = [&part, &part.magnitudes()].map(Lora::merged);
                expect("w", |got| &got.w, k, &few_n, &few_k, sides, r + 2);
            }
            Verb::LinearForward => {
                let part = Lora { scale: 0.0, ..cut(layer, &all_m, &all_k, &few_n) };
                let sides = [&part, &part.magnitudes()].map(|part| part.forward().1);
                expect("y", |got| &got.y, n, &all_m, &few_n, sides, k + 1);
            }
            Verb::LoraForward | Verb::LoraForwardBackward => {
                let part = cut(layer, &all_m, &all_k, &few_n);
                let [LoraOut { y, db, .. }, LoraOut { y: y_size, db: db_size, .. }] = [&part, &part.magnitudes()].map(Lora::run);
                expect("y", |got| &got.y, n, &all_m, &few_n, [y, y_size], k + r + 4);
                if verb == Verb::LoraForwardBackward {
                    expect("db", |got| &got.db, r, &few_n, &all_r, [db, db_size], m + k + 3);
                    let part = cut(layer, &all_m, &few_k, &all_n);
                    let [LoraOut { da, dx, .. }, LoraOut { da: da_size, dx: dx_size, .. }] =
                        [&part, &part.magnitudes()].map(Lora::run);
                    expect("da", |got| &got.da, k, &all_r, &few_k, [da, da_size], m + n + 3);
                    expect("dx", |got| &got.dx, k, &all_m, &few_k, [dx, dx_size], n + r + 5);
                }
            }
        }
        Self { what: format!("{verb}, {}", layer.shape), dtype: B::Elem::DTYPE, parts }
    }

    /// Panics with the first number that is out of bounds. `roundings`: [`Contender::roundings`](crate::layer::Contender).
    pub fn check(&self, name: &str, got: &Outputs, roundings: usize) {
        // Roundings to the element type, counted as so many roundings to f32.
        let stored = ((roundings + 1) as f64 * self.dtype.unit_roundoff() * 2f64.powi(24)) as usize;
        for Part { name: output_name, output, width, rows, columns, want, size, depth } in &self.parts {
            let whole = output(got);
            let got: Vec<f32> = rows.iter().flat_map(|i| columns.iter().map(move |j| whole[i * width + j])).collect();
            assert_within(&format!("{name}, {}, {output_name}", self.what), &got, want, size, depth + stored);
        }
    }
}

/// The first, the last, and some between.
fn sample(count: usize) -> Vec<usize> {
    const MOST: usize = 7;
    if count <= MOST { (0..count).collect() } else { (0..MOST).map(|i| i * (count - 1) / (MOST - 1)).collect() }
}

/// The layer's rows, inputs and outputs of those numbers.
fn cut<B: Backend>(layer: &Layer<B>, rows: &[usize], inputs: &[usize], outputs: &[usize]) -> Lora {
    let ranks: Vec<usize> = (0..layer.shape.r).collect();
    let pick = |tensor: &Tensor<B>, rows: &[usize], columns: &[usize]| {
        let (stored, width) = (tensor.to_vec(&layer.backend).expect("memory"), tensor.cols());
        Mat::new(rows.len(), columns.len(), |i, j| f64::from(stored[rows[i] * width + columns[j]].to_f32()))
    };
    Lora {
        x: pick(&layer.x, rows, inputs),
        w: pick(&layer.w, outputs, inputs),
        bias: None,
        a: pick(&layer.a, &ranks, inputs),
        b: pick(&layer.b, outputs, &ranks),
        dy: pick(&layer.dy, rows, outputs),
        scale: f64::from(SCALE),
        mask: Mat::new(rows.len(), inputs.len(), |_, _| 1.0),
    }
}

#[cfg(all(test, feature = "products"))]
mod tests {
    use super::*;
    use crate::race::{Others, contenders};
    use crate::rivals::Products;
    use crate::shapes::{RANKS, Shape};
    use lowrank::{Cpu, bf16, f16};

    const VERBS: [Verb; 4] = [Verb::LinearForward, Verb::LoraForward, Verb::LoraForwardBackward, Verb::LoraMerge];

    fn everyone_is_right<B: Backend + Clone + 'static>(backend: B)
    where
        Products: Others<B>,
    {
        for (m, k, n) in [(1, 33, 70), (10, 300, 40), (65, 20, 17)] {
            for r in RANKS {
                let layer = Layer::new(backend.clone(), Shape { name: "odd", m, k, n, r }).unwrap();
                for verb in VERBS {
                    let expected = Expected::of(verb, &layer);
                    for contender in &mut contenders(&Products, &layer, verb).unwrap() {
                        contender.run(&layer);
                        if contender.verb() != verb {
                            continue;
                        }
                        expected.check(contender.name(), &contender.outputs(&layer), contender.roundings());
                    }
                }
            }
        }
    }

    #[test]
    fn everyone_is_right_in_f32() {
        everyone_is_right(Cpu::<f32>::new().unwrap().with_threads(3).unwrap());
    }

    #[test]
    fn everyone_is_right_in_f16_and_bf16() {
        everyone_is_right(Cpu::<f16>::new().unwrap().with_threads(3).unwrap());
        everyone_is_right(Cpu::<bf16>::new().unwrap().with_threads(3).unwrap());
    }

    #[test]
    #[should_panic(expected = "a rival, lora_forward, odd_3x5x4_r1, y[0, 0] is 0")]
    fn a_wrong_result_is_named() {
        let layer = Layer::new(Cpu::<f32>::new().unwrap(), Shape { name: "odd", m: 3, k: 5, n: 4, r: 1 }).unwrap();
        let nothing = Outputs { y: vec![0.0; 12], ..Outputs::default() };
        Expected::of(Verb::LoraForward, &layer).check("a rival", &nothing, 0);
    }
}
