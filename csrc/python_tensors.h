// Reads PyTorch tensors without PyTorch: through DLPack's C exchange API where their type offers
// it (PyTorch 2.10 and later), else through their Python attributes.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

#include "ops.h"

namespace samkernels {

// What the core needs to know of a list of tensors, as they were when it was made: it neither owns
// nor watches them.
class TensorList {
 public:
  // Throws what PyTorch raises if something is no tensor with memory of its own.
  TensorList(const pybind11::list& tensors, bool use_exchange_api);

  size_t size() const { return addresses_.size(); }
  const std::vector<void*>& addresses() const { return addresses_; }
  const std::vector<int64_t>& numel() const { return numel_; }

  // The dtype of all tensors. Throws TypeError if they differ or the core has no kernels for it.
  DType dtype() const;

  // Whether tensor i of both lists has the same dtype, device, shape and order in memory.
  bool IsAlike(const TensorList& other) const;

 private:
  static constexpr uint8_t kUnknown = 255;  // a dtype or device that equals nothing

  struct Kind {
    uint8_t dtype_code, dtype_bits;
    int32_t device_type, device_index;

    bool operator==(const Kind& other) const {
      return dtype_code != kUnknown && dtype_code == other.dtype_code &&
             dtype_bits == other.dtype_bits && device_type == other.device_type &&
             device_index == other.device_index;
    }
  };

  void Add(void* address, Kind kind, int ndim, const int64_t* shape, const int64_t* strides);
  void ReadThroughPython(pybind11::handle tensor);

  std::vector<void*> addresses_;
  std::vector<int64_t> numel_;
  std::vector<Kind> kinds_;
  // Of all tensors: ndim, then size and stride of each dimension. A stride that is never walked
  // (size 1, or no elements) stands as 0.
  std::vector<int64_t> layouts_;
};

}  // namespace samkernels
