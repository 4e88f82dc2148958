//! The training loop: one process or several, with checkpoints.

use std::path::{Path, PathBuf};
use std::time::Instant;

use crate::mnist::Split;
use lowrank::autograd::{Gradients, Tape};
use lowrank::distributed::{BatchShare, Communicator, SamplerPosition, broadcast_file, broadcast_params, check_replicas, shard};
use lowrank::nn::{Adam, Adaptable, Mlp};
use lowrank::random::Rng;
use lowrank::training::{Progress as Saved, resume_from_bytes, save};
use lowrank::{Backend, Error, Result, Tensor};

use crate::experiment::{Phase, Progress};
use crate::whole;

/// Where and how often a run is saved.
#[derive(Clone, Debug)]
pub struct Checkpoints {
    /// The folder; each phase of the run has a file in it.
    pub dir: PathBuf,
    /// Steps from one to the next.
    pub every: usize,
    /// Go on from what is there.
    pub resume: bool,
}

impl Checkpoints {
    /// Errors: [`Error::File`] for a folder of another run, or, to resume, for one without a checkpoint.
    pub fn check(&self, comm: &impl Communicator) -> Result<()> {
        let first = self.file("training");
        let there = [u8::from(first.exists())];
        let mut found = there;
        comm.broadcast(&mut found, 0)?; // the other ranks need not see the folder
        let reason = match (found == [1], self.resume) {
            (true, false) => "is there already: `--resume` goes on with that run, another folder begins a new one",
            (false, true) => "is not there: a run without `--resume` begins one",
            _ => return Ok(()),
        };
        Err(Error::File { path: first, reason: reason.into() })
    }

    fn file(&self, phase: &str) -> PathBuf {
        self.dir.join(format!("{phase}.safetensors"))
    }
}

/// What is trained, and on what.
pub struct Job<'j> {
    /// `training` or `tuning`, for progress and errors.
    pub phase: &'static str,
    /// The name of its checkpoint.
    pub file: &'static str,
    /// The images.
    pub split: &'j Split,
    /// The indices of each batch, of all ranks together.
    pub batches: Vec<Vec<usize>>,
    /// The learning rate.
    pub lr: f32,
    /// Where it is saved; `None`: nowhere.
    pub checkpoints: Option<&'j Checkpoints>,
    /// What a resumed run must have in common with the one that was saved.
    pub settings: String,
    /// The generator, after it made the batches.
    pub rng: Rng,
}

/// The number of losses that are read together, because reading one waits for the device.
const READ: usize = 50;
/// Steps from one comparison of the ranks to the next.
const COMPARED: usize = 100;

/// Trains with Adam on the mean cross-entropy, one step for each batch.
pub fn train<B: Backend, C: Communicator>(
    (backend, comm): (&B, &C),
    mlp: &mut Mlp<B>,
    job: Job<'_>,
    watch: &mut dyn FnMut(&Progress),
) -> Result<Phase> {
    let (mut adam, began) = (Adam::new(job.lr)?, Instant::now());
    broadcast_params(backend, mlp.params_mut().filter(|param| param.trainable), 0, comm)?;
    let mut losses = resumed((backend, comm), mlp, &mut adam, &job)?;
    let (mut gradients, steps) = (Gradients::default(), job.batches.len()); // the next step reuses the memory of the gradients
    while losses.len() < steps {
        let first = losses.len();
        let until_saved = job.checkpoints.map_or(READ, |checkpoints| checkpoints.every - first % checkpoints.every);
        let group = &job.batches[first..steps.min(first + READ.min(until_saved))];
        let mut unread = Vec::with_capacity(group.len());
        for (at, batch) in group.iter().enumerate() {
            unread.push(step((backend, comm), mlp, (&mut adam, &mut gradients), job.split, batch)?);
            if (first + at + 1).is_multiple_of(COMPARED) {
                check_replicas(backend, mlp.params_mut().filter(|param| param.trainable), comm)?;
            }
        }
        for loss in unread {
            losses.extend(loss.to_vec(backend)?);
        }
        let loss = losses[first..].iter().sum::<f32>() / group.len() as f32;
        if !loss.is_finite() {
            let got = format!("{loss} after {} steps", losses.len());
            return Err(Error::Value { verb: job.phase, name: "loss", got, want: "finite; try a smaller learning rate".into() });
        }
        if comm.rank() == 0 {
            saved(backend, mlp, &adam, &job, &losses)?;
        }
        watch(&Progress { phase: job.phase, step: losses.len(), steps, loss, seconds: began.elapsed().as_secs_f64() });
    }
    Ok(Phase { losses, seconds: began.elapsed().as_secs_f64() })
}

/// Makes one step on this rank's share of a batch. Returns the loss of the whole batch before the step, on the device.
fn step<B: Backend, C: Communicator>(
    (backend, comm): (&B, &C),
    mlp: &mut Mlp<B>,
    (adam, gradients): (&mut Adam<B>, &mut Gradients<B>),
    split: &Split,
    batch: &[usize],
) -> Result<Tensor<B, f32>> {
    let rows = &batch[shard(batch.len(), comm.rank(), comm.size())];
    let mut loss = None;
    *gradients = if rows.is_empty() {
        Gradients::default()
    } else {
        let (x, labels) = split.batch(backend, rows)?;
        let mut tape = Tape::reusing(backend, std::mem::take(gradients));
        let x = tape.input(x);
        let logits = mlp.forward(&mut tape, x, None)?;
        loss = Some(tape.cross_entropy(logits, &labels)?);
        tape.backward()?
    };
    let loss = match loss {
        Some(loss) if comm.size() == 1 => loss, // not read yet
        loss => {
            let loss = loss.map(|loss| loss.to_vec(backend)).transpose()?.map_or(0.0, |loss| loss[0]);
            let share = BatchShare { rows: rows.len(), loss };
            let whole = gradients.all_reduce_mean(backend, mlp.params_mut(), share, comm)?;
            Tensor::from_slice(backend, (1, 1), &[whole.loss])?
        }
    };
    adam.step(backend, mlp.params_mut(), gradients)?;
    Ok(loss)
}

/// The losses so far, with the model and the optimizer as they were then; none without a checkpoint.
fn resumed<B: Backend, C: Communicator>(
    (backend, comm): (&B, &C),
    mlp: &mut Mlp<B>,
    adam: &mut Adam<B>,
    job: &Job<'_>,
) -> Result<Vec<f32>> {
    let mut losses = Vec::with_capacity(job.batches.len());
    let Some(checkpoints) = job.checkpoints.filter(|checkpoints| checkpoints.resume) else { return Ok(losses) };
    let path = checkpoints.file(job.file);
    let mut there = [u8::from(path.exists())];
    comm.broadcast(&mut there, 0)?;
    if there == [0] {
        return Ok(losses); // interrupted before the first one of this phase
    }
    let bytes = broadcast_file(&path, comm)?;
    let Saved { step, rng, extra, .. } = resume_from_bytes(&bytes, &path, backend, mlp, adam, &job.settings)?;
    losses.extend(extra.split_whitespace().filter_map(|bits| u32::from_str_radix(bits, 16).ok()).map(f32::from_bits));
    let same_rng = (rng.seed(), rng.position()) == (job.rng.seed(), job.rng.position());
    if losses.len() as u64 != step || losses.len() > job.batches.len() || !same_rng {
        return Err(Error::File { path, reason: "is of a run with other batches".into() });
    }
    Ok(losses)
}

/// Saves the run, if it is time to.
fn saved<B: Backend>(backend: &B, mlp: &mut Mlp<B>, adam: &Adam<B>, job: &Job<'_>, losses: &[f32]) -> Result<()> {
    let Some(checkpoints) = job.checkpoints else { return Ok(()) };
    if !losses.len().is_multiple_of(checkpoints.every) && losses.len() < job.batches.len() {
        return Ok(());
    }
    let extra = losses.iter().map(|loss| format!("{:08x}", loss.to_bits())).collect::<Vec<_>>().join(" ");
    let position = SamplerPosition { epoch: 0, batch: losses.len() as u64 };
    let progress = Saved { step: losses.len() as u64, position, rng: job.rng.clone(), settings: job.settings.clone(), extra };
    whole::uninterrupted(|| {
        create(&checkpoints.dir)?;
        save(&checkpoints.file(job.file), backend, mlp, adam, &progress)
    })
}

fn create(dir: &Path) -> Result<()> {
    std::fs::create_dir_all(dir).map_err(|error| Error::File { path: dir.into(), reason: error.to_string() })
}
