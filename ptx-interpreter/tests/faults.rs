//! What a kernel must not do, and that it is reported with its line and thread.

use ptx_interpreter::{Arg, Checks, Fault, Global, Kind, Launch, Module, Options, Space};

/// Runs a kernel of `threads` threads; `in` holds 128 bytes that may be read, `out` 128 that may be written.
fn launch(body: &str, launch: Launch) -> Result<(), Fault> {
    launch_with(Options::default(), body, launch)
}

fn launch_with(options: Options, body: &str, launch: Launch) -> Result<(), Fault> {
    let text = format!(
        ".extern .shared .align 16 .b8 dynamic[];
        .visible .entry test(.param .u64 in, .param .u64 out) {{
            .reg .pred %p<4>; .reg .b32 %r<16>; .reg .b64 %rd<8>;
            .shared .align 16 .b8 buffer[256];
            ld.param.u64 %rd1, [in]; ld.param.u64 %rd2, [out];
            mov.u32 %r0, %tid.x; mul.wide.u32 %rd3, %r0, 4; add.s64 %rd4, %rd1, %rd3; add.s64 %rd5, %rd2, %rd3;
            mov.u32 %r1, buffer; shl.b32 %r2, %r0, 2; add.s32 %r3, %r1, %r2;
            {body}
            ret;
        }}"
    );
    let module = Module::parse(&text).unwrap_or_else(|error| panic!("{error}"));
    let (input, mut output) = (Global::from_bytes(&[0; 128]), Global::uninitialised(128));
    launch.run_with(options, &module, "test", &mut [Arg::Read(&input), Arg::Write(&mut output)])?;
    Ok(())
}

fn fault(threads: u32, body: &str) -> Fault {
    launch(body, Launch { grid: 1, block: threads, shared: 0 }).expect_err("no fault")
}

#[test]
fn accesses_outside_or_askew_name_line_and_thread() {
    let fault_ = fault(33, "ld.global.u32 %r4, [%rd4];");
    assert_eq!((fault_.kernel.as_str(), fault_.line, fault_.thread), ("test", 8, 32));
    assert_eq!(fault_.kind, Kind::OutOfBounds { space: Space::Global, at: 128, width: 4, len: 128 });
    assert!(fault_.to_string().starts_with("test, PTX line 8, block 0, thread 32: 4 bytes at"), "{fault_}");

    assert!(matches!(fault(1, "ld.global.u32 %r4, [%rd4+-4];").kind, Kind::OutOfBounds { .. }));
    assert!(matches!(fault(1, "ld.global.u32 %r4, [0];").kind, Kind::OutOfBounds { .. }));
    assert!(matches!(fault(1, "ld.global.u32 %r4, [%rd4+2];").kind, Kind::Misaligned { width: 4, .. }));
    assert!(matches!(fault(2, "ld.global.v2.u32 {%r4, %r5}, [%rd4];").kind, Kind::Misaligned { width: 8, .. }));
    assert!(matches!(fault(65, "st.shared.u32 [%r3], 1;").kind, Kind::OutOfBounds { space: Space::Shared, .. }));
}

#[test]
fn memory_that_nothing_wrote_cannot_be_read() {
    assert!(matches!(fault(1, "ld.global.u32 %r4, [%rd5];").kind, Kind::Uninitialised { space: Space::Global, .. }));
    assert!(matches!(fault(1, "ld.shared.u32 %r4, [%r3];").kind, Kind::Uninitialised { space: Space::Shared, .. }));
    assert!(matches!(fault(1, "st.global.u32 [%rd4], 1;").kind, Kind::ReadOnly));
}

/// Passes a value from each thread to its mirror image; `{}` is where the barrier belongs.
fn mirror(barrier: &str) -> String {
    format!(
        "st.shared.u32 [%r3], %r0; {barrier}
         xor.b32 %r4, %r2, 124; add.s32 %r4, %r1, %r4; ld.shared.u32 %r5, [%r4]; st.global.u32 [%rd5], %r5;"
    )
}

#[test]
fn a_removed_barrier_is_a_race() {
    let one_block = Launch { grid: 1, block: 32, shared: 0 };
    launch(&mirror("bar.sync 0;"), one_block).unwrap();
    let Fault { kind: Kind::Race { space, other_thread, .. }, thread, .. } = fault(32, &mirror("")) else { panic!() };
    assert_eq!((space, thread, other_thread), (Space::Shared, 0, Some(31)));
    // Writing over what others read needs a barrier as well.
    let again = mirror("bar.sync 0;") + "st.shared.u32 [%r3], 0;";
    assert!(matches!(launch(&again, one_block).unwrap_err().kind, Kind::Race { space: Space::Shared, .. }));
    launch(&(mirror("bar.sync 0;") + "bar.sync 0; st.shared.u32 [%r3], 0;"), one_block).unwrap();
}

#[test]
fn two_writers_of_one_place_are_a_race_even_across_blocks() {
    assert!(matches!(fault(2, "st.global.u32 [%rd2], 1;").kind, Kind::Race { other_thread: Some(0), .. }));
    let two_blocks = Launch { grid: 2, block: 1, shared: 0 };
    let kind = launch("st.global.u32 [%rd2], 1;", two_blocks).unwrap_err().kind;
    assert!(matches!(kind, Kind::Race { other_block: 0, other_thread: Some(0), .. }));
    let sum = "st.global.u32 [%rd2+4], 1; bar.sync 0; ld.global.u32 %r4, [%rd2+4]; bar.sync 0; st.global.u32 [%rd2+4], 2;";
    launch(sum, Launch { grid: 1, block: 1, shared: 0 }).unwrap();
    assert!(matches!(launch(sum, two_blocks).unwrap_err().kind, Kind::Race { .. }));
}

#[test]
fn lanes_that_write_the_same_may_be_let_through() {
    let one_warp = Launch { grid: 1, block: 32, shared: 0 };
    let mut options = Options::default();
    options.checks.stores_are_apart = false;
    let (same, other) = ("st.shared.u32 [%r1], 7;", "and.b32 %r4, %r0, 1; st.shared.u32 [%r1], %r4;");
    assert!(matches!(fault(32, same).kind, Kind::Race { .. }));
    launch_with(options, same, one_warp).unwrap();
    assert!(matches!(launch_with(options, other, one_warp).unwrap_err().kind, Kind::Race { .. }), "not all the same");
    let two_warps = Launch { block: 64, ..one_warp };
    assert!(matches!(launch_with(options, same, two_warps).unwrap_err().kind, Kind::Race { .. }), "nor of two warps");
    assert_ne!(options.checks, Checks::default());
}

#[test]
fn barriers_that_not_all_reach_are_reported() {
    let half = "setp.lt.u32 %p0, %r0, 16; @%p0 bar.sync 0;";
    assert_eq!(fault(32, half).kind, Kind::DivergedBarrier);
    // One warp waits at the first barrier, the other at the second.
    let two = "setp.lt.u32 %p0, %r0, 32; @%p0 bra $one; bar.sync 0; ret; $one: bar.sync 0;";
    assert_eq!(fault(64, two).kind, Kind::DivergedBarrier);
    // A barrier for some threads may be met at several places, but by as many.
    let some = "setp.lt.u32 %p0, %r0, 32; @%p0 bra one; bar.sync 1, 64; ret; one: bar.sync 1, 64;";
    launch(some, Launch { grid: 1, block: 64, shared: 0 }).unwrap();
    assert_eq!(
        fault(64, &some.replacen("1, 64", "1, 32", 1).replace("one: bar.sync 1, 64", "one: bar.sync 1, 96")).kind,
        Kind::DivergedBarrier
    );
    // Threads that have returned are not waited for.
    launch("setp.lt.u32 %p0, %r0, 32; @%p0 ret; bar.sync 0;", Launch { grid: 1, block: 64, shared: 0 }).unwrap();
}

/// Two copies in two groups; the thread waits until `pending` of them are on their way.
fn copies(pending: u32) -> String {
    format!(
        "cp.async.ca.shared.global [%r3], [%rd4], 4; cp.async.commit_group;
         cp.async.ca.shared.global [%r3+128], [%rd4], 4; cp.async.commit_group;
         cp.async.wait_group {pending}; ld.shared.u32 %r4, [%r3];"
    )
}

#[test]
fn a_copy_arrives_only_when_it_is_waited_for() {
    let one_block = Launch { grid: 1, block: 32, shared: 0 };
    launch(&copies(1), one_block).unwrap();
    assert_eq!(fault(1, &copies(2)).kind, Kind::InFlight { at: 0 });
    let neighbour = copies(0) + "xor.b32 %r4, %r2, 4; add.s32 %r4, %r1, %r4; ld.shared.u32 %r5, [%r4];";
    assert!(matches!(launch(&neighbour, one_block).unwrap_err().kind, Kind::Race { .. }), "waiting is for one's own copies");
    launch(&neighbour.replace("xor.b32 %r4, %r2", "bar.sync 0; xor.b32 %r4, %r2"), one_block).unwrap();
    let filled = "cp.async.cg.shared.global [%r1], [%rd1], 16, 0; cp.async.wait_group 0; ld.shared.u32 %r4, [%r1+12];";
    assert_eq!(fault(1, filled).kind, Kind::InFlight { at: 12 }, "what is in no group is not waited for by groups");
    launch(&filled.replace("wait_group 0", "wait_all"), Launch { grid: 1, block: 1, shared: 0 }).unwrap();
}

#[test]
fn whole_warp_instructions_need_the_whole_warp() {
    let half = |instruction: &str| fault(32, &format!("setp.lt.u32 %p0, %r0, 16; @%p0 {instruction}")).kind;
    assert_eq!(half("shfl.sync.bfly.b32 %r4, %r0, 1, 31, -1;"), Kind::DivergedWarp);
    assert_eq!(half("bar.warp.sync -1;"), Kind::DivergedWarp);
    assert_eq!(half("elect.sync _|%p1, -1;"), Kind::DivergedWarp);
    assert_eq!(half("stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r1], {%r4};"), Kind::DivergedWarp);
    // Two halves that wait for each other at two places.
    let two = "setp.lt.u32 %p0, %r0, 16; @%p0 bra low; bar.warp.sync -1; ret; low: bar.warp.sync -1;";
    assert_eq!(fault(32, two).kind, Kind::DivergedWarp);
    assert_eq!(half("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r4}, [%r1];"), Kind::DivergedWarp);
    assert_eq!(half("shfl.sync.bfly.b32 %r4, %r0, 16, 31, 0xffff;"), Kind::AbsentLane);
}

#[test]
fn a_kernel_that_stops_itself_is_reported() {
    let fault = fault(32, "setp.eq.u32 %p0, %r0, 3; @%p0 trap;");
    assert_eq!((fault.kind, fault.thread), (Kind::Trap, 3));
}

#[test]
fn a_kernel_that_does_not_end_is_stopped() {
    assert_eq!(fault(1, "$again: bra $again;").kind, Kind::Runaway);
}

#[test]
fn dynamic_shared_memory_lies_behind_the_rest_and_has_an_end() {
    let body = "mov.u32 %r4, dynamic; st.shared.u32 [%r4+12], 1; sub.s32 %r5, %r4, %r1; ld.shared.u32 %r6, [%r1+268];";
    launch(body, Launch { grid: 1, block: 1, shared: 16 }).unwrap();
    assert!(matches!(launch(body, Launch { grid: 1, block: 1, shared: 8 }).unwrap_err().kind, Kind::OutOfBounds { .. }));
}

#[test]
fn launches_that_do_not_fit_are_refused() {
    for bad in [(0, 1, 0), (1, 0, 0), (1, 1025, 0), (1, 1, 200 << 10)] {
        let (grid, block, shared) = bad;
        assert!(matches!(launch("", Launch { grid, block, shared }).unwrap_err().kind, Kind::BadLaunch(_)), "{bad:?}");
    }
    let module = Module::parse(".visible .entry one(.param .u32 n) { ret; }").unwrap();
    let launch = Launch { grid: 1, block: 1, shared: 0 };
    assert!(launch.run(&module, "one", &mut [Arg::U32(1)]).is_ok());
    for args in [vec![], vec![Arg::U64(1)], vec![Arg::U32(1), Arg::U32(2)]] {
        let mut args = args;
        assert!(matches!(launch.run(&module, "one", &mut args).unwrap_err().kind, Kind::BadLaunch(_)));
    }
    assert!(matches!(launch.run(&module, "two", &mut []).unwrap_err().kind, Kind::BadLaunch(_)));
}

#[test]
fn ptx_that_is_not_understood_names_its_line() {
    let error = |body: &str| Module::parse(&format!(".visible .entry e() {{\n.reg .b32 %r<2>;\n{body}\nret;\n}}")).err().unwrap();
    for body in ["frobnicate.b32 %r0, %r1;", "add.s32 %r0, %r1;", "add.s32 %r0, %r1, %r7;", "bra $nowhere;", ".local .b8 x[4];"] {
        assert_eq!(error(body).line, 3, "{body}");
    }
}

/// A launch that writes `data`, and one with that body that may begin before it has ended.
fn overlapping(body: &str) -> Result<(), Fault> {
    let head = ".reg .b32 %r<4>; .reg .b64 %rd<4>; ld.param.u64 %rd0, [data]; ld.param.u64 %rd1, [other];";
    let text = format!(
        ".visible .entry first(.param .u64 data, .param .u64 other) {{ {head}
            griddepcontrol.launch_dependents; st.global.u32 [%rd0], 1; ret; }}
        .visible .entry second(.param .u64 data, .param .u64 other) {{ {head}
            {body} ret; }}"
    );
    let module = Module::parse(&text).unwrap_or_else(|error| panic!("{error}"));
    let (mut data, mut other) = (Global::from_bytes(&[0; 8]), Global::from_bytes(&[0; 8]));
    let one = Launch { grid: 1, block: 1, shared: 0 };
    let first = one.run(&module, "first", &mut [Arg::Write(&mut data), Arg::Read(&other)])?;
    one.run_after(Some(first.number), &module, "second", &mut [Arg::Read(&data), Arg::Write(&mut other)])?;
    Ok(())
}

#[test]
fn what_the_launch_before_wrote_is_read_after_waiting_for_it() {
    let (read, wait, write) = ("ld.global.u32 %r0, [%rd0];", "griddepcontrol.wait;", "st.global.u32 [%rd1], 2;");
    overlapping(&[wait, read, write].concat()).unwrap();
    // The rest of the same memory, and other memory, was written by nobody since.
    overlapping(&["ld.global.u32 %r0, [%rd0+4]; ld.global.u32 %r1, [%rd1];", wait, write].concat()).unwrap();
    let fault = |parts: &[&str]| overlapping(&parts.concat()).unwrap_err();
    let early = fault(&[read, wait, write]);
    assert_eq!((early.kernel.as_str(), early.line, early.thread, early.kind), ("second", 4, 0, Kind::ReadsEarly { at: 0 }));
    assert_eq!(fault(&[write, wait, read]).kind, Kind::WritesEarly { at: 0 });
    assert!(matches!(fault(&[";"]).kind, Kind::Misuse(_)), "nobody waits");
}
