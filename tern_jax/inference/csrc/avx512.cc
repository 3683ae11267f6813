// Kernels for AVX-512 with VNNI: a vector holds a number for each output of a
// tile.
#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels.h"

namespace tern_jax {
namespace avx512 {

#define TERN_JAX_TARGET \
  __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni,fma")))

using Vec = __m512;
constexpr int kWidth = 16;
TERN_JAX_TARGET inline Vec load(const float* x) { return _mm512_loadu_ps(x); }
TERN_JAX_TARGET inline Vec load_first(const float* x, int n) {
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), x);
}
TERN_JAX_TARGET inline void store(float* to, Vec x) { _mm512_storeu_ps(to, x); }
TERN_JAX_TARGET inline Vec splat(float x) { return _mm512_set1_ps(x); }
TERN_JAX_TARGET inline Vec multiply_add(Vec a, Vec b, Vec c) {
  return _mm512_fmadd_ps(a, b, c);
}

typedef int32_t Ints __attribute__((vector_size(4 * kWidth)));
TERN_JAX_TARGET inline int32_t largest_lane(Ints x) {
  return _mm512_reduce_max_epi32(reinterpret_cast<__m512i>(x));
}
TERN_JAX_TARGET inline int32_t sum_of_lanes(Ints x) {
  return _mm512_reduce_add_epi32(reinterpret_cast<__m512i>(x));
}

constexpr int kPanelRows = 8, kPanelBlocks = 2, kIntRows = 8, kIntBlocks = 2;
constexpr int kFloatRows = 4, kFloatBlocks = 4;
// Bits 4 p to 4 p + 3 of a word are the codes of two inputs, and select one of
// the 16 sums of these: 8 tables of 16.
constexpr int kPairs = 8, kTable = kPairs * kLanes;

// Inputs of pair p are input(p) and input(p) + 4.
constexpr int input(int p) { return 8 * (p % 2) + p / 2; }

template <int R, bool kTwo>
TERN_JAX_TARGET inline void build_table(const float* x, float* table, int r) {
  constexpr int kSigns = kTwo ? 2 : 1;
  // By the code plus one of the first input, and of the second; 3 is none.
  const __m512 first = _mm512_setr_ps(-1, 0, 1, 0, -1, 0, 1, 0, -1, 0, 1, 0, -1,
                                      0, 1, 0);
  const __m512 second = _mm512_setr_ps(-1, -1, -1, -1, 0, 0, 0, 0, 1, 1, 1, 1,
                                       0, 0, 0, 0);
  const __m512 none = _mm512_setzero_ps();
  for (int p = 0; p < kPairs; ++p) {
    const __m512 a = _mm512_set1_ps(x[input(p)]);
    const __m512 b = _mm512_set1_ps(x[input(p) + 4]);
    float* to = table + (p * R + r) * kSigns * kLanes;
    if constexpr (kTwo) {
      for (int sign = 0; sign < 2; ++sign) {
        const __m512 flip = _mm512_set1_ps(sign ? -1.f : 1.f);
        const __m512 i = _mm512_max_ps(_mm512_mul_ps(first, flip), none);
        const __m512 j = _mm512_max_ps(_mm512_mul_ps(second, flip), none);
        _mm512_store_ps(to + sign * kLanes,
                        _mm512_fmadd_ps(a, i, _mm512_mul_ps(b, j)));
      }
    } else {
      _mm512_store_ps(to, _mm512_fmadd_ps(a, first, _mm512_mul_ps(b, second)));
    }
  }
}

template <int R, int B, bool kTwo>
TERN_JAX_TARGET void float_sums(const uint8_t* tiles, int64_t stride, int count,
                                const float* tables, float* p, float* n) {
  constexpr int kSigns = kTwo ? 2 : 1;
  __m512 sums[R][B], minus[R][B];
  for (int r = 0; r < R; ++r) {
    for (int b = 0; b < B; ++b) sums[r][b] = minus[r][b] = _mm512_setzero_ps();
  }
  const __m512i by_16 = _mm512_set1_epi16(1 << 12);  // upper half: >> 4
  for (int k = 0; k < count; ++k) {
    // The codes of the next pair come to the lowest bits by a multiplication:
    // shifts would wait for the look-ups, which take the same ports. Rolled up:
    // unrolled, GCC runs out of registers.
    const float* table = tables;
#pragma GCC unroll 1
    for (int half = 0; half < 2; ++half) {
      __m512i words[B];
      for (int b = 0; b < B; ++b) {
        words[b] = _mm512_loadu_si512(tiles + b * stride + k * kTileBytes);
        words[b] = _mm512_srl_epi32(words[b], _mm_cvtsi32_si128(16 * half));
      }
#pragma GCC unroll 1
      for (int pair = 0; pair < kPairs / 2; ++pair) {
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r, table += kSigns * kLanes) {
          const __m512 values = _mm512_load_ps(table);
          for (int b = 0; b < B; ++b) {
            sums[r][b] = _mm512_add_ps(
                sums[r][b], _mm512_permutexvar_ps(words[b], values));
          }
          if constexpr (kTwo) {
            const __m512 others = _mm512_load_ps(table + kLanes);
            for (int b = 0; b < B; ++b) {
              minus[r][b] = _mm512_add_ps(
                  minus[r][b], _mm512_permutexvar_ps(words[b], others));
            }
          }
        }
        for (int b = 0; b < B; ++b) {
          words[b] = _mm512_mulhi_epu16(words[b], by_16);
        }
      }
    }
    tables += R * kTable * kSigns;
  }
  for (int r = 0; r < R; ++r) {
    for (int b = 0; b < B; ++b) {
      _mm512_store_ps(p + (r * B + b) * kLanes, sums[r][b]);
      if constexpr (kTwo) {
        _mm512_store_ps(n + (r * B + b) * kLanes, minus[r][b]);
      }
    }
  }
}

TERN_JAX_TARGET inline __m512i four(const int8_t* q) {
  int32_t bytes;
  std::memcpy(&bytes, q, sizeof bytes);
  return _mm512_set1_epi32(bytes);
}

TERN_JAX_TARGET inline void add_to(int32_t* s, __m512i x) {
  _mm512_store_si512(s, _mm512_add_epi32(_mm512_load_si512(s), x));
}

// One row: fields stay where they are, in sums of weight 1, 4, 16 and 64.
template <int B, bool kTwo>
TERN_JAX_TARGET inline void int_row(const uint8_t* tiles, int64_t stride,
                                    int64_t count, const int8_t* q, int32_t* s,
                                    int32_t* z) {
  __m512i sums[4][B], zeros[4][B];
  for (int f = 0; f < 4; ++f) {
    for (int b = 0; b < B; ++b) sums[f][b] = zeros[f][b] = __m512i{};
  }
  for (int64_t k = 0; k < count; ++k) {
    __m512i tile[B];
    for (int b = 0; b < B; ++b) {
      tile[b] = _mm512_loadu_si512(tiles + b * stride + k * kTileBytes);
    }
#pragma GCC unroll 4
    for (int f = 0; f < 4; ++f) {
      const __m512i x = four(q + k * kLanes + 4 * f);
      const __m512i field = _mm512_set1_epi8(static_cast<char>(3 << (2 * f)));
      const __m512i low = _mm512_set1_epi8(static_cast<char>(1 << (2 * f)));
      for (int b = 0; b < B; ++b) {
        sums[f][b] = _mm512_dpbusd_epi32(
            sums[f][b], _mm512_and_si512(tile[b], field), x);
        if constexpr (kTwo) {
          zeros[f][b] = _mm512_dpbusd_epi32(
              zeros[f][b], _mm512_and_si512(tile[b], low), x);
        }
      }
    }
  }
  for (int f = 0; f < 4; ++f) {
    for (int b = 0; b < B; ++b) {
      add_to(s + b * kLanes, _mm512_srai_epi32(sums[f][b], 2 * f));
      if constexpr (kTwo) {
        add_to(z + b * kLanes, _mm512_srai_epi32(zeros[f][b], 2 * f));
      }
    }
  }
}

template <int R, int B, bool kTwo>
TERN_JAX_TARGET void int_sums(const uint8_t* tiles, int64_t stride,
                              int64_t count, const int8_t* q, int64_t q_stride,
                              int32_t* s, int32_t* z) {
  if constexpr (R == 1) {
    int_row<B, kTwo>(tiles, stride, count, q, s, z);
    return;
  }
  const __m512i three = _mm512_set1_epi8(3), one = _mm512_set1_epi8(1);
  __m512i sums[R][B], zeros[R][B];
  for (int r = 0; r < R; ++r) {
    for (int b = 0; b < B; ++b) sums[r][b] = zeros[r][b] = __m512i{};
  }
  for (int64_t k = 0; k < count; ++k) {
    __m512i tile[B];
    for (int b = 0; b < B; ++b) {
      tile[b] = _mm512_loadu_si512(tiles + b * stride + k * kTileBytes);
    }
#pragma GCC unroll 4
    for (int f = 0; f < 4; ++f) {
      __m512i fields[B], lows[B];
      for (int b = 0; b < B; ++b) {
        fields[b] = _mm512_and_si512(_mm512_srli_epi16(tile[b], 2 * f), three);
        lows[b] = _mm512_and_si512(fields[b], one);
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const __m512i x = four(q + r * q_stride + k * kLanes + 4 * f);
        for (int b = 0; b < B; ++b) {
          sums[r][b] = _mm512_dpbusd_epi32(sums[r][b], fields[b], x);
          if constexpr (kTwo) {
            zeros[r][b] = _mm512_dpbusd_epi32(zeros[r][b], lows[b], x);
          }
        }
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int b = 0; b < B; ++b) {
      add_to(s + (r * B + b) * kLanes, sums[r][b]);
      if constexpr (kTwo) add_to(z + (r * B + b) * kLanes, zeros[r][b]);
    }
  }
}

#include "integers.inc"
#include "lists.inc"
#include "lookup.inc"
#include "panel.inc"

constexpr Kernels kKernels = {{INT64_MAX, 16},
                              {look_up<false>, look_up<true>},
                              multiply_range,
                              multiply_patches,
                              gather,
                              quantize,
                              {int_range<false>, int_range<true>},
                              kLists};

}  // namespace avx512

const Kernels kAvx512Kernels = avx512::kKernels;

}  // namespace tern_jax
#endif
