//! Views of tensors at offsets that are not aligned for a binding.

use lowrank::op::*;
use lowrank::{MatRef, Tensor, WebGpu, f16};

use super::support::data::{Dims, down, up, whole};
use super::support::oracle::Mat;
use super::{Limits, POOR, shared_f16, shared_f32};

/// Row `row` of a matrix of three rows with a large stride.
fn padded(numbers: &[f32]) -> Vec<f32> {
    let far = vec![1e3; numbers.len()];
    [&far[..], numbers, &far].concat()
}

/// A row of 7·43 elements as a 43×7 matrix.
fn tall(rows: &Tensor<WebGpu<f32>>) -> MatRef<'_, WebGpu<f32>> {
    MatRef::strided(rows.view().memory(), (43, 7), 7 * 43, 7).unwrap()
}

fn three_rows(gpu: &WebGpu<f32>, numbers: &[f32]) -> Tensor<WebGpu<f32>> {
    Tensor::from_slice(gpu, (3, numbers.len()), &padded(numbers)).unwrap()
}

/// Every elementwise verb, on the middle row of matrices of three rows.
#[test]
fn verbs_that_pass_over_elements_take_rows_of_a_matrix() {
    let gpu = or_return!(shared_f32());
    for gpu in [&gpu, &gpu.clone().with_limits(Limits { binding_bytes: 1536, ..POOR })] {
        let n = 7 * 43; // two pieces, on the device with reduced limits
        let x: Vec<f32> = (0..n).map(|e| (e % 9) as f32 - 4.0).collect();
        let z: Vec<f32> = (0..n).map(|e| (e % 5) as f32 - 2.0).collect();
        let [x_rows, z_rows] = [&x, &z].map(|numbers| three_rows(gpu, numbers));
        let [x_row, z_row] = [&x_rows, &z_rows].map(|rows| rows.view().row_range(1..2).unwrap());
        let pairs = || x.iter().zip(&z);
        let check = |name: &str, y: &Tensor<_>, want: Vec<f32>| assert_eq!(down(gpu, y), padded(&want), "{name}");

        let mut y = three_rows(gpu, &z);
        Relu { x: x_row, y: y.view_mut().row_range(1..2).unwrap() }.run(gpu).unwrap();
        check("relu", &y, x.iter().map(|x| x.max(0.0)).collect());
        ReluBackward { y: x_row, dy: z_row, dx: y.view_mut().row_range(1..2).unwrap() }.run(gpu).unwrap();
        check("relu_backward", &y, pairs().map(|(x, z)| if *x > 0.0 { *z } else { 0.0 }).collect());

        let mut y = three_rows(gpu, &z);
        Add { x: x_row, y: y.view_mut().row_range(1..2).unwrap() }.run(gpu).unwrap();
        check("add", &y, pairs().map(|(x, z)| x + z).collect());
        Accumulate { x: x_row, scale: -2.0, y: y.view_mut().row_range(1..2).unwrap() }.run(gpu).unwrap();
        check("accumulate", &y, pairs().map(|(x, z)| z - x).collect());

        let dropout = Dropout::new(0.5, 3).unwrap();
        DropoutForward { x: x_row, dropout, y: y.view_mut().row_range(1..2).unwrap() }.run(gpu).unwrap();
        let factor = |e: usize| dropout.factors(e as u64 / 4)[e % 4];
        check("dropout", &y, x.iter().enumerate().map(|(e, x)| x * factor(e)).collect());

        let lines = Tensor::from_slice(gpu, (3, 7), &[[9.0; 7], [4.0; 7], [6.0; 7]].concat()).unwrap();
        let norms = Tensor::from_slice(gpu, (3, 7), &[[9.0; 7], [2.0; 7], [9.0; 7]].concat()).unwrap();
        let [magnitude, norm, bias] = [(&lines, 1), (&norms, 1), (&lines, 2)].map(|(t, i)| t.view().row_range(i..i + 1).unwrap());
        let mut y = Tensor::zeros(gpu, (43, 7)).unwrap();
        Magnitude { z: tall(&z_rows), magnitude, norm, bias: Some(bias), y: y.view_mut() }.run(gpu).unwrap();
        assert_eq!(down(gpu, &y), z.iter().map(|z| 2.0 * z + 6.0).collect::<Vec<_>>());
        let mut sums = Tensor::from_slice(gpu, (4, 7), &[0.5; 28]).unwrap();
        let (dmagnitude, dy) = (Some(sums.view_mut().row_range(2..3).unwrap()), tall(&x_rows));
        MagnitudeBackward { z: tall(&z_rows), magnitude, norm, dy, dz: None, dmagnitude, dbias: None }.run(gpu).unwrap();
        let dot = |j: usize| pairs().skip(j).step_by(7).map(|(x, z)| x * z).sum::<f32>() / 2.0;
        let want: Vec<f32> = (0..28).map(|e| if e / 7 == 2 { dot(e % 7) } else { 0.5 }).collect();
        assert_eq!(down(gpu, &sums), want, "dmagnitude, and nothing beside it");

        // The row norms of W, with an update of zero, written to a part of a row.
        let zero = Tensor::zeros(gpu, (43, 1)).unwrap();
        let mut norm = Tensor::from_slice(gpu, (3, 43), &[0.5; 129]).unwrap();
        let (a, b) = (zero.view().row_range(0..1).unwrap(), zero.view());
        let w = tall(&x_rows).column_range(2..3).unwrap().into();
        let out = norm.view_mut().row_range(1..2).unwrap();
        LoraRowNorm { w, a: a.into(), b: b.into(), scale: 1.0, norm: out }.run(gpu).unwrap();
        let want: Vec<f32> = (0..129).map(|e| if e / 43 == 1 { x[7 * (e % 43) + 2].abs() } else { 0.5 }).collect();
        assert_eq!(down(gpu, &norm), want, "norm, and nothing beside it");
    }
}

/// Rows without a label count neither in the mean nor in the gradients; if no row has one, both are 0.
#[test]
fn rows_without_a_label_do_not_count() {
    let gpu = or_return!(shared_f32());
    let (rows, classes) = ([3, 0, 2, 4, 1], 5);
    let logits: Vec<f32> = (0..25).map(|e| ((e * 7) % 11) as f32 / 4.0).collect();
    let poor = gpu.clone().with_limits(Limits { binding_bytes: 1024, ..POOR });
    for gpu in [&gpu, &poor] {
        let run = |logits: &[f32], labels: &[Option<u32>]| {
            let shape = (labels.len(), classes);
            let all = Tensor::from_slice(gpu, shape, logits).unwrap();
            let labels = Labels::with_ignored(gpu, classes, labels).unwrap();
            let (mut loss, mut dlogits) = (super::unwritten(gpu, 1, 1), super::unwritten(gpu, shape.0, classes));
            let (loss_out, dlogits_out) = (loss.view_mut(), dlogits.view_mut());
            CrossEntropy { logits: all.view(), labels: &labels, loss: loss_out, dlogits: dlogits_out }.run(gpu).unwrap();
            (down::<_, f32>(gpu, &loss), down::<_, f32>(gpu, &dlogits))
        };
        let every_other: Vec<_> = rows.iter().enumerate().map(|(i, &label)| (i % 2 == 0).then_some(label)).collect();
        let (loss, dlogits) = run(&logits, &every_other);
        let counted: Vec<f32> = logits.chunks(classes).step_by(2).flatten().copied().collect();
        let (want_loss, want) = run(&counted, &[Some(rows[0]), Some(rows[2]), Some(rows[4])]);
        assert!((loss[0] - want_loss[0]).abs() <= 1e-6 * want_loss[0].abs());
        for (i, row) in dlogits.chunks(classes).enumerate() {
            let want = if i % 2 == 0 { want[i / 2 * classes..][..classes].to_vec() } else { vec![0.0; classes] };
            assert_eq!(row, want, "row {i}");
        }
        assert_eq!(run(&logits, &[None; 5]), (vec![0.0], vec![0.0; 25]));
        assert_eq!(run(&[f32::NAN; 25], &[None; 5]), (vec![0.0], vec![0.0; 25]));
    }
}

/// With a bias, at depths that exceed a binding: partial sums are not stored in the output, which is rounded once.
#[test]
fn outputs_of_halves_are_added_to_at_depths_that_are_cut() {
    let gpu = or_return!(shared_f16());
    for gpu in [&gpu, &gpu.clone().with_limits(Limits { binding_bytes: 1024, ..POOR })] {
        let layer = whole(Dims { m: 18, k: 100, n: 52, r: 12 }, 5);
        let [x, w] = [&layer.x, &layer.w].map(|mat| up::<_, f16>(gpu, mat));
        let [a, b] = [&layer.a, &layer.b].map(|mat| up::<_, f32>(gpu, mat)); // factors of f32, beside
        let bias = up::<_, f16>(gpu, layer.bias.as_ref().unwrap());
        let held = Mat::new(18, 52, |i, j| ((i * 5 + j) % 7) as f64 - 3.0);
        let mut y = up::<_, f16>(gpu, &held);
        let mut h = Tensor::zeros(gpu, (18, 12)).unwrap();
        let (a, b, y_out) = (Factor::F32(a.view()), Factor::F32(b.view()), Output::AddTo(y.view_mut()));
        let (x, w, bias, scale, dropout) = (x.view(), Some((&w).into()), Some(bias.view()), layer.scale as f32, None);
        LoraForward { x, w, bias, a, b, scale, dropout, h: h.view_mut(), y: y_out }.run(gpu).unwrap();
        let want = layer.forward().1.data.into_iter().zip(&held.data).map(|(y, held)| f16::from_f32((y + held) as f32));
        assert_eq!(y.to_vec(gpu).unwrap(), want.collect::<Vec<_>>());
    }
}

/// Stochastic merging into a view gives the bits of a separate matrix: random words are indexed from the first element of the view.
#[test]
fn rounding_stochastic_counts_from_the_first_element_of_the_view() {
    let gpu = or_return!(shared_f16());
    for gpu in [&gpu, &gpu.clone().with_limits(Limits { binding_bytes: 1024, ..POOR })] {
        for cols in [52, 33] {
            let layer = support_random(cols);
            let [a, b] = [&layer.a, &layer.b].map(|mat| up::<_, f16>(gpu, mat));
            let above = Mat::new(3, cols, |_, _| 0.5);
            let mut alone = up::<_, f16>(gpu, &layer.w);
            let stacked = Mat::from_vec(3 + layer.w.rows, cols, [above.data, layer.w.data.clone()].concat());
            let mut within = up::<_, f16>(gpu, &stacked);
            let rounding = Rounding::Stochastic { seed: 9 };
            LoraMerge { a: (&a).into(), b: (&b).into(), scale: 0.01, rounding, w: alone.view_mut() }.run(gpu).unwrap();
            let w = within.view_mut().row_range(3..3 + layer.w.rows).unwrap();
            LoraMerge { a: (&a).into(), b: (&b).into(), scale: 0.01, rounding, w }.run(gpu).unwrap();
            assert_eq!(within.to_vec(gpu).unwrap()[3 * cols..], alone.to_vec(gpu).unwrap(), "{cols}");
        }
    }
}

fn support_random(k: usize) -> super::support::oracle::Lora {
    super::support::data::random::<f16>(Dims { m: 1, k, n: 29, r: 3 }, 0.5, 4)
}
