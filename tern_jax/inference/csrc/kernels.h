// What the kernels of each instruction set offer to the loops of product.cc.
#ifndef TERN_JAX_KERNELS_H_
#define TERN_JAX_KERNELS_H_

#include <cstdint>
#include <memory>
#include <new>

#include "product.h"

namespace tern_jax {

constexpr std::align_val_t kLine{64};  // of the cache: no vector crosses one

struct Free {
  void operator()(void* data) const { ::operator delete(data, kLine); }
};

// Numbers that are not initialized.
template <typename T>
using Buffer = std::unique_ptr<T[], Free>;

template <typename T>
Buffer<T> buffer(int64_t size) {
  return Buffer<T>(static_cast<T*>(::operator new(size * sizeof(T), kLine)));
}

// Activations rounded to int8, row by row.
struct Quantized {
  Buffer<int8_t> values;  // [rows, 16 tiles], groups padded by 0
  Buffer<float> scales;   // [rows], of one step
  Buffer<int32_t> sums;   // [rows, groups], of the values
};

// Patches of images, as rows of a product.
struct Patches {
  const float* const* rows;  // the first number of each
  const int64_t* offsets;    // of the number that meets an input, behind that
};

// Numbers that are neighbors where they are read, and where they are put.
struct Run {
  int64_t from, to, count;
};

// Tiles whose unpacked weights, or tables, fit the first cache.
constexpr int kChunk = 8;

// Rows that a list is summed for at once.
constexpr int kListRows[] = {1, 8, 16};
constexpr int kMostRows = kListRows[2];

// One for each of kListRows, of lists of uint16 and of uint32.
struct ListKernels {
  using Range = void(const Lists&, const float* x, const float* stray,
                     int64_t row, int64_t rows, int64_t begin, int64_t end);
  Range* narrow[3];
  Range* wide[3];
};

struct Kernels {
  using Range = void(const Tiles&, int64_t begin, int64_t end);
  using IntRange = void(const Tiles&, const Quantized&, int64_t begin,
                        int64_t end);
  using PatchRange = void(const Tiles&, const Patches&);
  using Gather = void(const Run*, int64_t count, const float* x, float* to);
  using Quantize = void(const Shape&, const float* x, int64_t group,
                        const Quantized&, int64_t begin, int64_t end);

  // Of pairs, the second is for magnitudes that differ: positive and negative
  // weights are summed apart.
  int64_t look_ups[2];  // rows up to which look_up is faster than multiply
  Range* look_up[2];
  Range* multiply;
  PatchRange* multiply_patches;
  Gather* gather;
  Quantize* quantize;
  IntRange* integers[2];
  ListKernels lists;
};

#if defined(__x86_64__)
extern const Kernels kAvx2Kernels, kAvx512Kernels;
#elif defined(__aarch64__)
extern const Kernels kNeonKernels;
#endif

const Kernels& kernels_of(Isa isa);

// Whether there is nothing to sum; y is zero then.
bool empty(const Shape& shape, float* y);

// Fills up the last block of tiles, unless it is whole: keep what is returned.
Buffer<uint8_t> fill_up(Tiles* product);

// Whether all weights have one magnitude for both signs.
bool same(const Scales& a, const Scales& b, const Shape& shape);

}  // namespace tern_jax

#endif  // TERN_JAX_KERNELS_H_
