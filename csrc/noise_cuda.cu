// add_noise on an NVIDIA GPU: one pass, noise made in registers, 16-byte accesses where both rows are aligned.
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "noise.h"

namespace bpo {
namespace {

constexpr int kThreads = 256;

// A thread's share: 16 bytes, so 4 elements of fp32 (one Philox block) or 8 of a 16-bit type (two blocks).
template <typename T>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / sizeof(typename T::Word);
  typename T::Word words[kSize];
};

// `packs` packs a row; pack p of row r is pack r * packs + p of the launch. Only the last pack of a row can be short.
template <typename T, bool kAligned>
__global__ void __launch_bounds__(kThreads) noise_kernel(const NoiseArguments a, int64_t packs) {
  constexpr int kSize = Pack<T>::kSize;
  using Word = typename T::Word;
  const int64_t total = a.rows * packs;
  const int64_t hop = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < total; i += hop) {
    const int64_t row = i / packs;
    const int64_t begin = (i - row * packs) * kSize;
    const int64_t step = a.steps ? a.steps[row] : 0;
    const uint64_t id = static_cast<uint64_t>(a.ids ? a.ids[row] : row);
    const float scale = a.scales[2 * step], noise_scale = a.scales[2 * step + 1];
    const Word* x = static_cast<const Word*>(a.x) + row * a.x_stride + begin;
    Word* out = static_cast<Word*>(a.out) + row * a.out_stride + begin;
    const bool whole = begin + kSize <= a.n;

    Pack<T> pack;
    if (kAligned && whole) {
      *reinterpret_cast<uint4*>(&pack) = *reinterpret_cast<const uint4*>(x);
    } else {
#pragma unroll
      for (int j = 0; j < kSize; ++j) pack.words[j] = begin + j < a.n ? x[j] : Word(0);
    }
#pragma unroll
    for (int j = 0; j < kSize; j += 4) {
      const uint64_t block = static_cast<uint64_t>(begin + j) / 4;
      uint32_t words[4] = {static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32),
                           static_cast<uint32_t>(id), static_cast<uint32_t>(id >> 32)};
      philox4x32_10(words, static_cast<uint32_t>(a.seed), static_cast<uint32_t>(a.seed >> 32));
      float eps[4];
      normal_pair(words[0], words[1], eps[0], eps[1]);
      normal_pair(words[2], words[3], eps[2], eps[3]);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        pack.words[j + k] = T::store(mix(T::load(pack.words[j + k]), eps[k], scale, noise_scale));
      }
    }
    if (kAligned && whole) {
      *reinterpret_cast<uint4*>(out) = *reinterpret_cast<const uint4*>(&pack);
    } else {
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        if (begin + j < a.n) out[j] = pack.words[j];
      }
    }
  }
}

void check(cudaError_t status, const std::string& what) {
  if (status != cudaSuccess) {
    throw std::runtime_error("add_noise could not " + what + ": " + cudaGetErrorString(status) + " (CUDA error " +
                             std::to_string(status) + "); run `bpo-fast doctor` to see what this machine has");
  }
}

template <typename T>
void launch(const NoiseArguments& a, int device, cudaStream_t stream) {
  int processors = 0, blocks_per_processor = 0;
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "read the attributes of the GPU");

  constexpr int64_t kSize = Pack<T>::kSize;
  const int64_t packs = (a.n + kSize - 1) / kSize;
  // A row is 16-byte aligned when the base and the row stride are.
  const auto aligned_row = [](const void* base, int64_t stride) {
    return reinterpret_cast<uintptr_t>(base) % 16 == 0 && stride % kSize == 0;
  };
  const bool aligned = aligned_row(a.x, a.x_stride) && aligned_row(a.out, a.out_stride);
  const auto kernel = aligned ? noise_kernel<T, true> : noise_kernel<T, false>;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks_per_processor, kernel, kThreads, 0),
        "size its launch on the GPU");
  const int64_t wanted = (a.rows * packs + kThreads - 1) / kThreads;
  const int64_t resident = static_cast<int64_t>(processors) * std::max(blocks_per_processor, 1);
  const auto blocks = static_cast<unsigned>(std::min(wanted, resident));
  kernel<<<blocks, kThreads, 0, stream>>>(a, packs);
  check(cudaGetLastError(), "start its kernel on the GPU");
}

}  // namespace

int cuda_device_count() {
  int count = 0;
  // Without a driver this is an error, and the answer is still 0.
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

void noise_cuda(const NoiseArguments& a, int dtype, int device, void* stream) {
  if (a.rows == 0 || a.n == 0) return;
  // The static runtime keeps its own current device, whatever the caller's runtime has made current.
  check(cudaSetDevice(device), "use GPU " + std::to_string(device));
  const auto queue = static_cast<cudaStream_t>(stream);
  if (dtype == kFloat32) launch<Float32>(a, device, queue);
  if (dtype == kBFloat16) launch<BFloat16>(a, device, queue);
  if (dtype == kFloat16) launch<Float16>(a, device, queue);
}

}  // namespace bpo
