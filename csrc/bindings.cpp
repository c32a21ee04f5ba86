// The Python module samkernels._C. The only file that knows pybind11.
//
// Lists arrive as Python lists of addresses (tensor.data_ptr()), with the element counts beside
// them. Whoever calls has checked shapes, dtypes, devices and layouts (samkernels/ops.py); here
// only lengths and null addresses are.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "chunk_plan.h"
#include "ops.h"

#ifndef SAMKERNELS_MODULE
#define SAMKERNELS_MODULE _C
#endif

namespace py = pybind11;

namespace samkernels {
namespace {

using Addresses = std::vector<std::uintptr_t>;

const OpTable& TableFor(bool cuda) {
  if (!cuda) return CpuOps();
#ifdef SAMKERNELS_WITH_CUDA
  return CudaOps();
#else
  throw std::runtime_error("samkernels was built without CUDA");
#endif
}

// The call's place: a table of ops, and the stream or the threads to run it with.
struct Target {
  const OpTable* ops;
  Execution execution;
};

Target CpuTarget(int num_threads) { return {&TableFor(false), {nullptr, num_threads}}; }

Target CudaTarget(std::uintptr_t stream) {
  return {&TableFor(true), {reinterpret_cast<void*>(stream), 1}};
}

// Owns what Tensors points to, and checks the lists that are given with it.
class Shapes {
 public:
  Shapes(const std::vector<int64_t>& numel, DType dtype, const OpTable& ops)
      : numel_(Checked(numel)), plan_(numel_.data(), numel_.size(), ops.chunk_size) {
    tensors_ = {dtype,
                static_cast<int64_t>(numel_.size()),
                numel_.data(),
                plan_.first_chunk(),
                plan_.chunk_size(),
                plan_.total_numel()};
  }

  const Tensors& tensors() const { return tensors_; }

  MutableList List(const char* name, const Addresses& addresses) const {
    if (addresses.size() != numel_.size()) {
      throw std::invalid_argument(std::string(name) + " has " + std::to_string(addresses.size()) +
                                  " addresses for " + std::to_string(numel_.size()) + " tensors");
    }
    for (size_t i = 0; i < addresses.size(); ++i) {
      if (addresses[i] == 0 && numel_[i] > 0) {
        throw std::invalid_argument(std::string(name) + "[" + std::to_string(i) +
                                    "] has no memory (address 0) but " + std::to_string(numel_[i]) +
                                    " elements");
      }
    }
    return reinterpret_cast<MutableList>(addresses.data());
  }

  MutableList Optional(const char* name, const std::optional<Addresses>& addresses) const {
    return addresses ? List(name, *addresses) : nullptr;
  }

 private:
  static const std::vector<int64_t>& Checked(const std::vector<int64_t>& numel) {
    for (int64_t n : numel) {
      if (n < 0) throw std::invalid_argument("numel holds a negative count");
    }
    return numel;
  }

  const std::vector<int64_t>& numel_;
  ChunkPlan plan_;
  Tensors tensors_;
};

template <typename T>
T* Pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

template <typename T>
T* Required(const char* name, std::uintptr_t address) {
  if (address == 0) throw std::invalid_argument(std::string(name) + " has no memory (address 0)");
  return Pointer<T>(address);
}

// The Python side of Recombination.
struct PyRecombination {
  Addresses magnitude;
  std::optional<Addresses> sign;
  std::uintptr_t numerator;
  std::uintptr_t denominator;
  bool per_tensor;
  float eps;
  std::uintptr_t ascent_norm;

  Recombination For(const Shapes& shapes) const {
    return {shapes.List("magnitude", magnitude),
            shapes.Optional("sign", sign),
            Pointer<const float>(numerator),
            Pointer<const float>(denominator),
            per_tensor ? 1 : 0,
            eps,
            Pointer<const float>(ascent_norm)};
  }
};

}  // namespace

PYBIND11_MODULE(SAMKERNELS_MODULE, m) {
  m.doc() = "Compiled core of samkernels. Private: use samkernels.ops.";

  py::enum_<DType>(m, "DType", py::module_local())
      .value("float32", DType::kFloat32)
      .value("bfloat16", DType::kBFloat16)
      .value("float16", DType::kFloat16);

  py::class_<Target>(m, "Target", py::module_local());
  m.def("cpu", CpuTarget, py::arg("num_threads"));
  m.def("cuda", CudaTarget, py::arg("stream"));

  m.def("build_info", [] {
    py::dict info;
    info["compiler"] = SAMKERNELS_COMPILER;
    info["openmp"] = SAMKERNELS_OPENMP;
    info["cpu_variant"] = CpuOps().name;
    info["cuda"] = SAMKERNELS_CUDA_VERSION;
    info["cuda_archs"] = SAMKERNELS_CUDA_ARCHS;
    return info;
  });
  m.def("why_no_cuda", []() -> std::optional<std::string> {
#ifdef SAMKERNELS_WITH_CUDA
    const char* reason = WhyNoCuda();
    if (reason == nullptr) return std::nullopt;
    return reason;
#else
    return "the core was built without CUDA";
#endif
  });
  m.def(
      "workspace_bytes",
      [](const Target& target, const std::vector<int64_t>& numel, int num_sums) {
        const ChunkPlan plan(numel.data(), numel.size(), target.ops->chunk_size);
        return WorkspaceBytes(plan.num_chunks(), numel.size(), num_sums);
      },
      py::arg("target"), py::arg("numel"), py::arg("num_sums"));
  m.attr("NORMS_SUMS") = kNormsSums;
  m.attr("COMPARE_SUMS") = kCompareSums;

  py::class_<PyRecombination>(m, "Recombination", py::module_local())
      .def(py::init<Addresses, std::optional<Addresses>, std::uintptr_t, std::uintptr_t, bool,
                    float, std::uintptr_t>(),
           py::kw_only(), py::arg("magnitude"), py::arg("sign"), py::arg("numerator"),
           py::arg("denominator"), py::arg("per_tensor"), py::arg("eps"), py::arg("ascent_norm"));
  py::class_<SgdOptions>(m, "SgdOptions", py::module_local())
      .def(py::init<float, float, float, float, float, bool, bool, bool>(), py::kw_only(),
           py::arg("lr"), py::arg("momentum"), py::arg("one_minus_dampening"),
           py::arg("weight_decay"), py::arg("gradient_sign"), py::arg("nesterov"),
           py::arg("has_momentum"), py::arg("init_momentum"));

  m.def("norms", [](const Target& target, const std::vector<int64_t>& numel, DType dtype,
                    const Addresses& x, const std::optional<Addresses>& weights,
                    std::uintptr_t workspace, std::uintptr_t per_tensor, std::uintptr_t total) {
    const Shapes shapes(numel, dtype, *target.ops);
    const NormsArgs args = {shapes.tensors(),
                            shapes.List("x", x),
                            shapes.Optional("weights", weights),
                            Required<void>("workspace", workspace),
                            Required<float>("per_tensor", per_tensor),
                            Required<float>("total", total)};
    py::gil_scoped_release release;
    target.ops->norms(args, target.execution);
  });
  m.def("perturb", [](const Target& target, const std::vector<int64_t>& numel, DType dtype,
                      const Addresses& params, const Addresses& grads, const Addresses& old_params,
                      std::uintptr_t norm, float rho, float eps, bool adaptive,
                      std::optional<py::list> journal) {
    const Shapes shapes(numel, dtype, *target.ops);
    const PerturbArgs args = {shapes.tensors(),
                              shapes.List("params", params),
                              shapes.List("grads", grads),
                              shapes.List("old_params", old_params),
                              Required<const float>("norm", norm),
                              rho,
                              eps,
                              adaptive};
    {
      py::gil_scoped_release release;
      target.ops->perturb(args, target.execution);
    }
    // Here, where no signal handler of Python can come between: see contract.Backend.perturb_.
    if (journal) journal->append(true);
  });
  m.def("restore", [](const Target& target, const std::vector<int64_t>& numel, DType dtype,
                      const Addresses& params, const Addresses& old_params) {
    const Shapes shapes(numel, dtype, *target.ops);
    const RestoreArgs args = {shapes.tensors(), shapes.List("params", params),
                              shapes.List("old_params", old_params)};
    py::gil_scoped_release release;
    target.ops->restore(args, target.execution);
  });
  m.def("recombine", [](const Target& target, const std::vector<int64_t>& numel, DType dtype,
                        const PyRecombination& recombination, const Addresses& out) {
    const Shapes shapes(numel, dtype, *target.ops);
    const RecombineArgs args = {shapes.tensors(), recombination.For(shapes),
                                shapes.List("out", out)};
    py::gil_scoped_release release;
    target.ops->recombine(args, target.execution);
  });
  m.def("sgd", [](const Target& target, const std::vector<int64_t>& numel, DType dtype,
                  const PyRecombination& recombination, const Addresses& params,
                  const Addresses& old_params, const std::optional<Addresses>& momentum_buffer,
                  const SgdOptions& options) {
    const Shapes shapes(numel, dtype, *target.ops);
    const SgdArgs args = {shapes.tensors(),
                          recombination.For(shapes),
                          shapes.List("params", params),
                          shapes.List("old_params", old_params),
                          shapes.Optional("momentum_buffer", momentum_buffer),
                          options};
    if (options.has_momentum && args.momentum_buffer == nullptr) {
      throw std::invalid_argument("momentum_buffer is missing");
    }
    py::gil_scoped_release release;
    target.ops->sgd(args, target.execution);
  });
  m.def("compare", [](const Target& target, const std::vector<int64_t>& numel, DType dtype,
                      const Addresses& first_grads, const Addresses& second_grads,
                      std::uintptr_t workspace, std::uintptr_t sums) {
    const Shapes shapes(numel, dtype, *target.ops);
    const CompareArgs args = {shapes.tensors(), shapes.List("first_grads", first_grads),
                              shapes.List("second_grads", second_grads),
                              Required<void>("workspace", workspace),
                              Required<double>("sums", sums)};
    py::gil_scoped_release release;
    target.ops->compare(args, target.execution);
  });
}

}  // namespace samkernels
