// One module: every kernel, for the element type that the command line names.
#include "accumulate.cu"
#include "adam.cu"
#include "add.cu"
#include "cross_entropy.cu"
#include "dropout.cu"
#include "linear.cu"
#include "lora_backward.cu"
#include "lora_forward.cu"
#include "lora_merge.cu"
#include "lora_row_norm.cu"
#include "magnitude.cu"
#include "relu.cu"
#ifdef TENSOR
#include "tensor.cu"
#endif
