//! Tokenizer and chat template of a model.
