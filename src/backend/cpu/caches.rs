//! The cache sizes of this machine, from which the plan of a product chooses its blocks.
//!
//! Sources, in order: `LOWRANK_CACHES`; `/sys/devices/system/cpu/cpu0/cache` on Linux; `cpuid` on x86-64; a default that is
//! small enough for most CPUs.

use std::fmt;

use crate::error::{Error, Result};

/// Bytes of each level of data cache that one core can use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Caches {
    pub(super) l1: usize,
    pub(super) l2: usize,
    /// Shared by several cores; the size of [`l2`](Self::l2) on a machine without L3.
    pub(super) l3: usize,
}

/// The default: the smallest sizes of CPUs with AVX2 or NEON.
const DEFAULT: Caches = Caches { l1: 32 << 10, l2: 256 << 10, l3: 4 << 20 };

impl fmt::Display for Caches {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "L1d {}K, L2 {}K, L3 {}K", self.l1 >> 10, self.l2 >> 10, self.l3 >> 10)
    }
}

impl Caches {
    /// The sizes in `LOWRANK_CACHES`, such as `32K,512K,32M`, or those of this machine. Errors: [`Error::Value`] for any other
    /// text.
    pub(super) fn new() -> Result<Self> {
        match std::env::var_os("LOWRANK_CACHES") {
            Some(text) => Self::parse(&text.to_string_lossy()),
            None => Ok(Self::of_machine()),
        }
    }

    fn of_machine() -> Self {
        let levels = system::levels().or_else(cpuid);
        levels.and_then(Self::from_levels).unwrap_or(DEFAULT)
    }

    /// Sizes of levels 1, 2 and 3, with 0 for a missing level. `None` if they are not plausible.
    fn from_levels([l1, l2, l3]: [usize; 3]) -> Option<Self> {
        let l2 = if l2 == 0 { l3 } else { l2 };
        let caches = Self { l1, l2, l3: l3.max(l2) };
        ((4 << 10..=l2).contains(&l1) && l2 <= 1 << 30).then_some(caches)
    }

    /// Parses three sizes, such as `32K,512K,32M`.
    pub(super) fn parse(text: &str) -> Result<Self> {
        let sizes: Option<Vec<usize>> = text.split(',').map(size).collect();
        let levels = sizes.and_then(|sizes| sizes.try_into().ok());
        let want = "the sizes of L1d, L2 and L3, none smaller than the one before it, such as 32K,512K,32M";
        let error = || Error::Value { verb: "cpu", name: "LOWRANK_CACHES", got: text.into(), want: want.into() };
        levels.filter(|levels: &[usize; 3]| levels.is_sorted()).and_then(Self::from_levels).ok_or_else(error)
    }
}

/// Parses a size, such as `32K`, `1M` or `32768`.
fn size(text: &str) -> Option<usize> {
    let text = text.trim();
    let (digits, unit) = match text.strip_suffix(['K', 'k']) {
        Some(digits) => (digits, 1 << 10),
        None => text.strip_suffix(['M', 'm']).map_or((text, 1), |digits| (digits, 1 << 20)),
    };
    digits.parse::<usize>().ok()?.checked_mul(unit)
}

#[cfg(target_os = "linux")]
mod system {
    use std::path::Path;

    /// The sizes that Linux reports.
    pub(super) fn levels() -> Option<[usize; 3]> {
        read(Path::new("/sys/devices/system/cpu/cpu0/cache"))
    }

    /// Reads a folder with one folder for each cache, in which the files `level`, `type` and `size` describe it.
    pub(super) fn read(folder: &Path) -> Option<[usize; 3]> {
        let mut levels = [0; 3];
        for cache in std::fs::read_dir(folder).ok()?.flatten() {
            let file = |name| std::fs::read_to_string(cache.path().join(name)).ok();
            let (Some(level), Some(kind), Some(size)) = (file("level"), file("type"), file("size")) else { continue };
            let level = level.trim().parse::<usize>().ok().and_then(|level| levels.get_mut(level.checked_sub(1)?));
            if let (Some(level), Some(size), "Data" | "Unified") = (level, super::size(&size), kind.trim()) {
                *level = size;
            }
        }
        (levels != [0; 3]).then_some(levels)
    }
}

#[cfg(not(target_os = "linux"))]
mod system {
    pub(super) fn levels() -> Option<[usize; 3]> {
        None
    }
}

#[cfg(target_arch = "x86_64")]
use super::simd::cache_levels as cpuid;

#[cfg(not(target_arch = "x86_64"))]
fn cpuid() -> Option<[usize; 3]> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_parsed() {
        let caches = |l1, l2, l3| Caches { l1, l2, l3 };
        assert_eq!(Caches::parse("32K,512K,32M").unwrap(), caches(32 << 10, 512 << 10, 32 << 20));
        assert_eq!(Caches::parse("49152, 2M ,2M").unwrap(), caches(48 << 10, 2 << 20, 2 << 20));
        for wrong in
            ["", "32K", "32K,512K", "512K,32K,32M", "32K,512K,32M,1G", "32K,-1,32M", "1,2,3", "32K,512K,99999999999999999999M"]
        {
            let error = Caches::parse(wrong).unwrap_err().to_string();
            assert!(error.contains("LOWRANK_CACHES") && error.contains("32K,512K,32M"), "{error}");
        }
    }

    #[test]
    fn the_caches_of_this_machine_are_plausible() {
        let caches = Caches::of_machine();
        assert!(caches.l1 >= 4 << 10 && caches.l1 <= caches.l2 && caches.l2 <= caches.l3, "{caches:?}");
        assert_eq!(Caches::from_levels([0; 3]), None);
        assert_eq!(Caches::from_levels([64 << 10, 4 << 20, 0]).map(|caches| caches.l3), Some(4 << 20));
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn linux_has_a_folder_for_each_cache() {
        let folder = tempfile::tempdir().unwrap();
        for (i, [level, kind, size]) in
            [["1", "Data", "32K"], ["1", "Instruction", "64K"], ["2", "Unified", "512K"], ["3", "Unified", "32768K"]]
                .iter()
                .enumerate()
        {
            let cache = folder.path().join(format!("index{i}"));
            std::fs::create_dir(&cache).unwrap();
            for (name, text) in [("level", level), ("type", kind), ("size", size)] {
                std::fs::write(cache.join(name), format!("{text}\n")).unwrap();
            }
        }
        assert_eq!(system::read(folder.path()), Some([32 << 10, 512 << 10, 32 << 20]));
        assert_eq!(system::read(&folder.path().join("none")), None);
    }
}
