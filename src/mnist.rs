//! MNIST: handwritten digits as Y. LeCun's IDX files hold them, gzipped or not, and batches of them on a device.
//!
//! The readers are functions of bytes that believe nothing: not the sizes in a header, not the end of a gzip stream.
//!
//! ```
//! use lowrank::{Cpu, mnist::Mnist, random::Rng};
//!
//! let mnist = Mnist::generate(7, 100, 20); // `Mnist::load(dir)` reads the real ones
//! let cpu = Cpu::<f32>::new()?;
//! for rows in lowrank::mnist::shuffled_batches(mnist.train.all(), 10, &mut Rng::new(7)) {
//!     let (x, labels) = mnist.train.batch(&cpu, &rows)?;
//!     assert_eq!((x.rows(), x.cols(), labels.classes()), (10, 784, 10));
//! }
//! # Ok::<(), lowrank::Error>(())
//! ```

mod digits;
mod idx;

use std::path::Path;

pub use idx::Idx;

use crate::backend::Backend;
use crate::element::Float;
use crate::error::{Error, Result};
use crate::op;
use crate::random::Rng;
use crate::tensor::Tensor;

/// How many classes there are.
pub const DIGITS: usize = 10;
/// The mean of MNIST's training pixels, as numbers from 0 to 1.
pub const MEAN: f32 = 0.1307;
/// Their standard deviation.
pub const STD: f32 = 0.3081;
/// What the four files are called: images and labels to train on, images and labels to test with.
pub const FILES: [&str; 4] =
    ["train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"];

/// Grey images of one size, one after another, row by row. Exists only with as many pixels as its sizes say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Images {
    rows: usize,
    cols: usize,
    pixels: Vec<u8>,
}

impl Images {
    /// From `count · rows · cols` pixels. Errors: [`Error::Value`] for empty images, or a part of one.
    pub fn new(rows: usize, cols: usize, pixels: Vec<u8>) -> Result<Self> {
        let size = rows.checked_mul(cols).filter(|&size| size > 0 && pixels.len().is_multiple_of(size));
        Error::unless(size.is_some(), "images", "pixels", pixels.len(), "a whole number of images of at least one pixel")?;
        Ok(Self { rows, cols, pixels })
    }

    /// From the bytes of an IDX file, gzipped or not; `path` is what errors name. Errors: [`Error::File`].
    pub fn from_idx(path: &Path, file: &[u8]) -> Result<Self> {
        let Idx { sizes: [_, rows, cols], data } = Idx::parse(path, file)?;
        Self::new(rows, cols, data).map_err(|error| in_file(path, error))
    }

    /// The height of an image.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Its width.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.pixels.len() / (self.rows * self.cols)
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.pixels.is_empty()
    }

    /// The pixels of one image, 0 black to 255 white; `None` past the last.
    pub fn get(&self, index: usize) -> Option<&[u8]> {
        self.pixels.chunks_exact(self.rows * self.cols).nth(index)
    }
}

/// The digits that images show. Exists only with every one of them below 10.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Labels(Vec<u8>);

impl Labels {
    /// Errors: [`Error::Value`] if one is not a digit.
    pub fn new(labels: Vec<u8>) -> Result<Self> {
        match labels.iter().position(|&label| usize::from(label) >= DIGITS) {
            None => Ok(Self(labels)),
            Some(at) => {
                let got = format!("{} at {at}", labels[at]);
                Err(Error::Value { verb: "mnist", name: "labels", got, want: "digits from 0 to 9".into() })
            }
        }
    }

    /// From the bytes of an IDX file, gzipped or not; `path` is what errors name. Errors: [`Error::File`].
    pub fn from_idx(path: &Path, file: &[u8]) -> Result<Self> {
        let Idx { sizes: [_], data } = Idx::parse(path, file)?;
        Self::new(data).map_err(|error| in_file(path, error))
    }

    /// A digit an image.
    pub fn as_slice(&self) -> &[u8] {
        &self.0
    }
}

/// Images with the digits that they show: as many of one as of the other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Split {
    images: Images,
    labels: Labels,
}

impl Split {
    /// Errors: [`Error::Value`] unless there is a label for every image.
    pub fn new(images: Images, labels: Labels) -> Result<Self> {
        let counts = format!("{} for {} images", labels.0.len(), images.len());
        Error::unless(labels.0.len() == images.len(), "mnist", "labels", counts, "one an image")?;
        Ok(Self { images, labels })
    }

    fn load(dir: &Path, images: &str, labels: &str) -> Result<Self> {
        let (path, file) = idx::read(dir, images)?;
        let images = Images::from_idx(&path, &file)?;
        let (path, file) = idx::read(dir, labels)?;
        let labels = Labels::from_idx(&path, &file)?;
        Self::new(images, labels).map_err(|error| in_file(&path, error))
    }

    /// The images.
    pub fn images(&self) -> &Images {
        &self.images
    }

    /// The digits that they show.
    pub fn labels(&self) -> &[u8] {
        self.labels.as_slice()
    }

    /// How many images there are.
    pub fn len(&self) -> usize {
        self.labels.0.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.labels.0.is_empty()
    }

    /// The indices of every image.
    pub fn all(&self) -> Vec<usize> {
        (0..self.len()).collect()
    }

    /// The indices of the images that show this digit.
    pub fn of_digit(&self, digit: u8) -> Vec<usize> {
        (0..self.len()).filter(|&index| self.labels.0[index] == digit).collect()
    }

    /// The first `count` images, or all if there are not as many.
    pub fn truncate(&mut self, count: usize) {
        self.labels.0.truncate(count);
        self.images.pixels.truncate(count.saturating_mul(self.images.rows * self.images.cols));
    }

    /// The images at these indices on a device, a row each, normalised by [`MEAN`] and [`STD`], and their digits.
    ///
    /// Errors: [`Error::Value`] for an index past the last image.
    pub fn batch<B: Backend>(&self, backend: &B, indices: &[usize]) -> Result<(Tensor<B>, op::Labels<B>)> {
        let size = self.images.rows * self.images.cols;
        let table = normalised::<B::Elem>();
        let (mut x, mut labels) = (Vec::with_capacity(indices.len() * size), Vec::with_capacity(indices.len()));
        for &index in indices {
            Error::unless(index < self.len(), "mnist", "index", index, "below the number of images")?;
            let pixels = &self.images.pixels[index * size..][..size];
            x.extend(pixels.iter().map(|&pixel| table[usize::from(pixel)]));
            labels.push(u32::from(self.labels.0[index]));
        }
        let x = Tensor::from_slice(backend, (indices.len(), size), &x)?;
        Ok((x, op::Labels::new(backend, DIGITS, &labels)?))
    }
}

/// What each of the 256 shades becomes.
fn normalised<E: Float>() -> [E; 256] {
    std::array::from_fn(|shade| E::from_f32((shade as f32 / 255.0 - MEAN) / STD))
}

/// The indices in random order, `size` at a time; the last batch holds what is left.
pub fn shuffled_batches(mut indices: Vec<usize>, size: usize, rng: &mut Rng) -> Vec<Vec<usize>> {
    rng.shuffle(&mut indices);
    indices.chunks(size.max(1)).map(<[usize]>::to_vec).collect()
}

/// Images to train on, and others to test with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mnist {
    /// 60,000 images, in the original.
    pub train: Split,
    /// 10,000 images, in the original.
    pub test: Split,
}

impl Mnist {
    /// Reads the four [`FILES`] of a folder, each as it is or gzipped with `.gz` behind its name.
    ///
    /// Errors: [`Error::File`] for one that is missing or does not hold what it must.
    pub fn load(dir: impl AsRef<Path>) -> Result<Self> {
        let (dir, [train_images, train_labels, test_images, test_labels]) = (dir.as_ref(), FILES);
        let train = Split::load(dir, train_images, train_labels)?;
        let test = Split::load(dir, test_images, test_labels)?;
        let size = |split: &Split| (split.images.rows, split.images.cols);
        if size(&train) != size(&test) {
            let ((rows, cols), (want_rows, want_cols)) = (size(&test), size(&train));
            let reason = format!("holds images of {rows}×{cols}, those to train on are {want_rows}×{want_cols}");
            return Err(Error::File { path: dir.join(test_images), reason });
        }
        Ok(Self { train, test })
    }

    /// Digits drawn here, for where the real ones cannot be had: strokes, bent and shifted at random, on 28×28 pixels.
    ///
    /// The same seed draws the same digits, up to the rounding of the machine's sines. They are easier than the real ones.
    pub fn generate(seed: u64, train: usize, test: usize) -> Self {
        Self { train: digits::draw(seed, 0, train), test: digits::draw(seed, 1, test) }
    }
}

/// What is wrong with a value read from a file, said of the file.
fn in_file(path: &Path, error: Error) -> Error {
    let reason = match error {
        Error::Value { name, got, want, .. } => format!("`{name}` is {got}, want {want}"),
        other => other.to_string(),
    };
    Error::File { path: path.into(), reason }
}
