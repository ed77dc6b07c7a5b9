// Linear layers over weights packed once into panels of 32 output features.
//
// A panel is [depth][32] floats, so the inner loop reads weights in the order in which it uses them. This
// serves a batch of one row (bound by memory) as well as one of hundreds (bound by the multipliers).
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>

#include "vector.h"

namespace blockyard {
namespace {

constexpr int kPanel = 2 * kLanes;
constexpr int kMaxRows = 12;  // 12 x 2 accumulators leave registers for the operands
constexpr int64_t kBatchTile = 240;  // rows of x that stay in the second-level cache

at::Tensor pack_linear(const at::Tensor& weight) {
  TORCH_CHECK(weight.dim() == 2 && weight.scalar_type() == at::kFloat, "weight must be float32 [N, K]");
  const auto w = weight.contiguous();
  const int64_t n = w.size(0), k = w.size(1), panels = (n + kPanel - 1) / kPanel;
  auto packed = at::zeros({panels, k, kPanel}, w.options());
  const float* from = w.const_data_ptr<float>();
  float* to = packed.mutable_data_ptr<float>();
  at::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p)
      for (int64_t j = 0; j < std::min<int64_t>(kPanel, n - p * kPanel); ++j)
        for (int64_t i = 0; i < k; ++i) to[(p * k + i) * kPanel + j] = from[(p * kPanel + j) * k + i];
  });
  return packed;
}

at::Tensor linear(const at::Tensor& x, const at::Tensor& packed, const std::optional<at::Tensor>& bias,
                  int64_t features) {
  TORCH_CHECK(x.dim() == 2 && x.scalar_type() == at::kFloat && x.stride(1) == 1, "x must be float32 [T, K]");
  const int64_t tokens = x.size(0), k = x.size(1), panels = packed.size(0), stride = x.stride(0);
  TORCH_CHECK(packed.size(1) == k, "x has ", k, " features, the weight ", packed.size(1));
  auto out = at::empty({tokens, features}, x.options());
  if (!tokens) return out;
  const float* a = x.const_data_ptr<float>();
  const float* b = packed.const_data_ptr<float>();
  const float* add = bias ? bias->const_data_ptr<float>() : nullptr;
  float* c = out.mutable_data_ptr<float>();
  at::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
    alignas(64) float tile[kMaxRows * kPanel];
    for (int64_t t0 = 0; t0 < tokens; t0 += kBatchTile) {
      const int64_t t1 = std::min(tokens, t0 + kBatchTile);
      const int64_t tiles = (t1 - t0 + kMaxRows - 1) / kMaxRows;
      for (int64_t p = begin; p < end; ++p) {
        const StridedRows panel{b + p * k * kPanel, kPanel};
        const int64_t column = p * kPanel, width = std::min<int64_t>(kPanel, features - column);
        for (int64_t i = 0; i < tiles; ++i) {  // tiles of nearly equal height: no slow remainder
          const int64_t first = t0 + (t1 - t0) * i / tiles, last = t0 + (t1 - t0) * (i + 1) / tiles;
          const bool direct = width == kPanel;
          float* target = direct ? c + first * features + column : tile;
          const int64_t target_stride = direct ? features : kPanel;
          multiply_rows<2, kMaxRows>(static_cast<int>(last - first), a + first * stride, stride, panel, k,
                                     target, target_stride, false);
          if (direct && !add) continue;
          for (int64_t t = first; t < last; ++t)
            for (int64_t j = 0; j < width; ++j)
              c[t * features + column + j] = target[(t - first) * target_stride + j] + (add ? add[column + j] : 0.0f);
        }
      }
    }
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(blockyard, m) {
  m.def("pack_linear(Tensor weight) -> Tensor");
  m.def("linear(Tensor x, Tensor packed, Tensor? bias, int features) -> Tensor");
}
TORCH_LIBRARY_IMPL(blockyard, CPU, m) {
  m.impl("pack_linear", pack_linear);
  m.impl("linear", linear);
}

}  // namespace blockyard
