// Python's view of the extension: pointers as integers, sizes in elements. Checked here is what needs no look at
// memory: sizes that fit each other and pointers that are there. bpo_fast.ops.noise checks tensors and their indices.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>

#include "noise.h"

namespace py = pybind11;

namespace {

void require(bool condition, const char* name, int64_t found, const std::string& expected) {
  if (!condition) {
    throw py::value_error(std::string(name) + ": found " + std::to_string(found) + ", expected " + expected + ".");
  }
}

// What would otherwise read or write past the memory of the call, or divide by zero.
void check_arguments(const bpo::NoiseArguments& a) {
  require(a.samples >= 0, "samples", a.samples, "0 or more");
  require(a.n >= 0, "n", a.n, "0 or more");
  require(a.levels >= 0, "levels", a.levels, "0 or more");
  require(a.x_stride >= 0, "x_stride", a.x_stride, "0 or more");
  require(a.out_stride >= 0, "out_stride", a.out_stride, "0 or more");
  require(a.level_stride >= 0, "level_stride", a.level_stride, "0 or more");
  require(a.ladder || a.levels <= 1, "levels", a.levels, "at most 1 without ladder");
  if (a.samples == 0 || a.n == 0 || a.levels == 0) return;
  require(a.width >= 1 && a.n % a.width == 0, "width", a.width, "a divisor of n, " + std::to_string(a.n));
  require(a.x, "x", 0, "an address");
  require(a.out, "out", 0, "an address");
  require(a.scales, "scales", 0, "an address");
  require(!a.ladder || a.steps, "steps", 0, "an address for a ladder");
}

// NoiseArguments with every field by name; Python and philox_normal.h use the same names.
bpo::NoiseArguments arguments(uintptr_t x, uintptr_t out, int64_t samples, int64_t n, int64_t x_stride,
                              int64_t out_stride, int64_t width, int64_t levels, int64_t level_stride,
                              uintptr_t scales, uintptr_t steps, uintptr_t ids, uintptr_t source, uintptr_t out_rows,
                              int64_t seed, bool ladder) {
  bpo::NoiseArguments a;
  a.x = reinterpret_cast<const void*>(x);
  a.out = reinterpret_cast<void*>(out);
  a.samples = samples;
  a.n = n;
  a.x_stride = x_stride;
  a.out_stride = out_stride;
  a.width = width;
  a.levels = levels;
  a.level_stride = level_stride;
  a.scales = reinterpret_cast<const float*>(scales);
  a.steps = reinterpret_cast<const int64_t*>(steps);
  a.ids = reinterpret_cast<const int64_t*>(ids);
  a.source = reinterpret_cast<const int64_t*>(source);
  a.out_rows = reinterpret_cast<const int64_t*>(out_rows);
  a.seed = static_cast<uint64_t>(seed);
  a.ladder = ladder;
  check_arguments(a);
  return a;
}

void check_dtype(const char* name, int dtype) {
  require(dtype >= bpo::kFloat32 && dtype <= bpo::kFloat16, name, dtype, "0 (float32), 1 (bfloat16) or 2 (float16)");
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Native half of bpo_fast's noise ops: pointers, sizes and a stream.";

  py::class_<bpo::NoiseArguments>(module, "NoiseArguments", "What one call works on; see csrc/philox_normal.h.")
      .def(py::init(&arguments), py::kw_only(), py::arg("x"), py::arg("out"), py::arg("samples"), py::arg("n"),
           py::arg("x_stride"), py::arg("out_stride"), py::arg("width"), py::arg("levels") = 1,
           py::arg("level_stride") = 0, py::arg("scales"), py::arg("steps") = 0, py::arg("ids") = 0,
           py::arg("source") = 0, py::arg("out_rows") = 0, py::arg("seed"), py::arg("ladder") = false);

  module.def("cpu_isas", &bpo::cpu_isas, "Instruction sets this processor can run, best first.");
  module.def(
      "philox4x32_10",
      [](std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key) {
        bpo::philox4x32_10(counter.data(), bpo::round_keys(key[0], key[1]));
        return counter;
      },
      py::arg("counter"), py::arg("key"), "One Philox4x32-10 block: 4 counter words and 2 key words -> 4 words.");
  module.def(
      "noise_cpu",
      [](const bpo::NoiseArguments& a, int x_dtype, int out_dtype, int threads, const std::string& isa) {
        check_dtype("x_dtype", x_dtype);
        check_dtype("out_dtype", out_dtype);
        py::gil_scoped_release release;
        bpo::noise_cpu(a, x_dtype, out_dtype, threads, isa);
      },
      py::arg("arguments"), py::arg("x_dtype"), py::arg("out_dtype"), py::arg("threads") = 1, py::arg("isa") = "");

#if defined(BPO_CUDA)
  module.attr("cuda_built") = true;
  module.attr("cuda_archs") = py::tuple(py::str(BPO_CUDA_ARCHS).attr("split")());
  module.def("cuda_device_count", &bpo::cuda_device_count, "CUDA devices that the driver shows; 0 without a driver.");
  module.def(
      "noise_cuda",
      [](const bpo::NoiseArguments& a, int x_dtype, int out_dtype, int device, uintptr_t stream) {
        check_dtype("x_dtype", x_dtype);
        check_dtype("out_dtype", out_dtype);
        py::gil_scoped_release release;
        bpo::noise_cuda(a, x_dtype, out_dtype, device, reinterpret_cast<void*>(stream));
      },
      py::arg("arguments"), py::arg("x_dtype"), py::arg("out_dtype"), py::arg("device"), py::arg("stream"));
#else
  module.attr("cuda_built") = false;
  module.attr("cuda_archs") = py::tuple();
  module.def("cuda_device_count", [] { return 0; }, "0: the CUDA half was not built.");
#endif
}
