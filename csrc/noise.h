// The two halves of the noise ops, as bindings.cpp calls them. No torch and no Python in here. x_dtype and out_dtype
// are DTypeCodes.
#pragma once

#include <string>
#include <vector>

#include "philox_normal.h"

namespace bpo {

// Instruction sets that this processor can run, best first.
std::vector<std::string> cpu_isas();

// Host pointers. Uses at most `threads` threads; an empty `isa` means the best.
void noise_cpu(const NoiseArguments& arguments, int x_dtype, int out_dtype, int threads, const std::string& isa);

#if defined(BPO_CUDA)
// Pointers on `device`. Queued on its `stream` (a cudaStream_t); does not wait. Leaves `device` the current one.
void noise_cuda(const NoiseArguments& arguments, int x_dtype, int out_dtype, int device, void* stream);
int cuda_device_count();
#endif

}  // namespace bpo
