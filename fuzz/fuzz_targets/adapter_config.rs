//! Any bytes are a config or an error; a config that was read is written and read again as the same.
#![no_main]

use libfuzzer_sys::fuzz_target;
use lowrank::adapter::AdapterConfig;

fuzz_target!(|bytes: &[u8]| {
    let Ok(config) = AdapterConfig::from_json(bytes) else { return };
    let json = config.to_json();
    let again = AdapterConfig::from_json(json.as_bytes()).expect("what was written is read");
    assert_eq!(json, again.to_json());
    for layer in ["linear1", "linear2", "model.layers.0.q_proj"] {
        assert_eq!(config.lora_config(layer), again.lora_config(layer));
    }
});
