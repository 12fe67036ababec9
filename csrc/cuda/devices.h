// Where the tensors of one operator must be.
#pragma once

#include <ATen/core/Tensor.h>

#include <initializer_list>

namespace swin_moe {

// Refuses tensors that are not on the device of `first`; undefined ones are none. what: Of the operator `name`, in words.
inline void check_one_device(const char* name, const char* what, const at::Tensor& first,
                             std::initializer_list<at::Tensor> others) {
  for (const at::Tensor& other : others)
    TORCH_CHECK_VALUE(!other.defined() || other.device() == first.device(), name, ": all of ", what, " must be on ",
                      first.device(), ", got one on ", other.device());
}

}  // namespace swin_moe
