// Which kernels run here, and how the work is divided among threads.
#include "product.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>

#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#include "kernels.h"
#include "parallel.h"

namespace tern_jax {
namespace {

// Blocks of outputs that a turn takes at least.
constexpr int64_t kGrain = 4, kTableGrain = 16;

// Makes x, [rows, in], [in, width], filled up by zeros. A dense product has
// zeros meet every input: stray[row] is 0, or NaN if one of them is not finite.
void transpose(const float* x, int64_t rows, int64_t in, int64_t width,
               float* to, float* stray) {
  std::fill(to, to + (rows < width ? in * width : 0), 0.f);
  std::fill(stray, stray + rows, 0.f);
  for (int64_t first = 0; first < in; first += kLanes) {
    const int64_t end = std::min(in, first + kLanes);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t i = first; i < end; ++i) {
        to[i * width + r] = x[r * in + i];
        stray[r] += 0 * x[r * in + i];
      }
    }
  }
}

}  // namespace

bool has_isa(Isa isa) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    case Isa::kAvx512:
      return has_isa(Isa::kAvx2) && __builtin_cpu_supports("avx512f") &&
             __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") &&
             __builtin_cpu_supports("avx512vnni");
#elif defined(__aarch64__) && defined(__APPLE__)
    case Isa::kNeon:
      return true;
#elif defined(__aarch64__) && defined(__linux__)
    case Isa::kNeon:
      return getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#endif
    default:
      return false;
  }
}

const Kernels& kernels_of(Isa isa) {
#if defined(__x86_64__)
  return isa == Isa::kAvx512 ? kAvx512Kernels : kAvx2Kernels;
#else
  return kNeonKernels;
#endif
}

bool empty(const Shape& shape, float* y) {
  if (shape.rows && shape.out && shape.in) return false;
  std::fill(y, y + shape.rows * shape.out, 0.f);
  return true;
}

Buffer<uint8_t> fill_up(Tiles* t) {
  const int64_t lanes = t->shape.out % kLanes, tiles = t->shape.tiles();
  if (!lanes) return nullptr;
  auto last = buffer<uint8_t>(tiles * kTileBytes);
  const uint8_t* from =
      t->tiles + t->whole_blocks() * tiles * kTileBytes;
  std::memset(last.get(), 0x55, tiles * kTileBytes);  // codes of 0
  for (int64_t k = 0; k < tiles; ++k) {
    std::memcpy(last.get() + k * kTileBytes, from + k * 4 * lanes, 4 * lanes);
  }
  t->last = last.get();
  return last;
}

bool same(const Scales& a, const Scales& b, const Shape& shape) {
  for (int64_t g = 0; g < (a.per_group ? shape.groups : 1); ++g) {
    for (int64_t o = 0; o < (a.per_output ? shape.out : 1); ++o) {
      if (a.at(g, o) != b.at(g, o)) return false;
    }
  }
  return true;
}

void multiply(const Tiles& product, bool int8, Isa isa, Pool& pool) {
  Tiles t = product;
  const Shape& s = t.shape;
  if (empty(s, t.y)) return;
  const auto last = fill_up(&t);
  const Kernels& kernels = kernels_of(isa);
  const bool two = !same(t.w_p, t.w_n, s);
  const int64_t work = s.rows * s.in * s.out;
  if (!int8) {
    const bool looks_up = s.rows <= kernels.look_ups[two];
    auto* range = looks_up ? kernels.look_up[two] : kernels.multiply;
    // Each part makes tables of its own, which must pay.
    split(pool, s.blocks(), looks_up ? kTableGrain : kGrain, work,
          [&](int64_t begin, int64_t end) { range(t, begin, end); });
    return;
  }
  const Quantized x = {buffer<int8_t>(s.rows * s.tiles() * kLanes),
                       buffer<float>(s.rows),
                       buffer<int32_t>(s.rows * s.groups)};
  kernels.quantize(s, t.x, s.group(), x, 0, s.rows);
  split(pool, s.blocks(), kGrain, work, [&](int64_t begin, int64_t end) {
    kernels.integers[two](t, x, begin, end);
  });
}

void multiply(const Lists& t, Isa isa, Pool& pool) {
  const Shape& s = t.shape;
  if (empty(s, t.y)) return;
  const ListKernels& lists = kernels_of(isa).lists;
  const int64_t nonzero = t.begin[2 * s.out] - t.begin[0];
  const auto x = buffer<float>(s.in * kMostRows);
  for (int64_t row = 0; row < s.rows; row += kMostRows) {
    const int64_t rows = std::min<int64_t>(s.rows - row, kMostRows);
    int size = 0;
    while (kListRows[size] < rows) ++size;
    float stray[kMostRows];
    transpose(t.x + row * s.in, rows, s.in, kListRows[size], x.get(), stray);
    auto* range = (t.wide ? lists.wide : lists.narrow)[size];
    split(pool, s.out, kLanes, rows * nonzero,
          [&](int64_t begin, int64_t end) {
            range(t, x.get(), stray, row, rows, begin, end);
          });
  }
}

}  // namespace tern_jax
