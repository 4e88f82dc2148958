//! What one process does in `processes.rs`: `mpirun -n N rank WHAT FOLDER`. It writes what it has at the end to `FOLDER/rank-R`.

#![allow(unreachable_pub, reason = "an example exports nothing")]

#[path = "../../../tests/support/ranks.rs"]
mod ranks;

use std::fmt::Write;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use lowrank::distributed::{Communicator, check_replicas};
use lowrank::nn::Adaptable;
use lowrank::{Error, Result, file};
use lowrank_mpi::Mpi;
use ranks::{Change, Counting, cpu, exact_step, model, trained_with};

fn main() -> ExitCode {
    let mut args = std::env::args().skip(1);
    let (what, folder) = (args.next().unwrap_or_default(), args.next().unwrap_or_default());
    lowrank_mpi::run(|mpi| {
        let text = run(mpi, &what)?;
        file::write_whole(&Path::new(&folder).join(format!("rank-{}", mpi.rank())), text.as_bytes())
    })
}

/// The steps of a training run.
const STEPS: usize = 6;

fn run(mpi: &Mpi, what: &str) -> Result<String> {
    let change = match what {
        "train" | "exact" => Change::Nothing,
        "train-wrong" | "exact-wrong" => Change::WrongShare,
        "train-drift" => Change::Drift,
        // Rank 1 ends in the middle of a run, and the others wait for it in a collective.
        "error" if mpi.rank() == 1 => return Err(Error::Unavailable { backend: "cuda", reason: "the device was lost".into() }),
        "panic" if mpi.rank() == 1 => panic!("an index is out of range"),
        "wait" if mpi.rank() == 1 => {
            println!("rank 1 waits"); // to be killed
            std::thread::sleep(Duration::from_secs(600));
            return Ok(String::new());
        }
        "drift" => return drift(mpi).map(|()| String::new()),
        "error" | "panic" | "wait" => Change::Nothing,
        other => panic!("nothing has the name `{other}`"),
    };
    let mut text = format!("size {}\n", mpi.size());
    if what.starts_with("exact") {
        return Ok(text + &words(&exact_step(mpi, change)));
    }
    let comm = Counting::new(mpi);
    let (adapters, losses) = trained_with::<f32>(&comm, STEPS, change);
    let losses: Vec<u32> = losses.iter().map(|(loss, _)| loss.to_bits()).collect();
    writeln!(text, "calls {}\nbytes {}", comm.calls.get(), comm.bytes.get()).expect("a string takes everything");
    Ok(text + &words(&adapters) + &words(&losses))
}

/// The comparison of the ranks after one bit of one parameter of rank 1 has changed.
fn drift(mpi: &Mpi) -> Result<()> {
    let backend = &cpu::<f32>();
    let mut model = model(backend, 3);
    check_replicas(backend, model.params_mut(), mpi)?;
    if mpi.rank() == 1 {
        let param = model.params_mut().next().expect("a layer has a weight");
        let mut numbers = param.tensor().to_vec(backend)?;
        numbers[7] = f32::from_bits(numbers[7].to_bits() ^ 1);
        param.copy_from_slice(backend, &numbers)?;
    }
    check_replicas(backend, model.params_mut(), mpi)
}

/// A line of numbers.
fn words(numbers: &[u32]) -> String {
    numbers.iter().map(|number| format!("{number:08x}")).collect::<Vec<_>>().join(" ") + "\n"
}
