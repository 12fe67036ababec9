// Token-choice routing of one rank's tokens: the schemas. The kernels are in cpu/moe/moe_route.cpp and
// cuda/moe/moe_route.cu; swin_moe/ops/moe/moe_route.py says what each argument means, swin_moe/moe/routing.py is the
// reference.
#include <torch/library.h>

TORCH_LIBRARY_FRAGMENT(swin_moe, m) {
  m.def(
      "moe_route(Tensor clean, Tensor? noisy, Tensor? bias, int top_k, SymInt group_size, SymInt capacity, "
      "SymInt last_capacity, bool sigmoid, bool normalize, bool prioritized, bool probabilities) -> (Tensor scores, "
      "Tensor probabilities, Tensor gate, Tensor threshold, Tensor expert, Tensor slot, Tensor keep, Tensor demand, "
      "Tensor kept, Tensor totals, Tensor entropy)");
  m.def(
      "moe_route_backward(Tensor? grad_scores, Tensor? grad_probabilities, Tensor? grad_gate, Tensor? grad_threshold, "
      "Tensor scores, Tensor? probabilities, Tensor expert, bool sigmoid, bool normalize) -> (Tensor clean, Tensor "
      "noisy)");
}
