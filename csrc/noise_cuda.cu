// The noise ops on an NVIDIA GPU: one pass, noise made in registers, 16-byte accesses where every row is aligned.
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "noise.h"

namespace bpo {
namespace {

constexpr int kMaxThreads = 256;
constexpr int kWarp = 32;

// What a thread moves at once: 16 bytes of the narrower type, which are 4 elements where both types are fp32, else 8,
// of which an fp32 side has 32 bytes. Where elements are moved one by one: those of a Philox block.
template <typename In, typename Out, bool kAligned>
constexpr int kVectorSize = !kAligned || (sizeof(typename In::Word) == 4 && sizeof(typename Out::Word) == 4) ? 4 : 8;

// The vectors that a thread takes in one turn: 16 elements.
template <typename In, typename Out, bool kAligned>
constexpr int kVectors = kAligned ? 16 / kVectorSize<In, Out, kAligned> : 1;

template <typename Type, int kSize>
struct alignas(16) Vector {
  using Word = typename Type::Word;
  Word words[kSize];

  __device__ __forceinline__ void load(const Word* from) { copy(words, from); }
  __device__ __forceinline__ void store(Word* to) const { copy(to, words); }
  __device__ __forceinline__ float value(int i) const {
    if constexpr (sizeof(Word) == 4) {
      return Type::load(words[i]);
    } else {
      // By 32-bit words: of a 16-bit one nvcc takes two instructions to widen the upper half of a register.
      return Type::load(static_cast<Word>(reinterpret_cast<const uint32_t*>(words)[i / 2] >> 16 * (i % 2)));
    }
  }

 private:
  static __device__ __forceinline__ void copy(Word* to, const Word* from) {
#pragma unroll
    for (int i = 0; i < kSize * static_cast<int>(sizeof(Word)) / 16; ++i) {
      reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(from)[i];
    }
  }
};

struct Scales {
  float signal, noise;
};

// The scales of a step. With those of no step, and with an eps of +0, `mix` gives x as it is, a zero of either sign
// included.
__device__ __forceinline__ Scales scales_of(const NoiseArguments& a, int64_t step) {
  return step < 0 ? Scales{1.0f, -0.0f} : Scales{a.scales[2 * step], a.scales[2 * step + 1]};
}

// A grid of (vectors of a line, lines of a sample, samples), each dimension with a stride, so that nothing is divided.
// Aligned: a line is what goes to one output row, kSize divides it, and every address is a multiple of 16 bytes.
// Otherwise: a line is the whole sample, its last vector may be short, and elements are moved one by one.
// `rows` is a.n / a.width, the output rows of a sample. The vectors of a thread lie a warp apart, so that each access
// of a warp is one run of memory. The bounds leave ptxas the registers that it needs not to spill.
template <typename In, typename Out, bool kAligned>
__global__ void __launch_bounds__(kMaxThreads, kAligned ? 4 : 2)
    noise_kernel(const NoiseArguments a, int64_t rows, const RoundKeys keys) {
  constexpr int kSize = kVectorSize<In, Out, kAligned>, kCount = kVectors<In, Out, kAligned>;
  using OutWord = typename Out::Word;
  // Elements whose blocks have the high word of their number in common: what hangs on it is made once for them, and
  // the number of a vector among them fits in 32 bits.
  constexpr int64_t kPiece = int64_t(kSize) << 31;
  const auto at_most_a_piece = [](uint64_t vectors) {
    return static_cast<uint32_t>(vectors < kPiece / kSize ? vectors : kPiece / kSize);
  };
  const uint32_t lane = threadIdx.x % kWarp;
  const uint64_t warp = static_cast<uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x - lane;  // its first thread
  const uint32_t first = at_most_a_piece(warp * kCount + lane);
  const uint32_t hop = at_most_a_piece(static_cast<uint64_t>(gridDim.x) * blockDim.x * kCount);
  const int64_t lines = kAligned ? rows : 1;
  const int64_t line_size = kAligned ? a.width : a.n;
  for (int64_t sample = blockIdx.z; sample < a.samples; sample += gridDim.z) {
    for (int64_t piece = 0; piece < a.n; piece += kPiece) {  // most samples are one
      const uint64_t first_block = static_cast<uint64_t>(piece) / 4;
      const PhiloxBlocks blocks(static_cast<uint32_t>(first_block >> 32), a.id(sample), keys);
      const bool noisy = a.ladder || a.step(sample, 0) >= 0;
      const Scales first_scales = scales_of(a, a.step(sample, 0));
      const auto* const x = static_cast<const typename In::Word*>(a.x) + a.x_offset(sample);
      for (int64_t line = blockIdx.y * blockDim.y + threadIdx.y; line < lines; line += gridDim.y * blockDim.y) {
        const int64_t line_begin = line * line_size, line_end = line_begin + line_size;  // in the sample
        const int64_t begin = line_begin > piece ? line_begin : piece;
        const int64_t end = line_end < piece + kPiece ? line_end : piece + kPiece;
        const auto vectors = begin < end ? static_cast<uint32_t>((end - begin + kSize - 1) / kSize) : 0;
        auto* const out =
            static_cast<OutWord*>(a.out) + (kAligned ? a.row_offset(sample * rows + line) - line_begin : 0);
        const auto first_number = static_cast<uint32_t>(begin / 4);  // of the first vector's block, its low word
        int64_t element = begin + static_cast<int64_t>(first) * kSize;
        const typename In::Word* from = x + element;
        OutWord* to = out + element;
        for (uint32_t index = first; index < vectors; index += hop) {
          Vector<In, kSize> read[kCount];
#pragma unroll
          for (int v = 0; v < kCount; ++v) {
            if constexpr (kAligned) {
              if (index + v * kWarp < vectors) read[v].load(from + v * kWarp * kSize);
            } else {
              for (int j = 0; j < kSize; ++j) read[v].words[j] = element + j < end ? x[element + j] : 0;
            }
          }
#pragma unroll
          for (int v = 0; v < kCount; ++v) {
            if (index + v * kWarp >= vectors) break;
            float eps[kSize];
#pragma unroll
            for (int j = 0; j < kSize; ++j) eps[j] = 0.0f;
            if (noisy) {
#pragma unroll
              for (int j = 0; j < kSize; j += 4) {
                uint32_t words[4];
                blocks.block(first_number + (index + v * kWarp) * (kSize / 4) + j / 4, words);
                normal_pair(words[0], words[1], eps[j], eps[j + 1]);
                normal_pair(words[2], words[3], eps[j + 2], eps[j + 3]);
              }
            }
            const auto write = [&](const Scales scales, int64_t level) {
              Vector<Out, kSize> made;
#pragma unroll
              for (int j = 0; j < kSize; ++j) {
                made.words[j] = Out::store(mix(read[v].value(j), eps[j], scales.signal, scales.noise));
              }
              if constexpr (kAligned) {
                made.store(to + level + v * kWarp * kSize);
              } else {
                int64_t row = element / a.width, column = element - row * a.width;
#pragma unroll
                for (int j = 0; j < kSize; ++j) {
                  if (element + j < end) out[level + a.row_offset(sample * rows + row) + column] = made.words[j];
                  if (++column == a.width) {
                    column = 0;
                    ++row;
                  }
                }
              }
            };
            write(first_scales, 0);
            if (a.ladder) {
#pragma unroll 1
              for (int64_t level = 1; level < a.levels; ++level) {
                write(scales_of(a, a.steps[level]), level * a.level_stride);
              }
            }
          }
          element += static_cast<int64_t>(hop) * kSize;
          from += static_cast<int64_t>(hop) * kSize;
          to += static_cast<int64_t>(hop) * kSize;
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
  constexpr int64_t kSize = kVectorSize<In, Out, true>;
  const auto aligned_base = [](const void* base) { return reinterpret_cast<uintptr_t>(base) % 16 == 0; };
  // kSize elements are a multiple of 16 bytes of either type.
  const bool aligned = aligned_base(a.x) && aligned_base(a.out) && a.width % kSize == 0 && a.x_stride % kSize == 0 &&
                       a.out_stride % kSize == 0 && a.level_stride % kSize == 0;
  const auto kernel = aligned ? noise_kernel<In, Out, true> : noise_kernel<In, Out, false>;
  const auto parts = [](int64_t whole, int64_t part) { return (whole + part - 1) / part; };
  const int64_t rows = a.n / a.width, lines = aligned ? rows : 1;
  const int64_t shares = aligned ? parts(a.width, kVectors<In, Out, true> * kSize)  // of a line, a thread's each
                                 : parts(a.n, kVectorSize<In, Out, false>);

  // Warps enough for a line, lines enough for a block, and blocks enough to fill the GPU but no more: the rest is the
  // strides' work.
  const int64_t wide = std::min<int64_t>(kMaxThreads, parts(shares, kWarp) * kWarp);
  const int64_t high = std::min(lines, kMaxThreads / wide);
  int processors = 0, blocks_per_processor = 0;
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks_per_processor, kernel, static_cast<int>(wide * high), 0),
        "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
  const int64_t resident = static_cast<int64_t>(processors) * std::max(blocks_per_processor, 1);
  constexpr int64_t kLimit = 65535;  // of the grid's y and z
  const int64_t z = std::min({a.samples, resident, kLimit});
  const int64_t y = std::min({parts(lines, high), parts(resident, z), kLimit});
  const int64_t x = std::min(parts(shares, wide), parts(resident, z * y));
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z));
  config.blockDim = dim3(static_cast<unsigned>(wide), static_cast<unsigned>(high));
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
