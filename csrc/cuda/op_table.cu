#include "../op_functions.h"
#include "multi_tensor_apply.cuh"

namespace samkernels {

const OpTable& CudaOps() {
  static constexpr OpTable table = cuda::TableOf("cuda", cuda::kChunkSize);
  return table;
}

// Asks the runtime for the code of one kernel: that needs a driver, a device, and an architecture
// that was compiled for it, but launches nothing.
const char* WhyNoCuda() {
  int count = 0;
  cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaSuccess && count == 0) error = cudaErrorNoDevice;
  if (error == cudaSuccess) error = cuda::KernelImageError();
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // or a later check would find it
  if (error == cudaErrorNoKernelImageForDevice) {
    return "the core was built for GPUs of other architectures (" SAMKERNELS_CUDA_ARCHS
           "): install again on this machine, or with SAMKERNELS_CUDA_ARCHS set to its compute "
           "capability without the point";
  }
  return cudaGetErrorString(error);
}

}  // namespace samkernels
