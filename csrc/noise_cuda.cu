// The noise ops on an NVIDIA GPU: one pass, noise made in registers, 16-byte accesses where every row is aligned.
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "noise.h"

namespace bpo {
namespace {

constexpr int kMaxThreads = 256;

// A thread's share of one type, moved 16 bytes at a time.
template <typename Word, int kSize>
struct alignas(16) Pack {
  static constexpr int kVectors = kSize * static_cast<int>(sizeof(Word)) / 16;
  Word words[kSize];

  __device__ __forceinline__ void load(const Word* from) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) reinterpret_cast<uint4*>(words)[v] = reinterpret_cast<const uint4*>(from)[v];
  }
  __device__ __forceinline__ void store(Word* to) const {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) reinterpret_cast<uint4*>(to)[v] = reinterpret_cast<const uint4*>(words)[v];
  }
};

// 16 bytes of the narrower type: 4 elements where both are fp32, else 8, of which the fp32 side has 32 bytes.
template <typename In, typename Out>
constexpr int kPackSize = sizeof(typename In::Word) == 4 && sizeof(typename Out::Word) == 4 ? 4 : 8;

// A grid of (packs of a line, lines of a sample, samples), each dimension with a stride, so that nothing is divided.
// Aligned: a line is what goes to one output row, kSize divides it, and every address is a multiple of 16 bytes.
// Otherwise: a line is the whole sample, its last pack may be short, and elements are moved one by one.
// `rows` is a.n / a.width, the output rows of a sample.
template <typename In, typename Out, bool kAligned>
__global__ void __launch_bounds__(kMaxThreads) noise_kernel(const NoiseArguments a, int64_t rows,
                                                            const RoundKeys keys) {
  constexpr int kSize = kPackSize<In, Out>;
  using InWord = typename In::Word;
  using OutWord = typename Out::Word;
  const int64_t lines = kAligned ? rows : 1;
  const int64_t line_size = kAligned ? a.width : a.n;
  const int64_t hop = static_cast<int64_t>(gridDim.x) * blockDim.x * kSize;
  for (int64_t sample = blockIdx.z; sample < a.samples; sample += gridDim.z) {
    const uint64_t id = a.id(sample);
    const bool noisy = a.ladder || a.step(sample, 0) >= 0;
    const InWord* x = static_cast<const InWord*>(a.x) + a.x_offset(sample);
    for (int64_t line = blockIdx.y; line < lines; line += gridDim.y) {
      const int64_t row = sample * rows + line;
      OutWord* out_line = static_cast<OutWord*>(a.out) + (kAligned ? a.row_offset(row) : 0);
      for (int64_t column = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * kSize; column < line_size;
           column += hop) {
        const int64_t begin = line * line_size + column;  // in the sample
        Pack<InWord, kSize> read;
        if constexpr (kAligned) {
          read.load(x + begin);
        } else {
#pragma unroll
          for (int j = 0; j < kSize; ++j) read.words[j] = begin + j < a.n ? x[begin + j] : InWord(0);
        }
        float eps[kSize] = {};
#pragma unroll
        for (int j = 0; j < kSize && noisy; j += 4) {
          const uint64_t block = static_cast<uint64_t>(begin + j) / 4;
          uint32_t words[4] = {static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32),
                               static_cast<uint32_t>(id), static_cast<uint32_t>(id >> 32)};
          philox4x32_10(words, keys);
          normal_pair(words[0], words[1], eps[j], eps[j + 1]);
          normal_pair(words[2], words[3], eps[j + 2], eps[j + 3]);
        }
#pragma unroll 1
        for (int64_t level = 0; level < a.levels; ++level) {
          const int64_t step = a.step(sample, level);
          const float scale = step < 0 ? 1.0f : a.scales[2 * step];
          const float noise_scale = step < 0 ? 0.0f : a.scales[2 * step + 1];
          Pack<OutWord, kSize> made;
#pragma unroll
          for (int j = 0; j < kSize; ++j) {
            const float value = In::load(read.words[j]);
            made.words[j] = Out::store(step < 0 ? value : mix(value, eps[j], scale, noise_scale));
          }
          OutWord* out = out_line + level * a.level_stride;
          if constexpr (kAligned) {
            made.store(out + column);
          } else {
            int64_t at_row = begin / a.width, at_column = begin - at_row * a.width;
#pragma unroll
            for (int j = 0; j < kSize; ++j) {
              if (begin + j < a.n) out[a.row_offset(sample * rows + at_row) + at_column] = made.words[j];
              if (++at_column == a.width) {
                at_column = 0;
                ++at_row;
              }
            }
          }
        }
      }
    }
  }
}

void check(cudaError_t status, const std::string& call) {
  if (status != cudaSuccess) {
    throw std::runtime_error(call + ": found CUDA error " + std::to_string(status) + " (" +
                             cudaGetErrorString(status) +
                             "), expected success; run `bpo-fast doctor` to see what this machine has.");
  }
}

template <typename In, typename Out>
void launch(const NoiseArguments& a, int device, cudaStream_t stream) {
  constexpr int64_t kSize = kPackSize<In, Out>;
  const auto aligned_base = [](const void* base) { return reinterpret_cast<uintptr_t>(base) % 16 == 0; };
  // kSize elements are a multiple of 16 bytes of either type.
  const bool aligned = aligned_base(a.x) && aligned_base(a.out) && a.width % kSize == 0 && a.x_stride % kSize == 0 &&
                       a.out_stride % kSize == 0 && a.level_stride % kSize == 0;
  const auto kernel = aligned ? noise_kernel<In, Out, true> : noise_kernel<In, Out, false>;
  const int64_t rows = a.n / a.width, lines = aligned ? rows : 1;
  const int64_t packs = ((aligned ? a.width : a.n) + kSize - 1) / kSize;

  // Warps enough for a line, and blocks enough to fill the GPU but no more: the rest is the strides' work.
  const int threads = static_cast<int>(std::min<int64_t>(kMaxThreads, (packs + 31) / 32 * 32));
  int processors = 0, blocks_per_processor = 0;
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks_per_processor, kernel, threads, 0),
        "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
  const int64_t resident = static_cast<int64_t>(processors) * std::max(blocks_per_processor, 1);
  constexpr int64_t kLimit = 65535;  // of the grid's y and z
  const int64_t z = std::min({a.samples, resident, kLimit});
  const int64_t y = std::min({lines, (resident + z - 1) / z, kLimit});
  const int64_t x = std::min((packs + threads - 1) / threads, (resident + z * y - 1) / (z * y));
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = stream;
  // A function, not <<<>>>: it returns this launch's own error, not one that an earlier call left behind, and a host
  // compiler can read it (tests/csrc/cuda_on_host).
  const RoundKeys keys = round_keys(static_cast<uint32_t>(a.seed), static_cast<uint32_t>(a.seed >> 32));
  check(cudaLaunchKernelEx(&config, kernel, a, rows, keys), "launch of noise_kernel");
}

template <typename In>
void launch_from(const NoiseArguments& a, int out_dtype, int device, cudaStream_t stream) {
  if (out_dtype == kFloat32) launch<In, Float32>(a, device, stream);
  if (out_dtype == kBFloat16) launch<In, BFloat16>(a, device, stream);
  if (out_dtype == kFloat16) launch<In, Float16>(a, device, stream);
}

}  // namespace

int cuda_device_count() {
  int count = 0;
  // Without a driver this is an error, and the answer is still 0.
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

void noise_cuda(const NoiseArguments& a, int x_dtype, int out_dtype, int device, void* stream) {
  if (a.samples == 0 || a.n == 0 || a.levels == 0) return;
  // The static runtime keeps its own current device, whatever the caller's runtime has made current.
  check(cudaSetDevice(device), "cudaSetDevice of GPU " + std::to_string(device));
  const auto queue = static_cast<cudaStream_t>(stream);
  if (x_dtype == kFloat32) launch_from<Float32>(a, out_dtype, device, queue);
  if (x_dtype == kBFloat16) launch_from<BFloat16>(a, out_dtype, device, queue);
  if (x_dtype == kFloat16) launch_from<Float16>(a, out_dtype, device, queue);
}

}  // namespace bpo
