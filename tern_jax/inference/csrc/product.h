// Products of float activations by packed ternary weights, y = x W.
//
// The weights, [in, out], lie in tiles of 16 inputs by 16 outputs, 64 bytes a
// tile, tiles [blocks of outputs][blocks of inputs]. The last block has as many
// outputs as are left, and 4 bytes for each of them a tile. In byte 4 c + k of a tile
// the two bits from 2 f on hold the code plus one, 0, 1 or 2, of input 4 f + k
// and output c. Groups of inputs with scales of their own begin a tile each;
// what no weight fills has the code 0, a field of 1.
#ifndef TERN_JAX_PRODUCT_H_
#define TERN_JAX_PRODUCT_H_

#include <cstddef>
#include <cstdint>
#include <vector>

namespace tern_jax {

constexpr int kLanes = 16;      // inputs and outputs of a tile
constexpr int kTileBytes = 64;  // their codes

// Magnitudes [groups or 1, out or 1] of one sign.
struct Scales {
  const float* data;
  int64_t per_group;   // 0 if all groups share them
  int64_t per_output;  // 0 if all outputs share them

  float at(int64_t group, int64_t output) const {
    return data[group * per_group + output * per_output];
  }
};

struct Shape {
  int64_t rows;    // of x and y
  int64_t in;      // a multiple of groups
  int64_t out;
  int64_t groups;  // of inputs, each with magnitudes of its own

  int64_t group() const { return in / groups; }
  // Tiles along the inputs of one group, and of all of them.
  int64_t group_tiles() const { return (group() + kLanes - 1) / kLanes; }
  int64_t tiles() const { return groups * group_tiles(); }
  int64_t blocks() const { return (out + kLanes - 1) / kLanes; }
};

struct Tiles {
  Shape shape;
  const float* x;        // [rows, in]
  const uint8_t* tiles;  // [4 tiles out]
  Scales w_p, w_n;
  float* y;  // [rows, out]
  // [tiles, 64]: the last block, filled up, if it is not whole. Whoever gives a
  // product leaves it out.
  const uint8_t* last = nullptr;

  int64_t whole_blocks() const { return shape.out / kLanes; }
  const uint8_t* block(int64_t b) const {
    return b < whole_blocks() ? tiles + b * shape.tiles() * kTileBytes : last;
  }
};

// The nonzero weights, output by output: first the inputs of the positive ones,
// then of the negative ones. List l is [begin[l], begin[l + 1]).
struct Lists {
  Shape shape;  // one group
  const float* x;
  const void* inputs;  // uint16 or uint32
  bool wide;           // uint32
  const int32_t* begin;  // [2 out + 1]
  Scales w_p, w_n;
  float* y;
};

// An axis along which a window moves over images.
struct Axis {
  int64_t size, stride;             // of the images, in memory
  int64_t low, spread;              // zeros in front; a number each `spread`
  int64_t window, dilation, steps;  // numbers of the window, and between them
  int64_t out;                      // places of the window

  // Numbers that the window reaches at some places.
  int64_t reach(int64_t places) const {
    return (places - 1) * steps + (window - 1) * dilation + 1;
  }
};

// How x holds images, and which patches of them are the rows of a product: one
// for each image and place of the window, of the numbers of all channels there.
struct Images {
  int64_t count, stride;
  int64_t channels, channel_stride;
  std::vector<Axis> axes;  // at least one
  // Which axis the inputs of the weights run over first, second, ...; that of
  // the channels comes after `axes`.
  std::vector<int64_t> order;

  // Patches of the images for each place along the first axis.
  int64_t line() const {
    int64_t product = 1;
    for (size_t i = 1; i < axes.size(); ++i) product *= axes[i].out;
    return product;
  }
};

// Instruction sets, which Python names in this order.
enum class Isa : int32_t { kAvx512, kAvx2, kNeon };

// Whether this machine has it.
bool has_isa(Isa isa);

// Threads that help with a product. The caller works, too.
class Pool {
 public:
  virtual ~Pool() = default;
  virtual int64_t threads() const = 0;
  // Runs task(data) at some time, in another thread.
  virtual void schedule(void (*task)(void*), void* data) = 0;
};

// y of float activations, exact up to the order of sums; or, for int8, of
// activations rounded to 127 steps of the largest magnitude of their row.
void multiply(const Tiles& product, bool int8, Isa isa, Pool& pool);
// The same of patches of images x: a convolution. The rows of the product's
// shape are the patches of all images.
void convolve(const Tiles& product, const Images& images, bool int8, Isa isa,
              Pool& pool);
// y of float activations.
void multiply(const Lists& product, Isa isa, Pool& pool);
void convolve(const Lists& product, const Images& images, Isa isa, Pool& pool);

}  // namespace tern_jax

#endif  // TERN_JAX_PRODUCT_H_
