// Runs the fused path's host side with the mock runtime, and prints the launch as JSON.
//
//   launch sweep|weigh rows columns width stride_x stride_y stride_out KIND bf16|fp16 [refused|x|out]
//     refused: the launch fails;  x, out: the tensor begins two bytes later
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cuda/sm90/api.h"
#include "kinds.h"
#include "mock.h"

namespace cuda = fastclip::cuda;

namespace {

cuda::ChunkView view;
cuda::Folding folding;
cuda::PairWeights weights;
bool is_sweep, arguments_arrive = false;
std::vector<uint64_t> maps_in_parameters;

template <class T>
T* address(uint64_t at) {
  return reinterpret_cast<T*>(at);
}

bool same(const cuda::Partials& a, const cuda::Partials& b) {
  return a.data == b.data && a.parts == b.parts && a.line == b.line && a.part == b.part;
}
bool same(const cuda::Scalar& a, const cuda::Scalar& b) { return a.at == b.at && a.dtype == b.dtype; }
bool same(const cuda::ChunkView& a, const cuda::ChunkView& b) {
  return a.x == b.x && a.y == b.y && a.rows == b.rows && a.columns == b.columns && a.width == b.width &&
         a.factor_x == b.factor_x && a.factor_y == b.factor_y && same(a.scale, b.scale) && same(a.bias, b.bias) &&
         a.offset == b.offset && a.kind == b.kind;
}
bool same(const cuda::Folding& a, const cuda::Folding& b) {
  return a.shift == b.shift && a.positive == b.positive && same(a.rows, b.rows) && same(a.columns, b.columns);
}
bool same(const cuda::PairWeights& a, const cuda::PairWeights& b) {
  return a.shift_x == b.shift_x && a.shift_y == b.shift_y && a.shifts_differ == b.shifts_differ && a.a == b.a &&
         a.b == b.b && a.spread == b.spread && a.enlarged == b.enlarged && a.totals == b.totals &&
         a.total_parts == b.total_parts;
}

// The epilogue's arguments begin with the view, wherever they lie among the kernel's.
template <class T>
bool has_arguments(size_t at, const T& expected) {
  cuda::ChunkView p;
  T arguments;
  std::memcpy(&p, seen.parameters + at, sizeof p);
  std::memcpy(&arguments, seen.parameters + at + sizeof p, sizeof arguments);
  return same(p, view) && same(arguments, expected);
}

void look_at_parameters() {
  const size_t most = 1600;  // less than the size of the parameters
  for (size_t at = 0; at < most; at += 8) {
    uint64_t words[2];
    std::memcpy(words, seen.parameters + at, sizeof words);
    if (words[0] == kMapMark) maps_in_parameters.push_back(words[1]);
    if (words[0] != reinterpret_cast<uint64_t>(view.x) || words[1] != reinterpret_cast<uint64_t>(view.y)) continue;
    arguments_arrive = is_sweep ? has_arguments(at, folding) : has_arguments(at, weights);
  }
}

template <class T>
void print(const char* name, const std::vector<T>& values) {
  std::printf("\"%s\": [", name);
  for (size_t k = 0; k < values.size(); k++) std::printf("%s%llu", k ? ", " : "", (unsigned long long)values[k]);
  std::printf("]");
}

}  // namespace

int main(int count, char** given) {
  if (count < 10) return 2;
  is_sweep = std::string(given[1]) == "sweep";
  view.rows = std::atoll(given[2]), view.columns = std::atoll(given[3]), view.width = std::atoll(given[4]);
  view.stride_x = std::atoll(given[5]), view.stride_y = std::atoll(given[6]);
  fastclip::PORTABLE::Kinds::each_name([&](fastclip::KindIndex kind, const char* name) {
    if (std::string(given[8]) == name) view.kind = kind;
  });
  view.dtype = std::string(given[9]) == "bf16" ? fastclip::Dtype::kBFloat16 : fastclip::Dtype::kHalf;
  view.x = address<void>(0x10000), view.y = address<void>(0x20000);
  view.factor_x = address<float>(0x30004), view.factor_y = address<float>(0x40008);
  view.scale = {address<void>(0x50000), fastclip::Dtype::kFloat};
  view.bias = {address<void>(0x60000), fastclip::Dtype::kHalf};
  view.offset = -3;
  view.stream = address<CUstream_st>(0x70);
  folding.shift = address<float>(0x80000), folding.positive = address<double>(0x90000);
  folding.rows = {address<float>(0xa0000), cuda::fused_row_parts(view), 1, view.rows};
  folding.columns = {address<float>(0xb0000), cuda::fused_column_parts(view), 5, 7};
  weights.shift_x = address<float>(0xc0000), weights.shift_y = address<float>(0xd0000);
  weights.shifts_differ = address<int32_t>(0xe0000);
  weights.a = address<float>(0xf0004), weights.b = address<float>(0x100008);
  weights.out = address<void>(0x110000), weights.stride_out = std::atoll(given[7]);
  weights.spread = false, weights.enlarged = 8192;
  weights.totals = address<float>(0x120000), weights.total_parts = cuda::fused_total_parts(view);
  const std::string oddity = count > 10 ? given[10] : "";
  if (oddity == "refused") seen.fails = cudaErrorInvalidValue;
  if (oddity == "x") view.x = address<void>(0x10002);
  if (oddity == "out") weights.out = address<void>(0x110002);
  seen.on_launch = look_at_parameters;

  std::string error;
  try {
    if (is_sweep)
      cuda::fused_sweep(view, folding);
    else
      cuda::fused_weigh(view, weights);
  } catch (const std::exception& e) {
    error = e.what();
  }
  std::printf("{\"error\": \"%s\", \"launches\": %d, \"grid\": [%u, %u, %u], \"block\": [%u, %u, %u], ", error.c_str(),
              seen.launches, seen.grid.x, seen.grid.y, seen.grid.z, seen.block.x, seen.block.y, seen.block.z);
  std::printf("\"cluster\": %u, \"shared\": %zu, \"shared_limit\": %d, \"stream\": %llu, ", seen.cluster.x, seen.shared,
              seen.shared_limit, (unsigned long long)seen.stream);
  std::printf("\"arguments_arrive\": %s, ", arguments_arrive ? "true" : "false");
  print("maps_in_parameters", maps_in_parameters);
  std::printf(", \"maps\": [");
  for (size_t k = 0; k < seen.maps.size(); k++) {
    const TensorMap& map = seen.maps[k];
    std::printf("%s{\"address\": %llu, \"type\": %u, \"swizzle\": %u, \"fill\": %u, \"is_legal\": %s, ", k ? ", " : "",
                (unsigned long long)map.address, map.type, map.swizzle, map.fill, map.is_legal ? "true" : "false");
    print("sizes", map.sizes);
    std::printf(", ");
    print("strides", map.strides);
    std::printf(", ");
    print("box", map.box);
    std::printf("}");
  }
  std::printf("], \"row_parts\": %lld, \"column_parts\": %lld, \"total_parts\": %lld}\n",
              (long long)cuda::fused_row_parts(view), (long long)cuda::fused_column_parts(view),
              (long long)cuda::fused_total_parts(view));
}
