// The part of the CUDA runtime that a launch needs, without a driver. The fused path cannot call other functions
// (allocation, copies, waiting), since it would not link.
#include "mock.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>

Seen seen;

namespace {

// The rules that the driver enforces, as cuTensorMapEncodeTiled documents them.
bool is_legal(const TensorMap& map, const cuuint32_t* steps, unsigned bytes) {
  bool legal = map.address % 16 == 0 && map.rank >= 3 && map.rank <= 5 && map.box[0] * bytes <= 128;
  for (unsigned d = 0; d < map.rank; d++)
    legal = legal && map.sizes[d] > 0 && map.sizes[d] <= uint64_t(1) << 32 && map.box[d] > 0 && map.box[d] <= 256 &&
            steps[d] == 1;
  for (const uint64_t stride : map.strides) legal = legal && stride % 16 == 0 && stride < uint64_t(1) << 40;
  return legal;
}

CUresult encode(CUtensorMap* out, CUtensorMapDataType type, cuuint32_t rank, void* address, const cuuint64_t* sizes,
                const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t* steps, CUtensorMapInterleave,
                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
  TensorMap map{reinterpret_cast<uint64_t>(address),
                unsigned(type),
                rank,
                {sizes, sizes + rank},
                {strides, strides + rank - 1},
                {box, box + rank},
                unsigned(swizzle),
                unsigned(fill),
                false};
  // CUTLASS declares loads as 16-bit integers and stores as their own dtype.
  const bool is_half = type == CU_TENSOR_MAP_DATA_TYPE_UINT16 || type == CU_TENSOR_MAP_DATA_TYPE_FLOAT16 ||
                       type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  map.is_legal = is_half && is_legal(map, steps, 2);
  const uint64_t contents[2] = {kMapMark, seen.maps.size()};
  std::memcpy(out, contents, sizeof contents);
  seen.maps.push_back(map);
  return map.is_legal ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

[[noreturn]] void unexpected(const char* what) {
  std::fprintf(stderr, "the fused path called %s\n", what);
  std::exit(3);
}

}  // namespace

extern "C" {

cudaError_t cudaGetDevice(int* device) {
  *device = 1;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (attribute != cudaDevAttrMultiProcessorCount || device != 1) unexpected("cudaDeviceGetAttribute for another");
  *value = 132;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) unexpected("cudaFuncSetAttribute for another");
  seen.kernel = kernel;
  seen.shared_limit = value;
  return cudaSuccess;
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel, void** arguments) {
  if (kernel != seen.kernel) unexpected("a kernel that was not granted its shared memory");
  seen.launches++;
  seen.grid = config->gridDim, seen.block = config->blockDim;
  seen.shared = config->dynamicSmemBytes, seen.stream = config->stream;
  for (unsigned k = 0; k < config->numAttrs; k++) {
    if (config->attrs[k].id != cudaLaunchAttributeClusterDimension) unexpected("cudaLaunchKernelExC, odd attributes");
    const auto& cluster = config->attrs[k].val.clusterDim;
    seen.cluster = {cluster.x, cluster.y, cluster.z};
  }
  seen.parameters = static_cast<const char*>(arguments[0]);
  if (seen.on_launch) seen.on_launch();
  return seen.fails;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "the mock's error"; }
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  if (std::strcmp(name, "cuTensorMapEncodeTiled") != 0) unexpected(name);
  *function = reinterpret_cast<void*>(&encode);
  *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

// The functions with which nvcc's objects register themselves.
void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char*, char*, const char*, int, uint3*, uint3*, dim3*, dim3*, int*) {}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
cudaError_t __cudaGetKernel(cudaKernel_t*, const void*) { return cudaSuccess; }
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) {
  unexpected("a launch by brackets");
}
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { unexpected("a launch by brackets"); }
}
