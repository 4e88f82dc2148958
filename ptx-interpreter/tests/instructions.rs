//! Every family of instructions, on numbers whose results are known.

use ptx_interpreter::{Arg, Fault, Global, Launch, Module};

/// Runs `body` in 64 threads, and returns what each left in `%rd0`. `%r0` is the thread, `buffer` 1024 bytes of shared memory.
fn run(body: &str) -> Result<Vec<u64>, Fault> {
    let text = format!(
        ".visible .entry test(.param .u64 out) .maxntid 64, 1, 1 {{
            .reg .pred %p<4>; .reg .b16 %rs<8>; .reg .b32 %r<16>; .reg .f32 %f<16>; .reg .b64 %rd<8>;
            .shared .align 16 .b8 buffer[1024];
            mov.u32 %r0, %tid.x;
            mov.u64 %rd0, 0;
            {body}
            ld.param.u64 %rd7, [out];
            mul.wide.u32 %rd6, %r0, 8;
            add.s64 %rd7, %rd7, %rd6;
            st.global.u64 [%rd7], %rd0;
            ret;
        }}"
    );
    let module = Module::parse(&text).unwrap_or_else(|error| panic!("{error} in {text}"));
    let mut out = Global::uninitialised(64 * 8);
    Launch { grid: 1, block: 64, shared: 0 }.run(&module, "test", &mut [Arg::Write(&mut out)])?;
    Ok(out.bytes().chunks(8).map(|bytes| u64::from_le_bytes(bytes.try_into().unwrap())).collect())
}

/// What thread 0 computes with one 32-bit instruction.
fn word(instruction: &str) -> u32 {
    run(&format!("{instruction} cvt.u64.u32 %rd0, %r1;")).unwrap()[0] as u32
}

/// What thread 0 computes with one instruction on floats.
fn float(instruction: &str) -> f32 {
    f32::from_bits(word(&format!("{instruction} mov.b32 %r1, %f1;")))
}

fn wide(instruction: &str) -> u64 {
    run(instruction).unwrap()[0]
}

#[test]
fn integers_wrap_and_widen() {
    assert_eq!(word("add.s32 %r1, -1, 3;"), 2);
    assert_eq!(word("sub.s32 %r1, 1, 3;"), -2i32 as u32);
    assert_eq!(word("mul.lo.s32 %r1, 65536, 65537;"), 65536);
    assert_eq!(word("mul.hi.u32 %r1, -1, -1;"), u32::MAX - 1);
    assert_eq!(word("mul.hi.s32 %r1, -2, 3;"), u32::MAX);
    assert_eq!(word("mad.lo.s32 %r1, -3, 5, 7;"), -8i32 as u32);
    assert_eq!(word("div.u32 %r1, -1, 2;"), u32::MAX / 2);
    assert_eq!(word("div.s32 %r1, -7, 2;"), -3i32 as u32);
    assert_eq!(word("rem.s32 %r1, -7, 2;"), -1i32 as u32);
    assert_eq!(word("min.s32 %r1, -1, 3;"), u32::MAX);
    assert_eq!(word("min.u32 %r1, -1, 3;"), 3);
    assert_eq!(word("max.s32 %r1, -1, 3;"), 3);
    assert_eq!(word("neg.s32 %r1, 5;"), -5i32 as u32);
    assert_eq!(wide("mul.wide.s32 %rd0, -2, 3;") as i64, -6);
    assert_eq!(wide("mul.wide.u32 %rd0, -2, 3;"), 3 * 0xffff_fffe);
    assert_eq!(wide("mul.lo.s64 %rd0, -2, 3;") as i64, -6);
    assert_eq!(word("mov.b32 {%rs0, %rs1}, 0x0002ffff; mad.wide.u16 %r1, %rs0, %rs1, 5;"), 2 * 0xffff + 5);
    assert_eq!(wide("mad.wide.u32 %rd0, -1, 2, 5;"), 2 * 0xffff_ffff + 5);
    assert_eq!(wide("cvt.s64.s32 %rd0, -5;") as i64, -5);
    assert_eq!(wide("cvt.u64.u32 %rd0, -5;"), 0xffff_fffb);
}

#[test]
fn bits_move_where_they_should() {
    assert_eq!(word("shl.b32 %r1, 1, 31;"), 1 << 31);
    assert_eq!(word("shl.b32 %r1, 1, 32;"), 0);
    assert_eq!(word("shr.u32 %r1, -1, 28;"), 15);
    assert_eq!(word("shr.s32 %r1, -8, 40;"), u32::MAX);
    assert_eq!(word("xor.b32 %r1, 12, 10;"), 6);
    assert_eq!(word("not.b32 %r1, 0;"), u32::MAX);
    assert_eq!(word("bfi.b32 %r1, 0xff, 0x12345678, 8, 4;"), 0x1234_5f78);
    assert_eq!(word("bfe.u32 %r1, 0x12345678, 8, 8;"), 0x56);
    assert_eq!(word("bfe.s32 %r1, 0x12345678, 12, 4;"), 5);
    assert_eq!(word("bfe.s32 %r1, 0x12345678, 3, 4;"), u32::MAX);
    assert_eq!(word("bfe.s32 %r1, 0x80000000, 28, 8;"), -8i32 as u32);
    assert_eq!(word("bfe.s32 %r1, 0x80000000, 40, 1;"), u32::MAX);
    assert_eq!(word("bfe.s32 %r1, -1, 0, 0;"), 0);
    assert_eq!(word("bfe.s32 %r1, 0x87654321, 0, 32;"), 0x8765_4321);
    assert_eq!(word("shf.l.wrap.b32 %r1, 0x80000000, 1, 1;"), 3);
    assert_eq!(word("shf.r.wrap.b32 %r1, 0, 1, 1;"), 1 << 31);
    assert_eq!(word("prmt.b32 %r1, 0x03020100, 0x07060504, 0x9147;"), 0x0001_0407);
    assert_eq!(word("popc.b32 %r1, 0xf0f0;"), 8);
    assert_eq!(word("clz.b32 %r1, 1;"), 31);
    assert_eq!(wide("mov.b64 %rd0, {7, 9};"), 9 << 32 | 7);
    assert_eq!(word("mov.b64 {_, %r1}, 0x0000000900000007;"), 9);
    assert_eq!(word("mov.b32 {%rs0, %rs1}, 0x00090007; mov.b32 %r1, {%rs1, %rs0};"), 0x0007_0009);
    assert_eq!(wide("shl.b64 %rd0, 1, 40;"), 1 << 40);
}

#[test]
fn comparisons_know_signs_and_nan() {
    let holds = |compare: &str| word(&format!("{compare} selp.u32 %r1, 1, 0, %p0;")) == 1;
    assert!(holds("setp.lt.s32 %p0, -1, 0;") && !holds("setp.lt.u32 %p0, -1, 0;"));
    assert!(holds("setp.gt.u64 %p0, -1, 0;") && !holds("setp.gt.s64 %p0, -1, 0;"));
    assert!(holds("setp.ne.s32 %p0, 1, 2;") && holds("setp.ge.s32 %p0, 2, 2;"));
    let nan = "0f7FC00000, 0f00000000;";
    for (how, want) in [("eq", false), ("ne", false), ("lt", false), ("neu", true), ("ltu", true), ("leu", true), ("nan", true)] {
        assert_eq!(holds(&format!("setp.{how}.f32 %p0, {nan}")), want, "{how}");
    }
    assert!(holds("setp.lt.s32 %p1, 1, 2; not.pred %p2, %p1; or.pred %p0, %p1, %p2;"));
    assert!(!holds("setp.lt.s32 %p1, 1, 2; not.pred %p2, %p1; and.pred %p0, %p1, %p2;"));
}

#[test]
fn floats_round_as_they_say() {
    assert_eq!(float("add.f32 %f1, 0f3F800000, 0f40000000;"), 3.0);
    assert_eq!(float("fma.rn.f32 %f1, 0f40400000, 0f40400000, 0f3F800000;"), 10.0);
    // 1 + 2⁻²⁵, rounded down, is 1; minus it, it is the number below.
    assert_eq!(float("fma.rm.f32 %f1, 0f3F800000, 0f33000000, 0f3F800000;"), 1.0);
    assert_eq!(float("fma.rm.f32 %f1, 0fBF800000, 0f33000000, 0f3F800000;"), 1f32.next_down());
    assert_eq!(float("div.rn.f32 %f1, 0f3F800000, 0f40400000;"), 1.0 / 3.0);
    assert_eq!(float("sqrt.rn.f32 %f1, 0f40000000;"), 2f32.sqrt());
    assert_eq!(float("ex2.approx.ftz.f32 %f1, 0f40400000;"), 8.0);
    assert_eq!(float("cvt.sat.f32.f32 %f1, 0fC0000000;"), 0.0);
    assert_eq!(float("max.f32 %f1, 0f7FC00000, 0f40000000;"), 2.0);
    assert_eq!(float("cvt.rn.f32.s32 %f1, -3;"), -3.0);
    assert_eq!(float("neg.f32 %f1, 0f40000000;"), -2.0);
}

#[test]
fn sixteen_bit_floats_convert() {
    assert_eq!(float("cvt.rn.f16.f32 %rs0, 0f3FC00000; cvt.f32.f16 %f1, %rs0;"), 1.5);
    assert_eq!(float("cvt.rn.bf16.f32 %rs0, 0f3FC00000; mov.b32 %f1, {0, %rs0};"), 1.5);
    assert_eq!(word("cvt.rn.bf16x2.f32 %r1, 0f3F800000, 0f40000000;"), 0x3f80_4000);
    assert_eq!(word("cvt.rn.f16x2.f32 %r1, 0f3F800000, 0f40000000;"), 0x3c00_4000);
    // 1 + 1 and 2 - 2; 1 + 2⁻⁸ lies half way to the next bf16, 1 + 2⁻¹¹ to the next f16.
    assert_eq!(word("mov.b32 %r2, 0xc0003f80; mov.b32 %r3, 0x40003f80; add.bf16x2 %r1, %r2, %r3;"), 0x0000_4000);
    assert_eq!(word("mov.b32 %r2, 0x3f803f81; mov.b32 %r3, 0x3b803b80; add.bf16x2 %r1, %r2, %r3;"), 0x3f80_3f82);
    assert_eq!(word("mov.b32 %r2, 0x3c003c01; mov.b32 %r3, 0x10001000; add.rn.f16x2 %r1, %r2, %r3;"), 0x3c00_3c02);
}

#[test]
fn branches_part_and_meet() {
    // Odd threads count to their number, even ones go round; then all add 100.
    let got = run("and.b32 %r1, %r0, 1; setp.eq.s32 %p0, %r1, 0; mov.u32 %r2, 0; @%p0 bra $even;
         $loop: add.s32 %r2, %r2, 1; setp.lt.s32 %p1, %r2, %r0; @%p1 bra $loop;
         $even: add.s32 %r2, %r2, 100; @!%p0 add.s32 %r2, %r2, 1000; cvt.u64.u32 %rd0, %r2;")
    .unwrap();
    let want = |thread: u64| if thread.is_multiple_of(2) { 100 } else { thread + 1100 };
    assert_eq!(got, (0..64).map(want).collect::<Vec<_>>());
}

#[test]
fn shared_memory_and_barriers_pass_values_between_warps() {
    let got = run("shl.b32 %r1, %r0, 2; mov.u32 %r2, buffer; add.s32 %r3, %r2, %r1; st.shared.u32 [%r3], %r0;
         bar.sync 0;
         xor.b32 %r1, %r1, 252; add.s32 %r3, %r2, %r1; ld.shared.u32 %r4, [%r3]; cvt.u64.u32 %rd0, %r4;")
    .unwrap();
    assert_eq!(got, (0..64).rev().collect::<Vec<_>>());
}

#[test]
fn vectors_move_up_to_sixteen_bytes() {
    let got = run("mul.lo.s32 %r1, %r0, 16; mov.u32 %r2, buffer; add.s32 %r3, %r2, %r1;
         st.shared.v4.u32 [%r3], {%r0, 1, 2, 3}; ld.shared.v2.u32 {%r4, %r5}, [%r3+8]; ld.shared.u16 %rs1, [%r3];
         cvt.u32.u16 %r6, %rs1; mad.lo.s32 %r6, %r5, 10, %r6; add.s32 %r6, %r6, %r4; cvt.u64.u32 %rd0, %r6;")
    .unwrap();
    assert_eq!(got, (0..64).map(|thread| thread + 32).collect::<Vec<_>>());
}

#[test]
fn shuffles_find_their_partners() {
    let lanes = |kind: &str, by: u32, clamp: u32| {
        let got = run(&format!("shfl.sync.{kind}.b32 %r1|%p0, %r0, {by}, {clamp}, -1; cvt.u64.u32 %rd0, %r1;")).unwrap();
        got[32..].iter().map(|&thread| thread - 32).collect::<Vec<_>>()
    };
    assert_eq!(lanes("bfly", 5, 31), (0..32).map(|lane| lane ^ 5).collect::<Vec<_>>());
    assert_eq!(lanes("down", 3, 31), (0..32).map(|lane| if lane + 3 < 32 { lane + 3 } else { lane }).collect::<Vec<_>>());
    assert_eq!(lanes("up", 3, 0), (0..32).map(|lane: u64| lane.checked_sub(3).unwrap_or(lane)).collect::<Vec<_>>());
    // In segments of eight: 31 - 7 in the bits from 8 on.
    assert_eq!(lanes("idx", 2, 24 << 8 | 31), (0..32).map(|lane| lane / 8 * 8 + 2).collect::<Vec<_>>());
}

#[test]
fn one_lane_of_those_that_come_is_chosen() {
    let got =
        run("elect.sync %r1|%p0, -1; selp.u32 %r2, 1, 0, %p0; mad.lo.s32 %r1, %r1, 10, %r2; cvt.u64.u32 %rd0, %r1;").unwrap();
    assert_eq!(got, (0..64).map(|thread| u64::from(thread % 32 == 0)).collect::<Vec<_>>());
    let got = run("mov.u32 %r3, %laneid; setp.lt.u32 %p1, %r3, 8; @%p1 bra chosen1;
         elect.sync _|%p0, 0xffffff00; selp.u64 %rd0, 1, 0, %p0; chosen1:")
    .unwrap();
    assert_eq!(got, (0..64).map(|thread| u64::from(thread % 32 == 8)).collect::<Vec<_>>());
}

#[test]
fn matrices_are_stored_as_they_are_loaded() {
    // Each warp stores a matrix whose element (i, j) is 8·i + j, and loads it again.
    let stored = |stored: &str, loaded: &str| {
        let got = run(&format!(
            "mov.u32 %r1, buffer; shr.u32 %r2, %r0, 5; mad.lo.s32 %r1, %r2, 512, %r1; mov.u32 %r2, %laneid;
             and.b32 %r3, %r2, 7; mad.lo.s32 %r1, %r3, 16, %r1; shl.b32 %r3, %r2, 1; mad.lo.s32 %r3, %r3, 65537, 65536;
             stmatrix.sync.aligned.{stored}.shared.b16 [%r1], {{%r3}}; bar.warp.sync -1;
             ldmatrix.sync.aligned.{loaded}.shared::cta.b16 {{%r4}}, [%r1]; cvt.u64.u32 %rd0, %r4;"
        ));
        let halves = |value: u64| [value & 0xffff, value >> 16];
        got.unwrap()[32..].iter().flat_map(|&value| halves(value)).collect::<Vec<_>>()
    };
    let (rows, columns) = ((0..64).collect::<Vec<u64>>(), (0..64).map(|e| e % 8 * 8 + e / 8).collect::<Vec<u64>>());
    assert_eq!(stored("m8n8.x1", "m8n8.x1"), rows);
    assert_eq!(stored("x1.trans.m8n8", "m8n8.x1.trans"), rows);
    assert_eq!(stored("m8n8.x1.trans", "m8n8.x1"), columns);
    assert_eq!(stored("x1.m8n8", "m8n8.x1.trans"), columns);
}

/// `d = a·b` for a 16×16 matrix of bf16 and 16 of its columns, through cp.async, ldmatrix and mma, against plain loops.
#[test]
fn matrix_fragments_multiply() {
    for (kind, one) in [("bf16", 0x3f80_u16), ("f16", 0x3c00)] {
        let text = format!(
            ".visible .entry product(.param .u64 a, .param .u64 b, .param .u64 d) {{
                .reg .b32 %r<16>; .reg .f32 %f<8>; .reg .b64 %rd<16>;
                .shared .align 16 .b8 left[512]; .shared .align 16 .b8 right[256];
                ld.param.u64 %rd0, [a]; ld.param.u64 %rd1, [b]; ld.param.u64 %rd2, [d];
                mov.u32 %r0, %tid.x; mov.u32 %r1, left; mov.u32 %r2, right;
                mul.lo.s32 %r3, %r0, 16; add.s32 %r4, %r1, %r3; cvt.u64.u32 %rd3, %r3; add.s64 %rd4, %rd0, %rd3;
                cp.async.cg.shared.global [%r4], [%rd4], 16;
                mul.lo.s32 %r3, %r0, 8; add.s32 %r4, %r2, %r3; cvt.u64.u32 %rd3, %r3; add.s64 %rd4, %rd1, %rd3;
                cp.async.ca.shared.global [%r4], [%rd4], 8;
                cp.async.commit_group; cp.async.wait_group 0; bar.sync 0;
                and.b32 %r5, %r0, 15; shr.u32 %r6, %r0, 4; mul.lo.s32 %r5, %r5, 32; mad.lo.s32 %r5, %r6, 16, %r5;
                add.s32 %r5, %r5, %r1;
                ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%r8, %r9, %r10, %r11}}, [%r5];
                and.b32 %r5, %r0, 15; mad.lo.s32 %r5, %r5, 16, %r2;
                ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {{%r12, %r13}}, [%r5];
                mov.f32 %f0, 0f3F800000;
                mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32
                    {{%f1, %f2, %f3, %f4}}, {{%r8, %r9, %r10, %r11}}, {{%r12, %r13}}, {{%f0, %f0, %f0, %f0}};
                shr.u32 %r3, %r0, 2; and.b32 %r4, %r0, 3; mul.lo.s32 %r3, %r3, 32; mad.lo.s32 %r3, %r4, 8, %r3;
                cvt.u64.u32 %rd3, %r3; add.s64 %rd4, %rd2, %rd3;
                st.global.v2.f32 [%rd4], {{%f1, %f2}}; st.global.v2.f32 [%rd4+256], {{%f3, %f4}};
                ret;
            }}"
        );
        // Ones and zeros, so that no table of conversions is needed here.
        let bit = |i: usize, j: usize, seed: usize| (i * 7 + j * 5 + i * j + seed).is_multiple_of(3);
        let matrix = |cols: usize, seed: usize| -> Vec<u8> {
            let bits = (0..16 * cols).map(|e| if bit(e / cols, e % cols, seed) { one } else { 0 });
            bits.flat_map(u16::to_le_bytes).collect()
        };
        let (a, b) = (Global::from_bytes(&matrix(16, 1)), Global::from_bytes(&matrix(8, 2)));
        let (mut d, module) = (Global::uninitialised(16 * 8 * 4), Module::parse(&text).unwrap());
        let args = &mut [Arg::Read(&a), Arg::Read(&b), Arg::Write(&mut d)];
        Launch { grid: 1, block: 32, shared: 0 }.run(&module, "product", args).unwrap();
        for (e, got) in d.bytes().chunks(4).enumerate() {
            let (i, j) = (e / 8, e % 8);
            let want = 1 + (0..16).filter(|&k| bit(i, k, 1) && bit(k, j, 2)).count();
            assert_eq!(f32::from_le_bytes(got.try_into().unwrap()), want as f32, "{kind} [{i}, {j}]");
        }
    }
}

/// Spellings of LLVM's and CUTLASS's that nvcc does not use for our kernels.
#[test]
fn other_compilers_spell_differently() {
    for instruction in [
        "waitLoop: bra waitLoop;",
        "mov.s32 %r1, %cluster_ctaid.x;",
        "setp.eq.b16 %p1, %rs0, 0;",
        "ld.shared.b8 %rs0, [%r1];",
        "st.shared.v4.b16 [%r1], {%rs0, %rs1, %rs0, %rs1};",
        "prefetch.tensormap [%rd0];",
        "mbarrier.try_wait.parity.shared::cta.b64 %p1, [%r1], 0, 1000;",
        "cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [%r1], [%rd0, {%r0, %r0}], [%r1];",
        "cp.async.bulk.tensor.5d.global.shared::cta.tile.bulk_group.L2::cache_hint [%rd0, {0, 0, 0, 0, 0}], [%r1], %rd1;",
        "cp.async.bulk.tensor.1d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint
            [%r1], [%rd0, {0}], [%r1], %rs0, %rd1;",
        "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%f0, %f1, %f2, %f3}, %rd1, %rd1, %p1, 1, 1, 1, 0;",
    ] {
        parsed(instruction).unwrap_or_else(|error| panic!("{instruction}: {error}"));
    }
    for instruction in [
        "cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [%r1], [%rd0, {0, 0, 0}], [%r1];",
        "cp.async.bulk.tensor.3d.shared::cta.global.im2col.mbarrier::complete_tx::bytes [%r1], [%rd0, {0, 0, 0}], [%r1];",
        "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%f0, %f1, %f2, %f3}, %rd1, %rd1, 1, -1, 1, 0, 0;",
        "stmatrix.sync.aligned.m8n8.x2.shared.b16 [%r1], {%r2};",
        "stmatrix.sync.aligned.m16n8.x1.trans.shared.b8 [%r1], {%r2};",
        "elect.sync %r1, -1;",
    ] {
        assert!(parsed(instruction).is_err(), "{instruction}");
    }
}

fn parsed(instruction: &str) -> Result<Module, ptx_interpreter::ParseError> {
    Module::parse(&format!(
        ".visible .entry test(.param .u64 .ptr .global .align 1 out) .reqntid 64 {{
            .reg .pred %p<4>; .reg .b16 %rs<8>; .reg .b32 %r<16>; .reg .f32 %f<16>; .reg .b64 %rd<8>;
            {instruction}
            ret;
        }}"
    ))
}
