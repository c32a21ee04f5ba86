#include "python_tensors.h"

#include <algorithm>
#include <string>
#include <utility>

namespace py = pybind11;

namespace samkernels {
namespace {

// Declares the part of DLPack's binary interface that is used here (dmlc/dlpack,
// include/dlpack/dlpack.h, major version 1).
namespace dlpack {

constexpr uint32_t kMajorVersion = 1;
constexpr int32_t kCpu = 1;
constexpr int32_t kCuda = 2;
constexpr uint8_t kFloat = 2;
constexpr uint8_t kBFloat = 4;

struct DataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

struct Device {
  int32_t type;
  int32_t id;
};

struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

struct ExchangeApi {
  uint32_t major;
  uint32_t minor;
  void* previous;
  void* allocate;
  void* to_managed;
  void* from_managed;
  int (*read)(void* py_object, Tensor* out);  // 0, or -1 with a Python exception set
  void* current_stream;
};

}  // namespace dlpack

// Returns what reads tensors of this type, or null.
const dlpack::ExchangeApi* ExchangeApiOf(py::handle type) {
  const py::object capsule = py::getattr(type, "__dlpack_c_exchange_api__", py::none());
  if (!PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) return nullptr;
  const auto* api = static_cast<const dlpack::ExchangeApi*>(
      PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  return api->major == dlpack::kMajorVersion && api->read != nullptr ? api : nullptr;
}

struct View {
  void* address;
  Layout::Kind kind;
  int ndim;
  const int64_t* shape;
  const int64_t* strides;

  int64_t numel() const {
    int64_t numel = 1;
    for (int i = 0; i < ndim; ++i) numel *= shape[i];
    return numel;
  }
};

int64_t StrideOf(const View& view, int dim, int64_t numel) {
  return view.shape[dim] > 1 && numel > 0 ? view.strides[dim] : 0;
}

// Returns false with a Python exception set if this is no tensor with memory of its own.
bool Read(const dlpack::ExchangeApi* api, py::handle tensor, View* view) {
  dlpack::Tensor read;
  if (api->read(tensor.ptr(), &read) != 0) return false;
  *view = {static_cast<char*>(read.data) + read.byte_offset,
           {read.dtype.code, read.dtype.bits, read.device.type, read.device.id},
           read.ndim,
           read.shape,
           read.strides};
  return true;
}

// Reads an attribute of a tensor without the way through its type, which takes as long again.
py::object Get(const py::object& descriptor, py::handle tensor) {
  PyObject* const of = descriptor.ptr();
  PyObject* const value = Py_TYPE(of)->tp_descr_get(of, tensor.ptr(), nullptr);
  if (value == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(value);
}

// Collects the addresses of tensors that are laid out as those of another list.
class AlikeReader {
 public:
  explicit AlikeReader(const TensorList& like) : layout_(like.layout()) {
    addresses_.reserve(like.size());
  }

  // Returns false if the next tensor is not as the next one of the other list; then it is over.
  bool Add(const dlpack::ExchangeApi* api, py::handle tensor) {
    View view;
    if (!Read(api, tensor, &view)) {
      PyErr_Clear();
      return false;
    }
    const size_t i = addresses_.size();
    const int64_t numel = layout_->numel[i];
    const int64_t* dims = layout_->dims.data() + dims_read_;
    if (!(layout_->kinds[i] == view.kind) || dims[0] != view.ndim) return false;
    for (int d = 0; d < view.ndim; ++d) {
      if (dims[1 + 2 * d] != view.shape[d] || dims[2 + 2 * d] != StrideOf(view, d, numel)) {
        return false;
      }
    }
    dims_read_ += 1 + 2 * static_cast<size_t>(view.ndim);
    addresses_.push_back(view.address);
    return true;
  }

  const std::vector<void*>& addresses() const { return addresses_; }
  std::shared_ptr<TensorList> Take() {
    return std::make_shared<TensorList>(std::move(addresses_), layout_);
  }

 private:
  std::shared_ptr<const Layout> layout_;
  std::vector<void*> addresses_;
  size_t dims_read_ = 0;
};

// Builds a layout and its addresses, tensor by tensor.
struct ListBuilder {
  std::vector<void*> addresses;
  std::shared_ptr<Layout> layout = std::make_shared<Layout>();

  explicit ListBuilder(size_t count) {
    addresses.reserve(count);
    layout->numel.reserve(count);
    layout->kinds.reserve(count);
    layout->dims.reserve(6 * count);
  }

  void Add(const View& view) {
    const int64_t numel = view.numel();
    addresses.push_back(view.address);
    layout->numel.push_back(numel);
    layout->kinds.push_back(view.kind);
    layout->dims.push_back(view.ndim);
    for (int d = 0; d < view.ndim; ++d) {
      layout->dims.push_back(view.shape[d]);
      layout->dims.push_back(StrideOf(view, d, numel));
    }
  }

  void AddThroughPython(py::handle tensor) {
    // Tensors of a list are of one kind as a rule, and to find it out takes long.
    py::object dtype = tensor.attr("dtype"), device = tensor.attr("device");
    if (!dtype_ || !dtype.is(dtype_) || !device.equal(device_)) {
      kind_ = KindOf(dtype, device);
      dtype_ = std::move(dtype);
      device_ = std::move(device);
    }
    shape_.clear();
    strides_.clear();
    for (const py::handle size : tensor.attr("shape")) shape_.push_back(size.cast<int64_t>());
    for (const py::handle stride : tensor.attr("stride")()) {
      strides_.push_back(stride.cast<int64_t>());
    }
    const auto address = tensor.attr("data_ptr")().cast<uintptr_t>();
    Add({reinterpret_cast<void*>(address), kind_, static_cast<int>(shape_.size()), shape_.data(),
         strides_.data()});
  }

 private:
  static Layout::Kind KindOf(const py::object& dtype_of, const py::object& device_of) {
    const auto dtype = py::str(dtype_of).cast<std::string>();
    const auto device = device_of.attr("type").cast<std::string>();
    const py::object index = device_of.attr("index");
    Layout::Kind kind = {Layout::Kind::kUnknown, 0, device == "cpu" ? dlpack::kCpu : dlpack::kCuda,
                         index.is_none() ? 0 : index.cast<int32_t>()};
    if (device != "cpu" && device != "cuda") return kind;
    const auto is = [&](const char* name, uint8_t code, uint8_t bits) {
      if (dtype == name) kind.dtype_code = code, kind.dtype_bits = bits;
    };
    is("torch.float32", dlpack::kFloat, 32);
    is("torch.float64", dlpack::kFloat, 64);
    is("torch.float16", dlpack::kFloat, 16);
    is("torch.bfloat16", dlpack::kBFloat, 16);
    return kind;
  }

  py::object dtype_, device_;  // of the last tensor
  Layout::Kind kind_;
  std::vector<int64_t> shape_, strides_;
};

}  // namespace

TensorList::TensorList(const py::list& tensors, bool use_exchange_api) {
  ListBuilder list(tensors.size());
  const dlpack::ExchangeApi* api = use_exchange_api && !tensors.empty()
                                       ? ExchangeApiOf(py::type::handle_of(tensors[0]))
                                       : nullptr;
  for (const py::handle tensor : tensors) {
    if (api == nullptr) {
      list.AddThroughPython(tensor);
      continue;
    }
    View view;
    if (!Read(api, tensor, &view)) throw py::error_already_set();
    list.Add(view);
  }
  addresses_ = std::move(list.addresses);
  layout_ = std::move(list.layout);
}

bool Layout::Kind::IsFloat(int bits) const {
  return dtype_code == dlpack::kFloat && dtype_bits == bits;
}

DType TensorList::dtype() const {
  if (layout_->kinds.empty()) return DType::kFloat32;
  const Layout::Kind& first = layout_->kinds[0];
  DType dtype;
  if (first.IsFloat(32)) {
    dtype = DType::kFloat32;
  } else if (first.IsFloat(16)) {
    dtype = DType::kFloat16;
  } else if (first.dtype_code == dlpack::kBFloat && first.dtype_bits == 16) {
    dtype = DType::kBFloat16;
  } else {
    throw py::type_error("the core has kernels for float32, bfloat16 and float16 only");
  }
  for (const Layout::Kind& kind : layout_->kinds) {
    if (!(kind == first)) throw py::type_error("tensors of a list differ in dtype or device");
  }
  return dtype;
}

bool TensorList::IsAlike(const TensorList& other) const {
  if (layout_ == other.layout_) return true;
  if (layout_->kinds != other.layout_->kinds || layout_->dims != other.layout_->dims) return false;
  other.layout_ = layout_;
  return true;
}

std::shared_ptr<const ChunkPlan> TensorList::Plan(int64_t chunk_size) const {
  if (plan_ == nullptr || plan_->chunk_size() != chunk_size) {
    plan_ = std::make_shared<ChunkPlan>(numel().data(), static_cast<int64_t>(size()), chunk_size);
  }
  return plan_;
}

void TensorList::RequireDisjoint(const char* name) const {
  if (is_disjoint_) return;
  const int64_t element_size = SizeOf(dtype());
  std::vector<size_t> order;
  for (size_t i = 0; i < size(); ++i) {
    if (numel()[i] > 0) order.push_back(i);
  }
  std::sort(order.begin(), order.end(),
            [&](size_t i, size_t j) { return addresses_[i] < addresses_[j]; });
  for (size_t k = 1; k < order.size(); ++k) {
    const size_t i = order[k - 1];
    const char* end = static_cast<char*>(addresses_[i]) + numel()[i] * element_size;
    if (static_cast<char*>(addresses_[order[k]]) < end) {
      throw py::value_error(std::string(name) + "[" + std::to_string(i) + "] and " + name + "[" +
                            std::to_string(order[k]) + "] overlap in memory");
    }
  }
  is_disjoint_ = true;
}

TensorReader::TensorReader(py::type tensor, py::type parameter)
    : tensor_(std::move(tensor)),
      parameter_(std::move(parameter)),
      grad_(tensor_.attr("grad")),
      version_(tensor_.attr("_version")),
      is_neg_(tensor_.attr("is_neg")),
      default_dict_(py::module_::import("collections").attr("defaultdict")),
      exchange_api_(ExchangeApiOf(tensor_)) {}

py::object TensorReader::Gradients(py::handle candidates, const py::list& params,
                                   const std::shared_ptr<TensorList>& known) const {
  const auto* api = static_cast<const dlpack::ExchangeApi*>(exchange_api_);
  if (api == nullptr || params.size() != known->size() || !PyList_Check(candidates.ptr())) {
    return py::none();
  }
  py::list grads(params.size());
  AlikeReader of_params(*known), of_grads(*known);
  size_t found = 0;
  // CPython's own functions: this loop is most of what the host does in a step.
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(candidates.ptr()); ++i) {
    PyObject* const param = PyList_GET_ITEM(candidates.ptr(), i);
    if (!IsPlain(param)) return py::none();
    const py::object grad = Get(grad_, param);
    if (grad.is_none()) continue;
    if (found == params.size() || param != PyList_GET_ITEM(params.ptr(), found)) return py::none();
    // PyTorch negates imaginary parts when it reads them. Their elements lie two apart, and those
    // of a parameter do not: only a single one can be laid out as its parameter.
    if (!IsPlain(grad) || (known->numel()[found] == 1 && IsNegated(grad))) return py::none();
    if (!of_params.Add(api, param) || !of_grads.Add(api, grad)) return py::none();
    if (of_grads.addresses()[found] == of_params.addresses()[found] && known->numel()[found] > 0) {
      return py::none();  // p.grad = p.data
    }
    PyList_SET_ITEM(grads.ptr(), found++, grad.inc_ref().ptr());
  }
  if (found != params.size()) return py::none();
  const bool stayed = of_params.addresses() == known->addresses();
  return py::make_tuple(grads, of_grads.Take(), stayed ? known : of_params.Take());
}

py::object TensorReader::State(py::handle state, const py::list& params, const py::str& name,
                               const TensorList& like, bool numbers, py::handle seen) const {
  const auto* api = static_cast<const dlpack::ExchangeApi*>(exchange_api_);
  if (api == nullptr || params.size() != like.size() || !IsPlainDict(state.ptr())) {
    return py::none();
  }
  py::list tensors(params.size());
  AlikeReader of_tensors(like);
  ListBuilder of_numbers(numbers ? like.size() : 0);
  // As a rule the states of a group lie one after the other, in the order of its parameters.
  // Looking them up would take longer: Tensor.__hash__ is Python.
  Py_ssize_t position = 0;
  for (size_t i = 0; i < params.size(); ++i) {
    PyObject* const param = PyList_GET_ITEM(params.ptr(), i);
    PyObject *key = nullptr, *of_param = nullptr;
    bool is_next;
    do {
      is_next = PyDict_Next(state.ptr(), &position, &key, &of_param) != 0;
    } while (i == 0 && is_next && key != param);
    if (!is_next || key != param) of_param = PyDict_GetItemWithError(state.ptr(), param);
    PyObject* found = nullptr;
    if (of_param != nullptr && IsPlainDict(of_param)) {
      found = PyDict_GetItemWithError(of_param, name.ptr());
    }
    if (PyErr_Occurred()) throw py::error_already_set();
    if (found == nullptr || !IsPlain(found)) return py::none();
    py::object tensor = py::reinterpret_borrow<py::object>(found);
    const bool was_seen = PyList_Check(seen.ptr()) &&
                          static_cast<size_t>(PyList_GET_SIZE(seen.ptr())) == params.size() &&
                          PyList_GET_ITEM(seen.ptr(), i) == found;
    if (!was_seen && IsNegated(tensor)) return py::none();
    if (numbers) {
      View view;
      if (!Read(api, tensor, &view)) {
        PyErr_Clear();
        return py::none();
      }
      if (view.ndim != 0 || !(view.kind.IsFloat(32) || view.kind.IsFloat(64)) ||
          !view.kind.IsBeside(like.layout()->kinds[i])) {
        return py::none();
      }
      of_numbers.Add(view);
    } else if (!of_tensors.Add(api, tensor)) {
      return py::none();
    }
    PyList_SET_ITEM(tensors.ptr(), i, tensor.release().ptr());
  }
  auto list = numbers ? std::make_shared<TensorList>(std::move(of_numbers.addresses),
                                                     std::move(of_numbers.layout))
                      : of_tensors.Take();
  return py::make_tuple(tensors, std::move(list));
}

py::list TensorReader::Versions(const py::list& tensors) const {
  py::list versions;
  for (const py::handle tensor : tensors) versions.append(Get(version_, tensor));
  return versions;
}

}  // namespace samkernels
