// Runs the CPU engine on small random blocks, without torch.
//
//   driver results SEED SECONDS   all results have the bits of one thread's, for any number of threads that wait at
//                                 random; each case first sweeps, then weighs
//   driver failures SEED SECONDS  an allocation or a product that fails in one thread is an error of the call, and the
//                                 next call is right
// Sanitizers end the program at their first report. A call that hangs ends it after kMostSeconds.
#include <signal.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <thread>

#include "ATen/ATen.h"
#include "ATen/Parallel.h"
#include "block.h"
#include "kinds.h"

namespace {

constexpr unsigned kMostSeconds = 10;
using Clock = std::chrono::steady_clock;

// How many more products or allocations succeed before one fails; negative: all.
std::atomic<int> products_left{-1}, allocations_left{-1};
std::atomic<bool> waits{false};

bool fails(std::atomic<int>& left) { return left.load() >= 0 && left.fetch_sub(1) == 0; }

void end_of_patience(int) {
  static const char text[] = "the engine hangs\n";
  if (write(2, text, sizeof text - 1)) _exit(3);
}

int run(Problem& p) {
  alarm(kMostSeconds);
  const int workers = fastclip::ENGINE::run(p);
  alarm(0);
  return workers;
}

// A sweep, one with running maxima from the kept products, a weigh, and both in one go.
std::string results(const Case& c, unsigned seed, int threads) {
  at::threads = threads;
  Block block(c, seed);
  Problem& p = block.p;
  p.fold = true;
  run(p);
  std::string found = block.outputs();
  if (fastclip::PORTABLE::has_shift(c.kind)) {
    p.running_maxima = p.teacher.running_maxima = true, p.kept_ready = true;
    run(p);
    found += block.outputs();
  }
  p.fold = false, p.kept_ready = true;
  block.prepare_weigh(seed % 2);
  run(p);
  found += block.outputs();
  if (fastclip::PORTABLE::is_linear(c.kind) && p.is_plain() && !c.same_id_positive) {
    Block again(c, seed);
    again.prepare_weigh(true);
    again.p.fold = true, again.p.kept_rows = 0;
    run(again.p);
    found += again.outputs();
  }
  return found;
}

int number_of_kinds() {
  int count = 0;
  fastclip::PORTABLE::Kinds::each_name([&](fastclip::KindIndex, const char*) { count++; });
  return count;
}

Case random_case(std::mt19937& random) {
  const auto pick = [&](std::initializer_list<int64_t> values) { return values.begin()[random() % values.size()]; };
  const auto maybe = [&](int of) { return random() % of == 0; };
  Case c;
  c.dtype = Dtype(random() % 4);
  c.kind = fastclip::KindIndex(random() % number_of_kinds());
  const bool levels = fastclip::PORTABLE::has_levels(c.kind);
  c.m = pick({1, 2, 3, 15, 16, 17, 63, 64, 65, 97, 129, 257, 300, 383});
  c.n = pick({1, 2, 3, 7, 13, 31, 63, 64, 65, 97, 127, 129, 191});
  if (maybe(40)) c.n = 1025;  // wide tiles
  c.d = pick({1, 2, 7, 16, 17, 31, 96, 129});
  if (maybe(30)) c.d = 832;
  c.offset = pick({0, 0, -1, 1, 63, 64, 65, -70, 5000});
  c.same_id_positive = !levels && maybe(4);
  c.ids = maybe(3), c.thresholds = maybe(3), c.key_bias = maybe(4);
  c.taught = !levels && !c.key_bias && maybe(5);
  c.guided = !c.taught && maybe(6);
  c.normalized = maybe(2), c.pad = pick({0, 0, 3});
  c.kept = pick({0, 16, 64, c.m, c.m + 40});
  c.kept = std::min(c.kept, (c.m + 15) / 16 * 16);
  c.brgemm = maybe(2), c.bf16_products = c.brgemm;
  return c;
}

int report(int cases, int failures) {
  std::printf("%d cases, %d failures\n", cases, failures);
  return failures > 0;
}

int check_results(unsigned seed, double seconds) {
  std::mt19937 random(seed);
  int cases = 0, failures = 0;
  for (const auto begun = Clock::now(); std::chrono::duration<double>(Clock::now() - begun).count() < seconds;
       cases++) {
    const Case c = random_case(random);
    const unsigned own = random();
    waits = false;
    const std::string right = results(c, own, 1);
    waits = true;
    for (const int threads : {2, 3, 5})
      if (results(c, own, threads) != right) {
        failures++;
        std::printf("case %d: %d threads change the bits: (%ld, %ld, %ld), dtype %d, kind %d\n", cases, threads, c.m,
                    c.n, c.d, int(c.dtype), int(c.kind));
      }
  }
  return report(cases, failures);
}

int check_failures(unsigned seed, double seconds) {
  std::mt19937 random(seed);
  int cases = 0, failures = 0;
  const fastclip::KindIndex kind{};
  for (const auto begun = Clock::now(); std::chrono::duration<double>(Clock::now() - begun).count() < seconds;
       cases++) {
    Case c{Dtype(random() % 4), kind, 300, 191, 16};
    const unsigned own = random();
    waits = false;
    const std::string right = results(c, own, 1);
    waits = true;
    const bool allocation = cases % 2;
    // The first sweep has 5 strips of 3 tiles, and 4 threads that allocate once each.
    (allocation ? allocations_left : products_left) = allocation ? random() % 4 : random() % 15;
    const char* error = "none";
    try {
      results(c, own, 4);
    } catch (const std::bad_alloc&) {
      error = "allocation";
    } catch (const std::domain_error&) {
      error = "product";
    } catch (...) {
      error = "another";
    }
    alarm(0);
    allocations_left = products_left = -1;
    if (std::string(error) != (allocation ? "allocation" : "product")) {
      failures++;
      std::printf("case %d: the error must be that of the %s, got %s\n", cases, allocation ? "allocation" : "product",
                  error);
    }
    if (results(c, own, 4) != right) {
      failures++;
      std::printf("case %d: the call after the error is wrong\n", cases);
    }
  }
  return report(cases, failures);
}

}  // namespace

void before_product() {
  if (fails(products_left)) throw std::domain_error("a product fails");
  if (!waits) return;
  thread_local std::mt19937 random(std::hash<std::thread::id>()(std::this_thread::get_id()));
  const unsigned chance = random() % 16;
  if (chance == 0) std::this_thread::sleep_for(std::chrono::microseconds(random() % 200));
  if (chance < 4) std::this_thread::yield();
}

// The linker calls these in place of the C library's function.
extern "C" void* __real_aligned_alloc(size_t, size_t);
extern "C" void* __wrap_aligned_alloc(size_t alignment, size_t bytes) {
  return fails(allocations_left) ? nullptr : __real_aligned_alloc(alignment, bytes);
}

int main(int count, char** arguments) {
  if (count != 4) return 2;
  signal(SIGALRM, end_of_patience);
  const std::string what = arguments[1];
  const auto check = what == "results" ? check_results : check_failures;
  return check(unsigned(std::atoi(arguments[2])), std::atof(arguments[3]));
}
