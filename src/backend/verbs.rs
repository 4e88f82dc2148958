//! The table of verbs: the method of [`Backend`](super::Backend), and its request.

/// Calls `$macro!` with all verbs.
macro_rules! for_each_verb {
    ($macro:ident) => {
        $macro! {
            lora_forward: LoraForward,
            lora_backward: LoraBackward,
            lora_merge: LoraMerge,
            lora_row_norm: LoraRowNorm,
            magnitude: Magnitude,
            magnitude_backward: MagnitudeBackward,
            linear_forward: LinearForward,
            linear_backward: LinearBackward,
            relu: Relu,
            relu_backward: ReluBackward,
            dropout_forward: DropoutForward,
            add: Add,
            accumulate: Accumulate,
            cross_entropy: CrossEntropy,
            adam: Adam,
        }
    };
}
pub(super) use for_each_verb;
