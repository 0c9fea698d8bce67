#include "tensor.h"

namespace lucid {
namespace {

DLExchangeApi* exchange = nullptr;
PyTypeObject* tensor_type = nullptr;
PyObject* grad_descriptor = nullptr;  // of torch.Tensor: calls its getter without a look-up
descrgetfunc get_grad = nullptr;
PyObject* is_neg_name = nullptr;
PyObject* is_conj_name = nullptr;
PyObject* local_name = nullptr;
PyObject* spec_name = nullptr;

// torch keeps up to 5 sizes in the tensor itself. In front of them lie the addresses of its storage and of what
// autograd keeps of it. connect() looks whether that is so.
constexpr int inline_dims = 5;
constexpr int storage_before_shape = 6, autograd_before_shape = 5;  // in words
bool knows_words = false;

uintptr_t word_before_shape(const DLTensor& tensor, int words) { return static_cast<uintptr_t>(tensor.shape[-words]); }

bool finds_storage(PyObject* tensor) {
  DLTensor found;
  PyObject* storage = PyObject_CallMethod(tensor, "untyped_storage", nullptr);
  PyObject* address = storage == nullptr ? nullptr : PyObject_GetAttrString(storage, "_cdata");
  const bool finds = address != nullptr && read(tensor, &found) &&
                     word_before_shape(found, storage_before_shape) == PyLong_AsSize_t(address);
  PyErr_Clear();
  Py_XDECREF(address);
  Py_XDECREF(storage);
  return finds;
}

int64_t element_size(DLDataType type) { return type.bits / 8; }

bool answers_false(PyObject* tensor, PyObject* question) {
  PyObject* answer = PyObject_VectorcallMethod(question, &tensor, 1, nullptr);
  if (answer == nullptr) PyErr_Clear();
  const bool is_false = answer == Py_False;
  Py_XDECREF(answer);
  return is_false;
}

}  // namespace

PyTypeObject* sharded_type = nullptr;

bool connect(nb::handle tensor) {
  PyObject* capsule = PyObject_GetAttrString(tensor.ptr(), "__dlpack_c_exchange_api__");
  if (capsule == nullptr) {
    PyErr_Clear();
    return false;
  }
  auto* api = static_cast<DLExchangeApi*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  Py_DECREF(capsule);
  if (api == nullptr) PyErr_Clear();
  if (api == nullptr || api->major != 1 || api->tensor_from_object == nullptr) return false;
  exchange = api;
  tensor_type = reinterpret_cast<PyTypeObject*>(tensor.inc_ref().ptr());
  grad_descriptor = PyObject_GetAttrString(tensor.ptr(), "grad");
  if (grad_descriptor == nullptr) return false;
  get_grad = reinterpret_cast<descrgetfunc>(PyType_GetSlot(Py_TYPE(grad_descriptor), Py_tp_descr_get));
  if (get_grad == nullptr) return false;
  PyObject* empty = PyObject_CallNoArgs(tensor.ptr());
  knows_words = empty != nullptr && finds_storage(empty);
  PyErr_Clear();
  Py_XDECREF(empty);
  is_neg_name = PyUnicode_InternFromString("is_neg");
  is_conj_name = PyUnicode_InternFromString("is_conj");
  return true;
}

void connect_sharded(nb::handle type) {
  if (sharded_type != nullptr) return;
  local_name = PyUnicode_InternFromString("_local_tensor");
  spec_name = PyUnicode_InternFromString("_spec");
  sharded_type = reinterpret_cast<PyTypeObject*>(type.inc_ref().ptr());
}

PyObject* local_shard_of(PyObject* sharded) {
  PyObject* local = PyObject_GetAttr(sharded, local_name);
  if (local == nullptr) {
    PyErr_Clear();
    return sharded;
  }
  Py_DECREF(local);  // the sharded tensor holds it
  return local;
}

PyObject* spec_of(PyObject* sharded) {
  PyObject* spec = PyObject_GetAttr(sharded, spec_name);
  if (spec == nullptr) PyErr_Clear();
  return spec;
}

bool spread_alike(PyObject* spec, PyObject* other) {
  for (const char* what : {"placements", "mesh", "shape"}) {
    PyObject* one = PyObject_GetAttrString(spec, what);
    PyObject* another = one == nullptr ? nullptr : PyObject_GetAttrString(other, what);
    const int equal = another == nullptr ? -1 : PyObject_RichCompareBool(one, another, Py_EQ);
    PyErr_Clear();
    Py_XDECREF(one);
    Py_XDECREF(another);
    if (equal != 1) return false;
  }
  return true;
}

bool read(PyObject* object, DLTensor* out) {
  if (exchange->tensor_from_object(object, out) == 0) return true;
  PyErr_Clear();
  return false;
}

Near near(const DLTensor& tensor) {
  Near found{reinterpret_cast<uintptr_t>(tensor.shape)};
  if (knows_words && tensor.ndim <= inline_dims) {
    found.storage = word_before_shape(tensor, storage_before_shape);
    found.autograd = word_before_shape(tensor, autograd_before_shape);
  }
  return found;
}

bool is_plain_tensor(PyObject* object) { return Py_TYPE(object) == tensor_type; }

PyObject* gradient_of(PyObject* param) {
  return get_grad(grad_descriptor, param, reinterpret_cast<PyObject*>(Py_TYPE(param)));
}

bool is_lazy_view(PyObject* tensor) {
  return !answers_false(tensor, is_neg_name) || !answers_false(tensor, is_conj_name);
}

bool on_cpu(const DLTensor& tensor) { return tensor.device.type == 1; }

bool has_addresses(const DLTensor& tensor) {
  return tensor.device.type == 1 || tensor.device.type == 2 || tensor.device.type == 10;
}

bool aligned(const DLTensor& tensor) {
  const int64_t part = tensor.dtype.code == 5 ? element_size(tensor.dtype) / 2 : element_size(tensor.dtype);
  return reinterpret_cast<uintptr_t>(tensor.data) % static_cast<uintptr_t>(part) == 0;
}

int64_t elements(const DLTensor& tensor) {
  int64_t n = 1;
  for (int k = 0; k < tensor.ndim; ++k) n *= tensor.shape[k];
  return n;
}

int64_t span_in_bytes(const DLTensor& tensor) {
  if (elements(tensor) == 0) return 0;
  int64_t last = 0;
  for (int k = 0; k < tensor.ndim; ++k) last += (tensor.shape[k] - 1) * tensor.strides[k];
  return (last + 1) * element_size(tensor.dtype);
}

bool real_type(DLDataType type, Type* out) {
  const int bits = type.code == 5 ? type.bits / 2 : type.bits;
  if (type.code == 4 && bits == 16) {
    *out = Type::bfloat16;
  } else if (type.code != 2 && type.code != 5) {
    return false;
  } else if (bits == 64) {
    *out = Type::float64;
  } else if (bits == 32) {
    *out = Type::float32;
  } else if (bits == 16 && type.code == 2) {
    *out = Type::float16;
  } else {
    return false;
  }
  return true;
}

bool has_weak_references(PyObject* object) {
  static PyObject* count_of = nullptr;
  if (count_of == nullptr) count_of = PyObject_GetAttrString(nb::module_::import_("weakref").ptr(), "getweakrefcount");
  PyObject* count = count_of == nullptr ? nullptr : PyObject_Vectorcall(count_of, &object, 1, nullptr);
  const bool none = count != nullptr && PyLong_AsLong(count) == 0;
  PyErr_Clear();
  Py_XDECREF(count);
  return !none;
}

long storage_references(PyObject* tensor) {
  static PyObject* use_count = nullptr;
  if (use_count == nullptr)
    use_count = PyObject_GetAttrString(nb::module_::import_("torch._C").ptr(), "_storage_Use_Count");
  PyObject* storage = PyObject_CallMethod(tensor, "untyped_storage", nullptr);
  PyObject* address = storage == nullptr ? nullptr : PyObject_GetAttrString(storage, "_cdata");
  PyObject* count =
      address == nullptr || use_count == nullptr ? nullptr : PyObject_Vectorcall(use_count, &address, 1, nullptr);
  const long references = count == nullptr ? -1 : PyLong_AsLong(count) + static_cast<long>(Py_REFCNT(storage));
  PyErr_Clear();
  Py_XDECREF(count);
  Py_XDECREF(address);
  Py_XDECREF(storage);
  return references;
}

}  // namespace lucid
