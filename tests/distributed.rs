//! Training on several ranks, which are threads here: the gradients of one process, equal bits on all ranks, faults that are named.

#[path = "support/ranks.rs"]
mod ranks;

use std::thread;

use lowrank::autograd::{Gradients, Tape};
use lowrank::distributed::{
    BatchShare, Communicator, Sampler, SamplerPosition, SingleProcess, broadcast_file, broadcast_params, check_replicas, shard,
};
use lowrank::nn::{Adam, Adaptable, DEFAULT, LoraConfig, Mlp, Targets};
use lowrank::op::WeightGrad;
use lowrank::random::Rng;
use lowrank::{Backend, Error, Result, Tensor, bf16};
use ranks::{
    Change, Counting, SIZES, STEP_BYTES, apart, bits, cpu, exact_step, gradients, losses_apart, model, on_ranks, rounding,
    sample, step, trained, trained_with,
};

/// The gradients of all trainable parameters, in the order of the model.
fn host<B: Backend>(backend: &B, model: &mut Mlp<B>, gradients: &Gradients<B>) -> Vec<Vec<f32>> {
    let params = model.params_mut().filter(|param| param.trainable);
    let dense = |gradient: WeightGrad<'_, B>| match gradient {
        WeightGrad::Dense(gradient) => gradient.to_vec(backend).unwrap(),
        WeightGrad::Factored { .. } => panic!("an adapter's gradient is a matrix"),
    };
    params.map(|param| gradients.get(param).map(dense).unwrap_or_default()).collect()
}

#[test]
fn the_mean_over_ranks_is_the_gradient_of_the_whole_batch() {
    let batch: Vec<usize> = (0..7).collect();
    let backend = &cpu::<f32>();
    let mut whole = model(backend, 3);
    let (wanted, want) = gradients(backend, &whole, &batch);
    let wanted = host(backend, &mut whole, &wanted);
    for size in [1, 2, 3, 4, 7, 9] {
        let batch = batch.clone();
        let got = on_ranks(size, move |comm| {
            let backend = &cpu::<f32>();
            let mut model = model(backend, 3);
            let mine = &batch[shard(batch.len(), comm.rank(), size)];
            let (mut gradients, share) = gradients(backend, &model, mine);
            let whole = gradients.all_reduce_mean(backend, model.params_mut(), share, &comm).unwrap();
            (host(backend, &mut model, &gradients), whole)
        });
        for (rank, (gradients, mean)) in got.iter().enumerate() {
            assert_eq!((mean.rows, gradients), (want.rows, &got[0].0), "rank {rank} of {size}");
            assert_eq!(mean.loss.to_bits(), got[0].1.loss.to_bits());
            assert!((mean.loss - want.loss).abs() < 1e-5, "{size} ranks: {} and {}", mean.loss, want.loss);
            for (got, want) in gradients.iter().zip(&wanted) {
                let largest = want.iter().fold(0f32, |largest, x| largest.max(x.abs()));
                let apart = got.iter().zip(want).fold(0f32, |apart, (a, b)| apart.max((a - b).abs()));
                assert!(
                    got.len() == want.len() && largest > 0.0 && apart <= 1e-5 * largest,
                    "{size} ranks: {apart} of {largest}"
                );
            }
        }
    }
}

/// Whole numbers: `rows·g` and their sums are exact, so the mean is, for a number of rows that is a power of two.
#[test]
fn the_mean_is_exact_on_whole_numbers_and_weighs_ranks_by_their_rows() {
    let rows = [3, 0, 1, 4];
    let means = on_ranks(4, move |comm| {
        let backend = &cpu::<f32>();
        let mut model = model(backend, 3);
        // The gradient of `x·Aᵀ` in A: the seed at 1, so that each row of dA is the sum of the rows of x.
        let rank = comm.rank();
        let adapter = model.layer("linear1").unwrap().adapter(DEFAULT).unwrap();
        let mut tape = Tape::new(backend);
        let x = tape.input(Tensor::from_slice(backend, (1, SIZES[0]), &[8.0 * (rank + 1) as f32; SIZES[0]]).unwrap());
        let y = tape.linear(x, adapter.a(), None).unwrap();
        tape.seed(y, Tensor::from_slice(backend, (1, 2), &[1.0, -3.0]).unwrap()).unwrap();
        let mut gradients = tape.backward().unwrap();
        let share = BatchShare { rows: rows[rank], loss: [2.0, f32::NAN, 4.0, 6.0][rank] };
        let whole = gradients.all_reduce_mean(backend, model.params_mut(), share, &comm).unwrap();
        (host(backend, &mut model, &gradients), whole)
    });
    let mean = (8.0 * 3.0 + 24.0 + 4.0 * 32.0) / 8.0;
    for (gradients, whole) in means {
        assert_eq!(whole, BatchShare { rows: 8, loss: (3.0 * 2.0 + 4.0 + 4.0 * 6.0) / 8.0 });
        assert_eq!(gradients[0], [[mean; SIZES[0]], [-3.0 * mean; SIZES[0]]].concat());
        assert!(gradients[1..].iter().all(Vec::is_empty), "a parameter that no rank used has no gradient");
    }
}

#[test]
fn all_ranks_keep_the_same_bits_and_learn_what_one_process_learns() {
    for steps in [1, 6, 20] {
        let (one, (adapters, losses)) = (trained::<f32>(&SingleProcess, steps), rounding(steps));
        for size in [2, 3, 4] {
            let ranks = on_ranks(size, move |comm| trained::<f32>(&comm, steps));
            assert!(ranks.iter().all(|rank| *rank == ranks[0]), "{size} ranks");
            let got = (apart(&ranks[0].0, &one.0), losses_apart(&ranks[0].1, &one.1));
            assert!(got.0 <= adapters && got.1 <= losses, "{size} ranks, {steps} steps: {got:?} of {adapters}, {losses}");
            let far = ranks[0].0.iter().zip(&one.0).map(|(&a, &b)| (f32::from_bits(a) - f32::from_bits(b)).abs());
            assert!(far.fold(0f32, f32::max) < 1e-3, "{size} ranks, {steps} steps");
            let near = |(a, b): (&(f32, f64), &(f32, f64))| (a.0 - b.0).abs() < 1e-4 && (a.1 - b.1).abs() < 1e-3;
            assert!(ranks[0].1.iter().zip(&one.1).all(near), "{size} ranks, {steps} steps");
        }
        // A rank that computes the share of another is far outside of the bound.
        let wrong = on_ranks(2, move |comm| trained_with::<f32>(&comm, steps, Change::WrongShare)).remove(0);
        assert!(apart(&wrong.0, &one.0) > 10.0 * adapters && losses_apart(&wrong.1, &one.1) > 10.0 * losses, "{steps} steps");
    }
    let losses = trained::<f32>(&SingleProcess, 20).1;
    assert!(losses[19].0 < losses[0].0);
    let ranks = on_ranks(3, |comm| trained::<bf16>(&comm, 20));
    assert!(ranks.iter().all(|rank| *rank == ranks[0]), "bf16");
}

#[test]
fn a_step_on_whole_numbers_gives_the_bits_of_one_process() {
    let one = exact_step(&SingleProcess, Change::Nothing);
    for size in [2, 4, 8] {
        let ranks = on_ranks(size, |comm| exact_step(&comm, Change::Nothing));
        assert!(ranks.iter().all(|rank| *rank == one), "{size} ranks");
    }
    assert!(on_ranks(2, |comm| exact_step(&comm, Change::WrongShare))[0] != one);
}

/// Sums are made in the order of the ranks, whoever comes last.
#[test]
fn the_bits_do_not_depend_on_which_rank_is_slow() {
    let run = |slow: usize| {
        on_ranks(3, move |comm| {
            let mut values: Vec<f32> = (0..50).map(|i| sample::<f32>(i).0[comm.rank()]).collect();
            for _ in 0..5 {
                if comm.rank() == slow {
                    thread::sleep(std::time::Duration::from_millis(3));
                }
                comm.all_reduce(&mut values).unwrap();
                values.iter_mut().for_each(|x| *x *= 0.3 + comm.rank() as f32);
            }
            comm.all_reduce(&mut values).unwrap();
            values.iter().map(|x| x.to_bits()).collect::<Vec<_>>()
        })
    };
    let first = run(0);
    assert!(first.iter().all(|rank| *rank == first[0]));
    assert!(run(1) == first && run(2) == first);
}

#[test]
fn a_step_is_one_collective_of_a_known_size() {
    let counts = on_ranks(2, |comm| {
        let (comm, backend) = (Counting::new(&comm), &cpu::<f32>());
        let (mut model, mut adam) = (model(backend, 3), Adam::new(1e-2).unwrap());
        for _ in 0..3 {
            step((backend, &comm), (&mut model, &mut adam), &[0, 1, 2, 3]).unwrap();
        }
        let steps = (comm.calls.replace(0), comm.bytes.get());
        check_replicas(backend, model.params_mut(), &comm).unwrap();
        (steps, comm.calls.get())
    });
    assert_eq!(counts, [((3, 3 * STEP_BYTES), 1); 2]);
}

#[test]
fn accumulated_batches_communicate_once() {
    let sums = on_ranks(2, |comm| {
        let (comm, backend) = (Counting::new(&comm), &cpu::<f32>());
        let mut model = model(backend, 3);
        let first = 4 * comm.rank();
        let (mut sum, mut share) = gradients(backend, &model, &[first, first + 1]);
        let (more, other) = gradients(backend, &model, &[first + 2, first + 3]);
        sum.add(backend, more).unwrap();
        sum.scale(backend, 0.5).unwrap();
        share = BatchShare { rows: share.rows + other.rows, loss: 0.5 * (share.loss + other.loss) };
        let whole = sum.all_reduce_mean(backend, model.params_mut(), share, &comm).unwrap();
        (host(backend, &mut model, &sum), whole, comm.calls.get())
    });
    let backend = &cpu::<f32>();
    let mut model = model(backend, 3);
    let (wanted, want) = gradients(backend, &model, &[0, 1, 2, 3, 4, 5, 6, 7]);
    let wanted = host(backend, &mut model, &wanted).concat();
    let (got, whole, calls) = &sums[0];
    assert_eq!((*calls, whole.rows), (1, 8));
    assert!((whole.loss - want.loss).abs() < 1e-5);
    assert!(got.concat().iter().zip(&wanted).all(|(a, b)| (a - b).abs() < 1e-5));
}

#[test]
fn a_rank_that_drifts_is_named() {
    let errors = on_ranks(3, |comm| {
        let backend = &cpu::<f32>();
        let (mut model, mut adam) = (model(backend, 3), Adam::new(1e-2).unwrap());
        for step_number in 0..4 {
            step((backend, &comm), (&mut model, &mut adam), &[0, 1, 2, 3]).unwrap();
            check_replicas(backend, model.params_mut(), &comm).unwrap();
            if step_number == 3 && comm.rank() == 2 {
                let param = model.params_mut().filter(|param| param.trainable).last().unwrap();
                let mut host = param.tensor().to_vec(backend).unwrap();
                host[3] = f32::from_bits(host[3].to_bits() ^ 1); // the last bit of one number
                param.copy_from_slice(backend, &host).unwrap();
            }
        }
        check_replicas(backend, model.params_mut(), &comm).unwrap_err().to_string()
    });
    assert_eq!(errors, vec!["cannot go on training: rank 2 has other parameters than rank 0"; 3]);

    // A frozen weight counts too, and two ranks of five are in the minority.
    let errors = on_ranks(5, |comm| {
        let backend = &cpu::<f32>();
        let mut model = model(backend, if [0, 3].contains(&comm.rank()) { 4 } else { 3 });
        check_replicas(backend, model.params_mut(), &comm).unwrap_err().to_string()
    });
    assert_eq!(errors, vec!["cannot go on training: ranks 0, 3 have other parameters than rank 1"; 5]);
}

#[test]
fn replicas_begin_with_the_parameters_of_the_root() {
    for root in 0..3 {
        let all = on_ranks(3, move |comm| {
            let backend = &cpu::<bf16>();
            let mut model = model(backend, comm.rank() as u64);
            broadcast_params(backend, model.params_mut(), root, &comm).unwrap();
            check_replicas(backend, model.params_mut(), &comm).unwrap();
            bits(backend, &model)
        });
        let backend = &cpu::<bf16>();
        assert!(all.iter().all(|rank| *rank == bits(backend, &model(backend, root as u64))));
    }
    let refused = on_ranks(3, |comm| {
        let backend = &cpu::<f32>();
        let mut model = model(backend, 1);
        let rank = if comm.rank() == 1 { 3 } else { 2 };
        model.add_adapters(backend, Targets::All, &LoraConfig::new(rank, 4.0), &mut Rng::new(0)).unwrap();
        let before = bits(backend, &model);
        let error = broadcast_params(backend, model.params_mut(), 0, &comm).unwrap_err().to_string();
        assert_eq!(bits(backend, &model), before);
        error
    });
    let want = "cannot broadcast: rank 1 has parameters of other shapes than rank 0, or trains others";
    assert_eq!(refused, vec![want; 3]);
}

#[test]
fn what_would_be_wrong_without_a_word_is_refused() {
    let refused = |error: Result<BatchShare>| match error.unwrap_err() {
        Error::Value { name, .. } => name,
        other => panic!("{other}"),
    };
    let names = on_ranks(2, move |comm| {
        let backend = &cpu::<f32>();
        let mut model = model(backend, 3);
        let (mut partly, share) = gradients(backend, &model, &[0, 1]);
        let some = partly.all_reduce_mean(backend, model.params_mut().take(6), share, &comm);
        let (mut many, _) = gradients(backend, &model, &[0]);
        let many = many.all_reduce_mean(backend, model.params_mut(), BatchShare { rows: (1 << 24) + 1, loss: 0.0 }, &comm);
        let none = Gradients::default().all_reduce_mean(backend, model.params_mut(), BatchShare::default(), &comm);
        [refused(some), refused(many), refused(none)]
    });
    assert_eq!(names, [["params", "rows", "rows"]; 2]);
    assert!(SingleProcess.broadcast(&mut [1], 1).is_err());
}

#[test]
fn ranks_that_end_or_disagree_are_named() {
    let ended = on_ranks(3, |comm| if comm.rank() == 1 { None } else { Some(comm.barrier().unwrap_err().to_string()) });
    assert_eq!(ended[0].as_deref(), Some("threads: rank 1 has ended, and rank 0 waits for it"));
    assert_eq!(ended[2].as_deref(), Some("threads: rank 1 has ended, and rank 2 waits for it"));
    let lengths = on_ranks(2, |comm| comm.all_reduce(&mut vec![1.0; 2 + comm.rank()]).unwrap_err().to_string());
    assert!(lengths.iter().all(|error| error.contains("different numbers of elements")), "{lengths:?}");
    let kinds = on_ranks(2, |comm| if comm.rank() == 0 { comm.barrier() } else { comm.broadcast(&mut [0], 0) }.is_err());
    assert_eq!(kinds, [true, true]);
}

#[test]
fn no_sample_is_lost_or_used_twice() {
    for (samples, batch) in [(1, 1), (10, 4), (23, 7), (64, 16), (5, 100)] {
        let mut batches = Vec::new();
        let mut sampler = Sampler::new(samples, batch, 9).unwrap();
        for _ in 0..2 * sampler.batches() {
            batches.push(sampler.next_batch());
        }
        assert_eq!(sampler.position(), SamplerPosition { epoch: 2, batch: 0 });
        for size in 1..9 {
            for epoch in batches.chunks(batches.len() / 2) {
                let shards = epoch.iter().flat_map(|batch| (0..size).map(|rank| &batch[shard(batch.len(), rank, size)]));
                let mut used: Vec<usize> = shards.flatten().copied().collect();
                used.sort_unstable();
                assert!(used.into_iter().eq(0..samples), "{samples} samples, batches of {batch}, {size} ranks");
            }
            let lengths = (0..size).map(|rank| shard(samples, rank, size).len());
            assert!(lengths.clone().max().unwrap() - lengths.min().unwrap() <= 1);
        }
    }
    assert_eq!((shard(5, 3, 3), shard(5, 0, 0), shard(usize::MAX, 1, 2).end), (0..0, 0..0, usize::MAX));
}

#[test]
fn a_sampler_goes_on_where_another_one_was() {
    let mut sampler = Sampler::new(23, 7, 9).unwrap();
    let first: Vec<_> = (0..4).map(|_| sampler.next_batch()).collect();
    let second: Vec<_> = (0..4).map(|_| sampler.next_batch()).collect();
    assert_ne!(first, second, "each epoch has an order of its own");
    let mut again = Sampler::new(23, 7, 9).unwrap();
    again.seek(SamplerPosition { epoch: 1, batch: 2 }).unwrap();
    assert_eq!([again.next_batch(), again.next_batch()], second[2..]);
    assert_eq!(again.position(), SamplerPosition { epoch: 2, batch: 0 });
    assert!(again.seek(SamplerPosition { epoch: 0, batch: 4 }).is_err());
    assert!(Sampler::new(0, 1, 0).is_err() && Sampler::new(1, 0, 0).is_err());
}

#[test]
fn a_file_of_rank_0_reaches_all_ranks_or_none() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state");
    std::fs::write(&path, [7; 1001]).unwrap();
    let read = on_ranks(3, move |comm| broadcast_file(&path, &comm).unwrap());
    assert_eq!(read, vec![vec![7; 1001]; 3]);
    let missing = folder.path().join("missing");
    let errors = on_ranks(3, move |comm| broadcast_file(&missing, &comm).unwrap_err().to_string());
    assert!(errors[1].ends_with("missing: rank 0 could not read it") && !errors[0].contains("rank 0"), "{errors:?}");
}

/// Without the library, NCCL is an error that names it.
#[cfg(feature = "nccl")]
#[test]
fn nccl_without_its_library_is_an_error() {
    match lowrank::distributed::NcclId::new() {
        Ok(id) => println!("NCCL is installed: {id:?}"),
        Err(Error::Unavailable { backend: "nccl", reason }) => assert!(reason.contains("libnccl"), "{reason}"),
        Err(other) => panic!("{other}"),
    }
}
