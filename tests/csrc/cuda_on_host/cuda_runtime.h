// Stands before the CUDA toolkit's header of this name, so that a host compiler can build csrc/noise_cuda.cu as it is:
// a launch runs its kernel on the host, one thread after the other. That is enough for kernels without shared memory,
// barriers and warp functions. What a GPU would refuse is an error here too: a grid over its limits, and a 16-byte
// access of memory that is not aligned to it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#define __global__
#define __host__
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorMisalignedAddress = 716
};
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };
using cudaStream_t = struct CUstream_st*;

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  void* attrs;
  unsigned numAttrs;
};

inline dim3 gridDim, blockDim, blockIdx, threadIdx;

// The GPU that is played: how many devices there are, whether there is code of the kernel for them, how much of a grid
// one holds at once. To look at a sample too large for memory: only the blocks of the grid's x run that are at most 8
// from its end or from a multiple of `every` (0: all, below 0: none). Then what the calls have shown: the current
// device, the last launch, its accesses that a GPU would have refused.
struct HostGpu {
  int64_t devices = 1;
  int64_t has_kernel = 1;
  int64_t processors = 1;
  int64_t blocks_per_processor = 1;
  int64_t every = 0;
  int64_t current_device = -1;
  int64_t stream = 0;
  int64_t blocks[3] = {};
  int64_t threads = 0;
  int64_t misaligned = 0;

  bool runs(int64_t x) const {
    return every == 0 || (every > 0 && (x >= blocks[0] - 8 || x % every <= 8 || x % every >= every - 8));
  }
};
inline HostGpu host_gpu;

// Packed, so that the compiler cannot take the alignment for granted that is to be checked.
struct __attribute__((packed, may_alias)) uint4 {
  uint32_t x, y, z, w;
  uint4& operator=(const uint4& other) {
    host_gpu.misaligned += (reinterpret_cast<uintptr_t>(this) | reinterpret_cast<uintptr_t>(&other)) % 16 != 0;
    memcpy(static_cast<void*>(this), &other, sizeof other);
    return *this;
  }
};

inline const char* cudaGetErrorString(cudaError_t status) {
  switch (status) {
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
    case cudaErrorNoKernelImageForDevice: return "no kernel image is available for execution on the device";
    case cudaErrorMisalignedAddress: return "misaligned address";
    default: return "no error";
  }
}

inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = static_cast<int>(host_gpu.devices);
  return cudaSuccess;
}

inline cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= host_gpu.devices) return cudaErrorInvalidDevice;
  host_gpu.current_device = device;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = static_cast<int>(host_gpu.processors);
  return cudaSuccess;
}

template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
  *blocks = static_cast<int>(host_gpu.blocks_per_processor);
  return cudaSuccess;
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  if (!host_gpu.has_kernel) return cudaErrorNoKernelImageForDevice;
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  const auto within = [](unsigned size, unsigned limit) { return size >= 1 && size <= limit; };
  if (!within(gridDim.x, 0x7FFFFFFF) || !within(gridDim.y, 65535) || !within(gridDim.z, 65535) ||
      !within(blockDim.x * blockDim.y, 1024) || blockDim.z != 1) {
    return cudaErrorInvalidConfiguration;
  }
  host_gpu.stream = reinterpret_cast<int64_t>(config->stream);
  host_gpu.blocks[0] = gridDim.x, host_gpu.blocks[1] = gridDim.y, host_gpu.blocks[2] = gridDim.z;
  host_gpu.threads = blockDim.x * blockDim.y;
  host_gpu.misaligned = 0;
  for (blockIdx.z = 0; blockIdx.z < gridDim.z; ++blockIdx.z) {
    for (blockIdx.y = 0; blockIdx.y < gridDim.y; ++blockIdx.y) {
      for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) {
        if (!host_gpu.runs(blockIdx.x)) continue;
        for (threadIdx.y = 0; threadIdx.y < blockDim.y; ++threadIdx.y) {
          for (threadIdx.x = 0; threadIdx.x < blockDim.x; ++threadIdx.x) kernel(arguments...);
        }
      }
    }
  }
  return host_gpu.misaligned ? cudaErrorMisalignedAddress : cudaSuccess;
}
