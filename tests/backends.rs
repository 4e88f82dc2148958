//! The suite on the CPU: every element type, and every vector unit that this machine has.

#[path = "../benches/shapes/mod.rs"]
mod measured;
mod support;

use lowrank::{Backend, Cpu, DType, Float, Passes, Tensor, VectorUnit, bf16, f16};

use support::bounds::assert_within;
use support::data::{Dims, down, random, shapes, unwritten, up};
use support::oracle::{Lora, Mat};
use support::suite;

suite!(cpu_f32, lowrank::Cpu::<f32>::new().unwrap());
suite!(cpu_f16, lowrank::Cpu::<lowrank::f16>::new().unwrap());
suite!(cpu_bf16, lowrank::Cpu::<lowrank::bf16>::new().unwrap());

/// Runs the suite on the units that [`Cpu::new`] did not choose.
fn on_every_unit<E: Float>(check: impl Fn(&Cpu<E>)) {
    for unit in VectorUnit::available().into_iter().chain([VectorUnit::AmxEmulated]) {
        check(&Cpu::new().unwrap().with_unit(unit).unwrap());
    }
}

/// Runs the checks that reach every kernel.
fn kernels<E: Float>(cpu: &Cpu<E>) {
    suite::lora_is_exact_on_whole_numbers(cpu);
    suite::lora_rounds_within_bounds(cpu);
    suite::lora_drops_what_the_mask_says(cpu);
    suite::update_alone_is_exact_on_whole_numbers(cpu);
    suite::dropout_drops_what_the_mask_says(cpu);
    suite::linear_is_exact_on_whole_numbers(cpu);
    suite::relu_and_its_derivative_are_exact(cpu);
    suite::add_is_exact(cpu);
    suite::accumulate_is_exact_on_whole_numbers(cpu);
    suite::row_norms_round_within_bounds(cpu);
    suite::magnitude_is_exact_on_whole_numbers(cpu);
    suite::magnitude_rounds_within_bounds(cpu);
    suite::stochastic_merging_takes_the_neighbour_that_the_word_says(cpu);
    suite::adam_follows_the_oracle_for_ten_steps(cpu);
    suite::adam_is_exact_on_whole_numbers(cpu);
    suite::a_master_gives_way_to_the_weight(cpu);
    suite::steps_too_small_for_the_element_type_add_up(cpu);
    suite::factored_gradients_equal_dense_ones(cpu);
    suite::parts_of_wider_matrices_are_operands(cpu);
    suite::outputs_are_added_to(cpu);
    suite::added_sums_round_within_bounds(cpu);
    suite::parts_of_wider_weights_are_merged_into(cpu);
    suite::f32_factors_are_exact_on_whole_numbers(cpu);
    suite::f32_factors_are_not_rounded(cpu);
    suite::a_lent_weight_may_be_packed(cpu);
}

#[test]
fn every_vector_unit_passes_in_f32() {
    on_every_unit(kernels::<f32>);
}

#[test]
fn every_vector_unit_passes_in_f16() {
    on_every_unit(kernels::<f16>);
}

#[test]
fn every_vector_unit_passes_in_bf16() {
    on_every_unit(kernels::<bf16>);
}

/// Row strides do not change a bit.
fn strides_change_no_bit<E: Float>(unit: VectorUnit) {
    let cpu = Cpu::<E>::new().unwrap().with_unit(unit).unwrap();
    for (seed, dims) in shapes().into_iter().enumerate() {
        let layer = random::<E>(dims, 0.9, seed as u64);
        for dropout in [None, Some(lowrank::op::Dropout::new(0.25, 7).unwrap())] {
            let (contiguous, strided) =
                (suite::run_lora(&cpu, &layer, dropout), suite::run_strided_lora(&cpu, &layer, dropout, true, None));
            assert_eq!(contiguous.bits(), strided.bits(), "{dims:?} {unit:?} {dropout:?}");
        }
    }
}

#[test]
fn strides_change_no_bit_in_any_type() {
    for unit in [VectorUnit::best(), VectorUnit::Scalar, VectorUnit::AmxEmulated] {
        strides_change_no_bit::<bf16>(unit);
    }
    strides_change_no_bit::<f32>(VectorUnit::best());
    strides_change_no_bit::<f16>(VectorUnit::best());
}

/// The shapes of the benchmarks. Those that are too large for the oracle are checked in part by rivals/ before they are measured.
#[test]
fn the_benchmarked_shapes_are_right() {
    let small = measured::Shape::all().into_iter().filter(|shape| shape.m * shape.k * shape.n <= 1 << 24);
    for (seed, measured::Shape { m, k, n, r, .. }) in small.enumerate() {
        suite::lora_is_exact_at(&Cpu::<f32>::new().unwrap(), Dims { m, k, n, r }, seed as u64);
    }
}

#[test]
fn an_unavailable_unit_is_refused_by_name() {
    let absent = if cfg!(target_arch = "x86_64") { VectorUnit::Neon } else { VectorUnit::Avx2 };
    let error = Cpu::<f32>::new().unwrap().with_unit(absent).err().unwrap();
    assert_eq!(error.to_string(), format!("cpu is unavailable: this CPU has no {}", absent.name()));
    assert!(VectorUnit::from_name("sse9").is_err());
    assert!(Cpu::<f32>::new().unwrap().with_threads(0).is_err());
}

/// The variable is set for a process of its own, which runs this test again.
#[cfg(unix)]
#[test]
fn a_name_that_is_not_unicode_is_refused() {
    use std::os::unix::ffi::OsStrExt;
    const NAME: &str = "LOWRANK_UNIT";
    let bytes = std::ffi::OsStr::from_bytes(b"avx\xff");
    if std::env::var_os(NAME).is_some_and(|name| name == bytes) {
        let error = Cpu::<f32>::new().err().unwrap().to_string();
        return assert!(error.starts_with("cpu: `unit` is avx\u{fffd}, want amx, "), "{error}");
    }
    let mut again = std::process::Command::new(std::env::current_exe().unwrap());
    again.env(NAME, bytes).args(["--exact", "a_name_that_is_not_unicode_is_refused"]);
    let done = again.output().unwrap();
    let said = String::from_utf8_lossy(&done.stdout);
    assert!(done.status.success() && said.contains("1 passed"), "{said}");
}

/// Sizes on both sides of every limit of the blocked and skinny regimes: rows of a chunk, rows below which packing does not pay, columns
/// of a strip, depth of a block, the largest rank that shares the last block of the depth; and empty layers.
fn sizes_around_every_cut() -> Vec<Dims> {
    let rows = [16, 17, 24, 25, 1007, 1008, 1009, 1023].map(|m| Dims { m, k: 37, n: 21, r: 3 });
    let cols = [255, 256, 257, 513, 2100].map(|n| Dims { m: 30, k: 19, n, r: 17 });
    let depth = [511, 512, 513, 1024, 1025].map(|k| Dims { m: 29, k, n: 33, r: 2 });
    let ranks = [16, 32, 33, 128, 129, 513].map(|r| Dims { m: 43, k: 520, n: 35, r });
    let empty = [(40, 0, 30, 3), (40, 30, 0, 3), (1010, 0, 5, 130)].map(|(m, k, n, r)| Dims { m, k, n, r });
    [&rows[..], &cols, &depth, &ranks, &empty].concat()
}

#[test]
fn every_cut_of_the_engine_is_exact_on_whole_numbers() {
    let (cpu, half) = (Cpu::<f32>::new().unwrap(), Cpu::<bf16>::new().unwrap().with_threads(3).unwrap());
    let pairs = half.clone().with_unit(VectorUnit::AmxEmulated).unwrap();
    for (seed, dims) in sizes_around_every_cut().into_iter().enumerate() {
        suite::lora_is_exact_at(&cpu, dims, seed as u64);
        suite::lora_is_exact_at(&half, dims, seed as u64);
        suite::lora_is_exact_at(&pairs, dims, seed as u64);
    }
}

/// Prepacked panels hold the elements that packing during a call would give.
fn packed_weights_give_the_same_bits<E: Float>(unit: VectorUnit) {
    let cpu = Cpu::<E>::new().unwrap().with_unit(unit).unwrap();
    let deep = [Dims { m: 33, k: 2060, n: 70, r: 16 }, Dims { m: 70, k: 45, n: 1030, r: 130 }];
    for dims in shapes().into_iter().chain(sizes_around_every_cut()).chain(deep) {
        let layer = random::<E>(dims, 1.5, 3);
        let loose = suite::run_lora(&cpu, &layer, None);
        for passes in [Passes::Forward, Passes::ForwardAndBackward] {
            let got = suite::run_packed_lora(&cpu, &layer, passes);
            let same = [got.h == loose.h, got.y == loose.y, got.da == loose.da, got.db == loose.db, got.dx == loose.dx];
            assert!(same == [true; 5], "{dims:?} {passes:?} {} h, y, da, db, dx {same:?}", unit.name());
        }
    }
}

#[test]
fn packed_weights_give_the_same_bits_in_every_type() {
    for unit in VectorUnit::available().into_iter().chain([VectorUnit::AmxEmulated]) {
        packed_weights_give_the_same_bits::<bf16>(unit);
    }
    packed_weights_give_the_same_bits::<f32>(VectorUnit::best());
    packed_weights_give_the_same_bits::<f32>(VectorUnit::Scalar);
    packed_weights_give_the_same_bits::<f16>(VectorUnit::best());
}

/// Writing to a weight invalidates its prepacked panels.
#[test]
fn a_packed_weight_that_is_written_is_read_as_it_was_written() {
    use lowrank::op::{LoraMerge, Rounding};
    let (cpu, dims) = (Cpu::<f32>::new().unwrap(), Dims { m: 40, k: 50, n: 60, r: 3 });
    let layer = random::<f32>(dims, 1.5, 3);
    let [x, a, b] = [&layer.x, &layer.a, &layer.b].map(|mat| up(&cpu, mat));
    let results = [false, true].map(|packed| {
        let mut w = up(&cpu, &layer.w);
        if packed {
            cpu.keep_packed(&mut w, Passes::ForwardAndBackward).unwrap();
        }
        LoraMerge { a: (&a).into(), b: (&b).into(), scale: 0.5, rounding: Rounding::Nearest, w: w.view_mut() }.run(&cpu).unwrap();
        let mut y = unwritten(&cpu, dims.m, dims.n);
        lowrank::op::LinearForward { x: x.view(), w: (&w).into(), bias: None, y: (&mut y).into() }.run(&cpu).unwrap();
        down(&cpu, &y)
    });
    assert_eq!(results[0], results[1]);
}

/// A tensor with a dimension of 0 has no elements, whatever the other is: no loop may run along the other.
#[test]
fn an_empty_dimension_makes_the_other_free() {
    use lowrank::op::{Adam, AdamRate, LinearBackward, LinearForward, WeightGrad};
    let cpu = Cpu::<bf16>::new().unwrap().with_unit(VectorUnit::AmxEmulated).unwrap();
    for long in [1 << 40, isize::MAX as usize / 8] {
        for (m, k, n) in [(long, 0, 0), (0, long, 0), (0, 0, long)] {
            let (x, mut w, dy): (Tensor<Cpu<bf16>>, _, _) = (unwritten(&cpu, m, k), unwritten(&cpu, n, k), unwritten(&cpu, m, n));
            let (mut y, mut dx, mut dw) = (unwritten(&cpu, m, n), unwritten(&cpu, m, k), unwritten(&cpu, n, k));
            cpu.keep_packed(&mut w, Passes::ForwardAndBackward).unwrap();
            LinearForward { x: x.view(), w: (&w).into(), bias: None, y: (&mut y).into() }.run(&cpu).unwrap();
            let (dx, dw) = (Some(&mut dx), Some(&mut dw));
            LinearBackward {
                x: Some(x.view()),
                w: Some((&w).into()),
                dy: dy.view(),
                dx: dx.map(Into::into),
                dw: dw.map(Tensor::view_mut),
                dbias: None,
            }
            .run(&cpu)
            .unwrap();
            let (mut first, mut second) = (unwritten(&cpu, n, k), unwritten(&cpu, n, k));
            let (rate, grad) = (AdamRate::new(0.1, 0.9, 0.99, 1e-8, 1).unwrap(), WeightGrad::Factored { dy: &dy, x: &x });
            let mut master = unwritten(&cpu, n, k);
            Adam { grad, rate, m: &mut first, v: &mut second, master: Some(&mut master), w: &mut w }.run(&cpu).unwrap();
        }
    }
}

/// With `B = 0` the sums are those of the base layer, in the same order.
fn a_fresh_adapter_gives_the_bits_of_the_base_layer<E: Float>(cpu: &Cpu<E>) {
    use lowrank::op::{Factor, LinearForward, LoraForward};
    for dims in sizes_around_every_cut() {
        let Dims { m, n, r, .. } = dims;
        let layer = random::<E>(dims, 1.5, 3);
        let [x, w, a] = [&layer.x, &layer.w, &layer.a].map(|mat| up::<_, E>(cpu, mat));
        let (wide_a, wide_b) = (up::<_, f32>(cpu, &layer.a), Tensor::<_, f32>::zeros(cpu, (n, r)).unwrap());
        let b = Tensor::zeros(cpu, (n, r)).unwrap();
        let (mut h, mut y, mut base) = (unwritten(cpu, m, r), unwritten::<_, E>(cpu, m, n), unwritten::<_, E>(cpu, m, n));
        LinearForward { x: x.view(), w: (&w).into(), bias: None, y: (&mut base).into() }.run(cpu).unwrap();
        let (stored, wide) = ([(&a).into(), (&b).into()], [Factor::F32(wide_a.view()), Factor::F32(wide_b.view())]);
        for [a, b] in [stored, wide] {
            let (x, w, h, scale) = (x.view(), Some((&w).into()), h.view_mut(), 2.0);
            LoraForward { x, w, bias: None, a, b, scale, dropout: None, h, y: (&mut y).into() }.run(cpu).unwrap();
            assert!(down(cpu, &y) == down(cpu, &base), "{dims:?}, factors in {}", a.dtype());
        }
    }
}

#[test]
fn a_fresh_adapter_gives_the_bits_of_the_base_layer_in_every_type() {
    a_fresh_adapter_gives_the_bits_of_the_base_layer(&Cpu::<f32>::new().unwrap());
    a_fresh_adapter_gives_the_bits_of_the_base_layer(&Cpu::<f16>::new().unwrap());
    a_fresh_adapter_gives_the_bits_of_the_base_layer(&Cpu::<bf16>::new().unwrap());
    a_fresh_adapter_gives_the_bits_of_the_base_layer(&Cpu::<bf16>::new().unwrap().with_unit(VectorUnit::AmxEmulated).unwrap());
}

/// The kind of a number that is not finite.
fn kind(number: f64) -> &'static str {
    match number {
        _ if number.is_nan() => "NaN",
        f64::INFINITY => "∞",
        f64::NEG_INFINITY => "-∞",
        _ => "finite",
    }
}

/// One element of one operand is NaN or infinite: every output is as the formula gives it, on every unit.
fn non_finite_inputs_propagate<E: Float>(cpu: &Cpu<E>) {
    let spoil: [fn(&mut Lora, f64); 5] = [
        |layer, number| layer.x.data[7] = number,
        |layer, number| layer.w.data[7] = number,
        |layer, number| layer.a.data[7] = number,
        |layer, number| layer.b.data[7] = number,
        |layer, number| layer.dy.data[7] = number,
    ];
    for (m, k, n, r) in [(1, 20, 18, 2), (9, 18, 20, 3), (40, 35, 50, 4), (40, 20, 18, 140)] {
        let dims = Dims { m, k, n, r };
        for (operand, spoil) in spoil.iter().enumerate() {
            for number in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
                let mut layer = random::<E>(dims, 0.5, 4);
                spoil(&mut layer, number);
                let (got, want) = (suite::run_lora(cpu, &layer, None), layer.run());
                let same =
                    |got: &[E], want: &Mat| got.iter().map(|x| kind(x.to_f32().into())).eq(want.data.iter().map(|&x| kind(x)));
                let wide = |got: &[f32], want: &Mat| got.iter().map(|&x| kind(x.into())).eq(want.data.iter().map(|&x| kind(x)));
                let inputs = [wide(&got.h, &want.h), same(&got.y, &want.y), same(&got.dx, &want.dx)];
                let parameters = [wide(&got.da, &want.da), wide(&got.db, &want.db), wide(&got.dbias, &want.dbias)];
                let unit = cpu.unit().name();
                assert!(inputs == [true; 3], "{unit} {dims:?} {number} in operand {operand}: h, y, dx {inputs:?}");
                assert!(parameters == [true; 3], "{unit} {dims:?} {number} in operand {operand}: da, db, dbias {parameters:?}");
            }
        }
    }
}

#[test]
fn non_finite_inputs_propagate_on_every_unit() {
    on_every_unit(non_finite_inputs_propagate::<f32>);
    on_every_unit(non_finite_inputs_propagate::<bf16>);
}

/// All output bits of the verbs that use several threads.
fn bits_of_every_loop<E: Float>(cpu: &Cpu<E>, layer: &Lora) -> Vec<u32> {
    use lowrank::op::{Dropout, LoraMerge, LoraRowNorm, MagnitudeBackward, Rounding};
    let (m, n, scale) = (layer.x.rows, layer.w.rows, 0.5);
    let dropout = Dropout::new(0.25, 3).unwrap();
    let mut bits = [None, Some(dropout)].map(|dropout| suite::run_lora(cpu, layer, dropout).bits()).concat();
    bits.extend(bits_of_one_pass(cpu, layer));
    let [mut w, a, b, dy] = [&layer.w, &layer.a, &layer.b, &layer.dy].map(|mat| up::<_, E>(cpu, mat));
    let (mut norm, mut dmagnitude, mut dz) = (unwritten(cpu, 1, n), unwritten(cpu, 1, n), unwritten(cpu, m, n));
    LoraRowNorm { w: (&w).into(), a: (&a).into(), b: (&b).into(), scale, norm: norm.view_mut() }.run(cpu).unwrap();
    let (magnitude, norm, dz_, dm) = (up(cpu, layer.bias.as_ref().unwrap()), &norm, Some(&mut dz), Some(&mut dmagnitude));
    let backward = MagnitudeBackward {
        z: dy.view(),
        magnitude: magnitude.view(),
        norm: norm.view(),
        dy: dy.view(),
        dz: dz_.map(Tensor::view_mut),
        dmagnitude: dm.map(Tensor::view_mut),
        dbias: None,
    };
    backward.run(cpu).unwrap();
    for rounding in [Rounding::Nearest, Rounding::Stochastic { seed: 3 }] {
        LoraMerge { a: (&a).into(), b: (&b).into(), scale, rounding, w: w.view_mut() }.run(cpu).unwrap();
    }
    let stored = [down(cpu, &w), down(cpu, &dz)].concat();
    bits.extend([down(cpu, norm), down(cpu, &dmagnitude)].concat().into_iter().map(f32::to_bits));
    bits.extend(stored.into_iter().map(|x| x.to_f32().to_bits()));
    bits
}

/// Work is split over blocks of the output, never along a sum.
fn threads_change_no_bit<E: Float>(unit: VectorUnit, dims: impl IntoIterator<Item = Dims>) {
    let with = |threads| Cpu::<E>::new().unwrap().with_unit(unit).unwrap().with_threads(threads).unwrap();
    let cpus = [1, 2, 3, 7].map(with);
    for dims in dims {
        let layer = random::<E>(dims, 1.5, 2);
        let [first, rest @ ..] = cpus.each_ref().map(|cpu| bits_of_every_loop(cpu, &layer));
        assert!(rest.iter().all(|run| *run == first), "{dims:?} {} {}", unit.name(), E::DTYPE);
    }
}

#[test]
fn the_number_of_threads_does_not_change_a_bit() {
    let large = [(10, 784, 1000, 1), (300, 800, 700, 16), (1, 900, 1100, 8)].map(|(m, k, n, r)| Dims { m, k, n, r });
    threads_change_no_bit::<f32>(VectorUnit::best(), shapes().into_iter().chain(large));
    let few = [(10, 300, 500, 4), (70, 400, 300, 16)].map(|(m, k, n, r)| Dims { m, k, n, r });
    threads_change_no_bit::<f16>(VectorUnit::best(), few);
    threads_change_no_bit::<bf16>(VectorUnit::best(), few);
    threads_change_no_bit::<bf16>(VectorUnit::AmxEmulated, few);
}

/// The outputs of ReLU and of a step of Adam, with both kinds of gradient, for elements of which some are 0, -0 or nearly 0.
fn bits_of_one_pass<E: Float>(cpu: &Cpu<E>, layer: &Lora) -> Vec<u32> {
    use lowrank::op::{Adam, AdamRate, Relu, WeightGrad};
    let thinned = |mat: &Mat| {
        let numbers = mat.data.iter().enumerate().map(|(at, &x)| [x, 0.0, -0.0, x * 1e-38, -x * 1e-40][at % 5]);
        Mat::from_vec(mat.rows, mat.cols, numbers.collect())
    };
    let (n, k) = (layer.w.rows, layer.w.cols);
    let (w, dy, x): (Tensor<Cpu<E>>, Tensor<_>, Tensor<_>) =
        (up(cpu, &thinned(&layer.w)), up(cpu, &layer.dy), up(cpu, &thinned(&layer.x)));
    let (grad, rate) = (up(cpu, &thinned(&layer.w)), AdamRate::new(0.1, 0.9, 0.99, 1e-8, 1).unwrap());
    let mut bits = Vec::new();
    for factored in [false, true] {
        let grad = || if factored { WeightGrad::Factored { dy: &dy, x: &x } } else { WeightGrad::Dense(&grad) };
        let (mut m, mut v) = (up(cpu, &thinned(&layer.w)), up(cpu, &thinned(&layer.w.abs()).abs()));
        let (mut stepped, mut y) = (up(cpu, &layer.w), unwritten(cpu, n, k));
        Adam { grad: grad(), rate, m: &mut m, v: &mut v, master: None, w: &mut stepped }.run(cpu).unwrap();
        let (mut master, rate) = (up(cpu, &thinned(&layer.w)), AdamRate::adamw(0.1, 0.9, 0.99, 1e-8, 0.1, 2).unwrap());
        Adam { grad: grad(), rate, m: &mut m, v: &mut v, master: Some(&mut master), w: &mut stepped }.run(cpu).unwrap();
        bits.extend(down(cpu, &master).into_iter().map(f32::to_bits));
        Relu { x: w.view(), y: y.view_mut() }.run(cpu).unwrap();
        let stored = [down(cpu, &stepped), down(cpu, &y)].concat();
        bits.extend([down(cpu, &m), down(cpu, &v)].concat().into_iter().map(f32::to_bits));
        bits.extend(stored.into_iter().map(|x| x.to_f32().to_bits()));
    }
    bits
}

/// Every unit has sixteen lanes, so all sum in the same order.
fn fused_units_agree<E: Float>() {
    let fused = VectorUnit::available().into_iter().filter(|unit| {
        use VectorUnit::{Avx2, Avx512, Neon};
        E::DTYPE != DType::BF16 && *unit != VectorUnit::Scalar || [Avx512, Avx2, Neon].contains(unit)
    });
    let cpus: Vec<_> = fused.map(|unit| Cpu::<E>::new().unwrap().with_unit(unit).unwrap()).collect();
    for dims in shapes().into_iter().chain([2, 3, 7, 11].map(|m| Dims { m, k: 2600, n: 33, r: 3 })) {
        let layer = random::<E>(dims, 1.5, 2);
        let run = |cpu| [suite::run_lora(cpu, &layer, None).bits(), bits_of_one_pass(cpu, &layer)];
        let runs: Vec<_> = cpus.iter().map(run).collect();
        assert!(runs.windows(2).all(|pair| pair[0] == pair[1]), "{dims:?}");
    }
}

#[test]
fn units_with_fused_multiply_add_agree_bit_for_bit() {
    fused_units_agree::<f32>();
    fused_units_agree::<f16>();
    fused_units_agree::<bf16>();
}

/// The emulated AMX tile equals the real one. Needs a CPU with AMX.
#[test]
fn emulated_tiles_are_those_of_amx_in_bf16() {
    let units = [VectorUnit::Amx, VectorUnit::AmxEmulated].map(|unit| Cpu::<bf16>::new().unwrap().with_unit(unit));
    let [Ok(amx), Ok(emulated)] = units else { return println!("not run: this CPU has no AMX") };
    for dims in shapes().into_iter().chain([Dims { m: 70, k: 1100, n: 65, r: 16 }]) {
        let layer = random::<bf16>(dims, 1.5, 2);
        assert!(suite::run_lora(&amx, &layer, None) == suite::run_lora(&emulated, &layer, None), "{dims:?}");
    }
}

/// FNV-1a of all output bits of a step of Adam with a dense gradient, and of one with a factored gradient.
fn hash_of_two_steps<E: Float>(cpu: &Cpu<E>) -> u64 {
    use lowrank::op::{Adam, AdamRate, WeightGrad};
    let (m, k, n) = (10, 37, 21);
    let numbers = |rows: usize, cols: usize, seed: usize| {
        let number = |i: usize| ((i * 7919 + seed * 104_729) % 2003) as f64 / 1024.0 - 1.0;
        Mat::from_vec(rows, cols, (0..rows * cols).map(number).collect())
    };
    let (g, dy, x) = (up(cpu, &numbers(n, k, 1)), up(cpu, &numbers(m, n, 2)), up(cpu, &numbers(m, k, 3)));
    let (mut first, mut second) = (up(cpu, &numbers(n, k, 4)), up(cpu, &numbers(n, k, 5).abs()));
    let mut w = up(cpu, &numbers(n, k, 6));
    for (t, grad) in [(3, WeightGrad::Dense(&g)), (4, WeightGrad::Factored { dy: &dy, x: &x })] {
        let rate = AdamRate::new(1e-2, 0.9, 0.999, 1e-8, t).unwrap();
        Adam { grad, rate, m: &mut first, v: &mut second, master: None, w: &mut w }.run(cpu).unwrap();
    }
    let w = down(cpu, &w).into_iter().map(|x: E| x.to_f32());
    let bytes = w.chain(down(cpu, &first)).chain(down(cpu, &second)).flat_map(|x| x.to_bits().to_le_bytes());
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))
}

/// The bits from before weight decay and masters were added, on every unit with fused multiply-add.
#[test]
fn adam_without_decay_and_master_has_the_bits_written_down() {
    fn check<E: Float>(want: u64) {
        for unit in VectorUnit::available().into_iter().filter(|&unit| unit != VectorUnit::Scalar) {
            let got = hash_of_two_steps(&Cpu::<E>::new().unwrap().with_unit(unit).unwrap());
            assert!(got == want, "{}, {}: {got:016x}", E::DTYPE, unit.name());
        }
    }
    check::<f32>(0x9c23_14d1_f057_9da6);
    check::<f16>(0xb3ab_9991_5ccb_fd53);
    check::<bf16>(0x1901_954b_93c8_56f9);
}

/// For long batches Adam computes the gradient as a product first, instead of element by element.
#[test]
fn a_long_batch_gives_adam_the_same_gradient() {
    use lowrank::op::{Adam, AdamRate, WeightGrad};
    let cpu = Cpu::<f32>::new().unwrap();
    for m in [63, 64, 65, 200] {
        let layer = random::<f32>(Dims { m, k: 33, n: 21, r: 1 }, 1.0, 6);
        let (dy, x) = (up(&cpu, &layer.dy), up(&cpu, &layer.x));
        let rate = AdamRate::new(1.0, 0.0, 0.5, 1.0, 1).unwrap();
        let (mut first, mut second, mut w) = (up(&cpu, &layer.w), unwritten(&cpu, 21, 33), up(&cpu, &layer.w));
        second.copy_from_slice(&cpu, &[0.0; 21 * 33]).unwrap();
        let grad = WeightGrad::Factored { dy: &dy, x: &x };
        Adam { grad, rate, m: &mut first, v: &mut second, master: None, w: &mut w }.run(&cpu).unwrap();
        let (want, size) = (&layer.dy.t() * &layer.x, &layer.dy.abs().t() * &layer.x.abs());
        assert_within(&format!("{m} rows: m"), &down(&cpu, &first), &want, &size, m + 2);
    }
}
