//! The one suite, on every backend, element type and vector unit that this machine has.

mod support;

suite!(cpu_f32, lowrank::Cpu::<f32>::new().unwrap());
suite!(cpu_f16, lowrank::Cpu::<lowrank::f16>::new().unwrap());
suite!(cpu_bf16, lowrank::Cpu::<lowrank::bf16>::new().unwrap());
