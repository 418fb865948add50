// Kernels that each do one thing wrong; and one that does none.
#pragma once

#include <cuda_runtime.h>

namespace rnnkern {

// Runs the kernel called `name`; `numbers` are kNumbers of them, for it to read and write.
constexpr int kNumbers = 256;
cudaError_t defect(const char* name, float* numbers);

}  // namespace rnnkern
