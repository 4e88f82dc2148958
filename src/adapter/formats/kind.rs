//! The kinds of files and folders in which adapters and models are stored.

use std::borrow::Cow;
use std::fmt;
use std::path::Path;

/// The kind of a file or a folder.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Kind {
    /// A model: tensors in safetensors files.
    Checkpoint,
    /// An adapter with PEFT's names.
    Peft,
    /// `lora_unet_….lora_down.weight`, `.lora_up.weight`, `.alpha`.
    Kohya,
    /// `unet.….lora.down.weight` or `unet.….lora_A.weight`: adapters for the models of a pipeline in one file.
    Diffusers,
    /// LoHa, LoKr and other updates that are not a product of two factors.
    LyCoris,
    /// `….lora_a` stored in × r, `….lora_b` r × out.
    MlxLm,
    /// `….lora_A` and `….lora_B`.
    LoraLib,
    /// `layers.0.attn.q_proj.lora_a.weight`.
    Torchtune,
    /// `….a0.weight` and `….b0.weight`: numbers instead of names.
    CandleLora,
    /// A LoRA of llama.cpp.
    GgufLora,
    /// A model of llama.cpp.
    GgufModel,
    /// A file of llama.cpp in the format before GGUF.
    Ggml,
    /// A pickle, written by `torch.save`.
    Pickle,
    /// A Git LFS pointer: a few lines of text instead of the file itself.
    LfsPointer,
    /// HTML, such as an error page of a server.
    WebPage,
    /// Another known format, with its description.
    Other(&'static str),
    /// A model with quantised weights, and the name of the method.
    Quantised(&'static str),
    /// Tensors without elements, as a model in DeepSpeed ZeRO-3 is saved if it is not gathered.
    EmptyTensors,
    /// A model that was saved with an adapter in its layers.
    AdapterInside,
    /// A diffusers pipeline, with models in these sub-folders.
    Pipeline(Vec<String>),
    /// A folder of adapters in these sub-folders.
    NamedAdapters(Vec<String>),
}

impl Kind {
    /// True if `convert` can read it as an adapter.
    pub fn is_adapter(&self) -> bool {
        use Kind::*;
        matches!(self, Peft | Kohya | Diffusers | MlxLm | LoraLib | Torchtune | CandleLora | GgufLora)
    }

    /// True for a safetensors file, or a folder of them.
    pub fn is_safetensors(&self) -> bool {
        use Kind::*;
        self.is_adapter() && *self != GgufLora
            || matches!(self, Checkpoint | LyCoris | Quantised(_) | EmptyTensors | AdapterInside)
    }

    /// Advice for a caller who gave a file or folder of this kind where a PEFT adapter or a plain model is needed.
    pub fn advice(&self, path: &Path) -> String {
        let at = path.display();
        let convert = |more: &str| format!("`lowrank convert {at} --to peft{more} --out DIR` makes a PEFT folder of it");
        match self {
            Kind::Checkpoint | Kind::Peft => String::new(),
            Kind::MlxLm | Kind::Diffusers => convert(""),
            Kind::Kohya | Kind::GgufLora => convert(" --base MODEL"),
            Kind::LoraLib => convert(" --alpha LORA_ALPHA"),
            Kind::Torchtune => convert(" --base MODEL --alpha LORA_ALPHA"),
            Kind::CandleLora => convert(" --alpha LORA_ALPHA --map 0=MODULE"),
            Kind::LyCoris => "its updates are not products B·A; only LoRA is read".into(),
            Kind::GgufModel => "models are read as safetensors; use the one that it was made from".into(),
            Kind::Ggml => "this format is no longer used; use the adapter that it was made from".into(),
            Kind::Pickle => format!("pickles can run code and are not read; {}", unpickle(path)),
            Kind::LfsPointer => "the file itself was not downloaded; `git lfs pull` fetches it".into(),
            Kind::WebPage => {
                "the download returned a web page instead of the file; download it again, logged in if necessary".into()
            }
            Kind::Other(_) => "models and adapters are read as safetensors".into(),
            Kind::Quantised(_) => "use the model in f32, f16 or bf16 that it was made from, or dequantise it first".into(),
            Kind::EmptyTensors => "the parameters were not gathered when it was saved; save it again with \
                `stage3_gather_16bit_weights_on_model_save`, or make it from the checkpoint with zero_to_fp32.py"
                .into(),
            Kind::AdapterInside => "save only the adapter with PEFT's `save_pretrained`, or the merged model with \
                `merge_and_unload()`"
                .into(),
            Kind::Pipeline(parts) => format!("name the folder of one model: {}", inside(path, parts)),
            Kind::NamedAdapters(names) => format!("name one of them: {}", inside(path, names)),
        }
    }
}

/// The end of a sentence that begins with `is`.
impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what: Cow<'_, str> = match self {
            Kind::Checkpoint => "a model".into(),
            Kind::Peft => "a PEFT adapter".into(),
            Kind::Kohya => "a LoRA in kohya's names, not a PEFT adapter".into(),
            Kind::Diffusers => "a LoRA in diffusers' names, not a PEFT adapter".into(),
            Kind::LyCoris => "an adapter of LyCORIS (LoHa, LoKr, OFT or the like)".into(),
            Kind::MlxLm => "an adapter of mlx-lm, not a PEFT adapter".into(),
            Kind::LoraLib => "an adapter in loralib's names, not a PEFT adapter".into(),
            Kind::Torchtune => "an adapter in torchtune's names, not a PEFT adapter".into(),
            Kind::CandleLora => "an adapter of candle-lora, not a PEFT adapter".into(),
            Kind::GgufLora => "a LoRA of llama.cpp (GGUF), not a PEFT adapter".into(),
            Kind::GgufModel => "a GGUF file, a model of llama.cpp".into(),
            Kind::Ggml => "a GGML file, llama.cpp's format before GGUF".into(),
            Kind::Pickle => "a pickle, as `torch.save` writes it".into(),
            Kind::LfsPointer => "a Git LFS pointer".into(),
            Kind::WebPage => "an HTML page".into(),
            Kind::Other(what) => (*what).into(),
            Kind::Quantised(how) => format!("a quantised model ({how})").into(),
            Kind::EmptyTensors => "full of empty tensors, as DeepSpeed ZeRO-3 leaves them".into(),
            Kind::AdapterInside => "a model with an adapter inside (`….lora_A…` beside `….base_layer.weight`)".into(),
            Kind::Pipeline(_) => "a diffusers pipeline, which holds several models".into(),
            Kind::NamedAdapters(_) => "a folder of adapters in sub-folders".into(),
        };
        f.write_str(&what)
    }
}

fn inside(path: &Path, names: &[String]) -> String {
    names.iter().map(|name| path.join(name).display().to_string()).collect::<Vec<_>>().join(", ")
}

/// A command that converts a pickle to a safetensors file.
fn unpickle(path: &Path) -> String {
    let (from, to) = (path.display(), path.with_extension("safetensors"));
    format!(
        "`python -c \"import torch, safetensors.torch as s; s.save_file({{k: v.contiguous().clone() for k, v in \
         torch.load('{from}', map_location='cpu', weights_only=True).items()}}, '{}', metadata={{'format': 'pt'}})\"` \
         makes safetensors of it",
        to.display()
    )
}
