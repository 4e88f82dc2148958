//! Jobs that `mpirun` starts, and the processes of them.

use std::fs::{self, File};
use std::io::Read;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// What carries the messages.
#[derive(Clone, Copy, Debug)]
pub enum Network {
    /// What MPI chooses: between processes of one machine, shared memory.
    Any,
    /// TCP over the loopback device (for Open MPI; others choose).
    Loopback,
}

/// A program to be run on several processes.
pub struct Job {
    program: PathBuf,
    pub ranks: usize,
    args: Vec<String>,
    network: Network,
}

impl Job {
    /// An example of this package. `cargo test` builds them; `cargo test --test processes` takes those that are there.
    pub fn new(example: &str, ranks: usize, args: &[&str]) -> Self {
        let tests = std::env::current_exe().unwrap();
        let program = tests.parent().and_then(|deps| deps.parent()).unwrap().join("examples").join(example);
        assert!(program.exists(), "{} is missing: run `cargo build --examples`", program.display());
        Self { program, ranks, args: args.iter().map(|arg| arg.to_string()).collect(), network: Network::Any }
    }

    /// The same over this network.
    pub fn over(self, network: Network) -> Self {
        Self { network, ..self }
    }

    pub fn start(&self) -> Running {
        let folder = tempfile::tempdir().unwrap();
        let stream = |name| Stdio::from(File::create(folder.path().join(name)).unwrap());
        let mut command = Command::new("mpirun");
        command.arg("-n").arg(self.ranks.to_string()).arg(&self.program).args(&self.args);
        // More ranks than cores, also for root, as containers have it; Open MPI 4 and 5.
        command.env("OMPI_MCA_rmaps_base_oversubscribe", "1").env("PRTE_MCA_rmaps_default_mapping_policy", ":oversubscribe");
        command.env("OMPI_ALLOW_RUN_AS_ROOT", "1").env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1").env("RAYON_NUM_THREADS", "1");
        if let Network::Loopback = self.network {
            command.env("OMPI_MCA_btl", "tcp,self").env("OMPI_MCA_btl_tcp_if_include", "lo").env("OMPI_MCA_pml", "ob1");
        }
        let child = command.stdin(Stdio::null()).stdout(stream("stdout")).stderr(stream("stderr")).spawn().unwrap();
        Running { child, folder }
    }
}

/// A job that runs. It is ended when this is dropped.
pub struct Running {
    child: Child,
    folder: tempfile::TempDir,
}

/// A job that has ended.
pub struct Ended {
    pub success: bool,
    pub stdout: String,
    pub stderr: String,
}

impl Running {
    /// Waits until the job ends, which must be within a time.
    pub fn wait(mut self, within: Duration) -> Ended {
        let began = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return Ended { success: status.success(), stdout: self.output("stdout"), stderr: self.output("stderr") };
            }
            assert!(began.elapsed() < within, "still running after {within:?}: {}", self.output("stderr"));
            thread::sleep(Duration::from_millis(10));
        }
    }

    pub fn wait_for_output(&self, text: &str) {
        let began = Instant::now();
        while !self.output("stdout").contains(text) {
            assert!(began.elapsed() < Duration::from_secs(60), "`{text}` was not printed: {}", self.output("stderr"));
            thread::sleep(Duration::from_millis(10));
        }
    }

    fn output(&self, name: &str) -> String {
        let mut bytes = Vec::new();
        File::open(self.folder.path().join(name)).unwrap().read_to_end(&mut bytes).unwrap();
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill(); // after it has ended nothing happens
        let _ = self.child.wait();
    }
}

/// `kill -9` for one rank of a job.
pub fn kill_rank(job: &Running, rank: usize) {
    let of_rank = |pid: &u32| {
        let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        let is = |name: &str| environment.split(|&byte| byte == 0).any(|entry| entry == format!("{name}={rank}").as_bytes());
        is("OMPI_COMM_WORLD_RANK") || is("PMI_RANK")
    };
    let pid = descendants(job.child.id()).into_iter().find(of_rank).expect("a process of this rank");
    assert!(Command::new("kill").args(["-9", &pid.to_string()]).status().unwrap().success());
}

/// The processes that a process has started, and those that they have started.
fn descendants(of: u32) -> Vec<u32> {
    let pids = fs::read_dir("/proc").unwrap().filter_map(|entry| entry.unwrap().file_name().to_str()?.parse::<u32>().ok());
    let parent = |pid: u32| -> Option<u32> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
    };
    let children = pids.filter(|&pid| parent(pid) == Some(of));
    children.flat_map(|pid| [vec![pid], descendants(pid)].concat()).collect()
}

/// False, with a note, where there is no `mpirun`. `LOWRANK_REQUIRE=mpi` makes that a failure.
pub fn mpirun_is_here() -> bool {
    let here = Command::new("mpirun").arg("--version").stdout(Stdio::null()).status().is_ok_and(|status| status.success());
    let required = std::env::var("LOWRANK_REQUIRE").is_ok_and(|names| names.split(',').any(|name| name == "mpi"));
    assert!(here || !required, "there is no mpirun, and LOWRANK_REQUIRE asks for mpi");
    if !here {
        println!("there is no mpirun: not checked");
    }
    here
}
