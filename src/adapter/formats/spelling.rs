//! The names of tensors and modules in each format.
//!
//! | format | A | B | magnitudes | scaling |
//! |---|---|---|---|---|
//! | PEFT | `M.lora_A.weight` r×k | `M.lora_B.weight` n×r | `M.lora_magnitude_vector` | `lora_alpha / r` in the config |
//! | kohya | `P_M.lora_down.weight` r×k | `P_M.lora_up.weight` n×r | `P_M.dora_scale` | `P_M.alpha / r`, 1 without it |
//! | diffusers | `P.M.lora_A.weight`, `….lora.down.weight` | `P.M.lora_B.weight`, `….lora.up.weight` | as PEFT | metadata, `.alpha / r`, or 1 |
//! | mlx-lm | `M.lora_a` k×r | `M.lora_b` r×n | `M.m` | `scale` in the config |
//! | loralib | `M.lora_A` r×k | `M.lora_B` n×r | | not in the file |
//! | torchtune | `T.lora_a.weight` r×k | `T.lora_b.weight` n×r | `T.magnitude` | `lora_alpha / r` in a config, if there |
//! | candle-lora | `P.aN.weight` r×k | `P.bN.weight` n×r | | not in the file |
//! | llama.cpp | `G.weight.lora_a` r×k | `G.weight.lora_b` n×r | | `adapter.lora.alpha / r`, 1 if it is 0 |
//!
//! M is the name of the module in transformers, P the name of a model of a pipeline. kohya writes the dots of M as underscores. T and G
//! are the names in torchtune and GGUF, see [`MODULES`].

use super::kind::Kind;

/// The role of a tensor in its module.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Part {
    A,
    B,
    Magnitude,
    Alpha,
}

/// The endings of the names of a module's tensors, and their layout. For each part, the first ending is the one that is written.
pub(super) struct Spelling {
    ends: &'static [(Part, &'static str)],
    /// Factors are stored k×r and r×n.
    pub(super) transposed: bool,
}

const PEFT: Spelling = Spelling {
    ends: &[(Part::A, ".lora_A.weight"), (Part::B, ".lora_B.weight"), (Part::Magnitude, ".lora_magnitude_vector")],
    transposed: false,
};
const KOHYA: Spelling = Spelling {
    ends: &[
        (Part::A, ".lora_down.weight"),
        (Part::B, ".lora_up.weight"),
        (Part::Magnitude, ".dora_scale"),
        (Part::Alpha, ".alpha"),
    ],
    transposed: false,
};
const DIFFUSERS: Spelling = Spelling {
    ends: &[
        (Part::A, ".lora_A.weight"),
        (Part::B, ".lora_B.weight"),
        (Part::A, ".lora.down.weight"),
        (Part::B, ".lora.up.weight"),
        (Part::A, ".lora_linear_layer.down.weight"),
        (Part::B, ".lora_linear_layer.up.weight"),
        (Part::A, "_lora.down.weight"),
        (Part::B, "_lora.up.weight"),
        (Part::Magnitude, ".lora_magnitude_vector"),
        (Part::Alpha, ".alpha"),
    ],
    transposed: false,
};
const MLX_LM: Spelling =
    Spelling { ends: &[(Part::A, ".lora_a"), (Part::B, ".lora_b"), (Part::Magnitude, ".m")], transposed: true };
const LORALIB: Spelling = Spelling { ends: &[(Part::A, ".lora_A"), (Part::B, ".lora_B")], transposed: false };
const TORCHTUNE: Spelling = Spelling {
    ends: &[(Part::A, ".lora_a.weight"), (Part::B, ".lora_b.weight"), (Part::Magnitude, ".magnitude")],
    transposed: false,
};
const GGUF: Spelling = Spelling { ends: &[(Part::A, ".weight.lora_a"), (Part::B, ".weight.lora_b")], transposed: false };
/// The names of its tensors contain numbers, see [`numbered`].
const CANDLE_LORA: Spelling = Spelling { ends: &[], transposed: false };

impl Spelling {
    /// The spelling of a format; `None` for a kind that is not an adapter.
    pub(super) fn of(kind: &Kind) -> Option<&'static Self> {
        Some(match kind {
            Kind::Peft => &PEFT,
            Kind::Kohya => &KOHYA,
            Kind::Diffusers => &DIFFUSERS,
            Kind::MlxLm => &MLX_LM,
            Kind::LoraLib => &LORALIB,
            Kind::Torchtune => &TORCHTUNE,
            Kind::GgufLora => &GGUF,
            Kind::CandleLora => &CANDLE_LORA,
            _ => return None,
        })
    }

    /// The module of a tensor, and the role of the tensor.
    pub(super) fn part(&self, name: &str) -> Option<(String, Part)> {
        if self.ends.is_empty() {
            return numbered(name);
        }
        self.ends.iter().find_map(|&(part, end)| Some((name.strip_suffix(end)?.to_string(), part)))
    }

    /// The name of a part of a module; `None` if the format has no such part.
    pub(super) fn name(&self, module: &str, part: Part) -> Option<String> {
        self.ends.iter().find(|(there, _)| *there == part).map(|(_, end)| format!("{module}{end}"))
    }
}

/// Parses a name of candle-lora: `lora_llama.a3.weight` is A of the module `lora_llama.3`.
pub(super) fn numbered(name: &str) -> Option<(String, Part)> {
    let name = name.strip_suffix(".weight")?;
    let (above, last) = name.rsplit_once('.').map_or(("", name), |(above, last)| (above, last));
    let (part, number) =
        last.strip_prefix('a').map(|number| (Part::A, number)).or(last.strip_prefix('b').map(|n| (Part::B, n)))?;
    let module = if above.is_empty() { number.to_string() } else { format!("{above}.{number}") };
    (!number.is_empty() && number.bytes().all(|digit| digit.is_ascii_digit())).then_some((module, part))
}

/// The names of the models of a pipeline in diffusers.
const COMPONENTS: [&str; 7] =
    ["unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3", "diffusion_model", "prior"];
/// The prefixes that kohya's scripts write before the names of modules, the longest first.
const PREFIXES: [&str; 6] = ["lora_unet", "lora_te1", "lora_te2", "lora_te3", "lora_te", "lora_prior_unet"];

/// Splits a tensor's name in diffusers into the model of the pipeline and the rest.
pub(super) fn component(name: &str) -> Option<(&'static str, &str)> {
    COMPONENTS.into_iter().find_map(|component| Some((component, name.strip_prefix(component)?.strip_prefix('.')?)))
}

/// Splits a module's name in kohya's spelling into the prefix and the rest.
pub(super) fn prefixed(module: &str) -> Option<(&'static str, &str)> {
    PREFIXES.into_iter().find_map(|prefix| Some((prefix, module.strip_prefix(prefix)?.strip_prefix('_')?)))
}

/// kohya's prefix for a module, if its name shows which model it belongs to.
pub(super) fn prefix_for(module: &str) -> Option<&'static str> {
    const UNET: [&str; 5] = ["down_blocks.", "up_blocks.", "mid_block.", "transformer_blocks.", "single_transformer_blocks."];
    let of_unet = UNET.iter().any(|beginning| module.starts_with(beginning));
    let of_encoder = module.starts_with("text_model.encoder.");
    if of_unet { Some("lora_unet") } else { of_encoder.then_some("lora_te") }
}

/// A column of [`MODULES`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Names {
    Transformers = 0,
    Torchtune = 1,
    Gguf = 2,
}

/// The text before the number of a layer, for each library.
const LAYERS: [&str; 3] = ["model.layers.", "layers.", "blk."];
/// The names of the linear layers of a decoder in each library.
const MODULES: [[&str; 3]; 9] = [
    ["self_attn.q_proj", "attn.q_proj", "attn_q"],
    ["self_attn.k_proj", "attn.k_proj", "attn_k"],
    ["self_attn.v_proj", "attn.v_proj", "attn_v"],
    ["self_attn.o_proj", "attn.output_proj", "attn_output"],
    ["self_attn.qkv_proj", "attn.qkv_proj", "attn_qkv"],
    ["mlp.gate_proj", "mlp.w1", "ffn_gate"],
    ["mlp.up_proj", "mlp.w3", "ffn_up"],
    ["mlp.down_proj", "mlp.w2", "ffn_down"],
    ["lm_head", "output", "output"],
];

/// Translates the name of a module from one library to another; `None` for one that is not in the table.
pub(super) fn renamed(module: &str, from: Names, to: Names) -> Option<String> {
    let other = |name: &str| MODULES.iter().find(|row| row[from as usize] == name).map(|row| row[to as usize]);
    match module.strip_prefix(LAYERS[from as usize]).and_then(|rest| rest.split_once('.')) {
        Some((layer, rest)) if layer.bytes().all(|digit| digit.is_ascii_digit()) => {
            Some(format!("{}{layer}.{}", LAYERS[to as usize], other(rest)?))
        }
        _ => other(module).map(String::from),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn translating_there_and_back_gives_the_name() {
        for [here, ..] in MODULES {
            let module = if here == "lm_head" { here.to_string() } else { format!("model.layers.12.{here}") };
            for to in [Names::Torchtune, Names::Gguf] {
                let there = renamed(&module, Names::Transformers, to).unwrap();
                assert_eq!(renamed(&there, to, Names::Transformers).as_deref(), Some(module.as_str()), "{there}");
            }
        }
        for strange in ["model.layers.x.self_attn.q_proj", "model.layers.0.self_attn.p_proj", "q_proj", ""] {
            assert_eq!(renamed(strange, Names::Transformers, Names::Gguf), None);
        }
    }

    #[test]
    fn parts_are_found_by_the_ends_of_names() {
        assert_eq!(numbered("lora_llama.a10.weight"), Some(("lora_llama.10".into(), Part::A)));
        assert_eq!(numbered("b0.weight"), Some(("0".into(), Part::B)));
        assert_eq!((numbered("x.a.weight"), numbered("x.ab1.weight"), numbered("x.a1")), (None, None, None));
        let spelling = Spelling::of(&Kind::Kohya).unwrap();
        assert_eq!(spelling.part("lora_te_x.dora_scale"), Some(("lora_te_x".into(), Part::Magnitude)));
        assert_eq!(spelling.name("lora_te_x", Part::Alpha).as_deref(), Some("lora_te_x.alpha"));
        assert_eq!(component("text_encoder_2.x.lora_A.weight"), Some(("text_encoder_2", "x.lora_A.weight")));
        assert_eq!((prefixed("lora_te2_x"), prefixed("lora_te_x")), (Some(("lora_te2", "x")), Some(("lora_te", "x"))));
    }
}
