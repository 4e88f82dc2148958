//! Models of the llama family in GGUF files.
