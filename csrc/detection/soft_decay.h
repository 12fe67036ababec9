// How much score a box keeps beside a better one (arXiv:1704.04503): shared by the CPU and the CUDA kernels.
#pragma once

#include <cmath>

#include "rounded.h"

namespace swin_moe {

template <class T>
struct SoftDecay {
  T threshold, sigma, min_score;
  bool gaussian;

  SWIN_MOE_BOTH_SIDES T factor(T overlap) const {
    if (gaussian) return std::exp(-(overlap * overlap) / sigma);
    return overlap > threshold ? T(1) - overlap : T(1);
  }
};

}  // namespace swin_moe
