// The small operations between the matrix products, each in one pass: norms, SwiGLU, RoPE with the KV write.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "vector.h"

namespace blockyard {
namespace {

constexpr int64_t kGrain = 8192;  // with fewer elements, waking another thread costs more than it saves

template <typename F>
void by_type(const at::Tensor& x, F f) {
  switch (x.scalar_type()) {
    case at::kFloat: return f(0.0f);
    case at::kBFloat16: return f(c10::BFloat16());
    case at::kHalf: return f(c10::Half());
    default: TORCH_CHECK(false, "float32, bfloat16 or float16 expected");
  }
}

int64_t grain(int64_t width) { return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, width)); }

// Rounds to T between the scaling and the weight, as the models' own code does.
template <typename T>
void normalise(const T* x, const T* weight, T* out, int64_t n, double eps) {
  float squares = 0;
  if constexpr (std::is_same_v<T, float>) {
    Vec sums[2] = {};
    int64_t i = 0;
    for (; i + 2 * kLanes <= n; i += 2 * kLanes)
      for (int j = 0; j < 2; ++j) {
        const Vec v = load(x + i + j * kLanes);
        sums[j] += v * v;
      }
    squares = sum(sums[0] + sums[1]);
    for (; i < n; ++i) squares += x[i] * x[i];
  } else {
    for (int64_t i = 0; i < n; ++i) squares += static_cast<float>(x[i]) * static_cast<float>(x[i]);
  }
  const float scale = 1.0f / std::sqrt(squares / n + static_cast<float>(eps));
  for (int64_t i = 0; i < n; ++i)
    out[i] = static_cast<T>(static_cast<T>(static_cast<float>(x[i]) * scale) * weight[i]);
}

at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps) {
  const auto input = x.contiguous();
  auto out = at::empty_like(input);
  TORCH_CHECK(weight.numel() == input.size(-1), "x has ", input.size(-1), " features, the weight ", weight.numel());
  const int64_t n = input.size(-1), rows = n ? input.numel() / n : 0;
  by_type(input, [&](auto zero) {
    using T = decltype(zero);
    const T* from = input.const_data_ptr<T>();
    const T* w = weight.const_data_ptr<T>();
    T* to = out.mutable_data_ptr<T>();
    at::parallel_for(0, rows, grain(n), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) normalise(from + r * n, w, to + r * n, n, eps);
    });
  });
  return out;
}

at::Tensor add_rms_norm(const at::Tensor& x, const at::Tensor& residual, const at::Tensor& weight, double eps) {
  TORCH_CHECK(x.is_contiguous() && residual.is_contiguous() && x.sizes() == residual.sizes(),
              "x and residual must be contiguous and of one shape");
  TORCH_CHECK(weight.numel() == x.size(-1), "x has ", x.size(-1), " features, the weight ", weight.numel());
  auto out = at::empty_like(x);
  const int64_t n = x.size(-1), rows = n ? x.numel() / n : 0;
  by_type(x, [&](auto zero) {
    using T = decltype(zero);
    const T* from = x.const_data_ptr<T>();
    const T* w = weight.const_data_ptr<T>();
    T* sums = residual.mutable_data_ptr<T>();
    T* to = out.mutable_data_ptr<T>();
    at::parallel_for(0, rows, grain(n), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        for (int64_t i = r * n; i < (r + 1) * n; ++i)
          sums[i] = static_cast<T>(static_cast<float>(sums[i]) + static_cast<float>(from[i]));
        normalise(sums + r * n, w, to + r * n, n, eps);
      }
    });
  });
  return out;
}

at::Tensor swiglu(const at::Tensor& gate_up) {
  TORCH_CHECK(gate_up.dim() == 2, "gate_up must be [T, 2 * I]");
  const auto input = gate_up.contiguous();
  const int64_t rows = input.size(0), n = input.size(1) / 2;
  auto out = at::empty({rows, n}, input.options());
  by_type(input, [&](auto zero) {
    using T = decltype(zero);
    const T* from = input.const_data_ptr<T>();
    T* to = out.mutable_data_ptr<T>();
    at::parallel_for(0, rows, grain(n), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const T* gate = from + r * 2 * n;
        const T* up = gate + n;
        int64_t i = 0;
        if constexpr (std::is_same_v<T, float>) {
          for (; i + kLanes <= n; i += kLanes) {
            // silu(g) = g * s(g); with e = exp(-|g|), s(g) is 1 / (1 + e) for g >= 0 and e / (1 + e) below.
            const Vec g = load(gate + i);
            const Vec e = exp_nonpositive(g < Vec{} ? g : -g);
            const Vec numerator = g < Vec{} ? e : splat(1.0f);
            store(to + r * n + i, g * (numerator / (e + 1.0f)) * load(up + i));
          }
        }
        for (; i < n; ++i) {
          const float g = static_cast<float>(gate[i]);
          to[r * n + i] = static_cast<T>(static_cast<T>(g / (1.0f + std::exp(-g))) * up[i]);
        }
      }
    });
  });
  return out;
}

void check_range(const at::Tensor& x, int64_t least, int64_t end, const char* name) {
  const int64_t* values = x.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < x.size(0); ++i)
    TORCH_CHECK(values[i] >= least && values[i] < end, name, "[", i, "] is ", values[i], "; it must be ", least, " to ",
                end - 1);
}

template <typename T>
void rotate(const T* from, T* to, const float* cos, const float* sin, int64_t half) {
  for (int64_t i = 0; i < half; ++i) {
    const float a = static_cast<float>(from[i]), b = static_cast<float>(from[half + i]);
    to[i] = static_cast<T>(a * cos[i] - b * sin[i]);
    to[half + i] = static_cast<T>(b * cos[i] + a * sin[i]);
  }
}

at::Tensor rope_and_write_kv(const at::Tensor& qkv, const at::Tensor& kv, const at::Tensor& slots,
                             const at::Tensor& positions, const at::Tensor& cos, const at::Tensor& sin,
                             int64_t num_heads, const std::optional<at::Tensor>& q_norm,
                             const std::optional<at::Tensor>& k_norm, double eps) {
  TORCH_CHECK(qkv.is_contiguous() && cos.is_contiguous() && sin.is_contiguous() && kv.stride(4) == 1,
              "qkv, cos, sin and KV rows must be contiguous");
  const int64_t tokens = qkv.size(0), kv_heads = kv.size(2), block_tokens = kv.size(3), dim = kv.size(4);
  const int64_t half = dim / 2, width = qkv.size(1);
  TORCH_CHECK(width == (num_heads + 2 * kv_heads) * dim && cos.size(1) == half && sin.sizes() == cos.sizes(),
              "qkv has ", width, " features; ", num_heads, " and 2 x ", kv_heads, " heads of ", dim, " were expected");
  TORCH_CHECK(slots.is_contiguous() && slots.size(0) == tokens && positions.is_contiguous() &&
                  positions.size(0) == tokens,
              "there must be one slot and one position for each of ", tokens, " tokens");
  TORCH_CHECK((!q_norm || q_norm->numel() == dim) && (!k_norm || k_norm->numel() == dim), "heads have ", dim,
              " features, and so must q_norm and k_norm");
  check_range(slots, -1, kv.size(0) * block_tokens, "slots");
  check_range(positions, 0, cos.size(0), "positions");
  auto out = at::empty({tokens, num_heads, dim}, qkv.options());
  const int64_t* slot = slots.const_data_ptr<int64_t>();
  const int64_t* position = positions.const_data_ptr<int64_t>();
  by_type(qkv, [&](auto zero) {
    using T = decltype(zero);
    const T* from = qkv.const_data_ptr<T>();
    T* q_out = out.mutable_data_ptr<T>();
    T* cache = kv.mutable_data_ptr<T>();
    const T* qw = q_norm ? q_norm->const_data_ptr<T>() : nullptr;
    const T* kw = k_norm ? k_norm->const_data_ptr<T>() : nullptr;
    at::parallel_for(0, tokens, grain(width), [&](int64_t begin, int64_t end) {
      std::vector<T> normed(dim);
      for (int64_t t = begin; t < end; ++t) {
        const float* c = cos.const_data_ptr<float>() + position[t] * half;
        const float* s = sin.const_data_ptr<float>() + position[t] * half;
        const T* row = from + t * width;
        for (int64_t h = 0; h < num_heads + kv_heads; ++h) {
          const bool is_q = h < num_heads;
          if (!is_q && slot[t] < 0) break;
          const T* head = row + h * dim;
          if (const T* w = is_q ? qw : kw) {
            normalise(head, w, normed.data(), dim, eps);
            head = normed.data();
          }
          T* to = is_q ? q_out + (t * num_heads + h) * dim
                       : cache + slot[t] / block_tokens * kv.stride(0) + (h - num_heads) * kv.stride(2) +
                             slot[t] % block_tokens * kv.stride(3);
          rotate(head, to, c, s, half);
        }
        if (slot[t] < 0) continue;
        for (int64_t h = 0; h < kv_heads; ++h)
          std::copy_n(row + (num_heads + kv_heads + h) * dim, dim,
                      cache + slot[t] / block_tokens * kv.stride(0) + kv.stride(1) + h * kv.stride(2) +
                          slot[t] % block_tokens * kv.stride(3));
      }
    });
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(blockyard, m) {
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  m.def("add_rms_norm(Tensor x, Tensor(a!) residual, Tensor weight, float eps) -> Tensor");
  m.def("swiglu(Tensor gate_up) -> Tensor");
  m.def(
      "rope_and_write_kv(Tensor qkv, Tensor(a!) kv, Tensor slots, Tensor positions, Tensor cos, Tensor sin, "
      "int num_heads, Tensor? q_norm, Tensor? k_norm, float eps) -> Tensor");
}
TORCH_LIBRARY_IMPL(blockyard, CPU, m) {
  m.impl("rms_norm", rms_norm);
  m.impl("add_rms_norm", add_rms_norm);
  m.impl("swiglu", swiglu);
  m.impl("rope_and_write_kv", rope_and_write_kv);
}

}  // namespace blockyard
