//! Quantised weights: codes of 4 or 8 bits in blocks, with a scale for each block.
//!
//! ```
//! use lowrank::quant::{QuantKind, Quantised};
//! use lowrank::{Cpu, Tensor, op::LinearForward};
//!
//! let cpu = Cpu::<f32>::new()?;
//! let w = Tensor::from_slice(&cpu, (2, 2), &[1.0, -1.0, 0.0, 1.0])?;
//! let w = Quantised::quantise(&cpu, &w, QuantKind::Int8)?; // a quarter of the memory
//! let x = Tensor::from_slice(&cpu, (1, 2), &[3.0, 2.0])?;
//! let mut y = Tensor::zeros(&cpu, (1, 2))?;
//! LinearForward { x: x.view(), w: (&w).into(), bias: None, y: (&mut y).into() }.run(&cpu)?;
//! assert!((y.to_vec(&cpu)?[0] - 1.0).abs() < 1e-6);
//! # Ok::<(), lowrank::Error>(())
//! ```
//!
//! The formats are other people's, to the bit ([`QuantKind`]): what they wrote means here what it means there, and what is written here
//! they read. The value of a weight is its code's value times its scale, in `f32`.

mod encode;
mod host;
mod kind;
mod view;

pub use host::{HostQuantised, Scales};
use kind::DYNAMIC_MAP;
pub use kind::{Blocks, QuantKind};
pub(crate) use kind::{FP4, NF4, ONE_127TH, Q8_0_BLOCK};
pub(crate) use view::{QuantView, ScalesView};

use crate::backend::Backend;
use crate::element::{Float, f16};
use crate::error::Result;
use crate::tensor::{Shape, Tensor};

/// What errors of this module name.
const VERB: &str = "quantise";

/// A weight `n×k` on a device, quantised. A request takes it as its [`Weight`](crate::op::Weight); nobody writes to it.
pub struct Quantised<B: Backend> {
    shape: Shape,
    kind: QuantKind,
    /// Bytes of the codes, four in a word, the first in the lowest bits; what is missing in the last word is 0.
    codes: B::Buffer<u32>,
    scales: DeviceScales<B>,
}

/// The scales on a device; see [`Scales`].
enum DeviceScales<B: Backend> {
    F32(B::Buffer<f32>),
    F16(B::Buffer<f16>),
    /// The map is none if it is bitsandbytes' own, which the program has once for all weights.
    Double {
        codes: B::Buffer<u32>,
        absmax: B::Buffer<f32>,
        map: Option<B::Buffer<f32>>,
        offset: f32,
    },
}

impl<B: Backend> Quantised<B> {
    /// Quantises a weight; each number becomes the nearest that the format has. The same weight gives the same bits.
    ///
    /// Errors: [`Error::Value`](crate::Error::Value) for a number that is not finite, or too large for the format's scales.
    pub fn quantise(backend: &B, w: &Tensor<B>, kind: QuantKind) -> Result<Self> {
        Self::from_host(backend, &HostQuantised::quantise(w.shape(), &w.to_vec(backend)?, kind)?)
    }

    /// Brings a quantised weight to the device.
    pub fn from_host(backend: &B, host: &HostQuantised) -> Result<Self> {
        let scales = match host.scales() {
            Scales::F32(scales) => DeviceScales::F32(backend.upload(scales)?),
            Scales::F16(scales) => DeviceScales::F16(backend.upload(scales)?),
            Scales::Double { codes, absmax, map, offset } => DeviceScales::Double {
                codes: backend.upload(&words(codes))?,
                absmax: backend.upload(absmax)?,
                map: if bytemuck::bytes_of(&**map) == bytemuck::bytes_of(&*DYNAMIC_MAP) {
                    None
                } else {
                    Some(backend.upload(&map[..])?)
                },
                offset: *offset,
            },
        };
        Ok(Self { shape: host.shape(), kind: host.kind(), codes: backend.upload(&words(host.codes()))?, scales })
    }

    /// A copy in host memory, every bit of it.
    pub fn to_host(&self, backend: &B) -> Result<HostQuantised> {
        let counts = self.kind.counts(self.shape)?;
        let scales = match &self.scales {
            DeviceScales::F32(scales) => Scales::F32(all(backend, scales)?),
            DeviceScales::F16(scales) => Scales::F16(all(backend, scales)?),
            DeviceScales::Double { codes, absmax, map, offset } => {
                let mut table = Box::new(*DYNAMIC_MAP);
                if let Some(map) = map {
                    backend.download(map, &mut table[..])?;
                }
                let codes = bytes(all(backend, codes)?, counts.scales);
                Scales::Double { codes, absmax: all(backend, absmax)?, map: table, offset: *offset }
            }
        };
        HostQuantised::new(self.shape, self.kind, bytes(all(backend, &self.codes)?, counts.codes), scales)
    }

    /// The weight as a tensor of its own, rounded once to the backend's element type.
    pub fn dequantise(&self, backend: &B) -> Result<Tensor<B>> {
        Tensor::from_slice(backend, self.shape, &self.to_host(backend)?.dequantise::<B::Elem>())
    }

    /// A weight of its own with the same bits.
    pub fn try_clone(&self, backend: &B) -> Result<Self> {
        Self::from_host(backend, &self.to_host(backend)?)
    }

    /// `n×k`
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// How many outputs the layer has.
    pub fn rows(&self) -> usize {
        self.shape.rows
    }

    /// How many inputs the layer has.
    pub fn cols(&self) -> usize {
        self.shape.cols
    }

    /// How it is quantised.
    pub fn kind(&self) -> QuantKind {
        self.kind
    }

    /// How much memory it takes on the device.
    pub fn bytes(&self) -> usize {
        fn of<B: Backend, T: crate::Element>(buffer: &B::Buffer<T>) -> usize {
            B::slice_len(B::slice(buffer)) * size_of::<T>()
        }
        let scales = match &self.scales {
            DeviceScales::F32(scales) => of::<B, f32>(scales),
            DeviceScales::F16(scales) => of::<B, f16>(scales),
            DeviceScales::Double { codes, absmax, map, .. } => {
                of::<B, u32>(codes) + of::<B, f32>(absmax) + map.as_ref().map_or(0, of::<B, f32>)
            }
        };
        of::<B, u32>(&self.codes) + scales
    }
}

impl<E: Float> Quantised<crate::Cpu<E>> {
    /// The codes and scales, to be read by kernels.
    pub(crate) fn view(&self) -> QuantView<'_> {
        let scales = match &self.scales {
            DeviceScales::F32(scales) => ScalesView::F32(scales),
            DeviceScales::F16(scales) => ScalesView::F16(scales),
            DeviceScales::Double { codes, absmax, map, offset } => {
                let map = map.as_deref().unwrap_or(&DYNAMIC_MAP[..]);
                ScalesView::Double { codes: bytemuck::cast_slice(codes), absmax, map, offset: *offset }
            }
        };
        QuantView::new(self.shape, self.kind, bytemuck::cast_slice(&self.codes), scales)
    }
}

impl<B: Backend> std::fmt::Debug for Quantised<B> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Quantised<{}>({})", self.kind, self.shape)
    }
}

/// Bytes as words.
fn words(bytes: &[u8]) -> Vec<u32> {
    let word = |four: &[u8]| std::array::from_fn(|i| four.get(i).copied().unwrap_or(0));
    bytes.chunks(4).map(|four| u32::from_ne_bytes(word(four))).collect()
}

/// Words as so many bytes.
fn bytes(words: Vec<u32>, len: usize) -> Vec<u8> {
    let mut bytes: Vec<u8> = words.into_iter().flat_map(u32::to_ne_bytes).collect();
    bytes.truncate(len);
    bytes
}

/// All elements of a buffer.
fn all<B: Backend, T: crate::Element>(backend: &B, buffer: &B::Buffer<T>) -> Result<Vec<T>> {
    let mut host = vec![T::default(); B::slice_len(B::slice(buffer))];
    backend.download(buffer, &mut host)?;
    Ok(host)
}
