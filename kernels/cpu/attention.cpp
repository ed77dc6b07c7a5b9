// Attention over a paged KV cache, which is read block by block without gathering it into one tensor first.
//
// Work is cut into items of (sequence, KV head, tile of queries, range of keys). Threads take the next item
// from a shared counter. An item has all query heads of its KV head, so each K and V row is loaded once for
// the group. It makes one pass over its keys with a running maximum and sum (online softmax, Milakov &
// Gimelshein); ranges of one sequence are merged exactly by their log-sum-exp.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <vector>

#include "vector.h"

namespace blockyard {
namespace {

constexpr int kKeys = 64;          // keys of a tile: their scores stay in registers and first-level cache
constexpr int kQueryRows = 96;     // rows (queries x group) of a tile that share one transposed key tile
constexpr int kFewRows = 4;        // up to here scores are dot products, above a product with transposed keys
constexpr int64_t kMinRange = 256; // a range of fewer keys saves less time than its merge costs
constexpr int kPrefetchLocality = 2;  // into the second-level cache, since a tile of K and V fills the first
constexpr float kNone = -std::numeric_limits<float>::infinity();

struct Item {
  int32_t sequence, head, query, queries;  // `queries` query tokens from `query` of the sequence
  int64_t from, to;                        // range of keys
  int64_t part;                            // index of its partial result; -1: the only range
};

template <typename T>
struct Cache {
  const T* data;
  int64_t block, kind, head, token;  // strides
  int64_t block_tokens;
  int dim, padded;
};

// Where the K (index 0) and V (1) rows of a tile of keys lie in the cache.
template <typename T>
struct Tile {
  const T* rows[2][kKeys];
  int count = 0;

  void find(const Cache<T>& kv, const int32_t* table, int head, int64_t from, int64_t to) {
    count = static_cast<int>(std::clamp<int64_t>(to - from, 0, kKeys));
    for (int t = 0; t < count;) {
      const int64_t offset = (from + t) % kv.block_tokens;
      const int end = static_cast<int>(std::min<int64_t>(count, t + kv.block_tokens - offset));
      const T* row = kv.data + table[(from + t) / kv.block_tokens] * kv.block + head * kv.head + offset * kv.token;
      for (; t < end; ++t, row += kv.token) {
        rows[0][t] = row;
        rows[1][t] = row + kv.kind;
      }
    }
  }

  // Prefetch key t of the tile: blocks lie in different pages, which hardware prefetchers do not cross.
  void prefetch(int t, int dim) const {
    if (t >= count) return;
    for (int which = 0; which < 2; ++which)
      for (int d = 0; d < dim; d += 64 / sizeof(T)) __builtin_prefetch(rows[which][t] + d, 0, kPrefetchLocality);
  }
};

struct Scratch {
  std::vector<float> q, keys, scores, out, high, sum, rows[2];
  const float* pointer[2][kKeys];
  void reserve(int rows_max, int padded) {
    q.resize(static_cast<size_t>(rows_max) * padded);
    out.resize(static_cast<size_t>(rows_max) * padded);
    keys.resize(static_cast<size_t>(padded) * kKeys);
    scores.resize(static_cast<size_t>(rows_max) * kKeys);
    high.resize(rows_max);
    sum.resize(rows_max);
    for (auto& r : rows) r.resize(static_cast<size_t>(kKeys) * padded);
  }
};

// Point s.pointer to a tile's K (which = 0) or V (1) as padded rows of floats. float32 rows that need no
// padding are used in place; others are converted into the scratch.
template <typename T>
void read(const Cache<T>& kv, const Tile<T>& tile, int which, Scratch& s) {
  for (int t = 0; t < tile.count; ++t) {
    const T* row = tile.rows[which][t];
    if constexpr (std::is_same_v<T, float>) {
      if (kv.dim == kv.padded) {
        s.pointer[which][t] = row;
        continue;
      }
    }
    float* copy = s.rows[which].data() + t * kv.padded;
    to_float(row, copy, kv.dim, kv.padded);
    s.pointer[which][t] = copy;
  }
}

template <int Rows, typename Ahead>
void dot_products(const float* q, const float* const* keys, int count, int padded, float* scores, Ahead ahead) {
  int t = 0;
  for (; t + 4 <= count; t += 4) {
    for (int j = 0; j < 4; ++j) ahead(t + j);
    Vec sums[Rows][4] = {};
    for (int d = 0; d < padded; d += kLanes) {
      Vec k[4];
      for (int j = 0; j < 4; ++j) k[j] = load(keys[t + j] + d);
      for (int r = 0; r < Rows; ++r) {
        const Vec value = load(q + r * padded + d);
        for (int j = 0; j < 4; ++j) sums[r][j] += value * k[j];
      }
    }
    for (int r = 0; r < Rows; ++r)
      for (int j = 0; j < 4; ++j) scores[r * kKeys + t + j] = sum(sums[r][j]);
  }
  for (; t < count; ++t)
    for (int r = 0; r < Rows; ++r) {
      Vec total{};
      for (int d = 0; d < padded; d += kLanes) total += load(q + r * padded + d) * load(keys[t] + d);
      scores[r * kKeys + t] = sum(total);
    }
}

// Scores of `rows` queries and `count` keys. Calls ahead(t) once for each key, to prefetch the next tile.
template <typename Ahead>
void score(const float* q, int rows, const float* const* keys, int count, int padded, Scratch& s, Ahead ahead) {
  float* scores = s.scores.data();
  switch (rows) {
    case 1: return dot_products<1>(q, keys, count, padded, scores, ahead);
    case 2: return dot_products<2>(q, keys, count, padded, scores, ahead);
    case 3: return dot_products<3>(q, keys, count, padded, scores, ahead);
    case 4: return dot_products<4>(q, keys, count, padded, scores, ahead);
    default: break;
  }
  float* transposed = s.keys.data();  // [padded][kKeys]
  for (int t = 0; t < count; ++t) {
    ahead(t);
    for (int d = 0; d < padded; ++d) transposed[d * kKeys + t] = keys[t][d];
  }
  const StridedRows b{transposed, kKeys};
  constexpr int kStep = 6;
  for (int r = 0; r < rows; r += kStep)
    multiply_rows<kKeys / kLanes, kStep>(std::min(kStep, rows - r), q + r * padded, padded, b, padded,
                                         scores + r * kKeys, kKeys, false);
}

// Replace one row's scores by weights relative to the running maximum. The maximum may grow: returns the
// factor by which the output summed so far must be multiplied.
float weigh(float* scores, int visible, int count, float& high, float& sum_of) {
  for (int t = visible; t < kKeys; ++t) scores[t] = kNone;
  Vec best = load(scores);
  for (int t = kLanes; t < kKeys; t += kLanes) best = max(best, load(scores + t));
  const float next = std::max(high, max(best));
  if (next == kNone) {
    std::fill(scores, scores + count, 0.0f);
    return 1.0f;
  }
  Vec total{};
  for (int t = 0; t < kKeys; t += kLanes) {
    const Vec w = exp_nonpositive(load(scores + t) - next);
    store(scores + t, w);
    total += w;
  }
  const float factor = high == kNone ? 0.0f : std::exp(high - next);
  high = next;
  sum_of = sum_of * factor + sum(total);
  return factor;
}

void add_values(int rows, int count, int padded, Scratch& s) {
  const ScatteredRows values{s.pointer[1]};
  constexpr int kStep = 6;
  for (int r = 0; r < rows; r += kStep) {
    const int m = std::min(kStep, rows - r);
    const float* w = s.scores.data() + r * kKeys;
    float* o = s.out.data() + r * padded;
    int d = 0;
    const float* shifted[kKeys];
    for (; d < padded;) {
      const int lanes = std::min(4, (padded - d) / kLanes);
      for (int t = 0; t < count; ++t) shifted[t] = values.rows[t] + d;
      const ScatteredRows b{shifted};
      switch (lanes) {
        case 4: multiply_rows<4, kStep>(m, w, kKeys, b, count, o + d, padded, true); break;
        case 3: multiply_rows<3, kStep>(m, w, kKeys, b, count, o + d, padded, true); break;
        case 2: multiply_rows<2, kStep>(m, w, kKeys, b, count, o + d, padded, true); break;
        default: multiply_rows<1, kStep>(m, w, kKeys, b, count, o + d, padded, true); break;
      }
      d += lanes * kLanes;
    }
  }
}

// Compute the queries of one item over its range of keys. The unnormalised result stays in the scratch.
template <typename T>
void attend(const Cache<T>& kv, const int32_t* table, const Item& item, int group, int64_t first_visible,
            bool causal, Scratch& s) {
  const int rows = item.queries * group, padded = kv.padded;
  std::fill_n(s.out.data(), static_cast<size_t>(rows) * padded, 0.0f);
  std::fill_n(s.high.data(), rows, kNone);
  std::fill_n(s.sum.data(), rows, 0.0f);
  Tile<T> tile, next;
  next.find(kv, table, item.head, item.from, item.to);
  for (int64_t from = item.from; from < item.to; from += kKeys) {
    tile = next;
    next.find(kv, table, item.head, from + kKeys, item.to);
    const int count = tile.count;
    read(kv, tile, 0, s);
    read(kv, tile, 1, s);
    score(s.q.data(), rows, s.pointer[0], count, padded, s, [&](int t) { next.prefetch(t, kv.dim); });
    for (int r = 0; r < rows; ++r) {
      int visible = count;
      if (causal) visible = static_cast<int>(std::clamp<int64_t>(first_visible + r / group - from, 0, count));
      const float factor = weigh(s.scores.data() + r * kKeys, visible, count, s.high[r], s.sum[r]);
      if (factor != 1.0f)
        for (int d = 0; d < padded; d += kLanes) {
          float* o = s.out.data() + r * padded + d;
          store(o, load(o) * factor);
        }
    }
    add_values(rows, count, padded, s);
  }
}

std::vector<Item> cut(const int32_t* starts, const int32_t* lens, int64_t sequences, int64_t kv_heads, int group,
                      bool causal, int64_t& parts) {
  const int tile = std::max(1, kQueryRows / group);
  double total = 0;
  for (int64_t s = 0; s < sequences; ++s) total += static_cast<double>(starts[s + 1] - starts[s]) * lens[s];
  // About four items per thread balance the load. A long sequence is cut along its keys to make enough items.
  const double share = total * kv_heads / (4.0 * at::get_num_threads());
  std::vector<Item> items;
  parts = 0;
  for (int64_t s = 0; s < sequences; ++s) {
    const int queries = starts[s + 1] - starts[s];
    if (!lens[s]) continue;
    for (int q = 0; q < queries; q += tile) {
      const int count = std::min(tile, queries - q);
      const int64_t keys = causal ? lens[s] - queries + q + count : lens[s];
      const int64_t wanted = static_cast<int64_t>(static_cast<double>(count) * keys / std::max(share, 1.0)) + 1;
      const int64_t ranges = std::max<int64_t>(1, std::min(wanted, keys / kMinRange));
      for (int h = 0; h < kv_heads; ++h)
        for (int64_t i = 0; i < ranges; ++i)
          items.push_back({static_cast<int32_t>(s), h, q, count, keys * i / ranges, keys * (i + 1) / ranges,
                           ranges == 1 ? -1 : parts++});
    }
  }
  return items;
}

// A wrong block id would make the kernel read memory outside of the pool. One id stands for some thousand
// numbers that are read, so checking every id costs too little to be measured.
void check_batch(const at::Tensor& q, const at::Tensor& kv, const at::Tensor& tables, const at::Tensor& rows_of,
                 const at::Tensor& query_starts, const at::Tensor& context_lens) {
  const int32_t* rows = rows_of.const_data_ptr<int32_t>();
  const int32_t* starts = query_starts.const_data_ptr<int32_t>();
  const int32_t* lens = context_lens.const_data_ptr<int32_t>();
  const int64_t sequences = context_lens.size(0), num_blocks = kv.size(0), block_tokens = kv.size(3);
  TORCH_CHECK(starts[0] >= 0 && starts[sequences] <= q.size(0), "query_starts goes from ", starts[0], " to ",
              starts[sequences], ", q has ", q.size(0), " rows");
  for (int64_t s = 0; s < sequences; ++s) {
    TORCH_CHECK(starts[s] <= starts[s + 1], "query_starts falls at sequence ", s);
    if (starts[s] == starts[s + 1] || lens[s] == 0) continue;
    TORCH_CHECK(rows[s] >= 0 && rows[s] < tables.size(0), "sequence ", s, " is in row ", rows[s], " of ",
                tables.size(0), " block tables");
    const int64_t count = (lens[s] + block_tokens - 1) / block_tokens;
    TORCH_CHECK(lens[s] > 0 && count <= tables.size(1), "sequence ", s, " has ", lens[s],
                " tokens, its table room for ", tables.size(1) * block_tokens);
    const int32_t* ids = tables.const_data_ptr<int32_t>() + rows[s] * tables.stride(0);
    uint32_t highest = 0;  // a negative id is a very high one
    for (int64_t i = 0; i < count; ++i) highest = std::max(highest, static_cast<uint32_t>(ids[i]));
    TORCH_CHECK(highest < num_blocks, "sequence ", s, " has block ", static_cast<int32_t>(highest),
                " in its table; the pool has blocks 0 to ", num_blocks - 1);
  }
}

template <typename T>
void run(const at::Tensor& q, const at::Tensor& kv, const at::Tensor& tables, const at::Tensor& rows_of,
         const at::Tensor& query_starts, const at::Tensor& context_lens, double scale, bool causal, bool partial,
         at::Tensor& out, at::Tensor& high, at::Tensor& total) {
  const int64_t heads = q.size(1), sequences = context_lens.size(0), kv_heads = kv.size(2);
  const int dim = static_cast<int>(q.size(2)), padded = (dim + kLanes - 1) / kLanes * kLanes;
  const int group = static_cast<int>(heads / kv_heads);
  const Cache<T> cache{kv.const_data_ptr<T>(), kv.stride(0), kv.stride(1), kv.stride(2), kv.stride(3),
                       kv.size(3), dim, padded};
  const int32_t* table = tables.const_data_ptr<int32_t>();
  const int32_t* rows = rows_of.const_data_ptr<int32_t>();
  const int32_t* starts = query_starts.const_data_ptr<int32_t>();
  const int32_t* lens = context_lens.const_data_ptr<int32_t>();
  const T* queries = q.const_data_ptr<T>();
  int64_t parts = 0;
  const auto items = cut(starts, lens, sequences, kv_heads, group, causal, parts);
  const int tile = std::max(1, kQueryRows / group), rows_max = tile * group;
  std::vector<float> part_out(static_cast<size_t>(parts) * rows_max * padded), part_high(parts * rows_max),
      part_sum(parts * rows_max);

  const auto emit = [&](const Item& item, const float* o, const float* m, const float* l) {
    for (int r = 0; r < item.queries * group; ++r) {
      const int64_t token = starts[item.sequence] + item.query + r / group, head = item.head * group + r % group;
      const float* from = o + static_cast<int64_t>(r) * padded;
      if (partial) {
        std::copy_n(from, dim, out.mutable_data_ptr<float>() + (token * heads + head) * dim);
        high.mutable_data_ptr<float>()[token * heads + head] = m[r];
        total.mutable_data_ptr<float>()[token * heads + head] = l[r];
      } else {
        T* to = out.mutable_data_ptr<T>() + (token * heads + head) * dim;
        const float inverse = l[r] > 0 ? 1.0f / l[r] : 0.0f;
        for (int d = 0; d < dim; ++d) to[d] = static_cast<T>(from[d] * inverse);
      }
    }
  };

  std::atomic<size_t> next{0};
  const int64_t workers = std::min<int64_t>(at::get_num_threads(), static_cast<int64_t>(items.size()));
  at::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    thread_local Scratch s;
    s.reserve(rows_max, padded);
    for (size_t i; (i = next.fetch_add(1)) < items.size();) {
      const Item& item = items[i];
      const int64_t count = starts[item.sequence + 1] - starts[item.sequence];
      for (int r = 0; r < item.queries * group; ++r) {
        const int64_t token = starts[item.sequence] + item.query + r / group, head = item.head * group + r % group;
        float* row = s.q.data() + static_cast<int64_t>(r) * padded;
        to_float(queries + token * q.stride(0) + head * q.stride(1), row, dim, padded);
        for (int d = 0; d < dim; ++d) row[d] *= static_cast<float>(scale);
      }
      const int32_t* blocks = table + rows[item.sequence] * tables.stride(0);
      attend(cache, blocks, item, group, lens[item.sequence] - count + item.query + 1, causal, s);
      if (item.part < 0) {
        emit(item, s.out.data(), s.high.data(), s.sum.data());
      } else {
        const int64_t n = item.queries * group, at = item.part * rows_max;
        std::copy_n(s.out.data(), n * padded, part_out.data() + at * padded);
        std::copy_n(s.high.data(), n, part_high.data() + at);
        std::copy_n(s.sum.data(), n, part_sum.data() + at);
      }
    }
  });

  // The ranges of one tile of queries are consecutive items: merge each into the first, then emit the first.
  for (size_t i = 0; i < items.size();) {
    if (items[i].part < 0) {
      ++i;
      continue;
    }
    const int64_t base = items[i].part * rows_max;
    size_t j = i + 1;
    for (; j < items.size() && items[j].from > 0; ++j) {
      const int64_t other = items[j].part * rows_max;
      for (int r = 0; r < items[i].queries * group; ++r) {
        const float m = std::max(part_high[base + r], part_high[other + r]);
        if (m == kNone) continue;
        const float mine = std::exp(part_high[base + r] - m), theirs = std::exp(part_high[other + r] - m);
        float* a = part_out.data() + (base + r) * padded;
        const float* b = part_out.data() + (other + r) * padded;
        for (int d = 0; d < padded; d += kLanes) store(a + d, load(a + d) * mine + load(b + d) * theirs);
        part_sum[base + r] = part_sum[base + r] * mine + part_sum[other + r] * theirs;
        part_high[base + r] = m;
      }
    }
    emit(items[i], part_out.data() + base * padded, part_high.data() + base, part_sum.data() + base);
    i = j;
  }
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> attention(const at::Tensor& q, const at::Tensor& kv,
                                                         const at::Tensor& tables, const at::Tensor& rows,
                                                         const at::Tensor& query_starts,
                                                         const at::Tensor& context_lens, double scale, bool causal,
                                                         bool partial) {
  TORCH_CHECK(q.dim() == 3 && q.stride(2) == 1, "q must be [T, heads, head_dim] with contiguous heads");
  TORCH_CHECK(kv.dim() == 5 && kv.stride(4) == 1 && kv.size(4) == q.size(2) && kv.scalar_type() == q.scalar_type(),
              "kv must be [blocks, 2, kv_heads, block_tokens, head_dim] of q's head_dim and dtype");
  TORCH_CHECK(q.size(1) % kv.size(2) == 0, q.size(1), " query heads cannot share ", kv.size(2), " KV heads");
  TORCH_CHECK(tables.dim() == 2 && tables.stride(1) == 1 && rows.is_contiguous() && query_starts.is_contiguous() &&
                  context_lens.is_contiguous() && rows.size(0) == context_lens.size(0) &&
                  query_starts.size(0) == context_lens.size(0) + 1,
              "the batch's tensors do not fit together");
  check_batch(q, kv, tables, rows, query_starts, context_lens);
  const auto floats = q.options().dtype(at::kFloat);
  auto out = at::zeros(q.sizes(), partial ? floats : q.options());
  auto high = partial ? at::full({q.size(0), q.size(1)}, kNone, floats) : at::empty({0}, floats);
  auto total = partial ? at::zeros({q.size(0), q.size(1)}, floats) : at::empty({0}, floats);
  const auto go = [&](auto zero) {
    run<decltype(zero)>(q, kv, tables, rows, query_starts, context_lens, scale, causal, partial, out, high, total);
  };
  switch (q.scalar_type()) {
    case at::kFloat: go(0.0f); break;
    case at::kBFloat16: go(c10::BFloat16()); break;
    case at::kHalf: go(c10::Half()); break;
    default: TORCH_CHECK(false, "q must be float32, bfloat16 or float16");
  }
  return {out, high, total};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(blockyard, m) {
  m.def(
      "attention(Tensor q, Tensor kv, Tensor tables, Tensor rows, Tensor query_starts, Tensor context_lens, "
      "float scale, bool causal, bool partial) -> (Tensor, Tensor, Tensor)");
}
TORCH_LIBRARY_IMPL(blockyard, CPU, m) { m.impl("attention", attention); }

}  // namespace blockyard
