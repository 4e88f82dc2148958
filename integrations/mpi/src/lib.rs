//! Trains adapters of [lowrank](lowrank) on several processes and machines: gradients are summed over MPI.
//!
//! [`Mpi`] is a [`Communicator`]. [`run`] begins and ends a program: if a rank fails, all end, and the message names it.
//!
//! ```no_run
//! use lowrank::distributed::Communicator;
//!
//! fn main() -> std::process::ExitCode {
//!     lowrank_mpi::run(|mpi| {
//!         let mut values = [mpi.rank() as f32];
//!         mpi.all_reduce(&mut values)?;
//!         assert_eq!(values[0] as usize, mpi.size() * (mpi.size() - 1) / 2);
//!         Ok(())
//!     })
//! }
//! ```

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;

use lowrank::distributed::Communicator;
use lowrank::{Error, Result};
use mpi::Threading;
use mpi::collective::{CommunicatorCollectives, Root, SystemOperation};
use mpi::environment::Universe;
use mpi::topology::{Communicator as _, SimpleCommunicator};

/// Elements of one call: MPI counts in 32 bits with a sign.
const MOST: usize = 1 << 30;

/// All processes that `mpirun` started.
///
/// Open MPI and MPICH add in an order that depends on the number of ranks and of elements, and not on which rank is slow, and give
/// all ranks the same bits. MPI's standard only recommends it, so compare the ranks now and then
/// ([`check_replicas`](lowrank::distributed::check_replicas)).
///
/// An error inside MPI ends all processes with MPI's message. MPI does not check that all ranks pass the same number of elements;
/// [`broadcast_params`](lowrank::distributed::broadcast_params) checks it for the parameters of a model.
pub struct Mpi {
    world: SimpleCommunicator,
    _universe: Universe, // dropped last: its end is the end of MPI
}

impl Mpi {
    /// Starts MPI, once in a process. Errors: [`Error::Unavailable`] if it was started before.
    pub fn new() -> Result<Self> {
        let started = || Error::Unavailable { backend: "mpi", reason: "it was started before in this process".into() };
        let (universe, _) = mpi::initialize_with_threading(Threading::Funneled).ok_or_else(started)?;
        Ok(Self { world: universe.world(), _universe: universe })
    }

    /// Ends the processes of all ranks, after a message on the standard error that names this one.
    pub fn abort(&self, reason: &str) -> ! {
        eprintln!("error on rank {} of {}: {reason}", self.rank(), self.size());
        self.world.abort(1)
    }
}

impl fmt::Debug for Mpi {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Mpi(rank {} of {})", self.rank(), self.size())
    }
}

impl Communicator for Mpi {
    fn rank(&self) -> usize {
        self.world.rank() as usize
    }

    fn size(&self) -> usize {
        self.world.size() as usize
    }

    fn all_reduce(&self, values: &mut [f32]) -> Result<()> {
        for part in values.chunks_mut(MOST) {
            let mine = part.to_vec();
            self.world.all_reduce_into(&mine[..], part, SystemOperation::sum());
        }
        Ok(())
    }

    fn broadcast(&self, bytes: &mut [u8], root: usize) -> Result<()> {
        if root >= self.size() {
            let (got, want) = (root.to_string(), "a rank, less than the number of ranks".into());
            return Err(Error::Value { verb: "broadcast", name: "root", got, want });
        }
        let root = self.world.process_at_rank(root as i32);
        bytes.chunks_mut(MOST).for_each(|part| root.broadcast_into(part));
        Ok(())
    }

    fn barrier(&self) -> Result<()> {
        self.world.barrier();
        Ok(())
    }
}

/// Starts MPI, and runs a program on this rank. If the program of a rank returns an error or panics, the message names the rank,
/// and the processes of all ranks end; otherwise the others would wait for it.
pub fn run(program: impl FnOnce(&Mpi) -> Result<()>) -> ExitCode {
    let mpi = match Mpi::new() {
        Ok(mpi) => mpi,
        Err(error) => {
            eprintln!("error: {error}");
            return ExitCode::FAILURE;
        }
    };
    match catch_unwind(AssertUnwindSafe(|| program(&mpi))) {
        Ok(Ok(())) => ExitCode::SUCCESS,
        Ok(Err(error)) => mpi.abort(&error.to_string()),
        Err(_) => mpi.abort("it panicked; the message is above"),
    }
}

/// The number of processes that `mpirun` of Open MPI or MPICH started with this one; `None` if it was not started so.
pub fn started_with() -> Option<usize> {
    let set = |name: &str| std::env::var(name).ok()?.parse().ok();
    set("OMPI_COMM_WORLD_SIZE").or_else(|| set("PMI_SIZE"))
}
