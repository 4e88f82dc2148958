//! MNIST: readers of Y. LeCun's IDX files of handwritten digits, gzipped or not, and batches of images on a device.
//!
//! The readers check everything that a file claims: the sizes in its header and the end of a gzip stream.

mod digits;
mod idx;

use std::path::Path;

pub use idx::Idx;

use lowrank::random::Rng;
use lowrank::{Backend, Error, Float, Result, Tensor, op};

/// The number of classes.
pub const DIGITS: usize = 10;
/// The mean of MNIST's training pixels, scaled to 0..1.
pub const MEAN: f32 = 0.1307;
/// The standard deviation of MNIST's training pixels, scaled to 0..1.
pub const STD: f32 = 0.3081;
/// The names of the four files: training images and labels, test images and labels.
pub const FILES: [&str; 4] =
    ["train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"];

/// Grey images of one size, row-major, one after the other. The number of pixels always matches the sizes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Images {
    rows: usize,
    cols: usize,
    pixels: Vec<u8>,
}

impl Images {
    /// From `count · rows · cols` pixels. Errors: [`Error::Value`] for images of no pixels, or an incomplete image.
    pub fn new(rows: usize, cols: usize, pixels: Vec<u8>) -> Result<Self> {
        let size = rows.checked_mul(cols).filter(|&size| size > 0 && pixels.len().is_multiple_of(size));
        ensure(size.is_some(), "pixels", pixels.len(), "a whole number of images of at least one pixel")?;
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

    /// The width of an image.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The number of images.
    pub fn len(&self) -> usize {
        self.pixels.len() / (self.rows * self.cols)
    }

    /// True if there are no images.
    pub fn is_empty(&self) -> bool {
        self.pixels.is_empty()
    }

    /// The pixels of all images.
    pub fn pixels(&self) -> &[u8] {
        &self.pixels
    }

    /// The pixels of one image, 0 black to 255 white; `None` past the last.
    pub fn get(&self, index: usize) -> Option<&[u8]> {
        self.pixels.chunks_exact(self.rows * self.cols).nth(index)
    }
}

/// The digits that images show; each is below 10.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Labels(Vec<u8>);

impl Labels {
    /// Checks the labels. Errors: [`Error::Value`] if one is not a digit.
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

    /// A digit for each image.
    pub fn as_slice(&self) -> &[u8] {
        &self.0
    }
}

/// Images with their labels, one for each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Split {
    images: Images,
    labels: Labels,
}

impl Split {
    /// Combines images and labels. Errors: [`Error::Value`] unless there is one label for each image.
    pub fn new(images: Images, labels: Labels) -> Result<Self> {
        let counts = format!("{} for {} images", labels.0.len(), images.len());
        ensure(labels.0.len() == images.len(), "labels", counts, "one for each image")?;
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

    /// The number of images.
    pub fn len(&self) -> usize {
        self.labels.0.len()
    }

    /// True if there are no images.
    pub fn is_empty(&self) -> bool {
        self.labels.0.is_empty()
    }

    /// A number that changes if an image or a label does.
    pub fn fingerprint(&self) -> u64 {
        let bytes = self.images.pixels.iter().chain(&self.labels.0);
        bytes.fold(0xcbf2_9ce4_8422_2325, |hash, &byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)) // FNV-1a
    }

    /// The indices of all images.
    pub fn all(&self) -> Vec<usize> {
        (0..self.len()).collect()
    }

    /// The indices of the images that show this digit.
    pub fn of_digit(&self, digit: u8) -> Vec<usize> {
        (0..self.len()).filter(|&index| self.labels.0[index] == digit).collect()
    }

    /// Keeps the first `count` images, or all if there are fewer.
    pub fn truncate(&mut self, count: usize) {
        self.labels.0.truncate(count);
        self.images.pixels.truncate(count.saturating_mul(self.images.rows * self.images.cols));
    }

    /// The images at these indices, as rows of a tensor, normalised by [`MEAN`] and [`STD`], and their labels.
    ///
    /// Errors: [`Error::Value`] for an index past the last image.
    pub fn batch<B: Backend>(&self, backend: &B, indices: &[usize]) -> Result<(Tensor<B>, op::Labels<B>)> {
        let size = self.images.rows * self.images.cols;
        let table = normalised::<B::Elem>();
        let (mut x, mut labels) = (Vec::with_capacity(indices.len() * size), Vec::with_capacity(indices.len()));
        for &index in indices {
            ensure(index < self.len(), "index", index, "below the number of images")?;
            let pixels = &self.images.pixels[index * size..][..size];
            x.extend(pixels.iter().map(|&pixel| table[usize::from(pixel)]));
            labels.push(u32::from(self.labels.0[index]));
        }
        let x = Tensor::from_slice(backend, (indices.len(), size), &x)?;
        Ok((x, op::Labels::new(backend, DIGITS, &labels)?))
    }
}

/// The normalised value of each of the 256 shades.
fn normalised<E: Float>() -> [E; 256] {
    std::array::from_fn(|shade| E::from_f32((shade as f32 / 255.0 - MEAN) / STD))
}

/// The indices in random order, in batches of `size`; the last batch may be smaller.
pub fn shuffled_batches(mut indices: Vec<usize>, size: usize, rng: &mut Rng) -> Vec<Vec<usize>> {
    rng.shuffle(&mut indices);
    indices.chunks(size.max(1)).map(<[usize]>::to_vec).collect()
}

/// A training set and a test set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mnist {
    /// The training set: 60,000 images in the original.
    pub train: Split,
    /// The test set: 10,000 images in the original.
    pub test: Split,
}

impl Mnist {
    /// Reads the four [`FILES`] of a folder. Each may be gzipped, with or without `.gz` at the end of its name.
    ///
    /// Errors: [`Error::File`] for a file that is missing or not valid.
    pub fn load(dir: impl AsRef<Path>) -> Result<Self> {
        let (dir, [train_images, train_labels, test_images, test_labels]) = (dir.as_ref(), FILES);
        let train = Split::load(dir, train_images, train_labels)?;
        let test = Split::load(dir, test_images, test_labels)?;
        let size = |split: &Split| (split.images.rows, split.images.cols);
        if size(&train) != size(&test) {
            let ((rows, cols), (want_rows, want_cols)) = (size(&test), size(&train));
            let reason = format!("holds images of {rows}×{cols}, but the training images are {want_rows}×{want_cols}");
            return Err(Error::File { path: dir.join(test_images), reason });
        }
        Ok(Self { train, test })
    }

    /// Generates digits, for machines without access to the real ones: strokes with random distortions, on 28×28 pixels.
    ///
    /// The same seed gives the same digits, up to rounding of the machine's sine function. They are easier to learn than the real
    /// ones.
    pub fn generate(seed: u64, train: usize, test: usize) -> Self {
        Self { train: digits::draw(seed, 0, train), test: digits::draw(seed, 1, test) }
    }
}

/// Errors: [`Error::Value`] unless `holds`.
fn ensure(holds: bool, name: &'static str, got: impl ToString, want: &'static str) -> Result<()> {
    if holds { Ok(()) } else { Err(Error::Value { verb: "mnist", name, got: got.to_string(), want: want.into() }) }
}

/// An error about a value of a file, with the path of the file.
fn in_file(path: &Path, error: Error) -> Error {
    let reason = match error {
        Error::Value { name, got, want, .. } => format!("`{name}` is {got}, want {want}"),
        other => other.to_string(),
    };
    Error::File { path: path.into(), reason }
}
