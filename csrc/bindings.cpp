// Defines the Python module samkernels._C. Only this file and python_tensors.cpp know pybind11.
//
// Lists arrive as TensorList. Whoever calls has checked what is said about tensors in
// samkernels/ops.py; here it is checked that lists agree and have memory, since what follows walks
// them by address.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "chunk_plan.h"
#include "ops.h"
#include "python_tensors.h"

#ifdef SAMKERNELS_EMULATED
#include <cuda_runtime.h>  // the stand-in of csrc/emulation
#endif

#ifndef SAMKERNELS_MODULE
#define SAMKERNELS_MODULE _C
#endif

namespace py = pybind11;

namespace samkernels {
namespace {

const OpTable& TableFor(bool cuda) {
  if (!cuda) return CpuOps();
#ifdef SAMKERNELS_WITH_CUDA
  return CudaOps();
#else
  throw std::runtime_error("samkernels was built without CUDA");
#endif
}

// Holds where a call runs: a table of ops, and the stream or the threads.
struct Target {
  const OpTable* ops;
  Execution execution;
};

Target CpuTarget(int num_threads) { return {&TableFor(false), {nullptr, num_threads}}; }

Target CudaTarget(std::uintptr_t stream) {
  return {&TableFor(true), {reinterpret_cast<void*>(stream), 1}};
}

// A list or None. For None in the place of a pointer pybind11 searches other modules, which takes a
// few thousand instructions.
using OptionalList = std::optional<std::shared_ptr<TensorList>>;

// Holds the shapes of an op, and checks that its lists go together.
class Shapes {
 public:
  Shapes(const char* name, const TensorList& list, const OpTable& ops)
      : name_(name), list_(list), layout_(list.layout()), plan_(list.Plan(ops.chunk_size)) {
    tensors_ = {list.dtype(),          static_cast<int64_t>(list.size()),
                layout_->numel.data(), plan_->first_chunk(),
                plan_->chunk_size(),   plan_->total_numel()};
  }

  const Tensors& tensors() const { return tensors_; }

  MutableList List(const char* name, const TensorList& list) const {
    RequireAsMany(name, list);
    if (!list_.IsAlike(list)) {
      throw std::invalid_argument(std::string(name) + " and " + name_ +
                                  " differ in dtype, device, shape or strides of a tensor");
    }
    for (size_t i = 0; i < list.size(); ++i) {
      if (list.addresses()[i] == nullptr && list.numel()[i] > 0) {
        throw std::invalid_argument(std::string(name) + "[" + std::to_string(i) +
                                    "] has no memory (address 0) but " +
                                    std::to_string(list.numel()[i]) + " elements");
      }
    }
    return list.addresses().data();
  }

  MutableList Disjoint(const char* name, const TensorList& list) const {
    const MutableList addresses = List(name, list);
    list.RequireDisjoint(name);
    return addresses;
  }

  // Says of a list of numbers, one for each tensor, which are float64; the others are float32.
  std::unique_ptr<bool[]> AreDouble(const char* name, const TensorList& numbers) const {
    RequireAsMany(name, numbers);
    std::vector<const void*> sorted(numbers.addresses().begin(), numbers.addresses().end());
    std::sort(sorted.begin(), sorted.end());
    if (std::adjacent_find(sorted.begin(), sorted.end()) != sorted.end()) {
      throw std::invalid_argument(std::string(name) + ": two tensors are one and the same");
    }
    std::unique_ptr<bool[]> are_double(new bool[numbers.size()]);
    for (size_t i = 0; i < numbers.size(); ++i) {
      const Layout::Kind& kind = numbers.layout()->kinds[i];
      are_double[i] = kind.IsFloat(64);
      if (numbers.numel()[i] != 1 || numbers.addresses()[i] == nullptr ||
          !(are_double[i] || kind.IsFloat(32)) || !kind.IsBeside(layout_->kinds[i])) {
        throw std::invalid_argument(std::string(name) + "[" + std::to_string(i) +
                                    "] is no float32 or float64 number on the device of " + name_);
      }
    }
    return are_double;
  }

  MutableList Optional(const char* name, const OptionalList& list) const {
    return list ? List(name, **list) : nullptr;
  }

  int64_t WorkspaceBytes(int num_sums) const {
    return samkernels::WorkspaceBytes(plan_->num_chunks(), tensors_.num_tensors, num_sums);
  }

 private:
  void RequireAsMany(const char* name, const TensorList& list) const {
    if (list.size() == list_.size()) return;
    throw std::invalid_argument(std::string(name) + " has " + std::to_string(list.size()) +
                                " tensors and " + name_ + " has " + std::to_string(list_.size()));
  }

  const char* name_;
  const TensorList& list_;
  // Keeps what tensors_ points into, whatever happens to the list during the call.
  std::shared_ptr<const Layout> layout_;
  std::shared_ptr<const ChunkPlan> plan_;
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

// Holds the room for the sums of an op: the caller's, or the core's own for host ops that get none.
class Workspace {
 public:
  Workspace(const Target& target, const Shapes& shapes, int num_sums, std::uintptr_t address)
      : address_(Pointer<void>(address)) {
    if (address != 0) return;
    if (target.ops != &CpuOps()) throw std::invalid_argument("workspace has no memory (address 0)");
    own_.reset(new double[shapes.WorkspaceBytes(num_sums) / sizeof(double)]);
    address_ = own_.get();
  }

  void* address() const { return address_; }

 private:
  std::unique_ptr<double[]> own_;
  void* address_;
};

// Makes a Scalar of a number that Python gave, or of float32 in the memory that the op works on.
Scalar ScalarOf(float value, std::uintptr_t address, int64_t stride = 0) {
  return {value, Pointer<const float>(address), stride};
}

// Holds the Python side of Mix.
struct PyMix {
  std::shared_ptr<TensorList> x;
  OptionalList y;
  Mix rest;

  Mix For(const Shapes& shapes) const {
    Mix mix = rest;
    mix.x = shapes.List("mix.x", *x);
    mix.y = shapes.Optional("mix.y", y);
    return mix;
  }
};

// Runs an op while other threads of Python run, and notes it in the journal: where no signal
// handler can come between. See contract.Backend.perturb_.
template <typename Args>
void Run(const Target& target, void (*OpTable::*op)(const Args&, const Execution&),
         const Args& args, std::optional<py::list> journal = std::nullopt) {
  {
    py::gil_scoped_release release;
    (target.ops->*op)(args, target.execution);
  }
  if (journal) journal->append(true);
}

}  // namespace

PYBIND11_MODULE(SAMKERNELS_MODULE, m) {
  m.doc() = "Compiled core of samkernels. Private: use samkernels.ops.";

  py::class_<Target>(m, "Target", py::module_local());
  m.def("cpu", CpuTarget, py::arg("num_threads"));
  m.def("cuda", CudaTarget, py::arg("stream"));

  m.attr("INTERFACE") = SAMKERNELS_INTERFACE;
  m.def("build_info", [] {
    py::dict info;
    info["compiler"] = SAMKERNELS_COMPILER;
    info["threads"] = SAMKERNELS_CPU_THREADS;
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
  py::class_<TensorList, std::shared_ptr<TensorList>>(m, "TensorList", py::module_local())
      .def(py::init<const py::list&, bool>(), py::arg("tensors"),
           py::arg("use_exchange_api") = true)
      .def("is_alike", &TensorList::IsAlike, py::arg("other"));
  py::class_<TensorReader>(m, "TensorReader", py::module_local())
      .def(py::init<py::type, py::type>(), py::arg("tensor"), py::arg("parameter"))
      .def("gradients", &TensorReader::Gradients, py::arg("candidates"), py::arg("params"),
           py::arg("known"))
      .def("state", &TensorReader::State, py::arg("state"), py::arg("params"), py::arg("name"),
           py::arg("like"), py::arg("numbers") = false, py::arg("seen") = py::none())
      .def("versions", &TensorReader::Versions, py::arg("tensors"));

  m.def(
      "workspace_bytes",
      [](const Target& target, const TensorList& list, int num_sums) {
        if (target.ops == &CpuOps()) return int64_t{0};  // see Workspace
        const int64_t num_chunks = list.Plan(target.ops->chunk_size)->num_chunks();
        return WorkspaceBytes(num_chunks, list.size(), num_sums);
      },
      py::arg("target"), py::arg("tensors"), py::arg("num_sums"));
  m.def("num_dots", NumDots, py::arg("num_lists"), py::arg("weighted"));

  py::class_<PyMix>(m, "Mix", py::module_local())
      .def(
          py::init([](std::shared_ptr<TensorList> x, OptionalList y, float a,
                      std::uintptr_t a_address, int64_t a_stride, float b, std::uintptr_t b_address,
                      int64_t b_stride, int function, std::uintptr_t divisor,
                      std::uintptr_t ascent_square, std::uintptr_t found_inf) {
            const auto known = static_cast<Function>(function);
            if (function < 0 || function >= kFunctions || (!y && known != Function::kLinear)) {
              throw std::invalid_argument("mix.function is unknown, or lacks mix.y");
            }
            return PyMix{std::move(x),
                         std::move(y),
                         {nullptr, nullptr, ScalarOf(a, a_address, a_stride),
                          ScalarOf(b, b_address, b_stride), known, Pointer<const float>(divisor),
                          Pointer<const double>(ascent_square), Pointer<const float>(found_inf)}};
          }),
          py::arg("x").none(false), py::arg("y"), py::arg("a"), py::arg("a_address"),
          py::arg("a_stride"), py::arg("b"), py::arg("b_address"), py::arg("b_stride"),
          py::arg("function"), py::arg("divisor"), py::arg("ascent_square"), py::arg("found_inf"));
  py::class_<SgdOptions>(m, "SgdOptions", py::module_local())
      .def(py::init([](float lr, std::uintptr_t lr_address, float momentum,
                       float one_minus_dampening, std::uintptr_t one_minus_dampening_address,
                       float weight_decay, float gradient_sign, bool nesterov, bool has_momentum,
                       bool init_momentum) {
             return SgdOptions{ScalarOf(lr, lr_address),
                               momentum,
                               ScalarOf(one_minus_dampening, one_minus_dampening_address),
                               weight_decay,
                               gradient_sign,
                               nesterov,
                               has_momentum,
                               init_momentum};
           }),
           py::kw_only(), py::arg("lr"), py::arg("lr_address"), py::arg("momentum"),
           py::arg("one_minus_dampening"), py::arg("one_minus_dampening_address"),
           py::arg("weight_decay"), py::arg("gradient_sign"), py::arg("nesterov"),
           py::arg("has_momentum"), py::arg("init_momentum"));

  py::class_<AdamOptions>(m, "AdamOptions", py::module_local())
      .def(py::init([](float lr, std::uintptr_t lr_address, double beta1, float one_minus_beta1,
                       double beta2, float one_minus_beta2, float eps, float weight_decay,
                       float gradient_sign, bool decoupled) {
             return AdamOptions{ScalarOf(lr, lr_address),
                                static_cast<float>(beta1),
                                one_minus_beta1,
                                static_cast<float>(beta2),
                                one_minus_beta2,
                                eps,
                                weight_decay,
                                gradient_sign,
                                decoupled,
                                beta1,
                                beta2};
           }),
           py::kw_only(), py::arg("lr"), py::arg("lr_address"), py::arg("beta1"),
           py::arg("one_minus_beta1"), py::arg("beta2"), py::arg("one_minus_beta2"), py::arg("eps"),
           py::arg("weight_decay"), py::arg("gradient_sign"), py::arg("decoupled"));

#ifdef SAMKERNELS_EMULATED
  m.def("take_traffic", [] {
    const emulation::Traffic traffic = emulation::traffic;
    emulation::traffic = {};
    return py::make_tuple(traffic.read, traffic.written);
  });
  m.def("take_launches", [] { return std::exchange(emulation::launches, 0); });
  m.def("set_driver_version", [](int version) { emulation::driver_version = version; });
#endif

  m.def("dots", [](const Target& target, const TensorList& x, const OptionalList& y,
                   const OptionalList& z, const OptionalList& weights, float eta,
                   std::uintptr_t workspace, std::uintptr_t per_tensor, std::uintptr_t total) {
    if ((z && !y) || (y && weights)) {
      throw std::invalid_argument("dots: give x, y and z in their order, and weights with x alone");
    }
    const Shapes shapes("x", x, *target.ops);
    const int num_sums = NumDots(1 + y.has_value() + z.has_value(), weights.has_value());
    const Workspace room(target, shapes, num_sums, workspace);
    const DotsArgs args = {shapes.tensors(),
                           {shapes.List("x", x), shapes.Optional("y", y), shapes.Optional("z", z)},
                           shapes.Optional("weights", weights),
                           eta,
                           room.address(),
                           Required<double>("per_tensor", per_tensor),
                           Required<double>("total", total)};
    Run(target, &OpTable::dots, args);
  });
  m.def("perturb",
        [](const Target& target, const TensorList& params, const TensorList& direction,
           const TensorList& old_params, std::uintptr_t square, int64_t square_stride, float rho,
           std::uintptr_t rho_address, int64_t rho_stride, std::optional<float> eta, float eps,
           bool rounds_at_random, bool saves, std::optional<py::list> journal) {
          const Shapes shapes("params", params, *target.ops);
          const PerturbArgs args = {shapes.tensors(),
                                    shapes.Disjoint("params", params),
                                    shapes.List("direction", direction),
                                    shapes.List("old_params", old_params),
                                    Required<const double>("square", square),
                                    square_stride,
                                    ScalarOf(rho, rho_address, rho_stride),
                                    eps,
                                    eta.has_value(),
                                    eta.value_or(0.0f),
                                    rounds_at_random,
                                    saves};
          Run(target, &OpTable::perturb, args, journal);
        });
  m.def("restore",
        [](const Target& target, const TensorList& params, const TensorList& old_params) {
          const Shapes shapes("params", params, *target.ops);
          const RestoreArgs args = {shapes.tensors(), shapes.List("params", params),
                                    shapes.List("old_params", old_params)};
          Run(target, &OpTable::restore, args);
        });
  m.def("mix", [](const Target& target, const PyMix& mix, const TensorList& out, bool keeps) {
    const Shapes shapes("out", out, *target.ops);
    const MixArgs args = {shapes.tensors(), mix.For(shapes), keeps, shapes.List("out", out)};
    Run(target, &OpTable::mix, args);
  });
  m.def("sgd", [](const Target& target, const PyMix& mix, const TensorList& params,
                  const TensorList& old_params, const OptionalList& momentum_buffers,
                  const SgdOptions& options, std::optional<py::list> journal) {
    const Shapes shapes("params", params, *target.ops);
    const SgdArgs args = {shapes.tensors(),
                          mix.For(shapes),
                          shapes.List("params", params),
                          shapes.List("old_params", old_params),
                          shapes.Optional("momentum_buffers", momentum_buffers),
                          options};
    if (options.has_momentum && args.momentum_buffer == nullptr) {
      throw std::invalid_argument("momentum_buffers is missing");
    }
    Run(target, &OpTable::sgd, args, journal);
  });
  m.def("sgd_hess",
        [](const Target& target, const TensorList& params, const TensorList& grads,
           const TensorList& hessian_products, const OptionalList& momentum_buffers,
           const std::vector<std::pair<std::int64_t, std::int64_t>>& positions, float rho,
           std::uintptr_t rho_address, const SgdOptions& options, std::optional<py::list> journal) {
          const Shapes shapes("params", params, *target.ops);
          if (positions.size() != params.size()) {
            throw std::invalid_argument("positions: give one pair for each of the params");
          }
          std::vector<Positions> of_tensors;
          for (size_t i = 0; i < params.size(); ++i) {
            const auto [count, stride] = positions[i];
            if (count < 1 || stride < 1 || count > INT32_MAX || stride > INT32_MAX ||
                params.numel()[i] % count != 0 || params.numel()[i] / count % stride != 0) {
              throw std::invalid_argument("positions[" + std::to_string(i) + "] does not fit " +
                                          std::to_string(params.numel()[i]) + " elements");
            }
            of_tensors.push_back({count, stride});
          }
          const SgdHessArgs args = {shapes.tensors(),
                                    shapes.List("params", params),
                                    shapes.List("grads", grads),
                                    shapes.List("hessian_products", hessian_products),
                                    shapes.Optional("momentum_buffers", momentum_buffers),
                                    of_tensors.data(),
                                    ScalarOf(rho, rho_address),
                                    options};
          if (options.has_momentum && args.momentum_buffer == nullptr) {
            throw std::invalid_argument("momentum_buffers is missing");
          }
          Run(target, &OpTable::sgd_hess, args, journal);
        });
  m.def("adam",
        [](const Target& target, const PyMix& mix, const TensorList& params,
           const TensorList& old_params, const TensorList& exp_avgs, const TensorList& exp_avg_sqs,
           const TensorList& steps, std::uintptr_t bias_corrections, const AdamOptions& options,
           std::optional<py::list> journal) {
          const Shapes shapes("params", params, *target.ops);
          const std::unique_ptr<bool[]> are_double = shapes.AreDouble("steps", steps);
          const AdamArgs args = {shapes.tensors(),
                                 mix.For(shapes),
                                 shapes.List("params", params),
                                 shapes.List("old_params", old_params),
                                 shapes.List("exp_avgs", exp_avgs),
                                 shapes.List("exp_avg_sqs", exp_avg_sqs),
                                 {steps.addresses().data(), are_double.get()},
                                 Required<BiasCorrections>("bias_corrections", bias_corrections),
                                 options};
          Run(target, &OpTable::adam, args, journal);
        });
}

}  // namespace samkernels
