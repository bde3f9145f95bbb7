// The noise ops on the CPU: loops over tiles that stay in L1, built once for each instruction set and chosen at run
// time. The floating-point loops are plain scalar code that the compiler vectorises; only Philox on x86 is laid out by
// hand. All variants give the same bits (see philox_normal.h).
#include "noise.h"

#include <algorithm>
#include <cfenv>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "philox_normal.h"

namespace bpo {
namespace {

constexpr int kTileBlocks = 64;
constexpr int kTile = 4 * kTileBlocks;
// A unit of work is at most this many elements of one sample, a whole number of tiles; a thread is worth starting for
// about this many units.
constexpr int64_t kUnit = 16384;
constexpr int64_t kUnitsPerThread = 2;

// The caller's thread may flush subnormals to zero, worker threads do not: run in the default environment everywhere.
class DefaultFloatEnvironment {
 public:
  DefaultFloatEnvironment() {
    fegetenv(&saved_);
    fesetenv(FE_DFL_ENV);
  }
  ~DefaultFloatEnvironment() { fesetenv(&saved_); }
  DefaultFloatEnvironment(const DefaultFloatEnvironment&) = delete;
  DefaultFloatEnvironment& operator=(const DefaultFloatEnvironment&) = delete;

 private:
  fenv_t saved_;
};

// The words of a tile: word w of block first_block + i of sample `id` is words[w][i]. first_block is a multiple of
// kTileBlocks, so that the blocks of a tile share the high half of their number.
using PhiloxTile = void (*)(uint32_t (*words)[kTileBlocks], uint64_t first_block, uint64_t id, uint64_t seed);

void philox_tile_baseline(uint32_t (*words)[kTileBlocks], uint64_t first_block, uint64_t id, uint64_t seed) {
  const RoundKeys keys = round_keys(static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
  for (int i = 0; i < kTileBlocks; ++i) {
    uint32_t block[4] = {static_cast<uint32_t>(first_block) + static_cast<uint32_t>(i),
                         static_cast<uint32_t>(first_block >> 32), static_cast<uint32_t>(id),
                         static_cast<uint32_t>(id >> 32)};
    philox4x32_10(block, keys);
    for (int w = 0; w < 4; ++w) words[w][i] = block[w];
  }
}

#if defined(__x86_64__)
// Philox with a block a 64-bit lane, its words in the low halves: the x86 multiply that makes 64 bits of two low
// halves then needs no shuffle, and what is left in the high halves is never read. gcc makes the three-instruction
// 64 x 64 multiply of the same in C. Lane j of c[0] is block i + 2j and of c[1] block i + 2j + 1, so that a shift and
// an or put the words of both in order.
#define BPO_PHILOX_TILE(suffix, attributes, kLanes, Register, multiply)                                               \
  attributes void philox_tile_##suffix(uint32_t (*words)[kTileBlocks], uint64_t first_block, uint64_t id,             \
                                       uint64_t seed) {                                                               \
    typedef uint64_t Lanes __attribute__((vector_size(8 * kLanes)));                                                  \
    const RoundKeys keys = round_keys(static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));                \
    Lanes step{};                                                                                                     \
    for (int lane = 0; lane < kLanes; ++lane) step[lane] = 2 * static_cast<uint64_t>(lane);                           \
    const Lanes zero{}, multiplier0 = zero + 0xD2511F53u, multiplier1 = zero + 0xCD9E8D57u;                           \
    for (int i = 0; i < kTileBlocks; i += 2 * kLanes) {                                                               \
      Lanes c[2][4];                                                                                                  \
      for (int odd = 0; odd < 2; ++odd) {                                                                             \
        Lanes c0 = step + (static_cast<uint32_t>(first_block) + static_cast<uint64_t>(i + odd));                      \
        Lanes c1 = zero + (first_block >> 32), c2 = zero + (id & 0xFFFFFFFFu), c3 = zero + (id >> 32);                \
        _Pragma("GCC unroll 10") for (int round = 0; round < 10; ++round) {                                           \
          const Lanes product0 = reinterpret_cast<Lanes>(                                                             \
              multiply(reinterpret_cast<Register>(c0), reinterpret_cast<Register>(multiplier0)));                     \
          const Lanes product1 = reinterpret_cast<Lanes>(                                                             \
              multiply(reinterpret_cast<Register>(c2), reinterpret_cast<Register>(multiplier1)));                     \
          c0 = (product1 >> 32) ^ c1 ^ (zero + keys.words[2 * round]);                                                \
          c2 = (product0 >> 32) ^ c3 ^ (zero + keys.words[2 * round + 1]);                                            \
          c1 = product1;                                                                                              \
          c3 = product0;                                                                                              \
        }                                                                                                             \
        c[odd][0] = c0;                                                                                               \
        c[odd][1] = c1;                                                                                               \
        c[odd][2] = c2;                                                                                               \
        c[odd][3] = c3;                                                                                               \
      }                                                                                                               \
      for (int w = 0; w < 4; ++w) {                                                                                   \
        const Lanes pairs = (c[0][w] & 0xFFFFFFFFu) | (c[1][w] << 32);                                                \
        memcpy(&words[w][i], &pairs, sizeof pairs);                                                                   \
      }                                                                                                               \
    }                                                                                                                 \
  }
#endif

// The normals of the tile of sample `id` that begins at element `begin`, a multiple of kTile.
template <PhiloxTile kPhilox>
BPO_INLINE void normal_tile(float* eps, int64_t begin, uint64_t id, uint64_t seed) {
  alignas(64) uint32_t words[4][kTileBlocks];
  kPhilox(words, static_cast<uint64_t>(begin) / 4, id, seed);
  for (int i = 0; i < kTileBlocks; ++i) {
    normal_pair(words[0][i], words[1][i], eps[4 * i], eps[4 * i + 1]);
    normal_pair(words[2][i], words[3][i], eps[4 * i + 2], eps[4 * i + 3]);
  }
}

// kTile elements of one level: x, widened, with its noise or (step < 0) without, rounded to words of the output.
template <typename Out>
BPO_INLINE void mix_tile(const NoiseArguments& a, int64_t step, const float* x, const float* eps,
                         typename Out::Word* out) {
  if (step < 0) {
    for (int i = 0; i < kTile; ++i) out[i] = Out::store(x[i]);
    return;
  }
  const float scale = a.scales[2 * step], noise_scale = a.scales[2 * step + 1];
  for (int i = 0; i < kTile; ++i) out[i] = Out::store(mix(x[i], eps[i], scale, noise_scale));
}

// Copies elements begin .. begin + count - 1 of a sample to their output rows, which may break anywhere.
template <typename Word>
BPO_INLINE void scatter(const NoiseArguments& a, const Word* words, Word* out, int64_t sample, int64_t begin,
                        int64_t count) {
  const int64_t first_row = sample * (a.n / a.width);
  while (count > 0) {
    const int64_t column = begin % a.width, piece = std::min(count, a.width - column);
    memcpy(out + a.row_offset(first_row + begin / a.width) + column, words, static_cast<size_t>(piece) * sizeof(Word));
    words += piece;
    begin += piece;
    count -= piece;
  }
}

// Units first .. last - 1 of the call, unit u being part u % units_per_sample of sample u / units_per_sample. A tile
// is read before it is written, so that out may be x.
template <typename In, typename Out, PhiloxTile kPhilox>
BPO_INLINE void noise_units(const NoiseArguments& a, int64_t units_per_sample, int64_t first, int64_t last) {
  const DefaultFloatEnvironment environment;
  alignas(64) float eps[kTile], values[kTile];
  alignas(64) typename Out::Word words[kTile];
  for (int64_t unit = first; unit < last; ++unit) {
    const int64_t sample = unit / units_per_sample;
    const int64_t begin = unit % units_per_sample * kUnit, end = std::min(begin + kUnit, a.n);
    const auto* x = static_cast<const typename In::Word*>(a.x) + a.x_offset(sample);
    const bool noisy = a.ladder || a.step(sample, 0) >= 0;
    for (int64_t start = begin; start < end; start += kTile) {
      const int64_t count = std::min<int64_t>(kTile, end - start);
      if (noisy) normal_tile<kPhilox>(eps, start, a.id(sample), a.seed);
      if (count == kTile) {
        for (int i = 0; i < kTile; ++i) values[i] = In::load(x[start + i]);
      } else {
        for (int i = 0; i < count; ++i) values[i] = In::load(x[start + i]);
        std::fill(values + count, values + kTile, 0.0f);
      }
      const int64_t column = start % a.width;
      const bool one_row = count == kTile && column + kTile <= a.width;
      const int64_t row = sample * (a.n / a.width) + start / a.width;
      for (int64_t level = 0; level < a.levels; ++level) {
        auto* out = static_cast<typename Out::Word*>(a.out) + level * a.level_stride;
        if (one_row) {
          mix_tile<Out>(a, a.step(sample, level), values, eps, out + a.row_offset(row) + column);
        } else {
          mix_tile<Out>(a, a.step(sample, level), values, eps, words);
          scatter(a, words, out, sample, start, count);
        }
      }
    }
  }
}

using Worker = void (*)(const NoiseArguments&, int64_t, int64_t, int64_t);

struct Variant {
  const char* name;
  bool supported;
  Worker worker[3][3];  // by the DTypeCodes of x and of out
};

// One function of each pair of storage types whose body, inlined, is compiled for the given instruction set.
#define BPO_WORKER(suffix, attributes, In, Out)                                                                      \
  attributes void In##_##Out##_##suffix(const NoiseArguments& a, int64_t units_per_sample, int64_t first,             \
                                        int64_t last) {                                                               \
    noise_units<In, Out, philox_tile_##suffix>(a, units_per_sample, first, last);                                     \
  }
#define BPO_VARIANT(suffix, attributes)                                                                               \
  BPO_WORKER(suffix, attributes, Float32, Float32)                                                                    \
  BPO_WORKER(suffix, attributes, Float32, BFloat16)                                                                   \
  BPO_WORKER(suffix, attributes, Float32, Float16)                                                                    \
  BPO_WORKER(suffix, attributes, BFloat16, Float32)                                                                   \
  BPO_WORKER(suffix, attributes, BFloat16, BFloat16)                                                                  \
  BPO_WORKER(suffix, attributes, BFloat16, Float16)                                                                   \
  BPO_WORKER(suffix, attributes, Float16, Float32)                                                                    \
  BPO_WORKER(suffix, attributes, Float16, BFloat16)                                                                   \
  BPO_WORKER(suffix, attributes, Float16, Float16)
#define BPO_WORKERS(suffix)                                                          \
  {{Float32_Float32_##suffix, Float32_BFloat16_##suffix, Float32_Float16_##suffix},                                   \
   {BFloat16_Float32_##suffix, BFloat16_BFloat16_##suffix, BFloat16_Float16_##suffix},                                \
   {Float16_Float32_##suffix, Float16_BFloat16_##suffix, Float16_Float16_##suffix}}

BPO_VARIANT(baseline, )
#if defined(__x86_64__)
#define BPO_AVX2 __attribute__((target("avx2,fma")))
BPO_PHILOX_TILE(avx2, BPO_AVX2, 4, __m256i, _mm256_mul_epu32)
BPO_VARIANT(avx2, BPO_AVX2)
#if defined(__clang__)
#define BPO_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"), min_vector_width(512)))
#else
#define BPO_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,prefer-vector-width=512")))
#endif
// The form with a mask, all ones and so without effect: gcc 12 warns of the plain one's own header.
#define BPO_MULTIPLY512(a, b) _mm512_maskz_mul_epu32(0xFF, a, b)
BPO_PHILOX_TILE(avx512, BPO_AVX512, 8, __m512i, BPO_MULTIPLY512)
BPO_VARIANT(avx512, BPO_AVX512)
#endif

// Best first.
const std::vector<Variant>& variants() {
  static const std::vector<Variant> all = [] {
    std::vector<Variant> list;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    list.push_back({"avx512", avx512, BPO_WORKERS(avx512)});
    list.push_back({"avx2", avx2, BPO_WORKERS(avx2)});
#endif
    list.push_back({"baseline", true, BPO_WORKERS(baseline)});
    return list;
  }();
  return all;
}

const Variant& find_variant(const std::string& isa) {
  for (const Variant& variant : variants()) {
    if (variant.supported && (isa.empty() || isa == variant.name)) return variant;
  }
  std::string known;
  for (const std::string& name : cpu_isas()) known += (known.empty() ? "" : ", ") + name;
  throw std::invalid_argument("isa: found '" + isa + "', expected one of " + known + " on this processor.");
}

}  // namespace

std::vector<std::string> cpu_isas() {
  std::vector<std::string> names;
  for (const Variant& variant : variants()) {
    if (variant.supported) names.emplace_back(variant.name);
  }
  return names;
}

void noise_cpu(const NoiseArguments& a, int x_dtype, int out_dtype, int threads, const std::string& isa) {
  const Worker worker = find_variant(isa).worker[x_dtype][out_dtype];
  if (a.n == 0) return;
  const int64_t units_per_sample = (a.n + kUnit - 1) / kUnit;
  const int64_t units = a.samples * units_per_sample;
  const int64_t parts =
      std::max<int64_t>(1, std::min<int64_t>(threads, (units + kUnitsPerThread - 1) / kUnitsPerThread));
  std::vector<std::thread> pool;
  pool.reserve(static_cast<size_t>(parts));
  for (int64_t part = 1; part < parts; ++part) {
    const int64_t first = units * part / parts, last = units * (part + 1) / parts;
    try {
      pool.emplace_back(worker, std::cref(a), units_per_sample, first, last);
    } catch (const std::system_error&) {  // the machine has no thread left to give
      worker(a, units_per_sample, first, last);
    }
  }
  worker(a, units_per_sample, 0, units / parts);
  for (std::thread& thread : pool) thread.join();
}

}  // namespace bpo
