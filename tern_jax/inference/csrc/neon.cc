// Kernels for 64-bit ARM with the dot product of bytes: a vector holds a number
// for each of four outputs of a tile.
#if defined(__aarch64__)
#include <arm_neon.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels.h"

namespace tern_jax {
namespace neon {

#define TERN_JAX_TARGET __attribute__((target("arch=armv8.2-a+dotprod")))

using Vec = float32x4_t;
constexpr int kWidth = 4;
TERN_JAX_TARGET inline Vec load(const float* x) { return vld1q_f32(x); }
TERN_JAX_TARGET inline Vec load_first(const float* x, int n) {
  float first[kWidth] = {};
  std::memcpy(first, x, n * sizeof(float));
  return load(first);
}
TERN_JAX_TARGET inline void store(float* to, Vec x) { vst1q_f32(to, x); }
TERN_JAX_TARGET inline Vec splat(float x) { return vdupq_n_f32(x); }
TERN_JAX_TARGET inline Vec multiply_add(Vec a, Vec b, Vec c) {
  return vfmaq_f32(c, a, b);
}

typedef int32_t Ints __attribute__((vector_size(4 * kWidth)));
TERN_JAX_TARGET inline int32_t largest_lane(Ints x) { return vmaxvq_s32(x); }
TERN_JAX_TARGET inline int32_t sum_of_lanes(Ints x) { return vaddvq_s32(x); }

constexpr int kPanelRows = 4, kPanelBlocks = 1, kIntRows = 4, kIntBlocks = 1;

template <int R, int B, bool kTwo>
TERN_JAX_TARGET void int_sums(const uint8_t* tiles, int64_t, int64_t count,
                              const int8_t* q, int64_t q_stride, int32_t* s,
                              int32_t* z) {
  static_assert(B == 1, "one block of outputs");
  constexpr int kSigns = kTwo ? 2 : 1;
  int32x4_t sums[R][kSigns][4];
  for (int r = 0; r < R; ++r) {
    for (int h = 0; h < 4; ++h) {
      sums[r][0][h] = vld1q_s32(s + r * kLanes + 4 * h);
      if constexpr (kTwo) sums[r][1][h] = vld1q_s32(z + r * kLanes + 4 * h);
    }
  }
  const uint8x16_t three = vdupq_n_u8(3), one = vdupq_n_u8(1);
  for (int64_t k = 0; k < count; ++k) {
    for (int f = 0; f < 4; ++f) {
      int8x16_t fields[kSigns][4];
      for (int h = 0; h < 4; ++h) {
        const uint8x16_t bytes = vld1q_u8(tiles + k * kTileBytes + 16 * h);
        const uint8x16_t field =
            vandq_u8(vshlq_u8(bytes, vdupq_n_s8(-2 * f)), three);
        fields[0][h] = vreinterpretq_s8_u8(field);
        if constexpr (kTwo) {
          fields[1][h] = vreinterpretq_s8_u8(vandq_u8(field, one));
        }
      }
      for (int r = 0; r < R; ++r) {
        int32_t bytes;
        std::memcpy(&bytes, q + r * q_stride + k * kLanes + 4 * f, 4);
        const int8x16_t x = vreinterpretq_s8_s32(vdupq_n_s32(bytes));
        for (int i = 0; i < kSigns; ++i) {
          for (int h = 0; h < 4; ++h) {
            sums[r][i][h] = vdotq_s32(sums[r][i][h], fields[i][h], x);
          }
        }
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int h = 0; h < 4; ++h) {
      vst1q_s32(s + r * kLanes + 4 * h, sums[r][0][h]);
      if constexpr (kTwo) vst1q_s32(z + r * kLanes + 4 * h, sums[r][1][h]);
    }
  }
}

#include "integers.inc"
#include "lists.inc"
#include "panel.inc"

constexpr Kernels kKernels = {{0, 0},
                              {nullptr, nullptr},
                              multiply_range,
                              multiply_patches,
                              gather,
                              quantize,
                              {int_range<false>, int_range<true>},
                              kLists};

}  // namespace neon

const Kernels kNeonKernels = neon::kKernels;

}  // namespace tern_jax
#endif
