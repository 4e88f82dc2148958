//! Products with quantised weights, on every vector unit, against sums in `f64` over the dequantised weight.

use lowrank::op::{LinearBackward, LinearForward, LoraBackward, LoraForward, LoraRowNorm};
use lowrank::quant::{Blocks, HostQuantised, QuantKind, Quantised, Scales};
use lowrank::random::Rng;
use lowrank::{Cpu, Float, MatMut, MatRef, Tensor, VectorUnit, bf16};

const NF4: QuantKind = QuantKind::Nf4(Blocks { len: 64, double: false });

fn kinds() -> Vec<QuantKind> {
    let nf4 = |len, double| QuantKind::Nf4(Blocks { len, double });
    let fp4 = QuantKind::Fp4(Blocks { len: 128, double: false });
    vec![nf4(64, true), nf4(64, false), nf4(32, false), nf4(256, false), fp4, QuantKind::Int8, QuantKind::Q8_0]
}

/// Rows of the batch, inputs, outputs: each side of every plan, rows that end within a block, one row that is looked up in order.
const SIZES: [[usize; 3]; 12] = [
    [1, 64, 5],
    [1, 192, 130],
    [1, 100, 9],
    [1, 33, 3],
    [2, 128, 70],
    [3, 65, 17],
    [7, 640, 20],
    [16, 30, 66],
    [17, 192, 40],
    [24, 7, 300],
    [40, 130, 33],
    [70, 600, 50],
];

struct Numbers(Rng);

impl Numbers {
    fn take<E: Float>(&mut self, len: usize) -> Vec<E> {
        (0..len).map(|_| E::from_f32(self.0.unit() as f32 * 2.0 - 1.0)).collect()
    }
}

fn wide<E: Float>(numbers: &[E]) -> Vec<f64> {
    numbers.iter().map(|number| f64::from(number.to_f32())).collect()
}

/// `Σ left[i][p]·right(p, j)`, and the same of magnitudes.
fn sums(left: &[f64], [m, depth, n]: [usize; 3], right: impl Fn(usize, usize) -> f64) -> Vec<(f64, f64)> {
    let mut out = vec![(0.0, 0.0); m * n];
    for i in 0..m {
        for j in 0..n {
            for p in 0..depth {
                let term = left[i * depth + p] * right(p, j);
                out[i * n + j].0 += term;
                out[i * n + j].1 += term.abs();
            }
        }
    }
    out
}

/// A product and its scale are rounded, so are `depth` sums, and then the result.
fn near<E: Float>(got: &[E], want: &[(f64, f64)], depth: usize, what: &str) {
    const U: f64 = 1.0 / (1u64 << 24) as f64;
    for (i, (got, (want, magnitude))) in wide(got).iter().zip(want).enumerate() {
        let bound = (depth + 6) as f64 * U * magnitude
            + if E::DTYPE == lowrank::DType::F32 { 0.0 } else { E::DTYPE.unit_roundoff() * want.abs() * 1.01 };
        assert!((got - want).abs() <= bound + 1e-37, "{what}, element {i}: {got}, want {want} ± {bound}");
    }
}

fn each_unit<E: Float>(mut check: impl FnMut(&Cpu<E>, &str)) {
    for unit in VectorUnit::available() {
        let cpu = Cpu::<E>::new().unwrap().with_unit(unit).unwrap().with_threads(2).unwrap();
        check(&cpu, unit.name());
    }
}

fn products<E: Float>() {
    let mut numbers = Numbers(Rng::new(19));
    for kind in kinds() {
        for [m, k, n] in SIZES {
            let r = 3;
            let w = HostQuantised::quantise((n, k), &numbers.take::<f32>(n * k), kind).unwrap();
            let (x, dy) = (numbers.take::<E>(m * k), numbers.take::<E>(m * n));
            let (a, b, bias) = (numbers.take::<E>(r * k), numbers.take::<E>(n * r), numbers.take::<E>(n));
            let (dense, xs, dys) = (wide(&w.dequantise::<f32>()), wide(&x), wide(&dy));
            let y_base = sums(&xs, [m, k, n], |p, j| dense[j * k + p]);
            let dx_base = sums(&dys, [m, n, k], |p, j| dense[p * k + j]);
            each_unit::<E>(|cpu, unit| {
                let what = |verb: &str| format!("{verb}, {kind:?}, {m}×{k}→{n}, {unit}, {}", E::DTYPE);
                let up = |shape: (usize, usize), host: &[E]| Tensor::from_slice(cpu, shape, host).unwrap();
                let (x, dy, a, b, bias) = (up((m, k), &x), up((m, n), &dy), up((r, k), &a), up((n, r), &b), up((1, n), &bias));
                let w = Quantised::from_host(cpu, &w).unwrap();
                let (mut y, mut dx) = (Tensor::zeros(cpu, (m, n)).unwrap(), Tensor::zeros(cpu, (m, k)).unwrap());
                LinearForward { x: x.view(), w: (&w).into(), bias: None, y: (&mut y).into() }.run(cpu).unwrap();
                near(&y.to_vec(cpu).unwrap(), &y_base, k, &what("linear_forward"));
                let (w_, dx_) = (Some((&w).into()), Some((&mut dx).into()));
                LinearBackward { x: None, w: w_, dy: dy.view(), dx: dx_, dw: None, dbias: None }.run(cpu).unwrap();
                near(&dx.to_vec(cpu).unwrap(), &dx_base, n, &what("linear_backward"));

                let mut h = Tensor::<_, f32>::zeros(cpu, (m, r)).unwrap();
                let forward = LoraForward {
                    x: x.view(),
                    w: Some((&w).into()),
                    bias: Some(bias.view()),
                    a: (&a).into(),
                    b: (&b).into(),
                    scale: 0.5,
                    dropout: None,
                    h: h.view_mut(),
                    y: (&mut y).into(),
                };
                forward.run(cpu).unwrap();
                let (hs, bs, biases) =
                    (wide(&h.to_vec(cpu).unwrap()), wide(&b.to_vec(cpu).unwrap()), wide(&bias.to_vec(cpu).unwrap()));
                let update = sums(&hs, [m, r, n], |p, j| 0.5 * bs[j * r + p]);
                let want = y_base.iter().zip(&update).enumerate().map(|(i, (base, update))| {
                    let bias = biases[i % n];
                    (base.0 + update.0 + bias, base.1 + update.1 + bias.abs())
                });
                let want: Vec<_> = want.collect();
                near(&y.to_vec(cpu).unwrap(), &want, k + r, &what("lora_forward"));

                let (mut da, mut db) =
                    (Tensor::<_, f32>::zeros(cpu, (r, k)).unwrap(), Tensor::<_, f32>::zeros(cpu, (n, r)).unwrap());
                let backward = LoraBackward {
                    x: x.view(),
                    w: Some((&w).into()),
                    a: (&a).into(),
                    b: (&b).into(),
                    h: h.view(),
                    dy: dy.view(),
                    scale: 0.5,
                    dropout: None,
                    da: da.view_mut(),
                    db: db.view_mut(),
                    dbias: None,
                    dx: Some((&mut dx).into()),
                };
                backward.run(cpu).unwrap();
                let as_ = wide(&a.to_vec(cpu).unwrap());
                let dh = sums(&dys, [m, n, r], |p, j| 0.5 * bs[p * r + j]);
                let want = (0..m * k).map(|at| {
                    let (i, j) = (at / k, at % k);
                    let update = (0..r).map(|q| dh[i * r + q].0 * as_[q * k + j]).sum::<f64>();
                    let size = (0..r).map(|q| dh[i * r + q].1 * as_[q * k + j].abs()).sum::<f64>();
                    (dx_base[at].0 + update, dx_base[at].1 + size)
                });
                let want: Vec<_> = want.collect();
                near(&dx.to_vec(cpu).unwrap(), &want, 2 * n + 2 * r, &what("lora_backward"));

                let mut norm = Tensor::<_, f32>::zeros(cpu, (1, n)).unwrap();
                LoraRowNorm { w: (&w).into(), a: (&a).into(), b: (&b).into(), scale: 0.5, norm: norm.view_mut() }
                    .run(cpu)
                    .unwrap();
                for (j, got) in norm.to_vec(cpu).unwrap().into_iter().enumerate() {
                    let element = |p: usize| dense[j * k + p] + 0.5 * (0..r).map(|q| bs[j * r + q] * as_[q * k + p]).sum::<f64>();
                    let want = (0..k).map(|p| element(p).powi(2)).sum::<f64>().sqrt();
                    assert!((f64::from(got) - want).abs() <= 1e-5 * want + 1e-6, "{}: {got}, want {want}", what("lora_row_norm"));
                }
            });
        }
    }
}

#[test]
fn products_are_near_those_of_the_dequantised_weight() {
    products::<f32>();
}

#[test]
fn products_of_bf16_are_near_those_of_the_dequantised_weight() {
    products::<bf16>();
}

/// Codes whose values are -1, 0 and 1, scales that are powers of two, whole numbers: no sum rounds, whatever its order.
#[test]
fn exact_weights_give_exact_products() {
    for [m, k, n] in SIZES {
        let mut rng = Rng::new(7);
        let mut whole = |most: usize| (rng.unit() * (2 * most + 1) as f64).floor() as f32 - most as f32;
        let levels: Vec<u8> = (0..n * k).map(|_| [0, 7, 15][(whole(1) + 1.0) as usize]).collect();
        let codes = levels.chunks(2).map(|two| two[0] << 4 | two.get(1).copied().unwrap_or(7)).collect();
        let scales = (0..(n * k).div_ceil(64)).map(|i| [1.0, 2.0, 4.0, 8.0][i % 4]).collect();
        let w = HostQuantised::new((n, k), NF4, codes, Scales::F32(scales)).unwrap();
        let (x, dense) = ((0..m * k).map(|_| whole(4)).collect::<Vec<f32>>(), wide(&w.dequantise::<f32>()));
        let want = sums(&wide(&x), [m, k, n], |p, j| dense[j * k + p]);
        assert!(want.iter().any(|(sum, _)| *sum != 0.0));
        each_unit::<f32>(|cpu, unit| {
            let (w, mut y) = (Quantised::from_host(cpu, &w).unwrap(), vec![0.0; m * n]);
            let out = MatMut::from_slice(&mut y, (m, n)).unwrap();
            LinearForward { x: MatRef::from_slice(&x, (m, k)).unwrap(), w: (&w).into(), bias: None, y: out.into() }
                .run(cpu)
                .unwrap();
            assert!(wide(&y).iter().zip(&want).all(|(got, (want, _))| got == want), "{m}×{k}→{n}, {unit}");
        });
    }
}

/// The same bits on any number of threads, and on every unit with fused multiply-add.
#[test]
fn bits_depend_on_nothing_else() {
    let units: Vec<_> = VectorUnit::available().into_iter().filter(|unit| *unit != VectorUnit::Scalar).collect();
    for kind in kinds() {
        for [m, k, n] in SIZES {
            let mut numbers = Numbers(Rng::new(3));
            let w = HostQuantised::quantise((n, k), &numbers.take::<f32>(n * k), kind).unwrap();
            let (x, dy) = (numbers.take::<f32>(m * k), numbers.take::<f32>(m * n));
            let mut first = None;
            for (unit, threads) in units.iter().flat_map(|unit| [(*unit, 1), (*unit, 3)]) {
                let cpu = Cpu::<f32>::new().unwrap().with_unit(unit).unwrap().with_threads(threads).unwrap();
                let w = Quantised::from_host(&cpu, &w).unwrap();
                let x = Tensor::from_slice(&cpu, (m, k), &x).unwrap();
                let dy = Tensor::from_slice(&cpu, (m, n), &dy).unwrap();
                let (mut y, mut dx) = (Tensor::zeros(&cpu, (m, n)).unwrap(), Tensor::zeros(&cpu, (m, k)).unwrap());
                LinearForward { x: x.view(), w: (&w).into(), bias: None, y: (&mut y).into() }.run(&cpu).unwrap();
                let (w, dx_) = (Some((&w).into()), Some((&mut dx).into()));
                LinearBackward { x: None, w, dy: dy.view(), dx: dx_, dw: None, dbias: None }.run(&cpu).unwrap();
                let bits: Vec<u32> =
                    [y.to_vec(&cpu).unwrap(), dx.to_vec(&cpu).unwrap()].concat().into_iter().map(f32::to_bits).collect();
                assert!(*first.get_or_insert_with(|| bits.clone()) == bits, "{kind:?}, {m}×{k}→{n}, {unit:?}, {threads} threads");
            }
        }
    }
}

#[test]
fn memory_is_what_the_format_takes() {
    let cpu = Cpu::<f32>::new().unwrap();
    let weights = 512 * 1024;
    let w = Tensor::zeros(&cpu, (512, 1024)).unwrap();
    for (kind, most) in [(QuantKind::NF4, 0.52), (QuantKind::Int8, 1.01), (QuantKind::Q8_0, 1.07)] {
        let bytes = Quantised::quantise(&cpu, &w, kind).unwrap().bytes();
        assert!(bytes as f64 <= most * weights as f64, "{kind}: {bytes}");
    }
}
