// What is read of a torch tensor, by way of its Python object: memory, shape, gradient, and who else holds it.
#pragma once

#include <nanobind/nanobind.h>

#include "dlpack.h"
#include "kernels.h"

namespace lucid {

namespace nb = nanobind;

// Given torch.Tensor once, before anything else here is called. False where torch has no DLPack exchange API.
bool connect(nb::handle tensor_type);

// Given the class of tensors that are spread over processes, once any may be met.
void connect_sharded(nb::handle sharded_type);

extern PyTypeObject* sharded_type;
inline bool is_sharded(PyObject* object) { return Py_TYPE(object) == sharded_type; }
// What this process holds of a sharded tensor: a borrowed reference.
PyObject* part_of(PyObject* sharded);
// The same, of any other object itself.
inline PyObject* local_of(PyObject* object) { return is_sharded(object) ? part_of(object) : object; }
// How a sharded tensor is spread: a new reference, or null.
PyObject* spec_of(PyObject* sharded);
// Whether two such specs spread a tensor of one shape alike.
bool spread_alike(PyObject* spec, PyObject* other);

// False where the object is no tensor with memory of its own.
bool read(PyObject* object, DLTensor* out);
// torch.Tensor itself, no subclass.
bool is_plain_tensor(PyObject* object);
// The `grad` of a parameter: a new reference, or null with an exception set.
PyObject* gradient_of(PyObject* param);
// Whether its numbers are to be read as conjugated or negated.
bool is_lazy_view(PyObject* tensor);

bool on_cpu(const DLTensor& tensor);
// A kind of device whose memory has addresses that a kernel there can be given: CUDA or ROCm, or the CPU.
bool has_addresses(const DLTensor& tensor);
bool aligned(const DLTensor& tensor);
int64_t elements(const DLTensor& tensor);
// From the first element to behind the last.
int64_t span_in_bytes(const DLTensor& tensor);
inline bool is_complex(DLDataType type) { return type.code == 5; }
// The type of a real number in it; false where the engine has none for it.
bool real_type(DLDataType type, Type* out);

bool has_weak_references(PyObject* object);
// Counts the references to a tensor's storage, from C++ and from Python; -1 if that cannot be told. A storage that
// nobody else holds has the count that a fresh tensor's has.
long storage_references(PyObject* tensor);

}  // namespace lucid
