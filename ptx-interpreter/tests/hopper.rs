//! What Hopper adds: mbarriers, boxes of tensors, products of a warpgroup and clusters; and what is reported about their misuse.

use ptx_interpreter::{Arg, Checks, Fault, Global, Kind, Launch, Module, Options, Space, TensorMap};

/// An 8×64 matrix of bf16, element (i, j) = 64·i + j, cut to what bf16 holds, as bytes.
fn matrix() -> Vec<u8> {
    (0..512u32).flat_map(|e| ((e as f32).to_bits() >> 16).to_le_bytes()[..2].to_vec()).collect()
}

/// Runs a kernel of `blocks` blocks of `threads` threads. `x` is the map of an 8×64 matrix that is loaded in boxes of 8×64, `y` of
/// one that is stored in them; `out` has 256 bytes.
fn launch(blocks: u32, threads: u32, head: &str, body: &str) -> Result<(Vec<u8>, Vec<u8>), Fault> {
    launch_with(Checks::default(), blocks, threads, head, body)
}

fn launch_with(checks: Checks, blocks: u32, threads: u32, head: &str, body: &str) -> Result<(Vec<u8>, Vec<u8>), Fault> {
    let text = format!(
        ".extern .shared .align 1024 .b8 memory[];
        .visible .entry test(.param .align 64 .b8 x[128], .param .align 64 .b8 y[128], .param .u64 out) {head} {{
            .reg .pred %p<4>; .reg .b16 %rs<4>; .reg .b32 %r<16>; .reg .b64 %rd<8>; .reg .f32 %f<80>;
            mov.u64 %rd1, x; mov.u64 %rd2, y; ld.param.u64 %rd3, [out];
            mov.u32 %r0, %tid.x; mov.u32 %r1, memory; add.s32 %r2, %r1, 8192; setp.ne.s32 %p0, %r0, 0;
            {body}
            // wgmma
            ret;
        }}"
    );
    let module = Module::parse(&text).unwrap_or_else(|error| panic!("{error} in {text}"));
    let (x, mut y, mut out) = (Global::from_bytes(&matrix()), Global::uninitialised(1024), Global::uninitialised(256));
    let map = TensorMap::matrix(8, 64, [8, 64]);
    let mut args = [Arg::ReadTiles(&x, map.clone()), Arg::WriteTiles(&mut y, map), Arg::Write(&mut out)];
    let options = Options { checks, ..Options::default() };
    Launch { grid: blocks, block: threads, shared: 16 << 10 }.run_with(options, &module, "test", &mut args)?;
    Ok((y.bytes().to_vec(), out.bytes().to_vec()))
}

fn fault(threads: u32, body: &str) -> Kind {
    launch(1, threads, "", body).expect_err("no fault").kind
}

/// Thread 0 makes an mbarrier for one arrival, and all see it.
const MAKE: &str =
    "@%p0 bra $made; mbarrier.init.shared::cta.b64 [%r2], 1; fence.mbarrier_init.release.cluster; $made: bar.sync 0;";
/// Thread 0 loads the box at row 0.
const LOAD: &str = "@%p0 bra $loaded; mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r2], 1024; mov.u32 %r5, 0;
    cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%r1], [%rd1, {%r5, %r5}], [%r2]; $loaded:";
const WAIT: &str = "mbarrier.try_wait.parity.shared::cta.b64 %p1, [%r2], 0;";
/// Thread 0 stores the box at row 0.
const STORE: &str = "@%p0 bra $stored; mov.u32 %r5, 0;
    cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%rd2, {%r5, %r5}], [%r1]; cp.async.bulk.commit_group;
    cp.async.bulk.wait_group.read 0; $stored:";

#[test]
fn a_box_comes_with_its_chunks_exchanged_and_goes_back_as_it_was() {
    let (y, _) = launch(1, 1, "", &[MAKE, LOAD, WAIT, STORE].concat()).unwrap();
    assert_eq!(y, matrix());
    // Chunk 0 of row 1 lies where chunk 1 would.
    let read = "ld.shared.u16 %rs0, [%r1+144]; st.global.u16 [%rd3], %rs0;";
    let (_, out) = launch(1, 1, "", &[MAKE, LOAD, WAIT, read].concat()).unwrap();
    assert_eq!(u16::from_le_bytes([out[0], out[1]]), (64f32.to_bits() >> 16) as u16);
    // What lies outside is zero, and is not stored.
    let below = LOAD.replace("mov.u32 %r5, 0;", "mov.u32 %r5, 8;").replace("{%r5, %r5}", "{0, %r5}");
    let read = "ld.shared.u16 %rs0, [%r1+144]; st.global.u16 [%rd3], %rs0;";
    let (_, out) = launch(1, 1, "", &[MAKE, &below, WAIT, read].concat()).unwrap();
    assert_eq!(out[..2], [0, 0]);
    let (y, _) = launch(1, 1, "", &[MAKE, LOAD, WAIT, &STORE.replace("{%r5, %r5}", "{%r5, 7}")].concat()).unwrap();
    assert_eq!((&y[..896], &y[896..]), (&[0; 896][..], &matrix()[..128]));
}

#[test]
fn a_box_arrives_only_for_those_who_wait() {
    let read = "ld.shared.u16 %rs0, [%r1];";
    assert_eq!(fault(1, &[MAKE, LOAD, read].concat()), Kind::InFlight { at: 0 });
    launch(1, 64, "", &[MAKE, LOAD, WAIT, read].concat()).unwrap();
    assert!(matches!(fault(1, &[MAKE, LOAD].concat()), Kind::Misuse(reason) if reason.contains("load is on its way")));
    // A thread that has not waited is not ordered after the copy, even if it comes late.
    let others = [MAKE, LOAD, "@%p0 bra $rest;", WAIT, "bar.sync 1, 64; ret; $rest: bar.sync 1, 64;", read].concat();
    assert!(launch(1, 64, "", &others.replace("bar.sync 1, 64; ret;", "bar.sync 1, 32; ret;")).is_err());
    // Loading over what another thread may still read.
    let over = "@%p0 bra $end; mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r2], 1024;
        cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%r1], [%rd1, {%r5, %r5}], [%r2];
        mbarrier.try_wait.parity.shared::cta.b64 %p1, [%r2], 1; $end:";
    let again = [MAKE, LOAD, WAIT, read, over].concat();
    assert!(matches!(fault(64, &again), Kind::Race { .. } | Kind::InFlight { .. }));
    launch(1, 64, "", &[MAKE, LOAD, WAIT, read, "bar.sync 0;", over].concat()).unwrap();
}

#[test]
fn plain_stores_need_a_fence_before_they_are_stored_by_boxes() {
    let fill = "mov.u32 %r6, 0; $fill: add.s32 %r7, %r1, %r6; st.shared.u32 [%r7], %r6; add.s32 %r6, %r6, 4;
        setp.lt.s32 %p2, %r6, 1024; @%p2 bra $fill;";
    launch(1, 1, "", &[fill, "fence.proxy.async.shared::cta;", STORE].concat()).unwrap();
    assert_eq!(fault(1, &[fill, STORE].concat()), Kind::Unpublished { at: 0 });
    let fenced = [fill, "fence.proxy.async.shared::cta;", STORE].concat();
    let early = fenced.replace("wait_group.read 0", "wait_group.read 1");
    assert!(matches!(fault(1, &early), Kind::Misuse(reason) if reason.contains("before what it stores was read")));
}

#[test]
fn mbarriers_that_are_used_as_they_were_not_made_are_reported() {
    assert!(matches!(fault(1, WAIT), Kind::BadBarrier { reason: "was not made", .. }));
    assert!(matches!(fault(1, &[MAKE, "mbarrier.init.shared::cta.b64 [%r2], 1;"].concat()), Kind::BadBarrier { .. }));
    let unseen = MAKE.replace("bar.sync 0;", "mbarrier.arrive.shared::cta.b64 _, [%r2];");
    assert!(matches!(fault(64, &unseen), Kind::BadBarrier { reason, .. } if reason.contains("nothing orders")));
    let unfenced = [&MAKE.replace("fence.mbarrier_init.release.cluster;", ""), LOAD, WAIT].concat();
    assert!(matches!(fault(1, &unfenced), Kind::Unpublished { .. }));
    let mut checks = Checks::default();
    checks.barriers_are_published = false;
    launch_with(checks, 1, 1, "", &unfenced).unwrap();
}

#[test]
fn arrivals_count_as_many_as_they_say() {
    let make = MAKE.replace("[%r2], 1", "[%r2], 3");
    let arrive = |how: &str| format!("@%p0 bra $arrived; mbarrier.arrive.{how}; $arrived:");
    let (one, two) = (arrive("shared::cta.b64 _, [%r2]"), arrive("release.cta.shared::cta.b64 _, [%r2], 2"));
    launch(1, 64, "", &[&make, &*two, &one.replace("arrived", "again"), WAIT].concat()).unwrap();
    assert!(matches!(fault(64, &[&make, &*two, WAIT].concat()), Kind::Deadlock { .. }));
    assert!(matches!(fault(64, &[&make, &*two, &two.replace("arrived", "again")].concat()), Kind::BadBarrier { .. }));
    assert!(matches!(fault(64, &[&make, &*two.replace(", 2", ", 0")].concat()), Kind::BadBarrier { .. }));
    for how in ["shared::cta.b64 %rd7, [%r2]", "noComplete.shared::cta.b64 _, [%r2], 1"] {
        let text = format!(".visible .entry e() {{ .reg .b32 %r<3>; .reg .b64 %rd<8>; mbarrier.arrive.{how}; ret; }}");
        assert!(Module::parse(&text).is_err(), "{how}");
    }
}

#[test]
fn an_mbarrier_ends_with_its_invalidation() {
    let end = "bar.sync 0; @%p0 bra $over; mbarrier.inval.shared::cta.b64 [%r2]; $over: bar.sync 0;";
    let again = MAKE.replace("$made", "$remade");
    let (load, read) = (LOAD.replace("$loaded", "$reloaded"), "ld.shared.u16 %rs0, [%r1];");
    launch(1, 64, "", &[MAKE, LOAD, WAIT, read, end, &again, &load, WAIT, read].concat()).unwrap();
    assert!(matches!(fault(64, &[MAKE, LOAD, WAIT, end, WAIT].concat()), Kind::BadBarrier { reason: "was not made", .. }));
    let early = "@%p0 bra $over; mbarrier.inval.shared::cta.b64 [%r2]; $over:";
    assert!(matches!(fault(1, &[MAKE, LOAD, early].concat()), Kind::BadBarrier { .. }));
    // Nobody has waited for the second box.
    assert!(matches!(fault(64, &[MAKE, LOAD, WAIT, read, end, &again, &load, read].concat()), Kind::InFlight { .. }));
}

#[test]
fn lanes_wait_for_one_that_waits_for_an_mbarrier() {
    let wait = format!("@%p0 bra $meet; {WAIT} $meet: bar.warp.sync -1; elect.sync _|%p2, -1;");
    launch(1, 64, "", &[MAKE, "setp.gt.u32 %p3, %r0, 31; @%p3 ret;", LOAD, &wait].concat()).unwrap();
    // The other warp arrives late.
    let late = "setp.lt.u32 %p3, %r0, 33; @%p3 bra $go; mbarrier.arrive.shared::cta.b64 _, [%r2]; $go: setp.gt.u32 %p3, %r0, 31; @%p3 ret;";
    launch(1, 34, "", &[MAKE, late, &wait].concat()).unwrap();
    assert!(matches!(fault(32, &[MAKE, &wait].concat()), Kind::Deadlock { barrier, .. } if barrier.contains("mbarrier")));
}

#[test]
fn a_deadlock_names_the_barrier_and_who_waits() {
    let Kind::Deadlock { barrier, waiting } = fault(64, &[MAKE, WAIT].concat()) else { panic!() };
    assert!(barrier.contains("the mbarrier at 0x2000") && barrier.contains("0 of 1 have arrived"), "{barrier}");
    assert_eq!(waiting, [(0, 0), (0, 32)]);
    let Kind::Deadlock { barrier, .. } = fault(64, "bar.sync 3, 96;") else { panic!() };
    assert_eq!(barrier, "barrier 3, for 96 threads");
}

/// `sum += x·x`, of the first 16 of the depth and 8 rows, 64 of which the warpgroup reads: the box is loaded eight times.
fn product(before: &str, after: &str) -> String {
    let boxes: String = (0..8)
        .map(|i| {
            format!(
                "add.s32 %r6, %r1, {}; cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%r6], \
                 [%rd1, {{%r5, %r5}}], [%r2];",
                1024 * i
            )
        })
        .collect();
    let load = "@%p0 bra $loaded; mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r2], 8192; mov.u32 %r5, 0;";
    let zero: String = (0..4).map(|i| format!("mov.f32 %f{i}, 0f00000000;")).collect();
    // Lines of 128 bytes, atoms of eight of them 1024 bytes apart.
    let describe = "shr.u32 %r7, %r1, 4; cvt.u64.u32 %rd5, %r7; or.b64 %rd5, %rd5, 4611686293305294848;";
    let multiply = "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f0, %f1, %f2, %f3}, %rd5, %rd5, 1, 1, 1, 0, 0;";
    let store =
        "mul.wide.u32 %rd6, %r0, 4; add.s64 %rd6, %rd6, %rd3; setp.gt.s32 %p3, %r0, 31; @%p3 ret; st.global.f32 [%rd6], %f0;";
    let commit = "wgmma.commit_group.sync.aligned;";
    [MAKE, load, &boxes, "$loaded:", WAIT, &zero, describe, before, multiply, commit, after, store].concat()
}

#[test]
fn a_warpgroup_multiplies_what_descriptors_say() {
    let (fence, wait) = ("wgmma.fence.sync.aligned;", "wgmma.wait_group.sync.aligned 0;");
    let (_, out) = launch(1, 128, "", &product(fence, wait)).unwrap();
    let element = |i: u32, j: u32| f32::from_bits((((64 * i + j) as f32).to_bits() >> 16) << 16);
    for (lane, bytes) in (0..32u32).zip(out.chunks(4)) {
        let (row, col) = (lane / 4, lane % 4 * 2);
        let want: f32 = (0..16).map(|d| element(row, d) * element(col, d)).sum();
        assert_eq!(f32::from_le_bytes(bytes.try_into().unwrap()), want, "row {row}, column {col}");
    }
    // Without adding, whatever the sums were.
    let instead = product(fence, wait).replace("%rd5, 1, 1, 1, 0, 0;", "%rd5, %p2, 1, 1, 0, 0;");
    let (_, over) =
        launch(1, 128, "", &instead.replace("mov.f32 %f0, 0f0", "setp.ne.s32 %p2, %r0, %r0; mov.f32 %f0, 0f4")).unwrap();
    assert_eq!(over, out);
    // The left side is the transposed: rows are columns of the box, the depth its rows, twice.
    let (_, out) = launch(1, 128, "", &product(fence, wait).replace("1, 1, 1, 0, 0;", "1, 1, 1, 1, 0;")).unwrap();
    for (lane, bytes) in (0..32u32).zip(out.chunks(4)) {
        let (row, col) = (lane / 4, lane % 4 * 2);
        let want: f32 = (0..16).map(|d| element(d % 8, row) * element(col, d)).sum();
        assert_eq!(f32::from_le_bytes(bytes.try_into().unwrap()), want, "row {row}, column {col}");
    }
    // Not waited for: the sums are NaN.
    let (_, out) = launch(1, 128, "", &product(fence, "")).unwrap();
    assert!(f32::from_le_bytes(out[..4].try_into().unwrap()).is_nan());
    assert_eq!(fault(128, &product("", wait)), Kind::MissingFence);
    assert_eq!(fault(128, &product(fence, &["mov.f32 %f0, 0f00000000;", wait].concat())), Kind::SumsInFlight);
    assert_eq!(fault(128, &product("setp.lt.s32 %p2, %r0, 16; wgmma.fence.sync.aligned; @%p2 ", wait)), Kind::DivergedWarp);
}

#[test]
fn blocks_of_a_cluster_share_boxes_and_barriers() {
    let pair = ".reqnctapercluster 2, 1, 1";
    let meet = "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;";
    let make = MAKE.replace("bar.sync 0;", meet);
    // Block 0 loads for both; each waits at its own mbarrier.
    let both = "mov.u32 %r8, %cluster_ctarank; setp.ne.s32 %p2, %r8, 0; mov.u16 %rs1, 3; mov.u32 %r5, 0;
        mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r2], 1024; @%p2 bra $sent;
        cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster
            [%r1], [%rd1, {%r5, %r5}], [%r2], %rs1; $sent:";
    let read = "ld.shared.u16 %rs0, [%r1+2]; mul.wide.u32 %rd6, %r8, 2; add.s64 %rd6, %rd6, %rd3; st.global.u16 [%rd6], %rs0;";
    let (_, out) = launch(2, 1, pair, &[&make, both, WAIT, read, meet].concat()).unwrap();
    assert_eq!(out[..4], [0x80, 0x3f, 0x80, 0x3f]); // 1, twice
    // An arrival at the other block's mbarrier lets it go on.
    let other = "mov.u32 %r8, %cluster_ctarank; xor.b32 %r8, %r8, 1; mapa.shared::cluster.u32 %r9, %r2, %r8;
        mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r9];";
    launch(2, 1, pair, &[&make, other, WAIT, meet].concat()).unwrap();
    let unmet = [&MAKE.replace("bar.sync 0;", ""), other, WAIT].concat();
    assert!(matches!(launch(2, 1, pair, &unmet).unwrap_err().kind, Kind::BadBarrier { .. }));
    assert!(matches!(launch(3, 1, pair, "").unwrap_err().kind, Kind::BadLaunch(_)));
    let alone = [&make, "mov.u32 %r8, %cluster_ctarank; setp.ne.s32 %p2, %r8, 0; @%p2 bra $end;", WAIT, "$end:"].concat();
    assert!(matches!(launch(2, 1, pair, &alone).unwrap_err().kind, Kind::Deadlock { .. }));
}

#[test]
fn some_warps_can_meet_without_the_others() {
    // Warp 0 passes a value to warp 1; warp 2 takes no part.
    let pass = "setp.gt.s32 %p2, %r0, 63; @%p2 ret; shl.b32 %r4, %r0, 2; add.s32 %r5, %r1, %r4; st.shared.u32 [%r5], %r0; bar.sync 1, 64;
        xor.b32 %r4, %r4, 128; add.s32 %r5, %r1, %r4; ld.shared.u32 %r6, [%r5];";
    launch(1, 96, "", pass).unwrap();
    let removed = pass.replace("bar.sync 1, 64;", "");
    assert!(matches!(fault(96, &removed), Kind::Race { space: Space::Shared, .. } | Kind::Uninitialised { .. }));
}
