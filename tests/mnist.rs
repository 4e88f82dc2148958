//! The MNIST readers of `examples/mnist_lora`: what they accept, what they refuse, and that no input makes them panic or fill the memory.

#![allow(dead_code, unreachable_pub, reason = "the readers of an example, of which this uses a part")]

#[path = "../examples/mnist_lora/mnist/mod.rs"]
mod mnist;

use std::io::Write;
use std::path::Path;

use flate2::{Compression, write::GzEncoder};
use lowrank::random::Rng;
use lowrank::{Cpu, Error};
use mnist::{DIGITS, FILES, Idx, Images, Labels, MEAN, Mnist, STD, Split, shuffled_batches};
use proptest::prelude::*;

/// An IDX file of bytes.
fn idx(sizes: &[u32], data: &[u8]) -> Vec<u8> {
    let header = [0x0800 + sizes.len() as u32].into_iter().chain(sizes.iter().copied());
    header.flat_map(u32::to_be_bytes).chain(data.iter().copied()).collect()
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut zip = GzEncoder::new(Vec::new(), Compression::best());
    zip.write_all(bytes).unwrap();
    zip.finish().unwrap()
}

fn images(file: &[u8]) -> Result<Images, String> {
    Images::from_idx(Path::new("images"), file).map_err(|error| error.to_string())
}

fn labels(file: &[u8]) -> Result<Labels, String> {
    Labels::from_idx(Path::new("labels"), file).map_err(|error| error.to_string())
}

/// A folder with two training images of 1×3 and one test image.
fn folder(change: impl Fn(&str, Vec<u8>) -> Option<(String, Vec<u8>)>) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let contents = [idx(&[2, 1, 3], &[0, 1, 2, 3, 4, 255]), idx(&[2], &[9, 0]), idx(&[1, 1, 3], &[7, 8, 9]), idx(&[1], &[5])];
    for (name, content) in FILES.into_iter().zip(contents) {
        if let Some((name, content)) = change(name, content) {
            std::fs::write(dir.path().join(name), content).unwrap();
        }
    }
    dir
}

#[test]
fn a_folder_loads_plain_and_gzipped() {
    let plain = Mnist::load(folder(|name, content| Some((name.into(), content)))).unwrap();
    let zipped = Mnist::load(folder(|name, content| Some((format!("{name}.gz"), gzip(&content))))).unwrap();
    // Gzip is detected by the content, not by the name.
    let misnamed = Mnist::load(folder(|name, content| Some((name.into(), gzip(&content))))).unwrap();
    assert!(plain == zipped && plain == misnamed);
    assert_eq!((plain.train.len(), plain.test.len()), (2, 1));
    assert_eq!(plain.train.images().get(1), Some(&[3, 4, 255][..]));
    assert_eq!((plain.train.images().get(2), plain.train.labels()), (None, &[9, 0][..]));
}

#[test]
fn damaged_files_are_refused_with_a_reason() {
    let good = idx(&[2, 1, 3], &[1; 6]);
    let long = [&good[..], &[0]].concat();
    let bomb = gzip(&idx(&[1, 1, 1], &vec![0; 50_000_000]));
    for (file, want) in [
        (&b""[..], "images: is truncated"),
        (&good[..3], "images: is truncated"),
        (&good[..15], "images: is truncated"),
        (&good[..21], "images: is truncated: holds 5 of the 6 bytes that it claims"),
        (&gzip(&good)[..30], "images: is truncated"),
        (&long, "images: has more data than the 6 bytes that its header claims"),
        (&gzip(&long), "images: has more data than the 6 bytes that its header claims"),
        (&bomb, "images: has more data than the 1 bytes that its header claims"),
        (&[&gzip(&good)[..], &[0]].concat(), "images: has more data than the 6 bytes that its header claims"),
        (&idx(&[2], &[1, 2]), "images: begins with 00000801, want 00000803 for an IDX file of bytes in 3 dimensions"),
        (&idx(&[0, 28, 28], &[]), "images: claims to hold [0, 28, 28] bytes, want 1 to 1073741824"),
        (&idx(&[u32::MAX; 3], &[]), "images: claims to hold [4294967295, 4294967295, 4294967295] bytes, want 1 to 1073741824"),
        (&idx(&[1 << 20, 1 << 10, 1], &[]), "images: is truncated: holds 0 of the 1073741824 bytes that it claims"),
    ] {
        assert_eq!(images(file).unwrap_err(), want);
    }
    let mut damaged = gzip(&good);
    let crc = damaged.len() - 8;
    damaged[crc] ^= 1;
    assert!(images(&damaged).unwrap_err().starts_with("images: is damaged: "), "a wrong checksum passes");
    assert_eq!(labels(&idx(&[3], &[1, 10, 2])).unwrap_err(), "labels: `labels` is 10 at 1, want digits from 0 to 9");
}

#[test]
fn files_that_do_not_belong_together_are_refused() {
    let refused = |dir: tempfile::TempDir| match Mnist::load(&dir).unwrap_err() {
        Error::File { path, reason } => (path.file_name().unwrap().to_string_lossy().into_owned(), reason),
        other => panic!("{other}"),
    };
    let missing = folder(|name, content| (name != FILES[3]).then(|| (name.into(), content)));
    assert_eq!(refused(missing), (FILES[3].into(), "does not exist, nor does it with .gz at the end".into()));
    let swap = |at: usize, other: Vec<u8>| {
        folder(move |name, content| Some((name.into(), if name == FILES[at] { other.clone() } else { content })))
    };
    let count = "`labels` is 3 for 2 images, want one for each image";
    assert_eq!(refused(swap(1, idx(&[3], &[1, 2, 3]))), (FILES[1].into(), count.into()));
    let size = "holds images of 3×1, but the training images are 1×3";
    assert_eq!(refused(swap(2, idx(&[1, 3, 1], &[1, 2, 3]))), (FILES[2].into(), size.into()));
    assert!(matches!(Mnist::load("no such folder"), Err(Error::File { .. })));
}

#[test]
fn a_batch_is_normalised_and_keeps_its_order() {
    let mnist = Mnist::load(folder(|name, content| Some((name.into(), content)))).unwrap();
    let cpu = Cpu::<f32>::new().unwrap();
    let (x, digits) = mnist.train.batch(&cpu, &[1, 0, 1]).unwrap();
    let want = [3u8, 4, 255, 0, 1, 2, 3, 4, 255].map(|pixel| (f32::from(pixel) / 255.0 - MEAN) / STD);
    assert_eq!(x.to_vec(&cpu).unwrap(), want);
    assert_eq!(digits.tensor().to_vec(&cpu).unwrap(), [0, 9, 0]);
    assert!(matches!(mnist.train.batch(&cpu, &[2]), Err(Error::Value { name: "index", .. })));
    assert_eq!(mnist.train.batch(&cpu, &[]).unwrap().0.rows(), 0);
}

#[test]
fn shuffled_batches_hold_every_index_once() {
    let batches = shuffled_batches((0..95).collect(), 10, &mut Rng::new(3));
    assert_eq!(batches.iter().map(Vec::len).collect::<Vec<_>>(), [10, 10, 10, 10, 10, 10, 10, 10, 10, 5]);
    let mut all = batches.concat();
    assert!(!all.is_sorted());
    all.sort_unstable();
    assert!(all.into_iter().eq(0..95));
    assert_eq!(shuffled_batches(vec![4, 4], 0, &mut Rng::new(0)), [[4], [4]], "batches of nothing would never end");
}

#[test]
fn generated_digits_are_the_same_for_a_seed_and_differ_within_it() {
    let (one, again, other) = (Mnist::generate(1, 300, 100), Mnist::generate(1, 300, 100), Mnist::generate(2, 300, 100));
    assert!(one == again && one.train != other.train);
    let more = Mnist::generate(1, 400, 100);
    assert!((0..300).all(|i| more.train.images().get(i) == one.train.images().get(i)), "a digit depends on how many there are");
    assert_ne!(one.train.images().get(0), one.test.images().get(0), "tested with what was trained on");
    for digit in 0..DIGITS as u8 {
        let shown = one.train.of_digit(digit);
        assert!(shown.len() > 10, "{digit} is drawn {} times of 300", shown.len());
        let white = |i: &usize| one.train.images().get(*i).unwrap().iter().filter(|&&pixel| pixel > 127).count();
        assert!(shown.iter().all(|i| (20..400).contains(&white(i))), "a {digit} is empty or a blot");
        assert_ne!(one.train.images().get(shown[0]), one.train.images().get(shown[1]));
    }
}

#[test]
fn a_truncated_split_has_consistent_lengths() {
    let mut split = Mnist::generate(0, 20, 1).train;
    split.truncate(usize::MAX);
    assert_eq!(split.len(), 20);
    split.truncate(7);
    assert_eq!((split.len(), split.images().len(), split.is_empty()), (7, 7, false));
    assert!(Split::new(split.images().clone(), Labels::new(vec![1; 6]).unwrap()).is_err());
    assert!(Images::new(0, 28, vec![]).is_err() && Images::new(usize::MAX, 2, vec![1]).is_err());
    assert!(Images::new(2, 2, vec![1; 5]).is_err() && Images::new(2, 2, vec![]).unwrap().is_empty());
}

/// Files of up to 8 images of up to 4×4, plain or gzipped.
fn files() -> impl Strategy<Value = Vec<u8>> {
    let sizes = (1u32..8, 1u32..5, 1u32..5, any::<bool>(), any::<u8>());
    sizes.prop_map(|(count, rows, cols, zipped, shade)| {
        let file = idx(&[count, rows, cols], &vec![shade; (count * rows * cols) as usize]);
        if zipped { gzip(&file) } else { file }
    })
}

proptest! {
    #[test]
    fn any_file_that_is_cut_short_is_refused(file in files(), cut in any::<prop::sample::Index>()) {
        prop_assert!(images(&file).is_ok());
        prop_assert!(images(&file[..cut.index(file.len())]).is_err());
    }

    #[test]
    fn any_flipped_bit_gives_an_answer(mut file in files(), at in any::<prop::sample::Index>(), bit in 0..8u8) {
        let at = at.index(file.len());
        file[at] ^= 1 << bit;
        if let Ok(images) = images(&file) {
            prop_assert!(images.get(images.len() - 1).is_some() && images.get(images.len()).is_none());
        }
        let _ = labels(&file);
    }

    #[test]
    fn any_bytes_give_an_answer(bytes in prop::collection::vec(any::<u8>(), 0..200), dimensions in 0u8..4, zipped in any::<bool>()) {
        let file = [&[0, 0, 8, dimensions], &bytes[..]].concat();
        let file = if zipped { gzip(&file) } else { file };
        let path = Path::new("fuzz");
        for result in [
            Idx::<0>::parse(path, &file).map(|idx| idx.data.len() == 1),
            Idx::<1>::parse(path, &file).map(|idx| idx.data.len() == idx.sizes.iter().product::<usize>()),
            Idx::<3>::parse(path, &file).map(|idx| idx.data.len() == idx.sizes.iter().product::<usize>()),
        ] {
            prop_assert!(result.unwrap_or(true), "as long as it says");
        }
        let _ = (labels(&file), images(&bytes));
    }
}
