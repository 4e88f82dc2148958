//! AMX tiles: bf16 products of 16×32 with 32×16, summed in f32. Written by the manual; no CPU with AMX has run it yet.

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
pub use tiles::flop_rate;

/// No CPU but x86-64 has it, and asking another kernel for permission is not written.
#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
pub fn flop_rate(_tries: usize, _threads: usize) -> Option<f64> {
    None
}

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod tiles {
    use std::arch::asm;
    use std::arch::x86_64::__cpuid_count;

    use crate::peaks::best_rate;

    /// Sums side by side: what two pairs of operands make.
    const SUMS: u64 = 4;
    /// A product of tiles.
    const FLOP: u64 = 2 * 16 * 16 * 32;

    /// This CPU has bf16 tiles, and this process may use them.
    #[derive(Clone, Copy)]
    struct Amx(());

    impl Amx {
        #[allow(unsafe_code, reason = "asks the CPU and the kernel")]
        fn new() -> Option<Self> {
            const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
            const TILE_DATA: libc::c_long = 18;
            const BF16_AND_TILES: u32 = 1 << 22 | 1 << 24;
            #[allow(unused_unsafe, reason = "safe in newer compilers")]
            // SAFETY: every x86-64 CPU has the instruction.
            let features = unsafe { __cpuid_count(7, 0) }.edx;
            if features & BF16_AND_TILES != BF16_AND_TILES {
                return None;
            }
            // SAFETY: a request for permission; it touches no memory.
            let refused = unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA) };
            (refused == 0).then_some(Self(()))
        }
    }

    /// FLOP/s, if this CPU has AMX and the kernel allows it.
    pub fn flop_rate(tries: usize, threads: usize) -> Option<f64> {
        let amx = Amx::new()?;
        let steps = 50_000;
        let work = |_| {
            products(amx, steps);
            (steps * SUMS * FLOP) as f64
        };
        Some(best_rate(tries, threads, work))
    }

    /// Eight tiles of 16 rows of 64 bytes, as `ldtilecfg` reads it.
    #[repr(C, align(64))]
    struct Config {
        palette: u8,
        start_row: u8,
        reserved: [u8; 14],
        row_bytes: [u16; 16],
        rows: [u8; 16],
    }

    /// So many steps of products of zeros.
    #[allow(unsafe_code, reason = "AMX has no intrinsics yet")]
    fn products(_: Amx, steps: u64) {
        let mut config = Config { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
        config.row_bytes[..8].fill(64);
        config.rows[..8].fill(16);
        // SAFETY: `Amx` proves that CPU and kernel allow it. The configuration is 64 bytes long, and the tiles are given back; the
        // loop touches no memory.
        unsafe {
            asm!(
                "ldtilecfg [{config}]",
                "tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3",
                "tilezero tmm4", "tilezero tmm5", "tilezero tmm6", "tilezero tmm7",
                "2:",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "sub {steps}, 1",
                "jnz 2b",
                "tilerelease",
                config = in(reg) &config,
                steps = inout(reg) steps => _,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack, readonly),
            );
        }
    }
}
