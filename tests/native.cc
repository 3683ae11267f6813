// Runs the native products without XLA, for sanitizers and emulators.
//
//   native SHAPES RUNS
//
// SHAPES random products and convolutions are compared with sums in double, and
// for int8 with exact sums, by every instruction set that is here. Then four threads run one
// product RUNS times in all, with the help of four threads more, and must get
// the same bits each time. Arrays have exactly the length that they need.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <mutex>
#include <numeric>
#include <random>
#include <thread>
#include <vector>

#include "product.h"

using namespace tern_jax;

namespace {

class Threads : public Pool {
 public:
  explicit Threads(int count) {
    for (int i = 0; i < count; ++i) threads_.emplace_back([this] { work(); });
  }
  ~Threads() override {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      ends_ = true;
    }
    more_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }
  int64_t threads() const override { return threads_.size(); }
  void schedule(void (*task)(void*), void* data) override {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      tasks_.push_back({task, data});
    }
    more_.notify_one();
  }

 private:
  void work() {
    for (;;) {
      std::unique_lock<std::mutex> lock(mutex_);
      more_.wait(lock, [this] { return ends_ || !tasks_.empty(); });
      if (tasks_.empty()) return;
      const auto [task, data] = tasks_.front();
      tasks_.pop_front();
      lock.unlock();
      task(data);
    }
  }

  std::vector<std::thread> threads_;
  std::mutex mutex_;
  std::condition_variable more_;
  std::deque<std::pair<void (*)(void*), void*>> tasks_;
  bool ends_ = false;
};

struct Problem {
  Shape shape;
  std::vector<int> codes;  // [in, out]
  std::vector<float> x, w_p, w_n;
  bool by_group, by_output;
  std::vector<uint8_t> tiles;
  std::vector<uint16_t> narrow;
  std::vector<uint32_t> wide;
  std::vector<int32_t> begin;

  Scales scales(const std::vector<float>& w) const {
    const int64_t outputs = by_output ? shape.out : 1;
    return {w.data(), by_group ? outputs : 0, by_output ? 1 : 0};
  }
  int code(int64_t i, int64_t o) const { return codes[i * shape.out + o]; }
};

Problem make(std::mt19937& random, int64_t rows, int64_t group, int64_t groups,
             int64_t out, bool equal, double zeros) {
  Problem p;
  p.shape = {rows, group * groups, out, groups};
  std::uniform_real_distribution<float> number(-2, 2);
  std::uniform_real_distribution<double> share(0, 1);
  p.by_group = random() % 2;
  p.by_output = random() % 2;
  const int64_t count =
      (p.by_group ? groups : 1) * (p.by_output ? p.shape.out : 1);
  for (int64_t i = 0; i < count; ++i) p.w_p.push_back(number(random));
  p.w_n = p.w_p;
  if (!equal) {
    for (float& w : p.w_n) w = number(random);
  }
  for (int64_t i = 0; i < rows * p.shape.in; ++i) p.x.push_back(number(random));
  for (int64_t i = 0; i < p.shape.in * out; ++i) {
    p.codes.push_back(share(random) < zeros ? 0 : random() % 2 ? 1 : -1);
  }
  p.tiles.assign(p.shape.tiles() * 4 * out, 0x55);
  for (int64_t i = 0; i < p.shape.in; ++i) {
    const int64_t place =
        i / group * p.shape.group_tiles() * kLanes + i % group;
    const int64_t lane = place % kLanes;
    for (int64_t o = 0; o < out; ++o) {
      const int64_t block = o / kLanes * kLanes;
      const int64_t lanes = std::min<int64_t>(kLanes, out - block);
      uint8_t& byte = p.tiles[4 * (block * p.shape.tiles() +
                                   place / kLanes * lanes + o % kLanes) +
                              lane % 4];
      const int shift = 2 * (lane / 4);
      byte = (byte & ~(3 << shift)) | ((p.code(i, o) + 1) << shift);
    }
  }
  p.begin.push_back(0);
  for (int64_t o = 0; o < out; ++o) {
    for (int sign : {1, -1}) {
      for (int64_t i = 0; i < p.shape.in; ++i) {
        if (p.code(i, o) == sign) p.wide.push_back(i);
      }
      p.begin.push_back(p.wide.size());
    }
  }
  p.narrow.assign(p.wide.begin(), p.wide.end());
  return p;
}

// Images, and the product of their patches.
struct Picture {
  Images images;
  std::vector<float> x;
  Problem problem;  // x are the patches
};

Axis make_axis(std::mt19937& random, int64_t largest) {
  for (;;) {
    Axis a;
    a.size = 1 + random() % largest;
    a.spread = random() % 4 ? 1 : 2 + random() % 2;
    a.low = int64_t(random() % 5) - 2;
    a.window = 1 + random() % 4;
    a.dilation = random() % 3 ? 1 : 2;
    a.steps = 1 + random() % 3;
    const int64_t high = int64_t(random() % 5) - 2;
    const int64_t room = (a.size - 1) * a.spread + 1 + a.low + high -
                         (a.window - 1) * a.dilation - 1;
    if (room < 0) continue;
    a.out = room / a.steps + 1;
    return a;
  }
}

Picture make_picture(std::mt19937& random, int64_t largest, int64_t out,
                     bool equal, double zeros) {
  Picture p;
  Images& images = p.images;
  const size_t rank = 1 + random() % 3;
  images.count = 1 + random() % 3;
  images.channels = 1 + random() % 20;
  int64_t in = images.channels, size = 1;
  for (size_t i = 0; i < rank; ++i) {
    images.axes.push_back(make_axis(random, rank < 3 ? largest : 4));
    in *= images.axes[i].window;
  }
  images.order.resize(rank + 1);
  std::iota(images.order.begin(), images.order.end(), 0);
  std::vector<int64_t> memory = images.order;
  memory.push_back(rank + 1);  // of the images
  if (random() % 2) {
    std::shuffle(images.order.begin(), images.order.end(), random);
    std::shuffle(memory.begin(), memory.end(), random);
  }
  for (const int64_t i : memory) {
    int64_t& stride = i < int64_t(rank)    ? images.axes[i].stride
                      : i == int64_t(rank) ? images.channel_stride
                                           : images.stride;
    stride = size;
    size *= i < int64_t(rank)    ? images.axes[i].size
            : i == int64_t(rank) ? images.channels
                                 : images.count;
  }
  std::uniform_real_distribution<float> number(-2, 2);
  for (int64_t i = 0; i < size; ++i) p.x.push_back(number(random));
  int64_t rows = images.count, groups = 1;
  for (const Axis& a : images.axes) rows *= a.out;
  for (const int64_t g : {2, 3, 4}) {
    if (in % g == 0 && random() % 4 == 0) groups = g;
  }
  p.problem = make(random, rows, in / groups, groups, out, equal, zeros);
  for (int64_t r = 0; r < rows; ++r) {
    std::vector<int64_t> place(rank);
    int64_t image = r;
    for (size_t i = rank; i-- > 0; image /= images.axes[i].out) {
      place[i] = image % images.axes[i].out;
    }
    for (int64_t i = 0; i < in; ++i) {
      int64_t at = image * images.stride, left = i;
      bool there = true;
      for (size_t k = rank + 1; k-- > 0;) {
        const size_t axis = images.order[k];
        if (axis == rank) {
          at += left % images.channels * images.channel_stride;
          left /= images.channels;
          continue;
        }
        const Axis& a = images.axes[axis];
        const int64_t q = place[axis] * a.steps - a.low +
                          left % a.window * a.dilation;
        left /= a.window;
        there = there && q >= 0 && q % a.spread == 0 && q / a.spread < a.size;
        at += q / a.spread * a.stride;
      }
      p.problem.x[r * in + i] = there ? p.x[at] : 0;
    }
  }
  return p;
}

void fail(const char* what, const Problem& p, int isa) {
  std::printf("%s: rows %ld, in %ld, out %ld, groups %ld, isa %d\n", what,
              long(p.shape.rows), long(p.shape.in), long(p.shape.out),
              long(p.shape.groups), isa);
  std::exit(1);
}

void compare_floats(const Problem& p, const std::vector<float>& y, int isa) {
  for (int64_t r = 0; r < p.shape.rows; ++r) {
    for (int64_t o = 0; o < p.shape.out; ++o) {
      double sum = 0, size = 0;
      for (int64_t i = 0; i < p.shape.in; ++i) {
        const int64_t g = i / p.shape.group();
        const int code = p.code(i, o);
        const double w = code > 0   ? p.scales(p.w_p).at(g, o)
                         : code < 0 ? -p.scales(p.w_n).at(g, o)
                                    : 0;
        sum += p.x[r * p.shape.in + i] * w;
        size += std::fabs(p.x[r * p.shape.in + i] * w);
      }
      if (!(std::fabs(y[r * p.shape.out + o] - sum) <= 1e-6 * size)) {
        fail("float32", p, isa);
      }
    }
  }
}

void compare_int8(const Problem& p, const std::vector<float>& y, int isa) {
  for (int64_t r = 0; r < p.shape.rows; ++r) {
    const float* x = p.x.data() + r * p.shape.in;
    float most = 0;
    for (int64_t i = 0; i < p.shape.in; ++i) {
      most = std::fmax(most, std::fabs(x[i]));
    }
    for (int64_t o = 0; o < p.shape.out; ++o) {
      float total = 0;
      for (int64_t g = 0; g < p.shape.groups; ++g) {
        int64_t positive = 0, negative = 0;
        for (int64_t i = g * p.shape.group(); i < (g + 1) * p.shape.group();
             ++i) {
          const float q = most ? std::nearbyintf(x[i] / most * 127.f) : 0;
          if (p.code(i, o) > 0) positive += q;
          if (p.code(i, o) < 0) negative += q;
        }
        const float w_p = p.scales(p.w_p).at(g, o);
        const float w_n = p.scales(p.w_n).at(g, o);
        volatile float plus = w_p * positive, minus = w_n * negative;
        volatile float part =
            w_p == w_n ? w_p * float(positive - negative) : plus - minus;
        total = g ? total + part : float(part);
      }
      const float step = most * (1.f / 127.f);
      if (y[r * p.shape.out + o] != step * total) fail("int8", p, isa);
    }
  }
}

// Kinds: tiles, tiles and int8, lists of uint16, lists of uint32.
std::vector<float> run(const Problem& p, int kind, Isa isa, Pool& pool,
                       const Picture* picture = nullptr) {
  std::vector<float> y(p.shape.rows * p.shape.out, NAN);
  const float* x = picture ? picture->x.data() : p.x.data();
  if (kind < 2) {
    const Tiles tiles = {p.shape,         x, p.tiles.data(), p.scales(p.w_p),
                         p.scales(p.w_n), y.data()};
    if (picture) {
      convolve(tiles, picture->images, kind == 1, isa, pool);
    } else {
      multiply(tiles, kind == 1, isa, pool);
    }
    return y;
  }
  const bool wide = kind == 3;
  const void* inputs = wide ? static_cast<const void*>(p.wide.data())
                            : static_cast<const void*>(p.narrow.data());
  const Lists lists = {p.shape,        x, inputs, wide, p.begin.data(),
                       p.scales(p.w_p), p.scales(p.w_n), y.data()};
  if (picture) {
    convolve(lists, picture->images, isa, pool);
  } else {
    multiply(lists, isa, pool);
  }
  return y;
}

void compare(const Problem& p, Isa isa, Pool& pool,
             const Picture* picture = nullptr) {
  const int number = static_cast<int>(isa);
  compare_floats(p, run(p, 0, isa, pool, picture), number);
  compare_int8(p, run(p, 1, isa, pool, picture), number);
  if (p.shape.groups > 1) return;
  compare_floats(p, run(p, 2, isa, pool, picture), number);
  compare_floats(p, run(p, 3, isa, pool, picture), number);
}

}  // namespace

int main(int argc, char** argv) {
  const int shapes = argc > 1 ? std::atoi(argv[1]) : 100;
  const int runs = argc > 2 ? std::atoi(argv[2]) : 100;
  std::mt19937 random(0);
  Threads pool(4);
  int sets = 0;
  for (int isa = 0; isa < 3; ++isa) {
    if (!has_isa(static_cast<Isa>(isa))) continue;
    ++sets;
    std::printf("isa %d\n", isa);
    for (int i = 0; i < shapes; ++i) {
      const int64_t groups = i % 3 ? 1 : 1 + random() % 5;
      const int64_t group = 1 + random() % (300 / groups);
      const double zeros = i % 4 ? .4 : .95;
      const Problem p = make(random, 1 + random() % 20, group, groups,
                             1 + random() % 300, random() % 2, zeros);
      compare(p, static_cast<Isa>(isa), pool);
      const Picture picture =
          make_picture(random, 12, 1 + random() % 40, random() % 2, zeros);
      compare(picture.problem, static_cast<Isa>(isa), pool, &picture);
    }
    const Problem p = make(random, 33, 64, 2, 600, false, .4);
    const Problem q = make(random, 33, 1024, 1, 600, false, .4);
    Picture picture;
    do {
      picture = make_picture(random, 40, 200, false, .4);
    } while (picture.problem.shape.groups > 1 ||
             picture.problem.shape.rows < 600);
    for (int kind = 0; kind < 8; ++kind) {
      const Picture* images = kind < 4 ? nullptr : &picture;
      const Problem& problem = images ? picture.problem : kind < 2 ? p : q;
      const auto call = [&] {
        return run(problem, kind % 4, static_cast<Isa>(isa), pool, images);
      };
      const auto wanted = call();
      std::vector<std::thread> callers;
      for (int i = 0; i < 4; ++i) {
        callers.emplace_back([&] {
          for (int n = 0; n < runs / 4; ++n) {
            const auto y = call();
            if (std::memcmp(y.data(), wanted.data(), 4 * y.size())) {
              fail("differs", problem, isa);
            }
          }
        });
      }
      for (std::thread& caller : callers) caller.join();
    }
  }
  if (!sets) std::printf("no instruction set\n");
  return sets ? 0 : 2;
}
