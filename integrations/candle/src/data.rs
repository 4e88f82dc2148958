//! Conversations, and batches of them for training.
