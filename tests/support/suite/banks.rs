//! Batches in which each row uses an adapter of its own.

use lowrank::op::*;
use lowrank::random::Rng;
use lowrank::{Backend, Error, Float, Tensor};

use super::{Got, run_linear};
use crate::support::bounds::{assert_exact, assert_within};
use crate::support::data::{Dims, down, mask, random, shapes, unwritten, up, whole};
use crate::support::oracle::{Lora, Mat};

/// A layer, the adapters in the slots of its bank, and the slot of each row.
#[derive(Clone)]
pub struct Mixed {
    /// Without its own `A` and `B`; `scale` is what the request says.
    pub layer: Lora,
    /// `A`, `B` and the scaling of each slot; `None` is an empty one.
    pub adapters: Vec<Option<(Mat, Mat, f64)>>,
    pub rank: usize,
    pub rows: Vec<Option<usize>>,
}

/// `h m×r`, `y`, `dx`, `dbias`; `dA` and `dB` of the slots that take part, as the bank has them.
pub type MixedOut = crate::support::oracle::LoraOut;

impl Mixed {
    /// A layer with so many slots, the last of which is empty unless it is the only one; ranks from 1 to `dims.r`.
    pub fn new(dims: Dims, slots: usize, seed: u64, of: impl Fn(Dims, u64) -> Lora) -> Self {
        let mut rng = Rng::new(seed ^ 0xba2c);
        let layer = of(dims, seed);
        let adapter = |slot: usize| {
            let r = if slot == 0 { dims.r } else { 1 + rng.below(dims.r) };
            let Lora { a, b, .. } = of(Dims { m: 0, r, ..dims }, seed + 1000 * (slot as u64 + 1));
            (slot == 0 || slot + 1 < slots).then_some((a, b, [1.0, 2.0, 0.5][slot % 3]))
        };
        let adapters: Vec<_> = (0..slots).map(adapter).collect();
        let filled = slots.saturating_sub(1).max(1);
        let rows = (0..dims.m).map(|_| Some(rng.below(filled + 1)).filter(|&slot| slot < filled)).collect();
        Self { layer, adapters, rank: dims.r, rows }
    }

    fn dims(&self) -> Dims {
        let (Mat { rows: m, cols: k, .. }, n) = (&self.layer.x, self.layer.w.rows);
        Dims { m: *m, k: *k, n, r: self.rank }
    }

    /// The slots that take part, in ascending order.
    fn taking_part(&self) -> Vec<usize> {
        (0..self.adapters.len()).filter(|slot| self.rows.contains(&Some(*slot))).collect()
    }

    /// The layer of one row; without an adapter, one of zeros.
    fn row(&self, i: usize) -> Lora {
        let Dims { k, n, r, .. } = self.dims();
        let one = |mat: &Mat| Mat::new(1, mat.cols, |_, j| mat.at(i, j));
        let adapter = self.rows[i].map(|slot| self.adapters[slot].as_ref().unwrap());
        let zeros = (Mat::new(r, k, |_, _| 0.0), Mat::new(n, r, |_, _| 0.0), 1.0);
        let (a, b, scaling) = adapter.unwrap_or(&zeros);
        let Lora { x, w, bias, dy, mask, scale, .. } = &self.layer;
        let (scale, w, bias) = (scale * scaling, w.clone(), bias.clone());
        Lora { x: one(x), w, bias, a: a.clone(), b: b.clone(), dy: one(dy), scale, mask: one(mask) }
    }

    /// Row by row, in f64.
    pub fn run(&self) -> MixedOut {
        let (Dims { m, k, n, r }, slots) = (self.dims(), self.taking_part());
        let (mut h, mut y, mut dx) = (zeros(m, r), zeros(m, n), zeros(m, k));
        let (mut da, mut db) = (zeros(slots.len() * r, k), zeros(slots.len() * r, n));
        for i in 0..m {
            let (layer, segment) = (self.row(i), slots.iter().position(|&slot| Some(slot) == self.rows[i]));
            let out = layer.run();
            let rank = layer.a.rows;
            h.data[i * r..][..rank].copy_from_slice(&out.h.data);
            y.data[i * n..][..n].copy_from_slice(&out.y.data);
            dx.data[i * k..][..k].copy_from_slice(&out.dx.data);
            let Some(segment) = segment else { continue };
            let first = segment * r;
            da.data[first * k..].iter_mut().zip(&out.da.data).for_each(|(sum, more)| *sum += more);
            db.data[first * n..].iter_mut().zip(&out.db.t().data).for_each(|(sum, more)| *sum += more);
        }
        MixedOut { h, y, da, db, dbias: self.layer.dy.column_sums(), dx }
    }

    fn magnitudes(&self) -> Self {
        let of = |adapter: &Option<(Mat, Mat, f64)>| adapter.as_ref().map(|(a, b, scaling)| (a.abs(), b.abs(), scaling.abs()));
        Self { layer: self.layer.magnitudes(), adapters: self.adapters.iter().map(of).collect(), ..self.clone() }
    }

    /// With the rows in another order: row `i` is row `order[i]` of this one.
    fn reordered(&self, order: &[usize]) -> Self {
        let by = |mat: &Mat| Mat::new(mat.rows, mat.cols, |i, j| mat.at(order[i], j));
        let Lora { x, dy, mask, .. } = &self.layer;
        let layer = Lora { x: by(x), dy: by(dy), mask: by(mask), ..self.layer.clone() };
        Self { layer, rows: order.iter().map(|&i| self.rows[i]).collect(), ..self.clone() }
    }
}

fn zeros(rows: usize, cols: usize) -> Mat {
    Mat::new(rows, cols, |_, _| 0.0)
}

/// Options of a run.
#[derive(Clone, Copy, Default)]
pub struct How {
    pub dropout: Option<Dropout>,
    pub without_w: bool,
    pub f32_factors: bool,
}

/// The bank of a mixed batch, on the device.
fn bank<B: Backend>(backend: &B, mixed: &Mixed, f32_factors: bool) -> Bank<B> {
    let Dims { k, n, r, .. } = mixed.dims();
    let slots = mixed.adapters.len();
    let bank = if f32_factors { Bank::new_f32(backend, slots, r, (n, k)) } else { Bank::new(backend, slots, r, (n, k)) };
    let mut bank = bank.unwrap();
    let wide = |mat: &Mat| -> Vec<f32> { mat.data.iter().map(|&x| x as f32).collect() };
    for (slot, adapter) in mixed.adapters.iter().enumerate() {
        // What was in a slot before, of the largest rank, leaves nothing behind.
        bank.load(backend, slot, (&vec![7.0f32; r * k], &vec![7.0f32; n * r]), 3.0).unwrap();
        match adapter {
            Some((a, b, scaling)) => bank.load(backend, slot, (&wide(a), &wide(b)), *scaling as f32).unwrap(),
            None => bank.clear(backend, slot).unwrap(),
        }
    }
    bank
}

/// Both passes of a mixed batch.
pub fn run_mixed<B: Backend>(backend: &B, mixed: &Mixed, how: How) -> Result<Got<B::Elem>, Error> {
    let (Dims { m, k, n, r }, layer) = (mixed.dims(), &mixed.layer);
    let bank = bank(backend, mixed, how.f32_factors);
    let rows = Assignment::new(backend, mixed.adapters.len(), &mixed.rows)?;
    let [x, w, dy] = [&layer.x, &layer.w, &layer.dy].map(|mat| up(backend, mat));
    let bias = layer.bias.as_ref().map(|mat| up(backend, mat));
    let (w, scale, dropout) = ((!how.without_w).then_some(&w), layer.scale as f32, how.dropout);
    let ([a, b], segments) = (bank.factors(&rows), rows.segments().len());
    let (mut h, mut y) = (unwritten(backend, m, r), unwritten(backend, m, n));
    LoraForward {
        x: x.view(),
        w: w.map(Into::into),
        bias: bias.as_ref().map(Tensor::view),
        a,
        b,
        scale,
        dropout,
        h: h.view_mut(),
        y: (&mut y).into(),
    }
    .run(backend)?;
    let (mut da, mut db) = (unwritten(backend, segments * r, k), unwritten(backend, segments * r, n));
    let (mut dbias, mut dx) = (unwritten(backend, 1, n), unwritten(backend, m, k));
    LoraBackward {
        x: x.view(),
        w: w.map(Into::into),
        a,
        b,
        h: h.view(),
        dy: dy.view(),
        scale,
        dropout,
        da: da.view_mut(),
        db: db.view_mut(),
        dbias: Some(dbias.view_mut()),
        dx: Some((&mut dx).into()),
    }
    .run(backend)?;
    Ok(Got {
        h: down(backend, &h),
        y: down(backend, &y),
        da: down(backend, &da),
        db: down(backend, &db),
        dbias: down(backend, &dbias),
        dx: down(backend, &dx),
    })
}

/// `false` on a backend that refuses factors for each row; the check is then named as not covered.
fn takes_banks<B: Backend>(backend: &B, check: &str) -> bool {
    let mixed = Mixed::new(Dims { m: 2, k: 2, n: 2, r: 1 }, 2, 1, whole);
    match run_mixed(backend, &mixed, How::default()) {
        Ok(_) => true,
        Err(Error::Value { name: "a", got, .. }) if got == "one for each row" => {
            eprintln!("not covered on {}: {check}", backend.device());
            false
        }
        Err(other) => panic!("{other}"),
    }
}

#[track_caller]
fn assert_mixed_exact<E: Float>(what: &str, got: &Got<E>, want: &MixedOut) {
    assert_exact(&format!("{what} h"), &got.h, &want.h);
    assert_exact(&format!("{what} y"), &got.y, &want.y);
    assert_exact(&format!("{what} da"), &got.da, &want.da);
    assert_exact(&format!("{what} db"), &got.db, &want.db);
    assert_exact(&format!("{what} dbias"), &got.dbias, &want.dbias);
    assert_exact(&format!("{what} dx"), &got.dx, &want.dx);
}

#[track_caller]
fn assert_mixed_within<E: Float>(what: &str, got: &Got<E>, mixed: &Mixed) {
    let (Dims { m, k, n, r }, want, size) = (mixed.dims(), mixed.run(), mixed.magnitudes().run());
    assert_within(&format!("{what} h"), &got.h, &want.h, &size.h, k + 1);
    assert_within(&format!("{what} y"), &got.y, &want.y, &size.y, k + r + 5);
    assert_within(&format!("{what} da"), &got.da, &want.da, &size.da, m + n + 4);
    assert_within(&format!("{what} db"), &got.db, &want.db, &size.db, m + k + 4);
    assert_within(&format!("{what} dbias"), &got.dbias, &want.dbias, &size.dbias, m);
    assert_within(&format!("{what} dx"), &got.dx, &want.dx, &size.dx, n + r + 6);
}

/// Shapes, each with some numbers of slots.
fn mixed_shapes() -> impl Iterator<Item = (usize, Dims, usize)> {
    let slots = [1, 2, 4, 9, 40];
    shapes().into_iter().enumerate().map(move |(at, dims)| (at, dims, slots[at % slots.len()]))
}

pub fn mixed_batches_are_exact_on_whole_numbers<B: Backend>(backend: &B) {
    if !takes_banks(backend, "mixed_batches_are_exact_on_whole_numbers") {
        return;
    }
    for (at, dims, slots) in mixed_shapes() {
        let mixed = Mixed::new(dims, slots, at as u64, whole);
        for how in [How::default(), How { f32_factors: true, ..How::default() }] {
            let got = run_mixed(backend, &mixed, how).unwrap();
            assert_mixed_exact(&format!("{dims:?}, {slots} slots"), &got, &mixed.run());
        }
    }
}

pub fn mixed_batches_round_within_bounds<B: Backend>(backend: &B) {
    if !takes_banks(backend, "mixed_batches_round_within_bounds") {
        return;
    }
    for (at, dims, slots) in mixed_shapes() {
        let mixed = Mixed::new(dims, slots, at as u64, |dims, seed| random::<B::Elem>(dims, 1.7, seed));
        let got = run_mixed(backend, &mixed, How::default()).unwrap();
        assert_mixed_within(&format!("{dims:?}, {slots} slots"), &got, &mixed);
    }
}

pub fn mixed_batches_drop_what_the_mask_says<B: Backend>(backend: &B) {
    if !takes_banks(backend, "mixed_batches_drop_what_the_mask_says") {
        return;
    }
    for (at, dims, slots) in mixed_shapes() {
        let halves = Dropout::new(0.5, 77 + at as u64).unwrap(); // keeps whole numbers whole
        let mut mixed = Mixed::new(dims, slots, at as u64, whole);
        mixed.layer.mask = mask(halves, dims.m, dims.k);
        for without_w in [false, true] {
            if without_w {
                mixed.layer.w = zeros(dims.n, dims.k);
            }
            let got = run_mixed(backend, &mixed, How { dropout: Some(halves), without_w, ..How::default() }).unwrap();
            assert_mixed_exact(&format!("{dims:?}, {slots} slots"), &got, &mixed.run());
        }
    }
}

/// One row for each adapter, all rows one adapter, no row any, the base layer missing, a bank of one slot, ranks from 1 to 128.
pub fn mixed_batches_have_edges<B: Backend>(backend: &B) {
    if !takes_banks(backend, "mixed_batches_have_edges") {
        return;
    }
    let how = How::default();
    for m in [1, 5, 17, 40] {
        let dims = Dims { m, k: 70, n: 45, r: 128 };
        let each = Mixed { rows: (0..m).rev().map(Some).collect(), ..Mixed::new(dims, m + 1, 3, whole) };
        let cases = [
            Mixed { rows: vec![Some(0); m], ..each.clone() },
            Mixed { rows: vec![None; m], ..each.clone() },
            Mixed { rows: (0..m).map(|i| (i + 1 == m).then_some(0)).collect(), ..each.clone() },
            Mixed { rows: vec![Some(0); m], ..Mixed::new(dims, 1, 4, whole) },
            each,
        ];
        for (at, mixed) in cases.iter().enumerate() {
            let got = run_mixed(backend, mixed, how).unwrap();
            assert_mixed_exact(&format!("{m} rows, case {at}"), &got, &mixed.run());
            let update = Mixed { layer: Lora { w: zeros(dims.n, dims.k), ..mixed.layer.clone() }, ..mixed.clone() };
            let got = run_mixed(backend, &update, How { without_w: true, ..how }).unwrap();
            assert_mixed_exact(&format!("{m} rows, case {at}, without w"), &got, &update.run());
        }
    }
}

/// The bits of a row are its own: those of the base layer if it has no adapter; the same whatever the other rows use, and in any order.
pub fn nobody_depends_on_the_company<B: Backend>(backend: &B) {
    if !takes_banks(backend, "nobody_depends_on_the_company") {
        return;
    }
    for (seed, m) in [3, 16, 30, 70].into_iter().enumerate() {
        let dims = Dims { m, k: 600, n: 150, r: 9 };
        let how = How::default();
        let mixed = Mixed::new(dims, 6, seed as u64, |dims, seed| random::<B::Elem>(dims, 1.3, seed));
        let got = run_mixed(backend, &mixed, how).unwrap();
        let (y, dx, _, _) = run_linear(backend, &mixed.layer);
        for i in (0..m).filter(|&i| mixed.rows[i].is_none()) {
            assert!(row(&got.y, i, m) == row(&y, i, m) && row(&got.dx, i, m) == row(&dx, i, m), "row {i} of {m}");
        }
        // Other adapters for the others.
        let alone =
            |i: usize, other: usize| if i.is_multiple_of(2) { mixed.rows[i] } else { Some(other).filter(|&other| other < 5) };
        for other in 0..6 {
            let company = Mixed { rows: (0..m).map(|i| alone(i, other)).collect(), ..mixed.clone() };
            let theirs = run_mixed(backend, &company, how).unwrap();
            assert_rows_equal(&got, &theirs, m, |i| (i.is_multiple_of(2)).then_some(i));
        }
        // Another order.
        let mut order: Vec<usize> = (0..m).collect();
        Rng::new(seed as u64).shuffle(&mut order);
        let theirs = run_mixed(backend, &mixed.reordered(&order), how).unwrap();
        assert_rows_equal(&got, &theirs, m, |i| order.iter().position(|&there| there == i));
    }
}

fn row<T>(all: &[T], i: usize, m: usize) -> &[T] {
    let width = all.len() / m;
    &all[i * width..][..width]
}

/// Row `i` of one is row `to(i)` of the other, bit for bit.
#[track_caller]
fn assert_rows_equal<E: Float>(one: &Got<E>, other: &Got<E>, m: usize, to: impl Fn(usize) -> Option<usize>) {
    for (i, j) in (0..m).filter_map(|i| Some((i, to(i)?))) {
        assert!(row(&one.h, i, m) == row(&other.h, j, m), "h, row {i}");
        assert!(row(&one.y, i, m) == row(&other.y, j, m), "y, row {i}");
        assert!(row(&one.dx, i, m) == row(&other.dx, j, m), "dx, row {i}");
    }
}

/// The checks above see it if a row uses the slot beside its own, or a gradient goes to the segment beside its own.
pub fn a_slot_beside_the_right_one_is_noticed<B: Backend>(backend: &B) {
    if !takes_banks(backend, "a_slot_beside_the_right_one_is_noticed") {
        return;
    }
    let dims = Dims { m: 12, k: 20, n: 18, r: 3 };
    let mixed = Mixed { rows: (0..12).map(|i| Some(i % 5).filter(|&slot| slot < 4)).collect(), ..Mixed::new(dims, 6, 1, whole) };
    let (want, r) = (mixed.run(), dims.r);
    let beside = |slot: Option<usize>| slot.map(|slot| (slot + 1) % 5);
    for at in 0..12 {
        let mut wrong = mixed.clone();
        wrong.rows[at] = beside(mixed.rows[at]);
        if wrong.rows[at] == mixed.rows[at] {
            continue;
        }
        let got = run_mixed(backend, &wrong, How::default()).unwrap();
        let differs =
            |got: &[B::Elem], want: &Mat| got.iter().zip(&want.data).any(|(got, want)| f64::from(got.to_f32()) != *want);
        assert!(differs(row(&got.y, at, 12), &Mat::from_vec(1, 18, row(&want.y.data, at, 12).to_vec())), "y, row {at}");
        assert!(differs(row(&got.dx, at, 12), &Mat::from_vec(1, 20, row(&want.dx.data, at, 12).to_vec())), "dx, row {at}");
    }
    let got = run_mixed(backend, &mixed, How::default()).unwrap();
    for (one, other) in [(0, 1), (1, 2), (2, 3)] {
        assert!(got.da[one * r * 20..][..r * 20] != got.da[other * r * 20..][..r * 20], "dA of segments {one} and {other}");
        assert!(got.db[one * r * 18..][..r * 18] != got.db[other * r * 18..][..r * 18], "dB of segments {one} and {other}");
    }
}
