// One module: every kernel, for the element type that the command line names.
#include "adam.cu"
#include "add.cu"
#include "cross_entropy.cu"
#include "linear.cu"
#include "lora_backward.cu"
#include "lora_forward.cu"
#include "lora_merge.cu"
#include "relu.cu"
#ifdef TENSOR
#include "tensor.cu"
#endif
