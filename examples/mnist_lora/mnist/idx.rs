//! Reading IDX files: a magic number, the size of every dimension (both big-endian, 32 bits), then the data.

use std::fs::File;
use std::io::{self, ErrorKind, Read};
use std::path::{Path, PathBuf};

use flate2::bufread::GzDecoder;

use lowrank::{Error, Result};

/// The largest number of bytes that is accepted, so that a small gzip file cannot fill the memory. EMNIST, the largest data set in this
/// format that we know of, has 0.55 GB.
const LIMIT: usize = 1 << 30;
/// The first bytes of gzip files.
const GZIP: [u8; 2] = [0x1f, 0x8b];

/// The content of an IDX file of bytes in `N` dimensions. The number of bytes is the product of the sizes, and at least one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Idx<const N: usize> {
    /// The size of each dimension.
    pub sizes: [usize; N],
    /// The bytes, with the last dimension contiguous.
    pub data: Vec<u8>,
}

impl<const N: usize> Idx<N> {
    /// Parses the bytes of a file, gzipped or not; errors name `path`.
    ///
    /// Memory is allocated only for data that is there, whatever the header claims. Errors: [`Error::File`].
    pub fn parse(path: &Path, file: &[u8]) -> Result<Self> {
        let fail = |reason: String| Error::File { path: path.into(), reason };
        if !file.starts_with(&GZIP) {
            let mut rest = file;
            return Self::read(&mut rest).and_then(|idx| at_end(rest, idx)).map_err(fail);
        }
        let mut unzip = GzDecoder::new(file);
        let idx = Self::read(&mut unzip).map_err(fail)?;
        at_end(unzip.into_inner(), idx).map_err(fail)
    }

    fn read(source: &mut impl Read) -> Result<Self, String> {
        let magic = word(source)?;
        let want = 0x0800 + N as u32; // 08: unsigned bytes
        if magic != want {
            return Err(format!("begins with {magic:08x}, want {want:08x} for an IDX file of bytes in {N} dimensions"));
        }
        let mut sizes = [0; N];
        for size in &mut sizes {
            *size = word(source)? as usize;
        }
        let claimed = sizes.iter().try_fold(1, |product: usize, &size| product.checked_mul(size));
        let claimed = claimed.filter(|claimed| (1..=LIMIT).contains(claimed));
        let claimed = claimed.ok_or_else(|| format!("claims to hold {sizes:?} bytes, want 1 to {LIMIT}"))?;
        // `read_to_end` allocates as it reads. One more byte than claimed is read, to detect trailing data.
        let mut data = Vec::new();
        source.take(claimed as u64 + 1).read_to_end(&mut data).map_err(|error| broken(&error))?;
        match data.len() {
            found if found < claimed => Err(format!("is truncated: holds {found} of the {claimed} bytes that it claims")),
            found if found > claimed => Err(trailing(claimed)),
            _ => Ok(Self { sizes, data }),
        }
    }
}

fn trailing(claimed: usize) -> String {
    format!("has more data than the {claimed} bytes that its header claims")
}

/// Returns the content if the file ends here.
fn at_end<const N: usize>(rest: &[u8], idx: Idx<N>) -> Result<Idx<N>, String> {
    if rest.is_empty() { Ok(idx) } else { Err(trailing(idx.data.len())) }
}

fn word(source: &mut impl Read) -> Result<u32, String> {
    let mut bytes = [0; 4];
    source.read_exact(&mut bytes).map_err(|error| broken(&error))?;
    Ok(u32::from_be_bytes(bytes))
}

fn broken(error: &io::Error) -> String {
    match error.kind() {
        ErrorKind::UnexpectedEof => "is truncated".into(),
        _ => format!("is damaged: {error}"),
    }
}

/// Reads `name` in a folder, or else `name.gz`. Returns the path and the bytes.
pub(super) fn read(dir: &Path, name: &str) -> Result<(PathBuf, Vec<u8>)> {
    for path in [dir.join(name), dir.join(format!("{name}.gz"))] {
        match read_file(&path) {
            Ok(bytes) => return Ok((path, bytes)),
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(Error::File { path, reason: error.to_string() }),
        }
    }
    Err(Error::File { path: dir.join(name), reason: "does not exist, nor does it with .gz at the end".into() })
}

fn read_file(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(LIMIT as u64 + 64).read_to_end(&mut bytes)?; // 64: more than a header, so that a file which is too long is detected
    Ok(bytes)
}
