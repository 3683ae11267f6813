// Loops whose turns other threads may take.
#ifndef TERN_JAX_PARALLEL_H_
#define TERN_JAX_PARALLEL_H_

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>

#include "product.h"

namespace tern_jax {

// Calls turn(i) for each i < count, in this thread and those of the pool.
//
// The caller waits for turns that have begun only, never for a thread to become
// free: all of them may be waiting for loops of their own. A task that comes
// late finds no turn left, and touches nothing but the shared counters.
template <typename Turn>
void parallel_for(Pool& pool, int64_t count, const Turn& turn) {
  struct Loop {
    Loop(int64_t count, const Turn* turn) : count(count), turn(turn) {}

    // Takes turns until none is left.
    void work() {
      int64_t done_here = 0;
      for (int64_t i; (i = next.fetch_add(1)) < count; ++done_here) (*turn)(i);
      if (!done_here) return;
      std::lock_guard<std::mutex> lock(mutex);
      done += done_here;
      if (done == count) finished.notify_one();
    }

    const int64_t count;
    const Turn* const turn;  // there as long as a turn is left
    std::atomic<int64_t> next{0};
    std::mutex mutex;
    std::condition_variable finished;
    int64_t done = 0;
  };

  int64_t helpers = pool.threads() - 1;
  if (helpers > count - 1) helpers = count - 1;
  if (helpers < 1) {
    for (int64_t i = 0; i < count; ++i) turn(i);
    return;
  }
  auto loop = std::make_shared<Loop>(count, &turn);
  for (int64_t i = 0; i < helpers; ++i) {
    auto* held = new std::shared_ptr<Loop>(loop);
    pool.schedule(
        [](void* data) {
          std::unique_ptr<std::shared_ptr<Loop>> held(
              static_cast<std::shared_ptr<Loop>*>(data));
          (*held)->work();
        },
        held);
  }
  loop->work();
  std::unique_lock<std::mutex> lock(loop->mutex);
  loop->finished.wait(lock, [&] { return loop->done == count; });
}

// Products of a row and a weight below which no thread is asked for help: some
// 20 microseconds of work.
constexpr int64_t kWorth = int64_t{1} << 20;
// Turns a thread, of which the last ones even out what others have left.
constexpr int64_t kTurns = 4;

// Calls range(begin, end) for parts of `count`, each but the last a
// multiple of `grain`. What is summed must not depend on them.
template <typename Range>
void split(Pool& pool, int64_t count, int64_t grain, int64_t work,
           const Range& range) {
  if (work < kWorth || pool.threads() < 2) return range(0, count);
  const int64_t turns = kTurns * pool.threads();
  const int64_t grains = (count + grain - 1) / grain;
  const int64_t size = (grains + turns - 1) / turns * grain;
  parallel_for(pool, (count + size - 1) / size, [&](int64_t i) {
    range(i * size, std::min(count, (i + 1) * size));
  });
}

}  // namespace tern_jax

#endif  // TERN_JAX_PARALLEL_H_
