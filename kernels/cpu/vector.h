// Sixteen floats at a time, by the compiler's vector extension: one source for AVX-512, AVX2 and NEON.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace blockyard {

constexpr int kLanes = 16;
typedef float Vec __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t IntVec __attribute__((vector_size(64), aligned(4), may_alias));

inline Vec load(const float* p) { return *reinterpret_cast<const Vec*>(p); }
inline void store(float* p, Vec v) { *reinterpret_cast<Vec*>(p) = v; }
inline Vec splat(float x) { return x - Vec{}; }

inline float sum(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += v[i];
  return total;
#endif
}

inline float max(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#else
  float best = v[0];
  for (int i = 1; i < kLanes; ++i) best = v[i] > best ? v[i] : best;
  return best;
#endif
}

inline Vec max(Vec a, Vec b) { return a > b ? a : b; }

// e^x to about one unit in the last place for x <= 0 (Cephes' polynomial); exactly 0 below -87.
inline Vec exp_nonpositive(Vec x) {
  const Vec lowest = splat(-87.0f);
  const IntVec underflow = x < lowest;
  x = max(x, lowest);
  const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec shifted = x * 1.44269504088896341f + magic;
  const Vec n = shifted - magic;
  const Vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  IntVec bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  IntVec power = (bits - 0x4B400000 + 127) << 23;
  Vec scale;
  std::memcpy(&scale, &power, sizeof scale);
  return underflow ? Vec{} : p * scale;
}

// Copy n values to floats; the tail up to `padded` becomes 0.
template <typename T>
inline void to_float(const T* from, float* to, int n, int padded) {
  for (int i = 0; i < n; ++i) to[i] = static_cast<float>(from[i]);
  for (int i = n; i < padded; ++i) to[i] = 0.0f;
}

// Where the rows of B are: at a fixed distance from each other, or at any addresses (a paged cache).
struct StridedRows {
  const float* first;
  int64_t stride;
  const float* operator()(int64_t k) const { return first + k * stride; }
};
struct ScatteredRows {
  const float* const* rows;
  const float* operator()(int64_t k) const { return rows[k]; }
};

// C[M][16 * N] (+)= A[M][depth] * B[depth][16 * N], accumulated in registers. Linear layers, attention
// scores and weighted values all use this product.
template <int M, int N, typename Rows>
inline void multiply(const float* a, int64_t a_stride, Rows b, int64_t depth, float* c, int64_t c_stride,
                     bool accumulate) {
  Vec sums[M][N];
  for (int i = 0; i < M; ++i)
    for (int j = 0; j < N; ++j) sums[i][j] = accumulate ? load(c + i * c_stride + j * kLanes) : Vec{};
  for (int64_t k = 0; k < depth; ++k) {
    const float* row = b(k);
    Vec values[N];
    for (int j = 0; j < N; ++j) values[j] = load(row + j * kLanes);
    for (int i = 0; i < M; ++i) {
      const Vec factor = splat(a[i * a_stride + k]);
      for (int j = 0; j < N; ++j) sums[i][j] += factor * values[j];
    }
  }
  for (int i = 0; i < M; ++i)
    for (int j = 0; j < N; ++j) store(c + i * c_stride + j * kLanes, sums[i][j]);
}

// `multiply` for m rows known only at run time, 1 <= m <= Max.
template <int N, int Max, typename Rows>
inline void multiply_rows(int m, const float* a, int64_t a_stride, Rows b, int64_t depth, float* c,
                          int64_t c_stride, bool accumulate) {
  if constexpr (Max > 1) {
    if (m < Max) return multiply_rows<N, Max - 1>(m, a, a_stride, b, depth, c, c_stride, accumulate);
  }
  multiply<Max, N>(a, a_stride, b, depth, c, c_stride, accumulate);
}

}  // namespace blockyard
