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

// The correctly rounded square root of a in [2^-100, 2^100] from y, an approximation of 1 / sqrt(a): the five
// instructions, MUFU.RSQ included, that nvcc makes of __fsqrt_rn for such an a. (All a were tried with all y: it is
// right for any y within 2^-23.3 of 1 / sqrt(a), and within rsqrt.approx.ftz.f32's stated 2^-22.9 for all but two a in
// [1, 4), where it is as right as nvcc's.)
BPO_INLINE float refined_root(float a, float y) {
  const float root = a * y;
  return fma_rn(fma_rn(-root, root, a), 0.5f * y, root);
}

// The square root of a, which is -0 or in [2^-100, 2^100]: on a GPU without the range check and the slow path that
// __fsqrt_rn has. -0 needs no more than a y that is finite.
BPO_INLINE float sqrt_rn(float a) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(fmaxf(a, 0x1p-100f)));
  return refined_root(a, y);
#else
  return __builtin_sqrtf(a);
#endif
}

// condition ? a : b; on a CPU without a branch: gcc does not vectorise a loop in which it has turned a conditional
// into one.
BPO_INLINE uint32_t select(bool condition, uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  return condition ? a : b;
#else
  return b ^ ((a ^ b) & (0u - static_cast<uint32_t>(condition)));
#endif
}

// Exchanges a and b if bit 30 of the word is set. In PTX on a GPU: of the test in C++ the compiler makes three
// instructions.
BPO_INLINE void exchange_where_bit_30(uint32_t word, uint32_t& a, uint32_t& b) {
  const uint32_t old_a = a, old_b = b;
#if defined(__CUDA_ARCH__)
  asm("{\n\t"
      ".reg .pred set;\n\t"
      ".reg .b32 bit;\n\t"
      "and.b32 bit, %4, 0x40000000;\n\t"
      "setp.ne.b32 set, bit, 0;\n\t"
      "selp.b32 %0, %3, %2, set;\n\t"
      "selp.b32 %1, %2, %3, set;\n\t"
      "}"
      : "=r"(a), "=r"(b)
      : "r"(old_a), "r"(old_b), "r"(word));
#else
  const bool set = (word & 0x40000000u) != 0;
  a = select(set, old_b, old_a);
  b = select(set, old_a, old_b);
#endif
}

// On a CPU an integer test: a floating-point comparison may trap, which also keeps gcc from vectorising.
BPO_INLINE bool is_nan(float value) {
#if defined(__CUDA_ARCH__)
  return value != value;
#else
  return (float_bits(value) & 0x7FFFFFFFu) > 0x7F800000u;
#endif
}

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

// Rounds `first` to 9 of Philox4x32-10 (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011).
template <int first>
BPO_INLINE void philox_rounds(uint32_t words[4], const RoundKeys& keys) {
  uint32_t c0 = words[0], c1 = words[1], c2 = words[2], c3 = words[3];
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
  for (int round = first; round < 10; ++round) {
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

// counter[4] -> 4 random words.
BPO_INLINE void philox4x32_10(uint32_t words[4], const RoundKeys& keys) { philox_rounds<0>(words, keys); }

// The blocks of a stream whose counters differ in their first word alone: half of the first two rounds is the same for
// all of them, and made once.
class PhiloxBlocks {
 public:
  BPO_INLINE PhiloxBlocks(uint32_t counter1, uint64_t id, const RoundKeys& keys) : keys_(keys) {
    const uint64_t product1 = static_cast<uint64_t>(static_cast<uint32_t>(id)) * 0xCD9E8D57u;
    const uint32_t c0 = static_cast<uint32_t>(product1 >> 32) ^ counter1 ^ keys.words[0];
    const uint64_t product0 = static_cast<uint64_t>(c0) * 0xD2511F53u;
    first_ = static_cast<uint32_t>(id >> 32) ^ keys.words[1];
    second_[0] = static_cast<uint32_t>(product1) ^ keys.words[2];
    second_[1] = static_cast<uint32_t>(product0 >> 32) ^ keys.words[3];
    third_ = static_cast<uint32_t>(product0);
  }
  BPO_INLINE void block(uint32_t counter0, uint32_t words[4]) const {
    const uint64_t product0 = static_cast<uint64_t>(counter0) * 0xD2511F53u;
    const uint32_t c2 = static_cast<uint32_t>(product0 >> 32) ^ first_;
    const uint64_t product1 = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
    words[0] = static_cast<uint32_t>(product1 >> 32) ^ second_[0];
    words[1] = static_cast<uint32_t>(product1);
    words[2] = static_cast<uint32_t>(product0) ^ second_[1];
    words[3] = third_;
    philox_rounds<2>(words, keys_);
  }

 private:
  const RoundKeys& keys_;
  uint32_t first_, second_[2], third_;  // what a round adds to what hangs on counter0
};

// 32 in the place of a float's exponent.
constexpr uint32_t kExponent32 = 32u << 23;

// -2 ln(u / 2^32) for u in [1/2, 2^32]. u / 2^32 = m * 2^k with m in [2/3, 4/3); log1p(m - 1) is a minimax polynomial
// whose own relative error is below 2^-24. `exponent` is k in the place of a float's exponent, and so k * 2^23.
BPO_INLINE float minus_two_log(float u) {
  const uint32_t exponent = (float_bits(u) - (0x3F2AAAABu + kExponent32)) & 0xFF800000u;
  const float m = bits_float(float_bits(u) - exponent - kExponent32);
  const float k = static_cast<float>(static_cast<int32_t>(exponent));
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
  return fma_rn(p, f, k * -0x1.62e430p-23f);
}

// Box-Muller: two random words -> two independent standard normals.
// radius = sqrt(-2 ln (u / 2^32)) with u = word0 + 1/2, so |z| reaches 6.76. The angle is t * pi/4 with t in [-1, 1)
// from the low 30 bits of word1; its bit 30 swaps sine and cosine and its bit 31 is the cosine's sign, which covers
// the circle evenly.
BPO_INLINE void normal_pair(uint32_t word0, uint32_t word1, float& z0, float& z1) {
  const float radius = sqrt_rn(minus_two_log(static_cast<float>(word0) + 0.5f));
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
  uint32_t sine_bits = float_bits(sine), cosine_bits = float_bits(cosine) ^ (word1 & 0x80000000u);
  exchange_where_bit_30(word1, cosine_bits, sine_bits);
  z0 = radius * bits_float(cosine_bits);
  z1 = radius * bits_float(sine_bits);
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
// Without `ladder` there is one level. `width` divides n. It is n where samples are written whole, and the width of an
// embedding where a sample's tokens go to rows of their own. out may be x where every element is written where it was
// read.
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
  const int64_t* steps;     // rows of `scales`: [samples], below 0: no noise, null: row 0; of a ladder: [levels]
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
