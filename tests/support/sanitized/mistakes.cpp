// Mistakes that the sanitizers must see in a library that Python loads.
#include <climits>
#include <vector>

extern "C" int overrun(int place) {
  const std::vector<int> eight(8);
  return eight.data()[place];
}

extern "C" int overflow(int more) { return INT_MAX + more; }
