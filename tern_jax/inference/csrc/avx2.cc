// Kernels for AVX2: two vectors hold a number for each output of a tile.
#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels.h"

namespace tern_jax {
namespace avx2 {

#define TERN_JAX_TARGET __attribute__((target("avx2,fma")))

using Vec = __m256;
constexpr int kWidth = 8;
TERN_JAX_TARGET inline Vec load(const float* x) { return _mm256_loadu_ps(x); }
TERN_JAX_TARGET inline Vec load_first(const float* x, int n) {
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_maskload_ps(x, _mm256_cmpgt_epi32(_mm256_set1_epi32(n), lanes));
}
TERN_JAX_TARGET inline void store(float* to, Vec x) { _mm256_storeu_ps(to, x); }
TERN_JAX_TARGET inline Vec splat(float x) { return _mm256_set1_ps(x); }
TERN_JAX_TARGET inline Vec multiply_add(Vec a, Vec b, Vec c) {
  return _mm256_fmadd_ps(a, b, c);
}

typedef int32_t Ints __attribute__((vector_size(4 * kWidth)));
TERN_JAX_TARGET inline int32_t largest_lane(Ints x) {
  const auto all = reinterpret_cast<__m256i>(x);
  __m128i m = _mm_max_epi32(_mm256_castsi256_si128(all),
                            _mm256_extracti128_si256(all, 1));
  m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4e));
  m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0xb1));
  return _mm_cvtsi128_si32(m);
}
TERN_JAX_TARGET inline int32_t sum_of_lanes(Ints x) {
  const auto all = reinterpret_cast<__m256i>(x);
  __m128i m = _mm_add_epi32(_mm256_castsi256_si128(all),
                            _mm256_extracti128_si256(all, 1));
  m = _mm_add_epi32(m, _mm_shuffle_epi32(m, 0x4e));
  m = _mm_add_epi32(m, _mm_shuffle_epi32(m, 0xb1));
  return _mm_cvtsi128_si32(m);
}

constexpr int kPanelRows = 4, kPanelBlocks = 1, kIntRows = 4, kIntBlocks = 1;
constexpr int kFloatRows = 1, kFloatBlocks = 2;
// Two bits of a word are the code of an input, and select one of its values.
constexpr int kTable = kLanes * 4;

template <int R, bool kTwo>
TERN_JAX_TARGET inline void build_table(const float* x, float* table, int r) {
  constexpr int kSigns = kTwo ? 2 : 1;
  for (int i = 0; i < kLanes; ++i) {  // in the order of the bits of a word
    const float value = x[4 * (i % 4) + i / 4], none = 0 * value;
    float* to = table + (i * R + r) * kSigns * 4;
    if (kTwo) {
      const float values[] = {none, none, value, 0, value, none, none, 0};
      std::copy(values, values + 8, to);
    } else {
      const float values[] = {-value, none, value, 0};
      std::copy(values, values + 4, to);
    }
  }
}

template <int R, int B, bool kTwo>
TERN_JAX_TARGET void float_sums(const uint8_t* tiles, int64_t stride, int count,
                                const float* tables, float* p, float* n) {
  constexpr int kSigns = kTwo ? 2 : 1;
  constexpr int kHalves = 2 * B;
  __m256 sums[R][kSigns][kHalves];
  for (int r = 0; r < R; ++r) {
    for (int s = 0; s < kSigns; ++s) {
      for (int h = 0; h < kHalves; ++h) sums[r][s][h] = _mm256_setzero_ps();
    }
  }
  const __m256i by_4 = _mm256_set1_epi16(1 << 14);  // upper half: >> 2
  for (int k = 0; k < count; ++k) {
    // As with AVX-512: a multiplication in place of a shift, and rolled up.
#pragma GCC unroll 1
    for (int part = 0; part < 2; ++part) {
      __m256i words[kHalves];
      for (int h = 0; h < kHalves; ++h) {
        words[h] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(
            tiles + h / 2 * stride + k * kTileBytes + h % 2 * 32));
        words[h] = _mm256_srl_epi32(words[h], _mm_cvtsi32_si128(16 * part));
      }
#pragma GCC unroll 1
      for (int i = 0; i < kLanes / 2; ++i) {
        for (int r = 0; r < R; ++r) {
          for (int s = 0; s < kSigns; ++s, tables += 4) {
            const __m256 table =
                _mm256_broadcast_ps(reinterpret_cast<const __m128*>(tables));
            for (int h = 0; h < kHalves; ++h) {
              sums[r][s][h] = _mm256_add_ps(
                  sums[r][s][h], _mm256_permutevar_ps(table, words[h]));
            }
          }
        }
        for (int h = 0; h < kHalves; ++h) {
          words[h] = _mm256_mulhi_epu16(words[h], by_4);
        }
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int h = 0; h < kHalves; ++h) {
      _mm256_store_ps(p + (r * kHalves + h) * 8, sums[r][0][h]);
      if constexpr (kTwo) {
        _mm256_store_ps(n + (r * kHalves + h) * 8, sums[r][1][h]);
      }
    }
  }
}

TERN_JAX_TARGET inline void add_to(int32_t* s, __m256i sums16) {
  auto* at = reinterpret_cast<__m256i*>(s);
  const __m256i sums = _mm256_madd_epi16(sums16, _mm256_set1_epi16(1));
  _mm256_store_si256(at, _mm256_add_epi32(_mm256_load_si256(at), sums));
}

template <int R, int B, bool kTwo>
TERN_JAX_TARGET void int_sums(const uint8_t* tiles, int64_t, int64_t count,
                              const int8_t* q, int64_t q_stride, int32_t* s,
                              int32_t* z) {
  static_assert(B == 1, "one block of outputs");
  // A sum of int16 takes at most 2 2 127 with each field: 64 of them fit.
  constexpr int kFit = 16;
  constexpr int kSigns = kTwo ? 2 : 1;
  const __m256i three = _mm256_set1_epi8(3), one = _mm256_set1_epi8(1);
  for (int64_t begin = 0; begin < count; begin += kFit) {
    const int64_t end = std::min(count, begin + kFit);
    __m256i sums[R][kSigns][2];
    for (int r = 0; r < R; ++r) {
      for (int i = 0; i < kSigns; ++i) sums[r][i][0] = sums[r][i][1] = __m256i{};
    }
    for (int64_t k = begin; k < end; ++k) {
      const auto* tile =
          reinterpret_cast<const __m256i*>(tiles + k * kTileBytes);
      const __m256i halves[] = {_mm256_loadu_si256(tile),
                                _mm256_loadu_si256(tile + 1)};
#pragma GCC unroll 4
      for (int f = 0; f < 4; ++f) {
        __m256i fields[kSigns][2];
        for (int h = 0; h < 2; ++h) {
          fields[0][h] =
              _mm256_and_si256(_mm256_srli_epi16(halves[h], 2 * f), three);
          if constexpr (kTwo) fields[1][h] = _mm256_and_si256(fields[0][h], one);
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          int32_t bytes;
          std::memcpy(&bytes, q + r * q_stride + k * kLanes + 4 * f, 4);
          const __m256i x = _mm256_set1_epi32(bytes);
          for (int i = 0; i < kSigns; ++i) {
            for (int h = 0; h < 2; ++h) {
              sums[r][i][h] = _mm256_add_epi16(
                  sums[r][i][h], _mm256_maddubs_epi16(fields[i][h], x));
            }
          }
        }
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int h = 0; h < 2; ++h) {
        add_to(s + r * kLanes + 8 * h, sums[r][0][h]);
        if constexpr (kTwo) add_to(z + r * kLanes + 8 * h, sums[r][1][h]);
      }
    }
  }
}

#include "integers.inc"
#include "lists.inc"
#include "lookup.inc"
#include "panel.inc"

constexpr Kernels kKernels = {{8, 3},
                              {look_up<false>, look_up<true>},
                              multiply_range,
                              multiply_patches,
                              gather,
                              quantize,
                              {int_range<false>, int_range<true>},
                              kLists};

}  // namespace avx2

const Kernels kAvx2Kernels = avx2::kKernels;

}  // namespace tern_jax
#endif
