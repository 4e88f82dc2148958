//! Any bytes are an adapter, something else that is named, or an error; an adapter that was read is written, whole or not at all.
#![no_main]

use libfuzzer_sys::fuzz_target;
use lowrank::adapter::formats::{Hints, Modules, by_first_bytes, by_tensors, outline, recognise};

fuzz_target!(|bytes: &[u8]| {
    let _ = (by_first_bytes(bytes), outline(bytes).map(|tensors| by_tensors(&tensors)));
    let folder = std::env::temp_dir().join(format!("lowrank-fuzz-formats-{}", std::process::id()));
    let (path, out) = (folder.join("adapter.safetensors"), folder.join("out"));
    std::fs::create_dir_all(&folder).expect("a folder for temporary files");
    std::fs::write(&path, bytes).expect("a file in it");
    let _ = recognise(&path);
    for hints in [Hints::default(), Hints { alpha: Some(1.0), ..Hints::default() }] {
        if let Ok(modules) = Modules::read(&path, &hints) {
            let _ = (modules.write_peft(&out), modules.write_mlx_lm(&out), modules.write_kohya(&out.join("kohya"), Some("lora_te")));
        }
    }
    std::fs::remove_dir_all(&folder).ok();
});
