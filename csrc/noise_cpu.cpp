// add_noise on the CPU: plain scalar loops over tiles that stay in L1, which the compiler vectorises, built once for
// each instruction set and chosen at run time. All variants give the same bits (see philox_normal.h).
#include "noise.h"

#include <algorithm>
#include <cfenv>
#include <functional>
#include <stdexcept>
#include <system_error>
#include <thread>
#include <vector>

#include "philox_normal.h"

namespace bpo {
namespace {

constexpr int kTileBlocks = 64;
constexpr int kTile = 4 * kTileBlocks;
// A unit of work is at most this many elements of one row; a thread is worth starting for about this many units.
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

// The kTile normals of blocks first_block, first_block + 1, ... of one sample.
BPO_INLINE void normal_tile(float* eps, int64_t first_block, uint64_t id, uint64_t seed) {
  alignas(64) uint32_t words[4][kTileBlocks];
  const uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  const uint32_t id0 = static_cast<uint32_t>(id), id1 = static_cast<uint32_t>(id >> 32);
  for (int i = 0; i < kTileBlocks; ++i) {
    const uint64_t block = static_cast<uint64_t>(first_block) + static_cast<uint64_t>(i);
    uint32_t w[4] = {static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32), id0, id1};
    philox4x32_10(w, key0, key1);
    words[0][i] = w[0];
    words[1][i] = w[1];
    words[2][i] = w[2];
    words[3][i] = w[3];
  }
  for (int i = 0; i < kTileBlocks; ++i) {
    normal_pair(words[0][i], words[1][i], eps[4 * i], eps[4 * i + 1]);
    normal_pair(words[2][i], words[3][i], eps[4 * i + 2], eps[4 * i + 3]);
  }
}

// `count` elements of one row from element `begin`, a multiple of 4. out may be x: a tile is read, then written.
template <typename T>
BPO_INLINE void noise_span(const typename T::Word* x, typename T::Word* out, int64_t begin, int64_t count, float scale,
                           float noise_scale, uint64_t id, uint64_t seed) {
  alignas(64) float eps[kTile];
  alignas(64) float values[kTile];
  for (int64_t start = 0; start < count; start += kTile) {
    normal_tile(eps, (begin + start) / 4, id, seed);
    if (count - start >= kTile) {
      for (int i = 0; i < kTile; ++i) values[i] = mix(T::load(x[start + i]), eps[i], scale, noise_scale);
      for (int i = 0; i < kTile; ++i) out[start + i] = T::store(values[i]);
    } else {
      for (int i = 0; i < count - start; ++i) {
        out[start + i] = T::store(mix(T::load(x[start + i]), eps[i], scale, noise_scale));
      }
    }
  }
}

// Units first..last-1 of the call, unit u being part u % units_per_row of row u / units_per_row.
template <typename T>
BPO_INLINE void noise_units(const NoiseArguments& a, int64_t units_per_row, int64_t first, int64_t last) {
  const DefaultFloatEnvironment environment;
  for (int64_t unit = first; unit < last; ++unit) {
    const int64_t row = unit / units_per_row;
    const int64_t begin = unit % units_per_row * kUnit;
    const float* scale = a.scales + 2 * (a.steps ? a.steps[row] : 0);
    const auto* x = static_cast<const typename T::Word*>(a.x) + row * a.x_stride + begin;
    auto* out = static_cast<typename T::Word*>(a.out) + row * a.out_stride + begin;
    noise_span<T>(x, out, begin, std::min(kUnit, a.n - begin), scale[0], scale[1],
                  static_cast<uint64_t>(a.ids ? a.ids[row] : row), a.seed);
  }
}

using Worker = void (*)(const NoiseArguments&, int64_t, int64_t, int64_t);

struct Variant {
  const char* name;
  bool supported;
  Worker worker[3];  // by DTypeCode
};

// One function of each storage type whose body, inlined, is compiled for the given instruction set.
#define BPO_VARIANT(suffix, attributes)                                                                              \
  attributes void float32_##suffix(const NoiseArguments& a, int64_t units_per_row, int64_t first, int64_t last) {    \
    noise_units<Float32>(a, units_per_row, first, last);                                                             \
  }                                                                                                                  \
  attributes void bfloat16_##suffix(const NoiseArguments& a, int64_t units_per_row, int64_t first, int64_t last) {   \
    noise_units<BFloat16>(a, units_per_row, first, last);                                                            \
  }                                                                                                                  \
  attributes void float16_##suffix(const NoiseArguments& a, int64_t units_per_row, int64_t first, int64_t last) {    \
    noise_units<Float16>(a, units_per_row, first, last);                                                             \
  }

BPO_VARIANT(baseline, )
#if defined(__x86_64__)
BPO_VARIANT(avx2, __attribute__((target("avx2,fma"))))
#if defined(__clang__)
BPO_VARIANT(avx512, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"), min_vector_width(512))))
#else
BPO_VARIANT(avx512, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,prefer-vector-width=512"))))
#endif
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
    list.push_back({"avx512", avx512, {float32_avx512, bfloat16_avx512, float16_avx512}});
    list.push_back({"avx2", avx2, {float32_avx2, bfloat16_avx2, float16_avx2}});
#endif
    list.push_back({"baseline", true, {float32_baseline, bfloat16_baseline, float16_baseline}});
    return list;
  }();
  return all;
}

const Variant& find_variant(const std::string& isa) {
  for (const Variant& variant : variants()) {
    if (variant.supported && (isa.empty() || isa == variant.name)) return variant;
  }
  throw std::invalid_argument("isa is '" + isa + "', which this processor or build does not have; see cpu_isas()");
}

}  // namespace

std::vector<std::string> cpu_isas() {
  std::vector<std::string> names;
  for (const Variant& variant : variants()) {
    if (variant.supported) names.emplace_back(variant.name);
  }
  return names;
}

void noise_cpu(const NoiseArguments& a, int dtype, int threads, const std::string& isa) {
  const Worker worker = find_variant(isa).worker[dtype];
  const int64_t units_per_row = (a.n + kUnit - 1) / kUnit;
  const int64_t units = a.rows * units_per_row;
  const int64_t parts =
      std::max<int64_t>(1, std::min<int64_t>(threads, (units + kUnitsPerThread - 1) / kUnitsPerThread));
  std::vector<std::thread> pool;
  pool.reserve(static_cast<size_t>(parts));
  for (int64_t part = 1; part < parts; ++part) {
    const int64_t first = units * part / parts, last = units * (part + 1) / parts;
    try {
      pool.emplace_back(worker, std::cref(a), units_per_row, first, last);
    } catch (const std::system_error&) {  // the machine has no thread left to give
      worker(a, units_per_row, first, last);
    }
  }
  worker(a, units_per_row, 0, units / parts);
  for (std::thread& thread : pool) thread.join();
}

}  // namespace bpo
