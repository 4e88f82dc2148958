//! What is spread over ranks: the layers of `examples/tensor_parallel`, and a bank of adapters.
//!
//! On whole numbers, where nothing is rounded: what the ranks have together must be, to the bit, what one rank has.

#![allow(dead_code, reason = "the example uses all of its module")]
#![allow(unreachable_pub, reason = "a test binary exports nothing")]

#[path = "../examples/tensor_parallel/mlp.rs"]
mod mlp;
#[path = "support/ranks.rs"]
mod ranks;

use lowrank::autograd::{Backward, Param, Tape};
use lowrank::distributed::{Communicator, Threads, shard};
use lowrank::nn::{Adaptable, Adapter, AdapterBank, DEFAULT, HostAdapter, LayerAdapter, Linear, LoraConfig, Mlp};
use lowrank::op::WeightGrad;
use lowrank::random::Rng;
use lowrank::{Cpu, MatRef, Result, Tensor};
use mlp::{Gradients, Layer, ParallelMlp};
use ranks::{Counting, cpu, on_ranks, whole};

/// Rows of the batch.
const M: usize = 4;
/// Inputs of the first layer.
const K: usize = 6;
/// Numbers between the layers.
const HIDDEN: usize = 10;
/// Outputs of the second layer.
const N: usize = 5;
/// Rank of the updates.
const R: usize = 2;
const SCALE: f32 = 2.0;

/// The weights, the batch and the gradient of its output.
struct Numbers {
    /// `W`, `A` and `B` of both layers.
    layers: [[Vec<f32>; 3]; 2],
    x: Vec<f32>,
    dy: Vec<f32>,
}

impl Numbers {
    fn new() -> Self {
        let rng = &mut Rng::new(1);
        let layers = [(K, HIDDEN), (HIDDEN, N)].map(|(k, n)| [whole(rng, n * k, 2), whole(rng, R * k, 1), whole(rng, n * R, 1)]);
        Self { layers, x: whole(rng, M * K, 3), dy: whole(rng, M * N, 3) }
    }

    fn layer(&self, at: usize) -> Layer<'_> {
        let ([w, a, b], (k, n)) = (&self.layers[at], [(K, HIDDEN), (HIDDEN, N)][at]);
        let matrix = |numbers, shape| MatRef::from_slice(numbers, shape).unwrap();
        Layer { w: matrix(w, (n, k)), a: matrix(a, (R, k)), b: matrix(b, (n, R)), scale: SCALE }
    }
}

/// `y`, `dx`, and `dA` and `dB` of both layers.
type Results = [Vec<f32>; 6];

/// The unsharded layers, with the crate's own model and tape.
fn unsharded(numbers: &Numbers) -> Results {
    let cpu = &cpu::<f32>();
    let tensor = |numbers: &[f32], rows: usize| Tensor::from_slice(cpu, (rows, numbers.len() / rows), numbers).unwrap();
    let outputs = [HIDDEN, N];
    let linear = |at: usize| Linear::from_tensors(tensor(&numbers.layers[at][0], outputs[at]), None).unwrap();
    let mut model = Mlp::from_layers(vec![linear(0), linear(1)]).unwrap();
    let adapter = |at: usize| {
        let [_, a, b] = &numbers.layers[at];
        let config = LoraConfig::new(R, SCALE * R as f32);
        (format!("linear{}", at + 1), Adapter::from_tensors(tensor(a, R), tensor(b, outputs[at]), config).unwrap())
    };
    model.set_adapters(vec![adapter(0), adapter(1)]).unwrap();
    let x = Param::new(tensor(&numbers.x, M)); // a parameter, so that the tape makes its gradient
    let mut tape = Tape::new(cpu);
    let batch = |backward: Backward<'_, Cpu<f32>, 0>| Ok(([], [Some(backward.dy.try_clone(backward.backend)?)]));
    let input = tape.custom("batch", [], [&x], x.tensor().try_clone(cpu).unwrap(), batch).unwrap();
    let y = model.forward(&mut tape, input, None).unwrap();
    let out = tape.value(y).unwrap().to_vec(cpu).unwrap();
    tape.seed(y, tensor(&numbers.dy, M)).unwrap();
    let gradients = tape.backward().unwrap();
    let host = |param| match gradients.get(param).unwrap() {
        WeightGrad::Dense(gradient) => gradient.to_vec(cpu).unwrap(),
        WeightGrad::Factored { .. } => panic!("the gradient of a factor is a matrix"),
    };
    let [first, second] = ["linear1", "linear2"].map(|name| model.layer(name).unwrap().adapter(DEFAULT).unwrap());
    [out, host(&x), host(first.a()), host(first.b()), host(second.a()), host(second.b())]
}

/// What a rank has, with the number of collectives and of their bytes.
fn on_one_rank(comm: &impl Communicator, numbers: &Numbers) -> (Results, [(usize, usize); 2]) {
    let (cpu, comm) = (&cpu::<f32>(), Counting::new(comm));
    let mlp = ParallelMlp::new(numbers.layer(0), numbers.layer(1), &comm).unwrap();
    let (x, dy) = (MatRef::from_slice(&numbers.x, (M, K)).unwrap(), MatRef::from_slice(&numbers.dy, (M, N)).unwrap());
    let forward = mlp.forward(cpu, x).unwrap();
    let of_forward = comm.take();
    let Gradients { dx, da1, db1, da2, db2 } = mlp.backward(cpu, x, &forward, dy).unwrap();
    ([forward.y, dx, da1, db1, da2, db2], [of_forward, comm.take()])
}

/// The results of all ranks together: `dB₁` in rows, `dA₂` in columns; everything else is the same on each.
fn together(ranks: &[Results]) -> Results {
    let mut all = ranks[0].clone();
    all[3] = ranks.iter().flat_map(|rank| rank[3].clone()).collect();
    let mine = |rank: usize| shard(HIDDEN, rank, ranks.len());
    all[4] = (0..R)
        .flat_map(|row| {
            (0..ranks.len()).flat_map(move |rank| ranks[rank][4][row * mine(rank).len()..][..mine(rank).len()].to_vec())
        })
        .collect();
    all
}

#[test]
fn two_layers_over_ranks_are_the_unsharded_ones_with_one_all_reduce_a_pass() {
    let want = unsharded(&Numbers::new());
    assert!(want.iter().all(|numbers| numbers.iter().any(|&x| x != 0.0)));
    for size in [1, 2, 3, 4, 10, 11] {
        let ranks = on_ranks(size, |comm| on_one_rank(&comm, &Numbers::new()));
        let (results, counts): (Vec<Results>, Vec<_>) = ranks.into_iter().unzip();
        for at in [0, 1, 2, 5] {
            assert!(results.iter().all(|rank| rank[at] == results[0][at]), "{size} ranks differ in result {at}");
        }
        assert_eq!(together(&results), want, "{size} ranks");
        assert_eq!(counts, vec![[(1, 4 * M * N), (1, 4 * (M * K + R * K + N * R))]; size]);
    }
    // Without the sums the ranks have other results: these are the ones that need them.
    let alone = on_ranks(2, |comm| on_one_rank(&Unsummed(comm), &Numbers::new()).0);
    let differ: Vec<usize> = (0..6).filter(|&at| together(&alone)[at] != want[at]).collect();
    assert_eq!(differ, [0, 1, 2, 5]);
}

/// A communicator that sums nothing.
struct Unsummed(Threads);

impl Communicator for Unsummed {
    fn rank(&self) -> usize {
        self.0.rank()
    }
    fn size(&self) -> usize {
        self.0.size()
    }
    fn all_reduce(&self, _values: &mut [f32]) -> Result<()> {
        Ok(())
    }
    fn broadcast(&self, bytes: &mut [u8], root: usize) -> Result<()> {
        self.0.broadcast(bytes, root)
    }
    fn barrier(&self) -> Result<()> {
        self.0.barrier()
    }
}

/// The rank that serves an adapter: any function of the name that all ranks agree on.
fn serves(adapter: &str, ranks: usize) -> usize {
    adapter.bytes().fold(7, |sum, byte| (31 * sum + usize::from(byte)) % 1009) % ranks
}

const USERS: [&str; 6] = ["ann", "bob", "cid", "dan", "eve", "flo"];

/// A model with an adapter for each user.
fn model(cpu: &Cpu<f32>) -> Mlp<Cpu<f32>> {
    let rng = &mut Rng::new(2);
    let mut tensor = |rows: usize, cols: usize| Tensor::from_slice(cpu, (rows, cols), &whole(rng, rows * cols, 1)).unwrap();
    let mut model =
        Mlp::from_layers([(K, HIDDEN), (HIDDEN, N)].map(|(k, n)| Linear::from_tensors(tensor(n, k), None).unwrap()).into())
            .unwrap();
    for user in USERS {
        let layers = [("linear1", K, HIDDEN), ("linear2", HIDDEN, N)].map(|(layer, k, n)| {
            let adapter = Adapter::from_tensors(tensor(R, k), tensor(n, R), LoraConfig::new(R, SCALE * R as f32)).unwrap();
            (layer.to_string(), LayerAdapter::Lora(adapter))
        });
        model.insert_adapter(user, layers.into()).unwrap();
    }
    model
}

/// Each rank has the adapters that it serves, in a bank of its own, and computes the rows that use them; rows without an adapter are
/// shared out. Then all have all rows: each adds zeros to those of the others.
#[test]
fn a_bank_is_spread_over_ranks_by_adapter() {
    let rows = [Some("eve"), None, Some("ann"), Some("bob"), Some("eve"), None, Some("flo"), Some("dan"), None];
    let x = whole(&mut Rng::new(3), rows.len() * K, 3);
    let cpu = &cpu::<f32>();
    let want = model(cpu).predict_mixed(cpu, &Tensor::from_slice(cpu, (rows.len(), K), &x).unwrap(), &rows).unwrap();
    for size in [1, 2, 3, 7] {
        let x = x.clone();
        let ranks = on_ranks(size, move |comm| {
            let (cpu, comm) = (&ranks::cpu::<f32>(), Counting::new(&comm));
            let model = model(cpu);
            let mine = |user: &&str| serves(user, size) == comm.rank();
            let mut bank = AdapterBank::new(cpu, &model, USERS.iter().filter(|user| mine(user)).count().max(1), R).unwrap();
            for user in USERS.iter().filter(|user| mine(user)) {
                bank.load(cpu, user, &HostAdapter::of_model(cpu, &model, user).unwrap()).unwrap();
            }
            let rank_of = |row: usize| rows[row].map_or(row % size, |user| serves(user, size));
            let here: Vec<usize> = (0..rows.len()).filter(|&row| rank_of(row) == comm.rank()).collect();
            let users: Vec<Option<&str>> = here.iter().map(|&row| rows[row]).collect();
            let assigned = bank.assign_loaded(cpu, &users, 1).unwrap();
            let numbers: Vec<f32> = here.iter().flat_map(|&row| x[row * K..][..K].to_vec()).collect();
            let mut tape = Tape::new(cpu);
            let input = tape.input(Tensor::from_slice(cpu, (here.len(), K), &numbers).unwrap());
            let y = model.forward_mixed(&mut tape, input, None, bank.mixed(&assigned).unwrap()).unwrap();
            let y = tape.value(y).unwrap().to_vec(cpu).unwrap();
            let mut all = vec![0.0; rows.len() * N];
            for (at, &row) in here.iter().enumerate() {
                all[row * N..][..N].copy_from_slice(&y[at * N..][..N]);
            }
            comm.all_reduce(&mut all).unwrap();
            (all, bank.names().count(), comm.calls.get())
        });
        assert!(ranks.iter().all(|(all, _, calls)| *all == want && *calls == 1), "{size} ranks");
        assert_eq!(ranks.iter().map(|(_, adapters, _)| adapters).sum::<usize>(), USERS.len(), "each adapter is on one rank");
    }
    assert!((0..3).all(|rank| USERS.iter().any(|user| serves(user, 3) == rank)), "more than one rank serves");
}
