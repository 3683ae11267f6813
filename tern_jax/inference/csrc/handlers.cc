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

// Calls each(part of every operand, rows) for every product of a batch, which
// `matrices` may be part of one product.
template <typename Each>
ffi::Error for_each(const std::vector<Operand>& operands, bool matrices,
                    const Each& each) {
  auto batch = batch_of(operands);
  if (batch.has_error()) return batch.error();
  const Operand& x = operands[0];
  const int64_t count = product_of(*batch);
  std::vector<int64_t> parts(operands.size(), 0);
  const bool whole = x.size() * count == static_cast<int64_t>(product_of(
      std::vector<int64_t>(x.dims.begin(), x.dims.end())));
  if (matrices && whole && shared(operands)) {
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

ffi::Error check_tiles(const Operand& tiles, const Shape& shape) {
  if (shape.groups >= 1 && shape.in % shape.groups == 0 &&
      tiles.dim(0) == 4 * shape.tiles() * shape.out) {
    return ffi::Error::Success();
  }
  return ffi::Error::InvalidArgument(
      "tern_jax: tiles do not have the shape of the product");
}

ffi::Error tiles(ffi::ThreadPool threads, Floats x, ffi::Buffer<ffi::U8> tiles,
                 Floats w_p, Floats w_n, ffi::Result<Floats> y, bool int8,
                 int64_t groups, int32_t isa) {
  if (ffi::Error error = check_isa(isa); error.failure()) return error;
  const std::vector<Operand> operands = {{x.dimensions(), 2},
                                         {y->dimensions(), 2},
                                         {tiles.dimensions(), 1},
                                         {w_p.dimensions(), 2},
                                         {w_n.dimensions(), 2}};
  Shape shape = {0, operands[0].dim(1), operands[1].dim(1), groups};
  if (ffi::Error error = check_tiles(operands[2], shape); error.failure()) {
    return error;
  }
  XlaPool pool(threads);
  return for_each(operands, true, [&](const auto& part, int64_t rows) {
    shape.rows = rows;
    const Tiles product = {shape, x.typed_data() + part[0],
                           tiles.typed_data() + part[2],
                           scales_of(operands[3], w_p.typed_data() + part[3]),
                           scales_of(operands[4], w_n.typed_data() + part[4]),
                           y->typed_data() + part[1]};
    multiply(product, int8, static_cast<Isa>(isa), pool);
  });
}

using Numbers = ffi::Span<const int64_t>;

// Images as XLA has them: `spec` holds the axes of the batch, of the channels,
// and those along which windows move.
ffi::ErrorOr<Images> images_of(const Operand& x, const Operand& y, Numbers spec,
                               Numbers window, Numbers steps, Numbers low,
                               Numbers spread, Numbers dilation,
                               Numbers order) {
  const size_t rank = x.own - 2;
  const auto wrong = ffi::Unexpected(ffi::Error::InvalidArgument(
      "tern_jax: the convolution does not have the axes of its images"));
  for (const Numbers& each : {window, steps, low, spread, dilation}) {
    if (each.size() != rank) return wrong;
  }
  if (spec.size() != x.own || order.size() != rank + 1) return wrong;
  std::vector<int64_t> strides(x.own, 1);
  for (size_t i = x.own - 1; i-- > 0;) {
    strides[i] = strides[i + 1] * x.dim(i + 1);
  }
  Images images = {x.dim(spec[0]), strides[spec[0]], x.dim(spec[1]),
                   strides[spec[1]], {}, {order.begin(), order.end()}};
  for (size_t i = 0; i < rank; ++i) {
    const int64_t axis = spec[i + 2];
    images.axes.push_back({x.dim(axis), strides[axis], low[i], spread[i],
                           window[i], dilation[i], steps[i], y.dim(i + 1)});
  }
  return images;
}

// The product of all patches of images.
Shape shape_of(const Images& images, const Operand& y, int64_t groups) {
  Shape shape = {images.count * images.axes[0].out * images.line(),
                 images.channels, y.dim(y.own - 1), groups};
  for (const Axis& axis : images.axes) shape.in *= axis.window;
  return shape;
}

ffi::Error convolution(ffi::ThreadPool threads, Floats x,
                       ffi::Buffer<ffi::U8> tiles, Floats w_p, Floats w_n,
                       ffi::Result<Floats> y, bool int8, int64_t groups,
                       int32_t isa, Numbers spec, Numbers window, Numbers steps,
                       Numbers low, Numbers spread, Numbers dilation,
                       Numbers order) {
  if (ffi::Error error = check_isa(isa); error.failure()) return error;
  const size_t own = spec.size();
  const std::vector<Operand> operands = {{x.dimensions(), own},
                                         {y->dimensions(), own},
                                         {tiles.dimensions(), 1},
                                         {w_p.dimensions(), 2},
                                         {w_n.dimensions(), 2}};
  const auto images = images_of(operands[0], operands[1], spec, window, steps,
                                low, spread, dilation, order);
  if (images.has_error()) return images.error();
  const Shape shape = shape_of(*images, operands[1], groups);
  if (ffi::Error error = check_tiles(operands[2], shape); error.failure()) {
    return error;
  }
  XlaPool pool(threads);
  return for_each(operands, false, [&](const auto& part, int64_t) {
    const Tiles product = {shape, x.typed_data() + part[0],
                           tiles.typed_data() + part[2],
                           scales_of(operands[3], w_p.typed_data() + part[3]),
                           scales_of(operands[4], w_n.typed_data() + part[4]),
                           y->typed_data() + part[1]};
    convolve(product, *images, int8, static_cast<Isa>(isa), pool);
  });
}

ffi::Error check_lists(const Operand& begin, const ffi::AnyBuffer& inputs,
                       const Shape& shape) {
  const auto type = inputs.element_type();
  if (begin.dim(0) == 2 * shape.out + 1 &&
      (type == ffi::U32 || type == ffi::U16)) {
    return ffi::Error::Success();
  }
  return ffi::Error::InvalidArgument(
      "tern_jax: lists do not have the shape of the product");
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
  if (ffi::Error error = check_lists(operands[3], inputs, shape);
      error.failure()) {
    return error;
  }
  const auto* bytes = static_cast<const uint8_t*>(inputs.untyped_data());
  XlaPool pool(threads);
  return for_each(operands, true, [&](const auto& part, int64_t rows) {
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

ffi::Error list_convolution(ffi::ThreadPool threads, Floats x,
                            ffi::AnyBuffer inputs,
                            ffi::Buffer<ffi::S32> begin, Floats w_p, Floats w_n,
                            ffi::Result<Floats> y, int32_t isa, Numbers spec,
                            Numbers window, Numbers steps, Numbers low,
                            Numbers spread, Numbers dilation, Numbers order) {
  if (ffi::Error error = check_isa(isa); error.failure()) return error;
  const size_t own = spec.size();
  const std::vector<Operand> operands = {{x.dimensions(), own},
                                         {y->dimensions(), own},
                                         {inputs.dimensions(), 1},
                                         {begin.dimensions(), 1},
                                         {w_p.dimensions(), 2},
                                         {w_n.dimensions(), 2}};
  const auto images = images_of(operands[0], operands[1], spec, window, steps,
                                low, spread, dilation, order);
  if (images.has_error()) return images.error();
  const Shape shape = shape_of(*images, operands[1], 1);
  const bool wide = inputs.element_type() == ffi::U32;
  if (ffi::Error error = check_lists(operands[3], inputs, shape);
      error.failure()) {
    return error;
  }
  const auto* bytes = static_cast<const uint8_t*>(inputs.untyped_data());
  XlaPool pool(threads);
  return for_each(operands, false, [&](const auto& part, int64_t) {
    const Lists product = {shape,
                           x.typed_data() + part[0],
                           bytes + part[2] * (wide ? 4 : 2),
                           wide,
                           begin.typed_data() + part[3],
                           scales_of(operands[4], w_p.typed_data() + part[4]),
                           scales_of(operands[5], w_n.typed_data() + part[5]),
                           y->typed_data() + part[1]};
    convolve(product, *images, static_cast<Isa>(isa), pool);
  });
}

}  // namespace
}  // namespace tern_jax

TERN_JAX_EXPORT XLA_FFI_Error* tern_jax_tiles(XLA_FFI_CallFrame*);
TERN_JAX_EXPORT XLA_FFI_Error* tern_jax_lists(XLA_FFI_CallFrame*);
TERN_JAX_EXPORT XLA_FFI_Error* tern_jax_convolution(XLA_FFI_CallFrame*);
TERN_JAX_EXPORT XLA_FFI_Error* tern_jax_list_convolution(XLA_FFI_CallFrame*);

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

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    tern_jax_convolution, tern_jax::convolution,
    xla::ffi::Ffi::Bind()
        .Ctx<xla::ffi::ThreadPool>()
        .Arg<tern_jax::Floats>()
        .Arg<xla::ffi::Buffer<xla::ffi::U8>>()
        .Arg<tern_jax::Floats>()
        .Arg<tern_jax::Floats>()
        .Ret<tern_jax::Floats>()
        .Attr<bool>("int8")
        .Attr<int64_t>("groups")
        .Attr<int32_t>("isa")
        .Attr<tern_jax::Numbers>("images")
        .Attr<tern_jax::Numbers>("window")
        .Attr<tern_jax::Numbers>("strides")
        .Attr<tern_jax::Numbers>("low")
        .Attr<tern_jax::Numbers>("lhs_dilation")
        .Attr<tern_jax::Numbers>("rhs_dilation")
        .Attr<tern_jax::Numbers>("order"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    tern_jax_list_convolution, tern_jax::list_convolution,
    xla::ffi::Ffi::Bind()
        .Ctx<xla::ffi::ThreadPool>()
        .Arg<tern_jax::Floats>()
        .Arg<xla::ffi::AnyBuffer>()
        .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
        .Arg<tern_jax::Floats>()
        .Arg<tern_jax::Floats>()
        .Ret<tern_jax::Floats>()
        .Attr<int32_t>("isa")
        .Attr<tern_jax::Numbers>("images")
        .Attr<tern_jax::Numbers>("window")
        .Attr<tern_jax::Numbers>("strides")
        .Attr<tern_jax::Numbers>("low")
        .Attr<tern_jax::Numbers>("lhs_dilation")
        .Attr<tern_jax::Numbers>("rhs_dilation")
        .Attr<tern_jax::Numbers>("order"));

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
