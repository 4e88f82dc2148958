//! The kernels, and one struct of parameters for each signature in `kernels/*.cu`.

use std::fmt;

use super::device::Arg;
use crate::op::{AdamRate, Dropout};

macro_rules! kernels {
    ($($variant:ident = $name:literal,)*) => {
        /// A kernel, without its element type.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[allow(missing_docs, reason = "kernels/*.cu documents each under its name")]
        pub enum Kernel {
            $($variant,)*
        }

        impl Kernel {
            /// Every kernel.
            pub const ALL: &'static [Self] = &[$(Self::$variant),*];

            /// Its name in PTX without the element type: the symbol is `lora_merge_bf16`, for example.
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)*
                }
            }
        }
    };
}

kernels! {
    Accumulate = "accumulate",
    AdamDense = "adam_dense",
    AdamFactored = "adam_factored",
    Add = "add",
    Copy = "copy",
    CopyWide = "copy_wide",
    CrossEntropyMean = "cross_entropy_mean",
    CrossEntropyRows = "cross_entropy_rows",
    DropoutForward = "dropout_forward",
    LinearBackwardDbias = "linear_backward_dbias",
    LinearBackwardDw = "linear_backward_dw",
    LinearBackwardDwWide = "linear_backward_dw_wide",
    LoraBackwardDa = "lora_backward_da",
    LoraBackwardDx = "lora_backward_dx",
    LoraBackwardDxHopper128 = "lora_backward_dx_hopper_128",
    LoraBackwardDxHopper256 = "lora_backward_dx_hopper_256",
    LoraBackwardDxSkinny = "lora_backward_dx_skinny",
    LoraBackwardDxWide = "lora_backward_dx_wide",
    LoraBackwardDy = "lora_backward_dy",
    LoraBackwardSum = "lora_backward_sum",
    LoraForwardH = "lora_forward_h",
    LoraForwardHSkinny = "lora_forward_h_skinny",
    LoraForwardY = "lora_forward_y",
    LoraForwardYHopper128 = "lora_forward_y_hopper_128",
    LoraForwardYHopper256 = "lora_forward_y_hopper_256",
    LoraForwardYSkinny = "lora_forward_y_skinny",
    LoraForwardYWide = "lora_forward_y_wide",
    LoraMerge = "lora_merge",
    LoraMergeWide = "lora_merge_wide",
    LoraRowNorm = "lora_row_norm",
    Magnitude = "magnitude",
    MagnitudeBackward = "magnitude_backward",
    Relu = "relu",
    ReluBackward = "relu_backward",
    RoundFactor = "round_factor",
}

impl Kernel {
    /// True if the kernel is in [`hopper_ptx`](super::hopper_ptx), false if it is in [`ptx`](super::ptx).
    pub fn is_for_hopper(self) -> bool {
        use Kernel::*;
        matches!(self, LoraBackwardDxHopper128 | LoraBackwardDxHopper256 | LoraForwardYHopper128 | LoraForwardYHopper256)
    }

    /// The kernel of the wide engine that computes the same product.
    pub(super) fn wide(self) -> Option<Self> {
        match self {
            Self::LinearBackwardDw => Some(Self::LinearBackwardDwWide),
            Self::LoraBackwardDx => Some(Self::LoraBackwardDxWide),
            Self::LoraForwardY => Some(Self::LoraForwardYWide),
            _ => None,
        }
    }

    /// The kernels for Hopper that replace a kernel of the wide engine: with tiles of 256 and of 128 columns.
    pub(super) fn hopper(self) -> Option<[Self; 2]> {
        match self {
            Self::LoraBackwardDxWide => Some([Self::LoraBackwardDxHopper256, Self::LoraBackwardDxHopper128]),
            Self::LoraForwardYWide => Some([Self::LoraForwardYHopper256, Self::LoraForwardYHopper128]),
            _ => None,
        }
    }
}

impl fmt::Display for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The parameters of kernels with one signature.
pub(super) trait Params<'a, M> {
    /// The kernels with this signature.
    const KERNELS: &'static [Kernel];

    /// The arguments, in the order of the signature.
    fn into_args(self) -> Vec<Arg<'a, M>>;
}

/// One or several consecutive parameters of a signature.
trait Param<'a, M> {
    /// Appends the arguments.
    fn push(self, args: &mut Vec<Arg<'a, M>>);

    /// Appends the parameters' names, and their types as the test of signatures writes them.
    #[cfg(test)]
    fn describe(name: &str, all: &mut Vec<(String, &'static str)>);
}

macro_rules! scalar {
    ($type:ty, $describes:literal) => {
        impl<'a, M> Param<'a, M> for $type {
            fn push(self, args: &mut Vec<Arg<'a, M>>) {
                args.push(self.into());
            }

            #[cfg(test)]
            fn describe(name: &str, all: &mut Vec<(String, &'static str)>) {
                all.push((name.to_owned(), $describes));
            }
        }
    };
}

scalar!(u32, "u32");
scalar!(u64, "u64");
scalar!(f32, "f32");
scalar!(Arg<'a, M>, "operand");

impl<'a, M> Param<'a, M> for bool {
    fn push(self, args: &mut Vec<Arg<'a, M>>) {
        args.push(Arg::U32(self.into()));
    }

    #[cfg(test)]
    fn describe(name: &str, all: &mut Vec<(String, &'static str)>) {
        all.push((name.to_owned(), "u32"));
    }
}

/// Parameters `name0`, `name1` and `name2`.
impl<'a, M, T: Param<'a, M>> Param<'a, M> for [T; 3] {
    fn push(self, args: &mut Vec<Arg<'a, M>>) {
        self.into_iter().for_each(|param| param.push(args));
    }

    #[cfg(test)]
    fn describe(name: &str, all: &mut Vec<(String, &'static str)>) {
        (0..3).for_each(|i| T::describe(&format!("{name}{i}"), all));
    }
}

/// A dropout mask: its key, threshold and scale.
#[derive(Clone, Copy)]
pub(super) struct Mask(pub(super) Option<Dropout>);

impl<'a, M> Param<'a, M> for Mask {
    fn push(self, args: &mut Vec<Arg<'a, M>>) {
        // No dropout: threshold 0 and keep_scale 1.
        let parts = |dropout: Dropout| (dropout.key(), dropout.threshold(), dropout.keep_scale());
        let ([key0, key1], threshold, keep_scale) = self.0.map_or(([0, 0], 0, 1.0), parts);
        args.extend([key0, key1, threshold].map(Arg::U32));
        args.push(Arg::F32(keep_scale));
    }

    #[cfg(test)]
    fn describe(_: &str, all: &mut Vec<(String, &'static str)>) {
        all.extend(["key0", "key1", "threshold"].map(|name| (name.to_owned(), "u32")));
        all.push(("keep_scale".to_owned(), "f32"));
    }
}

/// Rounding: true if stochastic, and its key.
#[derive(Clone, Copy)]
pub(super) struct StochasticKey(pub(super) Option<[u32; 2]>);

impl<'a, M> Param<'a, M> for StochasticKey {
    fn push(self, args: &mut Vec<Arg<'a, M>>) {
        let [key0, key1] = self.0.unwrap_or_default();
        args.extend([u32::from(self.0.is_some()), key0, key1].map(Arg::U32));
    }

    #[cfg(test)]
    fn describe(_: &str, all: &mut Vec<(String, &'static str)>) {
        all.extend(["stochastic", "key0", "key1"].map(|name| (name.to_owned(), "u32")));
    }
}

impl<'a, M> Param<'a, M> for AdamRate {
    fn push(self, args: &mut Vec<Arg<'a, M>>) {
        let Self { beta1, beta2, step_size, root_scale, eps, decay } = self;
        args.extend([beta1, beta2, step_size, root_scale, eps, decay].map(Arg::F32));
    }

    #[cfg(test)]
    fn describe(_: &str, all: &mut Vec<(String, &'static str)>) {
        let names = ["beta1", "beta2", "step_size", "root_scale", "eps", "decay"];
        all.extend(names.map(|name| (name.to_owned(), "f32")));
    }
}

macro_rules! params {
    ($($name:ident for [$($kernel:ident),+] { $($field:ident: $type:ty),+ $(,)? })*) => {
        $(
            #[doc = concat!("The parameters of ", $("[`Kernel::", stringify!($kernel), "`] ",)+)]
            pub(super) struct $name<'a, M> {
                $(pub(super) $field: $type,)+
            }

            impl<'a, M> Params<'a, M> for $name<'a, M> {
                const KERNELS: &'static [Kernel] = &[$(Kernel::$kernel),+];

                fn into_args(self) -> Vec<Arg<'a, M>> {
                    let mut args = Vec::with_capacity(20);
                    $(self.$field.push(&mut args);)+
                    args
                }
            }
        )*

        /// Every signature: its kernels, and its parameters in order.
        #[cfg(test)]
        pub(super) fn signatures<'a, M: 'a>() -> Vec<(&'static [Kernel], Vec<(String, &'static str)>)> {
            vec![$({
                let mut all = Vec::new();
                $(<$type as Param<'a, M>>::describe(stringify!($field), &mut all);)+
                (<$name<'a, M> as Params<'a, M>>::KERNELS, all)
            }),*]
        }
    };
}

params! {
    Accumulate for [Accumulate] { x: Arg<'a, M>, scale: f32, y: Arg<'a, M>, len: u64 }

    AdamDense for [AdamDense] {
        g: Arg<'a, M>, rate: AdamRate,
        m: Arg<'a, M>, v: Arg<'a, M>, master: Arg<'a, M>, w: Arg<'a, M>, len: u64,
    }

    AdamFactored for [AdamFactored] {
        x: Arg<'a, M>, dy: Arg<'a, M>, rate: AdamRate,
        m: Arg<'a, M>, v: Arg<'a, M>, master: Arg<'a, M>, w: Arg<'a, M>, batch: u32, k: u32, n: u32,
    }

    Elementwise for [Add, Relu] { x: Arg<'a, M>, y: Arg<'a, M>, len: u64 }

    ReluBackward for [ReluBackward] { y: Arg<'a, M>, dy: Arg<'a, M>, dx: Arg<'a, M>, len: u64 }

    Copy for [Copy, CopyWide] {
        from: Arg<'a, M>, to: Arg<'a, M>, len: u64, cols: u64, from_stride: u64, to_stride: u64,
    }

    RoundFactor for [RoundFactor] { from: Arg<'a, M>, to: Arg<'a, M>, len: u64, cols: u64, from_stride: u64 }

    CrossEntropyRows for [CrossEntropyRows] {
        logits: Arg<'a, M>, labels: Arg<'a, M>, losses: Arg<'a, M>, dlogits: Arg<'a, M>, m: u32, n: u32, counted: u32,
    }

    CrossEntropyMean for [CrossEntropyMean] { losses: Arg<'a, M>, loss: Arg<'a, M>, m: u32, counted: u32 }

    DropoutForward for [DropoutForward] { x: Arg<'a, M>, mask: Mask, y: Arg<'a, M>, len: u64 }

    LinearBackwardDw for [LinearBackwardDw, LinearBackwardDwWide] {
        x: Arg<'a, M>, dy: Arg<'a, M>, dw: Arg<'a, M>, m: u32, k: u32, n: u32, x_stride: u32, dy_stride: u32,
    }

    LinearBackwardDbias for [LinearBackwardDbias] { dy: Arg<'a, M>, dbias: Arg<'a, M>, m: u32, n: u32, dy_stride: u32 }

    LoraForwardH for [LoraForwardH, LoraForwardHSkinny] {
        x: Arg<'a, M>, a: Arg<'a, M>, mask: Mask, h: Arg<'a, M>, m: u32, k: u32, r: u32, x_stride: u32, a_stride: u32,
    }

    LoraForwardY for [LoraForwardY, LoraForwardYWide] {
        x: Arg<'a, M>, w: Arg<'a, M>, bias: Arg<'a, M>, b: Arg<'a, M>, h: Arg<'a, M>, scale: f32, y: Arg<'a, M>,
        m: u32, k: u32, n: u32, r: u32, x_stride: u32, w_stride: u32, b_stride: u32, y_stride: u32, accumulate: bool,
    }

    LoraForwardYSkinny for [LoraForwardYSkinny] {
        x: Arg<'a, M>, w: Arg<'a, M>, bias: Arg<'a, M>, a: Arg<'a, M>, b: Arg<'a, M>, h: Arg<'a, M>, scale: f32, y: Arg<'a, M>,
        m: u32, k: u32, n: u32, r: u32,
        x_stride: u32, w_stride: u32, a_stride: u32, b_stride: u32, y_stride: u32, accumulate: bool,
    }

    LoraForwardYHopper for [LoraForwardYHopper128, LoraForwardYHopper256] {
        x: Arg<'a, M>, w: Arg<'a, M>, bias: Arg<'a, M>, b: Arg<'a, M>, h: Arg<'a, M>, scale: f32, y: Arg<'a, M>,
        m: u32, k: u32, n: u32, r: u32, b_stride: u32,
    }

    LoraBackwardDy for [LoraBackwardDy] {
        b: Arg<'a, M>, h: Arg<'a, M>, dy: Arg<'a, M>, scale: f32, dh: Arg<'a, M>, db: Arg<'a, M>, dbias: Arg<'a, M>,
        m: u32, n: u32, r: u32, rows_per_share: u32, b_stride: u32, dy_stride: u32,
    }

    LoraBackwardDa for [LoraBackwardDa] {
        x: Arg<'a, M>, dh: Arg<'a, M>, mask: Mask, da: Arg<'a, M>,
        m: u32, k: u32, r: u32, rows_per_share: u32, x_stride: u32,
    }

    LoraBackwardSum for [LoraBackwardSum] { parts: [Arg<'a, M>; 3], to: [Arg<'a, M>; 3], len: [u64; 3], count: [u32; 3] }

    LoraBackwardDx for [LoraBackwardDx, LoraBackwardDxSkinny, LoraBackwardDxWide] {
        w: Arg<'a, M>, a: Arg<'a, M>, dy: Arg<'a, M>, dh: Arg<'a, M>, mask: Mask, dx: Arg<'a, M>,
        m: u32, k: u32, n: u32, r: u32, w_stride: u32, a_stride: u32, dy_stride: u32, dx_stride: u32, accumulate: bool,
    }

    LoraBackwardDxHopper for [LoraBackwardDxHopper128, LoraBackwardDxHopper256] {
        w: Arg<'a, M>, a: Arg<'a, M>, dy: Arg<'a, M>, dh: Arg<'a, M>, mask: Mask, dx: Arg<'a, M>,
        m: u32, k: u32, n: u32, r: u32, a_stride: u32,
    }

    LoraMerge for [LoraMerge] {
        a: Arg<'a, M>, b: Arg<'a, M>, scale: f32, rounding: StochasticKey, w: Arg<'a, M>,
        n: u32, k: u32, r: u32, a_stride: u32, b_stride: u32, w_stride: u32, a_is_f32: bool, b_is_f32: bool,
    }

    LoraMergeWide for [LoraMergeWide] {
        a: Arg<'a, M>, b: Arg<'a, M>, scale: f32, rounding: StochasticKey, w: Arg<'a, M>,
        n: u32, k: u32, r: u32, a_stride: u32, b_stride: u32, w_stride: u32,
    }

    LoraRowNorm for [LoraRowNorm] {
        w: Arg<'a, M>, a: Arg<'a, M>, b: Arg<'a, M>, scale: f32, norm: Arg<'a, M>,
        n: u32, k: u32, r: u32, w_stride: u32, a_stride: u32, b_stride: u32, a_is_f32: bool, b_is_f32: bool,
    }

    Magnitude for [Magnitude] {
        z: Arg<'a, M>, magnitude: Arg<'a, M>, norm: Arg<'a, M>, bias: Arg<'a, M>, y: Arg<'a, M>, m: u32, n: u32,
    }

    MagnitudeBackward for [MagnitudeBackward] {
        z: Arg<'a, M>, norm: Arg<'a, M>, dy: Arg<'a, M>, dmagnitude: Arg<'a, M>, m: u32, n: u32,
    }
}
