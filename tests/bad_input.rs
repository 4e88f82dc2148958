//! Bad input to requests gives a typed error that names the operand, and never a panic.

mod support;

use std::cell::Cell;

use lowrank::op::*;
use lowrank::{Cpu, Error, MatMut, MatRef, Tensor};
use proptest::prelude::*;

type T = Tensor<Cpu<f32>>;

fn cpu() -> Cpu<f32> {
    Cpu::new().unwrap().with_threads(1).unwrap()
}

fn zeros(rows: usize, cols: usize) -> T {
    Tensor::zeros(&cpu(), (rows, cols)).unwrap()
}

/// Tensors for a layer of 2 rows, 3 inputs, 4 outputs, rank 3, with one operand of another shape.
fn forward_with(wrong: &str, shape: (usize, usize), scale: f32) -> Result<(), Error> {
    let new = |name: &str, rows, cols| if name == wrong { zeros(shape.0, shape.1) } else { zeros(rows, cols) };
    let (x, w, bias, a, b) = (new("x", 2, 3), new("w", 4, 3), new("bias", 1, 4), new("a", 3, 3), new("b", 4, 3));
    let (mut h, mut y) = (new("h", 2, 3), new("y", 2, 4));
    let op = LoraForward {
        x: x.view(),
        w: Some((&w).into()),
        bias: Some(bias.view()),
        a: (&a).into(),
        b: (&b).into(),
        scale,
        dropout: None,
        h: h.view_mut(),
        y: (&mut y).into(),
    };
    op.run(&cpu())
}

#[test]
fn a_wrong_shape_is_named_with_the_shape_it_should_have() {
    assert!(forward_with("", (0, 0), 1.0).is_ok());
    let message = |wrong, shape| forward_with(wrong, shape, 1.0).unwrap_err().to_string();
    assert_eq!(message("x", (2, 5)), "lora_forward: `x` is 2×5, want 2×3");
    assert_eq!(message("b", (3, 4)), "lora_forward: `b` is 3×4, want 4×3");
    assert_eq!(message("w", (4, 2)), "lora_forward: `w` is 4×2, want 4×3");
    assert_eq!(message("bias", (4, 1)), "lora_forward: `bias` is 4×1, want 1×4");
    assert_eq!(message("a", (3, 4)), "lora_forward: `a` is 3×4, want 3×3");
    assert_eq!(message("h", (2, 2)), "lora_forward: `h` is 2×2, want 2×3");
    assert_eq!(message("y", (4, 2)), "lora_forward: `y` is 4×2, want 2×4");
    assert_eq!(message("a", (0, 3)), "lora_forward: `rank` is 0, want at least 1");
}

/// Wrong shapes for the verbs of DoRA, for a layer of 2 rows, 3 inputs, 4 outputs, rank 1.
fn dora_with(wrong: &str, shape: (usize, usize)) -> Result<(), Error> {
    let new = |name: &str, rows, cols| if name == wrong { zeros(shape.0, shape.1) } else { zeros(rows, cols) };
    let (w, a, b, z, dy) = (new("w", 4, 3), new("a", 1, 3), new("b", 4, 1), new("z", 2, 4), new("dy", 2, 4));
    let (magnitude, mut norm, bias) = (new("magnitude", 1, 4), new("norm", 1, 4), new("bias", 1, 4));
    let (mut y, mut dz, mut dmagnitude, mut dbias) =
        (new("y", 2, 4), new("dz", 2, 4), new("dmagnitude", 1, 4), new("dbias", 1, 4));
    LoraRowNorm { w: (&w).into(), a: (&a).into(), b: (&b).into(), scale: 1.0, norm: norm.view_mut() }.run(&cpu())?;
    let (z, magnitude, norm, dy) = (&z, &magnitude, &norm, &dy);
    Magnitude { z: z.view(), magnitude: magnitude.view(), norm: norm.view(), bias: Some(bias.view()), y: y.view_mut() }
        .run(&cpu())?;
    let (dz, dmagnitude, dbias) = (Some(&mut dz), Some(&mut dmagnitude), Some(&mut dbias));
    MagnitudeBackward {
        z: z.view(),
        magnitude: magnitude.view(),
        norm: norm.view(),
        dy: dy.view(),
        dz: dz.map(Tensor::view_mut),
        dmagnitude: dmagnitude.map(Tensor::view_mut),
        dbias: dbias.map(Tensor::view_mut),
    }
    .run(&cpu())
}

#[test]
fn a_wrong_shape_of_a_decomposed_layer_is_named() {
    assert!(dora_with("", (0, 0)).is_ok());
    let message = |wrong, shape| dora_with(wrong, shape).unwrap_err().to_string();
    assert_eq!(message("a", (1, 4)), "lora_row_norm: `a` is 1×4, want 1×3");
    assert_eq!(message("b", (1, 4)), "lora_row_norm: `b` is 1×4, want 4×1");
    assert_eq!(message("a", (0, 3)), "lora_row_norm: `rank` is 0, want at least 1");
    assert_eq!(message("norm", (4, 1)), "lora_row_norm: `norm` is 4×1, want 1×4");
    assert_eq!(message("magnitude", (4, 1)), "magnitude: `magnitude` is 4×1, want 1×4");
    assert_eq!(message("bias", (2, 4)), "magnitude: `bias` is 2×4, want 1×4");
    assert_eq!(message("y", (4, 2)), "magnitude: `y` is 4×2, want 2×4");
    assert_eq!(message("dy", (4, 2)), "magnitude_backward: `dy` is 4×2, want 2×4");
    assert_eq!(message("dz", (4, 2)), "magnitude_backward: `dz` is 4×2, want 2×4");
    assert_eq!(message("dmagnitude", (4, 1)), "magnitude_backward: `dmagnitude` is 4×1, want 1×4");
    assert_eq!(message("dbias", (1, 1)), "magnitude_backward: `dbias` is 1×1, want 1×4");
}

#[test]
fn an_input_that_is_not_for_the_weight_is_named() {
    let (x, w, dy, mut y) = (zeros(2, 5), zeros(4, 3), zeros(2, 4), zeros(2, 4));
    let error = LinearForward { x: x.view(), w: (&w).into(), bias: None, y: (&mut y).into() }.run(&cpu()).unwrap_err();
    assert_eq!(error.to_string(), "linear_forward: `x` is 2×5, want 2×3");
    let error = LinearBackward { x: Some(x.view()), w: Some((&w).into()), dy: dy.view(), dx: None, dw: None, dbias: None }
        .run(&cpu())
        .unwrap_err();
    assert_eq!(error.to_string(), "linear_backward: `x` is 2×5, want 2×3");
    let (a, b, h) = (zeros(1, 3), zeros(4, 1), zeros(2, 1));
    let (mut da, mut db) = (zeros(1, 3), zeros(4, 1));
    for w in [Some(&w), None] {
        let backward = LoraBackward {
            x: x.view(),
            w: w.map(Into::into),
            a: (&a).into(),
            b: (&b).into(),
            h: h.view(),
            dy: dy.view(),
            scale: 1.0,
            dropout: None,
            da: da.view_mut(),
            db: db.view_mut(),
            dbias: None,
            dx: None,
        };
        assert_eq!(backward.run(&cpu()).unwrap_err().to_string(), "lora_backward: `x` is 2×5, want 2×3");
    }
}

/// Without a base weight, the number of outputs is that of the rows of `b`.
#[test]
fn without_a_weight_b_has_the_number_of_outputs() {
    let (x, a, b, mut h, mut y) = (zeros(2, 3), zeros(1, 3), zeros(4, 1), zeros(2, 1), zeros(2, 5));
    let op = LoraForward {
        x: x.view(),
        w: None,
        bias: None,
        a: (&a).into(),
        b: (&b).into(),
        scale: 1.0,
        dropout: None,
        h: h.view_mut(),
        y: (&mut y).into(),
    };
    assert_eq!(op.run(&cpu()).unwrap_err().to_string(), "lora_forward: `y` is 2×5, want 2×4");
    let (x, mut y) = (zeros(2, 3), zeros(3, 2));
    let dropout = Dropout::new(0.5, 1).unwrap();
    let error = DropoutForward { x: x.view(), dropout, y: y.view_mut() }.run(&cpu()).unwrap_err();
    assert_eq!(error.to_string(), "dropout_forward: `y` is 3×2, want 2×3");
}

#[test]
fn scalars_must_be_finite() {
    for scale in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        assert!(matches!(forward_with("", (0, 0), scale), Err(Error::Value { name: "scale", .. })));
        let (a, b, mut w) = (zeros(1, 2), zeros(3, 1), zeros(3, 2));
        assert!(
            LoraMerge { a: (&a).into(), b: (&b).into(), scale, rounding: Rounding::Nearest, w: w.view_mut() }
                .run(&cpu())
                .is_err()
        );
        assert!(Accumulate { x: a.view(), scale, y: (zeros(1, 2)).view_mut() }.run(&cpu()).is_err());
        assert!(
            LoraRowNorm { w: (&w).into(), a: (&a).into(), b: (&b).into(), scale, norm: (zeros(1, 3)).view_mut() }
                .run(&cpu())
                .is_err()
        );
        assert!(AdamRate::new(scale, 0.9, 0.999, 1e-8, 1).is_err());
        assert!(Dropout::new(scale, 0).is_err());
    }
    assert!(AdamRate::new(-1.0, 0.9, 0.999, 1e-8, 1).is_err());
    assert!(AdamRate::new(1.0, 1.0, 0.999, 1e-8, 1).is_err());
    assert!(AdamRate::new(1.0, 0.9, -0.1, 1e-8, 1).is_err());
    assert!(AdamRate::new(1.0, 0.9, 0.999, 0.0, 1).is_err());
    assert!(AdamRate::new(1.0, 0.9, 0.999, 1e-8, 0).is_err());
    for (lr, weight_decay) in [(1.0, -0.1), (1.0, f32::NAN), (0.0, f32::INFINITY), (1e30, 1e30)] {
        let error = AdamRate::adamw(lr, 0.9, 0.999, 1e-8, weight_decay, 1).unwrap_err();
        assert!(matches!(error, Error::Value { name: "weight_decay", .. }), "{error}");
    }
    let error = AdamRate::adamw(1.0, 0.9, 0.999, 1e-8, -0.1, 1).unwrap_err();
    assert_eq!(error.to_string(), "adam: `weight_decay` is -0.1, want not negative, and finite, also times `lr`");
    assert_eq!(AdamRate::adamw(0.1, 0.9, 0.999, 1e-8, 0.0, 7).unwrap(), AdamRate::new(0.1, 0.9, 0.999, 1e-8, 7).unwrap());
    assert!(Dropout::new(1.0, 0).is_err() && Dropout::new(-0.1, 0).is_err());
}

/// A master copy has the weight's shape.
#[test]
fn a_master_of_another_shape_is_named() {
    let (g, mut m, mut v, mut master, mut w) = (zeros(2, 3), zeros(2, 3), zeros(2, 3), zeros(3, 2), zeros(2, 3));
    let (grad, rate) = (WeightGrad::Dense(&g), AdamRate::new(0.1, 0.9, 0.999, 1e-8, 1).unwrap());
    let error = Adam { grad, rate, m: &mut m, v: &mut v, master: Some(&mut master), w: &mut w }.run(&cpu()).unwrap_err();
    assert_eq!(error.to_string(), "adam: `master` is 3×2, want 2×3");
}

#[test]
fn a_label_outside_the_classes_is_named_with_its_row() {
    let error = Labels::new(&cpu(), 10, &[3, 9, 10]).err().unwrap();
    assert_eq!(error.to_string(), "cross_entropy: `labels` is 10 in row 2 of 10 classes, want below the number of classes");
    let labels = Labels::new(&cpu(), 10, &[3]).unwrap();
    let (logits, mut dlogits) = (zeros(1, 9), zeros(1, 9));
    let mut loss = zeros(1, 1);
    let op = CrossEntropy { logits: logits.view(), labels: &labels, loss: loss.view_mut(), dlogits: dlogits.view_mut() };
    assert!(op.run(&cpu()).is_err(), "ten classes, nine columns");
}

#[test]
fn sizes_that_no_machine_has_are_refused() {
    for shape in [(usize::MAX, 2), (1 << 40, 1 << 40), (0, usize::MAX), (isize::MAX as usize / 8 + 1, 0)] {
        assert!(matches!(T::zeros(&cpu(), shape), Err(Error::TooLarge { .. })));
    }
    assert!(matches!(T::zeros(&cpu(), (1 << 50, 1)), Err(Error::OutOfMemory { .. })));
    let error = T::from_slice(&cpu(), (2, 3), &[1.0; 5]).unwrap_err();
    assert_eq!(error.to_string(), "tensor: `host` is 5 elements, want 6, for 2×3");
    assert!(zeros(2, 2).copy_from_slice(&cpu(), &[1.0; 5]).is_err());
}

/// Operands that fit, except that the operand of this number has another shape.
struct Operands {
    cpu: Cpu<f32>,
    wrong: usize,
    shape: (usize, usize),
    asked: Cell<usize>,
}

impl Operands {
    fn operand(&self, rows: usize, cols: usize) -> T {
        let shape = if self.asked.replace(self.asked.get() + 1) == self.wrong { self.shape } else { (rows, cols) };
        Tensor::zeros(&self.cpu, shape).unwrap()
    }

    /// Runs the verb of this number.
    fn run(&self, verb: u8, [m, k, n, r]: [usize; 4], scale: f32, with_w: bool) -> Result<(), Error> {
        let (cpu, new) = (&self.cpu, |rows, cols| self.operand(rows, cols));
        let dropout = Dropout::new(scale, 1).ok();
        let (x, y) = (&new(m, k), &mut new(m, n));
        let (w, a, b, dy, h) = (&mut new(n, k), &new(r, k), &new(n, r), &new(m, n), &mut new(m, r));
        let (row, other, z) = (&new(1, n), &mut new(1, n), &mut new(m, n));
        match verb {
            0 => LoraForward {
                x: x.view(),
                w: (with_w.then_some(&*w)).map(Into::into),
                bias: Some(row.view()),
                a: a.into(),
                b: b.into(),
                scale,
                dropout,
                h: h.view_mut(),
                y: y.into(),
            }
            .run(cpu),
            1 => {
                let (w, da, db, dx) = (with_w.then_some(&*w), &mut new(r, k), &mut new(n, r), Some(&mut new(m, k)));
                LoraBackward {
                    x: x.view(),
                    w: w.map(Into::into),
                    a: a.into(),
                    b: b.into(),
                    h: h.view(),
                    dy: dy.view(),
                    scale,
                    dropout,
                    da: da.view_mut(),
                    db: db.view_mut(),
                    dbias: Some(other.view_mut()),
                    dx: dx.map(Into::into),
                }
                .run(cpu)
            }
            2 => LoraMerge { a: a.into(), b: b.into(), scale, rounding: Rounding::Stochastic { seed: 1 }, w: w.view_mut() }
                .run(cpu),
            3 => LinearForward { x: x.view(), w: (&*w).into(), bias: Some(row.view()), y: y.into() }.run(cpu),
            4 => {
                let (dx, dw) = (Some(&mut new(m, k)), Some(&mut new(n, k)));
                LinearBackward {
                    x: Some(x.view()),
                    w: Some((&*w).into()),
                    dy: dy.view(),
                    dx: dx.map(Into::into),
                    dw: dw.map(Tensor::view_mut),
                    dbias: Some(other.view_mut()),
                }
                .run(cpu)
            }
            5 => Relu { x: dy.view(), y: y.view_mut() }
                .run(cpu)
                .and(ReluBackward { y: y.view(), dy: dy.view(), dx: z.view_mut() }.run(cpu)),
            6 => Add { x: dy.view(), y: y.view_mut() }.run(cpu),
            7 => LoraRowNorm { w: (&*w).into(), a: a.into(), b: b.into(), scale, norm: other.view_mut() }.run(cpu),
            8 => Magnitude { z: z.view(), magnitude: row.view(), norm: other.view(), bias: Some(row.view()), y: y.view_mut() }
                .run(cpu),
            9 => {
                let (dmagnitude, dbias) = (Some(&mut new(1, n)), Some(&mut new(1, n)));
                MagnitudeBackward {
                    z: z.view(),
                    magnitude: row.view(),
                    norm: other.view(),
                    dy: dy.view(),
                    dz: Some(y.view_mut()),
                    dmagnitude: dmagnitude.map(Tensor::view_mut),
                    dbias: dbias.map(Tensor::view_mut),
                }
                .run(cpu)
            }
            10 => Accumulate { x: dy.view(), scale, y: y.view_mut() }.run(cpu),
            11 => dropout.map_or(Ok(()), |dropout| DropoutForward { x: dy.view(), dropout, y: y.view_mut() }.run(cpu)),
            _ => {
                let (rate, grad) = (AdamRate::new(0.1, 0.9, 0.99, 1e-8, 1)?, WeightGrad::Factored { dy, x });
                let mut master = with_w.then(|| new(n, k));
                Adam { grad, rate, m: &mut new(n, k), v: &mut new(n, k), master: master.as_mut(), w }.run(cpu)
            }
        }
    }
}

/// The largest number of operands of a verb above; higher numbers mean that no operand is wrong.
const OPERANDS: std::ops::Range<usize> = 0..24;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1024))]

    /// The result or a typed error, never a panic: a result exactly if all shapes fit and the scalars are in range.
    #[test]
    fn no_request_panics(
        dims in [0..40usize, 0..40, 0..40, 0..20],
        wrong in OPERANDS, shape in (0..5usize, 0..5usize),
        any in any::<f32>(), small in -1f32..1.0, finite in any::<bool>(), with_w in any::<bool>(), verb in 0..13u8,
    ) {
        let operands = Operands { cpu: cpu(), wrong, shape, asked: Cell::new(0) };
        let scale = if finite { small } else { any };
        let done = operands.run(verb, dims, scale, with_w);
        if wrong >= operands.asked.get() && scale.is_finite() && dims[3] > 0 {
            prop_assert!(done.is_ok(), "{done:?}");
        }
    }
}

/// A strided part of a wider matrix.
fn part(wider: &T) -> MatRef<'_, Cpu<f32>> {
    wider.view().column_range(1..wider.cols() - 1).unwrap()
}

fn part_mut(wider: &mut T) -> MatMut<'_, Cpu<f32>> {
    let cols = wider.cols();
    wider.view_mut().column_range(1..cols - 1).unwrap()
}

/// Elementwise verbs, and the `f32` outputs of the low-rank layer, need contiguous rows; the error names the operand.
#[test]
fn a_stride_that_a_verb_cannot_take_is_refused_by_operand() {
    let (cpu, wide, narrow) = (cpu(), zeros(3, 6), zeros(3, 4));
    let (mut wide_out, mut out, mut loss) = (zeros(3, 6), zeros(3, 4), zeros(1, 1));
    let apart = "is a view with space between its rows, want a contiguous view";
    let refused = |verb: &str, name: &str, result: Result<(), Error>| {
        assert_eq!(result.unwrap_err().to_string(), format!("{verb}: `{name}` {apart}"));
    };
    refused("relu", "x", Relu { x: part(&wide), y: out.view_mut() }.run(&cpu));
    refused("relu", "y", Relu { x: narrow.view(), y: part_mut(&mut wide_out) }.run(&cpu));
    refused("add", "y", Add { x: narrow.view(), y: part_mut(&mut wide_out) }.run(&cpu));
    refused("accumulate", "x", Accumulate { x: part(&wide), scale: 1.0, y: out.view_mut() }.run(&cpu));
    let dropout = Dropout::new(0.5, 1).unwrap();
    refused("dropout_forward", "x", DropoutForward { x: part(&wide), dropout, y: out.view_mut() }.run(&cpu));
    let labels = &Labels::new(&cpu, 4, &[0, 1, 2]).unwrap();
    let (logits, loss, dlogits) = (part(&wide), loss.view_mut(), out.view_mut());
    refused("cross_entropy", "logits", CrossEntropy { logits, labels, loss, dlogits }.run(&cpu));

    let (w, a, b) = (zeros(4, 4), zeros(4, 4), zeros(4, 4));
    let (w, a, b, dropout) = (Some((&w).into()), (&a).into(), (&b).into(), None);
    let forward = |h, y| LoraForward { x: narrow.view(), w, bias: None, a, b, scale: 1.0, dropout, h, y }.run(&cpu);
    refused("lora_forward", "h", forward(part_mut(&mut wide_out), (&mut out).into()));
    let rounding = Rounding::Stochastic { seed: 1 };
    let (a, b, mut w) = (zeros(1, 4), zeros(3, 1), zeros(3, 6));
    let merge = LoraMerge { a: (&a).into(), b: (&b).into(), scale: 1.0, rounding, w: part_mut(&mut w) };
    refused("lora_merge", "w", merge.run(&cpu));
}

#[test]
fn a_view_that_does_not_fit_its_memory_is_refused() {
    type Rows<'a> = MatRef<'a, Cpu<f32>>;
    let memory = vec![0.0; 10];
    let message = |result: lowrank::Result<Rows<'_>>| result.unwrap_err().to_string();
    assert_eq!(message(Rows::from_slice(&memory, (3, 4))), "view: `memory` is 10 elements, want 12, for 3×4");
    let wanted = "view: `memory` is 10 elements, want at least 11, for 2×4 at offset 2 with row stride 5";
    assert_eq!(message(Rows::strided(&memory, (2, 4), 2, 5)), wanted);
    let overlapping = "view: `row_stride` is 3, want at least the number of columns";
    assert_eq!(message(Rows::strided(&memory, (2, 4), 0, 3)), overlapping);
    let whole = Rows::from_slice(&memory, (2, 5)).unwrap();
    assert_eq!(message(whole.row_range(1..3)), "view: `rows` is 1..3, want within 0..2");
    assert_eq!(message(whole.column_range(4..6)), "view: `columns` is 4..6, want within 0..5");
}
