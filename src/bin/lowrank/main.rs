//! `lowrank`: work with adapters and checkpoints on disk from the command line. One file for each subcommand.

mod combine;
mod compress;
mod convert;
mod dequantise;
mod extract;
mod info;
mod merge;
mod outputs;
mod progress;
mod quantise;
mod rename;
mod unmerge;
mod values;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use lowrank::{Error, Result};

/// Work with adapters and checkpoints on disk: safetensors models, in one file or sharded, and the adapter folders that PEFT
/// writes.
///
/// An output is written completely or not at all; Ctrl-C leaves nothing behind.
#[derive(Parser)]
#[command(name = "lowrank", version)]
struct Program {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Info(info::Info),
    Merge(merge::Merge),
    Unmerge(unmerge::Unmerge),
    Extract(extract::Extract),
    Combine(combine::Combine),
    Compress(compress::Compress),
    Convert(convert::Convert),
    Quantise(quantise::Quantise),
    Dequantise(dequantise::Dequantise),
}

impl Command {
    fn run(self) -> Result<()> {
        match self {
            Command::Info(info) => info.run(),
            Command::Merge(merge) => merge.run(),
            Command::Unmerge(unmerge) => unmerge.run(),
            Command::Extract(extract) => extract.run(),
            Command::Combine(combine) => combine.run(),
            Command::Compress(compress) => compress.run(),
            Command::Convert(convert) => convert.run(),
            Command::Quantise(quantise) => quantise.run(),
            Command::Dequantise(dequantise) => dequantise.run(),
        }
    }
}

/// `1 module`, `2 modules`
fn count(number: usize, noun: &str) -> String {
    format!("{number} {noun}{}", if number == 1 { "" } else { "s" })
}

fn main() -> ExitCode {
    match Program::parse().command.run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("lowrank: {error}");
            ExitCode::from(if matches!(error, Error::Interrupted) { 130 } else { 1 }) // 130: the exit code of a program ended by SIGINT
        }
    }
}
