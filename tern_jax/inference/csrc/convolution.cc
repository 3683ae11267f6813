// Convolutions, as products of patches of images that are read where they are.
#include <algorithm>
#include <cstring>
#include <vector>

#include "kernels.h"
#include "parallel.h"

namespace tern_jax {
namespace {

// Patches up to which products that read the weights once are faster.
constexpr int64_t kFew = 8;
// Patches whose sums fit the second cache, and for which weights are unpacked.
constexpr int64_t kPatches = 512;
// Patches that are multiplied at once, and that are gathered at once before they
// are rounded: vectors that were just stored in parts are slow to load.
constexpr int64_t kRounded = 32, kGathered = 8;

int64_t up(int64_t a, int64_t b) { return a > 0 ? (a + b - 1) / b : 0; }

// Where patches are read: in x, or in copies of parts of it that have borders.
class Plan {
 public:
  explicit Plan(const Images& images) : images(images) {
    const std::vector<Axis>& axes = images.axes;
    copied = !std::all_of(axes.begin(), axes.end(), [](const Axis& a) {
      return a.spread == 1 && a.low <= 0 && a.reach(a.out) - a.low <= a.size;
    });
    strides.resize(axes.size() + 1);
    int64_t stride = 1;
    for (size_t i = axes.size() + 1; i-- > 0;) {
      const bool last = i == axes.size();
      strides[i] = copied ? stride : stride_of(i);
      stride *= last ? images.channels : axes[i].reach(axes[i].out);
    }
    offsets = {0};
    for (const int64_t axis : images.order) {
      const bool last = axis == static_cast<int64_t>(axes.size());
      const int64_t count = last ? images.channels : axes[axis].window;
      extend(&offsets, count, strides[axis] * (last ? 1 : axes[axis].dilation));
    }
    places = {0};
    for (size_t i = 1; i < axes.size(); ++i) {
      extend(&places, axes[i].out, strides[i] * axes[i].steps);
    }
  }

  // Puts the inputs of each group `padded` apart.
  std::vector<Run> runs(int64_t group, int64_t padded) const {
    std::vector<Run> runs;
    for (size_t i = 0; i < offsets.size(); ++i) {
      if (i % group == 0 || offsets[i] != offsets[i - 1] + 1) {
        const int64_t to = i / group * padded + i % group;
        runs.push_back({offsets[i], to, 0});
      }
      ++runs.back().count;
    }
    return runs;
  }

  // Numbers that `lines` places along the first axis reach.
  int64_t size(int64_t lines) const {
    return images.axes[0].reach(lines) * strides[0];
  }

  // Copies what places of the first axis reach, from `first` on.
  void copy(const float* x, int64_t first, int64_t lines, float* to) const {
    std::fill(to, to + size(lines), 0.f);
    const Axis& axis = images.axes[0];
    copy_axis(0, x, first * axis.steps, axis.reach(lines), to);
  }

  const Images& images;
  bool copied;
  std::vector<int64_t> strides;  // of the axes and of the channels
  std::vector<int64_t> offsets;  // of the numbers of a patch
  std::vector<int64_t> places;   // of the patches of a line

 private:
  int64_t stride_of(size_t i) const {
    return i < images.axes.size() ? images.axes[i].stride
                                  : images.channel_stride;
  }

  static void extend(std::vector<int64_t>* offsets, int64_t count,
                     int64_t stride) {
    std::vector<int64_t> longer;
    for (const int64_t offset : *offsets) {
      for (int64_t i = 0; i < count; ++i) longer.push_back(offset + i * stride);
    }
    offsets->swap(longer);
  }

  // `start`: what comes first in the copy, borders included.
  void copy_axis(size_t i, const float* x, int64_t start, int64_t reach,
                 float* to) const {
    const bool last = i + 1 == images.axes.size();
    const Axis& axis = images.axes[i];
    const int64_t low = axis.low - start;
    const int64_t begin = up(-low, axis.spread);
    const int64_t end = std::min(axis.size, up(reach - low, axis.spread));
    if (begin >= end) return;
    x += begin * axis.stride;
    to += (low + begin * axis.spread) * strides[i];
    if (last && axis.spread == 1 && images.channel_stride == 1 &&
        axis.stride == images.channels) {
      std::copy(x, x + (end - begin) * images.channels, to);
      return;
    }
    for (int64_t j = begin; j < end; ++j) {
      if (last) {
        for (int64_t c = 0; c < images.channels; ++c) {
          to[c] = x[c * images.channel_stride];
        }
      } else {
        const Axis& next = images.axes[i + 1];
        copy_axis(i + 1, x, 0, next.reach(next.out), to);
      }
      x += axis.stride;
      to += axis.spread * strides[i];
    }
  }
};

// Patches of some lines: those of places along the first axis, image by image.
class Slab {
 public:
  Slab(const Plan& plan, const float* x, int64_t begin, int64_t end) {
    const Images& images = plan.images;
    const Axis& axis = images.axes[0];
    int64_t size = 0;
    for_each(axis.out, begin, end, [&](int64_t, int64_t, int64_t lines) {
      size += plan.size(lines);
    });
    if (plan.copied) copies_ = buffer<float>(size);
    float* to = copies_.get();
    for_each(axis.out, begin, end,
             [&](int64_t image, int64_t first, int64_t lines) {
      const float* from = x + image * images.stride;
      if (plan.copied) {
        plan.copy(from, first, lines, to);
        from = to;
        to += plan.size(lines);
      } else {
        from += first * axis.steps * axis.stride;
        for (const Axis& a : images.axes) from -= a.low * a.stride;
      }
      for (int64_t line = 0; line < lines; ++line) {
        for (const int64_t place : plan.places) rows.push_back(from + place);
        from += axis.steps * plan.strides[0];
      }
    });
  }

  std::vector<const float*> rows;  // the first number of each patch

 private:
  // Calls each(image, first place, places) for lines of the images.
  template <typename Each>
  static void for_each(int64_t out, int64_t begin, int64_t end,
                       const Each& each) {
    while (begin < end) {
      const int64_t first = begin % out;
      const int64_t lines = std::min(out - first, end - begin);
      each(begin / out, first, lines);
      begin += lines;
    }
  }

  Buffer<float> copies_;
};

// Patches of a slab as rows [count, in].
void gather_rows(const std::vector<Run>& runs, const Slab& slab, int64_t first,
                 int64_t count, int64_t in, const Kernels& kernels, float* to) {
  for (int64_t row = first; row < first + count; ++row, to += in) {
    kernels.gather(runs.data(), runs.size(), slab.rows[row], to);
  }
}

// The product of all patches of a slab, from y on.
void multiply_rounded(const Tiles& t, const std::vector<Run>& runs,
                      const Slab& slab, const Kernels& kernels, bool two) {
  Tiles part = t;
  const Shape& s = part.shape;
  const Quantized x = {buffer<int8_t>(kRounded * s.tiles() * kLanes),
                       buffer<float>(kRounded),
                       buffer<int32_t>(kRounded * s.groups)};
  const int64_t padded = s.group_tiles() * kLanes;
  const int64_t in = s.groups * padded;
  const auto patches = buffer<float>(kGathered * in + kLanes);
  std::fill(patches.get(), patches.get() + kGathered * in, 0.f);
  for (int64_t row = 0; row < t.shape.rows; row += kRounded) {
    part.shape.rows = std::min(kRounded, t.shape.rows - row);
    part.y = t.y + row * s.out;
    for (int64_t r = 0; r < s.rows; r += kGathered) {
      const int64_t end = std::min(s.rows, r + kGathered);
      gather_rows(runs, slab, row + r, end - r, in, kernels, patches.get());
      kernels.quantize(s, patches.get(), padded, x, r, end);
    }
    kernels.integers[two](part, x, 0, s.blocks());
  }
}

// Calls each(rows, slab) for slabs of all patches, whose first is row `rows`.
template <typename Each>
void for_slabs(const Shape& s, const float* x, const Plan& plan, Pool& pool,
               const Each& each) {
  const int64_t lines = plan.images.count * plan.images.axes[0].out;
  const int64_t line = plan.images.line();
  const int64_t most = std::max<int64_t>(1, kPatches / line);
  split(pool, lines, 1, s.rows * s.in * s.out, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin; first < end; first += most) {
      each(first * line, Slab(plan, x, first, std::min(end, first + most)));
    }
  });
}

// Calls product(x) of few patches.
template <typename Product>
void multiply_few(const Shape& s, const float* x, const Plan& plan,
                  const Kernels& kernels, const Product& product) {
  const Axis& axis = plan.images.axes[0];
  const Slab slab(plan, x, 0, plan.images.count * axis.out);
  const auto rows = buffer<float>(s.rows * s.in + kLanes);
  gather_rows(plan.runs(s.in, s.in), slab, 0, s.rows, s.in, kernels,
              rows.get());
  product(rows.get());
}

// No threads but that of the caller.
class Alone : public Pool {
  int64_t threads() const override { return 1; }
  void schedule(void (*)(void*), void*) override {}
};

}  // namespace

void convolve(const Tiles& product, const Images& images, bool int8, Isa isa,
              Pool& pool) {
  Tiles t = product;
  const Shape& s = t.shape;
  if (empty(s, t.y)) return;
  const Kernels& kernels = kernels_of(isa);
  const Plan plan(images);
  if (s.rows <= kFew) {
    multiply_few(s, t.x, plan, kernels, [&](const float* x) {
      t.x = x;
      multiply(t, int8, isa, pool);
    });
    return;
  }
  const auto last = fill_up(&t);
  const bool two = int8 && !same(t.w_p, t.w_n, s);
  const std::vector<Run> runs =
      plan.runs(s.group(), s.group_tiles() * kLanes);
  for_slabs(s, t.x, plan, pool, [&](int64_t row, const Slab& slab) {
    Tiles part = t;
    part.shape.rows = slab.rows.size();
    part.y = t.y + row * s.out;
    if (int8) {
      multiply_rounded(part, runs, slab, kernels, two);
    } else {
      kernels.multiply_patches(part, {slab.rows.data(), plan.offsets.data()});
    }
  });
}

void convolve(const Lists& t, const Images& images, Isa isa, Pool& pool) {
  const Shape& s = t.shape;
  if (empty(s, t.y)) return;
  const Kernels& kernels = kernels_of(isa);
  const Plan plan(images);
  Lists few = t;
  if (s.rows <= kFew) {
    multiply_few(s, t.x, plan, kernels, [&](const float* x) {
      few.x = x;
      multiply(few, isa, pool);
    });
    return;
  }
  const std::vector<Run> runs = plan.runs(s.in, s.in);
  for_slabs(s, t.x, plan, pool, [&](int64_t row, const Slab& slab) {
    const auto x = buffer<float>(kMostRows * s.in + kLanes);
    Lists part = t;
    part.x = x.get();
    Alone alone;
    const int64_t all = slab.rows.size();
    for (int64_t r = 0; r < all; r += kMostRows) {
      part.shape.rows = std::min<int64_t>(kMostRows, all - r);
      part.y = t.y + (row + r) * s.out;
      gather_rows(runs, slab, r, part.shape.rows, s.in, kernels, x.get());
      multiply(part, isa, alone);
    }
  });
}

}  // namespace tern_jax
