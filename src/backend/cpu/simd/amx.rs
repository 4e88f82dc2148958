//! AMX: tile registers of 16 rows of 64 bytes, and products of two of them. By inline assembly, since stable Rust has no
//! intrinsics for AMX.
#![allow(unsafe_code, reason = "inline assembly: the token proves that CPU and system allow it; pointers come from slices")]

use std::arch::asm;
use std::arch::x86_64::__cpuid_count;
use std::cell::Cell;
use std::marker::PhantomData;
use std::sync::LazyLock;

use super::pairs::{NV, STEP};
use super::{LANES, Lanes};
use crate::element::bf16;

/// Proof that this CPU has AMX with `bf16`, and that the system lets this process use it.
#[derive(Clone, Copy)]
pub(crate) struct Amx(());

/// True if this process may use AMX. Its tiles are 8 KiB of registers, which a context switch may have to save, so on Linux
/// each process must request permission once.
static ALLOWED: LazyLock<bool> = LazyLock::new(|| has_bf16_tiles() && request_permission());

fn has_bf16_tiles() -> bool {
    const BF16_AND_TILES: u32 = 1 << 22 | 1 << 24;
    #[allow(unused_unsafe, reason = "safe in newer compilers")]
    // SAFETY: every x86-64 CPU has the instruction; a leaf that it does not know reads as another one, or as zeros.
    let (most, features) = unsafe { (__cpuid_count(0, 0).eax, __cpuid_count(7, 0).edx) };
    most >= 7 && features & BF16_AND_TILES == BF16_AND_TILES
}

/// `arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)`
fn request_permission() -> bool {
    const ARCH_PRCTL: i64 = 158;
    const ARCH_REQ_XCOMP_PERM: u64 = 0x1023;
    const TILE_DATA: u64 = 18;
    let refused: i64;
    // SAFETY: a request for permission; it touches no memory. A system call writes rcx and r11.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") ARCH_PRCTL => refused,
            in("rdi") ARCH_REQ_XCOMP_PERM,
            in("rsi") TILE_DATA,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    refused == 0
}

/// The operand of `ldtilecfg`: the shapes of the tiles.
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// Eight tiles of 16 rows of 64 bytes.
static CONFIG: Config = {
    const fn eight<const N: usize>() -> [u8; N] {
        let (mut rows, mut i) = ([0; N], 0);
        while i < 8 {
            rows[i] = 16;
            i += 1;
        }
        rows
    }
    let (mut row_bytes, mut i) = ([0; 16], 0);
    while i < 8 {
        row_bytes[i] = 64;
        i += 1;
    }
    Config { palette: 1, start_row: 0, reserved: [0; 14], row_bytes, rows: eight() }
};

/// Numbers of a left panel for each 32 steps: 32 rows.
const LEFT: usize = 32 * STEP;
/// Numbers of a right panel for each 32 steps: 32 columns.
const RIGHT: usize = NV * LANES * STEP;

impl Amx {
    pub(crate) fn new() -> Option<Self> {
        ALLOWED.then_some(Self(()))
    }

    /// Configures the tiles of this thread.
    pub(super) fn begin(self) -> Tiles {
        if HOLDERS.replace(HOLDERS.get() + 1) == 0 {
            // SAFETY: `self` proves that the instruction is there; the configuration is 64 bytes long.
            unsafe { asm!("ldtilecfg [{}]", in(reg) &CONFIG, options(nostack, readonly)) }
        }
        Tiles(PhantomData)
    }
}

/// Proof that the tiles of this thread are configured. It is not `Send`. Dropping the last one of a thread releases the tiles, since
/// tiles in use make context switches slower.
pub(crate) struct Tiles(PhantomData<*const ()>);

thread_local! {
    /// The number of [`Tiles`] on this thread.
    static HOLDERS: Cell<usize> = const { Cell::new(0) };
}

impl Drop for Tiles {
    fn drop(&mut self) {
        if HOLDERS.replace(HOLDERS.get() - 1) == 1 {
            // SAFETY: tiles were configured, so the instruction exists; no other `Tiles` of this thread remains.
            unsafe { asm!("tilerelease", options(nostack, nomem)) }
        }
    }
}

impl Tiles {
    /// See [`Ready::tile`](super::pairs::Ready::tile). Two tiles of rows, two of columns, four of sums, so each tile that is
    /// loaded is used twice. The loop over the depth is one block of assembly, because the compiler does not allocate tile
    /// registers.
    pub(super) fn tile(&self, left: &[bf16], right: [&[bf16]; 2], out: &mut [Lanes<f32>]) {
        let [first, second] = right.map(|right| right.len() / RIGHT);
        assert!(left.len() >= (first + second) * LEFT && out.len() >= 32 * NV);
        // SAFETY: `self` proves that the instructions exist and that the tiles of this thread are configured. A step reads 2
        // KiB of each panel, and the assertion proves that the panels hold that many steps; the sums are 32 rows of 128 bytes.
        // The compiler does not use tile registers.
        unsafe {
            asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "test {steps}, {steps}",
                "jz 3f",
                "2:",
                "tileloadd tmm4, [{left} + {row}*1]",
                "tileloadd tmm6, [{right} + {row}*1]",
                "tileloadd tmm7, [{right} + {row}*1 + 1024]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm5, [{left} + {row}*1 + 1024]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "add {left}, 2048",
                "add {right}, 2048",
                "sub {steps}, 1",
                "jnz 2b",
                "3:",
                "mov {steps}, {then}",
                "mov {right}, {after}",
                "xor {then:e}, {then:e}",
                "test {steps}, {steps}",
                "jnz 2b",
                "add {row}, 64", // rows of the sums are two tiles wide
                "tilestored [{out} + {row}*1], tmm0",
                "tilestored [{out} + {row}*1 + 64], tmm1",
                "tilestored [{out} + {row}*1 + 2048], tmm2",
                "tilestored [{out} + {row}*1 + 2112], tmm3",
                left = inout(reg) left.as_ptr() => _,
                right = inout(reg) right[0].as_ptr() => _,
                steps = inout(reg) first => _,
                after = in(reg) right[1].as_ptr(),
                then = inout(reg) second => _,
                row = inout(reg) 64u64 => _,
                out = in(reg) out.as_mut_ptr(),
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
    }
}
