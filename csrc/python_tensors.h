// Reads PyTorch tensors without PyTorch: through DLPack's C exchange API where their type offers
// it (PyTorch 2.10 and later), else through their Python attributes.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "chunk_plan.h"
#include "ops.h"

namespace samkernels {

// Holds what lists that are alike have in common: everything but the addresses.
struct Layout {
  struct Kind {
    static constexpr uint8_t kUnknown = 255;  // a dtype or device that equals nothing

    uint8_t dtype_code, dtype_bits;
    int32_t device_type, device_index;

    bool operator==(const Kind& other) const {
      return dtype_code != kUnknown && dtype_code == other.dtype_code &&
             dtype_bits == other.dtype_bits && device_type == other.device_type &&
             device_index == other.device_index;
    }
    bool IsBeside(const Kind& other) const {
      return device_type == other.device_type && device_index == other.device_index;
    }
    bool IsFloat(int bits) const;  // bfloat16 is none
  };

  std::vector<int64_t> numel;
  std::vector<Kind> kinds;
  // Holds, of all tensors, ndim, then size and stride of each dimension. A stride that is never
  // walked (size 1, or no elements) stands as 0.
  std::vector<int64_t> dims;
};

// Holds what the core needs to know of a list of tensors, as they were when it was made. It neither
// owns nor watches them.
class TensorList {
 public:
  // Throws what PyTorch raises if something is no tensor with memory of its own.
  TensorList(const pybind11::list& tensors, bool use_exchange_api);
  TensorList(std::vector<void*> addresses, std::shared_ptr<const Layout> layout)
      : addresses_(std::move(addresses)), layout_(std::move(layout)) {}

  size_t size() const { return addresses_.size(); }
  const std::vector<void*>& addresses() const { return addresses_; }
  const std::vector<int64_t>& numel() const { return layout_->numel; }
  const std::shared_ptr<const Layout>& layout() const { return layout_; }

  // Returns the dtype of all tensors. Throws TypeError if they differ or there are no kernels.
  DType dtype() const;

  // Says whether tensor i of both lists has the same dtype, device, shape and order in memory. Such
  // lists share one layout from then on, so that the next comparison is quick.
  bool IsAlike(const TensorList& other) const;

  // Keeps the plan for the next call with the same chunk size.
  std::shared_ptr<const ChunkPlan> Plan(int64_t chunk_size) const;

  // Throws ValueError if two of the tensors overlap: an element of both would be written twice.
  void RequireDisjoint(const char* name) const;

 private:
  std::vector<void*> addresses_;
  mutable std::shared_ptr<const Layout> layout_;
  mutable std::shared_ptr<const ChunkPlan> plan_;
  mutable bool is_disjoint_ = false;
};

// Reads for an optimizer what belongs to its parameters, in one call for all of them. Each function
// returns None as soon as something is not as it was in the last step, or not plain: of another
// type than torch.Tensor and torch.nn.Parameter, say. The caller looks closely then, in Python.
class TensorReader {
 public:
  TensorReader(pybind11::type tensor, pybind11::type parameter);

  // Returns the gradients of `params`, and what the core needs to know of both:
  // (list of gradients, TensorList of gradients, TensorList of params). `known` is the last of
  // these from the last step, and is returned where no parameter has other memory now. Returns
  // None, too, unless `params` are exactly those of `candidates` that have a gradient.
  pybind11::object Gradients(pybind11::handle candidates, const pybind11::list& params,
                             const std::shared_ptr<TensorList>& known) const;

  // Returns state[p][name] of every p in params, where state is a dict as torch.optim keeps it:
  // (list of tensors, TensorList). They have to be laid out as `like`; or, if they are numbers, to
  // be float32 or float64 of shape () on its device.
  // `seen`: what this returned in the last step, or None; it is not negated, and not asked again.
  pybind11::object State(pybind11::handle state, const pybind11::list& params,
                         const pybind11::str& name, const TensorList& like, bool numbers,
                         pybind11::handle seen) const;

  // Returns how often each tensor has been written.
  pybind11::list Versions(const pybind11::list& tensors) const;

 private:
  bool IsPlain(pybind11::handle tensor) const {
    const auto* type = reinterpret_cast<PyObject*>(Py_TYPE(tensor.ptr()));
    return type == tensor_.ptr() || type == parameter_.ptr();
  }

  // Says whether it is a dict, or torch.optim's defaultdict: a class of somebody else may look up
  // in its own way.
  bool IsPlainDict(pybind11::handle state) const {
    const auto* type = reinterpret_cast<PyObject*>(Py_TYPE(state.ptr()));
    return PyDict_CheckExact(state.ptr()) || type == default_dict_.ptr();
  }

  // Says whether PyTorch negates it when it reads it: its memory holds the opposite then.
  bool IsNegated(pybind11::handle tensor) const { return is_neg_(tensor).cast<bool>(); }

  pybind11::type tensor_, parameter_;
  pybind11::object grad_, version_, is_neg_, default_dict_;
  const void* exchange_api_;  // or null
};

}  // namespace samkernels
