// Columns of a deformable convolution and their gradients: schemas and the CPU kernels. Arguments:
// swin_moe/ops/detection/deform_conv.py. Every map and every offset has one owner, so no result depends on threads.
#include "deform_conv.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

namespace swin_moe {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The tensors of a call in row order. mask: Null = 1.
template <class T>
struct DeformTensors {
  DeformGeometry g;
  const T *x, *offsets, *mask, *grad;

  const T* offsets_of(int64_t image, int64_t group) const {
    return offsets + (image * g.groups + group) * 2 * g.taps() * g.outputs();
  }
  const T* mask_of(int64_t image, int64_t group) const {
    return mask ? mask + (image * g.groups + group) * g.taps() * g.outputs() : nullptr;
  }
};

// Where tap `tap` reads for every output.
template <class T>
void find_places(const DeformGeometry& g, const T* offsets, int tap, std::vector<DeformPlace<T>>& places) {
  for (int64_t n = 0; n < g.outputs(); ++n) places[n] = deform_place(g, offsets, tap, n);
}

template <class T>
void make_columns(const DeformTensors<T>& t, T* columns) {
  const DeformGeometry& g = t.g;
  const int64_t each = g.channels / g.groups;
  at::parallel_for(0, g.batch * g.groups * g.taps(), 1, [&](int64_t begin, int64_t end) {
    std::vector<DeformPlace<T>> places(g.outputs());
    for (int64_t i = begin; i < end; ++i) {
      const int tap = int(i % g.taps());
      const int64_t image = i / g.taps() / g.groups, group = i / g.taps() % g.groups;
      find_places(g, t.offsets_of(image, group), tap, places);
      const T* mask = t.mask ? t.mask_of(image, group) + tap * g.outputs() : nullptr;
      for (int64_t c = group * each; c < (group + 1) * each; ++c) {
        const T* cells = t.x + (image * g.channels + c) * g.area();
        T* to = columns + ((image * g.channels + c) * g.taps() + tap) * g.outputs();
        for (int64_t n = 0; n < g.outputs(); ++n) to[n] = deform_value(places[n], cells) * (mask ? mask[n] : T(1));
      }
    }
  });
}

// The gradient of the map: an owner for every image and group adds tap by tap, output by output.
template <class T>
void spread_columns(const DeformTensors<T>& t, T* grad_x) {
  const DeformGeometry& g = t.g;
  const int64_t each = g.channels / g.groups;
  at::parallel_for(0, g.batch * g.groups, 1, [&](int64_t begin, int64_t end) {
    std::vector<DeformPlace<T>> places(g.outputs());
    for (int64_t i = begin; i < end; ++i) {
      const int64_t image = i / g.groups, group = i % g.groups;
      for (int tap = 0; tap < g.taps(); ++tap) {
        find_places(g, t.offsets_of(image, group), tap, places);
        const T* mask = t.mask ? t.mask_of(image, group) + tap * g.outputs() : nullptr;
        for (int64_t c = group * each; c < (group + 1) * each; ++c) {
          const T* grad = t.grad + ((image * g.channels + c) * g.taps() + tap) * g.outputs();
          T* cells = grad_x + (image * g.channels + c) * g.area();
          for (int64_t n = 0; n < g.outputs(); ++n)
            for (int corner = 0; corner < 4; ++corner)
              if (places[n].inside[corner])
                cells[places[n].cell[corner]] += places[n].weight[corner] * grad[n] * (mask ? mask[n] : T(1));
        }
      }
    }
  });
}

// The gradients of the offsets and of the mask (null = none wanted).
template <class T>
void sum_slopes(const DeformTensors<T>& t, T* grad_offsets, T* grad_mask) {
  const DeformGeometry& g = t.g;
  const int64_t each = g.channels / g.groups;
  at::parallel_for(0, g.batch * g.groups * g.taps(), 1, [&](int64_t begin, int64_t end) {
    std::vector<DeformPlace<T>> places(g.outputs());
    for (int64_t i = begin; i < end; ++i) {  // i: image, group, tap
      const int tap = int(i % g.taps());
      const int64_t image = i / g.taps() / g.groups, group = i / g.taps() % g.groups;
      find_places(g, t.offsets_of(image, group), tap, places);
      const T* mask = t.mask ? t.mask + i * g.outputs() : nullptr;
      T *to_y = grad_offsets + 2 * i * g.outputs(), *to_x = to_y + g.outputs();
      for (int64_t c = group * each; c < (group + 1) * each; ++c) {
        const T* cells = t.x + (image * g.channels + c) * g.area();
        const T* grad = t.grad + ((image * g.channels + c) * g.taps() + tap) * g.outputs();
        for (int64_t n = 0; n < g.outputs(); ++n) {
          T along_y, along_x;
          deform_slope(places[n], cells, along_y, along_x);
          const T given = grad[n] * (mask ? mask[n] : T(1));
          to_y[n] += along_y * given;
          to_x[n] += along_x * given;
          if (mask) grad_mask[i * g.outputs() + n] += deform_value(places[n], cells) * grad[n];
        }
      }
    }
  });
}

Tensor deform_columns_cpu(const Tensor& x_, const Tensor& offsets_, const OptionalTensor& mask_, int64_t kernel_h,
                          int64_t kernel_w, int64_t stride_h, int64_t stride_w, int64_t padding_h, int64_t padding_w,
                          int64_t dilation_h, int64_t dilation_w) {
  const DeformGeometry g =
      check_deform("deform_columns", x_, offsets_, mask_,
                   {kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w});
  const Tensor x = x_.contiguous(), offsets = offsets_.contiguous();
  const Tensor mask = mask_ ? mask_->contiguous() : Tensor();
  Tensor out = at::empty({g.batch, g.channels, g.taps(), g.outputs()}, x.options());
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "deform_columns", [&] {
    const DeformTensors<scalar_t> t{g, x.const_data_ptr<scalar_t>(), offsets.const_data_ptr<scalar_t>(),
                                    mask_ ? mask.const_data_ptr<scalar_t>() : nullptr, nullptr};
    make_columns(t, out.mutable_data_ptr<scalar_t>());
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> deform_columns_backward_cpu(
    const Tensor& grad_, const Tensor& x_, const Tensor& offsets_, const OptionalTensor& mask_, int64_t kernel_h,
    int64_t kernel_w, int64_t stride_h, int64_t stride_w, int64_t padding_h, int64_t padding_w, int64_t dilation_h,
    int64_t dilation_w) {
  constexpr const char* kName = "deform_columns_backward";
  const DeformGeometry g =
      check_deform(kName, x_, offsets_, mask_,
                   {kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w});
  check_deform_gradient(kName, grad_, x_, g);
  const Tensor grad = grad_.contiguous(), x = x_.contiguous(), offsets = offsets_.contiguous();
  const Tensor mask = mask_ ? mask_->contiguous() : at::empty({0}, x.options());
  Tensor grad_x = at::zeros_like(x), grad_offsets = at::zeros_like(offsets), grad_mask = at::zeros_like(mask);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), kName, [&] {
    const DeformTensors<scalar_t> t{g, x.const_data_ptr<scalar_t>(), offsets.const_data_ptr<scalar_t>(),
                                    mask_ ? mask.const_data_ptr<scalar_t>() : nullptr,
                                    grad.const_data_ptr<scalar_t>()};
    spread_columns(t, grad_x.mutable_data_ptr<scalar_t>());
    sum_slopes(t, grad_offsets.mutable_data_ptr<scalar_t>(), grad_mask.mutable_data_ptr<scalar_t>());
  });
  return {grad_x, grad_offsets, grad_mask};
}

}  // namespace
}  // namespace swin_moe

TORCH_LIBRARY_FRAGMENT(swin_moe, m) {
  m.def(
      "deform_columns(Tensor x, Tensor offsets, Tensor? mask, int kernel_h, int kernel_w, int stride_h, int stride_w, "
      "int padding_h, int padding_w, int dilation_h, int dilation_w) -> Tensor");
  m.def(
      "deform_columns_backward(Tensor grad, Tensor x, Tensor offsets, Tensor? mask, int kernel_h, int kernel_w, int "
      "stride_h, int stride_w, int padding_h, int padding_w, int dilation_h, int dilation_w) -> (Tensor, Tensor, "
      "Tensor)");
}

TORCH_LIBRARY_IMPL(swin_moe, CPU, m) {
  m.impl("deform_columns", &swin_moe::deform_columns_cpu);
  m.impl("deform_columns_backward", &swin_moe::deform_columns_backward_cpu);
}
