// The noise of add_noise, as one set of functions that host and device both compile: Philox4x32-10, the Gaussian
// transform, the conversions of the storage types, and the mix of a value with its noise.
//
// Contract: the same inputs give the same bits on every CPU, every instruction set and every GPU. Each floating-point
// operation below is therefore one that IEEE 754 rounds correctly (add, multiply, fma, square root, int -> float), in
// a fixed order, and every fma is written out. Build with -ffp-contract=off on the host and --fmad=false on the
// device, so that no compiler fuses what is not fused here, and never with -ffast-math.
//
// Stream layout: element `e` of the sample `id` under `seed` is word e % 4 of the Philox block whose
//   key     = (seed low, seed high)
//   counter = (block low, block high, id low, id high),  block = e / 4
// in 32-bit halves, low half first. Words 0 and 1 make normals 0 and 1, words 2 and 3 make normals 2 and 3.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define BPO_INLINE __host__ __device__ __forceinline__
#else
#define BPO_INLINE inline __attribute__((always_inline))
#endif

namespace bpo {

BPO_INLINE uint32_t float_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

BPO_INLINE float bits_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

BPO_INLINE float fma_rn(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#else
  return __builtin_fmaf(a, b, c);
#endif
}

BPO_INLINE float sqrt_rn(float a) {
#if defined(__CUDA_ARCH__)
  return __fsqrt_rn(a);
#else
  return __builtin_sqrtf(a);
#endif
}

// condition ? a : b without a branch: gcc does not vectorise a loop in which it has turned a conditional into one.
BPO_INLINE uint32_t select(bool condition, uint32_t a, uint32_t b) {
  return b ^ ((a ^ b) & (0u - static_cast<uint32_t>(condition)));
}

// An integer test: a floating-point comparison may trap, which also keeps gcc from vectorising.
BPO_INLINE bool is_nan(float value) { return (float_bits(value) & 0x7FFFFFFFu) > 0x7F800000u; }

// The two key words of each of Philox's ten rounds. They depend on the seed alone: a GPU reads them from the launch's
// constants, as operands, where adding them up would cost each thread 20 instructions a block.
struct RoundKeys {
  uint32_t words[20];
};

BPO_INLINE RoundKeys round_keys(uint32_t key0, uint32_t key1) {
  RoundKeys keys;
  for (uint32_t round = 0; round < 10; ++round) {
    keys.words[2 * round] = key0 + round * 0x9E3779B9u;
    keys.words[2 * round + 1] = key1 + round * 0xBB67AE85u;
  }
  return keys;
}

// Philox4x32-10 (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011): counter[4] -> 4 random words.
BPO_INLINE void philox4x32_10(uint32_t words[4], const RoundKeys& keys) {
  uint32_t c0 = words[0], c1 = words[1], c2 = words[2], c3 = words[3];
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = static_cast<uint64_t>(c0) * 0xD2511F53u;
    const uint64_t product1 = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ keys.words[2 * round];
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ keys.words[2 * round + 1];
    c1 = static_cast<uint32_t>(product1);
    c3 = static_cast<uint32_t>(product0);
  }
  words[0] = c0;
  words[1] = c1;
  words[2] = c2;
  words[3] = c3;
}

// -2 ln(u) for u in [2^-33, 1]. u = m * 2^k with m in [2/3, 4/3); log1p(m - 1) is a minimax polynomial whose own
// relative error is below 2^-24.
BPO_INLINE float minus_two_log(float u) {
  const int32_t exponent = static_cast<int32_t>(float_bits(u) - 0x3F2AAAABu) >> 23;
  const float m = bits_float(float_bits(u) - (static_cast<uint32_t>(exponent) << 23));
  const float k = static_cast<float>(exponent);
  const float f = m - 1.0f;
  float p = -0x1.1b09cep-2f;
  p = fma_rn(p, f, 0x1.35b3c6p-2f);
  p = fma_rn(p, f, -0x1.1f9626p-2f);
  p = fma_rn(p, f, 0x1.515a6ep-2f);
  p = fma_rn(p, f, -0x1.99c31ep-2f);
  p = fma_rn(p, f, 0x1.000b1cp-1f);
  p = fma_rn(p, f, -0x1.555528p-1f);
  p = fma_rn(p, f, 1.0f);
  p = fma_rn(p, f, -2.0f);
  return fma_rn(p, f, k * -0x1.62e430p+0f);
}

// Box-Muller: two random words -> two independent standard normals.
// radius = sqrt(-2 ln u) with u = (word0 + 1/2) / 2^32, so |z| reaches 6.76. The angle is t * pi/4 with t in [-1, 1)
// from the low 30 bits of word1; its bit 30 swaps sine and cosine and its bit 31 is the cosine's sign, which covers
// the circle evenly.
BPO_INLINE void normal_pair(uint32_t word0, uint32_t word1, float& z0, float& z1) {
  const float u = fma_rn(static_cast<float>(word0), 0x1p-32f, 0x1p-33f);
  const float radius = sqrt_rn(minus_two_log(u));
  const float t = static_cast<float>(static_cast<int32_t>(word1 << 2)) * 0x1p-31f;
  const float s = t * t;
  float sine = -0x1.2d9302p-15f;
  sine = fma_rn(sine, s, 0x1.465e92p-9f);
  sine = fma_rn(sine, s, -0x1.4abbbap-4f);
  sine = fma_rn(sine, s, 0x1.921fb6p-1f) * t;
  float cosine = 0x1.d9d57ep-19f;
  cosine = fma_rn(cosine, s, -0x1.55c5e0p-12f);
  cosine = fma_rn(cosine, s, 0x1.03c1dep-6f);
  cosine = fma_rn(cosine, s, -0x1.3bd3ccp-2f);
  cosine = fma_rn(cosine, s, 1.0f);
  const uint32_t sine_bits = float_bits(sine);
  const uint32_t cosine_bits = float_bits(cosine) ^ (word1 & 0x80000000u);
  const bool swap = (word1 & 0x40000000u) != 0;
  z0 = radius * bits_float(select(swap, sine_bits, cosine_bits));
  z1 = radius * bits_float(select(swap, cosine_bits, sine_bits));
}

// x * scale + eps * noise_scale in fp32.
BPO_INLINE float mix(float x, float eps, float scale, float noise_scale) {
  return fma_rn(eps, noise_scale, x * scale);
}

// Storage types: a tag each, with the raw word in memory and its exact widening and round-to-nearest-even narrowing.
// A NaN is always stored as the same word (all ones but the sign), so that its bits too are the same everywhere.
struct Float32 {
  using Word = float;
  static BPO_INLINE float load(Word word) { return word; }
  static BPO_INLINE Word store(float value) {
    return bits_float(select(is_nan(value), 0x7FFFFFFFu, float_bits(value)));
  }
};

struct BFloat16 {
  using Word = uint16_t;
  static BPO_INLINE float load(Word word) { return bits_float(static_cast<uint32_t>(word) << 16); }
  static BPO_INLINE Word store(float value) {
#if defined(__CUDA_ARCH__)
    // One instruction with the same result: subnormals are kept and a NaN becomes 0x7fff.
    Word word;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(word) : "f"(value));
    return word;
#else
    const uint32_t bits = float_bits(value);
    const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    return static_cast<Word>(select(is_nan(value), 0x7FFFu, rounded));
#endif
  }
};

struct Float16 {
  using Word = uint16_t;
  // Widening moves exponent and mantissa into place and lets one exact multiply fix the bias, subnormals included.
  static BPO_INLINE float load(Word word) {
#if defined(__CUDA_ARCH__)
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(word));
    return value;
#else
    const uint32_t magnitude = static_cast<uint32_t>(word & 0x7FFFu) << 13;
    const float scaled = bits_float(magnitude) * 0x1p+112f;
    const uint32_t bits = select(magnitude >= 0x0F800000u, magnitude | 0x7F800000u, float_bits(scaled));
    return bits_float(bits | (static_cast<uint32_t>(word & 0x8000u) << 16));
#endif
  }
  // Below the smallest normal half, adding 0.5 lets the fp32 adder round to the spacing of subnormal halves.
  static BPO_INLINE Word store(float value) {
#if defined(__CUDA_ARCH__)
    Word word;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(word) : "f"(value));
    return word;
#else
    const uint32_t bits = float_bits(value);
    const uint32_t magnitude = bits & 0x7FFFFFFFu;
    const uint32_t normal = (magnitude - 0x38000000u + 0x0FFFu + ((magnitude >> 13) & 1u)) >> 13;
    const uint32_t subnormal = float_bits(bits_float(magnitude) + 0.5f) - 0x3F000000u;
    const uint32_t finite = select(magnitude < 0x38800000u, subnormal, normal);
    const uint32_t half = select(magnitude >= 0x477FF000u, 0x7C00u, finite) | ((bits >> 16) & 0x8000u);
    return static_cast<Word>(select(is_nan(value), 0x7FFFu, half));
#endif
  }
};

// The codes by which Python names a storage type.
enum DTypeCode : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// What one call works on: `samples` samples of `n` elements, each read once and written once or, for a ladder of noise
// levels, `levels` times. In elements of x and of out:
//   element e of sample b is read at    x   + (source ? source[b] : b) * x_stride + e
//   and for each level k is written at  out + k * level_stride + row * out_stride + e % width,
//   where row = r or out_rows[r], r = b * (n / width) + e / width.
// `width` divides n. It is n where samples are written whole, and the width of an embedding where a sample's tokens go
// to rows of their own. out may be x where every element is written where it was read.
struct NoiseArguments {
  const void* x;
  void* out;
  int64_t samples;
  int64_t n;
  int64_t x_stride;
  int64_t out_stride;
  int64_t width;
  int64_t levels;
  int64_t level_stride;
  const float* scales;      // [T, 2]: sqrt(abar), sqrt(1 - abar)
  const int64_t* steps;     // rows of `scales`, [levels] for a ladder, else [samples]; below 0: no noise; null: row 0
  const int64_t* ids;       // [samples] names of the streams, or null: b
  const int64_t* source;    // [samples], or null: b
  const int64_t* out_rows;  // [samples * n / width], or null: r
  uint64_t seed;
  bool ladder;

  BPO_INLINE int64_t step(int64_t sample, int64_t level) const {
    return steps ? steps[ladder ? level : sample] : 0;
  }
  BPO_INLINE uint64_t id(int64_t sample) const { return static_cast<uint64_t>(ids ? ids[sample] : sample); }
  BPO_INLINE int64_t x_offset(int64_t sample) const { return (source ? source[sample] : sample) * x_stride; }
  // Where output row r of level 0 begins.
  BPO_INLINE int64_t row_offset(int64_t r) const { return (out_rows ? out_rows[r] : r) * out_stride; }
};

}  // namespace bpo
