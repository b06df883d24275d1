// In place of torch's header: parallel loops on threads that are made for each loop. ThreadSanitizer follows these; it
// does not know the barriers of OpenMP's library.
#pragma once

#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

namespace at {

inline int threads = 1;
inline int get_num_threads() { return threads; }
inline int64_t divup(int64_t a, int64_t b) { return (a + b - 1) / b; }

// One thread for each index.
template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t, const F& f) {
  std::vector<std::thread> workers;
  for (int64_t i = begin; i < end; i++) workers.emplace_back([&f, i] { f(i, i + 1); });
  for (std::thread& worker : workers) worker.join();
}

template <class T, class F, class Join>
T parallel_reduce(int64_t begin, int64_t end, int64_t, T identity, const F& f, const Join&) {
  return f(begin, end, identity);
}

}  // namespace at
