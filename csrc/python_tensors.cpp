#include "python_tensors.h"

#include <string>

namespace py = pybind11;

namespace samkernels {
namespace {

// The part of DLPack's binary interface that is used here (dmlc/dlpack, include/dlpack/dlpack.h,
// major version 1).
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

// What reads tensors of this type, or null.
const dlpack::ExchangeApi* ExchangeApiOf(py::handle tensor) {
  const py::object capsule =
      py::getattr(py::type::handle_of(tensor), "__dlpack_c_exchange_api__", py::none());
  if (!PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) return nullptr;
  const auto* api = static_cast<const dlpack::ExchangeApi*>(
      PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  return api->major == dlpack::kMajorVersion && api->read != nullptr ? api : nullptr;
}

}  // namespace

TensorList::TensorList(const py::list& tensors, bool use_exchange_api) {
  const size_t count = tensors.size();
  addresses_.reserve(count);
  numel_.reserve(count);
  kinds_.reserve(count);
  layouts_.reserve(6 * count);
  const dlpack::ExchangeApi* api =
      use_exchange_api && count > 0 ? ExchangeApiOf(tensors[0]) : nullptr;
  for (const py::handle tensor : tensors) {
    if (api == nullptr) {
      ReadThroughPython(tensor);
      continue;
    }
    dlpack::Tensor view;
    if (api->read(tensor.ptr(), &view) != 0) throw py::error_already_set();
    Add(static_cast<char*>(view.data) + view.byte_offset,
        {view.dtype.code, view.dtype.bits, view.device.type, view.device.id}, view.ndim, view.shape,
        view.strides);
  }
}

void TensorList::Add(void* address, Kind kind, int ndim, const int64_t* shape,
                     const int64_t* strides) {
  int64_t numel = 1;
  for (int i = 0; i < ndim; ++i) numel *= shape[i];
  addresses_.push_back(address);
  numel_.push_back(numel);
  kinds_.push_back(kind);
  layouts_.push_back(ndim);
  for (int i = 0; i < ndim; ++i) {
    layouts_.push_back(shape[i]);
    layouts_.push_back(shape[i] > 1 && numel > 0 ? strides[i] : 0);
  }
}

void TensorList::ReadThroughPython(py::handle tensor) {
  const auto dtype = py::str(tensor.attr("dtype")).cast<std::string>();
  const auto device = tensor.attr("device").attr("type").cast<std::string>();
  const py::object index = tensor.attr("device").attr("index");
  Kind kind = {kUnknown, 0, device == "cpu" ? dlpack::kCpu : dlpack::kCuda,
               index.is_none() ? 0 : index.cast<int32_t>()};
  if (device == "cpu" || device == "cuda") {
    if (dtype == "torch.float32") kind = {dlpack::kFloat, 32, kind.device_type, kind.device_index};
    if (dtype == "torch.float16") kind = {dlpack::kFloat, 16, kind.device_type, kind.device_index};
    if (dtype == "torch.bfloat16")
      kind = {dlpack::kBFloat, 16, kind.device_type, kind.device_index};
  }
  std::vector<int64_t> shape, strides;
  for (const py::handle size : tensor.attr("shape")) shape.push_back(size.cast<int64_t>());
  for (const py::handle stride : tensor.attr("stride")()) {
    strides.push_back(stride.cast<int64_t>());
  }
  const auto address = tensor.attr("data_ptr")().cast<uintptr_t>();
  Add(reinterpret_cast<void*>(address), kind, static_cast<int>(shape.size()), shape.data(),
      strides.data());
}

DType TensorList::dtype() const {
  if (kinds_.empty()) return DType::kFloat32;
  const Kind& first = kinds_[0];
  DType dtype;
  if (first.dtype_code == dlpack::kFloat && first.dtype_bits == 32) {
    dtype = DType::kFloat32;
  } else if (first.dtype_code == dlpack::kFloat && first.dtype_bits == 16) {
    dtype = DType::kFloat16;
  } else if (first.dtype_code == dlpack::kBFloat && first.dtype_bits == 16) {
    dtype = DType::kBFloat16;
  } else {
    throw py::type_error("the core has kernels for float32, bfloat16 and float16 only");
  }
  for (const Kind& kind : kinds_) {
    if (!(kind == first)) throw py::type_error("tensors of a list differ in dtype or device");
  }
  return dtype;
}

bool TensorList::IsAlike(const TensorList& other) const {
  return kinds_ == other.kinds_ && layouts_ == other.layouts_;
}

}  // namespace samkernels
