//! Finding MNIST: in a folder, in the user's cache, or on a mirror; without a network, digits are generated.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::mnist::{FILES, Images, Labels, Mnist, Split};
use flate2::bufread::GzDecoder;
use lowrank::distributed::Communicator;
use lowrank::{Error, Result};
use sha2::{Digest, Sha256};

use crate::args::Args;
use crate::{progress, whole};

/// PyTorch's mirror.
const MIRROR: &str = "https://ossci-datasets.s3.amazonaws.com/mnist";

/// Size and SHA-256 of each of [`FILES`], decompressed, because mirrors compress them differently.
const CONTENTS: [(usize, &str); 4] = [
    (47_040_016, "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db"),
    (60_008, "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5"),
    (7_840_016, "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7"),
    (10_008, "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"),
];

/// The digits that rank 0 finds, on every rank, and a description of their source, which only rank 0 has.
pub fn find_on_rank_0(args: &Args, comm: &impl Communicator) -> Result<(Mnist, String)> {
    if comm.size() == 1 {
        return find(args);
    }
    let (mine, source) =
        if comm.rank() == 0 { find(args).map(|(mnist, source)| (Some(mnist), source))? } else { Default::default() };
    let (train, test) = (mine.as_ref().map(|mnist| &mnist.train), mine.as_ref().map(|mnist| &mnist.test));
    Ok((Mnist { train: broadcast(train, comm)?, test: broadcast(test, comm)? }, source))
}

/// The images and labels of rank 0.
fn broadcast(split: Option<&Split>, comm: &impl Communicator) -> Result<Split> {
    let sizes = split.map_or([0; 3], |split| [split.len(), split.images().rows(), split.images().cols()].map(|size| size as u64));
    let mut bytes: Vec<u8> = sizes.into_iter().flat_map(u64::to_le_bytes).collect();
    comm.broadcast(&mut bytes, 0)?;
    let size = |at: usize| bytes[8 * at..][..8].iter().rev().fold(0, |size, &byte| (size << 8) | usize::from(byte));
    let [count, rows, cols] = [size(0), size(1), size(2)];
    let mut pixels = split.map_or_else(|| vec![0; count * rows * cols], |split| split.images().pixels().to_vec());
    let mut labels = split.map_or_else(|| vec![0; count], |split| split.labels().to_vec());
    comm.broadcast(&mut pixels, 0)?;
    comm.broadcast(&mut labels, 0)?;
    Split::new(Images::new(rows, cols, pixels)?, Labels::new(labels)?)
}

/// The digits, and a description of their source.
fn find(args: &Args) -> Result<(Mnist, String)> {
    let dir = args.data.clone().or_else(|| std::env::var_os("MNIST_DIR").map(PathBuf::from));
    let (mut mnist, source) = match dir {
        _ if args.generate => generate(args),
        Some(dir) => (Mnist::load(&dir)?, dir.display().to_string()),
        None => match cached(args)? {
            Ok(dir) => (Mnist::load(&dir)?, dir.display().to_string()),
            Err(why) => {
                eprintln!("MNIST cannot be downloaded ({why}).");
                eprintln!("Drawing digits instead, which are easier; `--data DIR` reads the real ones from a folder.");
                generate(args)
            }
        },
    };
    if let Some(limit) = args.limit {
        mnist.train.truncate(limit.max(1));
        mnist.test.truncate(limit.div_ceil(6).max(1));
    }
    Ok((mnist, source))
}

/// Generates as many digits as MNIST has, or as many as `--limit` says.
fn generate(args: &Args) -> (Mnist, String) {
    let count = args.limit.unwrap_or(60_000).clamp(1, 60_000);
    (Mnist::generate(args.seed, count, count.div_ceil(6)), format!("generated, seed {}", args.seed))
}

/// The reason why the mirror cannot be reached.
type Offline = String;

/// The cache folder; files that it lacks are downloaded first.
fn cached(args: &Args) -> Result<Result<PathBuf, Offline>> {
    let mirror = args.mirror.clone().or_else(|| std::env::var("MNIST_MIRROR").ok());
    let mirror = mirror.unwrap_or_else(|| MIRROR.into());
    let Some(dir) = dirs::cache_dir() else { return Ok(Err("this user has no cache folder".into())) };
    let dir = dir.join("lowrank").join("mnist");
    for (name, content) in FILES.into_iter().zip(CONTENTS) {
        let path = dir.join(format!("{name}.gz"));
        // Files were checked when they were downloaded. They are checked again, because they may have been damaged since.
        if fs::read(&path).is_ok_and(|file| check(&file, content).is_ok()) {
            continue;
        }
        let url = format!("{}/{name}.gz", mirror.trim_end_matches('/'));
        let file = match download(&url, content.0)? {
            Ok(file) => file,
            Err(offline) => return Ok(Err(offline)),
        };
        check(&file, content).map_err(|reason| Error::File { path: PathBuf::from(&url), reason })?;
        whole::write(&path, &file)?;
    }
    Ok(Ok(dir))
}

/// Downloads a file; the inner error is the reason why the network cannot be reached. Errors: [`Error::File`] if the server has
/// no such file, or one larger than `limit`.
fn download(url: &str, limit: usize) -> Result<Result<Vec<u8>, Offline>> {
    let fail = |reason: String| Error::File { path: PathBuf::from(url), reason };
    let timeouts = ureq::Agent::config_builder()
        .timeout_connect(Some(Duration::from_secs(10)))
        .timeout_recv_response(Some(Duration::from_secs(30)))
        .timeout_recv_body(Some(Duration::from_secs(600)));
    let mut response = match ureq::Agent::new_with_config(timeouts.build()).get(url).call() {
        Ok(response) => response,
        Err(error @ (ureq::Error::StatusCode(_) | ureq::Error::BadUri(_))) => {
            return Err(fail(format!("{error}; another mirror can be named with --mirror")));
        }
        Err(error) => return Ok(Err(error.to_string())),
    };
    let name = Path::new(url).file_name().unwrap_or_default().to_string_lossy().into_owned();
    let bar = progress::download(&name, response.body().content_length());
    let mut file = Vec::new();
    let body = response.body_mut().as_reader().take(limit as u64 + 1);
    if let Err(error) = bar.wrap_read(body).read_to_end(&mut file) {
        return Ok(Err(error.to_string()));
    }
    bar.finish();
    if file.len() > limit {
        return Err(fail(format!("is longer than the {limit} bytes of the original")));
    }
    Ok(Ok(file))
}

/// Checks that a file, gzipped or not, has the content of the original. The error is the reason.
fn check(file: &[u8], (len, sha256): (usize, &str)) -> Result<(), String> {
    let mut content = Vec::new();
    if file.starts_with(&[0x1f, 0x8b]) {
        let unzipped = GzDecoder::new(file).take(len as u64 + 1).read_to_end(&mut content);
        unzipped.map_err(|error| format!("is damaged: {error}"))?;
    } else {
        content.extend_from_slice(file);
    }
    let found: String = Sha256::digest(&content).iter().map(|byte| format!("{byte:02x}")).collect();
    if found == sha256 { Ok(()) } else { Err(format!("is not the original: its SHA-256 is {found}, want {sha256}")) }
}
