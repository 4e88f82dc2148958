//! What a launch says besides the number of threads: grids of several axes, clusters, structures, and tensors of any rank.

use ptx_interpreter::{Arg, Axis, Fault, Global, Kind, Launch, Module, Options, TensorMap};

fn module(head: &str, body: &str) -> Module {
    let text = format!(
        ".extern .shared .align 1024 .b8 memory[];
        .visible .entry test({head}) {{
            .reg .pred %p<4>; .reg .b32 %r<16>; .reg .b64 %rd<8>;
            {body}
            // wgmma
            ret;
        }}"
    );
    Module::parse(&text).unwrap_or_else(|error| panic!("{error} in {text}"))
}

fn words(global: &Global) -> Vec<u32> {
    global.bytes().chunks(4).map(|bytes| u32::from_le_bytes(bytes.try_into().unwrap())).collect()
}

#[test]
fn grids_have_three_axes() {
    let module = module(
        ".param .u64 .ptr .global .align 4 out",
        "mov.u32 %r0, %ctaid.x; mov.u32 %r1, %ctaid.y; mov.u32 %r2, %ctaid.z; mov.u32 %r3, %nctaid.x; mov.u32 %r4, %nctaid.y;
        mad.lo.s32 %r5, %r2, %r4, %r1; mad.lo.s32 %r5, %r5, %r3, %r0; ld.param.u64 %rd0, [out];
        mad.wide.u32 %rd0, %r5, 4, %rd0; mul.lo.s32 %r2, %r2, 100; mad.lo.s32 %r2, %r1, 10, %r2; add.s32 %r2, %r2, %r0;
        st.global.u32 [%rd0], %r2;",
    );
    let mut out = Global::uninitialised(4 * 12);
    let options = Options { grid_yz: [3, 2], ..Options::default() };
    Launch { grid: 2, block: 1, shared: 0 }.run_with(options, &module, "test", &mut [Arg::Write(&mut out)]).unwrap();
    assert_eq!(words(&out), [0, 1, 10, 11, 20, 21, 100, 101, 110, 111, 120, 121]);
}

#[test]
fn a_launch_can_make_clusters() {
    let body = "mov.u32 %r0, %cluster_ctarank; mov.u32 %r1, %cluster_nctaid.x; mad.lo.s32 %r0, %r0, 10, %r1;
        mov.u32 %r2, %ctaid.x; ld.param.u64 %rd0, [out]; mad.wide.u32 %rd0, %r2, 4, %rd0; st.global.u32 [%rd0], %r0;";
    let module = module(".param .u64 out", body);
    let run = |grid, cluster| {
        let mut out = Global::uninitialised(4 * 4);
        let options = Options { cluster, ..Options::default() };
        let report = Launch { grid, block: 1, shared: 0 }.run_with(options, &module, "test", &mut [Arg::Write(&mut out)]);
        report.map(|_| words(&out))
    };
    assert_eq!(run(4, Some(2)).unwrap(), [2, 12, 2, 12]);
    assert_eq!(run(4, None).unwrap(), [1, 1, 1, 1]);
    assert!(matches!(run(3, Some(2)).unwrap_err().kind, Kind::BadLaunch(_)));
    assert!(matches!(run(3, Some(3)).unwrap_err().kind, Kind::BadLaunch(_)));
}

#[test]
fn a_kernel_that_says_its_size_is_not_launched_with_another() {
    let one = Launch { grid: 2, block: 32, shared: 0 };
    let says = |what: &str| Module::parse(&format!(".visible .entry e() {what} {{ ret; }}")).unwrap();
    let run = |launch: Launch, cluster, module: &Module| {
        launch.run_with(Options { cluster, ..Options::default() }, module, "e", &mut []).map(|_| ())
    };
    run(one, None, &says(".reqntid 32")).unwrap();
    assert!(matches!(run(one, None, &says(".reqntid 64")).unwrap_err().kind, Kind::BadLaunch(_)));
    run(one, Some(2), &says(".reqnctapercluster 2, 1, 1")).unwrap();
    assert!(matches!(run(one, Some(1), &says(".reqnctapercluster 2, 1, 1")).unwrap_err().kind, Kind::BadLaunch(_)));
}

/// Loads the box at `corner` of `x`, and stores it at the same place of `y`: both maps stand in one structure.
fn through_a_box(map: &TensorMap, corner: [i32; 3], bytes: usize) -> Result<(Vec<u32>, Vec<u32>), Fault> {
    let size = map.axes.iter().map(|axis| u64::from(axis.tile)).product::<u64>() * map.element;
    let [a, b, c] = corner;
    let body = format!(
        "mov.u64 %rd0, s; add.s64 %rd1, %rd0, 64; add.s64 %rd2, %rd0, 192; mov.u32 %r0, memory; add.s32 %r1, %r0, 8192;
        ld.param.u32 %r2, [s+8]; mbarrier.init.shared::cta.b64 [%r1], %r2; fence.mbarrier_init.release.cluster;
        prefetch.tensormap [%rd1];
        mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1], {size};
        cp.async.bulk.tensor.3d.shared::cta.global.mbarrier::complete_tx::bytes.L2::cache_hint
            [%r0], [%rd1, {{{a}, {b}, {c}}}], [%r1], %rd0;
        mbarrier.try_wait.parity.shared::cta.b64 %p1, [%r1], 0;
        cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%rd2, {{{a}, {b}, {c}}}], [%r0];
        cp.async.bulk.commit_group; cp.async.bulk.wait_group 0;
        add.s32 %r3, %r0, 80; ld.shared.v4.u32 {{%r4, %r5, %r6, %r7}}, [%r3];
        ld.param.u64 %rd3, [s+16]; st.global.v4.u32 [%rd3], {{%r4, %r5, %r6, %r7}};"
    );
    let source: Vec<u8> = (0..bytes as u32 / 4).flat_map(u32::to_le_bytes).collect();
    let (x, mut y, mut out) = (Global::from_bytes(&source), Global::from_bytes(&vec![0xff; bytes]), Global::uninitialised(16));
    let fields = vec![
        (8, Arg::U32(1)),
        (16, Arg::Write(&mut out)),
        (64, Arg::ReadTiles(&x, map.clone())),
        (192, Arg::WriteTiles(&mut y, map.clone())),
    ];
    let module = module(".param .align 64 .b8 s[320]", &body);
    Launch { grid: 1, block: 1, shared: 16 << 10 }.run(&module, "test", &mut [Arg::Struct(320, fields)])?;
    Ok((words(&y), words(&out)))
}

/// 3 × 5 × 22 of 32-bit elements, rows of 24, and a box of 2 × 2 × 16 in lines of 64 bytes.
fn map() -> TensorMap {
    let axes = [(22, 4, 16), (5, 96, 2), (3, 480, 2)];
    let axes = axes.map(|(len, stride, tile)| Axis { len, stride, tile });
    TensorMap { element: 4, axes: axes.to_vec(), swizzle: 64 }
}

#[test]
fn boxes_have_any_rank_element_and_line() {
    let element = |x: u32, y: u32, z: u32| z * 120 + y * 24 + x;
    for corner in [[0, 0, 0], [12, 4, 2], [7, 1, 1], [-6, -1, -1]] {
        let (y, chunk) = through_a_box(&map(), corner, 1440).unwrap();
        let inside = |at: i32, corner: i32, tile: i32| (corner..corner + tile).contains(&at);
        for (i, got) in y.into_iter().enumerate() {
            let (a, b, c) = (i as i32 % 24, i as i32 / 24 % 5, i as i32 / 120);
            let moved = a < 22 && inside(a, corner[0], 16) && inside(b, corner[1], 2) && inside(c, corner[2], 2);
            assert_eq!(got, if moved { i as u32 } else { u32::MAX }, "{corner:?}: ({a}, {b}, {c})");
        }
        // Byte 80 is chunk 1 of the second row: the first row's line leaves it as it is, bit 7 of the address is 0.
        if corner == [0, 0, 0] {
            assert_eq!(chunk, [4, 5, 6, 7].map(|x| element(x, 1, 0)));
        }
    }
}

#[test]
fn tensor_maps_that_a_driver_would_not_make_are_refused() {
    let refused = |change: fn(&mut TensorMap)| {
        let mut map = map();
        change(&mut map);
        matches!(through_a_box(&map, [0; 3], 1440).unwrap_err().kind, Kind::BadLaunch(reason) if reason.contains("no tensor map"))
    };
    assert!(refused(|map| map.element = 3));
    assert!(refused(|map| map.axes[1].stride = 100));
    assert!(refused(|map| map.axes[0].tile = 257));
    assert!(refused(|map| map.axes[0].tile = 3), "12 bytes");
    assert!(refused(|map| map.swizzle = 32), "rows of 64 bytes");
    assert!(refused(|map| map.axes[2].len = 4), "past the end");
    assert!(refused(|map| map.axes[2].len = 2), "not all of it");
    assert!(refused(|map| map.axes.clear()));
    // The rank of the instruction is another.
    let mut flat = map();
    flat.axes.pop();
    assert!(matches!(through_a_box(&flat, [0; 3], 480).unwrap_err().kind, Kind::Misuse(_)));
}

#[test]
fn structures_fit_their_parameter() {
    let module = module(".param .align 8 .b8 s[16]", "");
    let run = |size, fields| Launch { grid: 1, block: 1, shared: 0 }.run(&module, "test", &mut [Arg::Struct(size, fields)]);
    run(16, vec![(0, Arg::U32(1)), (8, Arg::U64(2))]).unwrap();
    run(16, vec![]).unwrap();
    assert!(run(8, vec![(0, Arg::U32(1))]).is_err());
    assert!(run(16, vec![(0, Arg::U64(1)), (4, Arg::U32(1))]).is_err(), "overlap");
    assert!(run(16, vec![(12, Arg::U64(1))]).is_err(), "outside");
    assert!(run(16, vec![(0, Arg::Struct(4, vec![]))]).is_err(), "nested");
}
