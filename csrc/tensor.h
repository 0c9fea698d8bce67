// Reads a torch tensor through its Python object: memory, shape, gradient, and the references to it.
#pragma once

#include <nanobind/nanobind.h>

#include "dlpack.h"
#include "kernels.h"

namespace lucid {

namespace nb = nanobind;

// Call it once with torch.Tensor, before anything else here. Returns false if torch has no DLPack exchange API.
bool connect(nb::handle tensor_type);

// Call it with the class of sharded tensors (DTensor) before the first of them.
void connect_sharded(nb::handle sharded_type);

extern PyTypeObject* sharded_type;
inline bool is_sharded(PyObject* object) { return Py_TYPE(object) == sharded_type; }
// The local shard of a sharded tensor: a borrowed reference.
PyObject* local_shard_of(PyObject* sharded);
// The local shard of a sharded tensor; any other object itself.
inline PyObject* local_of(PyObject* object) { return is_sharded(object) ? local_shard_of(object) : object; }
// The spec of a sharded tensor, which says how it is sharded: a new reference, or null.
PyObject* spec_of(PyObject* sharded);
// Whether two specs shard a tensor of the same shape in the same way.
bool spread_alike(PyObject* spec, PyObject* other);

// Addresses that torch will read when the tensor is read again, only to prefetch them; 0 if unknown.
struct Near {
  uintptr_t shape = 0, storage = 0, autograd = 0;

  void prefetch() const {
    for (const uintptr_t at : {shape - 64, shape, shape + 64, storage, autograd, autograd + 64}) {
      __builtin_prefetch(reinterpret_cast<const void*>(at));
    }
  }
};
Near near(const DLTensor& tensor);

// Returns false if the object is not a tensor with its own memory.
bool read(PyObject* object, DLTensor* out);
// Whether its class is torch.Tensor itself, not a subclass.
bool is_plain_tensor(PyObject* object);
// The `grad` of a parameter: a new reference, or null with an exception set.
PyObject* gradient_of(PyObject* param);
// Whether its values are lazily conjugated or negated.
bool is_lazy_view(PyObject* tensor);

bool on_cpu(const DLTensor& tensor);
// Whether its device has memory addresses that kernels can use: CUDA, ROCm, or the CPU.
bool has_addresses(const DLTensor& tensor);
bool aligned(const DLTensor& tensor);
int64_t elements(const DLTensor& tensor);
// From the first element to the end of the last.
int64_t span_in_bytes(const DLTensor& tensor);
inline bool is_complex(DLDataType type) { return type.code == 5; }
// Gives the type of its real numbers; returns false if the engine does not support it.
bool real_type(DLDataType type, Type* out);

bool has_weak_references(PyObject* object);
// The number of references to a tensor's storage, from C++ and from Python; -1 if unknown. A storage without other
// references has the same count as that of a new tensor.
long storage_references(PyObject* tensor);

}  // namespace lucid
