// Balance losses and the z-loss: the schemas. The kernels are in cpu/moe/moe_balance.cpp and cuda/moe/moe_balance.cu;
// swin_moe/ops/moe/moe_balance.py says what each argument means, swin_moe/moe/losses.py is the reference.
#include <torch/library.h>

TORCH_LIBRARY_FRAGMENT(swin_moe, m) {
  m.def(
      "moe_balance(Tensor scores, Tensor? threshold, Tensor expert, Tensor? logits, int kind, float noise_std, SymInt "
      "group_size, float weight, float z_weight) -> (Tensor aux, Tensor balance, Tensor sums, Tensor load, Tensor "
      "log_sum)");
  m.def(
      "moe_balance_backward(Tensor grad, Tensor scores, Tensor? threshold, Tensor? logits, Tensor sums, Tensor load, "
      "Tensor log_sum, int kind, float noise_std, SymInt group_size, float weight, float z_weight) -> (Tensor scores, "
      "Tensor threshold, Tensor logits)");
}
