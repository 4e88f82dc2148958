//! Vector units. A value such as `Avx512` exists only if this CPU has the unit, so holding one proves that its instructions may
//! be used. Kernels are generic in the trait [`Simd`].
//!
//! A vector is sixteen `f32` on every CPU: one AVX-512 register, two of AVX2, four of NEON, or an array. So kernels do not
//! depend on the size of registers, and sums have one order everywhere: units with fused multiply-add give the same bits. Units
//! that multiply pairs of `bf16` are separate ([`pairs`]) and compute products only.

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod amx;
#[cfg(target_arch = "x86_64")]
mod avx512_bf16;
mod codes;
#[cfg(target_arch = "aarch64")]
mod neon;
pub(crate) mod pairs;
mod scalar;
#[cfg(target_arch = "x86_64")]
mod x86;

pub(crate) use codes::{APART, CodeTable};
#[cfg(target_arch = "aarch64")]
pub(crate) use neon::Neon;
pub(crate) use scalar::Scalar;
#[cfg(target_arch = "x86_64")]
pub(crate) use x86::{Avx2, Avx512, cache_levels};

use self::pairs::PairUnit;
use crate::element::{DType, Float};
use crate::error::{Error, Result};

/// Numbers in a vector.
pub(crate) const LANES: usize = 16;

/// Sixteen numbers in memory.
pub(crate) type Lanes<T> = [T; LANES];

/// A vector unit. A value proves that this CPU has it.
pub(crate) trait Simd: Copy + Send + Sync {
    /// Sixteen `f32` in registers.
    type V: Copy;
    /// The number of vectors that the registers hold.
    const REGISTERS: usize;
    /// Rows of a [`tile`](Self::tile).
    const MR: usize = if Self::REGISTERS >= 32 { 14 } else { 6 };
    /// Vectors in a row of a [`tile`](Self::tile).
    const NV: usize = if Self::REGISTERS >= 32 { 2 } else { 1 };

    /// Runs `kernel`, compiled for this unit. The call is not inlined, so it belongs inside a task and outside of the loops.
    fn run<K: Kernel>(self, kernel: K) -> K::Out;

    fn splat(self, value: f32) -> Self::V;
    fn load(self, from: &Lanes<f32>) -> Self::V;
    fn store(self, value: Self::V, to: &mut Lanes<f32>);
    fn load_f16(self, from: &Lanes<u16>) -> Self::V;
    fn store_f16(self, value: Self::V, to: &mut Lanes<u16>);
    fn load_bf16(self, from: &Lanes<u16>) -> Self::V;
    fn store_bf16(self, value: Self::V, to: &mut Lanes<u16>);
    /// `a·b + c`, rounded once on units with fused multiply-add.
    fn mul_add(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    fn sqrt(self, a: Self::V) -> Self::V;
    /// `a` where `a > 0` or `a` is NaN, else +0 (also for -0).
    fn relu(self, a: Self::V) -> Self::V;
    /// `a` where `gate > 0`, else +0.
    fn gate(self, gate: Self::V, a: Self::V) -> Self::V;
    /// `equal` where `a == b`, else `other` (also where `a` or `b` is NaN).
    fn if_equal(self, a: Self::V, b: Self::V, equal: Self::V, other: Self::V) -> Self::V;
    /// `a`, or +0 where `a` is subnormal or -0.
    fn flush(self, a: Self::V) -> Self::V;

    /// The micro-kernel: a tile of `MR` rows of `NV` vectors; see [`microkernel`](super::gemm::microkernel).
    #[inline(always)]
    fn tile<const NV: usize>(self, lhs: &[f32], rhs: [&[f32]; 2], out: &mut [Lanes<f32>]) {
        match Self::MR {
            14 => super::gemm::microkernel::<Self, 14, NV>(self, lhs, rhs, out),
            _ => super::gemm::microkernel::<Self, 6, NV>(self, lhs, rhs, out),
        }
    }

    /// Lane j of vector i becomes lane i of vector j.
    #[inline(always)]
    fn transpose(self, rows: [Self::V; LANES]) -> [Self::V; LANES] {
        let (mut lanes, mut transposed) = ([[0.0; LANES]; LANES], [[0.0; LANES]; LANES]);
        for i in 0..LANES {
            self.store(rows[i], &mut lanes[i]);
        }
        for i in 0..LANES {
            for j in 0..LANES {
                transposed[j][i] = lanes[i][j];
            }
        }
        let mut cols = rows;
        for j in 0..LANES {
            cols[j] = self.load(&transposed[j]);
        }
        cols
    }

    /// `to[p·width + i] = scale·lines[i][p]`, for all indices within `to`.
    #[inline(always)]
    fn transpose_lines<T: Float>(self, lines: [&[T]; 8], scale: f32, to: &mut [f32], width: usize) {
        for (p, to) in to.chunks_mut(width).enumerate() {
            for (to, line) in to.iter_mut().zip(lines) {
                *to = scale * line[p].to_f32();
            }
        }
    }

    /// The values of 32 codes of 4 bits, in their order: of two in a byte, the one in the upper half is first.
    #[inline(always)]
    fn look_up(self, codes: &[u8; 16], table: &CodeTable) -> [Self::V; 2] {
        let [first, second] = table.look_up(codes);
        [self.load(&first), self.load(&second)]
    }

    /// The values of 64 codes in the order of [`APART`], which takes fewer shuffles.
    #[inline(always)]
    fn look_up_apart(self, codes: &[u8; 32], table: &CodeTable) -> [Self::V; 4] {
        let mut values = [[0.0; LANES]; 4];
        for (i, &code) in APART.iter().enumerate() {
            let two = codes[code as usize / 2];
            values[i / LANES][i % LANES] = table.values[(if code.is_multiple_of(2) { two >> 4 } else { two & 15 }) as usize];
        }
        [self.load(&values[0]), self.load(&values[1]), self.load(&values[2]), self.load(&values[3])]
    }

    /// Sixteen whole numbers from -128 to 127.
    #[inline(always)]
    fn load_i8(self, from: &Lanes<u8>) -> Self::V {
        self.load(&from.map(|byte| f32::from(byte as i8)))
    }

    /// Prefetches the cache line `ahead` elements after the first. A hint: the address may lie outside of the slice.
    #[inline(always)]
    fn prefetch<T>(self, _: &[T], _ahead: usize) {}

    /// Widens sixteen numbers to `f32`, which is exact.
    #[inline(always)]
    fn widen<T: Float>(self, from: &Lanes<T>) -> Self::V {
        match T::DTYPE {
            DType::F32 => self.load(bytemuck::cast_ref(from)),
            DType::F16 => self.load_f16(bytemuck::cast_ref(from)),
            DType::BF16 => self.load_bf16(bytemuck::cast_ref(from)),
        }
    }

    /// Rounds sixteen `f32` to the element type: to nearest, ties to even.
    #[inline(always)]
    fn narrow<T: Float>(self, value: Self::V, to: &mut Lanes<T>) {
        match T::DTYPE {
            DType::F32 => self.store(value, bytemuck::cast_mut(to)),
            DType::F16 => self.store_f16(value, bytemuck::cast_mut(to)),
            DType::BF16 => self.store_bf16(value, bytemuck::cast_mut(to)),
        }
    }

    /// Widens vector `v` of a slice, filled up with zeros.
    #[inline(always)]
    fn widen_at<T: Float>(self, line: &[T], v: usize) -> Self::V {
        let from = &line[v * LANES..];
        if let Some(whole) = from.first_chunk() {
            return self.widen(whole);
        }
        let mut lanes = [T::default(); LANES];
        lanes[..from.len()].copy_from_slice(from);
        self.widen(&lanes)
    }

    /// Rounds the first lanes into `to`; at most sixteen.
    #[inline(always)]
    fn narrow_to<T: Float>(self, value: Self::V, to: &mut [T]) {
        if let Some(whole) = to.first_chunk_mut() {
            return self.narrow(value, whole);
        }
        let mut lanes = [T::default(); LANES];
        self.narrow(value, &mut lanes);
        to.copy_from_slice(&lanes[..to.len()]);
    }

    /// The sums of the lanes of each of four vectors. Their order is that of the shuffles which compute four sums at once:
    /// within each four lanes, first the lanes two apart; then fours that are eight lanes apart.
    #[inline(always)]
    fn sums(self, values: [Self::V; 4]) -> [f32; 4] {
        let (mut lanes, mut sums) = ([0.0; LANES], [0.0; 4]);
        for i in 0..4 {
            self.store(values[i], &mut lanes);
            let four = |q: usize| (lanes[q] + lanes[q + 2]) + (lanes[q + 1] + lanes[q + 3]);
            sums[i] = (four(0) + four(8)) + (four(4) + four(12));
        }
        sums
    }
}

/// A loop nest that is generic in [`Simd`]. `run` must be `#[inline(always)]`, so that it is compiled with the instructions of
/// the unit.
pub(crate) trait Kernel {
    type Out;
    fn run<S: Simd>(self, s: S) -> Self::Out;
}

/// The vector units that this crate supports, best first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum VectorUnit {
    /// [`Avx512`](Self::Avx512), and AMX for products of `bf16`. On Linux only, where a process must request AMX.
    Amx,
    /// [`Avx512`](Self::Avx512), and AVX-512 BF16 for products of `bf16`.
    Avx512Bf16,
    /// x86-64 with AVX-512 F, BW, DQ and VL.
    Avx512,
    /// x86-64 with AVX2, FMA and F16C.
    Avx2,
    /// 64-bit Arm.
    Neon,
    /// Any CPU.
    Scalar,
    /// The best of the units above without AMX, and an emulation of AMX in Rust: slow, for tests of [`Amx`](Self::Amx) on any
    /// CPU.
    AmxEmulated,
}

/// All units, best first.
const UNITS: [VectorUnit; 7] = {
    use VectorUnit::*;
    [Amx, Avx512Bf16, Avx512, Avx2, Neon, Scalar, AmxEmulated]
};

impl VectorUnit {
    /// The units of this CPU, best first. The last is always [`Scalar`](Self::Scalar).
    pub fn available() -> Vec<Self> {
        let all = UNITS.into_iter().filter(|&unit| unit != Self::AmxEmulated);
        all.filter(|&unit| Unit::new(unit).is_ok()).collect()
    }

    /// The best unit of this CPU.
    pub fn best() -> Self {
        Self::available().first().copied().unwrap_or(Self::Scalar)
    }

    /// The unit called `amx`, `avx512-bf16`, `avx512`, `avx2`, `neon`, `scalar` or `amx-emulated`. Errors: [`Error::Value`] for
    /// any other name.
    pub fn from_name(name: &str) -> Result<Self> {
        const NAMES: [&str; UNITS.len()] = ["amx", "avx512-bf16", "avx512", "avx2", "neon", "scalar", "amx-emulated"];
        let found = NAMES.iter().position(|&known| known == name).map(|i| UNITS[i]);
        let want = "amx, avx512-bf16, avx512, avx2, neon, scalar or amx-emulated";
        found.ok_or_else(|| Error::Value { verb: "cpu", name: "unit", got: name.into(), want: want.into() })
    }

    /// The name for reports, such as `AVX-512 with AMX`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Amx => "AVX-512 with AMX",
            Self::Avx512Bf16 => "AVX-512 with BF16",
            Self::Avx512 => "AVX-512",
            Self::Avx2 => "AVX2",
            Self::Neon => "NEON",
            Self::Scalar => "scalar",
            Self::AmxEmulated => "emulated AMX",
        }
    }
}

/// The unit chosen at run time.
#[derive(Clone, Copy)]
pub(crate) struct Unit {
    name: VectorUnit,
    vectors: Vectors,
    pairs: Option<PairUnit>,
}

#[derive(Clone, Copy)]
enum Vectors {
    #[cfg(target_arch = "x86_64")]
    Avx512(Avx512),
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2),
    #[cfg(target_arch = "aarch64")]
    Neon(Neon),
    Scalar(Scalar),
}

impl Vectors {
    fn new(unit: VectorUnit) -> Option<Self> {
        match unit {
            #[cfg(target_arch = "x86_64")]
            VectorUnit::Avx512 | VectorUnit::Avx512Bf16 | VectorUnit::Amx => Avx512::new().map(Self::Avx512),
            #[cfg(target_arch = "x86_64")]
            VectorUnit::Avx2 => Avx2::new().map(Self::Avx2),
            #[cfg(target_arch = "aarch64")]
            VectorUnit::Neon => Neon::new().map(Self::Neon),
            VectorUnit::Scalar => Some(Self::Scalar(Scalar)),
            VectorUnit::AmxEmulated => UNITS[2..6].iter().find_map(|&unit| Self::new(unit)),
            #[allow(unreachable_patterns, reason = "which units are missing above depends on the target")]
            _ => None,
        }
    }
}

impl Unit {
    /// The unit. Errors: [`Error::Unavailable`] if this CPU does not have it.
    pub(crate) fn new(unit: VectorUnit) -> Result<Self> {
        let pairs = match unit {
            #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
            VectorUnit::Amx => amx::Amx::new().map(PairUnit::Amx),
            #[cfg(target_arch = "x86_64")]
            VectorUnit::Avx512Bf16 => avx512_bf16::Avx512Bf16::new().map(PairUnit::Avx512Bf16),
            VectorUnit::AmxEmulated => Some(PairUnit::Emulated),
            _ => None,
        };
        let missing = matches!(unit, VectorUnit::Amx | VectorUnit::Avx512Bf16) && pairs.is_none();
        let vectors = Vectors::new(unit).filter(|_| !missing);
        let reason = || format!("this CPU has no {}", unit.name());
        let vectors = vectors.ok_or_else(|| Error::Unavailable { backend: "cpu", reason: reason() })?;
        Ok(Self { name: unit, vectors, pairs })
    }

    /// The name of the unit.
    pub(crate) fn name(self) -> VectorUnit {
        self.name
    }

    /// The part of the unit that multiplies pairs of `bf16`, if it has one.
    pub(crate) fn pairs(self) -> Option<PairUnit> {
        self.pairs
    }

    /// Runs a kernel, compiled for this unit.
    #[inline]
    pub(crate) fn run<K: Kernel>(self, kernel: K) -> K::Out {
        match self.vectors {
            #[cfg(target_arch = "x86_64")]
            Vectors::Avx512(s) => s.run(kernel),
            #[cfg(target_arch = "x86_64")]
            Vectors::Avx2(s) => s.run(kernel),
            #[cfg(target_arch = "aarch64")]
            Vectors::Neon(s) => s.run(kernel),
            Vectors::Scalar(s) => s.run(kernel),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::element::{bf16, f16};

    struct Roundings<'a>(&'a [f32], &'a mut Vec<u32>);

    impl Kernel for Roundings<'_> {
        type Out = ();
        #[inline(always)]
        fn run<S: Simd>(self, s: S) {
            for chunk in self.0.as_chunks::<LANES>().0 {
                let (mut widened, mut half, mut brain) = ([0.0; LANES], [f16::default(); LANES], [bf16::default(); LANES]);
                s.narrow(s.widen(chunk), &mut half);
                s.narrow(s.widen(chunk), &mut brain);
                s.narrow(s.widen(&half), &mut widened);
                self.1.extend(widened.map(f32::to_bits));
                s.narrow(s.widen(&brain), &mut widened);
                self.1.extend(widened.map(f32::to_bits));
            }
        }
    }

    /// Every unit rounds as the `half` crate does: subnormals, overflow, ties and infinities included.
    #[test]
    fn every_unit_rounds_to_nearest_even() {
        let bits = (0..=u32::MAX).step_by(65_521).chain((0x3f80_0000..0x3f80_4000).step_by(16));
        let mut numbers: Vec<f32> = bits.map(f32::from_bits).filter(|x| !x.is_nan()).collect();
        numbers.extend([0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, 65504.0, 65520.0, 6e-8, 2.9e-8]);
        numbers.truncate(numbers.len() / LANES * LANES);
        let want: Vec<u32> = numbers
            .chunks(LANES)
            .flat_map(|c| {
                let half = c.iter().map(|&x| f16::from_f32(x).to_f32().to_bits());
                half.chain(c.iter().map(|&x| bf16::from_f32(x).to_f32().to_bits())).collect::<Vec<_>>()
            })
            .collect();
        for unit in VectorUnit::available() {
            let mut got = Vec::new();
            Unit::new(unit).unwrap().run(Roundings(&numbers, &mut got));
            assert!(got == want, "{}", unit.name());
        }
    }

    struct Nan<'a>(&'a mut Lanes<u16>, &'a mut Lanes<u16>, &'a mut Lanes<f32>, &'a mut Lanes<f32>);

    impl Kernel for Nan<'_> {
        type Out = ();
        #[inline(always)]
        fn run<S: Simd>(self, s: S) {
            let nan = s.splat(f32::from_bits(0x7f80_0001));
            s.store_f16(nan, self.0);
            s.store_bf16(nan, self.1);
            s.store(s.relu(nan), self.2);
            s.store(s.gate(nan, s.splat(1.0)), self.3);
        }
    }

    #[test]
    fn every_unit_keeps_nan() {
        for unit in VectorUnit::available() {
            let (mut half, mut brain, mut relu, mut gate) = ([0; LANES], [0; LANES], [0.0; LANES], [1.0; LANES]);
            Unit::new(unit).unwrap().run(Nan(&mut half, &mut brain, &mut relu, &mut gate));
            assert!(half.iter().all(|&h| f16::from_bits(h).is_nan()), "{}", unit.name());
            assert!(brain.iter().all(|&b| bf16::from_bits(b).is_nan()), "{}", unit.name());
            assert!(relu.iter().all(|x| x.is_nan()) && gate == [0.0; LANES], "{}", unit.name());
        }
    }

    struct Zeros<'a>(&'a mut Lanes<f32>, &'a mut Lanes<f32>);

    impl Kernel for Zeros<'_> {
        type Out = ();
        #[inline(always)]
        fn run<S: Simd>(self, s: S) {
            s.store(s.relu(s.load(self.0)), self.1);
            s.store(s.flush(s.load(self.0)), self.0);
        }
    }

    struct Picked<'a>([&'a Lanes<f32>; 4], &'a mut Lanes<f32>);

    impl Kernel for Picked<'_> {
        type Out = ();
        #[inline(always)]
        fn run<S: Simd>(self, s: S) {
            let [a, b, equal, other] = self.0;
            s.store(s.if_equal(s.load(a), s.load(b), s.load(equal), s.load(other)), self.1);
        }
    }

    #[test]
    fn every_unit_compares_lane_by_lane() {
        let (nan, inf, tiny) = (f32::NAN, f32::INFINITY, f32::from_bits(1));
        let a = [0.0, 1.0, nan, nan, inf, inf, tiny, 0.0, 1.0, -2.0, -2.0, 3.0, 0.0, tiny, -inf, 7.0];
        let b = [-0.0, 1.0, nan, 1.0, inf, -inf, tiny, tiny, nan, -2.0, 2.0, 3.5, 0.0, -tiny, -inf, 7.0];
        let (equal, other) = (std::array::from_fn(|i| i as f32), std::array::from_fn(|i| -1.0 - i as f32));
        let want: Lanes<f32> = std::array::from_fn(|i| if a[i] == b[i] { equal[i] } else { other[i] });
        for unit in VectorUnit::available() {
            let mut got = [nan; LANES];
            Unit::new(unit).unwrap().run(Picked([&a, &b, &equal, &other], &mut got));
            assert_eq!(got, want, "{}", unit.name());
        }
    }

    #[test]
    fn every_unit_flushes_only_subnormals_and_gives_the_same_zeros() {
        let (least, inf, tiny) = (f32::MIN_POSITIVE, f32::INFINITY, f32::from_bits(1));
        let from = [0.0, tiny, -tiny, least, -least, least / 2.0, 1.0, -1.0, inf, -inf, 1e-30, 3.0, -0.0, -1e-30, 0.0, f32::NAN];
        let want = [0.0, 0.0, 0.0, least, -least, 0.0, 1.0, -1.0, inf, -inf, 1e-30, 3.0, 0.0, -1e-30, 0.0];
        let bits = |numbers: &[f32]| numbers.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        for unit in VectorUnit::available() {
            let (mut flushed, mut relu) = (from, [1.0; LANES]);
            Unit::new(unit).unwrap().run(Zeros(&mut flushed, &mut relu));
            assert_eq!(bits(&flushed[..15]), bits(&want), "flush, {}", unit.name());
            assert_eq!(bits(&relu[..15]), bits(&from.map(|x| if x > 0.0 { x } else { 0.0 })[..15]), "relu, {}", unit.name());
            assert!(flushed[15].is_nan() && relu[15].is_nan(), "{}", unit.name());
        }
    }
}
