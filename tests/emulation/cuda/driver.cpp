// Tests the CUDA engine, its kernels emulated on the CPU, against a dense float64 truth.
//
//   driver          every case
//   driver quick    a few, for builds under ThreadSanitizer
//   driver TEXT     those whose names contain it
//
// Every case runs with thread blocks in order and once more in reverse order, and both results must agree to the bit.
// Exits with 1 and names the results that were wrong.
#include <cuda_runtime.h>

#include <cstdio>
#include <functional>
#include <string>

#include "run.h"

namespace driver {
namespace {

int run(const Case& c) {
  Judge judge(c.name);
  emulation::reversed = false;
  const Numbers forward = Run(c, judge).results();
  emulation::reversed = true;
  const Numbers backward = Run(c, judge).results();
  judge.expect(forward.size() == backward.size() &&
                   std::memcmp(forward.data(), backward.data(), forward.size() * sizeof(double)) == 0,
               "results depend on the order of blocks or threads");
  return judge.failures();
}

// ---- cases ---------------------------------------------------------------------------------------------------------

const char* name_of(Dtype dtype) {
  return dtype == Dtype::kFloat ? "fp32" : dtype == Dtype::kBFloat16 ? "bf16" : dtype == Dtype::kHalf ? "fp16" : "fp64";
}

constexpr Dtype kDtypes[] = {Dtype::kFloat, Dtype::kBFloat16, Dtype::kHalf};
constexpr Dtype kScalars[] = {Dtype::kDouble, Dtype::kFloat, Dtype::kBFloat16, Dtype::kHalf};

struct Cases {
  std::vector<Case> all;

  void add(Case c, const std::string& what) {
    c.name = what + ", " + c.kind + " " + name_of(c.dtype) + " " + std::to_string(c.m) + " x " + std::to_string(c.n) +
             " x " + std::to_string(c.d);
    all.push_back(c);
  }

  // Edges of the tiles, 64 x 256 and 64 x 64, and of a warp's 8 rows. Options take turns, in ever new combinations.
  void shapes(const Case& base) {
    struct Shape {
      int64_t m, n, d;
    };
    for (const Shape& shape : {Shape{1, 1, 1},
                               {1, 40, 7},
                               {40, 1, 24},
                               {3, 5, 1},
                               {63, 255, 7},
                               {64, 256, 8},
                               {65, 257, 24},
                               {130, 70, 24},
                               {9, 300, 33},
                               {300, 9, 4}}) {
      Case c = base;
      c.m = shape.m, c.n = shape.n, c.d = shape.d;
      const size_t turn = all.size();
      c.factor_x = turn % 2, c.factor_y = turn / 2 % 2;
      c.gap = turn % 3 == 0 ? 1 : turn % 3 == 1 ? 0 : 4;
      c.lead = turn % 5 == 0 ? 1 : 0;
      c.scalar = kScalars[turn % 4];
      c.project = turn % 7 != 0;
      c.has_bound = turn % 3 == 1;
      const int64_t offsets[] = {0, 2, -3, c.n - 1 - c.m / 4, 1 + c.n / 4 - c.m, c.n, -c.m, -(int64_t(1) << 40)};
      c.offset = offsets[turn % 8];
      c.quick = shape.m == 65;
      add(c, "edges, offset " + std::to_string(c.offset));
    }
  }

  void offsets(const Case& base) {
    for (const int64_t offset : {0, 5, -5, 60, -50, 67, -70}) {
      Case c = base;
      c.m = 70, c.n = 67, c.d = 16, c.offset = offset, c.factor_x = c.factor_y = true;
      add(c, "offset " + std::to_string(offset));
      c.chunk_rows = 32, c.chunk_columns = 24, c.quick = offset == 5 && base.dtype == Dtype::kHalf;
      add(c, "chunks, offset " + std::to_string(offset));
    }
  }

  void needs(const Case& base) {
    for (const int needs : {0, 1, 2}) {
      const std::string what = needs == 0 ? "no gradient" : needs == 1 ? "only dx" : "only dy";
      Case c = base;
      c.m = 33, c.n = 40, c.d = 8, c.factor_x = true, c.needs_x = needs == 1, c.needs_y = needs == 2;
      add(c, what);
      c.kept_rows = 20, c.chunk_rows = 16, c.chunk_columns = 24;
      add(c, what + ", kept products");
    }
  }

  void kept_products(const Case& base) {
    for (const int64_t kept : {1, 20, 33}) {
      Case c = base;
      c.m = 33, c.n = 41, c.d = 12, c.factor_y = true, c.kept_rows = kept, c.offset = -3;
      add(c, "kept products, " + std::to_string(kept));
      c.n = 40, c.chunk_rows = 16, c.chunk_columns = 20, c.quick = kept == 20 && base.dtype == Dtype::kFloat;
      add(c, "kept products, chunks, " + std::to_string(kept));
    }
  }

  void gradient_dtypes(const Case& base) {
    for (const Dtype x : kDtypes)
      for (const Dtype y : kScalars) {
        Case c = base;
        c.m = 20, c.n = 30, c.d = 8 + (x == y), c.gradient_x = x, c.gradient_y = y, c.factor_x = true;
        c.lead = x == y && x == Dtype::kHalf;
        add(c, std::string("gradients in ") + name_of(x) + " and " + name_of(y));
      }
  }

  // Within and beyond the reach of one shift.
  void scales(const Case& base) {
    for (const double scale : {0., -14.3, 120., 1e4}) {
      Case c = base;
      c.m = 70, c.n = 65, c.d = 24, c.offset = 1, c.scale = scale;
      c.quick = scale == 1e4 && base.dtype == Dtype::kFloat;
      add(c, "scale " + std::to_string(int(scale)));
      c.factor_x = c.factor_y = true, c.chunk_rows = 32, c.chunk_columns = 32, c.quick = false;
      add(c, "scale " + std::to_string(int(scale)) + ", normalised, chunks");
    }
  }

  void odd_features(const Case& base) {
    Case c = base;
    c.m = 66, c.n = 70, c.d = 24, c.longest = 30;
    add(c, "one long feature");
    if (c.dtype != Dtype::kHalf) {
      Case alone = c;
      alone.m = alone.n = 1, alone.longest = 1e30;
      add(alone, "nothing but a positive, a norm that overflows");
    }
    c.longest = 1, c.factor_x = true, c.has_zero_row = true;
    add(c, "a zero row, projected");
    c.project = false;
    add(c, "a zero row");
  }

  void squares(const Case& base) {
    Case c = base;
    c.m = c.n = 20;
    add(c, "square");
    c.has_bias = false;
    add(c, "no bias");
  }

  // Each option alone and all together, in one tile and in several, at scales for which one shift is enough and not.
  void masks(const Case& base) {
    struct Option {
      const char* name;
      void (*set)(Case&);
    };
    for (const Option& option : {
             Option{"ids", [](Case& c) { c.ids = 5; }},
             Option{"one id", [](Case& c) { c.ids = 1; }},
             Option{"ids, lines untold", [](Case& c) { c.ids = 1, c.tells_occupied = false; }},
             Option{"positives by id", [](Case& c) { c.ids = 9, c.same_id_positive = true; }},
             Option{"margin", [](Case& c) { c.margin = -0.3; }},
             Option{"key bias", [](Case& c) { c.key_bias = 4, c.needs_key_bias = true; }},
             Option{"high key bias", [](Case& c) { c.key_bias = 1, c.key_bias_mean = 200; }},
             Option{"low key bias", [](Case& c) { c.key_bias = 1, c.key_bias_mean = -2000; }},
             Option{"a key bias's gradient alone", [](Case& c) { c.needs_key_bias = true; }},
             Option{"ids and key bias", [](Case& c) { c.ids = 6, c.key_bias = 2; }},
             Option{"everything",
                    [](Case& c) {
                      c.ids = 9, c.same_id_positive = c.needs_key_bias = true, c.margin = -0.2, c.key_bias = 2;
                      c.has_vanishing = c.kind != "sigmoid";  // softplus(-s) would be infinite
                    }},
         }) {
      Case c = base;
      c.m = 70, c.n = 67, c.d = 16;
      option.set(c);
      c.same_id_positive = c.same_id_positive && !c.is_hinge();
      const bool is_all = option.name == std::string("everything");
      for (const int64_t offset : {0, -7, 1000}) {
        c.offset = offset, c.factor_x = offset == 0, c.factor_y = offset < 0, c.has_bound = offset > 0;
        c.quick = is_all && offset == 0 && base.dtype == Dtype::kFloat;
        add(c, std::string(option.name) + ", offset " + std::to_string(offset));
      }
      c.offset = 5, c.chunk_rows = 32, c.chunk_columns = 24, c.kept_rows = 40, c.quick = false;
      add(c, std::string(option.name) + ", chunks, some kept");
      c.m = 20, c.n = 300, c.chunk_rows = c.chunk_columns = c.kept_rows = 0;
      c.quick = is_all && base.dtype == Dtype::kHalf;
      add(c, std::string(option.name) + ", two tiles");
      c.scale = 1000, c.quick = is_all && base.dtype == Dtype::kBFloat16;
      add(c, std::string(option.name) + ", beyond one shift");
      c.scale = -300, c.quick = c.needs_x = c.needs_y = false;
      add(c, std::string(option.name) + ", beyond one shift, no gradient");
    }
  }

  void tf32(const Case& base) {
    Case c = base;
    c.m = 40, c.n = 70, c.d = 12, c.tf32 = true, c.gap = 3, c.quick = true;
    add(c, "tf32");
    c.factor_x = c.factor_y = true, c.quick = false;
    add(c, "tf32, normalised");
    c.target_width = 9;
    add(c, "tf32, a teacher");
  }

  // A teacher and a guide, alone and with every other option, on tiles and chunks.
  void targets(const Case& base) {
    for (const bool guided : {false, true}) {
      Case c = base;
      c.m = 70, c.n = 67, c.d = 16, c.target_width = 21, c.guided = guided, c.gap = 1, c.lead = 1;
      if (guided) c.margin = -0.3;
      const std::string name = guided ? "a guide" : "a teacher";
      add(c, name);
      c.chunk_rows = 32, c.chunk_columns = 48;
      add(c, name + ", chunks");
      c.chunk_rows = c.chunk_columns = 0;
      c.factor_x = true, c.offset = -7, c.m = 65, c.n = 257, c.quick = base.dtype == Dtype::kBFloat16;
      add(c, name + ", edges");
      c.ids = 9, c.same_id_positive = !c.is_hinge(), c.needs_key_bias = true, c.margin = -0.2, c.key_bias = 2;
      c.has_vanishing = c.is_softmax(), c.quick = base.dtype == Dtype::kFloat;
      add(c, name + " and everything");
      c.m = 70, c.n = 67, c.chunk_rows = 32, c.chunk_columns = 48, c.kept_rows = 40, c.quick = false;
      add(c, name + " and everything, chunks, some kept");
      for (const double scale : {0., 1000., -300.}) {
        c.scale = guided ? scale : 14.3, c.target_scale = guided ? 20. : scale;
        add(c, name + ", scale " + std::to_string(int(scale)));
      }
      c.m = c.n = c.d = c.target_width = 1, c.chunk_columns = c.offset = c.kept_rows = 0;
      c.scale = 14.3, c.key_bias = 0, c.needs_key_bias = c.same_id_positive = false;
      add(c, name + ", nothing but a positive");
    }
  }
};

std::vector<Case> cases() {
  Cases cases;
  for (const char* const kind : {"softmax", "sigmoid", "hinge"})
    for (const Dtype dtype : kDtypes) {
      Case base;
      base.kind = kind, base.dtype = dtype;
      cases.shapes(base), cases.offsets(base), cases.kept_products(base), cases.scales(base), cases.masks(base);
      cases.targets(base);
      if (base.is_hinge()) continue;  // the other cases are about steps that all kinds share
      cases.needs(base), cases.gradient_dtypes(base), cases.odd_features(base), cases.squares(base);
      if (dtype == Dtype::kFloat) cases.tf32(base);
    }
  return cases.all;
}

// ---- errors --------------------------------------------------------------------------------------------------------

std::string message_of(const std::function<void()>& f) {
  try {
    f();
  } catch (const std::exception& error) {
    return error.what();
  }
  return "";
}

int refusals() {
  Judge judge("refusals");
  const Numbers ones(12, 1.);
  Case c;
  c.m = 3, c.n = 3, c.d = 4;
  Features x = place(ones, 3, c, false), y = place(ones, 3, c, false);
  const One scale(1, Dtype::kFloat);
  const Memory states(12 * 8), positives(3 * 8);
  Block b;
  b.x = x.side, b.y = y.side, b.width = 4, b.scale = scale.scalar;
  double* const state = states.as<double>();
  b.x.negatives.shift = state, b.y.negatives.shift = state + 3;
  b.x.negatives.sum = state + 6, b.y.negatives.sum = state + 9;
  Library library;
  cuda::Sweeping sweeping;
  sweeping.positive = positives.as<double>();
  const auto sweep = [&] { cuda::sweep(b, sweeping, library); };
  emulation::fail_next_launch(cudaErrorLaunchFailure);
  const std::string failure = message_of(sweep);
  judge.expect(failure.find("_kernel") != std::string::npos && failure.find("3 x 3") != std::string::npos &&
                   failure.find("unspecified launch failure") != std::string::npos,
               "a failed launch is reported as '" + failure + "'");
  judge.expect(cudaGetLastError() == cudaSuccess, "the error of a failed launch stays behind");
  judge.expect(message_of(sweep).empty(), "a sweep fails after one that failed");
  b.dtype = Dtype::kDouble;
  judge.expect(message_of(sweep).find("float64") != std::string::npos, "float64 features are not refused");
  b.dtype = Dtype::kFloat;
  judge.expect(!message_of([&] { cuda::sweep_and_weigh(b, positives.as<double>(), {}, library); }).empty(),
               "softmax in one go is not refused");
  const Memory ids(3 * 4);
  b.kind = kind_of("sigmoid"), b.x.ids = b.y.ids = ids.as<int32_t>();
  const std::string refusal = message_of([&] { cuda::sweep_and_weigh(b, positives.as<double>(), {}, library); });
  judge.expect(refusal.find("no ids") != std::string::npos, "ids in one go are refused as '" + refusal + "'");
  return judge.failures();
}

}  // namespace
}  // namespace driver

int main(int count, char** arguments) {
  const std::string wanted = count > 1 ? arguments[1] : "";
  int ran = 0, failures = 0;
  for (const driver::Case& c : driver::cases()) {
    if (wanted == "quick" ? !c.quick : c.name.find(wanted) == std::string::npos) continue;
    failures += driver::run(c);
    ran++;
  }
  failures += driver::refusals();
  std::printf("%d cases, %d failures\n", ran, failures);
  return failures > 0 || ran == 0;
}
