//! Runs tests on every available backend.

/// Makes tests of these checks, `fn(&B)` for any backend `B` of `f32`: on the CPU, on WebGPU, and on CUDA, in the interpreter and on a GPU.
#[macro_export]
macro_rules! on_every_backend {
    ($($check:ident),+ $(,)?) => {
        mod on_cpu {
            $(#[test]
            fn $check() {
                super::$check(&$crate::support::adapters::cpu::<f32>());
            })+
        }

        #[cfg(feature = "webgpu")]
        mod on_webgpu {
            $(#[test]
            fn $check() {
                if let Some(gpu) = $crate::support::devices::webgpu() {
                    super::$check(&gpu);
                }
            })+
        }

        #[cfg(feature = "cuda")]
        mod on_cuda {
            $(#[test]
            fn $check() {
                super::$check(&$crate::support::emulator::Emulator::backend::<f32>());
            })+
        }

        #[cfg(feature = "cuda")]
        mod on_gpu {
            $(#[test]
            fn $check() {
                if let Some(gpu) = $crate::support::emulator::open::<f32>() {
                    super::$check(&gpu);
                }
            })+
        }
    };
}

/// One device for all tests. tests/webgpu.rs reports if there is none, or fails if it is required.
#[cfg(feature = "webgpu")]
pub fn webgpu() -> Option<lowrank::WebGpu<f32>> {
    static GPU: std::sync::OnceLock<Option<lowrank::WebGpu<f32>>> = std::sync::OnceLock::new();
    GPU.get_or_init(|| lowrank::WebGpu::new().ok()).clone()
}
