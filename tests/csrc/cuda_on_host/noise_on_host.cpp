// The CUDA half of the noise ops with a GPU that the host plays, and the noise of the first release beside it.
#include "noise_cuda.cu"

#include <cmath>
#include <cstdio>

// Philox4x32-10 and the Gaussian transform as they were first written, with nothing shared with csrc/ and nothing made
// fast: whatever is done to csrc/philox_normal.h has to give these bits.
namespace first {

float as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

uint32_t as_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

void philox(uint32_t words[4], uint64_t seed) {
  uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = static_cast<uint64_t>(words[0]) * 0xD2511F53u;
    const uint64_t product1 = static_cast<uint64_t>(words[2]) * 0xCD9E8D57u;
    const uint32_t next[4] = {static_cast<uint32_t>(product1 >> 32) ^ words[1] ^ key[0],
                              static_cast<uint32_t>(product1),
                              static_cast<uint32_t>(product0 >> 32) ^ words[3] ^ key[1],
                              static_cast<uint32_t>(product0)};
    memcpy(words, next, sizeof next);
    key[0] += 0x9E3779B9u;
    key[1] += 0xBB67AE85u;
  }
}

float minus_two_log(float u) {
  const int32_t exponent = static_cast<int32_t>(as_bits(u) - 0x3F2AAAABu) >> 23;
  const float f = as_float(as_bits(u) - (static_cast<uint32_t>(exponent) << 23)) - 1.0f;
  const float coefficients[] = {0x1.35b3c6p-2f, -0x1.1f9626p-2f, 0x1.515a6ep-2f, -0x1.99c31ep-2f,
                                0x1.000b1cp-1f, -0x1.555528p-1f, 1.0f,           -2.0f};
  float p = -0x1.1b09cep-2f;
  for (const float coefficient : coefficients) p = std::fma(p, f, coefficient);
  return std::fma(p, f, static_cast<float>(exponent) * -0x1.62e430p+0f);
}

void sine_cosine(uint32_t word, float& sine, float& cosine) {
  const float t = static_cast<float>(static_cast<int32_t>(word << 2)) * 0x1p-31f, s = t * t;
  sine = std::fma(std::fma(std::fma(-0x1.2d9302p-15f, s, 0x1.465e92p-9f), s, -0x1.4abbbap-4f), s, 0x1.921fb6p-1f) * t;
  cosine = std::fma(std::fma(0x1.d9d57ep-19f, s, -0x1.55c5e0p-12f), s, 0x1.03c1dep-6f);
  cosine = std::fma(std::fma(cosine, s, -0x1.3bd3ccp-2f), s, 1.0f);
}

void normal_pair(uint32_t word0, uint32_t word1, float z[2]) {
  const float radius = std::sqrt(minus_two_log(std::fma(static_cast<float>(word0), 0x1p-32f, 0x1p-33f)));
  float sine, cosine;
  sine_cosine(word1, sine, cosine);
  if (word1 >> 31) cosine = -cosine;
  const bool swap = (word1 >> 30 & 1) != 0;
  z[0] = radius * (swap ? sine : cosine);
  z[1] = radius * (swap ? cosine : sine);
}

}  // namespace first

extern "C" {

HostGpu* gpu() { return &host_gpu; }

size_t size_of_arguments() { return sizeof(bpo::NoiseArguments); }

// 0, or 1 and the sentence of the error in `message`.
int noise_cuda(const bpo::NoiseArguments* arguments, int x_dtype, int out_dtype, int device, size_t stream,
               char* message, size_t size) {
  try {
    bpo::noise_cuda(*arguments, x_dtype, out_dtype, device, reinterpret_cast<void*>(stream));
    return 0;
  } catch (const std::exception& error) {
    snprintf(message, size, "%s", error.what());
    return 1;
  }
}

// Normals begin .. begin + count - 1 of the stream of `id` under `seed`; begin and count are multiples of 4.
void first_normals(uint64_t begin, size_t count, uint64_t id, uint64_t seed, float* normals) {
  for (size_t i = 0; i < count; i += 4) {
    const uint64_t block = (begin + i) / 4;
    uint32_t words[4] = {static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32), static_cast<uint32_t>(id),
                         static_cast<uint32_t>(id >> 32)};
    first::philox(words, seed);
    first::normal_pair(words[0], words[1], normals + i);
    first::normal_pair(words[2], words[3], normals + i + 2);
  }
}

// How many of the floats a in [1, 4), taking each `step`th, have a y within a relative distance of 2^log2_bound to
// 1 / sqrt(a) from which the root is not the correctly rounded one. Any other a is one of these times a power of 4,
// which changes nothing but exponents.
size_t roots_missed(double log2_bound, uint32_t step) {
  size_t missed = 0;
  const double bound = std::pow(2.0, log2_bound);
  for (uint32_t bits = 0x3F800000u; bits < 0x40800000u; bits += step) {
    const float a = first::as_float(bits), root = std::sqrt(a);
    const double exact = 1.0 / std::sqrt(static_cast<double>(a));
    const uint32_t nearest = first::as_bits(static_cast<float>(exact));
    bool right = true;
    for (uint32_t y_bits = nearest - 3; y_bits <= nearest + 3; ++y_bits) {
      const float y = first::as_float(y_bits);
      if (std::fabs(y - exact) <= bound * exact) right = right && bpo::refined_root(a, y) == root;
    }
    missed += !right;
  }
  return missed;
}

float refined_root(float a, float y) { return bpo::refined_root(a, y); }

// How many of the pairs of words give other normals than at first. word0 and word1 are stepped through together.
size_t pairs_changed(uint32_t word0, uint32_t word1, uint32_t step0, uint32_t step1, size_t count) {
  size_t changed = 0;
  for (size_t i = 0; i < count; ++i, word0 += step0, word1 += step1) {
    float now[2], then[2];
    bpo::normal_pair(word0, word1, now[0], now[1]);
    first::normal_pair(word0, word1, then);
    changed += memcmp(now, then, sizeof now) != 0;
  }
  return changed;
}
}
