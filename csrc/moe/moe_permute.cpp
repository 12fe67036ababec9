// Rows of tokens for experts and back: the schemas. CUDA kernels are in cuda/moe/moe_permute.cu; elsewhere the Python
// operators of swin_moe/ops/moe/moe_permute.py serve, which say what each argument means.
#include <torch/library.h>

TORCH_LIBRARY_FRAGMENT(swin_moe, m) {
  m.def(
      "moe_permute(Tensor x, Tensor pair, int top_k, Tensor? gate, Tensor? vacant, ScalarType? dtype=None) -> Tensor");
  m.def("moe_unpermute(Tensor rows, Tensor position, Tensor? keep, Tensor? gate) -> Tensor");
  m.def("moe_gate_gradient(Tensor rows, Tensor grad_out, Tensor position, Tensor? keep) -> Tensor");
}
