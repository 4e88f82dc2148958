"""Models of many families, tiny and random, with adapters of the kinds that people make of them."""

import torch
import transformers as t

TOKENS = torch.arange(1, 13)[None]
IMAGE = torch.linspace(-1, 1, 3 * 64).reshape(1, 3, 8, 8)
SOUND = torch.linspace(-1, 1, 8 * 32).reshape(1, 8, 32)
VOCABULARY = dict(vocab_size=96)
SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
GROUPED = dict(num_key_value_heads=2, intermediate_size=48)
BART = dict(d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=48, decoder_ffn_dim=48)
BART |= dict(encoder_attention_heads=4, decoder_attention_heads=4, pad_token_id=0, bos_token_id=1, eos_token_id=2)
VISION = SIZES | dict(intermediate_size=48, image_size=8, patch_size=4)
GPT2 = dict(n_embd=32, n_layer=2, n_head=4)
ENDS = dict(bos_token_id=0, eos_token_id=0)


def text(model):
    out = model(TOKENS)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def text_to_text(model):
    return model(input_ids=TOKENS, decoder_input_ids=TOKENS).logits


def picture(model):
    return model(pixel_values=IMAGE).logits


def picture_and_text(model):
    return model(input_ids=TOKENS, pixel_values=IMAGE).logits_per_image


def speech(model):
    return model(input_features=SOUND, decoder_input_ids=TOKENS).logits


def waveform(model):
    return model(torch.linspace(-1, 1, 400)[None]).logits


def clip():
    words = VOCABULARY | SIZES | dict(intermediate_size=48, max_position_embeddings=32, eos_token_id=2)
    return t.CLIPModel(t.CLIPConfig(text_config=words, vision_config=VISION, projection_dim=16))


def llava():
    language = t.LlamaConfig(**VOCABULARY, **SIZES, **GROUPED)
    vision = t.CLIPVisionConfig(**VISION)
    return t.LlavaForConditionalGeneration(t.LlavaConfig(vision_config=vision, text_config=language, image_token_index=95))


# class, config class, usual settings, forward
FAMILIES = {
    "llama": (t.LlamaForCausalLM, t.LlamaConfig, VOCABULARY | SIZES | dict(intermediate_size=32), text),
    "qwen2": (t.Qwen2ForCausalLM, t.Qwen2Config, VOCABULARY | SIZES | GROUPED, text),
    "gemma": (t.GemmaForCausalLM, t.GemmaConfig, VOCABULARY | SIZES | GROUPED | dict(head_dim=8), text),
    "gemma3": (t.Gemma3ForCausalLM, t.Gemma3TextConfig, VOCABULARY | SIZES | GROUPED | dict(head_dim=8), text),
    "gpt2": (t.GPT2LMHeadModel, t.GPT2Config, VOCABULARY | GPT2 | ENDS | dict(n_positions=16), text),
    "neox": (t.GPTNeoXForCausalLM, t.GPTNeoXConfig, VOCABULARY | SIZES | dict(intermediate_size=48), text),
    "opt": (t.OPTForCausalLM, t.OPTConfig, VOCABULARY | SIZES | dict(ffn_dim=32, word_embed_proj_dim=32), text),
    "bloom": (t.BloomForCausalLM, t.BloomConfig, VOCABULARY | dict(hidden_size=32, n_layer=2, n_head=4), text),
    "falcon": (t.FalconForCausalLM, t.FalconConfig, VOCABULARY | SIZES, text),
    "phi": (t.PhiForCausalLM, t.PhiConfig, VOCABULARY | SIZES | dict(intermediate_size=48), text),
    "gptj": (t.GPTJForCausalLM, t.GPTJConfig, VOCABULARY | GPT2 | dict(rotary_dim=4, n_positions=32), text),
    "mamba": (t.MambaForCausalLM, t.MambaConfig, VOCABULARY | dict(hidden_size=32, num_hidden_layers=2, state_size=4), text),
    "mixtral": (t.MixtralForCausalLM, t.MixtralConfig, VOCABULARY | SIZES | GROUPED | dict(num_local_experts=3), text),
    "qwen3moe": (
        t.Qwen3MoeForCausalLM,
        t.Qwen3MoeConfig,
        VOCABULARY | SIZES | GROUPED | dict(moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2, head_dim=8),
        text,
    ),
    "gpt-oss": (
        t.GptOssForCausalLM,
        t.GptOssConfig,
        VOCABULARY | SIZES | GROUPED | dict(num_local_experts=4, num_experts_per_tok=2, head_dim=8),
        text,
    ),
    "bert": (t.BertModel, t.BertConfig, VOCABULARY | SIZES | dict(intermediate_size=48), text),
    "bert-mlm": (t.BertForMaskedLM, t.BertConfig, VOCABULARY | SIZES | dict(intermediate_size=48), text),
    "bert-classes": (t.BertForSequenceClassification, t.BertConfig, VOCABULARY | SIZES | dict(intermediate_size=48), text),
    "roberta-mlm": (t.RobertaForMaskedLM, t.RobertaConfig, VOCABULARY | SIZES | dict(intermediate_size=48), text),
    "deberta": (t.DebertaV2ForSequenceClassification, t.DebertaV2Config, VOCABULARY | SIZES | dict(intermediate_size=48), text),
    "distilbert": (
        t.DistilBertForMaskedLM,
        t.DistilBertConfig,
        VOCABULARY | dict(dim=32, n_layers=2, n_heads=4, hidden_dim=48),
        text,
    ),
    "t5": (
        t.T5ForConditionalGeneration,
        t.T5Config,
        VOCABULARY | dict(d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4, decoder_start_token_id=0),
        text_to_text,
    ),
    "bart": (
        t.BartForConditionalGeneration,
        t.BartConfig,
        VOCABULARY | BART | dict(max_position_embeddings=64, decoder_start_token_id=2, forced_eos_token_id=None),
        text_to_text,
    ),
    "whisper": (
        t.WhisperForConditionalGeneration,
        t.WhisperConfig,
        VOCABULARY
        | BART
        | dict(num_mel_bins=8, max_source_positions=16, max_target_positions=32, decoder_start_token_id=1),
        speech,
    ),
    "vit": (t.ViTForImageClassification, t.ViTConfig, VISION | dict(num_labels=3), picture),
    "wav2vec2": (
        t.Wav2Vec2ForCTC,
        t.Wav2Vec2Config,
        SIZES
        | dict(vocab_size=20, intermediate_size=48, num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=4)
        | dict(conv_dim=(16, 16), conv_stride=(2, 2), conv_kernel=(3, 3), num_feat_extract_layers=2),
        waveform,
    ),
}
OTHERS = {"clip": (clip, picture_and_text), "llava": (llava, text)}


def make(family, **settings):
    """A model with random weights, biases and norms, and its forward."""
    if family in OTHERS:
        build, forward = OTHERS[family]
        model = build()
    else:
        model_class, config_class, usual, forward = FAMILIES[family]
        model = model_class(config_class(**usual | settings))
    with torch.no_grad():
        for value in model.parameters():
            if value.ndim < 2:
                value.add_(torch.randn_like(value) * 0.05)
    return model.eval(), forward
