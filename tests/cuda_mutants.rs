//! Seeded bugs in the shipped kernels must be detected, each kind by its own test.
#![cfg(feature = "cuda")]

mod support;

use lowrank::{Cuda, Float, bf16};
use support::data::Dims;
use support::emulator::Emulator;
use support::mutants::{Pass, Verdict, assert_faults, mutant, verdicts};
use support::suite;

/// The sizes end in different quarters of a tile, of a panel's depth and of a thread's rows; the last one before its last element.
const QUARTERS: [Dims; 5] = [
    Dims { m: 65, k: 67, n: 66, r: 67 },
    Dims { m: 22, k: 20, n: 23, r: 21 },
    Dims { m: 43, k: 40, n: 41, r: 42 },
    Dims { m: 60, k: 62, n: 61, r: 60 },
    Dims { m: 48, k: 48, n: 48, r: 48 },
];
/// Shapes that differ in which of the eight rows of a step is the last.
const EIGHTHS: [Dims; 9] = [
    Dims { m: 1, k: 7, n: 9, r: 3 },
    Dims { m: 2, k: 7, n: 9, r: 5 },
    Dims { m: 19, k: 255, n: 257, r: 17 },
    Dims { m: 36, k: 7, n: 9, r: 15 },
    Dims { m: 5, k: 256, n: 255, r: 16 },
    Dims { m: 22, k: 257, n: 256, r: 2 },
    Dims { m: 7, k: 7, n: 9, r: 14 },
    Dims { m: 40, k: 3, n: 3, r: 20 },
    Dims { m: 33, k: 3, n: 3, r: 4 },
];
/// Shapes that differ in which of a lane's four rows is the last and in which half of a step the rank ends; for lanes of one column and of
/// several.
fn merges() -> Vec<Dims> {
    let sizes = [(1, 3), (34, 16), (67, 17), (132, 5), (43, 15), (26, 31)];
    let dims = |k| sizes.map(|(n, r)| Dims { m: 1, k, n, r });
    [dims(33), dims(132)].concat()
}
const ALIGNED: Dims = Dims { m: 129, k: 136, n: 104, r: 18 };

const TALL: Dims = Dims { m: 4300, k: 8, n: 8, r: 2 };

#[test]
fn every_barrier_is_needed_and_missed() {
    let (removed, reasons) = (["bar.sync \t0;", ""], ["race", "nothing wrote", "asynchronous copy"]);
    assert_faults::<f32>("lora_forward_y", removed, Pass::Forward, QUARTERS[0], &reasons);
    assert_faults::<bf16>("lora_backward_dx_wide", removed, Pass::Backward, ALIGNED, &reasons);
    let few_rows = Dims { m: 5, k: 64, n: 40, r: 9 };
    assert_faults::<bf16>("lora_forward_y_skinny", removed, Pass::Forward, few_rows, &reasons);
    assert_faults::<f32>("lora_forward_h_skinny", removed, Pass::Forward, few_rows, &reasons);
    // Its sums have their own barrier, or use that for dh, which exists only for small ranks.
    let ranks = [few_rows, Dims { r: 17, ..few_rows }];
    assert_noticed::<f32>("lora_backward_dx_skinny", removed, Pass::Backward, &ranks);
    assert_noticed::<bf16>("lora_backward_dx_skinny", removed, Pass::Backward, &ranks);
    let wide = Dims { m: 70, k: 68, n: 72, r: 18 };
    assert_faults::<f32>("lora_forward_y_wide", removed, Pass::Forward, wide, &reasons);
    assert_faults::<f32>("lora_backward_dx_wide", removed, Pass::Backward, wide, &reasons);
    for kernel in ["lora_backward_dy", "lora_backward_da"] {
        assert_faults::<f32>(kernel, removed, Pass::Backward, TALL, &reasons);
    }
    assert_faults::<bf16>("lora_merge_wide", removed, Pass::Merge, Dims { m: 1, k: 40, n: 70, r: 20 }, &reasons);
}

/// Stores, comparisons, sums and products of Adam, each replaced or removed.
#[test]
fn every_slip_of_adam_is_caught() {
    let slips = [
        ("st.global.f32", "//"),        // the moments, the master
        ("st.global.u16", "//"),        // the weight
        ("setp.eq.s64", "setp.ne.s64"), // whether there is a master
        ("sub.f32", "add.f32"),
        ("mul.f32", "add.f32"),
    ];
    // The test whether the master is used; the second one differs only for NaN.
    let dense = [("setp.neu.f32", "setp.eq.f32"), ("setp.neu.f32", "setp.ne.f32")];
    let factored = [("setp.eq.f32", "setp.neu.f32"), ("setp.eq.f32", "setp.equ.f32")];
    for (kernel, compared) in [("adam_dense", dense), ("adam_factored", factored)] {
        for (from, to) in slips.into_iter().chain(compared) {
            let mutants: Vec<_> = (0..).map_while(|nth| mutant(bf16::DTYPE, kernel, from, to, nth)).collect();
            assert!(!mutants.is_empty(), "{kernel} has no `{from}`");
            for (nth, ptx) in mutants.into_iter().enumerate() {
                let backend = Cuda::<bf16, _>::on(Emulator::with_ptx(bf16::DTYPE, &ptx));
                let survives = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                    suite::adam_is_exact_at(&backend, Dims { m: 3, k: 5, n: 4, r: 1 }, 1);
                    suite::a_master_gives_way_to_the_weight(&backend);
                }));
                assert!(survives.is_err(), "{kernel}: `{to}` for `{from}` number {nth} survives");
            }
        }
    }
}

#[test]
fn every_bound_that_is_off_by_one_is_caught() {
    // The guards of loads and stores: `i >= n` becomes `i > n`.
    let merges = merges();
    let kernels = [
        ("lora_forward_h", Pass::Forward, &QUARTERS[..]),
        ("lora_backward_da", Pass::Backward, &EIGHTHS),
        ("lora_backward_dy", Pass::Backward, &EIGHTHS),
        ("lora_merge", Pass::Merge, &merges[..]),
        ("lora_merge_wide", Pass::Merge, &merges[..]),
    ];
    for (kernel, pass, shapes) in kernels {
        let verdicts = verdicts::<f32>(kernel, "setp.ge.s32", "setp.gt.s32", pass, shapes);
        let survivors = (0..).zip(&verdicts).filter(|(_, verdict)| **verdict == Verdict::Survives).count();
        // One of them is not a bug: a block without rows that does one step adds zeros.
        let harmless = usize::from(kernel == "lora_backward_dy");
        assert!(survivors == harmless, "{kernel}: {survivors} survive: {verdicts:?}");
    }
}

#[test]
fn a_copy_that_is_not_waited_for_is_caught() {
    let early = ["cp.async.wait_group 1;", "cp.async.wait_group 2;"];
    assert_faults::<bf16>("lora_forward_y_wide", early, Pass::Forward, ALIGNED, &["asynchronous copy"]);
    assert_faults::<f32>("lora_forward_y_wide", early, Pass::Forward, ALIGNED, &["asynchronous copy"]);
    assert_faults::<f32>("lora_backward_dx_wide", early, Pass::Backward, ALIGNED, &["asynchronous copy"]);
}

#[test]
fn a_wrong_address_is_caught() {
    // Fragments with rows and columns exchanged; copies of 16 bytes that begin one element too late.
    let (rows, columns) = ("x4.shared.b16 {", "x4.trans.shared.b16 {");
    let exchanged = verdicts::<bf16>("lora_forward_y_wide", rows, columns, Pass::Forward, &[ALIGNED]);
    assert!(exchanged.iter().all(|verdict| *verdict == Verdict::WrongResult), "{exchanged:?}");
    let further = ["], 16, %r", "+2], 16, %r"];
    assert_faults::<bf16>("lora_backward_dx_wide", further, Pass::Backward, ALIGNED, &["misaligned"]);
}

/// Asserts that every mutant is detected, by a fault or by its result.
fn assert_noticed<E: Float>(kernel: &str, [from, to]: [&str; 2], pass: Pass, shapes: &[Dims]) {
    let verdicts = verdicts::<E>(kernel, from, to, pass, shapes);
    assert!(verdicts.iter().all(|verdict| *verdict != Verdict::Survives), "{kernel}: `{to}` for `{from}`: {verdicts:?}");
}

#[test]
fn products_of_the_wrong_part_are_caught() {
    // A missing product of a tile, in steps of the depth that come in pairs or fours; a load with an inverted guard; for dx also exchanged
    // elements of neighbouring columns.
    let few_rows = [1000, 520].map(|depth| Dims { m: 13, k: depth, n: 40, r: 12 });
    let back = [520, 128].map(|depth| Dims { m: 13, k: 40, n: depth, r: 12 });
    let (product, guard) = (["mma.sync.aligned", "// "], ["@has ld.global.nc", "@!has ld.global.nc"]);
    for change in [product, guard] {
        assert_noticed::<bf16>("lora_forward_y_skinny", change, Pass::Forward, &few_rows);
        assert_noticed::<bf16>("lora_backward_dx_skinny", change, Pass::Backward, &back);
    }
    assert_noticed::<f32>("lora_backward_dx_skinny", guard, Pass::Backward, &back);
    assert_noticed::<f32>("lora_forward_h_skinny", guard, Pass::Forward, &few_rows);
    for exchanged in [["30258;", "21520;"], ["21520;", "30258;"]] {
        assert_noticed::<bf16>("lora_backward_dx_skinny", exchanged, Pass::Backward, &back);
    }
}

#[test]
fn products_that_are_left_out_are_caught() {
    // Each multiplication of the bands; each load of 16 bytes of a panel, which the wide engine uses for 32 products.
    let left_out = ["fma.rn.f32", "// "];
    assert_noticed::<f32>("lora_backward_dy", left_out, Pass::Backward, &[Dims { m: 33, k: 8, n: 256, r: 16 }]);
    assert_noticed::<f32>("lora_backward_da", left_out, Pass::Backward, &[Dims { m: 33, k: 256, n: 8, r: 16 }]);
    let left_out = ["ld.shared.v4.f32", "// "];
    assert_noticed::<f32>("lora_forward_y_wide", left_out, Pass::Forward, &[Dims { m: 128, k: 20, n: 128, r: 3 }]);
    assert_noticed::<f32>("lora_backward_dx_wide", left_out, Pass::Backward, &[Dims { m: 128, k: 128, n: 20, r: 3 }]);
}
