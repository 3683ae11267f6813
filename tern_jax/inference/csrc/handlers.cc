// What XLA calls.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <string>
#include <vector>

#include "product.h"
#include "xla/ffi/api/ffi.h"

#define TERN_JAX_EXPORT extern "C" __attribute__((visibility("default")))

namespace tern_jax {
namespace {

namespace ffi = xla::ffi;
using Dims = ffi::AnyBuffer::Dimensions;
using Floats = ffi::Buffer<ffi::F32>;

// Threads of XLA's own, as many as it was given.
class XlaPool : public Pool {
 public:
  explicit XlaPool(ffi::ThreadPool& pool) : pool_(pool) {}
  int64_t threads() const override { return pool_.num_threads(); }
  void schedule(void (*task)(void*), void* data) override {
    pool_.Schedule([task, data] { task(data); });
  }

 private:
  ffi::ThreadPool& pool_;
};

// Axes before the last `own` ones are of a batch; an operand that all of a
// batch share has them of length 1. Returns which part of an operand belongs to
// part `index` of a batch of axes `batch`.
int64_t part_of(int64_t index, const std::vector<int64_t>& batch,
                const Dims& dims) {
  int64_t part = 0, stride = 1;
  for (size_t i = batch.size(); i-- > 0;) {
    const int64_t at = index % batch[i];
    index /= batch[i];
    part += dims[i] == 1 ? 0 : at * stride;
    stride *= dims[i];
  }
  return part;
}

struct Operand {
  Dims dims;
  size_t own;

  int64_t dim(size_t i) const { return dims[dims.size() - own + i]; }
  int64_t size() const {
    int64_t product = 1;
    for (size_t i = 0; i < own; ++i) product *= dim(i);
    return product;
  }
};

// Checks the ranks, and returns the axes of the batch.
ffi::ErrorOr<std::vector<int64_t>> batch_of(
    const std::vector<Operand>& operands) {
  const size_t rank = operands[0].dims.size() - operands[0].own;
  std::vector<int64_t> batch(rank, 1);
  for (const Operand& operand : operands) {
    if (operand.dims.size() != rank + operand.own) {
      return ffi::Unexpected(ffi::Error::InvalidArgument(
          "tern_jax: operands have batches of different ranks"));
    }
    for (size_t i = 0; i < rank; ++i) {
      if (operand.dims[i] != 1) batch[i] = operand.dims[i];
    }
  }
  return batch;
}

int64_t product_of(const std::vector<int64_t>& dims) {
  int64_t product = 1;
  for (int64_t n : dims) product *= n;
  return product;
}

Scales scales_of(const Operand& w, const float* data) {
  const int64_t out = w.dim(1);
  return {data, w.dim(0) == 1 ? 0 : out, out == 1 ? 0 : 1};
}

// The instruction set of products that name none.
std::atomic<int32_t> default_isa{-1};

// Checks an instruction set, and puts the default in place of none.
ffi::Error check_isa(int32_t& isa) {
  if (isa < 0) isa = default_isa;
  if (isa >= 0 && has_isa(static_cast<Isa>(isa))) return ffi::Error::Success();
  return ffi::Error::InvalidArgument(
      "tern_jax: this machine does not have instruction set " +
      std::to_string(isa));
}

// Whether operands but x and y have batches of length 1, so that the rows of
// all of a batch are rows of one product.
bool shared(const std::vector<Operand>& operands) {
  for (size_t i = 2; i < operands.size(); ++i) {
    const Operand& o = operands[i];
    for (size_t k = 0; k + o.own < o.dims.size(); ++k) {
      if (o.dims[k] != 1) return false;
    }
  }
  return true;
}

// Calls each(part of every operand, rows) for every product of a batch.
template <typename Each>
ffi::Error for_each(const std::vector<Operand>& operands, const Each& each) {
  auto batch = batch_of(operands);
  if (batch.has_error()) return batch.error();
  const Operand& x = operands[0];
  const int64_t count = product_of(*batch);
  std::vector<int64_t> parts(operands.size(), 0);
  const bool whole = x.size() * count == static_cast<int64_t>(product_of(
      std::vector<int64_t>(x.dims.begin(), x.dims.end())));
  if (whole && shared(operands)) {
    each(parts, count * x.dim(0));
    return ffi::Error::Success();
  }
  for (int64_t i = 0; i < count; ++i) {
    for (size_t k = 0; k < operands.size(); ++k) {
      parts[k] = part_of(i, *batch, operands[k].dims) * operands[k].size();
    }
    parts[1] = i * operands[1].size();
    each(parts, x.dim(0));
  }
  return ffi::Error::Success();
}

ffi::Error tiles(ffi::ThreadPool threads, Floats x, ffi::Buffer<ffi::U8> tiles,
                 Floats w_p, Floats w_n, ffi::Result<Floats> y, bool int8,
                 int64_t groups, int32_t isa) {
  if (ffi::Error error = check_isa(isa); error.failure()) return error;
  const std::vector<Operand> operands = {{x.dimensions(), 2},
                                         {y->dimensions(), 2},
                                         {tiles.dimensions(), 3},
                                         {w_p.dimensions(), 2},
                                         {w_n.dimensions(), 2}};
  Shape shape = {0, operands[0].dim(1), operands[1].dim(1), groups};
  if (groups < 1 || shape.in % groups ||
      operands[2].dim(0) != shape.blocks() ||
      operands[2].dim(1) != shape.tiles() || operands[2].dim(2) != kTileBytes) {
    return ffi::Error::InvalidArgument(
        "tern_jax: tiles do not have the shape of the product");
  }
  XlaPool pool(threads);
  return for_each(operands, [&](const auto& part, int64_t rows) {
    shape.rows = rows;
    const Tiles product = {shape, x.typed_data() + part[0],
                           tiles.typed_data() + part[2],
                           scales_of(operands[3], w_p.typed_data() + part[3]),
                           scales_of(operands[4], w_n.typed_data() + part[4]),
                           y->typed_data() + part[1]};
    multiply(product, int8, static_cast<Isa>(isa), pool);
  });
}

ffi::Error lists(ffi::ThreadPool threads, Floats x, ffi::AnyBuffer inputs,
                 ffi::Buffer<ffi::S32> begin, Floats w_p, Floats w_n,
                 ffi::Result<Floats> y, int32_t isa) {
  if (ffi::Error error = check_isa(isa); error.failure()) return error;
  const std::vector<Operand> operands = {{x.dimensions(), 2},
                                         {y->dimensions(), 2},
                                         {inputs.dimensions(), 1},
                                         {begin.dimensions(), 1},
                                         {w_p.dimensions(), 2},
                                         {w_n.dimensions(), 2}};
  Shape shape = {0, operands[0].dim(1), operands[1].dim(1), 1};
  const bool wide = inputs.element_type() == ffi::U32;
  if (operands[3].dim(0) != 2 * shape.out + 1 ||
      (!wide && inputs.element_type() != ffi::U16)) {
    return ffi::Error::InvalidArgument(
        "tern_jax: lists do not have the shape of the product");
  }
  const auto* bytes = static_cast<const uint8_t*>(inputs.untyped_data());
  XlaPool pool(threads);
  return for_each(operands, [&](const auto& part, int64_t rows) {
    shape.rows = rows;
    const Lists product = {shape,
                           x.typed_data() + part[0],
                           bytes + part[2] * (wide ? 4 : 2),
                           wide,
                           begin.typed_data() + part[3],
                           scales_of(operands[4], w_p.typed_data() + part[4]),
                           scales_of(operands[5], w_n.typed_data() + part[5]),
                           y->typed_data() + part[1]};
    multiply(product, static_cast<Isa>(isa), pool);
  });
}

}  // namespace
}  // namespace tern_jax

TERN_JAX_EXPORT XLA_FFI_Error* tern_jax_tiles(XLA_FFI_CallFrame*);
TERN_JAX_EXPORT XLA_FFI_Error* tern_jax_lists(XLA_FFI_CallFrame*);

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    tern_jax_tiles, tern_jax::tiles,
    xla::ffi::Ffi::Bind()
        .Ctx<xla::ffi::ThreadPool>()
        .Arg<tern_jax::Floats>()
        .Arg<xla::ffi::Buffer<xla::ffi::U8>>()
        .Arg<tern_jax::Floats>()
        .Arg<tern_jax::Floats>()
        .Ret<tern_jax::Floats>()
        .Attr<bool>("int8")
        .Attr<int64_t>("groups")
        .Attr<int32_t>("isa"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(tern_jax_lists, tern_jax::lists,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<tern_jax::Floats>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Arg<tern_jax::Floats>()
                                  .Arg<tern_jax::Floats>()
                                  .Ret<tern_jax::Floats>()
                                  .Attr<int32_t>("isa"));

// The version of XLA's interface that this was built for.
TERN_JAX_EXPORT int tern_jax_api_major() { return XLA_FFI_API_MAJOR; }
TERN_JAX_EXPORT int tern_jax_api_minor() { return XLA_FFI_API_MINOR; }
// Whether an instruction set is there, by its number.
TERN_JAX_EXPORT int tern_jax_has_isa(int32_t isa) {
  return tern_jax::has_isa(static_cast<tern_jax::Isa>(isa));
}
// Chooses the instruction set of products that name none.
TERN_JAX_EXPORT void tern_jax_use_isa(int32_t isa) {
  tern_jax::default_isa = isa;
}
// Of which sources this was made.
TERN_JAX_EXPORT const char* tern_jax_sources() { return TERN_JAX_SOURCES; }
