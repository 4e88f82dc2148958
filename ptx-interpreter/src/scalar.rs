//! Operations of one lane: a table from opcodes to functions of bits.
//!
//! A register holds its value in the low bits and zeros above; predicates are 0 or 1.

use std::array::from_fn;

use crate::WARP;
use crate::float;

/// A register, in every lane.
pub(crate) type Row = [u64; WARP];

/// A function of one to four operands, for all lanes at once. It cannot fail; inactive lanes drop the result.
#[derive(Clone, Copy)]
pub(crate) enum Function {
    One(fn(&Row) -> Row),
    Two(fn(&Row, &Row) -> Row),
    Three(fn(&Row, &Row, &Row) -> Row),
    Four(fn(&Row, &Row, &Row, &Row) -> Row),
}

use Function::{Four, One, Three, Two};

impl Function {
    pub(crate) fn operands(self) -> usize {
        match self {
            One(_) => 1,
            Two(_) => 2,
            Three(_) => 3,
            Four(_) => 4,
        }
    }
}

/// The representation of a type in registers.
trait Bits {
    fn of(bits: u64) -> Self;
    fn bits(self) -> u64;
}

macro_rules! integer_bits {
    ($($int:ty => $unsigned:ty),*) => {$(
        impl Bits for $int {
            fn of(bits: u64) -> Self { bits as Self }
            fn bits(self) -> u64 { self as $unsigned as u64 }
        }
    )*};
}
integer_bits!(u16 => u16, i16 => u16, u32 => u32, i32 => u32, u64 => u64, i64 => u64);

impl Bits for bool {
    fn of(bits: u64) -> Self {
        bits & 1 == 1
    }
    fn bits(self) -> u64 {
        u64::from(self)
    }
}

impl Bits for f32 {
    fn of(bits: u64) -> Self {
        f32::from_bits(bits as u32)
    }
    fn bits(self) -> u64 {
        u64::from(self.to_bits())
    }
}

/// `one!(i32 => u64, |a| ..)`: a function of an i32 that gives a u64.
macro_rules! one {
    ($from:ty => $to:ty, |$a:ident| $e:expr) => {
        One(|a| {
            from_fn(|lane| {
                let $a = <$from>::of(a[lane]);
                let result: $to = $e;
                result.bits()
            })
        })
    };
}
macro_rules! two {
    ($from:ty => $to:ty, |$a:ident, $b:ident| $e:expr) => {
        Two(|a, b| {
            from_fn(|lane| {
                let ($a, $b) = (<$from>::of(a[lane]), <$from>::of(b[lane]));
                let result: $to = $e;
                result.bits()
            })
        })
    };
}
/// The third operand is of the result's type.
macro_rules! three {
    ($from:ty => $to:ty, |$a:ident, $b:ident, $c:ident| $e:expr) => {
        Three(|a, b, c| {
            from_fn(|lane| {
                let ($a, $b, $c) = (<$from>::of(a[lane]), <$from>::of(b[lane]), <$to>::of(c[lane]));
                let result: $to = $e;
                result.bits()
            })
        })
    };
}
/// The second operand of a shift counts bits, whatever is shifted.
macro_rules! shift {
    ($ty:ty, |$a:ident, $by:ident| $e:expr) => {
        Two(|a, by| {
            from_fn(|lane| {
                let ($a, $by) = (<$ty>::of(a[lane]), by[lane] as u32);
                let result: $ty = $e;
                result.bits()
            })
        })
    };
}
macro_rules! select {
    ($ty:ty) => {
        Three(|a, b, p| from_fn(|lane| <$ty>::of(if bool::of(p[lane]) { a[lane] } else { b[lane] }).bits()))
    };
}

/// The function of an opcode, if it operates lane by lane.
pub(crate) fn function(opcode: &str) -> Option<Function> {
    let (stem, ty) = opcode.rsplit_once('.')?;
    moves(stem, ty)
        .or_else(|| logic(stem, ty))
        .or_else(|| integers(stem, ty))
        .or_else(|| floats(stem, ty))
        .or_else(|| comparisons(stem, ty))
        .or_else(|| conversions(opcode))
}

/// All memories share one range of addresses, so `cvta` has no effect.
fn moves(stem: &str, ty: &str) -> Option<Function> {
    Some(match (stem, ty) {
        ("mov", "pred") => one!(bool => bool, |a| a),
        ("mov", "u16" | "s16" | "b16") => one!(u16 => u16, |a| a),
        ("mov", "u32" | "s32" | "b32" | "f32") => one!(u32 => u32, |a| a),
        ("mov", "u64" | "s64" | "b64" | "f64") => one!(u64 => u64, |a| a),
        ("cvta.to.global" | "cvta.to.shared" | "cvta.global" | "cvta.shared" | "cvta.param", "u64") => one!(u64 => u64, |a| a),
        // `mapa`: an address in another block of the cluster; see `WINDOW` in cluster.rs.
        ("mapa.shared::cluster", "u32") => two!(u32 => u32, |a, block| (block + 1) << 24 | a & 0xff_ffff),
        ("selp", "b16" | "u16" | "s16") => select!(u16),
        ("selp", "b32" | "u32" | "s32" | "f32") => select!(u32),
        ("selp", "b64" | "u64" | "s64") => select!(u64),
        _ => return None,
    })
}

fn logic(stem: &str, ty: &str) -> Option<Function> {
    Some(match (stem, ty) {
        ("not", "pred") => one!(bool => bool, |a| !a),
        ("not", "b16") => one!(u16 => u16, |a| !a),
        ("not", "b32") => one!(u32 => u32, |a| !a),
        ("not", "b64") => one!(u64 => u64, |a| !a),
        ("and", "pred" | "b16" | "b32") => two!(u32 => u32, |a, b| a & b),
        ("or", "pred" | "b16" | "b32") => two!(u32 => u32, |a, b| a | b),
        ("xor", "pred" | "b16" | "b32") => two!(u32 => u32, |a, b| a ^ b),
        ("and", "b64") => two!(u64 => u64, |a, b| a & b),
        ("or", "b64") => two!(u64 => u64, |a, b| a | b),
        ("xor", "b64") => two!(u64 => u64, |a, b| a ^ b),
        ("shl", "b16") => shift!(u16, |a, by| a.checked_shl(by).unwrap_or(0)),
        ("shl", "b32") => shift!(u32, |a, by| a.checked_shl(by).unwrap_or(0)),
        ("shl", "b64") => shift!(u64, |a, by| a.checked_shl(by).unwrap_or(0)),
        ("shr", "u16" | "b16") => shift!(u16, |a, by| a.checked_shr(by).unwrap_or(0)),
        ("shr", "u32" | "b32") => shift!(u32, |a, by| a.checked_shr(by).unwrap_or(0)),
        ("shr", "u64" | "b64") => shift!(u64, |a, by| a.checked_shr(by).unwrap_or(0)),
        ("shr", "s32") => shift!(i32, |a, by| a >> by.min(31)),
        ("shr", "s64") => shift!(i64, |a, by| a >> by.min(63)),
        ("shf.l.wrap", "b32") => three!(u32 => u32, |low, high, by| (funnel(low, high) << (by & 31) >> 32) as u32),
        ("shf.r.wrap", "b32") => three!(u32 => u32, |low, high, by| (funnel(low, high) >> (by & 31)) as u32),
        ("bfe", "u32") => three!(u32 => u32, |a, from, len| (u64::from(a) >> (from & 255).min(63)) as u32 & mask(len)),
        ("bfe", "s32") => three!(i32 => u32, |a, from, len| signed_bits(a, from as u32 & 255, len & 255)),
        ("bfi", "b32") => Four(|a, b, at, len| from_fn(|lane| insert_bits(a[lane], b[lane], at[lane], len[lane]))),
        ("popc", "b32") => one!(u32 => u32, |a| a.count_ones()),
        ("clz", "b32") => one!(u32 => u32, |a| a.leading_zeros()),
        ("prmt", "b32") => three!(u32 => u32, |a, b, selector| permute(a, b, selector)),
        _ => return None,
    })
}

fn funnel(low: u32, high: u32) -> u64 {
    u64::from(high) << 32 | u64::from(low)
}

/// A mask of `len` ones, at most 32; only the low byte of `len` counts.
fn mask(len: u32) -> u32 {
    u32::MAX.checked_shr(32u32.saturating_sub(len & 255)).unwrap_or(0)
}

/// `bfe`: `len` bits of `a` from bit `from` on, filled with the highest of them, or of `a` if that comes first.
fn signed_bits(a: i32, from: u32, len: u32) -> u32 {
    let shifted = (i64::from(a) >> from.min(63)) as i32;
    match len {
        0 => 0,
        1..32 => (shifted << (32 - len) >> (32 - len)) as u32,
        _ => shifted as u32,
    }
}

/// `bfi`: replaces `len` bits of `b`, from bit `at` on, by the low bits of `a`.
fn insert_bits(a: u64, b: u64, at: u64, len: u64) -> u64 {
    let at = at as u32 & 255;
    let place = |bits: u32| bits.checked_shl(at).unwrap_or(0);
    let mask = place(mask(len as u32));
    (b as u32 & !mask | place(a as u32) & mask).bits()
}

/// `prmt`: four bytes, each selected by a digit of `selector` from the eight of `a` and `b`; 8 and up repeat the byte's sign.
fn permute(a: u32, b: u32, selector: u32) -> u32 {
    let bytes = funnel(a, b).to_le_bytes();
    let byte = |digit: u32| {
        let byte = bytes[(digit & 7) as usize];
        if digit & 8 == 0 { byte } else { ((byte as i8) >> 7) as u8 }
    };
    u32::from_le_bytes([0, 4, 8, 12].map(|at| byte(selector >> at & 15)))
}

fn integers(stem: &str, ty: &str) -> Option<Function> {
    Some(match (stem, ty) {
        ("add", "u16" | "s16") => two!(u16 => u16, |a, b| a.wrapping_add(b)),
        ("add", "u32" | "s32") => two!(u32 => u32, |a, b| a.wrapping_add(b)),
        ("add", "u64" | "s64") => two!(u64 => u64, |a, b| a.wrapping_add(b)),
        ("sub", "u16" | "s16") => two!(u16 => u16, |a, b| a.wrapping_sub(b)),
        ("sub", "u32" | "s32") => two!(u32 => u32, |a, b| a.wrapping_sub(b)),
        ("sub", "u64" | "s64") => two!(u64 => u64, |a, b| a.wrapping_sub(b)),
        ("mul.lo", "u16" | "s16") => two!(u16 => u16, |a, b| a.wrapping_mul(b)),
        ("mul.lo", "u32" | "s32") => two!(u32 => u32, |a, b| a.wrapping_mul(b)),
        ("mul.lo", "u64" | "s64") => two!(u64 => u64, |a, b| a.wrapping_mul(b)),
        ("mul.hi", "u32") => two!(u32 => u32, |a, b| ((u64::from(a) * u64::from(b)) >> 32) as u32),
        ("mul.hi", "s32") => two!(i32 => i32, |a, b| ((i64::from(a) * i64::from(b)) >> 32) as i32),
        ("mul.hi", "u64") => two!(u64 => u64, |a, b| ((u128::from(a) * u128::from(b)) >> 64) as u64),
        ("mul.wide", "u16") => two!(u16 => u32, |a, b| u32::from(a) * u32::from(b)),
        ("mul.wide", "s16") => two!(i16 => i32, |a, b| i32::from(a) * i32::from(b)),
        ("mul.wide", "u32") => two!(u32 => u64, |a, b| u64::from(a) * u64::from(b)),
        ("mul.wide", "s32") => two!(i32 => i64, |a, b| i64::from(a) * i64::from(b)),
        ("mad.lo", "u32" | "s32") => three!(u32 => u32, |a, b, c| a.wrapping_mul(b).wrapping_add(c)),
        ("mad.lo", "u64" | "s64") => three!(u64 => u64, |a, b, c| a.wrapping_mul(b).wrapping_add(c)),
        ("mad.wide", "u16") => three!(u16 => u32, |a, b, c| (u32::from(a) * u32::from(b)).wrapping_add(c)),
        ("mad.wide", "u32") => three!(u32 => u64, |a, b, c| (u64::from(a) * u64::from(b)).wrapping_add(c)),
        ("mad.wide", "s32") => three!(i32 => i64, |a, b, c| (i64::from(a) * i64::from(b)).wrapping_add(c)),
        ("div", "u32") => two!(u32 => u32, |a, b| a.checked_div(b).unwrap_or(u32::MAX)),
        ("div", "s32") => two!(i32 => i32, |a, b| a.checked_div(b).unwrap_or(-1)),
        ("div", "u64") => two!(u64 => u64, |a, b| a.checked_div(b).unwrap_or(u64::MAX)),
        ("div", "s64") => two!(i64 => i64, |a, b| a.checked_div(b).unwrap_or(-1)),
        ("rem", "u32") => two!(u32 => u32, |a, b| a.checked_rem(b).unwrap_or(a)),
        ("rem", "s32") => two!(i32 => i32, |a, b| a.checked_rem(b).unwrap_or(a)),
        ("rem", "u64") => two!(u64 => u64, |a, b| a.checked_rem(b).unwrap_or(a)),
        ("rem", "s64") => two!(i64 => i64, |a, b| a.checked_rem(b).unwrap_or(a)),
        ("min", "u32") => two!(u32 => u32, |a, b| a.min(b)),
        ("min", "s32") => two!(i32 => i32, |a, b| a.min(b)),
        ("min", "u64") => two!(u64 => u64, |a, b| a.min(b)),
        ("min", "s64") => two!(i64 => i64, |a, b| a.min(b)),
        ("max", "u32") => two!(u32 => u32, |a, b| a.max(b)),
        ("max", "s32") => two!(i32 => i32, |a, b| a.max(b)),
        ("max", "u64") => two!(u64 => u64, |a, b| a.max(b)),
        ("max", "s64") => two!(i64 => i64, |a, b| a.max(b)),
        ("neg", "s32") => one!(i32 => i32, |a| a.wrapping_neg()),
        ("neg", "s64") => one!(i64 => i64, |a| a.wrapping_neg()),
        ("abs", "s32") => one!(i32 => i32, |a| a.wrapping_abs()),
        ("abs", "s64") => one!(i64 => i64, |a| a.wrapping_abs()),
        _ => return None,
    })
}

/// Adds 16-bit floats in pairs. Rounding to f32 first has no effect: 24 bits are more than twice as many.
fn pairs(stem: &str, ty: &str) -> Option<Function> {
    Some(match (stem, ty) {
        ("add" | "add.rn", "bf16x2") => two!(u32 => u32, |a, b| {
            each_half(a, b, |a, b| float::to_bf16(float::from_bf16(a) + float::from_bf16(b)))
        }),
        ("add" | "add.rn", "f16x2") => two!(u32 => u32, |a, b| {
            each_half(a, b, |a, b| float::to_f16(float::from_f16(a) + float::from_f16(b)))
        }),
        _ => return None,
    })
}

fn each_half(a: u32, b: u32, f: impl Fn(u16, u16) -> u16) -> u32 {
    u32::from(f(a as u16, b as u16)) | u32::from(f((a >> 16) as u16, (b >> 16) as u16)) << 16
}

/// Approximate functions are computed exactly; results must not depend on their last bits.
fn floats(stem: &str, ty: &str) -> Option<Function> {
    if ty != "f32" {
        return pairs(stem, ty);
    }
    Some(match stem {
        "add" | "add.rn" => two!(f32 => f32, |a, b| a + b),
        "sub" | "sub.rn" => two!(f32 => f32, |a, b| a - b),
        "mul" | "mul.rn" => two!(f32 => f32, |a, b| a * b),
        "fma.rn" => three!(f32 => f32, |a, b, c| float::fma(a, b, c)),
        "fma.rm" => three!(f32 => f32, |a, b, c| float::fma_down(a, b, c)),
        "div.rn" | "div.approx" | "div.full" => two!(f32 => f32, |a, b| a / b),
        "rcp.rn" | "rcp.approx" => one!(f32 => f32, |a| 1.0 / a),
        "rcp.approx.ftz" => one!(f32 => f32, |a| float::flush(1.0 / float::flush(a))),
        "sqrt.rn" | "sqrt.approx" => one!(f32 => f32, |a| a.sqrt()),
        "rsqrt.approx" => one!(f32 => f32, |a| 1.0 / a.sqrt()),
        "ex2.approx" => one!(f32 => f32, |a| a.exp2()),
        "ex2.approx.ftz" => one!(f32 => f32, |a| float::flush(float::flush(a).exp2())),
        "lg2.approx" => one!(f32 => f32, |a| a.log2()),
        "lg2.approx.ftz" => one!(f32 => f32, |a| float::flush(a).log2()),
        "neg" => one!(f32 => f32, |a| -a),
        "abs" => one!(f32 => f32, |a| a.abs()),
        "min" => two!(f32 => f32, |a, b| a.min(b)),
        "max" => two!(f32 => f32, |a, b| a.max(b)),
        _ => return None,
    })
}

macro_rules! compare {
    ($ty:ty, $how:expr) => {
        match $how {
            "eq" => two!($ty => bool, |a, b| a == b),
            "ne" => two!($ty => bool, |a, b| a != b),
            "lt" | "lo" => two!($ty => bool, |a, b| a < b),
            "le" | "ls" => two!($ty => bool, |a, b| a <= b),
            "gt" | "hi" => two!($ty => bool, |a, b| a > b),
            "ge" | "hs" => two!($ty => bool, |a, b| a >= b),
            _ => return None,
        }
    };
}

fn unordered(a: f32, b: f32) -> bool {
    a.is_nan() || b.is_nan()
}

fn comparisons(stem: &str, ty: &str) -> Option<Function> {
    let how = stem.strip_prefix("setp.")?;
    Some(match ty {
        "u16" | "b16" => compare!(u16, how),
        "s16" => compare!(i16, how),
        "u32" | "b32" => compare!(u32, how),
        "s32" => compare!(i32, how),
        "u64" | "b64" => compare!(u64, how),
        "s64" => compare!(i64, how),
        "f32" => match how {
            // Comparisons that end in u are true for NaN.
            "ne" => two!(f32 => bool, |a, b| a != b && !unordered(a, b)),
            "neu" => two!(f32 => bool, |a, b| a != b),
            "equ" => two!(f32 => bool, |a, b| a == b || unordered(a, b)),
            "ltu" => two!(f32 => bool, |a, b| a < b || unordered(a, b)),
            "leu" => two!(f32 => bool, |a, b| a <= b || unordered(a, b)),
            "gtu" => two!(f32 => bool, |a, b| a > b || unordered(a, b)),
            "geu" => two!(f32 => bool, |a, b| a >= b || unordered(a, b)),
            "num" => two!(f32 => bool, |a, b| !unordered(a, b)),
            "nan" => two!(f32 => bool, |a, b| unordered(a, b)),
            how => compare!(f32, how),
        },
        _ => return None,
    })
}

fn conversions(opcode: &str) -> Option<Function> {
    Some(match opcode {
        "cvt.u64.u32" | "cvt.s64.u32" | "cvt.u32.u32" | "cvt.u32.u64" | "cvt.s32.s64" | "cvt.u32.s64" | "cvt.s32.u64" => {
            one!(u32 => u32, |a| a)
        }
        "cvt.s64.s32" | "cvt.u64.s32" => one!(i32 => i64, |a| i64::from(a)),
        "cvt.u32.u16" | "cvt.s32.u16" | "cvt.u64.u16" | "cvt.u16.u32" | "cvt.u16.u64" => one!(u16 => u16, |a| a),
        "cvt.s32.s16" => one!(i16 => i32, |a| i32::from(a)),
        "cvt.rn.f32.s32" => one!(i32 => f32, |a| a as f32),
        "cvt.rn.f32.u32" => one!(u32 => f32, |a| a as f32),
        "cvt.rn.f32.s64" => one!(i64 => f32, |a| a as f32),
        "cvt.rn.f32.u64" => one!(u64 => f32, |a| a as f32),
        "cvt.rzi.s32.f32" => one!(f32 => i32, |a| a as i32),
        "cvt.rzi.u32.f32" => one!(f32 => u32, |a| a as u32),
        "cvt.sat.f32.f32" => one!(f32 => f32, |a| float::saturate(a)),
        "cvt.rna.tf32.f32" => one!(f32 => f32, |a| float::to_tf32(a)),
        "cvt.f32.f16" => one!(u16 => f32, |a| float::from_f16(a)),
        "cvt.f32.bf16" => one!(u16 => f32, |a| float::from_bf16(a)),
        "cvt.rn.f16.f32" => one!(f32 => u16, |a| float::to_f16(a)),
        "cvt.rn.bf16.f32" => one!(f32 => u16, |a| float::to_bf16(a)),
        // The first operand becomes the upper half.
        "cvt.rn.f16x2.f32" => {
            two!(f32 => u32, |a, b| u32::from(float::to_f16(a)) << 16 | u32::from(float::to_f16(b)))
        }
        "cvt.rn.bf16x2.f32" => {
            two!(f32 => u32, |a, b| u32::from(float::to_bf16(a)) << 16 | u32::from(float::to_bf16(b)))
        }
        _ => return None,
    })
}
