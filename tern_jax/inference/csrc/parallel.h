// A loop whose turns other threads may take.
#ifndef TERN_JAX_PARALLEL_H_
#define TERN_JAX_PARALLEL_H_

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

}  // namespace tern_jax

#endif  // TERN_JAX_PARALLEL_H_
