// Python's view of the extension: pointers as integers, sizes in elements. Nothing is checked here beyond the dtype
// code; bpo_fast.ops.noise checks tensors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>

#include "noise.h"

namespace py = pybind11;

namespace {

bpo::NoiseArguments arguments(uintptr_t x, uintptr_t out, int64_t rows, int64_t n, int64_t x_stride,
                              int64_t out_stride, uintptr_t scales, uintptr_t steps, uintptr_t ids, int64_t seed) {
  return {reinterpret_cast<const void*>(x),
          reinterpret_cast<void*>(out),
          rows,
          n,
          x_stride,
          out_stride,
          reinterpret_cast<const float*>(scales),
          reinterpret_cast<const int64_t*>(steps),
          reinterpret_cast<const int64_t*>(ids),
          static_cast<uint64_t>(seed)};
}

void check_dtype(int dtype) {
  if (dtype < bpo::kFloat32 || dtype > bpo::kFloat16) {
    throw py::value_error("dtype is " + std::to_string(dtype) + "; expected 0 (float32), 1 (bfloat16) or 2 (float16)");
  }
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Native half of bpo_fast.add_noise: pointers, sizes and a stream.";

  module.def("cpu_isas", &bpo::cpu_isas, "Instruction sets this processor can run, best first.");
  module.def(
      "philox4x32_10",
      [](std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key) {
        bpo::philox4x32_10(counter.data(), key[0], key[1]);
        return counter;
      },
      py::arg("counter"), py::arg("key"), "One Philox4x32-10 block: 4 counter words and 2 key words -> 4 words.");
  module.def(
      "noise_cpu",
      [](uintptr_t x, uintptr_t out, int64_t rows, int64_t n, int64_t x_stride, int64_t out_stride, uintptr_t scales,
         uintptr_t steps, uintptr_t ids, int64_t seed, int dtype, int threads, const std::string& isa) {
        check_dtype(dtype);
        const auto a = arguments(x, out, rows, n, x_stride, out_stride, scales, steps, ids, seed);
        py::gil_scoped_release release;
        bpo::noise_cpu(a, dtype, threads, isa);
      },
      py::arg("x"), py::arg("out"), py::arg("rows"), py::arg("n"), py::arg("x_stride"), py::arg("out_stride"),
      py::arg("scales"), py::arg("steps"), py::arg("ids"), py::arg("seed"), py::arg("dtype"), py::arg("threads") = 1,
      py::arg("isa") = "");

#if defined(BPO_CUDA)
  module.attr("cuda_built") = true;
  module.attr("cuda_archs") = py::tuple(py::str(BPO_CUDA_ARCHS).attr("split")());
  module.def("cuda_device_count", &bpo::cuda_device_count, "CUDA devices that the driver shows; 0 without a driver.");
  module.def(
      "noise_cuda",
      [](uintptr_t x, uintptr_t out, int64_t rows, int64_t n, int64_t x_stride, int64_t out_stride, uintptr_t scales,
         uintptr_t steps, uintptr_t ids, int64_t seed, int dtype, int device, uintptr_t stream) {
        check_dtype(dtype);
        const auto a = arguments(x, out, rows, n, x_stride, out_stride, scales, steps, ids, seed);
        py::gil_scoped_release release;
        bpo::noise_cuda(a, dtype, device, reinterpret_cast<void*>(stream));
      },
      py::arg("x"), py::arg("out"), py::arg("rows"), py::arg("n"), py::arg("x_stride"), py::arg("out_stride"),
      py::arg("scales"), py::arg("steps"), py::arg("ids"), py::arg("seed"), py::arg("dtype"), py::arg("device"),
      py::arg("stream"));
#else
  module.attr("cuda_built") = false;
  module.attr("cuda_archs") = py::tuple();
  module.def("cuda_device_count", [] { return 0; }, "0: the CUDA half was not built.");
#endif
}
